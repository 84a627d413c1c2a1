"""A run from beginning to end: start, steps, evaluation, metrics, checkpoints, preemption."""
