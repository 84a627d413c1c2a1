"""What each of two processes sees; `test_processes.py` starts this file twice, and reads the JSON that it prints."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from s2d_jax.processes import is_main_process, of_main_process, start_processes, wait_for_all
from s2d_jax.sharding import MeshConfig, batch_sharding, make_mesh
from train.data.batches import make_batch

ROWS, LENGTH = 8, 4


class Recorded:
    """Rows that remember which of them were read."""

    def __init__(self):
        self.read: set[int] = set()

    def with_format(self, _: str) -> Recorded:
        return self

    def __getitem__(self, index):
        if np.ndim(index) == 0:
            return {"tokens": [0] * LENGTH}
        self.read |= set(index.tolist())
        ones = np.ones((len(index), LENGTH), np.int32)
        return {"tokens": ones * index[:, None], "segment_ids": ones, "answer": ones > 0}


def main() -> None:
    start_processes()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, slices=2))
    rows = Recorded()
    batch = make_batch(rows, np.arange(ROWS), batch_sharding(mesh))  # pyright: ignore[reportArgumentType]
    total = jax.jit(lambda x: x.sum())(batch.tokens_BT)
    wait_for_all("checked")
    found = {
        "main": is_main_process(),
        "rows": sorted(rows.read),
        "total": int(total),
        "number": of_main_process(np.pi + jax.process_index()),
        "owners": [[d.process_index for d in place] for place in mesh.devices[:, :, 0].tolist()],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
