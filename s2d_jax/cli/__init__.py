"""What the commands of `infer` and `train` share: arguments, errors on one line, progress, prompts, figures.

Nothing else in `s2d_jax` imports it.
"""
