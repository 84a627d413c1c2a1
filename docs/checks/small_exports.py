"""Sizes of whole exports and of exports on a base, for the small parts that a sorted draft may have.

Usage: small_exports.py MODEL OUT
"""

import sys
from pathlib import Path

import jax

from s2d_jax import (
    Draft,
    DraftConfig,
    ExitParts,
    LoraConfig,
    export_draft,
    export_parts,
    load_draft,
    load_model,
)
from s2d_jax.model.exit_parts import init_exit_parts
from s2d_jax.model.lora import init_lora
from s2d_jax.model.select_layers import truncated

model, out = load_model(sys.argv[1]), Path(sys.argv[2])
config, trunk = truncated(model.config, model.params, 12)
cases = {
    "adapters of rank 256 at exits 6 and 9": (ExitParts((), (6, 9), 256), None),
    "own heads at exits 6 and 9": (ExitParts((6, 9)), None),
    "LoRA of rank 16": (ExitParts(), LoraConfig(16)),
}
for name, (parts, lora) in cases.items():
    params = init_exit_parts(config, trunk, parts, jax.random.key(0))
    params = init_lora(params, lora, jax.random.key(1)) if lora else params
    exits = DraftConfig((6, 9, 12), parts=parts)
    draft = Draft(config, params, model.tokenizer, "untrained", exits)
    export_draft(draft, out / "whole", {})
    export_parts(draft, out / "small", base=sys.argv[1], layers=range(12), provenance={})
    sizes = {
        kind: sum(file.stat().st_size for file in (out / kind).rglob("*.safetensors")) / 1e6
        for kind in ("whole", "small")
    }
    whole, small = (jax.tree.leaves(load_draft(out / kind).params) for kind in sizes)
    equal = all(bool((a == b).all()) for a, b in zip(whole, small, strict=True))
    print(f"{name}: {sizes['whole']:.1f} MB whole, {sizes['small']:.1f} MB on a base; {equal = }")
