"""How a softmax is recognised, and attention: values weighted by one.

The weights of attention are a softmax of queries times keys.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph, layout, pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links.elementwise import dropout
from backmatch_optax.infer.links.learned import origin, rows_of_table, whole_axes
from backmatch_optax.infer.step import Heads, Step, Unknown, description, layer_path

_HIDES = -50.0  # what is added to a logit of no weight, or less; 100 in Swin


def attention(node: Node) -> Step:
    """`DotProductAttention`: values weighted by a softmax of queries times keys.

    Masks of padding, which depend on the input, count as full. Dropout of the weights
    and a bound on the logits by `tanh` are left out. Learned numbers that are added to
    the logits are a `bias`.
    """
    for which in (0, 1):
        found = _weights(node.operands[which])
        if found is not None:
            break
    else:
        raise Unknown(
            node,
            f"{node.op} multiplies two signals, which is attention only where one of "
            "them is a softmax",
        )
    weights, over, moves = found
    values, logits = node.operands[1 - which], _logits(weights)
    scores, factor, added, axes = _scores(node, logits)
    contracted, batched = layout.contracted(scores)
    # The axes of the scores: those that go along, then the others of either side.
    free = [
        [
            axis
            for axis in range(len(operand.shape))
            if axis not in (*contracted[side], *batched[side])
        ]
        for side, operand in enumerate(scores.operands)
    ]
    owners = [(0, axis) for axis in batched[0]]
    owners += [(side, axis) for side in (0, 1) for axis in free[side]]
    chosen = axes[over]
    if len(chosen) != 1 or chosen[0][1:] != (1, scores.shape[chosen[0][0]]):
        raise Unknown(node, "the softmax is not over one axis of the keys")
    keyed = chosen[0][0]
    side = owners[keyed][0]  # that of the keys
    query, key = scores.operands[1 - side], scores.operands[side]
    if keyed < len(batched[0]) or len(free[side]) != 1:
        raise Unknown(node, "the softmax is not over the positions of the keys")
    for move in moves:
        axes = layout.moved(move, axes)
    weighted, along = layout.contracted(node)
    if [axes[axis] for axis in weighted[which]] != [chosen]:
        raise Unknown(node, f"{node.op} is not over the axis that the softmax is over")
    # The queries' axis of each axis of the scores.
    of_query = dict(zip(range(len(batched[0])), batched[1 - side], strict=False))
    of_query |= {
        at: axis
        for at, (s, axis) in enumerate(owners)
        if s != side and at >= len(batched[0])
    }
    inner = contracted[1 - side]
    if len(inner) != 1:
        raise Unknown(node, f"{scores.op} contracts several axes of queries and keys")

    def out(axis: int) -> layout.Axis:
        return layout.merged(
            (of_query[at], within, size) for at, within, size in axes[axis]
        )

    rank = len(node.operands[which].shape)
    rest = [a for a in range(rank) if a not in (*weighted[which], *along[which])]
    features = [
        axis
        for axis in range(len(values.shape))
        if axis not in (*weighted[1 - which], *along[1 - which])
    ]
    if len(features) != 1 or len(weighted[which]) != 1:
        raise Unknown(node, f"{node.op} contracts several axes of weights and values")
    size = values.shape[features[0]]
    by_side = [[out(axis) for axis in rest], [((inner[0], 1, size),)]]
    outcome = [out(axis) for axis in along[which]]
    outcome += by_side[which] + by_side[1 - which]
    positions = [at for at, axis in of_query.items() if axis in free[1 - side]]
    learned = {term: times for step, _, times in added for term in _learned(step)}
    causal, attended = _attended(node, scores, added, [*learned], positions, keyed)
    queries = math.prod(scores.shape[axis] for axis in positions)
    heads = Heads(
        query=_roles(query, inner, batched[1 - side]),
        key=_roles(key, contracted[side], batched[side]),
        value=_roles(values, features, along[1 - which]),
        out=outcome,
        factor=factor,
        causal=causal,
        attended=attended,
        bias=_bias(node, learned, (queries, scores.shape[keyed])),
    )
    ends = (query, key, values)
    source = graph.common_dominators(ends)
    return Step(node, source, ends=ends, joins="attention", heads=heads, opaque=True)


def _roles(node: Node, contracted: Sequence[int], along: Sequence[int]) -> str:
    """A letter for each axis, as in `Heads`."""
    return "".join(
        "d" if axis in contracted else "b" if axis in along else "p"
        for axis in range(len(node.shape))
    )


def _weights(node: Node) -> tuple[Node, int, list[Node]] | None:
    """The softmax that a node is, the axis it is over, and the moves in between."""
    moves: list[Node] = []
    while True:
        over = _softmax_axis(node)
        if over is not None:
            return node, over, moves[::-1]
        if node.op in layout.MOVES:
            moves.append(node)
            node = node.flow[0]
            continue
        for source in itertools.islice(node.dominators(), 4):
            try:
                piece = pieces.evaluate(node, source)
            except layout.Unmatched:
                return None
            if dropout(piece, node, source):
                node = source
                break
        else:
            return None


def softmax(node: Node) -> Step | None:
    """`Softmax` or `LogSoftmax` over the last axis; None for what is neither."""
    link, over, last = _spec.Softmax(), _softmax_axis(node), len(node.shape) - 1
    exponent = None if over is None else node.operands[0].operands[0]
    if exponent is None:
        link, (exponent, over) = _spec.LogSoftmax(), _log_softmax(node)
    if exponent is None or over != last:
        return None
    source = _unshifted(exponent, last)
    if all(found is not source for found in itertools.islice(node.dominators(), 4)):
        return None  # the shift comes from elsewhere
    return Step(node, source, [link], opaque=True)


def _softmax_axis(node: Node) -> int | None:
    """Over which axis a softmax ends in a node, None where none does."""
    if node.op != "div" or len(node.flow) != 2 or node.operands[0].op != "exp":
        return None
    terms, over, _ = _sums(node.operands[1], [])
    return over if terms is node.operands[0] else None


def _log_softmax(node: Node) -> tuple[Node | None, int]:
    """What the log-softmax that ends in a node is of, and over which axis.

    It is `x - log(sum(exp(x)))`, or `x - (log(sum(exp(x - h))) + h)`.
    """
    if node.op != "sub" or len(node.flow) != 2:
        return None, 0
    exponent, logarithm = node.operands
    terms, over, shift = _sums(logarithm, ["add", "log", "abs"])
    if terms is None or terms.op != "exp":
        return None, 0
    (inner,) = terms.operands
    if shift is not None:
        shifted = inner.op == "sub" and origin(inner.operands[1]) is origin(shift)
        inner = inner.operands[0] if shifted else inner
    return (exponent, over) if inner is exponent else (None, 0)


def _sums(end: Node, functions: Sequence[str]) -> tuple[Node | None, int, Node | None]:
    """Sums over one axis that are repeated along it.

    Args:
      end: the sums, or functions of them.
      functions: their names, the last first; only the `log` has to be there.

    Returns:
      What is summed, over which axis, and what is added afterwards. The first is None
      where there are no such sums.
    """
    moves, left, shift = list[Node](), [*functions], None
    while end.op in layout.MOVES or end.op in left:
        if end.op in layout.MOVES:
            moves.append(end)
        else:
            left = left[left.index(end.op) + 1 :]
            shift = end.operands[1] if end.op == "add" else shift
        end = end.operands[0]
    over = end.options.get("axes", ())
    if end.op != "reduce_sum" or len(over) != 1 or "log" in left:
        return None, 0, None
    (terms,) = end.operands
    whole: list[layout.Axis] = [
        ((axis, 1, size),) if size > 1 else () for axis, size in enumerate(terms.shape)
    ]
    axes: Sequence[layout.Axis] = whole[: over[0]] + whole[over[0] + 1 :]
    try:
        for move in reversed(moves):
            axes = layout.moved(move, axes)
    except layout.Unmatched:
        return None, 0, None
    apart = [axis for place, axis in enumerate(axes) if place != over[0]]
    in_place = apart == whole[: over[0]] + whole[over[0] + 1 :]
    return (terms, int(over[0]), shift) if in_place else (None, 0, None)


def _logits(weights: Node) -> Node:
    """What a softmax is of."""
    (exponent,), over = weights.operands[0].operands, _softmax_axis(weights) or 0
    return _unshifted(exponent, over)


def _unshifted(logits: Node, over: int) -> Node:
    """Logits without what is the same for all of them, which does not matter."""
    while logits.op == "sub":
        shift = logits.operands[1]
        if shift.op == "broadcast_in_dim":
            sizes, places = (
                shift.operands[0].shape,
                shift.options["broadcast_dimensions"],
            )
            kept = any(t == over and sizes[at] > 1 for at, t in enumerate(places))
        else:
            kept = len(shift.shape) > 0 and shift.shape[over] > 1
        if kept:
            break
        logits = logits.operands[0]
    return logits


def _scores(
    node: Node, logits: Node
) -> tuple[Node, float, list[tuple[Node, Any, float]], Sequence[layout.Axis]]:
    """The product of queries and keys that logits come from.

    Returns:
      The product, what it is multiplied by, where masks and other numbers meet it, with
      its axes there and what these numbers are multiplied by afterwards, and where the
      axes of the product are in the logits.
    """
    factor, trail, at = 1.0, list[tuple[Node, float]](), logits
    while at.op != "dot_general" or len(at.flow) != 2:
        scales = at.op == "mul" or (at.op == "div" and at.operands[0].flows)
        passes = scales or at.op in (*layout.MOVES, "tanh", "select_n", "add")
        if len(at.flow) != 1 or not passes:
            raise Unknown(
                node,
                "a softmax weighs signals, but what it is of comes from "
                f"{at.op}, which is no product of queries and keys",
            )
        others = [operand for operand in at.operands if not operand.flows]
        if scales:
            constant = _constant(others[0])
            if constant is None:
                what = description(others[0])
                raise Unknown(node, f"the logits of attention are multiplied by {what}")
            factor *= constant if at.op == "mul" else 1 / constant
        trail.append((at, factor))
        (at,) = at.flow
    axes, added = whole_axes(at), []
    for step, times in reversed(trail):
        if step.op in layout.MOVES:
            axes = layout.moved(step, axes)
        elif step.op in ("select_n", "add"):
            added.append((step, axes, times))
    return at, factor, added, axes


def _learned(step: Node) -> list[Node]:
    """Learned terms of what is added to logits, without moves and repetitions."""
    if step.op != "add":
        return []
    terms = [operand for operand in step.operands if not operand.flows]
    found = list[Node]()
    while terms:
        term = origin(terms.pop())
        if term.op == "add":
            terms += term.operands
        elif "param" in term.origins:
            found.append(term)
    return found


def _bias(
    node: Node, learned: Mapping[Node, float], places: tuple[int, int]
) -> list[_spec.Link]:
    """The links to what is learned of a bias of the logits.

    Args:
      node: the attention, for messages.
      learned: what is added, and what it is multiplied by.
      places: the numbers of queries and of keys.
    """
    if not learned:
        return []
    term, times = next(iter(learned.items()))
    sizes = tuple(size for size in term.shape if size > 1)
    links: list[_spec.Link] = []
    if term.op == "param" and sizes[-2:] == places and len(sizes) in (2, 3):
        links = [_spec.Queries(sizes, term.path)]
        if len(sizes) == 3:
            links.append(_spec.Transpose((1, 2, 0)))
        else:
            links.append(_spec.Reshape((*places, 1)))
    elif (found := rows_of_table(term)) and found[1].size == math.prod(places):
        embed = _spec.Embed(layer_path(found[0], "embedding"))
        links = [_spec.Input(places), embed]
    if len(learned) > 1 or not links:
        raise Unknown(
            node,
            f"to the logits of attention {description(term)} is added, which is no "
            "number for each query and key, nor one that a table has for these",
        )
    return links if times == 1.0 else [*links, _spec.Scale(times)]


def _constant(node: Node) -> float | None:
    """The one number that a value consists of, None where there is none."""
    node = origin(node)
    if node.value is not None:
        return float(node.value)
    try:
        one = math.prod(node.shape) == 1
        return float(pieces.entries(node, [0] * len(node.shape))) if one else None
    except layout.Unmatched:
        return None


def _attended(
    node: Node,
    scores: Node,
    added: Sequence[tuple[Node, Any, float]],
    learned: Sequence[Node],
    positions: Sequence[int],
    keyed: int,
) -> tuple[bool, float | None]:
    """What masks leave: whether it is causal, and how many positions if not all.

    What a mask takes from the input counts as whatever leaves most positions. Numbers
    that are added to the logits, such as a slope for each head, make weights of their
    own: for the logits' own size there is no room beside them.

    Args:
      node: the attention, for messages.
      scores: the product of queries and keys.
      added: nodes where masks and numbers meet the scores, with the axes of these in
        theirs, and what numbers are multiplied by.
      learned: terms of theirs that count as zero.
      positions: the axes of the scores that are positions of the queries.
      keyed: that of the keys.
    """
    sizes = scores.shape
    own = max(positions, key=lambda axis: sizes[axis], default=keyed)
    # Places on each axis of the scores: all keys, some queries, some heads and windows,
    # which may be folded into the batch.
    most = [32] * len(sizes)
    most[own], most[keyed] = 64, sizes[keyed]
    places = np.ix_(
        *(
            np.unique(np.linspace(0, size - 1, min(size, count)).astype(int))
            for size, count in zip(sizes, most, strict=True)
        )
    )
    rows, columns = places[own], places[keyed]
    from_data = {
        found: True
        for step, _, _ in added
        for operand in step.operands
        for found in graph.above(operand)
        if not operand.flows and found.flow and not found.flows
    }

    def sums() -> Any:
        """What is added to each score."""
        total = np.zeros_like(rows == columns, float)
        known = from_data | dict.fromkeys(learned, 0.0)
        for step, axes, times in added:
            index = [_place(axis, places) for axis in axes]
            total = total + _addend(node, step, times, index, known)
        return total

    total = sums()
    for found in from_data:
        from_data[found] = False
        changed = sums()
        if np.isfinite(changed).mean() > np.isfinite(total).mean():
            total = changed
        else:
            from_data[found] = True
    allowed = np.isfinite(total)
    whole = int(allowed.sum(keyed).max())
    causal = sizes[own] == sizes[keyed] and not allowed.all()
    causal &= bool((allowed == ((columns <= rows) & (columns > rows - whole))).all())
    highest = total.max(keyed, keepdims=True, initial=_HIDES)
    weights = np.exp(total - highest)
    weights = weights / np.maximum(weights.sum(keyed, keepdims=True), 1.0)
    squares = (weights**2).sum(keyed, keepdims=True)
    if causal:
        squares = squares.take([-1], own)  # those before see fewer in any case
    squares = np.where(squares > 0, squares, 1.0)
    attended = max(float(f"{1 / squares.mean():.4g}"), 1.0001)
    everything = math.isclose(attended, sizes[keyed], rel_tol=1e-3)
    return causal, None if everything else attended


def _place(axis: layout.Axis, places: Sequence[Any]) -> Any:
    """The index along an axis that is made of axes of the scores."""
    index: Any = 0
    for of, within, size in axis:
        index = index * size + (places[of] // within % size if of >= 0 else 0)
    return index


def _addend(
    node: Node,
    step: Node,
    times: float,
    index: Sequence[Any],
    given: Mapping[Node, Any],
) -> Any:
    """What a step adds to scores: minus infinity where it hides one."""
    known = {
        found: functools.partial(lambda value, index: np.asarray(value), value)
        for found, value in given.items()
    }
    try:
        values = [
            None
            if operand.flows
            else np.asarray(pieces.entries(operand, _at(operand, index), known))
            for operand in step.operands
        ]
    except layout.Unmatched as error:
        raise Unknown(
            node, f"the logits of attention meet {description(error.node)}"
        ) from None
    if step.op == "add":
        (number,) = (value for value in values if value is not None)
        return np.where(number > _HIDES, number * times, -np.inf)
    which, *cases = values
    assert which is not None
    (number,) = (value for value in cases if value is not None)
    if np.any(number > _HIDES):
        raise Unknown(node, "the logits of attention meet numbers that are no mask")
    left = which.astype(int) == step.operands.index(step.flow[0]) - 1
    return np.where(left, 0.0, -np.inf)


def _at(operand: Node, index: Sequence[Any]) -> list[Any]:
    sizes = zip(operand.shape, index if operand.shape else (), strict=True)
    return [0 if size == 1 else at for size, at in sizes]
