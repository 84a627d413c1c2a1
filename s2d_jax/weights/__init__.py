"""Weights and what belongs to them: loading, preparing for decoding, trimmed heads, export, and the checkpoints of runs.

File formats themselves belong to `formats`, computing to `model`.
"""
