"""What chips can do, from their makers' data sheets: the limits that a program is held against."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: as a topology names it.
        platform: as JAX names it: "gpu" or "tpu".
        kinds: how JAX's `device_kind` may begin.
        flops: bf16 multiplications and additions per second, dense.
        bandwidth: bytes per second from its main memory.
        memory: bytes of its main memory.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    flops: float
    bandwidth: float
    memory: float

    def seconds(self, flops: float, num_bytes: float) -> float:
        """The least seconds that a program of so many operations and bytes takes (roofline; Williams et al. 2009)."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


CHIPS = (
    Chip("h100", "gpu", ("NVIDIA H100",), 989e12, 3.35e12, 80e9),
    Chip("h200", "gpu", ("NVIDIA H200",), 989e12, 4.8e12, 141e9),
    Chip("a100", "gpu", ("NVIDIA A100",), 312e12, 2.04e12, 80e9),
    Chip("v4", "tpu", ("TPU v4",), 275e12, 1.23e12, 32e9),
    Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 0.82e12, 16e9),
    Chip("v5p", "tpu", ("TPU v5p", "TPU v5"), 459e12, 2.77e12, 95e9),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 1.64e12, 32e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls by this name; None for one that is not listed."""
    fitting = [
        (len(kind), chip)
        for chip in CHIPS
        for kind in chip.kinds
        if device_kind.lower().startswith(kind.lower())
    ]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def chip_named(name: str) -> Chip | None:
    """The chip of a topology's name, such as "v5p" of "v5p:2x2x2"; None for one that is not listed."""
    return next((chip for chip in CHIPS if chip.name == name), None)
