"""The rules of acceptance themselves, by exact enumeration: they keep the target's law, and known wrong ones do not."""

from __future__ import annotations

import numpy as np
import pytest
import reference_tree as reference


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_rule_by_enumeration(count):
    rng = np.random.default_rng(count)
    for _ in range(50):
        p, q = rng.dirichlet(np.full(4, 0.7), size=2)
        np.testing.assert_allclose(reference.emitted_law(p, q, count), p, atol=1e-12)


def test_the_rule_by_enumeration_where_p_or_q_is_0():
    p, q = np.array([0.0, 0.5, 0.3, 0.2]), np.array([0.4, 0.6, 0.0, 0.0])
    np.testing.assert_allclose(reference.emitted_law(p, q, 2), p, atol=1e-12)


def test_how_wrong_the_wrong_rules_are():
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    kept = reference.emitted_law(p, q, 2, renormalise=False)
    assert np.abs(kept - p).max() > 0.02

    def best_first(tokens, q):
        return sorted(tokens, key=lambda token: -q[token])

    reranked = reference.emitted_law(p, q, 2, order=lambda *drawn: best_first(*drawn)[:1])
    assert np.abs(reranked - p).max() > 0.02
    reordered = reference.emitted_law(p, q, 2, order=best_first)
    assert np.abs(reordered - p).max() > 0.02
