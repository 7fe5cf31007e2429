"""Links that are one learned array: scales, biases, positions, tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from backmatch_optax.activations import after_prelu
from backmatch_optax.moments import Moments, beside
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Link, Shape, Site, check_path


@dataclasses.dataclass(frozen=True, repr=False)
class _Learned(Link):
    """What these share: an array at its own path, repeated as in NumPy to the input."""

    path: str

    roles = required_roles = ("",)  # the path is the array's own
    featurewise = True

    def validate(self) -> None:
        check_path(self.path)

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's."""
        shape = param_shapes[self.roles[0]]
        # Only a leading axis may be in excess: that of the batch.
        while len(shape) > len(input_shape) and shape[0] == 1:
            shape = shape[1:]
        if getattr(self, "sliced", False) and len(shape) == len(input_shape) > 1:
            rows = min(shape[-2], input_shape[-2])
            shape = (*shape[:-2], rows, shape[-1])
        aligned = zip(reversed(shape), reversed(input_shape), strict=False)
        if len(shape) > len(input_shape) or any(n not in (1, of) for n, of in aligned):
            raise ValueError(
                f"its array of shape {param_shapes[self.roles[0]]} cannot be repeated "
                f"to the shape of its input {input_shape}"
            )
        return input_shape

    def size(self, here: Site) -> int:
        """How many entries the array has."""
        return math.prod(here.params[self.roles[0]].shape)

    def repeated(self, here: Site) -> float:
        """At how many positions an entry stands."""
        shape = here.params[self.roles[0]].shape
        return here.positions_in / math.prod(shape[:-1])

    def mean_square(self, here: Site) -> Positive:
        """Of the array's entries."""
        shape = here.params[self.roles[0]].shape
        return here.squared_row_norm(self.roles[0]) / math.prod(shape[:-1])


@dataclasses.dataclass(frozen=True, repr=False)
class LayerScale(_Learned):
    """Multiplication by a learned array `g`: the layer scale of a ConvNeXt or a CaiT.

    An entry of `g` meets `size_in / size` coordinates of the input, each of moment `q`,
    and a coordinate of the input is multiplied by one entry of `g`:

        m_W = q * size_in / size,    m_z = mean(g^2),    q <- q * mean(g^2)

    Args:
      path: the path of the array itself, such as `"Block_0/gamma"`. Its shape is
        repeated to the input's as in NumPy: one entry for each feature, or only one.

    Raises:
      ValueError: where `path` is not names joined by single slashes, or (at `init`) is
        not an array's own, or the array cannot be repeated to the shape of the input.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Residual([spec.Dense("Dense_0"), spec.LayerScale("gamma")])
      spec.Residual((spec.Dense('Dense_0'), spec.LayerScale('gamma')))
    """

    def why_approximate(self, here: Site) -> str:
        if self.repeated(here) == here.positions_in:
            return ""
        return (
            "its entries count as having one sign; where those of different positions "
            "have either, a mean over positions is smaller than the rule takes it"
        )

    def moments_after(self, here: Site) -> Moments:
        return here.moments * self.mean_square(here)

    def m_W(self, here: Site, role: str) -> Positive:
        times = self.repeated(here)
        uses = here.size_in / self.size(here)
        return here.met(here.moments, times, 1) * (uses / times)

    def m_z(self, here: Site) -> Positive:
        return self.mean_square(here)

    def aligned_below(self, here: Site) -> Positive | None:
        return here.aligned


