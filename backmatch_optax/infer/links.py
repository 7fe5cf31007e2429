"""How each kind of layer is recognised in a graph: one function for each.

To teach inference a new kind of layer, write one function here. Under the names of
primitives, `@rule(...)` makes it responsible for what these compute. Under none it is
asked about every elementwise or normalising piece of the graph, with what the piece
makes of sample values. The order of the functions is the order in which they are asked.
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
from backmatch_optax.infer.graph import MASK, SIGNAL, Node, Piece
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


@dataclasses.dataclass(frozen=True)
class Heads:
    """How the axes of queries, keys and values stand to one another in attention.

    Attributes:
      query: a letter for each axis of the queries: `d` for what is contracted with the
        keys, `b` for what goes along with an axis of the keys, `p` for others.
      key: the same for the keys.
      value: the same for the values; `p` for what is contracted with the weights.
      out: for each axis of the outcome, factors of the axes of the queries.
      factor: what the logits are multiplied by.
      causal: whether a position attends only to itself and to those before it.
      attended: to how many positions, where a mask leaves fewer.
    """

    query: str
    key: str
    value: str
    out: Sequence[graph.Axis]
    factor: float
    causal: bool
    attended: float | None


@dataclasses.dataclass
class Step:
    """What happens between a node and the one it is computed from."""

    node: Node
    source: Node
    links: Sequence[_spec.Link] = ()  # one after the other
    ends: tuple[Node, ...] = ()  # several signals that meet in the node,
    joins: str = ""  # in what way: "sum", "product", "concatenate" and so on,
    heads: Heads | None = None  # of attention,
    arms: Sequence[list[Step]] = ()  # and the steps that lead to each
    moves: bool = False  # the same values in other places, or repeated
    contracted: int = 1  # how many of the last axes are its features,
    order: tuple[int, ...] = ()  # where they are others: the axes as the link has them,
    sizes: Shape = ()  # the features that it makes, in the same order,
    placed: tuple[int, ...] = ()  # and which of all its axes is where in the node
    taken: tuple[int, ...] = ()  # of an axis: (axis, start, stop, stride)
    resized: tuple[Any, ...] = ()  # an axis: (axis, its new place and size, method)
    bias: str = ""  # path of a parameter added to the signal; `links` if standing alone
    window: Window | None = None  # that the first of its links slides over positions
    padding: tuple[Any, ...] = ()  # (low, high) per axis, for a convolution to come
    mode: str = ""  # how that is filled: "CIRCULAR", "REFLECT"; empty for zeros
    elementwise: bool = False  # so that the order of the axes does not matter
    begins: bool = False  # that the chain begins behind it
    # Whether a piece of the graph that goes on beyond it cannot be one link.
    opaque: bool = False
    late: bool = False  # Whether it is a link only where longer pieces are none.
    again: bool = False  # Whether another arm, before this one, has it too.


class Unknown(Exception):
    """Something on the way from the input to the output that no link describes."""

    def __init__(self, node: Node, reason: str, block: _spec.Block | None = None):
        super().__init__(reason)
        self.node = node
        self.reason = reason
        self.block = block  # that would describe it, taken from here on


RULES: dict[str, Callable[[Node], Step]] = {}
PATTERNS: list[Callable[[Piece, Node, Node], Step | None]] = []


def rule(*primitives: str) -> Callable[[Any], Any]:
    """Enters a function under primitives, or among those that know pieces."""

    def enter(function: Any) -> Any:
        RULES.update({primitive: function for primitive in primitives})
        if not primitives:
            PATTERNS.append(function)
        return function

    return enter


def description(node: Node) -> str:
    """What a value is that the input does not reach."""
    if "random" in node.origins:
        return "random numbers"
    paths = [repr(found.path) for found in graph.above(node) if found.path]
    return f"what is computed from {', '.join(paths)}" if paths else "an array"


# --- Linear layers -------------------------------------------------------------------


def _kernel_path(node: Node, name: str = "kernel") -> str:
    """The path of the layer whose kernel a linear operation multiplies with."""
    signal, kernel = node.operands
    if kernel.flows and node.op == "dot_general":
        signal, kernel = kernel, signal
    if kernel.flows:
        raise Unknown(
            node,
            f"{node.op} multiplies the signal with {description(signal)} on its left",
        )
    if kernel.op != "param":
        raise Unknown(node, f"the kernel of {node.op} is {description(kernel)}")
    path, _, found = f"/{kernel.path}".rpartition("/")
    if found != name:
        raise Unknown(
            node,
            f"{node.op} multiplies with {kernel.path!r}. Parameters are known by their "
            "names, as Flax gives them: call it 'kernel' in the model, and a bias "
            "'bias', to make it a layer",
        )
    return path[1:]


@rule("dot_general")
def dense(node: Node) -> Step:
    """`Dense`, `DenseGeneral` and `Unembed`: a kernel over some axes of the signal."""
    if all(operand.flows for operand in node.operands):
        return RULES["attention"](node)
    resized = interpolation(node)
    if resized is not None:
        return resized
    which = int(node.operands[0].flows)  # of the operands is the kernel
    signal, kernel = node.operands[1 - which], node.operands[which]
    contracted, batched = (tuple(map(tuple, o)) for o in numbers(node))
    table = kernel.operands[0] if kernel.op == "transpose" else kernel
    if table.path.rpartition("/")[2] == "embedding" and len(table.shape) == 2:
        # The rows of the table, transposed or not, are the new features.
        over = (len(signal.shape) - 1,), (int(table is kernel),)
        if which and (contracted, batched) == (over, ((), ())):
            link = _spec.Unembed(table.path.rpartition("/")[0])
            return Step(node, signal, [link], opaque=True)
    path = _kernel_path(node)
    count, last = len(contracted[0]), len(signal.shape)
    over = (*range(last - count, last),), (*range(count),)
    if not which or (contracted, batched) != (over, ((), ())):
        return _contraction(node, signal, kernel, path, which)
    plain = len(kernel.shape) == 2 and count == 1
    link = _spec.Dense(path) if plain else _spec.DenseGeneral(path)
    return Step(node, signal, [link], contracted=count, opaque=True)


def _contraction(node: Node, signal: Node, kernel: Node, path: str, which: int) -> Step:
    """`DenseGeneral` with the axes of its kernel in any order, as `Einsum` has them."""
    contracted, batched = numbers(node)
    # The kernel's axes and the signal's, those that go along first.
    pairs = [*zip(batched[which], batched[1 - which], strict=True)]
    pairs += zip(contracted[which], contracted[1 - which], strict=True)
    of_signal = dict(pairs)
    if any(axis == 0 for axis in of_signal.values()):
        raise Unknown(
            node, f"{node.op} with {path!r} is over the examples of the batch"
        )
    rank = len(kernel.shape)
    free = [axis for axis in range(rank) if axis not in of_signal]
    features = [of_signal[axis] for axis in sorted(of_signal)]
    positions = [at for at in range(len(signal.shape)) if at not in features]
    # The axes of the node: those that go along, then the others of either operand.
    sides = [[("kernel", axis) for axis in free], [("signal", at) for at in positions]]
    found = [("kernel", axis) for axis in batched[which]]
    found += itertools.chain(*(sides if which == 0 else reversed(sides)))
    made = [axis for axis in range(rank) if axis not in contracted[which]]
    own = [("signal", at) for at in positions] + [("kernel", axis) for axis in made]
    axes = [tuple(sorted(taken)) for taken in (contracted[which], batched[which])]
    first = axes[0] == (*range(len(axes[0])),) and not axes[1]
    options: Any = (
        {} if first else dict(zip(("in_axis", "batch_axis"), axes, strict=True))
    )
    plain = first and rank == 2
    link = _spec.Dense(path) if plain else _spec.DenseGeneral(path, **options)
    return Step(
        node,
        signal,
        [link],
        contracted=len(features),
        order=(*positions, *features),
        sizes=tuple(kernel.shape[axis] for axis in made),
        placed=tuple(own.index(axis) for axis in found),
        opaque=True,
    )


def numbers(node: Node) -> Any:
    """Which axes a matrix product contracts, and which go along."""
    return node.options["dimension_numbers"]


@rule("conv_general_dilated")
def convolution(node: Node) -> Step:
    """`Conv` and `ConvTranspose`, with Flax's order of axes."""
    path, options, rank = _kernel_path(node), node.options, len(node.shape)
    last = (0, rank - 1, *range(1, rank - 1))
    flax = (last, (rank - 1, rank - 2, *range(rank - 2)), last)
    numbers = tuple(map(tuple, options["dimension_numbers"]))
    if numbers != flax or options["batch_group_count"] != 1:
        raise Unknown(node, f"the axes of {path!r} are not in Flax's order")
    strides, spread = options["window_strides"], options["lhs_dilation"]
    groups, dilation = options["feature_group_count"], options["rhs_dilation"]
    arguments = {"kernel_dilation": short(dilation)}
    taps = node.operands[1].shape[:-2]
    window = Window(taps, strides, dilation, options["padding"], _CONV_PADDINGS)
    if math.prod(spread) == 1:
        arguments |= {"strides": short(strides), "feature_group_count": groups}
        link = _spec.Conv(path, **arguments)
    elif math.prod(strides) == 1 and groups == 1:
        link = _spec.ConvTranspose(path, strides=short(spread), **arguments)
        window = dataclasses.replace(window, spread=spread, takes_zeros=False)
    else:
        raise Unknown(node, f"{path!r} is both a strided and a transposed convolution")
    return Step(node, node.operands[0], [link], window=window, opaque=True)


