"""Softmax and the sampling filters in NumPy, by sorting. Shares no code with the product."""

from __future__ import annotations

import numpy as np


def softmax(row) -> np.ndarray:
    """In f64."""
    powers = np.exp(np.asarray(row, np.float64) - np.max(row))
    return powers / powers.sum()


def filtered(row, sampling) -> np.ndarray:
    """Temperature, top-k, top-p, min-p as Hugging Face does it; `sampling` has these names. Temperature 0 is one-hot."""
    if sampling.temperature == 0:
        return np.eye(len(row))[np.argmax(row)]
    probs = softmax(np.asarray(row, np.float64) / sampling.temperature)
    order = np.argsort(-probs, kind="stable")
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
        probs /= probs.sum()
    if sampling.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= sampling.top_p]] = 0
        probs /= probs.sum()
    probs[probs < sampling.min_p * probs.max()] = 0
    return probs / probs.sum()
