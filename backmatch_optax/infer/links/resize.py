"""How a resized axis is recognised: nearest entries, or interpolation."""

from __future__ import annotations

import numpy as np

from backmatch_optax.infer import layout, pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.step import MEANINGS, Step, Unknown


def nearest(node: Node) -> Step:
    """`Resize`: one axis by constant indices, each the nearest."""
    signal, indices = node.operands
    found = node.options["dimension_numbers"]
    axes = {*found.collapsed_slice_dims, *found.start_index_map}
    unknown = Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    if len(axes) != 1 or len(indices.shape) != 2 or indices.flows:
        raise unknown
    (axis,) = axes
    before, after = signal.shape[axis], indices.shape[0]
    others = [place for place in range(len(node.shape)) if place != axis]
    if tuple(found.offset_dims) != tuple(others) or axis == 0:
        raise unknown
    try:
        taken = pieces.entries(indices, [np.arange(after), 0])
    except layout.Unmatched:
        raise unknown from None
    if not np.array_equal(taken, np.floor((np.arange(after) + 0.5) * before / after)):
        raise unknown
    resized = (axis, axis, after, "nearest")
    return Step(node, signal, resized=resized, opaque=True)


def interpolation(node: Node) -> Step | None:
    """`Resize`: one axis times a constant matrix; None where it is none."""
    which = node.operands[0].flows
    matrix, signal = node.operands[which], node.operands[1 - which]
    contracted, batched = layout.contracted(node)
    if matrix.origins - {"array"} or len(matrix.shape) != 2 or batched[0]:
        return None
    (axis,), (row,) = contracted[1 - which], contracted[which]
    before, after = matrix.shape[row], matrix.shape[1 - row]
    try:
        weights = pieces.entries(matrix, [*np.indices(matrix.shape)])
    except layout.Unmatched:
        return None
    step = before / after
    places = (np.arange(after)[:, None] + 0.5) * step - 0.5
    linear = np.maximum(1 - np.abs(places - np.arange(before)) / max(step, 1.0), 0)
    linear = linear / linear.sum(axis=1, keepdims=True)
    found = weights if row else weights.T
    if found.shape != linear.shape or not np.allclose(found, linear, atol=1e-5):
        return None
    place = 0 if not which else len(node.shape) - 1
    return Step(node, signal, resized=(axis, place, after, "bilinear"), opaque=True)
