"""Steps become links, checked one by one against the parameters.

The traced signal may have its axes in another order, or divided in other ways, than the
chain: a Dense layer on 64 tokens is one on 8 x 8 positions, and heads side by side are
features. Where the axes of the chain are in those of the trace is followed. A `Reshape`
or a `Transpose` is put in where a link needs another shape, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.layout import Axis, Factor
from backmatch_optax.infer.step import Heads, Step, Unknown
from backmatch_optax.parameters import join, places
from backmatch_optax.spec.link import Shape

Measure = Callable[[_spec.Block, Step], _spec.Block]

# What acts on the features of each position, whatever the positions are. All but the
# last treat examples and positions in the same way.
_FEATUREWISE = (
    _spec.Dense,
    _spec.DenseGeneral,
    _spec.Unembed,
    _spec.LayerNorm,
    _spec.RMSNorm,
    _spec.BatchNorm,
    _spec.GlobalAvgPool,
    _spec.LogSoftmax,
    _spec.Softmax,
)
_BY_EXAMPLE = _spec.GlobalAvgPool
# What leaves it open whether a signal has a mean: the link before decides.
_KEEPS_MEAN = (
    _spec.Bias,
    _spec.Reshape,
    _spec.Resize,
    _spec.Scale,
    _spec.Slice,
    _spec.Transpose,
)
_NO_FEATURES = (
    "puts out one number for each example, without an axis for it. Keep the axis, as "
    "keepdims=True does, or [:, :1] in the place of [:, 0]"
)


@dataclasses.dataclass
class Context:
    """What all links of a model share.

    Attributes:
      params: the shapes of all parameters, by path.
      measure: fills in the numbers that a block lacks.
      main: the input that is the chain's own.
      used: by path, the node that uses a parameter.
      kept: by name, the links that lead to what a `Memory` keeps.
    """

    params: Mapping[str, Shape]
    measure: Measure
    main: Node
    used: dict[str, Node] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Sequence[_spec.Link]] = dataclasses.field(default_factory=dict)


class Links:
    """Links one after the other.

    Attributes:
      start: the shape that they begin with, without the batch.
      shape: the shape that they come to.
      axes: where the axes of that shape, after the batch, are in the traced one.
      leading: whether the first of them reads an input of the model. What only scales
        or reshapes it before is left out.
      fixed: whether the shape of that input must stay.
      links: the links.
    """

    def __init__(
        self,
        context: Context,
        shape: Shape,
        axes: Sequence[Axis] | None = None,
        *,
        leading: bool = False,
        fixed: bool = False,
    ):
        self.context = context
        self.start = self.shape = shape
        self.leading, self.fixed = leading, fixed
        self.links: list[_spec.Link] = []
        self.shapes: list[Shape] = []  # at the input of each link
        self.axes = self._plain() if axes is None else tuple(axes)
        self.padding: tuple[Any, ...] = ()  # that a convolution will take
        self.mode = ""

    def add(self, step: Step) -> None:
        """Adds what a step says."""
        node = step.node
        if step.begins:
            if not self.leading:
                raise Unknown(node, f"{node.op} combines the input with an array")
            if node.shape != step.source.shape:  # features, made of a number
                if self.fixed:
                    raise Unknown(node, f"{node.op} makes features of the first input")
                self.start = self.shape = node.shape[1:]
                self.axes = self._plain()
                for link in step.links:
                    self._put(link, self.shape)
            return
        if self.padding and step.window is None and not step.padding:
            found = "several signals" if step.ends else "no convolution"
            raise Unknown(node, f"padding is followed by {found}")
        if step.moves:
            self._move(step)
        elif step.padding:
            self._pad(step)
        elif step.ends:
            self._join(step)
        elif step.bias and self._has_bias(step):
            pass
        elif step.resized:
            self._resize(step, *step.resized)
        elif step.taken:
            self._slice(step, *step.taken)
            if len(node.shape) < len(self.axes):  # of one entry, whose axis is gone
                axis = step.taken[0]
                self.axes = self.axes[:axis] + self.axes[axis + 1 :]
        else:
            self._append_all(step)
        size = math.prod(_lengths(self.axes))
        if not step.padding and node.op != "outputs" and size != math.prod(node.shape):
            raise Unknown(
                node,
                f"{node.op} gives shape {node.shape}, but {self.links[-1]} "
                f"{self.shape} without the batch",
            )

    def finish(self, end: Node) -> None:
        """Checks that nothing is left over."""
        if self._repeats():
            self.become(end.shape[1:], end)
        if self.padding:
            raise Unknown(end, "padding is followed by no convolution")

    def keep(self, node: Node, links: Links) -> None:
        """Adds other links in which what these put out is recalled.

        Args:
          node: what stands for it there.
          links: those links, which begin at another input.
        """
        self.become(node.shape[1:], node)
        inside = [_spec.Input(links.start), *links.links]
        self._put(_spec.Memory(inside, node.path), links.shape)

    # --- Shapes ------------------------------------------------------------------

    def _repeats(self) -> bool:
        """Whether the traced signal is repeated along some axis."""
        return any(axis < 0 for axis, _, _ in itertools.chain(*self.axes))

    def _plain(self) -> tuple[Axis, ...]:
        whole = (*self.context.main.shape[:1], *self.shape)
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
        factors = _merged(itertools.chain(*self.axes[1:]))
        if self.axes[0] != self._plain()[0]:
            raise Unknown(node, f"{node.op} follows on a changed batch dimension")
        if any(axis < 0 for axis, _, _ in factors):
            self._upsample(target, node)
            return
        pieces = sorted(factors, key=lambda factor: (factor[0], -factor[1]))
        order = [pieces.index(factor) for factor in factors]
        if not target:
            raise Unknown(node, f"{node.op} {_NO_FEATURES}")
        if self.fixed:
            self._check_features(node)
        if len(target) == 1 and self.shape:  # the same in any order
            self._put(_spec.Flatten(), target)
        elif self.leading and not self.fixed and not self.links:
            self.start = self.shape = target  # the chain begins behind
        else:
            if order != sorted(order):
                split = _lengths([(piece,) for piece in pieces])
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
        self.become(_lengths(kept)[1:], node)
        self._put(_spec.Resize(target[:-1]), target)
        self.axes = self._plain()

    def _move(self, step: Step) -> None:
        node, batch = step.node, self.context.main.shape[:1]
        try:
            self.axes = layout.moved(node, self.axes)
        except layout.Unmatched:
            self.become(step.source.shape[1:], node)
            if node.shape[:1] != batch:
                raise Unknown(node, f"{node.op} changes the batch dimension") from None
            if not node.shape[1:]:
                raise Unknown(node, f"{node.op} {_NO_FEATURES}") from None
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
        features = _merged(itertools.chain(*self.axes[len(shape) - count :]))
        plain = features == (((len(self.shape), 1, last),) if last > 1 else ())
        if not plain or self._repeats():
            positions = shape[1 : len(shape) - count]
            self.become((*positions, math.prod(shape[-count:])), node)
            self.axes = self._divided(node, shape)

    def _check_features(self, node: Node) -> None:
        if not self.shape:
            main = self.context.main
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
            size = math.prod(_lengths(self._plain()))
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

    # --- Links -------------------------------------------------------------------

    def _put(self, link: _spec.Link, after: Shape) -> None:
        self.links.append(link)
        self.shapes.append(self.shape)
        self.shape = after

    def _append_all(self, step: Step) -> None:
        """Adds the links of a step."""
        node, source, first = step.node, step.source.shape, step.links[0]
        if step.order:
            order = self._in_order(step)
            source = tuple(source[axis] for axis in order)
            self.axes = tuple(self.axes[axis] for axis in order)
        if step.window:
            self._slide(step, step.window)
        elif isinstance(first, _FEATUREWISE):
            self._features(node, source, step.contracted)
            if isinstance(first, _BY_EXAMPLE) and self.axes[0] != self._plain()[0]:
                raise Unknown(node, f"{node.op} follows on a changed batch dimension")
        elif not step.elementwise and step.source.op != "inputs":
            self.become(source[1:], node)
        positions = self.axes[: len(source) - step.contracted]
        for link in step.links[bool(step.window) :]:
            self._append(link, step)
        if step.elementwise:
            return
        if step.window and len(node.shape) == 2 < len(self.shape) + 1:
            self._append(_spec.Flatten(), step)  # a maximum over all positions
        if isinstance(first, _FEATUREWISE) and not isinstance(first, _BY_EXAMPLE):
            features = self._plain()[-1]
            shape = step.sizes or node.shape[len(positions) :]
            axes = (*positions, *layout.reshaped(node, [features], shape))
            placed = step.placed or range(len(axes))
            self.axes = tuple(axes[axis] for axis in placed)
        else:
            self.axes = self._divided(node, node.shape)

    def _slide(self, step: Step, window: Any) -> None:
        """Adds a link with a window, with its padding by name."""
        actual = step.source.shape[1:]
        if self.padding:
            pads = (low + high for low, high in self.padding)
            sizes = zip(actual[:-1], pads, strict=True)
            actual = (*(size - pad for size, pad in sizes), actual[-1])
        self._for_window(actual, step)
        before, mode, self.padding, self.mode = self.padding, self.mode, (), ""
        try:
            link: Any = step.links[0]
            name = window.name(link, self.shape[:-1], before, mode)
            link = dataclasses.replace(link, padding=name)
        except ValueError as error:
            raise Unknown(step.node, f"{step.node.op} {error}") from None
        self._append(link, step)

    def _append(self, link: Any, step: Step) -> None:
        """Adds one link."""
        if isinstance(link, _spec.Scale):
            self._scale(link.factor, step)
            return
        if isinstance(link, _spec.Shift):
            if self.leading and not self.links:
                return  # it prepares the input, too
            self._check_mean(step, "adds a constant to")
        if link == _spec.Activation("exp"):
            self._check_mean(step, "is the exponential of")
        if isinstance(link, _spec.Block):
            self._add_block(link, step)
            return
        if not isinstance(link, _spec.Embed):
            self._check_features(step.node)
        known = self.context.params
        if getattr(link, "path", None) == "" and not {*known} <= {*link.roles}:
            link = dataclasses.replace(link, path=link.roles[0])  # beside other layers
        path = getattr(link, "path", None)
        shapes, new = {}, link
        if path is not None:
            if self._is_used(path, step):
                new = _spec.Tied([link])
            at = places(link, path in known)
            shapes = {role: known[p] for role, p in at.items() if p in known}
        try:
            after = link.shape_after(self.shape, shapes)
        except (ValueError, KeyError) as error:
            raise Unknown(step.node, f"{link}: {error}") from None
        self._put(new, after)
        self._make_attention()

    def _add_block(self, block: _spec.Block, step: Step) -> None:
        batch, *shape = step.node.shape or (0,)
        if batch != step.source.shape[0]:
            raise Unknown(step.node, f"{step.node.op} changes the batch dimension")
        shape = tuple(shape)
        if not shape:
            raise Unknown(step.node, f"{step.node.op} {_NO_FEATURES}")
        if block.output_shape is None and shape != self.shape:
            block = dataclasses.replace(block, output_shape=shape)
        if block.output_shape not in (None, shape):
            raise Unknown(step.node, f"{block} must have output_shape={shape}")
        if block.path is not None and self._is_used(block.path, step):
            raise Unknown(step.node, f"{block} would be used more than once")
        self._put(self.context.measure(block, step), shape)

    def _is_used(self, path: str, step: Step) -> bool:
        """Whether a parameter is used a second time."""
        used = self.context.used
        if path not in used:
            used[path] = step.node
            return step.again
        # Arms that begin with a Recall may have their first links in common.
        if used[path] is step.node and not (step.again or step.node.recalls):
            raise Unknown(
                step.node,
                f"what {path!r} puts out goes several ways, which are no arms side by "
                "side that meet again",
            )
        return True

    def _scale(self, factor: float, step: Step) -> None:
        """Adds a factor to the one that is there; none at all is left out."""
        if self.leading and not self.links:
            return  # it prepares the input, which counts as whitened behind
        factor *= self._pop_scale()
        # A mean's count is rounded in a dtype of 8 or 11 bits.
        tolerance = 1e-5 if jnp.dtype(step.node.dtype).itemsize > 2 else 4e-3
        if abs(factor - 1) > tolerance:
            # The shortest number that is the same in float32, as a person writes it.
            self._put(_spec.Scale(float(str(np.float32(factor)))), self.shape)

    def _check_mean(self, step: Step, what: str) -> None:
        """Refuses a signal that may have a mean, whose sign is not known."""
        centred = _spec.BatchNorm | _spec.LayerNorm | _spec.RMSNorm | _spec.GroupNorm
        last = self._maker(self.links)
        learned = {"kernel", "embedding"} & {*getattr(last, "roles", ())}
        if not isinstance(last, centred) and not learned:
            raise Unknown(
                step.node,
                f"{step.node.op} {what} what may have a mean of its own, "
                "since neither a kernel nor a normalisation put it out",
            )

    def _maker(self, links: Sequence[_spec.Link]) -> _spec.Link | None:
        """The last link that decides whether a signal has a mean."""
        for link in reversed(links):
            own = link.links[-1] if isinstance(link, _spec.Tied) else link
            if isinstance(own, _spec.Recall):
                return self._maker(self.context.kept[own.name])
            if not isinstance(own, _KEEPS_MEAN):
                return own
        return None

    def _pop_scale(self) -> float:
        last = self.links[-1] if self.links else None
        if not isinstance(last, _spec.Scale):
            return 1.0
        del self.links[-1], self.shapes[-1]
        return last.factor

    def _has_bias(self, step: Step) -> bool:
        """Whether a parameter is the bias of the layer before."""
        path = step.bias.rpartition("/")[0]
        last: Any = self.links[-1] if self.links else None
        tied = isinstance(last, _spec.Tied)
        layer: Any = last.links[-1] if tied else last
        if isinstance(layer, _spec.Attention):
            return step.bias == join(layer.path, "out/bias")
        if "bias" not in getattr(layer, "roles", ()):
            return False
        if layer.path is None:  # of a normalisation without a scale
            layer = dataclasses.replace(layer, path=path)
            tied = self._is_used(path, step)
            self.links[-1] = _spec.Tied([layer]) if tied else layer
        return layer.path == path

    # --- Several signals ---------------------------------------------------------

    def _join(self, step: Step) -> None:
        """Adds the link in which several signals meet."""
        node, source = step.node, step.source
        if step.joins == "repeat":
            self._repeat(step)
            return
        if step.heads is None and source.op != "inputs":
            self.become(source.shape[1:], node)
        sides = [
            self._side(arm, end, step)
            for arm, end in zip(step.arms, step.ends, strict=True)
        ]
        axes = None
        match step.joins:
            case "sum":
                for side, end in zip(sides, step.ends, strict=True):
                    side._repeat_to(end.shape, node)
                if len({(side.shape, side.axes) for side in sides}) > 1:
                    for side in sides:
                        side.become(node.shape[1:], node)
                axes = sides[0].axes
                # The one with more links is the branch.
                longer = sorted(sides, key=lambda side: -_count(side.links))
                link: Any = _spec.Residual(*(side.links for side in longer))
            case "product":
                sides = self._gated(sides, step)
                link = _spec.Gate(*(side.links for side in sides))
            case "concatenate":
                for side, end in zip(sides, step.ends, strict=True):
                    side.become(end.shape[1:], node)
                axis = int(node.options["dimension"]) - len(node.shape)
                branches = [side.links for side in sides]
                link = _spec.Concatenate(branches, axis=axis)
            case "attention":
                assert step.heads is not None
                link, axes = self._attend(step, step.heads, *sides)
            case _:
                for side, end in zip(sides, step.ends, strict=True):
                    side.finish(end)
                link = _spec.Outputs([side.links for side in sides])
        try:
            shapes = zip(link.arms, (side.shape for side in sides), strict=True)
            after = link.joined_shape(dict(shapes))
        except ValueError as error:
            raise Unknown(node, f"{type(link).__name__}: {error}") from None
        self._put(link, after)
        self.axes = self._divided(node, node.shape) if axes is None else axes

    def _repeat(self, step: Step) -> None:
        """Adds layers with stacked parameters."""
        node, (end,), (arm,) = step.node, step.ends, step.arms
        self.become(step.source.shape[1:], node)
        params = {path: shape[1:] for path, shape in self.context.params.items()}
        layer = Links(dataclasses.replace(self.context, params=params), self.shape)
        for inner in arm:
            layer.add(inner)
        if layer.padding:
            raise Unknown(node, "padding is followed by no convolution")
        layer.become(end.shape[1:], node)  # as the next layer takes it
        try:
            link = _spec.Repeat(layer.links, node.options["length"])
        except ValueError as error:
            raise Unknown(node, str(error)) from None
        self._put(link, self.shape)

    def _side(self, arm: Sequence[Step], end: Node, step: Step) -> Links:
        """The links of one arm; the first is `Input` where it has its own input."""
        begin = arm[0].source if arm else end
        leading = begin.op == "input" and step.source.op == "inputs"
        other = leading and begin is not self.context.main
        shape = begin.shape[1:] if other else self.shape
        axes = self.axes if step.source.op != "inputs" else None
        if other and not shape:  # an integer for each example, or a single feature
            integer = jnp.issubdtype(begin.dtype, jnp.integer)
            shape, axes = () if integer else (1,), self._plain()[:1]
        if begin.op == "memory":
            shape, axes = begin.shape[1:], None
        side = Links(self.context, shape, axes, leading=leading, fixed=not other)
        if begin.op == "memory":
            side._put(_spec.Recall(shape, begin.path), shape)
        for inner in arm:
            side.add(inner)
        if side.padding:
            raise Unknown(step.node, "padding is followed by no convolution")
        side.leading = False
        if other:
            side.links.insert(0, _spec.Input(side.start))
            side.shapes.insert(0, side.start)
        return side

    def _repeat_to(self, shape: Shape, node: Node) -> None:
        """Repeats the signal, traced with a shape, along the axes of length 1."""
        sizes = zip(self.axes, shape, node.shape, strict=True)
        self.axes = tuple(
            layout.repeated(size) if of < size else axis for axis, of, size in sizes
        )

    def _gated(self, sides: list[Links], step: Step) -> list[Links]:
        """The two arms of a product, the gate last: what is smaller, or activated."""
        for side in sides:
            # What is the same all along an axis has length 1 there.
            side.axes = tuple(
                () if all(axis < 0 for axis, _, _ in found) else found
                for found in side.axes
            )
            target = _lengths(side.axes)[1:]
            bare = target
            while bare[:1] == (1,) and len(bare) > len(side.shape):
                bare = bare[1:]
            axes = [[axis for axis in a if axis] for a in (side.axes, side._plain())]
            if side.shape != bare or axes[0] != axes[1]:
                side.become(target, step.node)
        return sorted(
            sides,
            key=lambda side: (
                -math.prod(side.shape),
                bool(side.links) and isinstance(side.links[-1], _spec.Activation),
            ),
        )

    def _attend(
        self, step: Step, heads: Heads, query: Links, key: Links, value: Links
    ) -> tuple[_spec.Link, tuple[Axis, ...]]:
        """Attention between three arms, whose heads become features."""
        node = step.node
        factor = heads.factor * query._pop_scale() * key._pop_scale()
        places = query._heads_together(heads.query, node)
        key._heads_together(heads.key, node)
        value._heads_together(heads.value, node)
        length = step.ends[0].shape[heads.query.index("d")]
        if any(isinstance(link, _spec.Recall) for link in key.links[:1]):
            factor *= self._hand_over(query)
        query._scale(factor * math.sqrt(length), step)
        link = _spec.DotProductAttention(
            query.links,
            key.links,
            value.links,
            causal=heads.causal,
            attended=heads.attended,
        )
        axes = tuple(
            tuple(
                (axis, outer * within, size)
                for at, within, size in found
                for axis, outer, _ in places[at]
            )
            for found in heads.out
        )
        return link, axes

    def _hand_over(self, query: Links) -> float:
        """Gives an arm the last kernel: of the arms it alone begins with the signal.

        Returns:
          A factor that stood behind it.
        """
        factor = self._pop_scale()
        last = self.links[-1] if self.links else None
        if not query.links and isinstance(last, _spec.Dense | _spec.DenseGeneral):
            query.links.append(self.links.pop())
            self.shape = self.shapes.pop()
            query.shapes.append(self.shape)
            query.start = self.shape
        elif factor != 1.0:
            self._put(_spec.Scale(factor), self.shape)
            factor = 1.0
        return factor

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
        merged = [itertools.chain(*(axes[at] for at in group)) for group in groups]
        self.axes = (axes[0], *map(tuple, map(_merged, merged)))
        self.become(_lengths(self.axes)[1:], node)
        places: list[Axis] = [self.axes[0]] * len(roles)
        for axis, group in enumerate(groups, 1):
            within = 1
            for at in reversed(group):
                size = math.prod(_lengths([axes[at]]))
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

    def _make_attention(self) -> None:
        """Attention with its four kernels where these lie side by side."""
        before, last = self.links[-2:] if len(self.links) > 1 else (None, None)
        if not isinstance(before, _spec.DotProductAttention):
            return
        path = getattr(last, "path", "").rpartition("/")
        if not isinstance(last, _spec.DenseGeneral) or path[2] != "out":
            return
        begin = before.key[0] if before.key else None
        memory: Any = begin.shape if isinstance(begin, _spec.Input) else None
        memory = begin if isinstance(begin, _spec.Recall) else memory
        options: Any = {"causal": before.causal, "attended": before.attended}
        whole = _spec.Attention(path[0], memory=memory, **options)
        if whole.arms["attention"] == (before, last):
            del self.links[-1], self.shapes[-1]
            self.links[-1] = whole


def _merged(factors: Iterable[Factor]) -> Axis:
    """Factors of which those that follow one another in one axis are one."""
    found: list[Factor] = []
    for axis, within, size in factors:
        if found and axis >= 0 and found[-1][:2] == (axis, within * size):
            size *= found.pop()[2]
        found.append((axis, within, size))
    return tuple(found)


def _lengths(axes: Sequence[Axis]) -> Shape:
    return tuple(math.prod(size for _, _, size in axis) for axis in axes)


def _count(links: Sequence[_spec.Link]) -> int:
    """How many links there are, those inside others included."""
    return sum(1 + sum(map(_count, link.arms.values())) for link in links)