@dataclasses.dataclass(frozen=True, repr=False)
class Bias(_Learned):
    """Addition of a learned array `b`: learned positions, or a bias by itself.

    An entry of `b` is added to `size_in / size` coordinates of the input:

        m_W = size_in / size,    m_z = 1,    q <- q + mean(b^2)

    Args:
      path: the path of the array itself, such as `"pos_embedding"`. Its shape is
        repeated to the input's as in NumPy.
      sliced: whether only the first of its rows are used, as many as the input has
        positions. `m_W` is the mean over all rows, and unused ones have none.

    Raises:
      ValueError: where `path` is not names joined by single slashes, or (at `init`) is
        not an array's own, or the array cannot be repeated to the shape of the input.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Bias("Encoder_0/pos_embedding")
      spec.Bias('Encoder_0/pos_embedding')
    """

    sliced: bool = dataclasses.field(default=False, kw_only=True)

    def moments_after(self, here: Site) -> Moments:
        added = self.mean_square(here)
        if here.mean_field and self.size(here) == here.fan_in:
            return here.moments.with_spread(added)
        # Another number at each position: no mean of a unit.
        before = here.moments
        variance = before.variance + added
        return Moments(variance, before.spread, before.offset, along=before.along)

    def m_W(self, here: Site, role: str) -> Positive:
        times = self.repeated(here)
        return here.added(times) * (here.size_in / self.size(here) / times)

    def aligned_below(self, here: Site) -> Positive | None:
        return here.aligned


@dataclasses.dataclass(frozen=True, repr=False)
class PReLU(_Learned):
    """A ReLU with a learned slope `a` below zero, `flax.linen.PReLU`.

    The slope meets every negative coordinate of the input. These have half of the
    second moment:

        m_W = size_in * q / 2

    With the papers' gains the signal passes as it is, as through every activation; with
    mean-field gains `m_z` is `(1 + a^2) / 2`.

    Args:
      path: where its `negative_slope` lies, such as `"PReLU_0"`.

    Raises:
      ValueError: where `path` is not names joined by single slashes, or (at `init`)
        there is not one slope.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.PReLU("PReLU_0")
      spec.PReLU('PReLU_0')
    """

    roles = required_roles = ("negative_slope",)

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        if math.prod(param_shapes["negative_slope"]) != 1:
            raise ValueError(
                "expects one negative_slope, but its shape is "
                f"{param_shapes['negative_slope']}"
            )
        return input_shape

    def centres(self, here: Site) -> bool:
        del here
        return False

    def moments_after(self, here: Site) -> Moments:
        return self._after(here)[0] if here.mean_field else here.moments

    def m_W(self, here: Site, role: str) -> Positive:
        return here.q * (here.size_in / 2)

    def m_z(self, here: Site) -> Positive:
        return self._after(here)[1] if here.mean_field else number(1.0)

    def _after(self, here: Site) -> tuple[Moments, Positive]:
        slope = here.params["negative_slope"].reshape(())
        return here.once("after", lambda: after_prelu(slope, here.moments))


@dataclasses.dataclass(frozen=True, repr=False)
class ClassToken(_Learned):
    """Learned positions in front of the others: the class token of a ViT.

    An entry of the token stands at one place of the output, and the input stands there
    as it is:

        m_W = 1,    m_z = 1,    q <- mean over positions of both

    Args:
      path: the path of the array itself, such as `"cls"`: one feature vector, or
        several on the axis before the features.

    Raises:
      ValueError: where `path` is not names joined by single slashes, or (at `init`) is
        not an array's own, the input has no single axis of positions, or the features
        differ.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.ClassToken("cls")
      spec.ClassToken('cls')
    """

    approximate = (
        "its rule takes the mean over all positions, but a head may read the token "
        "alone; its own scale is then too large by their number. Where a normalisation "
        "follows and the token is smaller than the rest, it is so by more"
    )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, with as many positions more as there are tokens."""
        shape = param_shapes[""]
        if len(input_shape) != 2 or shape[-1:] != input_shape[-1:]:
            raise ValueError(
                f"its array of shape {shape} must have the features of an input of "
                f"shape (positions, features), but the input's shape is {input_shape}"
            )
        return (input_shape[0] + math.prod(shape[:-1]), input_shape[1])

    def moments_after(self, here: Site) -> Moments:
        shares = [self.size(here) / here.size_out, here.size_in / here.size_out]
        token = Moments(self.mean_square(here))
        return beside([token, here.moments], shares, units=False)

    def m_W(self, here: Site, role: str) -> Positive:
        return number(1.0)

    def centres(self, here: Site) -> bool:
        del here
        return False  # the other positions have a mean of their own
