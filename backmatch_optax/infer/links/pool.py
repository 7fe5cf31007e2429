"""How pooling is recognised, and reductions over positions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout, pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.step import MEANINGS, Step, Unknown, rule
from backmatch_optax.infer.windows import POOL_PADDINGS, Window, short


@rule("reduce_window_max", "reduce_window_sum")
def pool(node: Node) -> Step:
    """`MaxPool`, or `AvgPool` times the size of its window."""
    options = node.options
    taps, strides = options["window_dimensions"], options["window_strides"]
    outside = {*options["padding"][:1], *options["padding"][-1:]}
    dilations = (*options["base_dilation"], *options["window_dilation"])
    ends = (taps[0], taps[-1], strides[0], strides[-1])
    if {*ends, *dilations} != {1} or outside != {(0, 0)}:
        raise Unknown(node, f"{node.op} with a window that is no pooling's")
    taps, strides, pairs = taps[1:-1], strides[1:-1], options["padding"][1:-1]
    window = Window(taps, pairs, POOL_PADDINGS)
    arguments: Any = {"strides": None if math.prod(strides) == 1 else short(strides)}
    if node.op == "reduce_window_max":
        # Zeros take no part in a maximum where nothing is below them.
        window = dataclasses.replace(window, takes_zeros=_is_positive(node.operands[0]))
        links: Sequence[_spec.Link] = [_spec.MaxPool(taps, **arguments)]
    else:
        links = [_spec.AvgPool(taps, **arguments), _spec.Scale(math.prod(taps))]
    return Step(node, node.operands[0], links, window=window, opaque=True)


def _is_positive(node: Node) -> bool:
    """Whether a signal, perhaps with zeros around it, ends in a positive function."""
    while node.op == "pad":
        node = node.operands[0]
    for source in itertools.islice(node.dominators(), 8):
        try:
            piece = pieces.evaluate(node, source)
        except layout.Unmatched:
            return False
        if not piece.leaves and (piece.values >= 0).all():
            return True
    return False


@rule("reduce_max", "reduce_sum")
def reduction(node: Node) -> Step:
    """A maximum or mean over positions: a pooling that takes all in."""
    (signal,) = node.operands
    over, last = node.options["axes"], len(signal.shape) - 1
    if 0 in over or last in over:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    sizes = signal.shape[1:-1]
    taps = [size if axis + 1 in over else 1 for axis, size in enumerate(sizes)]
    count = math.prod(taps)
    if node.op == "reduce_sum" and count == math.prod(sizes):
        return Step(node, signal, [_spec.GlobalAvgPool(), _spec.Scale(count)])
    window = Window(taps, ((0, 0),) * len(taps), ("VALID",), False)
    links: list[_spec.Link] = [_spec.MaxPool(tuple(taps))]
    if node.op == "reduce_sum":
        links = [_spec.AvgPool(tuple(taps)), _spec.Scale(count)]
    return Step(node, signal, links, window=window)