# --- Learned arrays ------------------------------------------------------------------


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
    if not any(_is_aligned(operand, path) for operand in node.operands):
        return None
    link = _spec.Bias(path) if adds else _spec.LayerScale(path)
    return Step(node, source, [link], late=name == "scale")


def origin(node: Node) -> Node:
    """What a node only puts elsewhere, or repeats."""
    while node.op in graph.MOVES:
        node = node.operands[0]
    return node


def _is_aligned(node: Node, path: str) -> bool:
    """Whether a node is a parameter, repeated as NumPy does."""
    moves = [node]
    while moves[-1].op in graph.MOVES:
        moves.append(moves[-1].operands[0])
    param = moves.pop()
    if param.path != path or param.op != "param":
        return False
    sizes = enumerate(param.shape)
    axes: Sequence[graph.Axis] = [((i, 1, n),) if n > 1 else () for i, n in sizes]
    for move in reversed(moves):
        axes = graph.moved(move, axes)
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
        if source.op == "gather" and source.operands[0].op == "param":
            table, indices = source.operands
            path, _, name = f"/{table.path}".rpartition("/")
            rows = _all_entries(indices)[..., 0]
            whole = source.shape == (*rows.shape, *table.shape[1:])
            if name != "embedding" or len(table.shape) != 2 or not whole:
                return None
            rows = rows[0] if rows.ndim > 1 and len(rows) == 1 else rows
            if np.array_equal(rows, np.arange(table.shape[0])):
                return Step(node, signal, [_spec.Bias(table.path)])
            looked_up = [_spec.Input(rows.shape), _spec.Embed(path[1:])]
            return Step(node, signal, [_spec.Residual([], looked_up)])
        if len(sizes) > 1 and not added.origins - {"array"} and node.op != "add_any":
            values = _all_entries(added)
            square = np.mean(values**2)
            means = values.mean(axis=tuple(range(values.ndim - 1)))
            share = min(float(f"{np.mean(means**2) / square:.2g}"), 0.99)
            size = float(f"{np.sqrt(square):.4g}")
            constants = [_spec.Input(node.shape[1:], common=share), _spec.Scale(size)]
            return Step(node, signal, [_spec.Residual([], constants)])
    except (graph.Unmatched, ValueError):
        pass
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


