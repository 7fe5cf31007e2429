"""Links that move or pool positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from backmatch_optax.activations import after_max_pool
from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Link, Shape, Site
from backmatch_optax.spec.windows import Window, Windowed, checked_shape, per_dimension


@dataclasses.dataclass(frozen=True, repr=False)
class _Pool(Windowed):
    """What MaxPool and AvgPool share: a window that slides over the positions."""

    window_shape: Sequence[int]

    featurewise = True
    paddings = ("VALID", "SAME", "SAME_LOWER")

    def validate(self) -> None:
        such_as = "one for each spatial dimension, such as (2, 2)"
        window = checked_shape("window_shape", self.window_shape, such_as)
        self._canonical(window_shape=window)
        super().validate()

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """Positions of the window, the input's features."""
        del param_shapes
        *sizes, features = input_shape
        return (*self.sliding(tuple(sizes)).output_sizes(), features)

    def sliding(self, sizes: Shape) -> Window:
        """The window over an input of these sizes."""
        taps = per_dimension("window_shape", self.window_shape, len(sizes))
        return self.window(sizes, taps)

    def handed(self, here: Site) -> tuple[float, float]:
        """How many outputs hand on to an input: the mean, and mean square over it."""
        raise NotImplementedError

    def added_up(self, here: Site) -> Positive:
        """How much larger what overlapping windows hand to an input is.

        Where they hand on the same, as below a mean over positions, it adds up.
        """
        if here.common is None:
            return number(1.0)
        more = self.handed(here)[1] - 1.0
        return here.common * more + number(1.0) if more > 0.0 else number(1.0)

    def common_below(self, here: Site) -> Positive | None:
        # At all positions the mean of what they are handed, of which there is more.
        if here.common is None:
            return None
        return here.common * min(self.handed(here)) / self.added_up(here)


@dataclasses.dataclass(frozen=True, repr=False)
class MaxPool(_Pool):
    """Max pooling, `flax.linen.max_pool`.

    Args:
      window_shape: the window, one int for each spatial dimension.
      strides: an int for all dimensions, or one for each; None is a stride of 1, as in
        Flax (so the usual pooling is `MaxPool((2, 2), strides=(2, 2))`).
      padding: `"VALID"`, `"SAME"`, `"SAME_LOWER"`, an int, or an int or a (low, high)
        pair for each dimension.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.MaxPool((2, 2), strides=(2, 2))
      spec.MaxPool((2, 2), strides=(2, 2))
    """

    def m_z(self, here: Site) -> Positive:
        # Each output hands its value to one input: BM's pooled `s` and `c` (BM 3.3).
        handed = number(here.size_out / here.size_in)
        if not here.mean_field:
            return handed
        gain = after_max_pool(here.moments, math.prod(self.window_shape))[1]
        return handed * gain * self.added_up(here)

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return after_max_pool(here.moments, math.prod(self.window_shape))[0]

    def handed(self, here: Site) -> tuple[float, float]:
        # Each output to one input, to which neighbouring windows may hand theirs, too.
        mean = min(here.size_out / here.size_in, 1.0)
        return mean, self.sliding(here.input_shape[:-1]).winning()


@dataclasses.dataclass(frozen=True, repr=False)
class AvgPool(_Pool):
    """Average pooling, `flax.linen.avg_pool`.

    Args:
      window_shape: the window, one int for each spatial dimension.
      strides: as of `MaxPool`.
      padding: as of `MaxPool`.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.AvgPool((2, 2), strides=2, padding="SAME")
      spec.AvgPool((2, 2), strides=2, padding='SAME')
    """

    approximate = (
        "overlapping windows make neighbours alike; a second such pooling above takes "
        "them for unrelated, and scales may be off by a factor of 5 for each"
    )

    def why_approximate(self, here: Site) -> str:
        return self.approximate if self.handed(here)[1] > 1.0 else ""

    def m_z(self, here: Site) -> Positive:
        # Each output hands 1 / k of its value to k inputs: least squares, BM (11).
        alone = here.size_out / here.size_in / math.prod(self.window_shape)
        return self.added_up(here) * alone

    def handed(self, here: Site) -> tuple[float, float]:
        return self.sliding(here.input_shape[:-1]).covering()

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return here.moments.averaged(math.prod(self.window_shape))


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalAvgPool(Link):
    """The mean over all positions, `x.mean(axis=(1, 2))` for images.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.GlobalAvgPool()
      spec.GlobalAvgPool()
    """

    featurewise = True

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The features alone."""
        del param_shapes
        return input_shape[-1:]

    def m_z(self, here: Site) -> Positive:
        # One window of all positions: 1 / k of a value to k inputs.
        return number(1.0 / here.positions_in**2)

    def common_below(self, here: Site) -> Positive | None:
        return number(1.0) if here.mean_field else None

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return here.moments.averaged(here.positions_in)


@dataclasses.dataclass(frozen=True, repr=False)
class Flatten(Link):
    """All axes but the batch made one, `x.reshape((x.shape[0], -1))`.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Flatten()
      spec.Flatten()
    """

    featurewise = True  # each stays one, at one position

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """One axis."""
        del param_shapes
        return (math.prod(input_shape),)
