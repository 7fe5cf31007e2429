"""From a graph to a chain: the graph is cut into steps, the steps become links.

The graph is cut at its dominators, the values that everything passes through, from its
output to its input. Each step is one that `links` recognises, a residual (what splits
and is added up again), or one of the user's blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph
from backmatch_optax.infer.blocks import Blocks
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links import (
    MEANINGS,
    PATTERNS,
    RULES,
    Step,
    Unknown,
    description,
)
from backmatch_optax.parameters import join
from backmatch_optax.spec.link import Shape

_SUMS = ("add", "add_any", "sub")

Measure = Callable[[_spec.Block, Step], _spec.Block]


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
    *_, start = (output, *(n for n in output.dominators() if n.op != "inputs"))
    if start.op != "input":
        raise Unknown(start, f"{start.op} combines several inputs of the model")
    if len(start.shape) < 2:
        raise Unknown(
            start,
            f"its input of shape {start.shape} has no batch dimension or no features: "
            f"give it both, as in jax.ShapeDtypeStruct({(1, *start.shape, 1)[:2]}, "
            f"jnp.{jnp.dtype(start.dtype)})",
        )
    cutter = _Cutter(Blocks(blocks, output, params))
    while True:
        links = _Links(start.shape[1:], params, {}, measure, leading=True)
        cutter.blocks.used.clear()
        try:
            for step in cutter.steps(output, start):
                links.add(step)
            links.finish(output)
            break
        except Unknown as unknown:
            if not cutter.takes(unknown):
                raise
    return _spec.LayerChain(links.links, input_shape=links.start), cutter.blocks.used


# --- The graph as steps --------------------------------------------------------------


class _Cutter:
    def __init__(self, blocks: Blocks):
        self.blocks = blocks
        self.forced: dict[Node, _spec.Block] = {}  # what else would not be known
        self._seen: dict[tuple[Node, Node], Step | Node | None] = {}

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
        while node is not start:
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
        if node.op in RULES:
            yield _tried(lambda: RULES[node.op](node))
        for source in node.dominators():
            step = self._piece(node, source)
            if isinstance(step, Step):
                yield step
            if source is node.dominator and len(node.flow) == 2 and node.op in _SUMS:
                yield _tried(lambda source=source: self._residual(node, source))
            if source is start or (isinstance(step, Node) and not graph.known(step)):
                break
        if start.op == "input" and _is_preparation(node, start):
            yield Step(node, start, begins=True)
        yield Unknown(node, _reason(node))

    def _piece(self, node: Node, source: Node) -> Step | Node | None:
        """The link that a piece is; or the node that keeps it from being evaluated."""
        if (node, source) not in self._seen:
            try:
                piece = graph.evaluate(node, source)
            except graph.Unmatched as error:
                found = error.node
            else:
                known = (pattern(piece, node, source) for pattern in PATTERNS)
                found = next((step for step in known if step is not None), None)
            self._seen[node, source] = found
        return self._seen[node, source]

    def _residual(self, node: Node, source: Node) -> Step:
        if any(arm.shape != node.shape for arm in node.operands):
            raise Unknown(node, f"{node.op} combines two signals of different shapes")
        try:
            first, second = (self.steps(arm, source) for arm in node.operands)
        except Unknown as unknown:
            if unknown.block is None:
                raise
            raise Unknown(node, unknown.reason, unknown.block) from None
        if not _mixes(first) and not _mixes(second):
            raise Unknown(
                node,
                f"the two sides of {node.op} come from one signal with no kernel in "
                "between, and how they correlate is not known",
            )
        if node.op == "sub":
            second.append(Step(node, node.operands[1], [_spec.Scale(-1.0)]))
        return Step(node, source, arms=(first, second), opaque=True)


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

    Blocks without parameters that follow one another are measured as one. A block among
    transposed axes takes in the transposes before and after it.
    """
    joined: list[Step] = []
    transposed: list[Step] = []
    order: Sequence[int] = ()
    for step in steps:
        if step.order:
            before = order or range(len(step.order))
            order = tuple(before[axis] for axis in step.order)
            order = () if order == tuple(range(len(order))) else order
        if step.order or order:
            transposed.append(step)
        if transposed and not order:
            joined += _one_block(transposed) or transposed
            transposed = []
        elif not order:
            joined.append(step)
        if len(joined) > 1 and all(map(_is_nameless, joined[-2:])):
            last = joined.pop()
            joined[-1] = dataclasses.replace(last, source=joined[-1].source)
    return joined + transposed


def _is_nameless(step: Step) -> bool:
    """Whether a step is a block without parameters."""
    return any(isinstance(link, _spec.Block) and not _owns(link) for link in step.links)


def _one_block(steps: Sequence[Step]) -> list[Step]:
    """Steps as the one block among them, if nothing else has parameters."""
    links = [link for step in steps for link in step.links]
    blocks = [link for link in links if isinstance(link, _spec.Block)]
    others = any(link.roles for link in links) or any(s.arms or s.bias for s in steps)
    if len(blocks) != 1 or others:
        return []
    return [Step(steps[-1].node, steps[0].source, blocks, opaque=True)]


