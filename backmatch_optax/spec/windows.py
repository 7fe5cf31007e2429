"""The static geometry of a sliding window: convolutions and pooling."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from backmatch_optax.spec.link import Link, Shape

# As users may write them; an int stands for the same in every dimension, as in Flax.
PerDimension = int | Sequence[int]
Padding = str | int | Sequence[int | Sequence[int]]


class Window(NamedTuple):
    """A window that slides over positions; every field has an entry a dimension."""

    sizes: Shape  # of its input, without padding
    taps: Shape
    strides: Shape
    dilation: Shape
    pads: Sequence[tuple[int, int]]

    def output_sizes(self) -> Shape:
        """At how many positions the window fits; `ValueError` where at none."""
        padded = tuple(
            size + low + high
            for size, (low, high) in zip(self.sizes, self.pads, strict=True)
        )
        reach = extents(self.taps, self.dilation)
        if any(map(operator.gt, reach, padded)):
            raise ValueError(
                f"the window {shape_text(reach)} is larger than its input "
                f"{shape_text(padded)} (dilation and padding counted)"
            )
        return tuple(
            (size - extent) // stride + 1
            for size, extent, stride in zip(padded, reach, self.strides, strict=True)
        )

    def covering(self) -> tuple[float, float]:
        """In how many windows an input position is: the mean, and its mean square.

        Returns:
          The mean over positions, and the mean square over the mean.
        """
        mean = square = 1.0
        for size, taps, stride, step, (low, _), count in zip(
            *self, self.output_sizes(), strict=True
        ):
            places = np.add.outer(
                np.arange(count) * stride, np.arange(taps) * step - low
            )
            times = np.bincount(places[(places >= 0) & (places < size)], minlength=size)
            mean *= times.mean()
            square *= (times**2).sum() / times.sum()
        return float(mean), float(square)

    def winning(self) -> float:
        """How many windows have the maximum of one window for theirs, itself included.

        The mean, of independent values: two windows have one maximum where the largest
        of both is in both.
        """
        shared = []  # along each dimension, by the windows that there are
        for taps, stride, count in zip(
            self.taps, self.strides, self.output_sizes(), strict=True
        ):
            reach = min((taps - 1) // stride, count - 1)
            moves = range(-reach, reach + 1)
            shared.append([taps - abs(move) * stride for move in moves])
        size = math.prod(self.taps)
        both = map(math.prod, itertools.product(*shared))
        return sum(n / (2 * size - n) for n in both)

    def inside(self, outputs: Shape) -> tuple[float, float]:
        """How much of the input the taps see, where they meet zeros on the padding.

        Returns:
          At how many of the output positions a tap meets the input, the mean over taps;
          and of a constant input's square, as the taps hand it on, the share that is
          the same at all positions. Without padding, all of both.
        """
        uses = kept = 1.0
        for size, taps, stride, step, (low, _), count in zip(
            *self, outputs, strict=True
        ):
            inside = [
                sum(0 <= at * stride + tap * step - low < size for at in range(count))
                for tap in range(taps)
            ]
            uses *= sum(inside) / taps
            kept *= sum(n**2 for n in inside) / (count * sum(inside))
        return uses, kept


def extents(taps: Shape, dilation: Shape) -> Shape:
    """How many positions a window reaches over."""
    return tuple((n - 1) * step + 1 for n, step in zip(taps, dilation, strict=True))


def per_dimension(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One entry for each of `rank` spatial dimensions; an int stands for all."""
    if isinstance(value, int):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(
            f"{name} (={value!r}) has {len(value)} entries, "
            f"but there are {rank} spatial dimensions"
        )
    return value


@dataclasses.dataclass(frozen=True, repr=False)
class Windowed(Link):
    """What links with a window share: arguments for each spatial dimension."""

    strides: PerDimension | None = dataclasses.field(default=None, kw_only=True)
    padding: Padding = dataclasses.field(default="VALID", kw_only=True)

    paddings: ClassVar[Sequence[str]]  # the names that a padding may have

    def validate(self) -> None:
        if self.strides is not None:
            self._canonical(strides=checked_counts("strides", self.strides))
        self._canonical(padding=_checked_padding(self.padding, self.paddings))

    def window(self, sizes: Shape, taps: Shape, dilation: PerDimension = 1) -> Window:
        """The window with these taps over an input of these sizes."""
        rank = len(sizes)
        strides = per_dimension("strides", self.strides or 1, rank)
        steps = per_dimension("kernel_dilation", dilation, rank)
        reach = extents(taps, steps)
        if self.padding in ("CIRCULAR", "REFLECT"):
            pads = [((extent - 1) // 2, extent // 2) for extent in reach]
        elif self.padding == "CAUSAL":
            if rank != 1:
                raise ValueError("padding 'CAUSAL' is for one spatial dimension alone")
            pads = [(reach[0] - 1, 0)]
        elif isinstance(self.padding, str):
            pads = jax.lax.padtype_to_pads(sizes, reach, strides, self.padding)
        else:
            pads = self.pairs(rank)
        return Window(sizes, taps, strides, steps, pads)

    def pairs(self, rank: int) -> list[tuple[int, int]]:
        """An explicit padding as (low, high) pairs."""
        entries = per_dimension("padding", self.padding, rank)
        return [(pad, pad) if isinstance(pad, int) else pad for pad in entries]


def checked_counts(
    name: str,
    value: Any,
    wanted: str = "a positive int or a sequence of positive ints",
) -> int | Shape:
    """A positive int or a tuple of them, as written but hashable; or `ValueError`."""
    try:
        one = not isinstance(value, Iterable)
        counts = tuple(map(operator.index, (value,) if one else value))
        if counts and min(counts) > 0:
            return counts[0] if one else counts
    except TypeError:
        pass
    raise ValueError(f"{name} (={value!r}) must be {wanted}")


def checked_shape(
    name: str,
    value: Any,
    such_as: str = "without the batch dimension and with the features last, such as "
    "(32, 32, 3)",
) -> Shape:
    """A shape as a tuple of positive ints, or `ValueError`."""
    wanted = f"a sequence of positive ints {such_as}"
    counts = checked_counts(name, value, wanted)
    if isinstance(counts, int):
        raise ValueError(f"{name} (={value!r}) must be {wanted}")
    return counts


def _checked_padding(value: Any, names: Sequence[str]) -> Padding:
    """A name, an int, or a tuple of ints and pairs; or `ValueError`."""
    if isinstance(value, str) and value.upper() in names:
        return value.upper()  # JAX takes both
    try:
        one = not isinstance(value, Iterable)
        pads: Any = tuple(
            tuple(map(operator.index, pad))
            if isinstance(pad, Iterable)
            else operator.index(pad)
            for pad in ((value,) if one else value)
        )
        pairs = [(pad, pad) if isinstance(pad, int) else pad for pad in pads]
        if pairs and all(len(pair) == 2 and min(pair) >= 0 for pair in pairs):
            return pads[0] if one else pads
    except TypeError:
        pass
    raise ValueError(
        f"padding (={value!r}) must be one of {', '.join(map(repr, names))}, an int, "
        "or a (low, high) pair of ints for each spatial dimension, none negative"
    )


def shape_text(shape: Sequence[int]) -> str:
    """`(8, 8, 64)` as `8*8*64`."""
    return "*".join(map(str, shape)) or "1"
