"""From a graph to a chain: the graph is cut into steps, the steps become links.

The graph is cut at its dominators, the values that everything passes through, from its
output to its input. Each step is one that `links` recognises, one where signals meet
again that went apart, or one of the user's blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph, layout, pieces
from backmatch_optax.infer.blocks import Blocks
from backmatch_optax.infer.build import Context, Links, Measure
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links import attention
from backmatch_optax.infer.links.learned import positions, repeated
from backmatch_optax.infer.links.linear import outer
from backmatch_optax.infer.links.noise import noise
from backmatch_optax.infer.links.rotation import rotation
from backmatch_optax.infer.step import (
    MEANINGS,
    PATTERNS,
    RULES,
    Step,
    Unknown,
    description,
    nodes,
)
from backmatch_optax.spec.link import Shape, with_paths

_SUMS = ("add", "add_any", "sub")
_ADDITIVE = ("concatenate", "sum")  # the curvatures of whose arms add


def chain(
    output: Node,
    params: Mapping[str, Shape],
    blocks: Sequence[_spec.Block],
    measure: Measure,
) -> tuple[_spec.LayerChain, set[_spec.Block]]:
    """The chain that leads to an output, checked link by link against the parameters.

    Args:
      output: the one output that the input reaches.
      params: the shapes of all parameters, by path.
      blocks: what the user wants to be a block.
      measure: fills in the numbers that a block lacks.

    Returns:
      The chain, and which of the blocks are in it.

    Raises:
      Unknown: where something on the way is neither a link nor one of the blocks.
    """
    used: set[_spec.Block] = set()

    def along(end: Node, before: Context, again: bool) -> Links:
        start, main = _beginning(end)
        cutter = _Cutter(Blocks(blocks, end, params), again)
        while True:
            given = dataclasses.replace(before, main=main, used={**before.used})
            links = Links(given, main.shape[1:], leading=not main.learned)
            cutter.blocks.used.clear()
            try:
                for step in cutter.steps(end, start):
                    links.add(step)
                links.finish(end)
                break
            except Unknown as unknown:
                if not cutter.takes(unknown):
                    raise
        used.update(cutter.blocks.used)
        return links

    def keeping(
        end: Node, before: Context, main: Node | None, raw: bool, again: bool
    ) -> Links:
        """The links to an end, with one `Memory` in another where several are kept.

        Nothing is kept that comes from the main input.
        """
        found = (n for n in graph.memories(end, raw) if _can_keep(n, main))
        node = next(found, None)
        if node is None:
            return along(end, before, again)
        links = along(node, before, again)
        above, given = graph.kept_apart(end, node)
        given.path = ""
        if before.kept:  # named after the layer that makes it, or the input
            paths = [link.path for link in with_paths(links.links) if link.path]
            given.path = [node.path or f"memory {len(before.kept)}", *paths][-1]
        kept = {**before.kept, given.path: links.links}
        context = dataclasses.replace(links.context, kept=kept)
        inside = keeping(above, context, main, raw, again)
        links.keep(given, inside)
        return links

    def ways(end: Node) -> Iterator[tuple[Node, Node | None, bool, bool]]:
        """No main input first; where that fails and something may be kept, each input.

        Then with inputs that are kept as they are. Then in the same order, with layers
        that arms of a sum or a concatenation have in common. Last of all the same with
        learned arrays that are read as a signal is.
        """
        for again in (False, True):
            yield end, None, False, again
            for raw in (False, True):
                if any(graph.memories(end, raw)):
                    for leaf in sorted(graph.inputs(end), key=_preference):
                        yield end, leaf, raw, again
        arrays = [array for array in repeated(end) if array.shape[0] > 1]
        if arrays:
            yield from ways(graph.with_inputs(end, arrays))

    links = failure = None
    for end, main, raw, again in ways(output):
        used.clear()
        try:
            links = keeping(end, Context(params, measure, end), main, raw, again)
            break
        except Unknown as unknown:
            failure = failure or unknown
    if links is None:
        assert failure is not None
        raise failure
    try:
        found = _spec.LayerChain(links.links, input_shape=links.start)
    except ValueError as error:
        raise Unknown(output, f"its links make no chain: {error}") from None
    return found, used


def _beginning(output: Node) -> tuple[Node, Node]:
    """Where the steps begin, and the chain's own input: see `_preference`."""
    *_, start = (output, *(n for n in output.dominators() if n.op != "inputs"))
    main = start
    if start.op != "input":
        assert start.dominator is not None
        start = start.dominator
        main = min(graph.inputs(output), key=_preference)
    return start, main


