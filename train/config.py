"""The configuration of a run: frozen sections, strict YAML that holds differences only, overrides from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from s2d_jax.config import DraftConfig, ExitParts, UserError
from s2d_jax.sharding import MeshConfig

Part = Literal["trunk", "lora", "exit_heads", "exit_adapters"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model that the draft starts from, and how it is computed."""

    path: str
    """Hugging Face directory or hub id, or a .gguf file."""
    num_layers: int | None = None
    """The draft is the first this many layers; None takes the whole model."""
    layers: tuple[int, ...] = ()
    """Or these layers of it, counted from 0, such as 0 2 4 ... 22."""
    lora_rank: int = 0
    """Low-rank adapters of this rank on every matrix of the layers; 0 has none."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Activations and products; master weights, loss and optimizer stay f32."""
    remat: bool = True
    """Recompute each layer in the backward pass: less memory, a third more work."""

    def __post_init__(self):
        _require(bool(self.path), "model.path is empty; give a model directory, hub id or .gguf")
        _require(
            self.num_layers is None or self.num_layers >= 1,
            f"model.num_layers={self.num_layers} must be at least 1, or None for the whole model",
        )
        _require(
            self.num_layers is None or not self.layers,
            f"model.num_layers={self.num_layers} and model.layers={self.layers} both choose layers; give one",
        )
        _require(
            not self.layers or min(self.layers) >= 0,
            f"model.layers={self.layers} must be 0 or more: layers are counted from 0",
        )
        _require(self.lora_rank >= 0, f"model.lora_rank={self.lora_rank} must be 0 (none) or more")

    @property
    def depth(self) -> int | None:
        """Layers of the draft, as far as the configuration alone tells."""
        return len(self.layers) or self.num_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSection:
    """Where the draft can be left."""

    exit_layers: tuple[int, ...] = (6, 9, 12)
    """Layer counts after which the shared norm and head read the state."""
    exit_weights: tuple[float, ...] = ()
    """Weight of each exit's loss, one per exit; empty means equal."""
    exit_thresholds: tuple[float, ...] = ()
    """Default confidence thresholds stored with the draft; empty means 0.5, ..., 0."""
    exit_heads: tuple[int, ...] = ()
    """Exits that get a head of their own, which starts as a copy of the shared one."""
    exit_adapters: tuple[int, ...] = ()
    """Exits that get a residual low-rank adapter before the shared norm."""
    adapter_rank: int = 256
    """Width of those adapters."""
    vocabulary: str | None = None
    """List of tokens from infer.trim: the heads are read, and trained, over these only."""

    def __post_init__(self):
        self.draft_config()
        weights = self.loss_weights
        _require(
            len(weights) == len(self.exit_layers),
            f"draft.exit_weights={weights} has {len(weights)} values for {len(self.exit_layers)} "
            f"exits {self.exit_layers}; give one per exit",
        )
        _require(
            min(weights) >= 0 and sum(weights) > 0,
            f"draft.exit_weights={weights} must be 0 or more and not all 0",
        )

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """One weight per exit."""
        return self.exit_weights or (1.0,) * len(self.exit_layers)

    @property
    def parts(self) -> ExitParts:
        """What exits have of their own."""
        rank = self.adapter_rank if self.exit_adapters else 0
        return ExitParts(self.exit_heads, self.exit_adapters, rank)

    def draft_config(self) -> DraftConfig:
        """The exits, thresholds and exits' own parts in the form that is stored with the draft."""
        return DraftConfig(self.exit_layers, self.exit_thresholds, self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """What every exit learns: the next token, a teacher's distribution, or a mix of both."""

    ce_weight: float = 1.0
    """Of the cross-entropy to the next token."""
    distill_weight: float = 0.0
    """Of the divergence from the teachers."""
    divergence: Literal["forward_kl", "reverse_kl", "tvd"] = "forward_kl"
    """Between a teacher's distribution and an exit's."""
    teachers: tuple[str, ...] = ()
    """Targets of the same vocabulary, as model directories, hub ids or .gguf; the mean over them is taken."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the teachers' weights and products."""
    teacher_top_k: int = 0
    """Store this many of each teacher's probabilities per token before training; 0 runs the teachers in every step."""

    def __post_init__(self):
        for name in ("ce_weight", "distill_weight", "teacher_top_k"):
            value = getattr(self, name)
            _require(value >= 0, f"objective.{name}={value} must be 0 or more")
        _require(
            self.ce_weight + self.distill_weight > 0,
            "objective.ce_weight and objective.distill_weight are both 0; nothing would be learned, so raise one",
        )
        _require(
            (self.distill_weight > 0) == bool(self.teachers),
            f"objective.distill_weight={self.distill_weight} and objective.teachers={self.teachers} "
            "go together; give both or neither",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSection:
    """How acceptance is measured while training, on the held-out rows."""

    target: str | None = None
    """Model whose argmax the exits should meet; None takes the first teacher, or else the answers themselves."""
    draft_tokens: int = 5
    """Tokens drafted per round in the implied mean acceptance length."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well (needs the tensorboard extra)."""

    def __post_init__(self):
        _require(
            self.draft_tokens >= 1, f"watch.draft_tokens={self.draft_tokens} must be at least 1"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """Conversations, and how they become rows."""

    paths: tuple[str, ...]
    """ShareGPT or {"messages": [...]} as JSON, JSONL, parquet, Arrow or a directory of save_to_disk, told apart by content."""
    weights: tuple[float, ...] = ()
    """How often each row of each source is seen per epoch: 2.5 is twice, and half of them once more; empty means 1."""
    cache_dir: str | None = None
    """Packed rows are kept here for later runs. Default: $S2D_DATA_CACHE, else ~/.cache/s2d-jax/data."""
    max_length: int = 2048
    """Tokens per packed row; longer conversations are truncated and counted."""
    held_out_fraction: float = 0.01
    """Share of the rows kept for evaluation; 0 keeps none."""
    num_proc: int = 1
    """Processes that tokenize."""

    def __post_init__(self):
        _require(len(self.paths) > 0, "data.paths is empty; give at least one conversation file")
        _require(
            len(self.weights) in (0, len(self.paths)),
            f"data.weights={self.weights} has {len(self.weights)} values for {len(self.paths)} paths; give one per path",
        )
        _require(
            all(0 < weight < float("inf") for weight in self.weights),
            f"data.weights={self.weights} must be above 0; leave out the path of a source that is not wanted",
        )
        _require(self.max_length >= 2, f"data.max_length={self.max_length} must be at least 2")
        _require(
            0 <= self.held_out_fraction < 1,
            f"data.held_out_fraction={self.held_out_fraction} must be in [0, 1)",
        )
        _require(self.num_proc >= 1, f"data.num_proc={self.num_proc} must be at least 1")

    @property
    def source_weights(self) -> tuple[float, ...]:
        """One weight per path."""
        return self.weights or (1.0,) * len(self.paths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimSection:
    """AdamW under a cosine schedule with linear warm-up. The defaults are the paper's."""

    learning_rate: float = 2e-5
    """Peak rate."""
    final_fraction: float = 0.0
    """The cosine ends at this share of the peak."""
    warmup_fraction: float = 0.04
    """Share of the run in which the rate rises from 0."""
    weight_decay: float = 0.0
    """Applied to matrices, not to norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    """The gradient's global norm is clipped to this."""

    def __post_init__(self):
        for name in ("learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            _require(value > 0, f"optim.{name}={value} must be above 0")
        for name in ("final_fraction", "warmup_fraction", "beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name}={value} must be in [0, 1)")
        _require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must be >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How long, how large the steps, and what is written when. The defaults are the paper's."""

    run_dir: str = "runs/soft"
    """Receives config.yaml, draft description, tokenizer, metrics.jsonl and checkpoints/."""
    resume: bool = False
    """Go on from the newest checkpoint of run_dir."""
    batch_size: int = 128
    """Packed rows per step, over all devices."""
    accumulate: int = 1
    """Each step is computed in this many equal parts: less memory, the same gradient."""
    epochs: float = 3.0
    """Passes over the rows; max_steps overrides it."""
    max_steps: int | None = None
    """Stop after this many steps."""
    max_minutes: float | None = None
    """Stop after this many minutes (compilation apart); the schedule then follows whichever is further, steps or time."""
    learn: tuple[Part, ...] = ()
    """What is trained; the rest is frozen. Empty: the small parts where there are any, else the whole model."""
    loss_chunk: int = 256
    """Positions per row whose logits are held at once."""
    seed: int = 0
    """Orders the rows and chooses those held out."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between evaluations on the held-out rows."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is one at the end as well."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self):
        _require(bool(self.run_dir), "train.run_dir is empty; give a directory")
        for name in (
            *("batch_size", "accumulate", "loss_chunk", "log_every"),
            *("eval_every", "checkpoint_every", "keep_checkpoints"),
        ):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}={value} must be at least 1")
        for name in ("epochs", "max_steps", "max_minutes"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"train.{name}={value} must be above 0")
        _require(0 <= self.seed < 2**31, f"train.seed={self.seed} must be in [0, 2**31)")
        _require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} does not divide into "
            f"train.accumulate={self.accumulate} parts; choose a divisor",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Every field can be overridden: `--optim.learning-rate 1e-4`."""

    model: ModelSection
    data: DataSection
    draft: DraftSection = DraftSection()
    objective: ObjectiveSection = ObjectiveSection()
    optim: OptimSection = OptimSection()
    mesh: MeshConfig = MeshConfig()
    watch: WatchSection = WatchSection()
    train: TrainSection = TrainSection()

    def __post_init__(self):
        if self.model.depth is not None:
            self.check_exits(self.model.depth)
        present = self._small_parts()
        for part in self.train.learn:
            _require(
                part == "trunk" or part in present,
                f"train.learn={self.train.learn} names {part}, which this draft does not have; "
                "set model.lora_rank, draft.exit_heads or draft.exit_adapters",
            )
        shards = self.mesh.data * self.mesh.fsdp
        part = self.train.batch_size // self.train.accumulate
        _require(
            part % shards == 0,
            f"train.batch_size={self.train.batch_size} / train.accumulate={self.train.accumulate} "
            f"= {part} rows do not divide over mesh.data x mesh.fsdp = {shards}; choose a multiple",
        )

    def _small_parts(self) -> tuple[Part, ...]:
        sizes: dict[Part, object] = {
            "lora": self.model.lora_rank,
            "exit_heads": self.draft.exit_heads,
            "exit_adapters": self.draft.exit_adapters,
        }
        return tuple(part for part, size in sizes.items() if size)

    @property
    def learned_parts(self) -> tuple[Part, ...]:
        """What is trained."""
        return self.train.learn or self._small_parts() or ("trunk",)

    def check_exits(self, num_layers: int) -> None:
        """Raises UserError unless the deepest exit is the draft's last layer: deeper layers would never learn anything."""
        self.draft.draft_config().check_depth(num_layers)
        deepest = self.draft.exit_layers[-1]
        _require(
            deepest == num_layers,
            f"draft.exit_layers={self.draft.exit_layers} ends before the draft's {num_layers} layers; "
            f"add exit {num_layers}, or set model.num_layers to {deepest}",
        )

    def to_yaml(self) -> str:
        """Every field, in the form that `load_config` reads."""
        plain = dataclasses.asdict(self, dict_factory=_plain_dict)
        return yaml.safe_dump(plain, sort_keys=False)


def _plain_dict(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as a string; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path) -> Config:
    """Reads a YAML file of differences from the defaults.

    Raises:
        UserError: for a file that cannot be read, an unknown key, a wrong type or a bad value.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give --config an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return _build(Config, {} if values is None else values, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(section: type, values: Any, prefix: str) -> Any:
    """A dataclass from plain YAML values, strictly."""
    where = prefix.rstrip(".") or "the file"
    _require(isinstance(values, dict), f"{where} must hold `key: value` pairs, not {_kind(values)}")
    hints = typing.get_type_hints(section)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise UserError(f"unknown key {prefix}{key}; {hint}known keys: {', '.join(hints)}")
    for field in dataclasses.fields(section):
        required = field.default is dataclasses.MISSING
        _require(
            not required or field.name in values,
            f"{prefix}{field.name} is missing; it has no default",
        )
    return section(
        **{key: _typed(hints[key], value, prefix + key) for key, value in values.items()}
    )


def _typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as `hint`, or UserError; an int is taken where a float is asked for."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        return _typed(args[0], value, name)
    if origin is Literal:
        _require(value in args, f"{name}={value!r} is unknown; use one of {', '.join(args)}")
        return value
    if origin is tuple:
        _require(isinstance(value, list), f"{name}={value!r} must be a list, not {_kind(value)}")
        return tuple(_typed(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, f"{name}={value!r} must be {_NAMES[hint]}, not {_kind(value)}")
    return value


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS = {**_NAMES, list: "a list", dict: "a section", type(None): "empty"}


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def parse_command_line(arguments: list[str], prog: str) -> Config:
    """The configuration of `--config FILE --section.field value ...`; prints help for `--help` and exits.

    Raises:
        UserError: for anything wrong in the file or on the command line.
    """
    path, overrides = _split_config_flag(arguments)
    wants_help = "-h" in overrides or "--help" in overrides
    if path is None and not wants_help:
        raise UserError(
            "--config is missing; give a YAML file, for example configs/smollm2_demo.yaml"
        )
    default = tyro.MISSING_NONPROP if path is None else load_config(path)
    return parse_flags(Config, overrides, f"{prog} --config FILE", default)


Flags = TypeVar("Flags")


def parse_flags(
    flags: type[Flags], arguments: list[str], prog: str, default: Any = tyro.MISSING_NONPROP
) -> Flags:
    """A dataclass from the command line; prints help for `--help` and exits.

    Raises:
        UserError: for anything wrong on the command line.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                flags,
                default=default,
                args=arguments,
                prog=prog,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(message.getvalue())) from None


def _split_config_flag(arguments: list[str]) -> tuple[str | None, list[str]]:
    rest, path = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            path = next(remaining, None)
            _require(path is not None, "--config is the last word; give it a YAML file")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return path, rest


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws, in colour, Unicode or ASCII, with its first suggestion."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│| ") for line in plain.splitlines()[1:]]  # the first line is the title
    blocks = itertools.groupby(lines, key=lambda line: set(line) <= set("─-╰╯"))
    texts = [list(block) for is_rule, block in blocks if not is_rule]
    message = " ".join(" ".join(texts[0]).split()) if texts else "the command line is not valid"
    suggestions = [line.split()[0] for line in lines if re.match(r"--\w", line)]
    if "Perhaps you meant" in plain and suggestions:
        message += f"; did you mean {suggestions[0]}?"
    # tyro names the section before an error of ours, which names it already.
    return re.sub(r"^Error parsing (\w+: )?", "", message)