_LINEAR = {"add", "concatenate", "mul", "neg", "slice", "split", "sub", *graph.MOVES}


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
        found = graph.entries(node, index, {source: basis})
    except (graph.Unmatched, ValueError):
        return False
    matrices = found / weights[tuple(rows)]
    products = matrices @ np.swapaxes(matrices, 1, 2)
    return bool(np.allclose(products, np.eye(features), atol=1e-4))


def _all_entries(node: Node) -> Any:
    """The entries of a constant, those at the first 256 places of a long axis."""
    sizes = [min(size, 256) if at else size for at, size in enumerate(node.shape)]
    return np.broadcast_to(graph.entries(node, [*np.indices(sizes)]), sizes)


@rule("gather")
def embedding(node: Node) -> Step:
    """`Embed`: rows of a table, one for each integer."""
    table, indices = node.operands
    if table.flows:
        return nearest(node)
    path, _, name = f"/{table.path}".rpartition("/")
    if table.op != "param" or name != "embedding" or not indices.flows:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    found = node.options["dimension_numbers"]
    rows = (found.collapsed_slice_dims, found.start_index_map)
    source = indices
    while source.op != "input" and jnp.issubdtype(source.dtype, jnp.integer):
        if source.dominator is None or source.dominator.op == "inputs":
            break
        source = source.dominator
    whole = (len(source.shape), len(table.shape)) == (len(node.shape) - 1, 2)
    if rows != ((0,), (0,)) or not whole or source.shape != node.shape[:-1]:
        raise Unknown(
            node, f"{node.op} with {table.path!r} takes no row for each input"
        )
    return Step(node, source, [_spec.Embed(path[1:])], opaque=True)


