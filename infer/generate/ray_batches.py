"""Batches answered by the workers of a Ray cluster: each has the whole model, and the driver plans, collects and writes.

Ray Data's `map_batches` keeps one decoder in each of its actors, gives an actor the next batch when it has answered one, and
gives the batch of an actor that died to another. This process loads no weights and uses no device.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import io
import logging
import os
import pickle
import platform
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer.generate.batching import Job
from infer.generate.engine import Answered, Engine, load_decoder
from s2d_jax.cli.command import say_once
from s2d_jax.cli.loading import check_drafting, describe_target
from s2d_jax.cli.screen import screen
from s2d_jax.errors import UserError, printable
from s2d_jax.progress.activity import activity

if TYPE_CHECKING:
    import pyarrow

    from infer.generate.args import Args

# A batch whose worker died this often is what kills workers: the next would die of it, too.
_MOST_STARTS = 4
# Ray's own lines on the screen, of its C++ parts and of Ray Data; its log files and its dashboard stay.
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_PROMPT_ENABLED": "0"}


@contextlib.contextmanager
def ray_engine(args: Args) -> Iterator[Engine]:
    """Decoders on the workers of the cluster of `--ray`.

    Raises:
        UserError: for a target, flags, a cluster or resources that are not there. What only a worker notices, such as a draft
            that does not fit, is raised when batches are answered.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--ray needs Ray, which is not installed; pip install 's2d-jax[ray]'")
    check_drafting(args.draft, args.loading, args.drafting)
    config, tokenizer = describe_target(
        args.target[0], args.loading, args.draft, raw=args.answering.raw
    )
    address, asked = args.cluster.ray, args.cluster.asked()
    assert address is not None
    if args.answering.as_conversations and args.loading.compile_cache is None:
        say_once("decoders start anew in each turn; with --compile-cache DIR they compile once")
    with _connected(address):
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = decoders_that_fit(asked, machines)
        one_each = args.cluster.ray_resources is None  # a decoder on a CPU uses all of it
        workers = args.cluster.ray_workers or sum(min(fit, 1) if one_each else fit for fit in fits)
        if workers > sum(fits):
            say_once(
                f"the cluster has room for {sum(fits)} of {workers} decoders; the others start when machines join it"
            )
        yield Engine(config, tokenizer, None, functools.partial(_answer, args, workers, asked))


def decoders_that_fit(asked: dict[str, float], machines: Sequence[dict[str, float]]) -> list[int]:
    """How many decoders fit on each machine of a cluster.

    Args:
        asked: what each decoder asks for.
        machines: what each machine has.

    Raises:
        UserError: if none fits on any. Ray would wait for such a machine, without an end.
    """
    fits = [
        int(min(machine.get(name, 0.0) / amount for name, amount in asked.items()) + 1e-6)
        for machine in machines
    ]
    if not any(fits):
        most = {name: max((m.get(name, 0.0) for m in machines), default=0.0) for name in asked}
        raise UserError(
            f"--ray-resources {_amounts(asked)}: no machine of the cluster has all of it (the most on one: {_amounts(most)}); "
            "ask for less, or start such a machine first"
        )
    return fits


