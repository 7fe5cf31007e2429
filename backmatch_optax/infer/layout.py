"""Where the axes of a value are after it was transposed, reshaped or repeated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from backmatch_optax.infer.graph import Node

# What only puts values elsewhere.
MOVES = ("broadcast_in_dim", "reshape", "squeeze", "tile", "transpose")

# An axis as the factors of original axes that it is made of: (axis, size of all that is
# inside of the factor, size). Axis -1 stands for values repeated along an axis.
Factor = tuple[int, int, int]
Axis = tuple[Factor, ...]


class Unmatched(Exception):
    """A piece that cannot be evaluated, because of one of its nodes."""

    def __init__(self, node: Node):
        super().__init__(node.op)
        self.node = node


def contracted(node: Node) -> Any:
    """Which axes a matrix product contracts, and which go along."""
    return node.options["dimension_numbers"]


def moved(node: Node, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Where the axes of its operand are in a transpose, reshape, squeeze or repeat.

    Args:
      node: a node of one of `MOVES`.
      axes: those of its operand.

    Returns:
      Those of the node.

    Raises:
      Unmatched: where a reshape cuts an axis in a way that is no product.
    """
    options, sizes = node.options, node.operands[0].shape
    if node.op == "broadcast_in_dim":
        found = [repeated(size) for size in node.shape]
        for index, target in enumerate(options["broadcast_dimensions"]):
            if sizes[index] == node.shape[target]:
                found[target] = axes[index]
        return tuple(found)
    if node.op == "squeeze":
        gone = {axis % len(sizes) for axis in options["dimensions"]}
        return tuple(axis for index, axis in enumerate(axes) if index not in gone)
    if node.op == "transpose":
        return tuple(axes[axis] for axis in options["permutation"])
    if node.op == "tile":
        pairs = zip(axes, options["reps"], strict=True)
        return tuple((*repeated(int(count)), *axis) for axis, count in pairs)
    return reshaped(node, axes, node.shape)


def reshaped(
    node: Node, axes: Sequence[Axis], shape: Sequence[int]
) -> tuple[Axis, ...]:
    """The axes after a reshape; `Unmatched`, with the node, where there are none."""
    queue = [factor for axis in axes for factor in axis]
    found = []
    for size in shape:
        axis: list[Factor] = []
        while size > 1 or (queue and queue[0][2] == 1 and not axis):
            if not queue:
                raise Unmatched(node)
            factor = queue.pop(0)
            outer, inner = _split(node, factor, size)
            axis.append(outer)
            if inner is not None:
                queue.insert(0, inner)
            size //= outer[2]
        found.append(tuple(axis))
    return tuple(found)


def repeated(size: int) -> Axis:
    """An axis along which values are repeated."""
    return ((-1, 1, size),) if size > 1 else ()


def lengths(axes: Sequence[Axis]) -> tuple[int, ...]:
    """The shape of a value with these axes."""
    return tuple(math.prod(size for _, _, size in axis) for axis in axes)


def merged(factors: Iterable[Factor]) -> Axis:
    """Factors of which those that follow one another in one axis are one."""
    found: list[Factor] = []
    for axis, within, size in factors:
        if found and axis >= 0 and found[-1][:2] == (axis, within * size):
            size *= found.pop()[2]
        found.append((axis, within, size))
    return tuple(found)


def _split(node: Node, factor: Factor, size: int) -> tuple[Factor, Factor | None]:
    """A factor as an outer one of at most the given size, and the rest within."""
    axis, within, whole = factor
    if whole <= size:
        if size % whole:
            raise Unmatched(node)
        return factor, None
    if whole % size:
        raise Unmatched(node)
    rest = whole // size
    return (axis, within * rest, size), (axis, within, rest)


def unify(
    node: Node, first: Sequence[Axis], second: Sequence[Axis]
) -> tuple[Axis, ...]:
    """The axes of an elementwise combination; repeated values fit any axis."""
    if len(first) != len(second):
        raise Unmatched(node)
    return tuple(_unify_axis(node, *pair) for pair in zip(first, second, strict=True))


def _unify_axis(node: Node, first: Axis, second: Axis) -> Axis:
    if first == second or not second or all(axis < 0 for axis, _, _ in second):
        return first or second
    if not first or all(axis < 0 for axis, _, _ in first):
        return second
    left, right = list(first), list(second)
    unified: list[Factor] = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        size = min(a[2], b[2])
        (a, a_rest), (b, b_rest) = _split(node, a, size), _split(node, b, size)
        left[:0] = [a_rest] if a_rest else []
        right[:0] = [b_rest] if b_rest else []
        if a != b and min(a[0], b[0]) >= 0:
            raise Unmatched(node)
        unified.append(max(a, b))  # axis -1, repeated values, comes before all others
    if left or right:
        raise Unmatched(node)
    return tuple(unified)
