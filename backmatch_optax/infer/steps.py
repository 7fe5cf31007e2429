"""From the output of a graph to its input: the steps that it consists of.

The graph is cut at its dominators, the values that everything passes through. Each
primitive with a rule of its own (`RULES`) is a step, and so is each elementwise or
normalising piece that computes what a link does (`PATTERNS`); what splits and is added
up again is a residual. To teach it a new kind of layer, add to one of the two.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph
from backmatch_optax.infer.graph import SIGNAL, Node, Piece
from backmatch_optax.spec.elementwise import ACTIVATIONS
from backmatch_optax.spec.link import Shape

# What stands behind primitives that no link describes.
MEANINGS = {
    "argmax": "an index taken from the signal",
    "concatenate": "a concatenation",
    "cond": "a branch on data",
    "custom_jvp_call": "a function with a derivative of its own",
    "custom_vjp_call": "a function with a derivative of its own",
    "cumsum": "a cumulative sum",
    "dot_general": "a matrix product that is no Dense layer",
    "dynamic_slice": "indexing",
    "dynamic_update_slice": "an update of a part",
    "fft": "a Fourier transform",
    "gather": "indexing, or an embedding",
    "pad": "padding that no convolution follows",
    "reduce_max": "a maximum over features or batch",
    "reduce_sum": "a sum over features or batch",
    "scan": "a loop (recurrence)",
    "slice": "indexing",
    "sort": "an order by value",
    "split": "a split",
    "stop_gradient": "a stopped gradient",
    "while": "a loop (recurrence)",
}


@dataclasses.dataclass
class Step:
    """What happens between a node and the one it is computed from."""

    node: Node
    source: Node
    links: Sequence[_spec.Link] = ()  # one after the other
    arms: tuple[list[Step], list[Step]] | None = None  # of a residual
    bias: str = ""  # path of a parameter added to the signal
    padding: tuple[Any, ...] = ()  # (low, high) per axis, for a convolution to come
    mode: str = ""  # how that is filled: "CIRCULAR", "REFLECT"; empty for zeros
    order: tuple[int, ...] = ()  # of a transpose
    begins: bool = False  # that the chain begins behind it
    # Whether a piece of the graph that goes on beyond it cannot be one link.
    opaque: bool = False

    @property
    def batch(self) -> int:
        """The batch size, where the axes are in order."""
        return self.source.shape[0] if self.source.shape else 0


class Unknown(Exception):
    """Something on the way from the input to the output that no link describes."""

    def __init__(self, node: Node, reason: str):
        super().__init__(reason)
        self.node = node
        self.reason = reason


def steps_between(end: Node, start: Node, blocks: Sequence[_spec.Block]) -> list[Step]:
    """The steps that lead from a node's dominator to it.

    The shortest piece that is a link is taken at each node. Where that leads nowhere
    (the factor 0.5 of a GELU is not a Scale), the last choices are undone, as far as
    the last step that must be as it is.
    """
    trail: list[tuple[Iterator[Step | Unknown], Step]] = []
    node, failure = end, None
    while node is not start:
        options = _options(node, start, blocks)
        step, reason = _next_step(options)
        failure = failure or (None if step else reason)
        while step is None:
            if not trail or trail[-1][1].opaque:
                assert failure is not None
                raise failure
            options, _ = trail.pop()
            step, _ = _next_step(options)
        trail.append((options, step))
        node = step.source
    return [step for _, step in reversed(trail)]


def _next_step(
    options: Iterator[Step | Unknown],
) -> tuple[Step | None, Unknown | None]:
    """The next way to explain a node, and the first reason why there is none."""
    reason = None
    for option in options:
        if isinstance(option, Step):
            return option, reason
        reason = reason or option
    return None, reason


def _options(
    node: Node, start: Node, blocks: Sequence[_spec.Block]
) -> Iterator[Step | Unknown]:
    """All ways to explain a node, and why others fail; the best come first."""
    for block in blocks:
        if _is_inside(node, block.path):
            yield _block_step(node, start, block)
            return
    if node.op in RULES:
        try:
            yield RULES[node.op](node)
        except Unknown as unknown:
            yield unknown
    for source in node.dominators():
        unmatched = None
        try:
            piece = graph.evaluate(node, source)
        except graph.Unmatched as error:
            unmatched = error.node
        else:
            for pattern in PATTERNS:
                step = pattern(piece, node, source)
                if step is not None:
                    yield step
                    break
        if source is node.dominator and len(node.flow) == 2 and node.op in SUMS:
            try:
                yield _residual(node, source, blocks)
            except Unknown as unknown:
                yield unknown
        if source is start or (unmatched is not None and not graph.known(unmatched)):
            break
    if start.op == "input" and _is_preparation(node, start):
        yield Step(node, start, begins=True)
    yield Unknown(node, _reason(node))


def _is_preparation(node: Node, start: Node) -> bool:
    """Whether a node is the input, standardised with constants entry by entry."""
    while node is not start:
        constants = [operand for operand in node.operands if not operand.flows]
        divides = node.op == "div" and node.operands[0].flows
        if (
            len(node.flow) != 1
            or not (divides or node.op in ("add", "sub", "mul", "neg"))
            or any(constant.origins - {"array"} for constant in constants)
            or node.shape != node.flow[0].shape
        ):
            return False
        (node,) = node.flow
    return True


def _block_step(node: Node, start: Node, block: _spec.Block) -> Step | Unknown:
    """Everything within a module, which must have one signal as its input."""
    entries, seen, queue = set(), {node}, [node]
    for inner in queue:
        for operand in inner.flow:
            if not _is_inside(operand, block.path):
                entries.add(operand)
            elif operand not in seen:
                seen.add(operand)
                queue.append(operand)
    if len(entries) != 1:
        return Unknown(node, f"{block} has {len(entries)} signals as its input")
    (source,) = entries
    if source.depth < start.depth:  # what splits inside is added up outside
        return Unknown(node, f"{block} has several signals as its output")
    return Step(node, source, [block], opaque=True)


def _is_inside(node: Node, path: str) -> bool:
    module = module_path(node.scope)
    return module is not None and f"{module}/".startswith(f"{path}/" if path else "")


def _residual(node: Node, source: Node, blocks: Sequence[_spec.Block]) -> Step:
    if any(arm.shape != node.shape for arm in node.operands):
        raise Unknown(node, f"{node.op} combines two signals of different shapes")
    first, second = (steps_between(arm, source, blocks) for arm in node.operands)
    if node.op == "sub":
        second.append(Step(node, node.operands[1], [_spec.Scale(-1.0)]))
    return Step(node, source, arms=(first, second), opaque=True)


def _reason(node: Node) -> str:
    """Why no link describes how a node comes about."""
    source = node.dominator
    assert source is not None
    if not graph.known(node):
        return f"{node.op} is {MEANINGS.get(node.op, 'nothing that a link describes')}"
    try:
        piece = graph.evaluate(node, source)
    except graph.Unmatched as error:
        culprit = error.node
        if not culprit.flows:
            return f"{node.op} combines the signal with {_description(culprit)}"
        if len(node.flow) > 1 and node.op == "mul":
            return "mul multiplies two signals, as gating and attention do"
        if len(node.flow) > 1:
            return f"{node.op} combines two signals"
        culprits = MEANINGS.get(culprit.op, "something that no link describes")
        return f"{node.op} follows on {culprit.op}, {culprits}"
    if piece.leaves:
        paths = ", ".join(map(repr, piece.leaves))
        return f"{node.op} combines the signal with {paths} in a way no link does"
    if piece.reduced:
        return f"{node.op} uses statistics of the signal as no normalisation does"
    return (
        f"{node.op} ends an elementwise function that is neither a Scale nor one of "
        "Activation's"
    )


def _description(node: Node) -> str:
    if "random" in node.origins:
        return "random numbers"
    paths = [repr(found.path) for found in above(node) if found.path]
    return f"what is computed from {', '.join(paths)}" if paths else "an array"


# --- Rules for primitives ------------------------------------------------------------


def _kernel_path(node: Node) -> str:
    """The path of the layer whose kernel a linear operation multiplies with."""
    signal, kernel = node.operands
    if kernel.flows:
        raise Unknown(node, f"{node.op} multiplies two signals, as attention does")
    if kernel.op != "param" or not signal.flows:
        raise Unknown(node, f"the kernel of {node.op} is {_description(kernel)}")
    path, _, name = f"/{kernel.path}".rpartition("/")
    if name != "kernel":
        raise Unknown(
            node,
            f"{node.op} multiplies with {kernel.path!r}, but only a parameter called "
            "'kernel' is that of a layer",
        )
    return path[1:]


def _dense(node: Node) -> Step:
    if len(node.flow) == 2:
        raise Unknown(node, f"{node.op} multiplies two signals, as attention does")
    signal = node.operands[0]
    contracted, batched = node.options["dimension_numbers"]
    path = _kernel_path(node)
    last = (len(signal.shape) - 1,)
    if (*map(tuple, contracted), *map(tuple, batched)) != (last, (0,), (), ()):
        raise Unknown(
            node, f"{node.op} with {path!r} is not over the last axis of the signal"
        )
    return Step(node, signal, [_spec.Dense(path)], opaque=True)


def _conv(node: Node) -> Step:
    path, options, rank = _kernel_path(node), node.options, len(node.shape)
    numbers = options["dimension_numbers"]
    last = (0, rank - 1, *range(1, rank - 1))
    flax = (last, (rank - 1, rank - 2, *range(rank - 2)), last)
    if tuple(map(tuple, numbers)) != flax or options["batch_group_count"] != 1:
        raise Unknown(node, f"the axes of {path!r} are not in Flax's order")
    strides, spread = options["window_strides"], options["lhs_dilation"]
    groups, dilation = options["feature_group_count"], options["rhs_dilation"]
    if math.prod(spread) == 1:
        link = _spec.Conv(
            path, strides=strides, kernel_dilation=dilation, feature_group_count=groups
        )
    elif math.prod(strides) == 1 and groups == 1:
        link = _spec.ConvTranspose(path, strides=spread, kernel_dilation=dilation)
    else:
        raise Unknown(node, f"{path!r} is both a strided and a transposed convolution")
    return Step(node, node.operands[0], [link], opaque=True)


def _pool(node: Node) -> Step:
    options = node.options
    window, strides = options["window_dimensions"], options["window_strides"]
    outside = [*options["padding"][:1], *options["padding"][-1:]]
    dilations = (*options["base_dilation"], *options["window_dilation"])
    ends = (window[0], window[-1], strides[0], strides[-1])
    if {*ends, *dilations} != {1} or {*outside} != {(0, 0)}:
        raise Unknown(node, f"{node.op} with a window that is no pooling's")
    kind = _spec.MaxPool if node.op == "reduce_window_max" else _spec.AvgPool
    links: list[_spec.Link] = [kind(window[1:-1], strides=_or_none(strides[1:-1]))]
    if kind is _spec.AvgPool:
        links.append(_spec.Scale(math.prod(window)))
    return Step(node, node.operands[0], links, opaque=True)


def _or_none(strides: Sequence[int]) -> Sequence[int] | None:
    """Strides as people leave them out: None where all are 1."""
    return None if math.prod(strides) == 1 else tuple(strides)


def _reduction(node: Node) -> Step:
    (signal,) = node.operands
    over, last = node.options["axes"], len(signal.shape) - 1
    if 0 in over or last in over:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    sizes = signal.shape[1:-1]
    window = [size if axis + 1 in over else 1 for axis, size in enumerate(sizes)]
    count = math.prod(window)
    if node.op == "reduce_max":
        links: list[_spec.Link] = [_spec.MaxPool(window)]
    elif count == math.prod(sizes):
        links = [_spec.GlobalAvgPool(), _spec.Scale(count)]
    else:
        links = [_spec.AvgPool(window), _spec.Scale(count)]
    return Step(node, signal, links)


def _same_values(node: Node) -> Step:
    (signal,) = node.flow
    if math.prod(signal.shape) != math.prod(node.shape):
        raise Unknown(node, f"{node.op} repeats the signal along an axis")
    return Step(node, signal)


def _transposition(node: Node) -> Step:
    order = tuple(node.options["permutation"])
    return Step(node, node.operands[0], order=order)


def _zero_padding(node: Node) -> Step:
    signal, filling = node.operands
    pairs = [(low, high) for low, high, _ in node.options["padding_config"]]
    if (
        filling.value != 0
        or any(inside for _, _, inside in node.options["padding_config"])
        or {pairs[0], pairs[-1]} != {(0, 0)}
        or min(map(min, pairs)) < 0
    ):
        raise Unknown(node, "pad is no padding with zeros around the positions")
    return Step(node, signal, padding=tuple(pairs[1:-1]))


def _wrapping(node: Node) -> Step:
    """A concatenation that pads one axis with parts of the signal itself."""
    source, axis = node.dominator, node.options["dimension"]
    assert source is not None
    unknown = Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    if len(source.shape) != len(node.shape) or not 0 < axis < len(node.shape) - 1:
        raise unknown
    taken = _taken_along(axis, node, source, unknown)
    extra = node.shape[axis] - source.shape[axis]
    for mode in ("wrap", "reflect"):
        for low in range(extra + 1):
            pair = (low, extra - low)
            if np.array_equal(taken, np.pad(range(source.shape[axis]), pair, mode)):
                pairs = [(0, 0)] * (len(node.shape) - 2)
                pairs[axis - 1] = pair
                name = {"wrap": "CIRCULAR", "reflect": "REFLECT"}[mode]
                return Step(node, source, padding=tuple(pairs), mode=name)
    raise unknown


def _taken_along(axis: int, node: Node, source: Node, unknown: Unknown) -> Any:
    """Which entries of an axis a node consists of."""
    if node is source:
        return np.arange(source.shape[axis])
    parts = [_taken_along(axis, part, source, unknown) for part in node.flow]
    if node.op == "concatenate" and node.options["dimension"] == axis:
        return np.concatenate(parts)
    if node.op == "rev" and tuple(node.options["dimensions"]) == (axis,):
        return parts[0][::-1]
    if node.op == "slice" and node.options["strides"] in (None, (1,) * len(node.shape)):
        first, last = node.options["start_indices"], node.options["limit_indices"]
        return parts[0][first[axis] : last[axis]]
    raise unknown


def _subsampling(node: Node) -> Step:
    (signal,) = node.operands
    strides = node.options["strides"] or (1,) * len(node.shape)
    whole = node.options["limit_indices"] == signal.shape
    if not whole or any(node.options["start_indices"]) or strides[0] * strides[-1] != 1:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    # Every second entry is what a pooling with a window of one entry leaves.
    link = _spec.AvgPool((1,) * (len(strides) - 2), strides=strides[1:-1])
    return Step(node, signal, [link])


RULES: dict[str, Callable[[Node], Step]] = {
    "broadcast_in_dim": _same_values,
    "concatenate": _wrapping,
    "conv_general_dilated": _conv,
    "dot_general": _dense,
    "pad": _zero_padding,
    "reduce_max": _reduction,
    "reduce_sum": _reduction,
    "reduce_window_max": _pool,
    "reduce_window_sum": _pool,
    "reshape": _same_values,
    "slice": _subsampling,
    "squeeze": _same_values,
    "transpose": _transposition,
}
SUMS = ("add", "add_any", "sub")


# --- Patterns for what a piece computes ----------------------------------------------


def _constant_ratio(values: Any, reference: Any) -> float | None:
    """The number that makes the one out of the other, None where there is none."""
    with np.errstate(all="ignore"):
        ratio = values / reference
    factor = float(np.median(ratio))
    if not np.allclose(ratio, factor, rtol=1e-3) or factor == 0:
        return None
    return factor


def _is_plain(piece: Piece) -> bool:
    return piece.mask is None and not piece.leaves and not piece.reduced


def _scaling(piece: Piece, node: Node, source: Node) -> Step | None:
    if not _is_plain(piece) or np.ptp(piece.values / SIGNAL) > 1e-6:
        return None
    factor = float(np.median(piece.values / SIGNAL))
    return Step(node, source, [_spec.Scale(factor)]) if factor else None


def _activation(piece: Piece, node: Node, source: Node) -> Step | None:
    if not _is_plain(piece) or not jnp.issubdtype(node.dtype, jnp.floating):
        return None
    for name, reference in _activations(jnp.dtype(node.dtype)):
        if np.allclose(piece.values, reference, rtol=1e-4, atol=1e-6):
            return Step(node, source, [_spec.Activation(name)])
    return None


@functools.cache
def _activations(dtype: Any) -> list[tuple[str, Any]]:
    """What every known activation makes of the samples, constants in a dtype."""
    functions = [
        (name, getattr(jax.nn, name))
        for name in ACTIVATIONS
        if name not in ("identity", "swish", "celu")  # of one value with others
    ]
    functions.append(("gelu", functools.partial(jax.nn.gelu, approximate=False)))
    computed = []
    for name, function in functions:
        closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((1,), dtype))
        argument = graph.leaf("input", "", (1,), dtype)
        (output,) = graph.read(closed, [argument])
        computed.append((name, graph.evaluate(output, argument).values))
    return computed


def _dropout(piece: Piece, node: Node, source: Node) -> Step | None:
    if piece.mask is None or piece.leaves or piece.reduced:
        return None
    ratio = piece.values / SIGNAL
    for kept in (piece.mask, ~piece.mask):
        # What is kept makes up for what is dropped.
        taken = ratio[:, kept]
        if not ratio[:, ~kept].any() and np.ptp(taken) < 1e-6 and taken[0, 0] > 1:
            return Step(node, source, [_spec.Dropout()])
    return None


def _bias(piece: Piece, node: Node, source: Node) -> Step | None:
    if piece.reduced or piece.mask is not None or len(piece.leaves) != 1:
        return None
    ((path, leaf),) = piece.leaves.items()
    is_bias = path in piece.paths["param"] and f"/{path}".endswith("/bias")
    if not is_bias or not np.allclose(piece.values, SIGNAL + leaf):
        return None
    return Step(node, source, bias=path)


def _normalisation(piece: Piece, node: Node, source: Node) -> Step | None:
    if not (piece.reduced or piece.paths["state"]) or piece.mask is not None:
        return None
    params = {f"/{path}".rpartition("/")[::2] for path in piece.paths["param"]}
    modules, roles = {module for module, _ in params}, {role for _, role in params}
    if len(modules) > 1 or not roles <= {"scale", "bias"}:
        return None
    path = modules.pop()[1:] if modules else None
    scale = bias = None
    for leaf in piece.paths["param"]:
        if leaf.endswith("scale"):
            scale = piece.leaves[leaf]
        else:
            bias = piece.leaves[leaf]
    for link, normalised in _normalised(piece, source):
        affine = normalised if scale is None else normalised * scale
        affine = affine if bias is None else affine + bias
        factor = _constant_ratio(piece.values, affine)
        if link is None or factor is None or not roles <= set(link.roles):
            continue
        links: list[_spec.Link] = [dataclasses.replace(link, path=path)]
        if abs(factor - 1) > 2e-3:
            if params:  # it would not leave the bias alone
                continue
            links.append(_spec.Scale(factor))
        return Step(node, source, links)
    return None


def _normalised(piece: Piece, source: Node) -> Iterator[tuple[Any, Any]]:
    """Each normalisation that is possible, and what it makes of the samples."""
    states = [piece.leaves[path] for path in piece.paths["state"]]
    if states and piece.reduced:
        return
    if len(states) == 2:
        for mean, variance in itertools.permutations(states):
            yield _spec.BatchNorm(), (SIGNAL - mean) / np.sqrt(variance)
    if piece.reduced:
        link = _normalisation_over(piece, source.shape)
        mean = SIGNAL.mean(axis=1, keepdims=True)
        yield link, (SIGNAL - mean) / SIGNAL.std(axis=1, keepdims=True)
        if isinstance(link, _spec.LayerNorm):
            yield (
                _spec.RMSNorm(),
                SIGNAL / np.sqrt(np.mean(SIGNAL**2, axis=1, keepdims=True)),
            )


def _normalisation_over(piece: Piece, shape: Shape) -> Any:
    """Which normalisation takes its statistics over these axes, None for none."""
    last = len(shape) - 1
    axes = {axis for axis, _, _ in piece.reduced}
    # Positions must be taken whole, of the features the inner part of each group.
    for axis in axes:
        inner = math.prod(size for a, _, size in piece.reduced if a == axis)
        within = min(within for a, within, _ in piece.reduced if a == axis)
        if within != 1 or (axis != last and inner != shape[axis]):
            return None
    features = math.prod(size for axis, _, size in piece.reduced if axis == last)
    positions = {axis for axis in range(1, last) if shape[axis] > 1}
    if 0 in axes:
        return _spec.BatchNorm() if positions <= axes and last not in axes else None
    if not positions & axes and features == shape[last]:
        return _spec.LayerNorm()
    groups = shape[last] // features
    return _spec.GroupNorm(num_groups=groups) if positions <= axes else None


PATTERNS: tuple[Callable[[Piece, Node, Node], Step | None], ...] = (
    _scaling,
    _activation,
    _dropout,
    _bias,
    _normalisation,
)


# --- Where in the model it is ---------------------------------------------------------


def module_path(scope: str) -> str | None:
    """The path of the module that a name stack belongs to, None where it tells none."""
    parts = [part for part in scope.split("/") if part and "(" not in part]
    named = [part for part in parts if part.startswith("@")]
    if named:
        return named[-1][1:].replace(".", "/")
    names: list[str] = []
    for part in parts[1:]:  # the first is the class of the whole model
        name = part.partition(".")[0]  # Linen appends the method, if not __call__
        if name.isidentifier() and (name == part or names[-1:] != [name]):
            names.append(name)
    return "/".join(names) if parts else None


def above(node: Node) -> Iterator[Node]:
    """The node and what it depends on, breadth first."""
    seen, queue = {node}, [node]
    for found in queue:
        yield found
        new = [operand for operand in found.operands if operand not in seen]
        seen.update(new)
        queue += new
