"""Which trees can be asked for."""

from __future__ import annotations

import itertools

import pytest

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape
from s2d_jax.errors import UserError


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"depth": 0}, "depth=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"nodes": 1}, "nodes=1"),
        ({"depth": 4, "nodes": 4}, "nodes=4"),
        ({"depth": 2, "top_k": 2, "nodes": 8}, "nodes=8"),
        ({"leaving": "never"}, "leaving='never'"),
        ({"paths": ((0,), (1,))}, "TreeShape.static"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(values, named):
    with pytest.raises(UserError) as error:
        TreeShape(**values)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("paths", "named"), [((), "no paths"), (((),), "no paths"), (((0,), (-1,)), "rank -1")], ids=str
)
def test_impossible_paths_are_refused(paths, named):
    with pytest.raises(UserError, match=named):
        TreeShape.static(paths)


def test_the_largest_and_the_smallest_tree():
    assert TreeShape(depth=2, top_k=2, nodes=7).nodes == 7  # 1 + 2 + 2 * 2
    assert TreeShape(depth=3, top_k=1, nodes=4).nodes == 4


def test_a_static_shape_adds_what_lies_above_its_paths():
    shape = TreeShape.static(((1, 0, 2), (0,), (1, 0, 2), ()))
    assert set(shape.paths) == {(0,), (1,), (1, 0), (1, 0, 2)}
    assert (shape.depth, shape.top_k, shape.nodes) == (3, 3, 5)
    assert shape == TreeShape.static(shape.paths)


def test_a_static_tree_may_expand_more_nodes_of_a_level_than_a_node_has_children():
    full = TreeShape.static(list(itertools.product((0, 1), repeat=4)))
    assert (full.depth, full.top_k, full.nodes) == (4, 2, 31)
    # The same tree, once the ranks between are closed.
    gapped = TreeShape.static(list(itertools.product((0, 9), repeat=4)))
    assert (gapped.top_k, gapped.without_gaps()) == (10, full)


@pytest.mark.parametrize("rule", ["heuristic", "confidence", "expected_gain"])
def test_trees_need_the_fixed_rule(rule):
    with pytest.raises(UserError, match="draft_length_rule"):
        DecodeConfig(tree=TreeShape(), draft_length_rule=rule)


def test_the_widths_of_a_configuration():
    config = DecodeConfig(tree=TreeShape(depth=2, top_k=3, nodes=9))
    assert (config.draft_width, config.verify_widths) == (2, (9,))


def test_drawn_children_leave_no_rank_out():
    """A child of rank 2 is drawn from what those of rank 0 and 1 left, so they must be there."""
    tree = TreeShape.static([(1,), (3,), (3, 0), (3, 2), (1, 4)])
    assert tree.without_gaps().paths == ((0,), (1,), (0, 0), (1, 0), (1, 1))
