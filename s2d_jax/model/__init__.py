"""The transformer: layers, key/value caches, exits, LoRA, and how its products are computed.

What runs a forward pass belongs here. Files belong to `formats` and `weights`, drafting and rounds to `draft` and `decode`.
"""

import lazy_loader

# `s2d_jax.model.selected` is public.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"select_layers": ["selected"]}
)
