"""How learned arrays are recognised: biases, scales, slopes and positions."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph, layout
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.pieces import SIGNAL, Piece, all_entries
from backmatch_optax.infer.step import Step, layer_path, rule


@rule()
def learned(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Bias`, `LayerScale`, `PReLU`; or the bias of the layer before."""
    if piece.reduced or piece.masks or len(piece.leaves) != 1 or piece.paths["state"]:
        return None
    ((path, leaf),) = piece.leaves.items()
    module, _, name = f"/{path}".rpartition("/")
    if name == "negative_slope":
        if np.allclose(piece.values, np.where(SIGNAL > 0, SIGNAL, leaf * SIGNAL)):
            return Step(node, source, [_spec.PReLU(module[1:])], elementwise=True)
        return None
    adds = np.allclose(piece.values, SIGNAL + leaf)
    if adds and name == "bias":
        return Step(node, source, [_spec.Bias(path)], bias=path)
    if not adds and not np.allclose(piece.values, SIGNAL * leaf):
        return None
    if not any(is_aligned(operand, path) for operand in node.operands):
        return None
    link = _spec.Bias(path) if adds else _spec.LayerScale(path)
    return Step(node, source, [link], late=name == "scale")


def origin(node: Node) -> Node:
    """What a node only puts elsewhere, or repeats."""
    while node.op in layout.MOVES:
        node = node.operands[0]
    return node


def moved_axes(node: Node) -> Sequence[layout.Axis]:
    """The axes of a node in those of its origin."""
    if node.op in layout.MOVES:
        return layout.moved(node, moved_axes(node.operands[0]))
    return whole_axes(node)


def whole_axes(node: Node) -> Sequence[layout.Axis]:
    """The axes of a node in its own."""
    return [((i, 1, n),) if n > 1 else () for i, n in enumerate(node.shape)]


def repeated(output: Node) -> list[Node]:
    """Learned arrays that are repeated for each example and then read as a signal is.

    Not what is only added to a signal, multiplied or joined with it: links know these.
    Of one example, any that may be.
    """
    found = [*graph.above(output)]
    readers: dict[Node, list[Node]] = collections.defaultdict(list)
    for node in found:
        for operand in node.operands:
            readers[operand].append(node)
    batches = {node.shape[:1] for node in found if node.op == "input"}

    def is_one(node: Node) -> bool:
        param = origin(node)
        examples = math.prod(node.shape) / math.prod(param.shape or (1,))
        return (
            param.op == "param"
            and param is not node
            and {node.shape[:1]} == batches
            and examples == node.shape[0]
            and not all(map(_meets_a_signal, readers[node]))
        )

    return [node for node in found if is_one(node)]


def _meets_a_signal(node: Node) -> bool:
    together = ("add", "add_any", "concatenate", "mul", "sub")
    return node.op in layout.MOVES or (node.flows and node.op in together)


def is_aligned(node: Node, path: str) -> bool:
    """Whether a node is a parameter, repeated as NumPy does."""
    param = origin(node)
    if param.path != path or param.op != "param":
        return False
    axes = moved_axes(node)
    before = len(axes) - len(param.shape)
    return all(
        {factor[0] for factor in axis} <= {-1, at - before}
        for at, axis in enumerate(axes)
    )


def positions(node: Node) -> Step | None:
    """Something added at each position that the input does not reach, None for none.

    Rows of a table, or constants such as sines and cosines: an `Input` of their size.
    """
    (signal,) = node.flow
    (added,) = (operand for operand in node.operands if not operand.flows)
    source, sizes = origin(added), [size for size in added.shape if size > 1]
    sliced = _first_rows(source, node)
    if sliced:
        return Step(node, signal, [_spec.Bias(sliced, sliced=True)])
    try:
        found = rows_of_table(source)
        if found is not None:
            table, rows = found
            if rows.ndim == len(node.shape) - 1:  # one row for each example as well
                if (rows != rows[:1]).any():
                    return None
                rows = rows[0]
            if np.array_equal(rows, np.arange(table.shape[0])):
                return Step(node, signal, [_spec.Bias(table.path)])
            embed = _spec.Embed(layer_path(table, "embedding"))
            looked_up = [_spec.Input(rows.shape), embed]
            return Step(node, signal, [_spec.Residual([], looked_up)])
        if len(sizes) > 1 and not added.origins - {"array"} and node.op != "add_any":
            values = all_entries(added, most=256)
            square = np.mean(values**2)
            means = values.mean(axis=tuple(range(values.ndim - 1)))
            share = min(float(f"{np.mean(means**2) / square:.2g}"), 0.99)
            size = float(f"{np.sqrt(square):.4g}")
            constants = [_spec.Input(node.shape[1:], common=share), _spec.Scale(size)]
            return Step(node, signal, [_spec.Residual([], constants)])
    except (layout.Unmatched, ValueError):
        pass
    return None


def rows_of_table(node: Node) -> tuple[Node, np.ndarray] | None:
    """A table and which of its rows a node consists of, None for anything else."""
    if node.op != "gather" or node.operands[0].op != "param":
        return None
    table, indices = node.operands
    if len(table.shape) != 2 or node.shape != (*indices.shape[:-1], table.shape[1]):
        return None
    try:
        return table, all_entries(indices)[..., 0]
    except layout.Unmatched:  # which rows depends on something
        return None


def _first_rows(node: Node, added: Node) -> str:
    """The path of a table whose first rows are taken; empty for what is none."""
    table = node.operands[0] if node.op == "slice" else node
    if table is node or table.op != "param" or added.op == "add_any":
        return ""
    sizes = [
        pair for pair in zip(node.shape, table.shape, strict=True) if max(pair) > 1
    ]
    whole = node.shape[-1] == table.shape[-1] == added.shape[-1]
    first = not any(node.options["start_indices"])
    strides = {*(node.options["strides"] or ())} <= {1}
    rows = len(sizes) == 2 and sizes[0][0] == added.shape[-2] < sizes[0][1]
    return table.path if whole and first and strides and rows else ""