# --- Layers that are the same --------------------------------------------------------


@rule("scan")
def repeated(node: Node) -> Step:
    """`Repeat`: a scan over layers whose parameters are stacked."""
    shared, carried, stacked = graph.loop(node)
    signals = [operand for operand in (*shared, *carried, *stacked) if operand.flows]
    learned = [operand for operand in stacked if operand.uses]
    through = carried[node.result : node.result + 1]
    if signals != [*through]:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    for operand in (*shared, *carried):
        for path in operand.uses if not operand.flows else ():
            raise Unknown(
                node,
                f"{node.op} uses {path!r} in each of its layers, but those of a Repeat "
                "have parameters of their own",
            )
    if not learned:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    for operand in learned:
        if operand.op != "param":
            raise Unknown(
                node,
                f"{node.op} walks layers whose parameters are not stacked along the "
                f"first axis, or are computed: {description(operand)}",
            )
    if node.options["reverse"]:
        raise Unknown(node, f"{node.op} walks its layers from the last to the first")
    (signal,), ends = through, (graph.layer(node),)
    return Step(node, signal, ends=ends, joins="repeat", opaque=True)


# --- Windows over positions ----------------------------------------------------------


def short(counts: Sequence[int]) -> Any:
    """Strides and the like as people write them: one number where all are the same."""
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


_CONV_PADDINGS = ("SAME", "VALID", "CAUSAL")
_POOL_PADDINGS = ("VALID", "SAME", "SAME_LOWER")


