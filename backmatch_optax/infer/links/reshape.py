"""How parts of a signal, padding, and the same values elsewhere are recognised."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links.rotation import rotation
from backmatch_optax.infer.step import MEANINGS, Step, Unknown, rule
from backmatch_optax.infer.windows import Window, short


@rule("slice")
def part(node: Node) -> Step:
    """`Slice`; every second position is what a pooling of one entry leaves."""
    (signal,), rank = node.operands, len(node.shape)
    strides = node.options["strides"] or (1,) * rank
    starts, stops = node.options["start_indices"], node.options["limit_indices"]
    ranges = zip(starts, stops, strides, strict=True)
    cut = [
        (axis, *found)
        for axis, found in enumerate(ranges)
        if found != (0, signal.shape[axis], 1)
    ]
    whole = stops == signal.shape and not any(starts)
    if whole and strides[0] * strides[-1] == 1:
        strides = strides[1:-1]
        ones = (1,) * len(strides)
        pairs = ((0, 0),) * len(ones)
        window = Window(ones, pairs, ("VALID",), False)
        link = _spec.AvgPool(ones, strides=short(strides))
        return Step(node, signal, [link], window=window)
    if len(cut) != 1:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]} of several axes at once")
    return Step(node, signal, taken=cut[0], opaque=True)


@rule("split")
def parts(node: Node) -> Step:
    """`Slice`: one of the parts."""
    (signal,), axis = node.operands, node.options["axis"]
    sizes = [int(size) for size in node.options["sizes"]]
    start = sum(sizes[: node.result])
    cut = (axis, start, start + sizes[node.result], 1)
    return Step(node, signal, taken=cut, opaque=True)


@rule("unstack")
def entry(node: Node) -> Step:
    """`Slice`: one entry of an axis, which is gone afterwards."""
    cut = (node.options["axis"], node.result, node.result + 1, 1)
    return Step(node, node.operands[0], taken=cut, opaque=True)


@rule("pad")
def zero_padding(node: Node) -> Step:
    """Zeros around the positions, for a convolution to come."""
    signal, filling = node.operands
    config = node.options["padding_config"]
    pairs = [(low, high) for low, high, _ in config]
    if (
        filling.value != 0
        or any(inside for _, _, inside in config)
        or {pairs[0], pairs[-1]} != {(0, 0)}
        or min(map(min, pairs)) < 0
    ):
        raise Unknown(node, "pad is no padding with zeros around the positions")
    return Step(node, signal, padding=tuple(pairs[1:-1]))


def wrapped(node: Node, axis: int) -> Step | None:
    """Padding of one axis with parts of the signal itself, None for something else."""
    source = node.dominator
    if source is None or len(source.shape) != len(node.shape):
        return None
    taken = _taken_along(axis, node, source)
    extra = node.shape[axis] - source.shape[axis]
    modes: Any = {"wrap": "CIRCULAR", "reflect": "REFLECT"}
    for (mode, name), low in itertools.product(modes.items(), range(extra + 1)):
        pair = (low, extra - low)
        padded = np.pad(range(source.shape[axis]), pair, mode)
        if taken is not None and np.array_equal(taken, padded):
            pairs = [(0, 0)] * (len(node.shape) - 2)
            pairs[axis - 1] = pair
            return Step(node, source, padding=tuple(pairs), mode=name)
    return None


def _taken_along(axis: int, node: Node, source: Node) -> Any:
    """Which entries of an axis a node consists of, None where it is more than that."""
    if node is source:
        return np.arange(source.shape[axis])
    ones = (1,) * len(node.shape)
    joins = node.op == "concatenate" and node.options["dimension"] == axis
    turns = node.op == "rev" and tuple(node.options["dimensions"]) == (axis,)
    cuts = node.op == "slice" and node.options["strides"] in (None, ones)
    if not joins and not turns and not cuts:
        return None
    parts = [_taken_along(axis, part, source) for part in node.flow]
    if any(part is None for part in parts):
        return None
    if joins:
        return np.concatenate(parts)
    if turns:
        return parts[0][::-1]
    first, last = node.options["start_indices"], node.options["limit_indices"]
    return parts[0][first[axis] : last[axis]]


@rule(*layout.MOVES)
def same_values(node: Node) -> Step:
    """No link, or one where a later link needs another shape."""
    (moved,) = node.flow
    # Pairs of features that were rotated side by side, as some rotary positions are.
    pairs = moved.op == "concatenate" and moved.shape[-1] == 2 and node.op == "reshape"
    rotated = rotation(node) if pairs else None
    return rotated or Step(node, moved, moves=True)
