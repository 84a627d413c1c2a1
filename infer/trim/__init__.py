"""`python -m infer.trim`: lists fewer tokens for a draft's head."""
