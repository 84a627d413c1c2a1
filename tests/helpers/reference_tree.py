"""A slow, obvious attention tree: nested dictionaries, lists and loops. Shares no code with the product.

A node is a dictionary with its "token" and its "children", a list in the order in which they are tried. The root is the last
emitted token. A *line* is the list of nodes from the root to a node. Where a tree stands for a row of the product's arrays, the
"index" of a node says where it is in them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from reference_sampling import softmax

# --- shape


def nested(tokens, parents, valid=None):
    """The tree of a row of arrays: node i is the next child of node `parents[i]`, node 0 the root. Without invalid nodes."""
    nodes = [{"token": int(t), "index": i, "children": []} for i, t in enumerate(tokens)]
    for i in range(1, len(nodes)):
        if valid is None or valid[i]:
            nodes[parents[i]]["children"].append(nodes[i])
    return nodes[0]


def lines(root, above=()):
    """The line of every node, depth first."""
    line = [*above, root]
    yield line
    for child in root["children"]:
        yield from lines(child, line)


def ancestors(root) -> dict[int, set[int]]:
    """By index of a node: the indices of itself and of all nodes above it."""
    return {line[-1]["index"]: {node["index"] for node in line} for line in lines(root)}


def depths(root) -> dict[int, int]:
    """By index of a node: edges between the root and it."""
    return {line[-1]["index"]: len(line) - 1 for line in lines(root)}


def positions(root, length) -> dict[int, int]:
    """By index: the place of a node in its sequence, whose first `length` tokens end with the root."""
    return {index: length - 1 + depth for index, depth in depths(root).items()}


def visible(root, start, capacity) -> dict[int, list[bool]]:
    """By index: which of `capacity` cache positions a node sees, when node i sits at `start + i`."""
    return {
        index: [position < start or position - start in seen for position in range(capacity)]
        for index, seen in ancestors(root).items()
    }


def padded_line(root, index, max_depth) -> list[int]:
    """Indices from the root to a node; the node again up to `max_depth + 1` entries."""
    (line,) = (line for line in lines(root) if line[-1]["index"] == index)
    indices = [node["index"] for node in line]
    return indices + [index] * (max_depth + 1 - len(indices))


def compacted(entries, start, line) -> list:
    """`entries` with those of a line, which sit at `start + index`, moved to `start` and the places behind it."""
    moved = [entries[start + index] for index in line]
    return [*entries[:start], *moved, *entries[start + len(moved) :]]


def token_paths(root) -> set[tuple[int, ...]]:
    """The tokens below the root of every line."""
    return {tuple(node["token"] for node in line[1:]) for line in lines(root)}


# --- growth. An exit is a function from the drafted tokens of a line to the draft's raw logits after them.


def left_at(frontier, exits, thresholds, leaving) -> list[int]:
    """By number, the exit that each node of a level leaves at: the first above whose threshold it is confident, or the last."""

    def first_confident(node):
        for number, (read, threshold) in enumerate(zip(exits, thresholds, strict=True)):
            if number == len(exits) - 1 or softmax(read(node["path"])).max() > threshold:
                return number
        raise AssertionError("the last exit always accepts")

    own = [first_confident(node) for node in frontier]
    return [min(own)] * len(own) if leaving == "level" else own


def _child(parent, token, rank, log_q, exit_number):
    return {
        "token": int(token),
        "rank": rank,
        "path": (*parent["path"], int(token)),
        "ranks": (*parent["ranks"], rank),
        "score": parent["score"] + log_q,
        "exit": exit_number,
        "children": [],
    }


def _root():
    return {"token": None, "path": (), "ranks": (), "score": 0.0, "exit": 0, "children": []}


def _ranked_children(parent, exits, exit_number, count):
    log_q = np.log(softmax(exits[exit_number](parent["path"])))
    best = sorted(range(len(log_q)), key=lambda token: -log_q[token])[:count]
    return [_child(parent, x, rank, log_q[x], exit_number) for rank, x in enumerate(best)]


def _kept_below(root, kept):
    """Only the given nodes below the root, by identity; a parent that is dropped may not have a child that is kept."""
    ids = {id(node) for node in kept}

    def prune(node):
        node["children"] = [child for child in node["children"] if id(child) in ids]
        for child in node["children"]:
            prune(child)
        return node

    pruned = prune(root)
    assert sum(1 for _ in lines(pruned)) == len(kept) + 1
    return pruned


def grow_dynamic(exits, thresholds, *, depth, top_k, nodes, leaving):
    """The best `nodes - 1` of all tried nodes, by cumulative log q; the best `top_k` of each level are expanded.

    Returns:
        The root, and of each level the exits that its expanded nodes left at.
    """
    root, tried, used = _root(), [], []
    frontier = [root]
    for _ in range(depth):
        level = []
        left = left_at(frontier, exits, thresholds, leaving)
        for parent, exit_number in zip(frontier, left, strict=True):
            parent["children"] = _ranked_children(parent, exits, exit_number, top_k)
            level += parent["children"]
        tried += level
        used.append(left)
        frontier = sorted(level, key=lambda node: -node["score"])[:top_k]
    kept = sorted(tried, key=lambda node: -node["score"])[: nodes - 1]
    return _kept_below(root, kept), used


def grow_static(exits, thresholds, *, paths, leaving):
    """The nodes whose ranks are in `paths`, and those above them. Returns as `grow_dynamic`."""
    wanted = {path[:n] for path in paths for n in range(1, len(path) + 1)}
    root, used = _root(), []
    frontier = [root]
    while frontier:
        expanded = [
            node
            for node in frontier
            if any(len(path) > len(node["ranks"]) and path[:-1] == node["ranks"] for path in wanted)
        ]
        if not expanded:
            break
        left = left_at(expanded, exits, thresholds, leaving)
        used.append(left)
        frontier = []
        for parent, exit_number in zip(expanded, left, strict=True):
            most = 1 + max(path[-1] for path in wanted if path[:-1] == parent["ranks"])
            children = _ranked_children(parent, exits, exit_number, most)
            parent["children"] = [child for child in children if child["ranks"] in wanted]
            frontier += parent["children"]
    return root, used


def child_counts(scores, probs, width) -> list[int]:
    """How many children the nodes of a level get: the best `width` pairs of a node and a rank, by score + log q of that rank.

    Args:
        scores: of the nodes, cumulative log q.
        probs: q of each node, after temperature and filters; what has no probability is never drawn.
        width: children of all nodes together, if so many can be drawn.
    """
    pairs = [
        (score + math.log(q), number)
        for number, (score, row) in enumerate(zip(scores, probs, strict=True))
        for q in sorted((float(x) for x in row if x > 0), reverse=True)
    ]
    best = [number for _, number in sorted(pairs, key=lambda pair: -pair[0])[:width]]
    return [best.count(number) for number in range(len(scores))]


# --- acceptance. `logits_of`, `p_of`, `q_of` take a node; a law is of (index of the deepest accepted node, token after it).


def accept_greedy(root, logits_of) -> tuple[int, int]:
    """The deepest node whose line is the target's own choice, and its choice after it."""
    node = root
    while True:
        choice = int(np.argmax(logits_of(node)))
        following = [child for child in node["children"] if child["token"] == choice]
        if not following:
            return node["index"], choice
        node = following[0]