@dataclasses.dataclass(frozen=True)
class Window:
    """A window that slides over the positions, and how these are padded."""

    taps: Sequence[int]
    strides: Sequence[int]
    dilation: Sequence[int]
    pairs: tuple[tuple[int, int], ...]
    names: Sequence[str]  # that a padding may have
    spread: Sequence[int] = ()  # strides of a transposed convolution
    takes_zeros: bool = True  # whether zeros around its input are like its padding

    def name(self, sizes: Shape, before: tuple[Any, ...], mode: str) -> Any:
        """Its padding as Flax calls it, what was padded before included.

        Raises:
          ValueError: where Flax has no such padding.
        """
        taps = zip(self.taps, self.dilation, strict=True)
        extents = [(count - 1) * step + 1 for count, step in taps]
        pairs = self.pairs
        if before:
            if not self.takes_zeros or (mode and any(map(any, pairs))):
                raise ValueError("follows on padding")
            both = zip(before, pairs, strict=True)
            pairs = tuple((a + c, b + d) for (a, b), (c, d) in both)
        if mode:
            if self.names is not _CONV_PADDINGS or pairs != tuple(
                ((extent - 1) // 2, extent // 2) for extent in extents
            ):
                raise ValueError(f"has {mode} padding of {pairs}, which is not Flax's")
            return mode
        known = (
            self._transposed(extents) if self.spread else self._known(sizes, extents)
        )
        for name, candidate in known:
            if tuple(candidate) == pairs:
                return name
        return pairs[0][0] if len({*itertools.chain(*pairs)}) == 1 else pairs

    def _known(
        self, sizes: Shape, extents: Sequence[int]
    ) -> Iterator[tuple[str, Sequence[tuple[int, int]]]]:
        for name in self.names:
            if name != "CAUSAL":
                yield name, jax.lax.padtype_to_pads(sizes, extents, self.strides, name)
            elif len(sizes) == 1:
                yield name, [(extents[0] - 1, 0)]

    def _transposed(
        self, extents: Sequence[int]
    ) -> Iterator[tuple[str, Sequence[tuple[int, int]]]]:
        same, valid = [], []
        for extent, stride in zip(extents, self.spread, strict=True):
            total = extent + stride - 2
            low = extent - 1 if stride > extent - 1 else -(-total // 2)
            same.append((low, total - low))
            valid.append((extent - 1, total + max(extent - stride, 0) - extent + 1))
        yield from (("SAME", same), ("VALID", valid))


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
    window = Window(taps, strides, (1,) * len(taps), pairs, _POOL_PADDINGS)
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
            piece = graph.evaluate(node, source)
        except graph.Unmatched:
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
    count, ones = math.prod(taps), (1,) * len(taps)
    if node.op == "reduce_sum" and count == math.prod(sizes):
        return Step(node, signal, [_spec.GlobalAvgPool(), _spec.Scale(count)])
    window = Window(taps, ones, ones, ((0, 0),) * len(taps), ("VALID",), (), False)
    links: list[_spec.Link] = [_spec.MaxPool(tuple(taps))]
    if node.op == "reduce_sum":
        links = [_spec.AvgPool(tuple(taps)), _spec.Scale(count)]
    return Step(node, signal, links, window=window)


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
        window = Window(ones, strides, ones, pairs, ("VALID",), (), False)
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
        taken = graph.entries(indices, [np.arange(after), 0])
    except graph.Unmatched:
        raise unknown from None
    if not np.array_equal(taken, np.floor((np.arange(after) + 0.5) * before / after)):
        raise unknown
    resized = (axis, axis, after, "nearest")
    return Step(node, signal, resized=resized, opaque=True)


def interpolation(node: Node) -> Step | None:
    """`Resize`: one axis times a constant matrix; None where it is none."""
    which = node.operands[0].flows
    matrix, signal = node.operands[which], node.operands[1 - which]
    contracted, batched = numbers(node)
    if matrix.origins - {"array"} or len(matrix.shape) != 2 or batched[0]:
        return None
    (axis,), (row,) = contracted[1 - which], contracted[which]
    before, after = matrix.shape[row], matrix.shape[1 - row]
    try:
        weights = graph.entries(matrix, [*np.indices(matrix.shape)])
    except graph.Unmatched:
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


@rule("concatenate")
def concatenation(node: Node) -> Step:
    """`Concatenate`, `ClassToken`; or padding with parts of the signal itself."""
    axis, rank = node.options["dimension"], len(node.shape)
    rotated = rotation(node) if axis == rank - 1 else None
    if rotated is not None:
        return rotated
    wrapped = _wrapped(node, axis) if 0 < axis < rank - 1 else None
    if wrapped is not None:
        return wrapped
    ends = node.flow
    assert node.dominator is not None
    if axis and all(operand.flows for operand in node.operands):
        step = Step(node, node.dominator, ends=ends, joins="concatenate", opaque=True)
        return step
    first, *others = node.operands
    path = origin(first).path
    token = first.origins == {"param"} and _is_aligned(first, path)
    if token and len(others) == len(ends) == 1 and (axis, rank) == (1, 3):
        return Step(node, others[0], [_spec.ClassToken(path)], opaque=True)
    constant = next(operand for operand in node.operands if not operand.flows)
    raise Unknown(
        node,
        f"{node.op} joins the signal with {description(constant)}"
        if axis
        else f"{node.op} joins examples of the batch",
    )


def _wrapped(node: Node, axis: int) -> Step | None:
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


# --- The same values in another shape ------------------------------------------------


@rule(*graph.MOVES)
def same_values(node: Node) -> Step:
    """No link, or one where a later link needs another shape."""
    return Step(node, node.flow[0], moves=True)


# --- What acts on every entry alike --------------------------------------------------


def _constant_ratio(values: Any, reference: Any) -> float | None:
    """The number that makes the one out of the other, None where there is none."""
    ratio = values / reference
    factor = float(np.median(ratio))
    if not np.allclose(ratio, factor, rtol=1e-3) or factor == 0:
        return None
    return factor


def _is_plain(piece: Piece) -> bool:
    return not (piece.masks or piece.leaves or piece.reduced)


@rule()
def scaling(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Scale`: a constant factor."""
    ratio = piece.values / SIGNAL
    if not _is_plain(piece) or not np.ptp(ratio) <= 1e-6:  # or NaN, as of a logarithm
        return None
    factor = float(np.median(ratio))
    return (
        Step(node, source, [_spec.Scale(factor)], elementwise=True) if factor else None
    )


@rule()
def activation(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Activation`: one of the functions that it knows."""
    if not _is_plain(piece) or not jnp.issubdtype(node.dtype, jnp.floating):
        return None
    for name, reference in _activations(jnp.dtype(node.dtype)):
        if np.allclose(piece.values, reference, rtol=1e-4, atol=1e-6):
            return Step(node, source, [_spec.Activation(name)], elementwise=True)
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


@rule()
def dropout(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Dropout`: what is kept makes up for what is dropped."""
    if len(piece.masks) != 1 or piece.leaves or piece.reduced:
        return None
    share, ratio = _share(piece.masks[0]), piece.values / SIGNAL
    for kept, keep in ((MASK, share), (~MASK, 1 - share)):
        factor = float(np.median(ratio[:, kept]))
        if not ratio[:, ~kept].any() and np.ptp(ratio[:, kept]) < 1e-6:
            if abs(factor * keep - 1) < 4e-3:
                link = _spec.Dropout(float(f"{1 - 1 / factor:.6g}"))
                return Step(node, source, [link], elementwise=True)
    return None


def _share(mask: Node) -> float:
    """How many random bits are set, if `jax.random.uniform` decides; else NaN."""
    while mask.op in ("broadcast_in_dim", "reshape", "squeeze"):
        mask = mask.operands[0]
    drawn = [node for node in graph.above(mask) if node.op == "bitcast_convert_type"]
    mantissas = 1 + (np.arange(20_000).reshape(2, -1) + 0.5) / 20_000
    try:
        piece = graph.evaluate(mask, drawn[0], mantissas) if len(drawn) == 1 else None
    except graph.Unmatched:
        return math.nan
    return math.nan if piece is None or piece.masks else float(np.mean(piece.values))


# --- Normalisations ------------------------------------------------------------------


@rule()
def normalisation(piece: Piece, node: Node, source: Node) -> Step | None:
    """`BatchNorm`, `LayerNorm`, `GroupNorm`, `RMSNorm`, with scale and bias."""
    if not (piece.reduced or piece.paths["state"]) or piece.masks:
        return None
    params = {f"/{path}".rpartition("/")[::2] for path in piece.paths["param"]}
    modules, roles = {module for module, _ in params}, {role for _, role in params}
    if len(modules) > 1 or not roles <= {"scale", "bias"}:
        return None
    path = modules.pop()[1:] if modules else None
    leaves = {"scale": 1.0, "bias": 0.0}
    leaves |= {
        leaf.rpartition("/")[2]: piece.leaves[leaf] for leaf in piece.paths["param"]
    }
    for index, (link, centred, square) in enumerate(_normalised(piece, source)):
        one_plus = isinstance(link, _spec.RMSNorm) and link.one_plus
        scale = leaves["scale"] + one_plus
        affine = centred / np.sqrt(square) * scale + leaves["bias"]
        factor = _constant_ratio(piece.values, affine)
        if link is None or factor is None or not roles <= set(link.roles):
            continue
        links: list[_spec.Link] = [dataclasses.replace(link, path=path)]
        if abs(factor - 1) > 2e-3:
            if params:  # it would not leave the bias alone
                continue
            links.append(_spec.Scale(factor))
        # Against small values the epsilon counts.
        small = graph.evaluate(node, source, SIGNAL * 1e-3)
        _, centred, square = [*_normalised(small, source)][index]
        normalised = (small.values - leaves["bias"]) / scale / factor
        epsilon = np.median((centred / normalised) ** 2 - square)
        if not np.isclose(epsilon, link.epsilon, rtol=1e-2, atol=1e-10):
            found = float(f"{max(epsilon, 0.0):.3g}")
            links[0] = dataclasses.replace(link, path=path, epsilon=found)
        return Step(node, source, links)
    return None


def _normalised(piece: Piece, source: Node) -> Iterator[tuple[Any, Any, Any]]:
    """Each normalisation that is possible: what it divides, by the root of what."""
    signal, states = piece.signal, [piece.leaves[path] for path in piece.paths["state"]]
    if states and piece.reduced:
        return
    if len(states) == 2:
        for mean, variance in itertools.permutations(states):
            yield _spec.BatchNorm(), signal - mean, variance
    if piece.reduced:
        link = _normalisation_over(piece, source.shape)
        mean, variance = signal.mean(1, keepdims=True), signal.var(1, keepdims=True)
        yield link, signal - mean, variance
        if isinstance(link, _spec.LayerNorm):
            square = np.mean(signal**2, axis=1, keepdims=True)
            yield _spec.RMSNorm(), signal, square
            if piece.paths["param"]:
                yield _spec.RMSNorm(one_plus=True), signal, square


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


# --- Several outputs -----------------------------------------------------------------


@rule("outputs")
def outputs(node: Node) -> Step:
    """`Outputs`: the end of a model with several."""
    assert node.dominator is not None
    ends = node.operands
    return Step(node, node.dominator, ends=ends, joins="outputs", opaque=True)
