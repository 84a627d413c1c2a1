"""Writes a target's own first layers, untrained, as a sorted draft: the worst draft that anybody would use.

Usage: untrained_draft.py TARGET OUT [EXITS]   (default 6,9,12)
"""

import sys

from s2d_jax import load_model
from s2d_jax.config.draft import DraftConfig
from s2d_jax.model.select_layers import truncated
from s2d_jax.weights.export import export_draft
from s2d_jax.weights.model import Draft

target = load_model(sys.argv[1])
exits = tuple(int(e) for e in (sys.argv[3] if len(sys.argv) > 3 else "6,9,12").split(","))
config, params = truncated(target.config, target.params, exits[-1])
thresholds = (*(0.5 for _ in exits[1:]), 0.0)
draft = Draft(config, params, target.tokenizer, sys.argv[2], DraftConfig(exits, thresholds))
export_draft(draft, sys.argv[2], {"untrained": sys.argv[1].rsplit("/", 1)[-1]})