def _amounts(amounts: dict[str, float]) -> str:
    return ",".join(f"{printable(name)}={amount:g}" for name, amount in amounts.items())


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connects this process to the cluster; a `local` one ends with it."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        settings["include_dashboard"] = False
    with activity(f"connecting to Ray at {address}", key="connecting to ray", guess=5.0):
        try:
            with _silent_stderr():
                ray.init(address=address, **settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray {address}: no Ray cluster answers ({_first_line(error)}); start one with ray start --head, give --ray "
                "HOST:PORT, or for a cluster with tokens set RAY_AUTH_MODE=token"
            ) from None
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """What Ray's C++ parts write to stderr goes nowhere: they tell there that they were told to be silent. Python's stays."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with os.fdopen(os.dup(2), "w") as python_side, open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            with contextlib.redirect_stderr(python_side):
                yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _first_line(error: BaseException) -> str:
    return printable(next(iter(str(error).splitlines()), type(error).__name__)).rstrip(".")


class Starts:
    """Counts how often each batch was begun, in an actor of its own, which outlives the decoders."""

    def __init__(self):
        self._starts: collections.Counter[int] = collections.Counter()

    def begin(self, number: int) -> int:
        """Counts one more; returns how many there were."""
        self._starts[number] += 1
        return self._starts[number]

    def again(self) -> int:
        """How many batches were begun more than once."""
        return sum(count > 1 for count in self._starts.values())


class Decoding:
    """A warm decoder in an actor; `map_batches` makes one per actor and calls it with one job at a time."""

    def __init__(self, args: Args, starts: Any):
        self._starts, self._error = starts, ""
        try:
            self._decoder, self._models = load_decoder(args)
        except (UserError, OSError) as error:  # the user's: Ray would bury it in tracebacks
            self._error = str(error)

    def __call__(self, jobs: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        results = [pickle.dumps(self._result(row["job"])) for row in jobs.to_pylist()]
        return pyarrow.table({"result": results})

    def _result(self, pickled: bytes) -> Answered | str:
        """The answers of a job, or the line of an error."""
        import ray

        where = f"the worker on {platform.node()}"
        if self._error:
            return f"{where}: {self._error}"
        job: Job = pickle.loads(pickled)
        begun: int = ray.get(self._starts.begin.remote(job.number))
        if begun > _MOST_STARTS:
            return (
                f"{where}: {_MOST_STARTS} workers died of the batch whose longest prompt has {max(map(len, job.prompts))} "
                "tokens, perhaps for want of memory; lower --batch-size, or give each decoder more with --ray-resources"
            )
        try:
            return Answered(job.number, job.answers(self._decoder), self._models)
        except (UserError, OSError) as error:
            return f"{where}: {error}"


def _answer(
    args: Args, workers: int, asked: dict[str, float], jobs: Sequence[Job]
) -> Generator[Answered, None, None]:
    """Answers jobs on the cluster, in the order in which they are done."""
    if not jobs:
        return
    import ray
    import ray.data

    as_actor: Any = ray.remote
    starts = as_actor(Starts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    others = {name: amount for name, amount in asked.items() if name not in ("CPU", "GPU")}
    rows = [{"job": pickle.dumps(job)} for job in jobs]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Decoding,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=(_for_workers(args), starts),
        # A second job in an actor's queue would wait for it while others are idle at the end.
        compute=ray.data.ActorPoolStrategy(
            size=min(workers, len(jobs)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=asked["CPU"],
        num_gpus=asked.get("GPU"),
        resources=others or None,
    )
    # Each is given out when it is there, not when the next one is, too.
    batches = answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    tables: Any = iter(batches)
    with contextlib.closing(tables):  # Ray Data must have ended before Ray does
        while (table := _next(tables)) is not None:
            for row in table.to_pylist():
                result = pickle.loads(row["result"])
                if isinstance(result, str):
                    raise UserError(result)
                yield result
    if again := ray.get(starts.again.remote()):
        line = f"note: {again} of {len(jobs)} batches were answered again, after their workers died"
        screen(stderr=True).print(line, soft_wrap=True)


def _next(tables: Iterator[pyarrow.Table]) -> pyarrow.Table | None:
    """The next table, None at the end. What Ray prints about dead workers meanwhile would stand in the progress bar."""
    with contextlib.redirect_stdout(io.StringIO()):
        return next(tables, None)


def _for_workers(args: Args) -> Args:
    """The flags with paths from the root, since workers stand in other directories."""

    def absolute(value: str | None) -> str | None:
        return (
            None
            if value is None
            else str(Path(value).absolute())
            if os.path.exists(value)
            else value
        )

    loading, cache = args.loading, args.loading.compile_cache
    return dataclasses.replace(
        args,
        target=tuple(absolute(path) or path for path in args.target),
        draft=absolute(args.draft),
        chain=dataclasses.replace(args.chain, policy_file=absolute(args.chain.policy_file)),
        tree=dataclasses.replace(args.tree, tree_paths=absolute(args.tree.tree_paths)),
        loading=dataclasses.replace(
            loading,
            draft_vocabulary=absolute(loading.draft_vocabulary),
            chat_template=absolute(loading.chat_template),
            compile_cache=None if cache is None else cache.absolute(),
        ),
    )
