"""What is measured: a target and a draft, with random weights that are made on the device, or a target from a file."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from infer.accelerator_check.args import Args
from infer.accelerator_check.arithmetic import head_weights, layer_weights
from s2d_jax.backends import platform_of
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.mesh import MeshConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.machine import memory_of_a_device
from s2d_jax.model.params import Params, abstract_params, logical_axes
from s2d_jax.sharding import make_mesh, params_sharding, replicated
from s2d_jax.weights.load import load_model
from s2d_jax.weights.model import Draft, Model


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes, and how much of each part is measured with them.

    Attributes:
        config: the target.
        exits: of the draft, which is as deep as the last.
        widths: of verify passes.
        prompts: lengths of prompts.
        rounds: in one run of the decoding loop.
        rows: of a training step, on each device; fewer where these do not fit.
        length: tokens of such a row.
    """

    config: ModelConfig
    exits: tuple[int, ...]
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prompts: tuple[int, ...] = (128, 512, 2048)
    rounds: int = 32
    rows: int = 16
    length: int = 2048


_7B = ModelConfig("llama", 32_000, 4096, 11_008, 32, 32, 32, 128, 1e-5, 10_000.0, 4096)
_1B = ModelConfig("llama", 32_000, 2048, 5632, 22, 32, 4, 64, 1e-5, 10_000.0, 4096)
_TINY = ModelConfig("llama", 64, 32, 48, 2, 4, 4, 8, 1e-5, 10_000.0, 512)
SIZES = {
    "7b": Size(_7B, (6, 9, 12)),
    "1b": Size(_1B, (6, 9, 12)),
    "tiny": Size(_TINY, (1, 2), (1, 4), (32,), 4, 2, 32),
}
# What activations, caches and programs take beside the weights, as a share of a device's memory.
_SPARE = 0.2


def choose_size(platform: str, memory: float, tensor: int) -> str:
    """The largest size whose target and draft fit beside each other in bf16; the toy on a CPU.

    Args:
        platform: as JAX names it.
        memory: bytes of a device.
        tensor: devices that share the target.
    """
    if platform == "cpu":
        return "tiny"
    for name, size in SIZES.items():
        embedding, layer = 2 * head_weights(size.config), layer_weights(size.config)
        target = (embedding + size.config.num_layers * layer) / tensor
        draft = embedding + size.exits[-1] * layer
        if 2 * (target + draft) <= (1 - _SPARE) * memory:
            return name
    return "tiny"


@dataclasses.dataclass
class Subject:
    """A target and its draft, made when they are first asked for.

    Attributes:
        name: of the size, or of the model.
        size: shapes and amounts.
        mesh: where the target is split; None on one device.
        seed: of the random weights.
        model: where the target is read from; None draws it.
    """

    name: str
    size: Size
    mesh: Mesh | None
    seed: int
    model: Model | None = None

    @functools.cached_property
    def target(self) -> Model:
        """The target in bf16, split over the mesh."""
        if self.model is not None:
            return self.model
        config = self.size.config
        sharding = None
        if self.mesh is not None:
            sharding = params_sharding(config, logical_axes(config), self.mesh)
        params = random_params(config, jnp.bfloat16, self.seed, sharding)
        return Model(config, params, None, f"random weights, {self.name}")

    @functools.cached_property
    def draft(self) -> Draft:
        """The draft in bf16, whole on every device."""
        config, sharding = self.draft_config, None
        if self.mesh is not None:
            whole = replicated(self.mesh)
            sharding = jax.tree.map(lambda _: whole, abstract_params(config))
        params = random_params(config, jnp.bfloat16, self.seed + 1, sharding)
        exits = DraftConfig(self.size.exits)
        return Draft(config, params, None, "random draft", exits)

    @property
    def draft_config(self) -> ModelConfig:
        """The draft's shape."""
        return dataclasses.replace(self.size.config, num_layers=self.size.exits[-1])

    def release(self) -> None:
        """Frees target and draft, so that training has the device for itself."""
        self.model = None
        for name in ("target", "draft"):
            self.__dict__.pop(name, None)


def subject_of(args: Args) -> Subject:
    """What the flags ask for.

    Raises:
        UserError: for a mesh that does not fit the devices or the model, or a model that cannot be read.
    """
    if args.model is not None:
        model = load_model(args.model, weight_format="bf16")
        depth = model.config.num_layers
        exits = tuple(sorted({max(depth * part // 8, 1) for part in (1, 2, 3)}))
        longest = model.config.max_context // 2
        prompts = tuple(n for n in SIZES["7b"].prompts if n <= longest) or (longest,)
        size = Size(model.config, exits, prompts=prompts, length=min(2048, longest))
        return Subject(args.model, size, None, args.seed, model)
    devices = args.mesh.tensor or len(jax.devices())
    name = args.size or choose_size(platform_of(None), memory_of_a_device(), devices)
    size = SIZES[name]
    tensor = args.mesh.tensor or most_devices(size.config, devices)
    mesh = make_mesh(MeshConfig(tensor=tensor)) if tensor > 1 else None
    if mesh is not None:  # a size that does not divide is refused before anything is measured
        params_sharding(size.config, logical_axes(size.config), mesh)
    return Subject(name, size, mesh, args.seed)


def most_devices(config: ModelConfig, devices: int) -> int:
    """The most of so many devices over which key/value heads, hidden units and vocabulary divide evenly."""
    common = math.gcd(config.num_heads, config.num_kv_heads, config.ffw_dim, config.vocab_size)
    return max(count for count in range(1, devices + 1) if common % count == 0)


def random_params(config: ModelConfig, dtype: Any, seed: int, sharding: Any = None) -> Params:
    """Weights drawn on the device, one after another: normal(0, 0.02), norms 1.

    Args:
        config: the shape.
        dtype: of all weights.
        seed: of the draws.
        sharding: a tree of shardings, one for each weight; None takes the default device.
    """
    shapes, tree = jax.tree.flatten(abstract_params(config, dtype))
    places = [None] * len(shapes) if sharding is None else jax.tree.leaves(sharding)
    keys = [jax.random.fold_in(jax.random.key(seed), number) for number in range(len(shapes))]
    drawn = [
        _program(shape.shape, jnp.dtype(dtype), place)(key)
        for key, shape, place in zip(keys, shapes, places, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


@functools.cache
def _program(shape: tuple[int, ...], dtype: Any, sharding: Any):
    def draw(key):
        if len(shape) < 2:
            return jnp.ones(shape, dtype)
        return 0.02 * jax.random.normal(key, shape, dtype)

    return jax.jit(draw, out_shardings=sharding)
