"""Commands that use s2d_jax: generate, bench, calibrate, trim, export, demo_model."""
