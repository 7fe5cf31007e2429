"""Links that put coordinates elsewhere, leave some out, or repeat them."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Link, Shape, Site
from backmatch_optax.spec.windows import checked_shape


@dataclasses.dataclass(frozen=True, repr=False)
class Reshape(Link):
    """Another shape of the same coordinates, `x.reshape((x.shape[0], *shape))`.

    Nothing is multiplied, so `m_z = 1` and `q` stays. A unit's mean stays one where the
    new feature is made of one old feature; where it is made of several, the difference
    between their means becomes variance.

    Args:
      shape: the new shape without the batch dimension, features last; one entry may be
        -1, for what is left.

    Raises:
      ValueError: where `shape` is not a sequence of positive ints and at most one -1,
        or (at `init`) it does not have as many coordinates as the input.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Reshape((7, 7, 64))
      spec.Reshape((7, 7, 64))
    """

    shape: Sequence[int]

    def validate(self) -> None:
        try:
            shape = tuple(map(operator.index, self.shape))
        except TypeError:
            shape = ()
        if not shape or shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
            raise ValueError(
                f"shape (={self.shape!r}) must be a sequence of positive ints without "
                "the batch dimension, one of which may be -1, such as (7, 7, 64)"
            )
        self._canonical(shape=shape)

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """As declared."""
        del param_shapes
        size, known = math.prod(input_shape), math.prod(n for n in self.shape if n > 0)
        shape = tuple(size // known if n == -1 else n for n in self.shape)
        if math.prod(shape) != size:
            raise ValueError(
                f"shape (={self.shape}) does not have the {size} coordinates of its "
                f"input of shape {input_shape}"
            )
        return shape

    def moments_after(self, here: Site) -> Moments:
        # A new feature stands at every fan_out-th coordinate, and an old one at every
        # fan_in-th: so many old ones are met by one new one.
        met = here.fan_in // math.gcd(here.fan_in, here.fan_out)
        return with_units_mixed(here.moments, met)

    def centres(self, here: Site) -> bool:
        # An old feature is then at all places of some new ones.
        return here.centred and here.fan_out % here.fan_in == 0

    def common_below(self, here: Site) -> Positive | None:
        return here.common if here.fan_in == here.fan_out else None


@dataclasses.dataclass(frozen=True, repr=False)
class Transpose(Link):
    """Axes in another order, as between the layers of an MLP-Mixer.

    Nothing is multiplied, so `m_z = 1` and `q` stays. Where another axis becomes the
    features, the means of the old features become variance.

    Args:
      axes: the old place of each axis, counted without the batch dimension:
        `(1, 0)` is `x.transpose((0, 2, 1))`.

    Raises:
      ValueError: where `axes` is not a permutation, or (at `init`) of another length
        than the input's shape.

    Examples:
      >>> from backmatch_optax import spec
      >>> mixer = spec.Residual(
      ...     [
      ...         spec.LayerNorm("LayerNorm_0"),
      ...         spec.Transpose((1, 0)),
      ...         spec.Dense("token_mixing"),
      ...         spec.Transpose((1, 0)),
      ...     ]
      ... )
      >>> spec.Transpose((1, 0))
      spec.Transpose((1, 0))
    """

    axes: Sequence[int]

    def validate(self) -> None:
        axes = self.axes
        if not isinstance(axes, Sequence) or sorted(axes) != [*range(len(axes))]:
            raise ValueError(
                f"axes (={axes!r}) must be a permutation of 0, 1, 2 and so on, counted "
                "without the batch dimension"
            )
        self._canonical(axes=tuple(axes))

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, in the new order."""
        del param_shapes
        if len(self.axes) != len(input_shape):
            raise ValueError(
                f"axes (={self.axes}) are {len(self.axes)}, but its input has "
                f"{len(input_shape)}"
            )
        return tuple(input_shape[axis] for axis in self.axes)

    @property
    def keeps_features(self) -> bool:
        """Whether only positions change places."""
        return self.axes[-1] == len(self.axes) - 1

    def moments_after(self, here: Site) -> Moments:
        if self.keeps_features:
            return here.moments
        return with_units_mixed(here.moments, here.fan_in)

    def centres(self, here: Site) -> bool:
        return here.centred and self.keeps_features

    def common_below(self, here: Site) -> Positive | None:
        return here.common if self.keeps_features else None


