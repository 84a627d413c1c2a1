"""Command lines over s2d_jax: generate, bench, export."""