def _owns(link: Any) -> bool:
    return getattr(link, "path", None) is not None


def _mixes(steps: Sequence[Step]) -> bool:
    """Whether every way through some steps meets a kernel, which decorrelates."""
    return any(
        any("kernel" in x.roles or (x.owns_subtree and _owns(x)) for x in step.links)
        or (step.arms is not None and all(map(_mixes, step.arms)))
        for step in steps
    )


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
        return (
            f"{node.op} combines the signal with {paths} in a way no link does. "
            "Parameters are known by their names, as Flax gives them: 'kernel', "
            "'bias', 'scale'"
        )
    if piece.reduced:
        return f"{node.op} uses statistics of the signal as no normalisation does"
    return (
        f"{node.op} ends an elementwise function that is neither a Scale nor one of "
        "Activation's"
    )


# --- The steps as links --------------------------------------------------------------


class _Links:
    """Links one after the other, with the shape that they come to.

    That shape may divide the positions in other ways than the traced one does: a Dense
    layer on 64 tokens is one on 8 x 8 positions. Only windows need it to be the same.
    """

    def __init__(
        self,
        start: Shape,
        params: Mapping[str, Shape],
        used: dict[str, Node],
        measure: Measure,
        *,
        leading: bool,
    ):
        self.start = self.shape = start
        self.params = params
        self.used = used  # by path; also those of links side by side with these
        self.measure = measure
        self.leading = leading
        self.links: list[_spec.Link] = []
        self.shapes: list[Shape] = []  # at the input of each link
        self.order: tuple[int, ...] = ()  # of axes, where it is not the input's
        self.padding: tuple[Any, ...] = ()  # that a convolution will take
        self.mode = ""

    def add(self, step: Step) -> None:
        """Adds what a step says."""
        node = step.node
        if step.begins:
            if not self.leading:
                raise Unknown(node, f"{node.op} combines the input with an array")
            return
        if step.order:
            self._transpose(step)
            return
        if self.order and not step.elementwise:
            # To flatten is the same in any order of the axes.
            flattens = node.op == "reshape" and len(node.shape) == 2
            if not flattens or self.order[0] or node.shape[0] != step.batch:
                self._refuse_order(node)
            self.order = ()
        if not self.order and node.shape[:1] != (step.batch,):
            raise Unknown(node, f"{node.op} changes the batch dimension")
        if step.padding:
            self._pad(step)
            return
        if self.padding and step.window is None:
            raise Unknown(node, "padding is followed by no convolution")
        if step.bias:
            self._add_bias(step)
        elif step.arms:
            self._add_residual(step, step.arms)
        elif step.links:
            for link in step.links:
                self._append(link, step)
            if len(node.shape) == 2 < len(self.shape) + 1 and not self.order:
                self._append(_spec.Flatten(), step)  # a maximum over all positions
        else:
            self._reshape(step)
        if math.prod(self.shape) != math.prod(node.shape[1:]):
            raise Unknown(
                node,
                f"{node.op} gives shape {node.shape}, but {self.links[-1]} "
                f"{self.shape} without the batch",
            )

    def finish(self, end: Node) -> None:
        """Checks that nothing is left over."""
        if self.order:
            self._refuse_order(end)
        if self.padding:
            raise Unknown(end, "padding is followed by no convolution")
        if self.leading and "" in self.used and len(self.used) > 1:
            raise Unknown(
                self.used[""],
                "parameters at the top of the model make a layer without a name. Put "
                "it into a module of its own, such as nn.Dense or nnx.Linear",
            )

    def _refuse_order(self, node: Node) -> None:
        raise Unknown(node, f"{node.op} acts on a signal whose axes are transposed")

    def _transpose(self, step: Step) -> None:
        before = self.order or tuple(range(len(step.order)))
        after = tuple(before[axis] for axis in step.order)
        self.order = () if after == tuple(range(len(after))) else after
        if self.order and self.leading and not self.links and not step.order[0]:
            # An input in another order of axes: the chain begins behind.
            self.start = self.shape = step.node.shape[1:]
            self.order = ()

    def _pad(self, step: Step) -> None:
        if self.padding and self.mode != step.mode:
            raise Unknown(step.node, "paddings of two kinds follow one another")
        before = self.padding or ((0, 0),) * len(step.padding)
        self.mode = step.mode
        self.padding = tuple(
            (a + c, b + d) for (a, b), (c, d) in zip(before, step.padding, strict=True)
        )

    def _add_bias(self, step: Step) -> None:
        path = step.bias.rpartition("/")[0]
        last: Any = self.links[-1] if self.links else None
        has_bias = "bias" in getattr(last, "roles", ())
        if has_bias and last.path is None:  # of a normalisation without a scale
            self.links[-1] = last = dataclasses.replace(last, path=path)
            self._use(path, step)
        if not has_bias or last.path != path:
            raise Unknown(
                step.node,
                f"{step.node.op} adds {step.bias!r}, but not to its own layer",
            )

    def _add_residual(self, step: Step, arms: tuple[list[Step], ...]) -> None:
        sides = []
        for arm in arms:
            side = _Links(
                self.shape, self.params, self.used, self.measure, leading=False
            )
            for inner in arm:
                side.add(inner)
            side.finish(step.node)
            sides.append(side)
        first, second = sides
        if first.shape != second.shape:
            raise Unknown(
                step.node,
                f"the two sides of {step.node.op} divide the positions in two ways, "
                f"{first.shape} and {second.shape}",
            )
        branch, shortcut = sorted(sides, key=lambda side: -_count(side.links))
        self._put(_spec.Residual(branch.links, shortcut.links), first.shape)

    def _append(self, link: Any, step: Step) -> None:
        node = step.node
        if isinstance(link, _spec.Scale):
            self._scale(link.factor, step)
            return
        if isinstance(link, _spec.Block):
            self._add_block(link, step)
            return
        if step.window and link is step.links[0]:
            actual = step.source.shape[1:]
            if self.padding:
                pads = (low + high for low, high in self.padding)
                sizes = zip(actual[:-1], pads, strict=True)
                actual = (*(size - pad for size, pad in sizes), actual[-1])
            if self.shape != actual:
                self._restore_positions(actual, step)
            before, mode, self.padding, self.mode = self.padding, self.mode, (), ""
            try:
                name = step.window.name(self.shape[:-1], before, mode)
                link = dataclasses.replace(link, padding=name)
            except ValueError as error:
                raise Unknown(node, f"{node.op} {error}") from None
        path = getattr(link, "path", None)
        shapes = {}
        if path is not None:
            self._use(path, step)
            found = {role: self.params.get(join(path, role)) for role in link.roles}
            shapes = {role: shape for role, shape in found.items() if shape is not None}
        try:
            after = link.shape_after(self.shape, shapes)
        except (ValueError, KeyError) as error:
            raise Unknown(node, f"{link}: {error}") from None
        self._put(link, after)

    def _add_block(self, block: _spec.Block, step: Step) -> None:
        shape = step.node.shape[1:]
        if block.output_shape is None and shape != self.shape:
            block = dataclasses.replace(block, output_shape=shape)
        if block.output_shape not in (None, shape):
            raise Unknown(step.node, f"{block} must have output_shape={shape}")
        if block.path is not None:
            self._use(block.path, step)
        self._put(self.measure(block, step), shape)

    def _use(self, path: str, step: Step) -> None:
        if path in self.used:
            raise Unknown(
                step.node, f"the parameters of {path!r} are used more than once"
            )
        self.used[path] = step.node

    def _put(self, link: _spec.Link, after: Shape) -> None:
        self.links.append(link)
        self.shapes.append(self.shape)
        self.shape = after

    def _scale(self, factor: float, step: Step) -> None:
        """Adds a factor to the one that is there; none at all is left out."""
        if self.leading and not self.links:
            return  # it prepares the input, which counts as whitened behind
        last = self.links[-1] if self.links else None
        if isinstance(last, _spec.Scale):
            factor *= last.factor
            del self.links[-1], self.shapes[-1]
        # A mean's count is rounded in a dtype of 8 or 11 bits.
        tolerance = 1e-5 if jnp.dtype(step.node.dtype).itemsize > 2 else 4e-3
        if abs(factor - 1) > tolerance:
            # The shortest number that is the same in float32, as a person writes it.
            self._put(_spec.Scale(float(str(np.float32(factor)))), self.shape)

    def _reshape(self, step: Step) -> None:
        actual = step.node.shape[1:]
        if actual == self.shape:
            return
        if len(actual) == 1:
            self._append(_spec.Flatten(), step)
        elif self.shape == (*actual, 1):
            return  # one feature and none at all are the same
        elif not actual or actual[-1] != self.shape[-1]:
            if self.links or not self.leading:
                raise Unknown(
                    step.node,
                    f"{step.node.op} from {step.source.shape} to {step.node.shape} "
                    "divides the features",
                )
            self.start = self.shape = actual  # the chain begins behind

    def _restore_positions(self, actual: Shape, step: Step) -> None:
        """Keeps the axes that a global mean leaves with one entry each."""
        for index in reversed(range(len(self.links))):
            link, before = self.links[index], self.shapes[index]
            if isinstance(link, _spec.GlobalAvgPool) and len(before) == len(actual):
                if {1} != {*actual[:-1]}:
                    break
                self.links[index] = _spec.AvgPool(before[:-1])
                self.shape = actual
                return
            if len(before) != 1:  # it has positions of its own
                break
        raise Unknown(
            step.node,
            f"{step.node.op} has a window over the axes of {step.source.shape}, but "
            f"what comes before leaves {self.shape} without the batch",
        )


def _count(links: Sequence[_spec.Link]) -> int:
    """How many links there are, those inside others included."""
    return sum(1 + sum(map(_count, link.arms.values())) for link in links)
