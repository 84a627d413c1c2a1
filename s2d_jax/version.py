"""The version of s2d-jax; pyproject.toml reads it here."""

__version__ = "0.1.0"
