"""From the input of a graph to its output: its steps as links."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.steps import Step, Unknown, steps_between
from backmatch_optax.spec.link import Shape
from backmatch_optax.spec.windows import low_padding


def chain(
    outputs: Sequence[Node], shapes: Mapping[str, Shape], blocks: Sequence[_spec.Block]
) -> _spec.LayerChain:
    """The chain that a graph is, checked link by link against the parameters."""
    flowing = dict.fromkeys(node for node in outputs if node.flows)
    if len(flowing) != 1:
        raise ValueError(
            f"infer_spec: the model has {len(flowing)} outputs that depend on its "
            "inputs, but a chain has one. Choose one, as in "
            "method=lambda model, x: model(x)[0]."
        )
    (output,) = flowing
    *_, start = (output, *(n for n in output.dominators() if n.op != "inputs"))
    if start.op != "input":
        raise Unknown(start, f"{start.op} combines several inputs of the model")
    if len(start.shape) < 2:
        raise Unknown(
            start,
            f"its input of shape {start.shape} has no batch dimension or features",
        )
    links = _Links(start.shape[1:], shapes, set(), leading=True)
    for step in steps_between(output, start, blocks):
        links.add(step)
    links.finish(output)
    for block in blocks:
        if block.path not in links.used:
            raise ValueError(
                f"infer_spec: blocks: the output does not depend on a module at "
                f"{block.path!r}; paths of parameters are {sorted(shapes)}"
            )
    return _spec.LayerChain(links.links, input_shape=links.start)


_WINDOWED = (_spec.Conv, _spec.ConvTranspose, _spec.MaxPool, _spec.AvgPool)
_NORMALISATIONS = (_spec.BatchNorm, _spec.LayerNorm, _spec.GroupNorm)
_ELEMENTWISE = (_spec.Activation, _spec.Scale, _spec.Dropout)


class _Links:
    """Links one after the other, with the shape that they come to.

    That shape may divide the positions in other ways than the traced one does: a Dense
    layer on 64 tokens is one on 8 x 8 positions. Only windows need it to be the same.
    """

    def __init__(
        self,
        start: Shape,
        params: Mapping[str, Shape],
        used: set[str],
        *,
        leading: bool,
    ):
        self.start = self.shape = start
        self.params = params
        self.used = used  # paths, also those of links side by side with these
        self.leading = leading
        self.links: list[_spec.Link] = []
        self.shapes: list[Shape] = []  # at the input of each link
        self.order: tuple[int, ...] = ()  # of axes, where it is not the input's
        self.padding: tuple[Any, ...] = ()  # that a convolution will take
        self.mode = ""

    def add(self, step: Step) -> None:
        """Adds what a step says."""
        if step.begins:
            if not self.leading:
                raise Unknown(
                    step.node, f"{step.node.op} combines the input with an array"
                )
            return
        if step.order:
            self._transpose(step)
            return
        if self.order and not all(
            isinstance(link, _ELEMENTWISE) for link in step.links
        ):
            self._refuse_order(step.node)
        if self.order and not step.links:
            # To flatten is the same in any order of the axes.
            flattens = step.node.op == "reshape" and len(step.node.shape) == 2
            if not flattens or self.order[0] or step.node.shape[0] != step.batch:
                self._refuse_order(step.node)
            self.order = ()
        if not self.order and step.node.shape[:1] != (step.batch,):
            raise Unknown(step.node, f"{step.node.op} changes the batch dimension")
        if step.padding:
            self._pad(step)
            return
        if self.padding and not isinstance(next(iter(step.links), None), _WINDOWED):
            raise Unknown(step.node, "padding is followed by no convolution")
        if step.bias:
            self._add_bias(step)
        elif step.arms:
            self._add_residual(step, step.arms)
        elif step.links:
            for link in step.links:
                self._append(link, step)
            if len(step.node.shape) == 2 < len(self.shape) + 1 and not self.order:
                self._append(_spec.Flatten(), step)  # a maximum over all positions
        else:
            self._reshape(step)
        if math.prod(self.shape) != math.prod(step.node.shape[1:]):
            raise Unknown(
                step.node,
                f"{step.node.op} gives shape {step.node.shape}, but {self.links[-1]} "
                f"{self.shape} without the batch",
            )

    def finish(self, end: Node) -> None:
        """Checks that nothing is left over."""
        if self.order:
            self._refuse_order(end)
        if self.padding:
            raise Unknown(end, "padding is followed by no convolution")

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
        last = self.links[-1] if self.links else None
        if isinstance(last, _NORMALISATIONS) and last.path is None:
            # The bias of a normalisation without a scale.
            self.links[-1] = last = dataclasses.replace(last, path=path)
            self._use(path, step)
        if getattr(last, "path", None) != path or "bias" not in getattr(
            last, "roles", ()
        ):
            raise Unknown(
                step.node,
                f"{step.node.op} adds {step.bias!r}, but not to its own layer",
            )

    def _add_residual(self, step: Step, arms: tuple[list[Step], ...]) -> None:
        sides = []
        for arm in arms:
            side = _Links(self.shape, self.params, self.used, leading=False)
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
        self._put(_spec.Residual(branch.links, shortcut.links))
        self.shape = first.shape

    def _append(self, link: _spec.Link, step: Step) -> None:
        if isinstance(link, _spec.Scale):
            self._scale(link.factor, step)
            return
        actual = step.source.shape[1:]
        if isinstance(link, _WINDOWED):
            if self.padding:
                pads = (low + high for low, high in self.padding)
                sizes = zip(actual[:-1], pads, strict=True)
                actual = (*(size - pad for size, pad in sizes), actual[-1])
            if self.shape != actual:
                self._restore_positions(actual, step)
            link = self._padded(link, step)
        path = getattr(link, "path", None)
        if path is not None:
            self._use(path, step)
        shapes = {
            role: self.params[found]
            for role in link.roles
            if (found := f"{path}/{role}" if path else role) in self.params
        }
        try:
            after = link.shape_after(self.shape, shapes)
        except (ValueError, KeyError) as error:
            raise Unknown(step.node, f"{link}: {error}") from None
        if isinstance(link, _spec.Block) and after != step.node.shape[1:]:
            raise Unknown(
                step.node, f"{link} must have output_shape={step.node.shape[1:]}"
            )
        self._put(link)
        self.shape = after

    def _use(self, path: str, step: Step) -> None:
        if path in self.used:
            raise Unknown(
                step.node, f"the parameters of {path!r} are used more than once"
            )
        self.used.add(path)

    def _put(self, link: _spec.Link) -> None:
        self.links.append(link)
        self.shapes.append(self.shape)

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
            self._put(_spec.Scale(float(str(np.float32(factor)))))

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
            link = self.links[index]
            before = self.shapes[index]
            if isinstance(link, _spec.GlobalAvgPool) and len(before) == len(actual):
                if {1} != {*actual[:-1]}:
                    break
                self.links[index] = _spec.AvgPool(before[:-1])
                self.shape = actual
                return
            if not isinstance(link, (*_ELEMENTWISE, _spec.Dense)):
                break
        raise Unknown(
            step.node,
            f"{step.node.op} has a window over the axes of {step.source.shape}, but "
            f"what comes before leaves {self.shape} without the batch",
        )

    def _padded(self, link: Any, step: Step) -> _spec.Link:
        """A windowed link with its padding, under the name that Flax has for it."""
        options, sizes = step.node.options, self.shape[:-1]
        pooling = isinstance(link, _spec.MaxPool | _spec.AvgPool)
        if "padding" not in options:  # a mean over some axes, or a slice
            if self.padding:
                raise Unknown(step.node, f"{step.node.op} follows on padding")
            return link
        pairs, strides = options["padding"], options["window_strides"]
        if pooling:
            pairs, strides = pairs[1:-1], strides[1:-1]
            window, dilation = link.window_shape, (1,) * len(sizes)
            names = ("VALID", "SAME", "SAME_LOWER")
        else:
            window = step.node.operands[1].shape[:-2]
            dilation = options["rhs_dilation"]
            names = ("SAME", "VALID", *(("CAUSAL",) if len(sizes) == 1 else ()))
        extents = [(n - 1) * d + 1 for n, d in zip(window, dilation, strict=True)]
        if self.padding:
            pairs = self._with_padding_before(link, step, pairs)
        if self.mode:
            name, self.mode = self.mode, ""
            if pairs != tuple(((e - 1) // 2, e // 2) for e in extents) or pooling:
                raise Unknown(step.node, f"{name} padding of {pairs} is not Flax's")
        elif isinstance(link, _spec.ConvTranspose):
            name = _transposed_padding(pairs, extents, options["lhs_dilation"])
        else:
            named = (
                name for name in names if pairs == _pairs(name, sizes, extents, strides)
            )
            name = next(named, pairs)
        try:
            return dataclasses.replace(link, padding=name)
        except ValueError as error:
            raise Unknown(step.node, str(error)) from None

    def _with_padding_before(
        self, link: Any, step: Step, pairs: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """The padding of a window and that of the steps before it, as one."""
        # Zeros take no part in a maximum where nothing is below them.
        positive = bool(self.links) and self.links[-1] in _POSITIVE
        if (
            isinstance(link, _spec.ConvTranspose)
            or (isinstance(link, _spec.MaxPool) and not positive)
            or (self.mode and any(map(any, pairs)))
        ):
            raise Unknown(step.node, f"{step.node.op} follows on padding")
        before, self.padding = self.padding, ()
        return tuple(
            (a + c, b + d) for (a, b), (c, d) in zip(before, pairs, strict=True)
        )


_POSITIVE = [
    _spec.Activation(name) for name in ("relu", "relu6", "sigmoid", "softplus")
]


def _count(links: Sequence[_spec.Link]) -> int:
    """How many links there are, those inside others included."""
    return sum(1 + sum(map(_count, link.arms.values())) for link in links)


def _pairs(
    name: str, sizes: Shape, extents: Sequence[int], strides: Shape
) -> tuple[Any, ...]:
    """What a named padding adds to each axis."""
    pairs = []
    for axis, (size, extent, stride) in enumerate(
        zip(sizes, extents, strides, strict=True)
    ):
        low = low_padding(name, axis, size, extent, stride, 1)
        covered = (-(-size // stride) - 1) * stride + extent
        total = max(covered - size, 0) if name.startswith("SAME") else low
        pairs.append((low, total - low))
    return tuple(pairs)


def _transposed_padding(
    pairs: tuple[Any, ...], extents: Sequence[int], strides: Sequence[int]
) -> Any:
    """The name of a transposed convolution's padding, itself where it has none."""
    same, valid = [], []
    for extent, stride in zip(extents, strides, strict=True):
        total = extent + stride - 2
        low = extent - 1 if stride > extent - 1 else -(-total // 2)
        same.append((low, total - low))
        valid.append((extent - 1, total + max(extent - stride, 0) - extent + 1))
    if pairs == tuple(same):
        return "SAME"
    return "VALID" if pairs == tuple(valid) else pairs
