"""`python -m infer.calibrate`: how to decode with a target and a draft on this machine."""