def _preference(leaf: Node) -> Any:
    """With features before labels, labels before other numbers; then in order.

    A learned array comes last.
    """
    number = len(leaf.shape) < 2
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.learned, number, number and real, len(leaf.path), leaf.path


def _can_keep(node: Node, main: Node | None) -> bool:
    """Whether a chain may begin with what leads to a value."""
    inputs = graph.inputs(node)
    return main not in inputs and not all(leaf.learned for leaf in inputs)


# --- The graph as steps --------------------------------------------------------------


class _Cutter:
    def __init__(self, blocks: Blocks, again: bool):
        self.blocks = blocks
        self.again = again  # whether arms that add up may have layers in common
        self.forced: dict[Node, _spec.Block] = {}  # what else would not be known
        self._seen: dict[tuple[Node, Node], Step | Node | None] = {}
        self._factors: set[Node] = set()  # what is multiplied by another signal

    def takes(self, unknown: Unknown) -> bool:
        """Makes what is not known part of a block; False where there is none for it."""
        node = unknown.node
        block = unknown.block or self.blocks.around(node)
        if block is None or node in self.forced or not node.flows:
            return False
        self.forced[node] = block
        return True

    def steps(self, end: Node, start: Node) -> list[Step]:
        """The steps that lead from a node's dominator to it.

        The shortest piece that is a link is taken at each node. Where that leads
        nowhere (the factor 0.5 of a GELU is not a Scale), the last choices are undone,
        as far as the last step that must be as it is.
        """
        trail: list[tuple[Iterator[Step | Unknown], Step]] = []
        node, failure = end, None
        while node is not start and node.op not in ("input", "memory"):
            options = self._options(node, start)
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
        return _joined([step for _, step in reversed(trail)])

    def _options(self, node: Node, start: Node) -> Iterator[Step | Unknown]:
        """All ways to explain a node, and why others fail; the best come first."""
        block = self.forced.get(node) or self.blocks.of(node)
        if block is not None:
            yield _tried(lambda: self.blocks.step(node, start, block))
            return
        begin = _begin(node, start)
        if begin is None:
            yield Unknown(
                node,
                f"{node.op} joins signals that several layers read, before either is "
                "joined to the others",
            )
            return
        if begin.op == "input" and _makes_features(node, begin):
            size = _size_of_features(node, begin)
            links = [] if size in (None, 1.0) else [_spec.Scale(size)]
            yield Step(node, begin, links, begins=True, opaque=True)
        probabilities = attention.softmax(node)
        yield from () if probabilities is None else (probabilities,)
        if node.op in RULES:
            yield _tried(lambda: self._with_arms(RULES[node.op](node)))
        late: list[Step] = []
        for source in node.dominators():
            step = self._piece(node, source)
            if isinstance(step, Step) and (node in self._factors or not _shifts(step)):
                yield from () if step.late else (step,)
                late += [step] * step.late
            if source is node.dominator and len(node.flow) == 2 and node.op in _SUMS:
                yield _tried(lambda: self._residual(node))
            if source is start or (isinstance(step, Node) and not pieces.known(step)):
                break
        if node.op in _SUMS and len(node.flow) == 2:
            rotated = rotation(node)
            yield from () if rotated is None else (rotated,)
        if node.op == "mul" and len(node.flow) == 2:
            yield _tried(lambda: self._gate(node))
        yield from late
        for found in (noise(node), outer(node)):
            yield from () if found is None else (found,)
        if begin.op == "input" and not begin.learned and _is_preparation(node, begin):
            yield Step(node, begin, begins=True)
        elif node.op in _SUMS and len(node.flow) == 1:
            found = positions(node)
            yield from () if found is None else (found,)
        yield Unknown(node, _reason(node))

    def _piece(self, node: Node, source: Node) -> Step | Node | None:
        """The link that a piece is; or the node that keeps it from being evaluated."""
        if (node, source) not in self._seen:
            try:
                piece = pieces.evaluate(node, source)
            except layout.Unmatched as error:
                found = error.node
            else:
                known = (pattern(piece, node, source) for pattern in PATTERNS)
                found = next((step for step in known if step is not None), None)
            self._seen[node, source] = found
        return self._seen[node, source]

    def _residual(self, node: Node) -> Step:
        assert node.dominator is not None
        step = Step(node, node.dominator, ends=node.operands, joins="sum", opaque=True)
        step = self._with_arms(step)
        if not _unrelated(step):
            raise Unknown(
                node,
                f"the two sides of {node.op} come from one signal with no kernel in "
                "between, or with the same one, and how they correlate is not known",
            )
        if node.op == "sub":
            (_, end), minus = step.ends, [_spec.Scale(-1.0)]
            step.arms[1].append(Step(end, end, minus, elementwise=True))
        return step

    def _gate(self, node: Node) -> Step:
        assert node.dominator is not None
        for factor in node.operands:
            while factor.op in (*layout.MOVES, "slice", "split"):
                (factor,) = factor.flow
            self._factors.add(factor)
        step = Step(node, node.dominator, ends=node.operands, joins="product")
        step = dataclasses.replace(self._with_arms(step), opaque=True)
        if not _unrelated(step) and not _apart(*step.arms):
            raise Unknown(
                node,
                f"the two sides of {node.op} come from one signal with no kernel in "
                "between, or with the same one, and a Gate takes them as unrelated",
            )
        return step

    def _with_arms(self, step: Step) -> Step:
        """A step with the steps that lead to the signals that meet in it."""
        try:
            arms = [self.steps(end, step.source) for end in step.ends]
        except Unknown as unknown:
            if step.joins == "repeat":
                module = graph.module_path(unknown.node.scope)
                place = f"module {module!r}" if module else "a layer"
                raise Unknown(
                    step.node,
                    f"{step.node.op} repeats {place}, where {unknown.reason}",
                ) from None
            if unknown.block is None:
                raise
            raise Unknown(step.node, unknown.reason, unknown.block) from None
        if step.joins == "attention":
            query, key, value = arms
            arms = [query, key, _parted(key, value)]
        if step.joins == "outputs" or (self.again and step.joins in _ADDITIVE):
            # What leads to several of them comes again, and curvatures add.
            seen: set[Node] = set()
            for place, arm in enumerate(arms):
                arms[place] = _again(arm, seen)
                seen.update(nodes(arm))
        return dataclasses.replace(step, arms=arms)


