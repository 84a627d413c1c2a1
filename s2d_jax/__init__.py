"""Sorted Speculative Decoding in JAX: one sorted draft makes many target models faster, without changing their output.

The public names stand in `__init__.pyi`; each is loaded when it is first asked for.
"""

import lazy_loader

from s2d_jax.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
