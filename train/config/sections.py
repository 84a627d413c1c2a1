"""The configuration of a run: frozen sections that refuse bad values."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

import yaml

from s2d_jax.cli.flags import Switch, flag
from s2d_jax.config.decode import MOST_DRAFTED
from s2d_jax.config.draft import DraftConfig, ExitParts
from s2d_jax.config.mesh import MeshConfig
from s2d_jax.config.plain import plain_fields
from s2d_jax.errors import require
from s2d_jax.files import local_path
from s2d_jax.model.remat import RematPolicy

Part = Literal["trunk", "lora", "exit_heads", "exit_adapters"]
# Fields of `train` that must be 1 or more.
_COUNTS = (
    "batch_size", "accumulate", "loss_chunk", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip
# Tokens of a step: as many as 32 bits can number.
_MOST_TOKENS = 2**31 - 1
_MOST_PROCESSES = 1024
# Wider than any model whose products it would be an adapter of.
_LARGEST_RANK = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model that the draft starts from, and how it is computed."""

    path: Annotated[str, flag("MODEL")]
    """Hugging Face directory or hub id, or a .gguf file."""
    num_layers: Annotated[int | None, flag("INT", "all")] = None
    """The draft is this many of the model's first layers."""
    layers: Annotated[tuple[int, ...], flag("INT ...", "those of --model.num-layers")] = ()
    """Or these layers of the model, counted from 0, such as 0 2 4 ... 22."""
    lora_rank: int = 0
    """Rank of low-rank adapters on every matrix of the layers; 0 adds none."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and products; master weights, loss and optimizer stay f32."""
    remat: RematPolicy = "block"
    """What the backward pass computes again: none of a layer; all but its products with weights; or the whole block, with the
    least memory and a third more work."""

    def __post_init__(self):
        plain_fields(self, "model.")
        require(
            self.remat in get_args(RematPolicy),
            f"model.remat={self.remat!r} is unknown; use one of {', '.join(get_args(RematPolicy))}",
        )
        require(bool(self.path), "model.path is empty; give a model directory, hub id or .gguf")
        require(
            self.num_layers is None or self.num_layers >= 1,
            f"model.num_layers={self.num_layers} must be at least 1, or None for the whole model",
        )
        require(
            self.num_layers is None or not self.layers,
            f"model.num_layers={self.num_layers} and model.layers={self.layers} both choose layers; give one",
        )
        require(
            not self.layers or min(self.layers) >= 0,
            f"model.layers={self.layers} must be 0 or more: layers are counted from 0",
        )
        require(
            0 <= self.lora_rank <= _LARGEST_RANK,
            f"model.lora_rank={self.lora_rank} must be 0 (none) to {_LARGEST_RANK}",
        )

    @property
    def depth(self) -> int | None:
        """Layers of the draft, if the configuration alone tells."""
        return len(self.layers) or self.num_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSection:
    """Where the draft can be left."""

    exit_layers: Annotated[tuple[int, ...], flag("INT ...")] = (6, 9, 12)
    """Layer counts after which the shared norm and head read the state."""
    exit_weights: Annotated[tuple[float, ...], flag("FLOAT ...", "equal")] = ()
    """Weight of each exit's loss, one per exit."""
    exit_thresholds: Annotated[tuple[float, ...], flag("FLOAT ...", "0.5 ... 0.5 0")] = ()
    """Confidence thresholds stored with the draft, one per exit; the last is 0."""
    exit_heads: Annotated[tuple[int, ...], flag("INT ...", "none")] = ()
    """Exits that get a head of their own, which starts as a copy of the shared one."""
    exit_adapters: Annotated[tuple[int, ...], flag("INT ...", "none")] = ()
    """Exits that get a residual low-rank adapter before the shared norm."""
    adapter_rank: int = 256
    """Rank of those adapters."""
    vocabulary: Annotated[str | None, flag("FILE", "all tokens")] = None
    """List of tokens from infer.trim: the heads are read and trained over these only."""

    def __post_init__(self):
        plain_fields(self, "draft.")
        require(
            self.adapter_rank <= _LARGEST_RANK,
            f"draft.adapter_rank={self.adapter_rank} must be at most {_LARGEST_RANK}",
        )
        self.draft_config()
        weights = self.loss_weights
        require(
            len(weights) == len(self.exit_layers),
            f"draft.exit_weights={weights} has {len(weights)} values for {len(self.exit_layers)} "
            f"exits {self.exit_layers}; give one per exit",
        )
        require(
            min(weights) >= 0 and sum(weights) > 0,
            f"draft.exit_weights={weights} must be 0 or more and not all 0",
        )

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """One weight per exit."""
        return self.exit_weights or (1.0,) * len(self.exit_layers)

    @property
    def parts(self) -> ExitParts:
        """The parts that belong to single exits."""
        rank = self.adapter_rank if self.exit_adapters else 0
        return ExitParts(self.exit_heads, self.exit_adapters, rank)

    def draft_config(self) -> DraftConfig:
        """The exits, their thresholds and their parts, as stored with the draft."""
        return DraftConfig(self.exit_layers, self.exit_thresholds, self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """What every exit learns: the next token, a teacher's distribution, or a mix of both."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy to the next token."""
    distill_weight: float = 0.0
    """Weight of the divergence from the teachers."""
    divergence: Literal["forward_kl", "reverse_kl", "tvd"] = "forward_kl"
    """Divergence between a teacher's distribution and an exit's."""
    teachers: Annotated[tuple[str, ...], flag("MODEL ...", "none")] = ()
    """Targets of the same vocabulary, as model directories, hub ids or .gguf files; their divergences are averaged."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the teachers' weights and products."""
    teacher_top_k: int = 0
    """Store each teacher's this many largest probabilities per token before training; 0 runs the teachers in every step."""

    def __post_init__(self):
        plain_fields(self, "objective.")
        for name in ("ce_weight", "distill_weight", "teacher_top_k"):
            value = getattr(self, name)
            require(value >= 0, f"objective.{name}={value} must be 0 or more")
        require(
            self.ce_weight + self.distill_weight > 0,
            "objective.ce_weight and objective.distill_weight are both 0; nothing would be learned, so raise one",
        )
        require(
            (self.distill_weight > 0) == bool(self.teachers),
            f"objective.distill_weight={self.distill_weight} and objective.teachers={self.teachers} "
            "go together; give both or neither",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchSection:
    """How acceptance is measured while training, on the held-out rows."""

    target: Annotated[
        str | None, flag("MODEL", "the first teacher, or else the answers themselves")
    ] = None
    """Model whose argmax the exits should meet."""
    draft_tokens: int = 5
    """Tokens drafted per round in the implied mean acceptance length."""
    tensorboard: Switch = False
    """Write the metrics for TensorBoard as well (needs the tensorboard extra)."""

    def __post_init__(self):
        plain_fields(self, "watch.")
        require(
            1 <= self.draft_tokens <= MOST_DRAFTED,
            f"watch.draft_tokens={self.draft_tokens} must be 1 to {MOST_DRAFTED}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """Conversations, and how they become rows."""

    paths: Annotated[tuple[str, ...], flag("FILE ...")]
    """ShareGPT, {"messages": [...]} or prompt and completion, as JSON, JSONL, parquet, Arrow, what save_to_disk wrote, or a
    folder of parquet files; the content tells which."""
    weights: Annotated[tuple[float, ...], flag("FLOAT ...", "once")] = ()
    """How often the rows of each source are seen per epoch: 2.5 is all rows twice, and half of them once more."""
    chat_template: Annotated[str | None, flag("NAME_OR_FILE", "the model's default")] = None
    """Chat template that writes the conversations: one that the model has under this name, a file with one, or vicuna."""
    cache_dir: Annotated[str | None, flag("DIR", "$S2D_DATA_CACHE, else ~/.cache/s2d-jax/data")] = (
        None
    )
    """Where packed rows are kept for later runs."""
    max_length: int = 2048
    """Tokens per packed row; longer conversations are truncated and counted."""
    held_out_fraction: float = 0.01
    """Share of the rows kept for evaluation; 0 keeps none."""
    num_proc: int = 1
    """Processes that tokenize."""

    def __post_init__(self):
        plain_fields(self, "data.")
        require(len(self.paths) > 0, "data.paths is empty; give at least one conversation file")
        require(
            len(self.weights) in (0, len(self.paths)),
            f"data.weights={self.weights} has {len(self.weights)} values for {len(self.paths)} paths; give one per path",
        )
        require(
            all(0 < weight < float("inf") for weight in self.weights),
            f"data.weights={self.weights} must be above 0; leave out the path of a source that is not wanted",
        )
        require(self.max_length >= 2, f"data.max_length={self.max_length} must be at least 2")
        require(
            0 <= self.held_out_fraction < 1,
            f"data.held_out_fraction={self.held_out_fraction} must be in [0, 1)",
        )
        require(
            1 <= self.num_proc <= _MOST_PROCESSES,
            f"data.num_proc={self.num_proc} must be 1 to {_MOST_PROCESSES}",
        )

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
        plain_fields(self, "optim.")
        for name in ("learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            require(value > 0, f"optim.{name}={value} must be above 0")
        for name in ("final_fraction", "warmup_fraction", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}={value} must be in [0, 1)")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must be >= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How long to train, how large the steps are, and what is written when. The defaults are the paper's."""

    run_dir: Annotated[str, flag("DIR")] = "runs/soft"
    """A directory on this machine. It receives config.yaml, draft description, tokenizer, metrics.jsonl and checkpoints/."""
    resume: Switch = False
    """Go on from the newest checkpoint of run_dir."""
    batch_size: int = 128
    """Packed rows per step, over all devices."""
    accumulate: int = 1
    """Compute each step in this many equal parts: less memory, the same gradient."""
    epochs: float = 3.0
    """Passes over the rows; max_steps overrides it."""
    max_steps: Annotated[int | None, flag("INT", "as --train.epochs says")] = None
    """Stop after this many steps."""
    max_minutes: Annotated[float | None, flag("FLOAT", "no limit")] = None
    """Stop after this many minutes, compilation not counted; the schedule then follows steps or time, whichever is further."""
    learn: Annotated[
        tuple[Part, ...],
        flag("{trunk,lora,exit_heads,exit_adapters} ...", "the small parts if any, else all"),
    ] = ()
    """What is trained; the rest is frozen."""
    loss_chunk: int = 256
    """Positions per row whose logits are held at once."""
    seed: int = 0
    """Decides the order of the rows, and which are held out."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between evaluations on the held-out rows."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is one at the end as well."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self):
        plain_fields(self, "train.")
        require(bool(self.run_dir), "train.run_dir is empty; give a directory")
        local_path(self.run_dir, "train.run_dir")
        for name in _COUNTS:
            value = getattr(self, name)
            require(value >= 1, f"train.{name}={value} must be at least 1")
        for name in ("epochs", "max_steps", "max_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}={value} must be above 0")
        require(
            0 <= self.seed < 2**64, f"train.seed={self.seed} must be 0 or more, of at most 64 bits"
        )
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} does not divide into "
            f"train.accumulate={self.accumulate} parts; choose a divisor",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

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
            require(
                part == "trunk" or part in present,
                f"train.learn={self.train.learn} names {part}, which this draft does not have; "
                "set model.lora_rank, draft.exit_heads or draft.exit_adapters",
            )
        tokens = self.train.batch_size * self.data.max_length
        require(
            tokens <= _MOST_TOKENS,
            f"train.batch_size={self.train.batch_size} rows of data.max_length={self.data.max_length} tokens are "
            f"{tokens} tokens a step; at most {_MOST_TOKENS} can be numbered, so lower one of them",
        )
        shards = self.mesh.data * self.mesh.fsdp
        part = self.train.batch_size // self.train.accumulate
        require(
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
        """Raises UserError unless the deepest exit is the draft's last layer: layers beyond it would never learn anything."""
        self.draft.draft_config().check_depth(num_layers)
        deepest = self.draft.exit_layers[-1]
        require(
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