def _tried(make: Callable[[], Step]) -> Step | Unknown:
    try:
        return make()
    except Unknown as unknown:
        return unknown


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


def _joined(steps: Sequence[Step]) -> list[Step]:
    """Steps of which some make one block.

    Blocks without parameters that follow one another are measured as one. A block that
    works on another order of the axes, as a recurrence does, takes in the transposes
    before and after it.
    """
    joined: list[Step] = []
    for step in steps:
        joined.append(step)
        if len(joined) > 1 and all(map(_is_nameless, joined[-2:])):
            last = joined.pop()
            joined[-1] = dataclasses.replace(last, source=joined[-1].source)
        around = joined[-3:]
        orders: Any = [
            s.node.options.get("permutation") for s in around[::2] if s.moves
        ]
        if len(orders) == 2 and None not in orders and _is_block(around[1]):
            before, after = orders
            if [before[axis] for axis in after] == [*range(len(after))]:
                first, block, last = around
                whole = dataclasses.replace(block, node=last.node, source=first.source)
                joined[-3:] = [whole]
    return joined


def _shifts(step: Step) -> bool:
    """Whether a step adds a constant, whose sign matters but in a product."""
    return any(isinstance(link, _spec.Shift) for link in step.links)


def _is_block(step: Step) -> bool:
    return any(isinstance(link, _spec.Block) for link in step.links)