def accept_target_only(root, draw) -> tuple[int, int]:
    """`draw(node)` is a token from p at a node: as long as it is a child, go there."""
    node = root
    while True:
        token = draw(node)
        following = [child for child in node["children"] if child["token"] == token]
        if not following:
            return node["index"], token
        node = following[0]


def target_only_law(root, p_of) -> dict[tuple[int, int], float]:
    """What target-only acceptance gives, by enumeration."""
    law = {}

    def visit(node, mass):
        p = np.array(p_of(node), np.float64)
        for child in node["children"]:
            visit(child, mass * p[child["token"]])
            p[child["token"]] = 0.0
        for token in np.flatnonzero(p):
            law[node["index"], int(token)] = mass * p[token]

    visit(root, 1.0)
    return law


def rejected(p, q, token, *, renormalise=True):
    """p and q after `token`, drawn from q, was rejected. Not to renormalise q is a known wrong rule."""
    p = np.maximum(p - q, 0.0)
    q = q.copy()
    q[token] = 0.0
    if renormalise and q.sum() > 0:
        q /= q.sum()
    return p / p.sum(), q


def without_replacement_law(root, p_of, q_of, **rule) -> dict[tuple[int, int], float]:
    """What acceptance of children drawn without replacement gives for one drawn tree, by enumeration."""
    law = {}

    def visit(node, mass):
        p, q = (np.array(of(node), np.float64) for of in (p_of, q_of))
        for child in node["children"]:
            token = child["token"]
            chance = min(1.0, p[token] / q[token])
            visit(child, mass * chance)
            mass *= 1.0 - chance
            if mass <= 0.0:
                return
            p, q = rejected(p, q, token, **rule)
        for token in np.flatnonzero(p):
            law[node["index"], int(token)] = mass * p[token]

    visit(root, 1.0)
    return law


def accept_without_replacement(root, p_of, q_of, uniform, draw, **rule) -> tuple[int, int]:
    """The same with explicit randomness: `uniform()` in [0, 1) for every child that is tried, `draw(p)` for the last token."""
    node = root
    while True:
        p, q = (np.array(of(node), np.float64) for of in (p_of, q_of))
        for child in node["children"]:
            token = child["token"]
            if uniform() * q[token] < p[token]:
                node = child
                break
            p, q = rejected(p, q, token, **rule)
        else:
            return node["index"], draw(p)


def drawn_children(q, count):
    """Every way to draw `count` tokens from q without replacement, in order: `(tokens, probability)`."""
    for tokens in itertools.permutations(np.flatnonzero(q), count):
        chance, left = 1.0, 1.0
        for token in tokens:
            chance *= q[token] / left
            left -= q[token]
        yield [int(token) for token in tokens], chance


def emitted_law(p, q, count, *, order=lambda tokens, q: tokens, **rule) -> np.ndarray:
    """The law of the first emitted token when `count` children are drawn from q at the root, by enumeration.

    `order` may drop or reorder what was drawn, which is a known wrong rule when it looks at the drawn tokens' own q.
    """
    p, q = (np.array(x, np.float64) for x in (p, q))
    emitted = np.zeros(len(p))
    for tokens, chance in drawn_children(q, count):
        kept = order(tokens, q)
        root = nested([-1, *kept], [0] * (1 + len(kept)))
        law = without_replacement_law(root, lambda _: p, lambda _: q, **rule)
        # Below the root nothing is drawn: what is accepted there is emitted first, whatever follows it.
        for (index, token), mass in law.items():
            emitted[kept[index - 1] if index else token] += chance * mass
    return emitted