@dataclasses.dataclass(frozen=True, repr=False)
class Slice(Link):
    """A part of the input along one axis: `x[:, 0]`, `x[..., :64]`, `x[:, ::2]`.

    What is left out hands nothing back, so that the mean over all coordinates is the
    share of those which are kept:

        m_z = size_out / size_in,    q stays

    Args:
      index: what of the axis: an int, which takes the axis away, or the arguments of
        Python's `slice`, such as `(0, 64)` or `(None, None, 2)`.
      axis: along which, counted from the end: -1 for the features, -2 for the last
        axis of positions.

    Raises:
      ValueError: where `index` is neither, `axis` is not a negative int, an index is to
        take the features away, or (at `init`) nothing is left.

    Examples:
      >>> from backmatch_optax import spec
      >>> class_token = spec.Slice(0)
      >>> first_half = spec.Slice((0, 64), axis=-1)
      >>> class_token, first_half
      (spec.Slice(0), spec.Slice((0, 64), axis=-1))
    """

    index: int | Sequence[int | None]
    axis: int = dataclasses.field(default=-2, kw_only=True)

    featurewise = True

    def validate(self) -> None:
        index: Any = self.index
        try:
            if isinstance(index, tuple | list):
                entries = [None if n is None else operator.index(n) for n in index]
                slice(*entries).indices(1)
                self._canonical(index=tuple(entries))
            else:
                self._canonical(index=operator.index(index))
        except (TypeError, ValueError):
            raise ValueError(
                f"index (={index!r}) must be an int or the arguments of a slice, such "
                "as (0, 64)"
            ) from None
        if not isinstance(self.axis, int) or self.axis >= 0:
            raise ValueError(f"axis (={self.axis!r}) must be a negative int")
        if self.axis == -1 and isinstance(self.index, int):
            raise ValueError(
                f"index (={index!r}) takes the axis away, but axis -1 holds the "
                f"features; ({self.index}, {self.index + 1}) keeps it"
            )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, with less of the axis or without it."""
        del param_shapes
        if -self.axis > len(input_shape):
            raise ValueError(
                f"axis (={self.axis}) does not exist in its input of shape "
                f"{input_shape}"
            )
        before, after = input_shape[: self.axis], input_shape[self.axis :][1:]
        places, index = range(input_shape[self.axis]), self.index
        if isinstance(index, int):
            if index not in range(-len(places), len(places)):
                raise ValueError(
                    f"index (={index}) is outside of axis {self.axis} of its input of "
                    f"shape {input_shape}"
                )
            return (*before, *after)
        kept = len(places[slice(*index)])
        if not kept:
            raise ValueError(
                f"index (={index}) leaves nothing of axis {self.axis} of its input of "
                f"shape {input_shape}"
            )
        return (*before, kept, *after)

    def m_z(self, here: Site) -> Positive:
        return number(here.size_out / here.size_in)

    def common_below(self, here: Site) -> Positive | None:
        if here.common is None or self.axis == -1:
            return here.common
        return here.common * (here.size_out / here.size_in)


METHODS = ("nearest", "linear", "bilinear")


@dataclasses.dataclass(frozen=True, repr=False)
class Resize(Link):
    """Positions interpolated to another number, `jax.image.resize`: upsampling.

    The map of each axis is a matrix `A` of shape (out, in), and `J^T J` is that of
    their product:

        m_z = prod_axes ||A||_F^2 / in

    To the nearest, each output is one input: `m_z = size_out / size_in`, and `q` stays.
    Linear interpolation averages, as `AvgPool` does: with the papers' gains `q` stays;
    with mean-field gains the variance, of positions that are independent, is multiplied
    by `prod_axes ||A||_F^2 / out`.

    Args:
      shape: the positions of the output, one number for each of the input's axes
        between the batch and the features.
      method: `"nearest"`, or `"linear"` (also called `"bilinear"`); downsampling is
        antialiased, as by default in JAX.

    Raises:
      ValueError: where `shape` is not a sequence of positive ints, or `method` is
        another; or (at `init`) where the input has more or fewer axes of positions.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Resize((16, 16)), spec.Resize((16, 16), method="bilinear")
      (spec.Resize((16, 16)), spec.Resize((16, 16), method='bilinear'))
    """

    shape: Sequence[int]
    method: str = dataclasses.field(default="nearest", kw_only=True)

    featurewise = True
    approximate = (
        "neighbours become alike, and a convolution above adds them up; the rule takes "
        "positions for unrelated"
    )

    def validate(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method (={self.method!r}) must be one of "
                f"{', '.join(map(repr, METHODS))}"
            )
        self._canonical(shape=checked_shape("shape", self.shape))

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The new positions, the input's features."""
        del param_shapes
        if len(self.shape) != len(input_shape) - 1:
            raise ValueError(
                f"shape (={self.shape}) has {len(self.shape)} axes of positions, but "
                f"its input has {len(input_shape) - 1}"
            )
        return (*self.shape, input_shape[-1])

    def why_approximate(self, here: Site) -> str:
        return "" if here.positions_in == 1 else self.approximate

    def moments_after(self, here: Site) -> Moments:
        if here.mean_field and here.positions_in == 1:  # the same everywhere
            return dataclasses.replace(here.moments, along=here.moments.variance)
        if not here.mean_field or self.method == "nearest":
            return here.moments
        return here.moments.shrunk(self._squares(here) / here.positions_out)

    def m_z(self, here: Site) -> Positive:
        if self.method == "nearest" or here.positions_in == 1:
            return here.added(here.positions_out / here.positions_in)
        return number(self._squares(here) / here.positions_in)

    def _squares(self, here: Site) -> float:
        """`||A||_F^2`, the product over the axes."""
        if self.method == "nearest":
            return here.positions_out
        sizes = zip(here.input_shape[:-1], here.output_shape[:-1], strict=True)
        return math.prod(_linear_squares(before, after) for before, after in sizes)


@functools.cache
def _linear_squares(before: int, after: int) -> float:
    """`||A||_F^2` of the linear interpolation along one axis, as JAX has it."""
    step = before / after
    places = (np.arange(after)[:, None] + 0.5) * step - 0.5
    distances = np.abs(places - np.arange(before)) / max(step, 1.0)
    weights = np.maximum(1.0 - distances, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return float((weights**2).sum())


def with_units_mixed(before: Moments, met: int) -> Moments:
    """The moments when every new unit is made of so many old ones.

    Their means are unrelated, so that the square of the mean of all is a part of it.
    """
    if met == 1:
        return before
    if before.spread is None:
        return dataclasses.replace(before, along=None)
    lost = before.spread * (1.0 - 1.0 / met)
    return Moments(before.variance + lost, before.spread / met, before.offset)