def _is_nameless(step: Step) -> bool:
    """Whether a step is a block without parameters."""
    return any(isinstance(link, _spec.Block) and not _owns(link) for link in step.links)


def _owns(link: Any) -> bool:
    return getattr(link, "path", None) is not None


def _mixes(steps: Sequence[Step]) -> bool:
    """Whether every way through some steps meets a kernel, which decorrelates."""
    return any(
        any(_has_kernel(link) for link in step.links)
        or (bool(step.arms) and all(map(_mixes, step.arms)))
        for step in steps
    )


def _in_the_mean(steps: Sequence[Step]) -> list[Any]:
    """The links of an arm, and of arms inside, but dropout, means and factors."""
    left_out = _spec.Dropout | _spec.AvgPool | _spec.GlobalAvgPool | _spec.Scale
    links = [
        link for step in steps for link in step.links if not isinstance(link, left_out)
    ]
    return [*links, *(_in_the_mean(arm) for step in steps for arm in step.arms)]


def _unrelated(step: Step) -> bool:
    """Whether a kernel, or inputs of their own, make two arms unrelated."""
    shared = step.shared()
    if all(_reaches(arm, shared) for arm in step.arms):
        return False
    if any(map(_mixes, step.arms)):
        first, second = map(_in_the_mean, step.arms)
        return first != second
    one, other = step.ends
    if one.recalls != other.recalls:
        return not _read_before(*sorted(step.ends, key=lambda end: end.recalls))
    one, other = ({*graph.inputs(end)} for end in step.ends)
    return step.source.op == "inputs" and not one & other


def _reaches(steps: Sequence[Step], begins: Collection[Node], bare=False) -> bool:
    """Whether one of some nodes reaches the end of an arm with no kernel in between.

    Args:
      steps: the arm.
      begins: the nodes.
      bare: whether the arm begins with what one of them reached in this way.
    """
    for step in steps:
        if step.arms:
            bare = any(_reaches(arm, begins, bare) for arm in step.arms)
        bare = bare and not any(map(_has_kernel, step.links))
        bare = bare or step.node in begins
    return bare


def _read_before(signal: Node, recalled: Node) -> bool:
    """Whether a signal holds some of what is recalled, with no kernel in between."""
    pairs = itertools.product(_reads(recalled), _reads(signal))
    return any(
        memory is other and (not cut or not taken or not _are_apart(cut, taken))
        for (memory, cut), (other, taken) in pairs
    )


def _reads(end: Node) -> set[tuple[Node, tuple[int, ...]]]:
    """What is kept that reaches a node without a kernel, and which parts of it.

    A part is an axis, where it begins, and where it stops; empty for the whole.
    """
    pending: list[tuple[Node, tuple[int, ...]]] = [(end, ())]
    seen = {*pending}
    for node, cut in pending:
        learned = any(operand.uses for operand in node.operands if not operand.flows)
        if node.op in ("dot_general", "conv_general_dilated", "scan") and learned:
            continue
        if node.op in ("slice", "split", "unstack"):
            with contextlib.suppress(Unknown):  # several axes at once
                cut = RULES[node.op](node).taken[:3] or cut
        new = {(operand, cut) for operand in node.flow} - seen
        seen |= new
        pending += new
    return {(node, cut) for node, cut in seen if node.op == "memory"}


def _apart(first: Sequence[Step], second: Sequence[Step]) -> bool:
    """Whether two arms begin with different parts of one signal."""
    cuts = [
        next((step.taken for step in arm if step.taken), ()) for arm in (first, second)
    ]
    return all(cuts) and _are_apart(*cuts)


