"""The signal of a chain, followed where a trace has it in another shape.

The traced signal may have its axes in another order, or divided in other ways, than the
chain: a Dense layer on 64 tokens is one on 8 x 8 positions, and heads side by side are
features. Where the axes of the chain are in those of the trace is followed. A `Reshape`
or a `Transpose` is put in where a link needs another shape, and nowhere else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.layout import Axis
from backmatch_optax.infer.step import Step, Unknown
from backmatch_optax.spec.link import Shape

NO_FEATURES = (
    "puts out one number for each example, without an axis for it. Keep the axis, as "
    "keepdims=True does, or [:, :1] in the place of [:, 0]"
)


class Signal:
    """A signal and the links that lead to it.

    Attributes:
      main: the input that is the chain's own.
      start: the shape that the links begin with, without the batch.
      shape: the shape that they come to.
      axes: where the axes of that shape, after the batch, are in the traced one.
      leading: whether the first of them reads an input of the model. What only scales
        or reshapes it before is left out.
      fixed: whether the shape of that input must stay.
      links: the links.
    """

    def __init__(
        self,
        main: Node,
        shape: Shape,
        axes: Sequence[Axis] | None = None,
        *,
        leading: bool = False,
        fixed: bool = False,
    ):
        self.main = main
        self.start = self.shape = shape
        self.leading, self.fixed = leading, fixed
        self.links: list[_spec.Link] = []
        self.shapes: list[Shape] = []  # at the input of each link
        self.axes = self._plain() if axes is None else tuple(axes)
        self.padding: tuple[Any, ...] = ()  # that a convolution will take
        self.mode = ""

    def _put(self, link: _spec.Link, after: Shape) -> None:
        self.links.append(link)
        self.shapes.append(self.shape)
        self.shape = after

    def _repeats(self) -> bool:
        """Whether the traced signal is repeated along some axis."""
        return any(axis < 0 for axis, _, _ in itertools.chain(*self.axes))

    def _plain(self) -> tuple[Axis, ...]:
        whole = (*self.main.shape[:1], *self.shape)
        return tuple(
            ((axis, 1, size),) if size > 1 else () for axis, size in enumerate(whole)
        )

    def _is_plain(self, target: Shape) -> bool:
        """Whether the traced signal is the chain's, in the shape `target`."""
        return self.shape == target and self.axes == self._plain()

    def become(self, target: Shape, node: Node) -> None:
        """Puts in what the chain needs to have the traced shape.

        Args:
          target: that shape, without the batch.
          node: where this is needed.
        """
        if self._is_plain(target):
            return
        factors = layout.merged(itertools.chain(*self.axes[1:]))
        if self.axes[0] != self._plain()[0]:
            raise Unknown(node, f"{node.op} follows on a changed batch dimension")
        if any(axis < 0 for axis, _, _ in factors):
            self._upsample(target, node)
            return
        pieces = sorted(factors, key=lambda factor: (factor[0], -factor[1]))
        order = [pieces.index(factor) for factor in factors]
        if not target:
            raise Unknown(node, f"{node.op} {NO_FEATURES}")
        if self.fixed:
            self._check_features(node)
        if len(target) == 1 and self.shape:  # the same in any order
            self._put(_spec.Flatten(), target)
        elif self.leading and not self.fixed and not self.links:
            self.start = self.shape = target  # the chain begins behind
        else:
            if order != sorted(order):
                split = layout.lengths([(piece,) for piece in pieces])
                if split != self.shape:
                    self._put(_spec.Reshape(split), split)
                after = tuple(split[axis] for axis in order)
                self._put(_spec.Transpose(order), after)
            if self.shape != target:
                self._put(_spec.Reshape(target), target)
        self.axes = self._plain()

    def _upsample(self, target: Shape, node: Node) -> None:
        """Puts in the upsampling that repeats each position next to itself."""
        kept = [tuple(f for f in axis if f[0] >= 0) for axis in self.axes]
        pairs = zip(self.axes, kept, strict=True)
        innermost = all(axis[: len(of)] == of for axis, of in pairs)
        if not innermost or kept[-1] != self.axes[-1]:
            raise Unknown(node, f"{node.op} follows on a signal repeated along an axis")
        self.axes = tuple(kept)
        self.become(layout.lengths(kept)[1:], node)
        self._put(_spec.Resize(target[:-1]), target)
        self.axes = self._plain()

    def _move(self, step: Step) -> None:
        node, batch = step.node, self.main.shape[:1]
        try:
            self.axes = layout.moved(node, self.axes)
        except layout.Unmatched:
            self.become(step.source.shape[1:], node)
            if node.shape[:1] != batch:
                raise Unknown(node, f"{node.op} changes the batch dimension") from None
            if not node.shape[1:]:
                raise Unknown(node, f"{node.op} {NO_FEATURES}") from None
            self._put(_spec.Reshape(node.shape[1:]), node.shape[1:])
            self.axes = self._plain()
        if len(node.shape) == 2 < len(self.shape) + 1 and not self._repeats():
            if node.shape[:1] == batch and self.axes[0] == self._plain()[0]:
                self.become(node.shape[1:], node)

    def _features(self, node: Node, shape: Shape, count: int) -> None:
        """Makes the last axes of a traced shape, so many, the features."""
        if not self.shape:
            self.become(shape[1:], node)
        self._check_features(node)
        last = self.shape[-1]
        features = layout.merged(itertools.chain(*self.axes[len(shape) - count :]))
        plain = features == (((len(self.shape), 1, last),) if last > 1 else ())
        if not plain or self._repeats():
            positions = shape[1 : len(shape) - count]
            self.become((*positions, math.prod(shape[-count:])), node)
            self.axes = self._divided(node, shape)

    def _check_features(self, node: Node) -> None:
        if not self.shape:
            main = self.main
            raise Unknown(
                node,
                f"its input of shape {main.shape} has no batch dimension or no "
                f"features: give it both, as in jax.ShapeDtypeStruct("
                f"{(1, *main.shape, 1)[:2]}, jnp.{jnp.dtype(main.dtype)})",
            )

    def _in_order(self, step: Step) -> list[int]:
        """The axes that a step takes, its features as the chain has them.

        A kernel may have them in any order: no rule depends on it.
        """
        count = len(step.order) - step.contracted
        positions, features = step.order[:count], step.order[count:]

        def place(axis: int) -> list[tuple[int, int]]:
            return [(on, -within) for on, within, _ in self.axes[axis]]

        return [*positions, *sorted(features, key=place)]

    def _divided(self, node: Node, shape: Shape) -> tuple[Axis, ...]:
        """The axes of the chain in a traced shape of the same values in order."""
        try:
            return layout.reshaped(node, self._plain(), shape)
        except layout.Unmatched:
            size = math.prod(layout.lengths(self._plain()))
            if size != math.prod(shape):
                return self._plain()  # which `add` refuses
            raise

    def _pad(self, step: Step) -> None:
        if self.padding and self.mode != step.mode:
            raise Unknown(step.node, "paddings of two kinds follow one another")
        if not self.padding:
            self._for_window(step.source.shape[1:], step)
        before = self.padding or ((0, 0),) * len(step.padding)
        self.mode = step.mode
        self.padding = tuple(
            (a + c, b + d) for (a, b), (c, d) in zip(before, step.padding, strict=True)
        )

    def _for_window(self, actual: Shape, step: Step) -> None:
        """Makes the shape the traced one.

        Keeps the axes that a global mean leaves with one entry each.
        """
        if self._is_plain(actual):
            return
        for index in reversed(range(len(self.links))):
            link, before = self.links[index], self.shapes[index]
            if isinstance(link, _spec.GlobalAvgPool) and len(before) == len(actual):
                if {1} == {*actual[:-1]}:
                    self.links[index] = _spec.AvgPool(before[:-1])
                    self.shape = actual
                    self.axes = self._plain()
                    return
                break
            if len(before) != 1:  # it has positions of its own
                break
        self.become(actual, step.node)

    def _slice(self, step: Step, axis: int, *part: int) -> None:
        """A part of one axis: of the features that it divides, if it can be."""
        node, (start, stop, stride) = step.node, part
        place = self.axes[axis] if len(self.axes) > axis else ()
        (on, within, size), *more = place or ((0, 1, 1),)
        outermost = on > 0 and within * size == self.shape[on - 1] and stride == 1
        if more or not outermost:
            self.become(step.source.shape[1:], node)
            on, within, size = axis, 1, self.shape[axis - 1]
        from_end = on - len(self.shape) - 1
        if not on:
            raise Unknown(node, f"{node.op} takes a part of the batch")
        before, after = self.shape[: on - 1], self.shape[on:]
        if stop == start + 1 and within == 1 and from_end < -1:
            self._put(_spec.Slice(start, axis=from_end), (*before, *after))
            self.axes = tuple(
                tuple((a - (a > on), w, n) for a, w, n in found if a != on)
                for found in self.axes
            )
            return
        index = (start * within, stop * within)
        if stride > 1:
            index = (start or None, None if stop == size else stop, stride)
        count = len(range(start, stop, stride))
        self._put(_spec.Slice(index, axis=from_end), (*before, count * within, *after))
        new = ((on, within, count),) if count > 1 else ()
        self.axes = (*self.axes[:axis], new, *self.axes[axis + 1 :])

    def _resize(
        self, step: Step, axis: int, place: int, size: int, method: str
    ) -> None:
        """One axis of positions interpolated to another size, and put in a place."""
        if self.axes[axis] not in self._plain()[1:]:  # a part of an axis, or several
            self.become(step.source.shape[1:], step.node)
        found, last = self.axes[axis], len(self.shape)
        if len(found) != 1 or not 0 < found[0][0] < last:
            raise Unknown(step.node, f"{step.node.op} resizes what is no position")
        ((on, _, _),) = found
        after = (*self.shape[: on - 1], size, *self.shape[on:])
        previous = self.links[-1] if self.links else None
        if isinstance(previous, _spec.Resize) and previous.method == method:
            del self.links[-1]  # the other axis of the same
            self.shape = self.shapes.pop()
        self._put(_spec.Resize(after[:-1], method=method), after)
        axes = [*self.axes[:axis], *self.axes[axis + 1 :]]
        axes.insert(place, ((on, 1, size),) if size > 1 else ())
        self.axes = tuple(axes)

    def _repeat_to(self, shape: Shape, node: Node) -> None:
        """Repeats the signal, traced with a shape, along the axes of length 1."""
        sizes = zip(self.axes, shape, node.shape, strict=True)
        self.axes = tuple(
            layout.repeated(size) if of < size else axis for axis, of, size in sizes
        )

    def _unfold(self, node: Node) -> bool:
        """Gives positions that the traced batch has an axis of their own, in front.

        Returns:
          Whether it has any.
        """
        batch, folded = self._folded()
        if folded:
            self.axes = (batch, folded, *self.axes[1:])
            self.become(layout.lengths(self.axes)[1:], node)
            batch, folded, *others = self.axes
            self.axes = ((*batch, *folded), *others)
        return bool(folded)

    def _folded(self) -> tuple[Axis, Axis]:
        """The batch, and the positions beside it in the first traced axis.

        As in attention within windows, or over one of several axes.
        """
        first, count = self.axes[0], len(self._plain()[0])
        return first[:count], layout.merged(first[count:])

    def _heads_together(self, roles: str, node: Node) -> list[Axis]:
        """Makes an arm's shape (positions, features), and says where its axes went."""
        axes = [tuple(f for f in axis if f[0] >= 0) for axis in self.axes]
        first = self._first_of_features()
        in_features = {
            at
            for at, axis in enumerate(axes)
            if axis and min(f[0] for f in axis) >= first
        }
        contracted = roles.index("d")
        if contracted not in in_features and len(axes[contracted]):
            in_features = {at for at, role in enumerate(roles) if role in "bd" and at}
        in_features.add(contracted)
        kinds: tuple[list[int], ...] = ([], [], [])
        for at, role in enumerate(roles):
            if at:
                kinds[2 if at in in_features else "bp".index(role)].append(at)
        leading, positions, features = kinds
        groups = [*([at] for at in leading), positions, features]
        merged = [
            layout.merged(itertools.chain(*(axes[at] for at in group)))
            for group in groups
        ]
        batch, folded = self._folded()
        before = [folded] if folded else []
        self.axes = (batch, *before, *merged)
        self.become(layout.lengths(self.axes)[1:], node)
        whole = tuple(itertools.chain(*self.axes[: 1 + len(before)]))
        places: list[Axis] = [whole] * len(roles)
        for axis, group in enumerate(groups, 1 + len(before)):
            within = 1
            for at in reversed(group):
                size = math.prod(layout.lengths([axes[at]]))
                places[at] = ((axis, within, size),) if size > 1 else ()
                within *= size
        return places

    def _first_of_features(self) -> int:
        """The last axis, or the first of those that a normalisation of heads has made.

        It takes the features apart, but they stay what keys have for each position.
        """
        for before, link in zip(self.shapes[::-1], self.links[::-1], strict=True):
            if (
                isinstance(link, _spec.Reshape)
                and self.shape[: len(before) - 1] == (before[:-1])
            ):
                return len(before)
            if not isinstance(link, _spec.RMSNorm | _spec.LayerNorm | _spec.Scale):
                break
        return len(self.shape)
