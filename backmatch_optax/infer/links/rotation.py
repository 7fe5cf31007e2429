"""How rotary positions are recognised."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph, layout, pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.step import Step

_LINEAR = {"add", "concatenate", "mul", "neg", "slice", "split", "sub", *layout.MOVES}


def rotation(node: Node) -> Step | None:
    """Nothing: the features of each position, rotated as rotary positions do.

    Norms stay, and so do moments. None for what is no rotation by constants.
    """
    for source in itertools.islice(node.dominators(), 12):
        inside = [x for x in graph.above(node, until=source) if x.flows]
        if any(x.op not in _LINEAR for x in inside):
            return None
        if source.shape != node.shape or len(node.shape) < 3:
            continue
        if any(x.op == "mul" and len(x.flow) > 1 for x in inside):
            return None
        if _rotates(node, source):
            return Step(node, source, [_spec.Scale(1.0)], elementwise=True, opaque=True)
    return None


def _rotates(node: Node, source: Node) -> bool:
    """Whether each position's features are multiplied by an orthogonal matrix."""
    rng = np.random.default_rng(0)
    features, *others = node.shape[-1:] + node.shape[:-1]
    # One position in each row of the index, a weight of its own for every one.
    weights = rng.uniform(0.5, 2.0, [min(size, 64) for size in others])
    rows = [rng.integers(0, size, 8)[:, None, None] for size in weights.shape]
    index = [*rows, np.arange(features)[None, :, None]]

    def basis(index: Sequence[Any]) -> Any:
        places = tuple(np.asarray(at) % 64 for at in index[:-1])
        return weights[places] * (np.asarray(index[-1]) == np.arange(features))

    try:
        found = pieces.entries(node, index, {source: basis})
    except (layout.Unmatched, ValueError):
        return False
    matrices = found / weights[tuple(rows)]
    products = matrices @ np.swapaxes(matrices, 1, 2)
    return bool(np.allclose(products, np.eye(features), atol=1e-4))
