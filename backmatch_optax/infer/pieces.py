"""What a piece of a graph computes.

`evaluate` puts a few sample values through an elementwise or normalising piece: a piece
is known by what it computes, not by how it is written. `entries` computes single
entries of a constant, such as a mask.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from backmatch_optax.infer.graph import Node, above, run
from backmatch_optax.infer.layout import (
    MOVES,
    Axis,
    Factor,
    Unmatched,
    moved,
    repeated,
    unify,
)

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.logical_and,
    "cbrt": np.cbrt,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "convert_element_type": np.trunc,  # only those that round are left
    "cos": np.cos,
    "div": np.divide,
    "eq": np.equal,
    "erf": np.vectorize(math.erf, otypes=[float]),
    "erf_inv": np.vectorize(
        lambda x: statistics.NormalDist(0, 0.5**0.5).inv_cdf((1 + x) / 2),
        otypes=[float],
    ),
    "erfc": np.vectorize(math.erfc, otypes=[float]),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.logical_not,
    "or": np.logical_or,
    "pow": np.power,
    "rem": np.fmod,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: np.choose(np.asarray(which, int), cases),
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tanh": np.tanh,
}

# What stands for a signal, one population in each row: the range where activations
# bend, and large values, so that the epsilon of a normalisation does not matter. Two
# populations, as one statistic looks like another where there is only one.
_BENDING = np.linspace(-9.0, 10.0, 78)
SIGNAL = np.stack(
    [
        np.concatenate([_BENDING, [-41.0, 37.0, 300.0, 450.0]]),
        np.concatenate([_BENDING[::-1] + 1 / 3, [-200.0, 90.0, 110.0, 350.0]]),
    ]
)
MASK = np.arange(SIGNAL.shape[1]) % 3 != 0


@dataclasses.dataclass
class _Sampled:
    values: Any
    axes: tuple[Axis, ...]
    reduced: frozenset[Factor] = frozenset()


@dataclasses.dataclass
class Piece:
    """What the part of the graph between two nodes makes of a signal.

    Attributes:
      signal: the samples.
      values: the outcome, in the shape of the signal: all of the graph's axes are the
        axis of samples, and there is one row for each population.
      reduced: the factors of the input's axes that statistics are taken over.
      leaves: the values that stand for parameters and other variables, by path.
      paths: the paths of the leaves by kind, `"param"` and `"state"`.
      masks: the random bits, which `MASK` stands for.
    """

    signal: Any
    values: Any = None
    reduced: frozenset[Factor] = frozenset()
    leaves: dict[str, Any] = dataclasses.field(default_factory=dict)
    paths: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: {"param": [], "state": []}
    )
    masks: list[Node] = dataclasses.field(default_factory=list)


def evaluate(end: Node, start: Node, signal: Any = SIGNAL) -> Piece:
    """Evaluates what lies between a node and one of its dominators.

    The population that statistics are taken over and the features are both the axis of
    samples: a reduction is a mean over it, times the true count. Which axes that would
    be is followed beside the values.

    Args:
      end: the node.
      start: the dominator.
      signal: the samples, two populations of them.

    Returns:
      What the piece makes of the samples.

    Raises:
      Unmatched: where something in between is neither elementwise nor a statistic that
        is put back where it was taken from.
    """
    rng = np.random.default_rng(0)
    piece, size = Piece(signal), np.var(signal) / np.var(SIGNAL)
    whole = tuple(((axis, 1, length),) for axis, length in enumerate(start.shape))
    known = {start: _Sampled(piece.signal, whole)}

    def variable(node: Node) -> _Sampled:
        if node.path not in piece.leaves:
            # Positive, as a variance is, and far above any epsilon.
            values = rng.uniform(0.5, 2.0, signal.shape[1])
            piece.leaves[node.path] = (
                values if node.op == "param" else values * 1e3 * size
            )
            piece.paths[node.op].append(node.path)
        axes = [repeated(size) for size in node.shape]
        # A parameter's last axis is that of the features; a single one fits any axis.
        if axes and start.shape and 1 < node.shape[-1] == start.shape[-1]:
            axes[-1] = whole[-1]
        return _Sampled(piece.leaves[node.path], tuple(axes))

    def sample(node: Node) -> _Sampled:
        if node not in known:
            if node.op in ("param", "state"):
                known[node] = variable(node)
            elif node.op == "constant" and node.value is not None:
                axes = tuple(map(repeated, node.shape))
                known[node] = _Sampled(np.float64(node.value), axes)
            elif start.flows and node.origins == {"random"} and node.dtype == bool:
                piece.masks.append(node)
                known[node] = _Sampled(MASK, tuple(map(repeated, node.shape)))
            elif not node.operands or node.op in ("inputs", "input"):
                raise Unmatched(node)
            else:
                rule = _elementwise if node.op in _ELEMENTWISE else _SHAPED.get(node.op)
                if rule is None:
                    raise Unmatched(node)
                known[node] = rule(node, [sample(operand) for operand in node.operands])
        return known[node]

    with np.errstate(all="ignore"):
        result = sample(end)
    if end.shape != start.shape:
        raise Unmatched(end)
    unify(end, result.axes, whole)
    piece.values = np.broadcast_to(result.values, piece.signal.shape)
    piece.reduced = result.reduced
    return piece


def _elementwise(node: Node, operands: list[_Sampled]) -> _Sampled:
    axes = tuple(map(repeated, node.shape))
    statistics = {operand.reduced for operand in operands if operand.reduced}
    if len(statistics) > 1:
        raise Unmatched(node)  # statistics over different axes
    for operand in operands:
        if operand.axes:  # a scalar literal goes with every shape
            axes = unify(node, axes, operand.axes)
    values = _ELEMENTWISE[node.op](*(operand.values for operand in operands))
    return _Sampled(values, axes, next(iter(statistics), frozenset()))


def _integer_pow(node: Node, operands: list[_Sampled]) -> _Sampled:
    (x,) = operands
    return dataclasses.replace(x, values=x.values ** float(node.options["y"]))


def _reduce_sum(node: Node, operands: list[_Sampled]) -> _Sampled:
    (x,) = operands
    over = node.options["axes"]
    count = math.prod(node.operands[0].shape[axis] for axis in over)
    reduced = x.reduced.union(
        *([factor for factor in x.axes[axis] if factor[0] >= 0] for axis in over)
    )
    axes = tuple(axis for index, axis in enumerate(x.axes) if index not in over)
    mean = np.mean(x.values, axis=-1, keepdims=True) if np.ndim(x.values) else x.values
    return _Sampled(mean * count, axes, reduced)


def _moved(node: Node, operands: list[_Sampled]) -> _Sampled:
    return dataclasses.replace(operands[0], axes=moved(node, operands[0].axes))


_SHAPED: dict[str, Callable[[Node, list[_Sampled]], _Sampled]] = {
    "integer_pow": _integer_pow,
    "reduce_sum": _reduce_sum,
} | dict.fromkeys(MOVES, _moved)


Entries = Callable[[Sequence[Any]], Any]


def entries(
    node: Node, index: Sequence[Any], known: Mapping[Node, Entries] = {}
) -> Any:
    """Entries of a value that no parameter and no signal reaches, such as a mask.

    Args:
      node: the value.
      index: for each axis of it, an array of indices; they go together as in NumPy.
      known: other values, as functions that give their entries.

    Returns:
      The entries. Nothing else of the value is computed, where its primitives are
      known here; of one that is not, all.

    Raises:
      Unmatched: where it depends on something else, or is another in each layer of a
        scan.
    """
    options, operands = node.options, node.operands
    if node in known:
        return known[node](index)
    if node.array is not None:
        return np.asarray(node.array)[tuple(index)]
    if node.op == "iota":
        return index[options["dimension"]]
    of_bits = node.op in ("and", "not", "or") and node.dtype != bool
    if node.op in _ELEMENTWISE and not of_bits:
        values = [entries(x, _repeating(x.shape, index), known) for x in operands]
        found = _ELEMENTWISE[node.op](*values)
        integers = node.op == "div" and np.issubdtype(node.dtype, np.integer)
        return np.trunc(found) if integers else found
    if not operands:
        raise Unmatched(node)
    (x, *_), shape = operands, node.shape
    if node.op == "integer_pow":
        return entries(x, index, known) ** float(options["y"])
    if node.op == "broadcast_in_dim":
        taken = [index[axis] for axis in options["broadcast_dimensions"]]
        return entries(x, _repeating(x.shape, taken), known)
    if node.op == "squeeze":
        taken = list(index)
        for axis in sorted(axis % len(x.shape) for axis in options["dimensions"]):
            taken.insert(axis, 0)
        return entries(x, taken, known)
    if node.op == "transpose":
        order = options["permutation"]
        return entries(
            x, [index[order.index(axis)] for axis in range(len(order))], known
        )
    if node.op == "reshape":
        if not x.shape:
            return entries(x, (), known)
        together: Any = np.broadcast_arrays(*index)
        places = np.ravel_multi_index(together, shape) if shape else 0
        return entries(x, np.unravel_index(places, x.shape), known)
    if node.op == "split":
        before = sum(int(size) for size in options["sizes"][: node.result])
        taken = list(index)
        taken[options["axis"]] = taken[options["axis"]] + before
        return entries(x, taken, known)
    if node.op == "slice":
        steps = options["strides"] or (1,) * len(shape)
        ranges = zip(index, options["start_indices"], steps, strict=True)
        return entries(x, [at * step + start for at, start, step in ranges], known)
    if node.op == "reduce_sum":
        over = options["axes"]
        taken = [np.asarray(at)[(..., *(None,) * len(over))] for at in index]
        for axis in sorted(over):
            places = [-1 if axis == other else 1 for other in sorted(over)]
            taken.insert(axis, np.arange(x.shape[axis]).reshape(places))
        values = np.asarray(entries(x, taken, known))
        return values.sum(axis=tuple(range(-len(over), 0)))
    if node.op == "concatenate":
        axis, first = options["dimension"], 0
        values: Any = 0.0
        for part in operands:
            at = index[axis] - first
            inside = (at >= 0) & (at < part.shape[axis])
            taken = [*index[:axis], np.where(inside, at, 0), *index[axis + 1 :]]
            values = np.where(inside, entries(part, taken, known), values)
            first += part.shape[axis]
        return values
    leaves = (found for found in above(node) if found.eqn is None)
    if node.origins <= {"array"} and all(leaf.array is not None for leaf in leaves):
        with jax.ensure_compile_time_eval():  # whatever is being traced around it
            node.array = np.asarray(run([node], {})[0])
        return node.array[tuple(index)]
    raise Unmatched(node)


def _repeating(shape: Sequence[int], index: Sequence[Any]) -> list[Any]:
    """The index of what is repeated along its axes of length 1, or has no axes."""
    pairs = zip(shape, index if shape else (), strict=True)
    return [0 if size == 1 else at for size, at in pairs]


def known(node: Node) -> bool:
    """Whether a node is of a kind that pieces can consist of."""
    return node.op in _ELEMENTWISE or node.op in _SHAPED


def all_entries(node: Node, most: int | None = None) -> Any:
    """The entries of a constant.

    Args:
      node: the constant.
      most: how many places of an axis at most, far and near; of the last axis all.
    """
    places = [np.arange(size) for size in node.shape]
    if most is not None:
        for axis, at in enumerate(places[:-1]):
            spread = np.linspace(0, len(at) - 1, min(len(at), most))
            places[axis] = spread.astype(int)
    index = np.ix_(*places)
    return np.broadcast_to(entries(node, [*index]), [len(at) for at in places])
