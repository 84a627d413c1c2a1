"""`python -m infer.trim`: a shorter vocabulary for a draft's head."""
