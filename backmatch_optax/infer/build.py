"""Steps become links, checked one by one against the parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.layout import Axis
from backmatch_optax.infer.signal import NO_FEATURES, Signal
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


class Links(Signal):
    """Links one after the other.

    Attributes:
      context: what they share with all others.
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
        super().__init__(context.main, shape, axes, leading=leading, fixed=fixed)

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
        size = math.prod(layout.lengths(self.axes))
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
        inside = [_begins(links.main, links.start), *links.links]
        self._put(_spec.Memory(inside, node.path), links.shape)

    # --- Links -------------------------------------------------------------------

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
        shapes, new = {}, self._first_or_tied(link, step)
        if path is not None:
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
            raise Unknown(step.node, f"{step.node.op} {NO_FEATURES}")
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
        folded = self._unfold(node)
        if step.heads is None and source.op != "inputs" and not folded:
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
                # The one with more links is the branch, but what comes again is last.
                if not step.shared():
                    sides.sort(key=lambda side: -_count(side.links))
                link: Any = _spec.Residual(*(side.links for side in sides))
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
            # Numbers that are added to logits have an arm, but no signal to come from.
            shapes = zip(link.arms, (side.shape for side in sides), strict=False)
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
        recalls = begin.op == "memory" and begin is not step.source
        if recalls:
            shape, axes = begin.shape[1:], None
        if arm and arm[0].begins and not leading:  # made of the signal, nothing learned
            leading = other = True
            shape, axes = arm[0].node.shape[1:], None
        reads = leading and not begin.learned
        side = Links(self.context, shape, axes, leading=reads, fixed=not other)
        if recalls:
            side._put(_spec.Recall(shape, begin.path), shape)
        for inner in arm:
            side.add(inner)
        if side.padding:
            raise Unknown(step.node, "padding is followed by no convolution")
        side.leading = False
        if other:
            if begin.learned:
                self._is_used(begin.path, Step(begin, begin))  # or raises
            side.links.insert(0, _begins(begin, side.start))
            side.shapes.insert(0, side.start)
        return side

    def _gated(self, sides: list[Links], step: Step) -> list[Links]:
        """The two arms of a product, the gate last: what is smaller, or activated."""
        for side in sides:
            # What is the same all along an axis has length 1 there.
            side.axes = tuple(
                () if all(axis < 0 for axis, _, _ in found) else found
                for found in side.axes
            )
            target = layout.lengths(side.axes)[1:]
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
        bias = [self._first_or_tied(link, step) for link in heads.bias]
        link = _spec.DotProductAttention(
            query.links,
            key.links,
            value.links,
            causal=heads.causal,
            attended=heads.attended,
            bias=bias,
        )
        axes = tuple(
            tuple(
                (axis, outer * within, size)
                for at, within, size in found
                for axis, outer, size in (
                    # The batch, and what is folded into it, as a whole.
                    [(a, o, size) for a, o, _ in places[at]] if at else places[at]
                )
            )
            for found in heads.out
        )
        return link, axes

    def _first_or_tied(self, link: Any, step: Step) -> _spec.Link:
        """The link, inside `Tied` where another has declared its parameters."""
        path = getattr(link, "path", None)
        return _spec.Tied([link]) if path and self._is_used(path, step) else link

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


def _begins(leaf: Node, shape: Shape) -> _spec.Link:
    """What an arm with an input of its own begins with."""
    return _spec.Queries(shape, leaf.path) if leaf.learned else _spec.Input(shape)


def _count(links: Sequence[_spec.Link]) -> int:
    """How many links there are, those inside others included."""
    return sum(1 + sum(map(_count, link.arms.values())) for link in links)