def _are_apart(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two parts, each (axis, start, stop, ...), are of one axis and apart."""
    return one[0] == other[0] and (one[2] <= other[1] or other[2] <= one[1])


def _parted(key: Sequence[Step], value: Sequence[Step]) -> list[Step]:
    """The steps to the values, where one kernel makes both keys and values.

    What the two have in common comes again for the values. Of its parameters each takes
    a part that the other does not, so that the curvatures of the two uses add.
    """
    pairs = itertools.takewhile(
        lambda pair: pair[0].node is pair[1].node and not pair[0].arms,
        zip(key, value, strict=False),
    )
    count = sum(1 for _ in pairs)
    if not _apart(key[count:], value[count:]):
        return [*value]
    shared = [dataclasses.replace(step, again=True) for step in value[:count]]
    return [*shared, *value[count:]]


def _again(steps: Sequence[Step], seen: Collection[Node]) -> list[Step]:
    """The steps, of which those to nodes that were seen come again."""
    return [
        dataclasses.replace(
            step,
            again=step.again or step.node in seen,
            arms=[_again(arm, seen) for arm in step.arms],
        )
        for step in steps
    ]


def _has_kernel(link: Any) -> bool:
    kernels = {"kernel", "embedding"} & {*link.roles}
    return bool(kernels) or (link.owns_subtree and _owns(link))


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


def _begin(node: Node, start: Node) -> Node | None:
    """Where the steps to a node begin: at an input, or what stands for one.

    None where signals from several of these are joined.
    """
    ends = ("input", "memory")
    found = (x for x in node.dominators() if x is start or x.op in ends)
    return next(found, None)


def _makes_features(node: Node, start: Node) -> bool:
    """Whether a node is features made of a number for each example, such as a time.

    With nothing learned on the way. Sines and cosines are the usual ones; these may be
    of several numbers, such as a place.
    """
    if len(node.shape) < 2 or node.shape[:1] != start.shape[:1]:
        return False
    if not jnp.issubdtype(node.dtype, jnp.floating):
        return False
    made = [*graph.above(node, until=start)]
    if any(found.origins - {"array", "data", "input"} for found in made):
        return False
    waves = any(found.op in ("sin", "cos") for found in made)
    return len(start.shape) == 1 or (waves and bool(_size_of_features(node, start)))


def _size_of_features(node: Node, start: Node) -> float | None:
    """The root mean square of features made of numbers; None where it is not known.

    It is known where it is the same whatever the numbers: of sines and cosines, whose
    squares add up to 1.
    """
    rng = np.random.default_rng(0)
    found = []
    for reach in (1.0, 30.0, 1e3):
        numbers = jnp.asarray(rng.uniform(0, reach, start.shape), start.dtype)
        (features,) = graph.run([node], {start: numbers})
        found.append(float(np.sqrt(np.mean(np.square(features, dtype=np.float64)))))
    same = np.isfinite(found).all() and np.ptp(found) <= 0.01 * min(found)
    return float(f"{np.median(found):.2g}") if same and min(found) else None


def _reason(node: Node) -> str:
    """Why no link describes how a node comes about."""
    source = node.dominator
    assert source is not None
    if not pieces.known(node):
        return f"{node.op} is {MEANINGS.get(node.op, 'nothing that a link describes')}"
    try:
        piece = pieces.evaluate(node, source)
    except layout.Unmatched as error:
        culprit = error.node
        if not culprit.flows:
            return f"{node.op} combines the signal with {description(culprit)}"
        if len(node.flow) > 1 and node.op == "mul":
            return "mul multiplies two signals, as gating and attention do"
        if len(node.flow) > 1:
            return f"{node.op} combines two signals"
        culprits = MEANINGS.get(culprit.op, "something that no link describes")
        return f"{node.op} follows on {culprit.op}, {culprits}"
    if piece.masks:
        return (
            f"{node.op} applies a random mask, but a Dropout divides what it keeps by "
            "the probability of keeping it"
        )
    if piece.leaves:
        paths = ", ".join(map(repr, piece.leaves))
        return f"{node.op} combines the signal with {paths} in a way no link does"
    if piece.reduced:
        return f"{node.op} uses statistics of the signal as no normalisation does"
    return (
        f"{node.op} ends an elementwise function that is neither a Scale nor one of "
        "Activation's"
    )
