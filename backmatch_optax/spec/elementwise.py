"""Links that act on every entry alike."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator

from backmatch_optax.activations import (
    activation,
    after_activation,
    aligned_slope,
    leaky_relu,
    slope_in_common,
)
from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Elementwise, Link, Site

ACTIVATIONS = (
    "celu",
    "elu",
    "exp",
    "gelu",
    "hard_sigmoid",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "sin",
    "soft_sign",
    "softplus",
    "swish",
    "tanh",
)


@dataclasses.dataclass(frozen=True, repr=False)
class Activation(Link):
    """An elementwise nonlinearity.

    With the papers' gains it counts as 1 both ways, as in BM (31); with mean-field
    gains as what it does to a Gaussian signal.

    Args:
      name: the name of the function in `jax.nn`, such as `"relu"` or `"tanh"`; or
        `"exp"` or `"sin"`.
      negative_slope: of a `"leaky_relu"`, below 0.

    Raises:
      ValueError: where the name is not known, with the nearest that are; where the
        slope is no finite number, or another function has one.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Activation("relu")
      spec.Activation('relu')
    """

    name: str
    negative_slope: float = dataclasses.field(default=0.01, kw_only=True)

    featurewise = True

    def validate(self) -> None:
        self._canonical_number("negative_slope", "a finite number", math.isfinite)
        if self.negative_slope != 0.01 and self.name != "leaky_relu":
            raise ValueError(
                f"negative_slope (={self.negative_slope}) is that of a leaky_relu, but "
                f"name is {self.name!r}"
            )
        if self.name not in ACTIVATIONS:
            near = difflib.get_close_matches(str(self.name), ACTIVATIONS, n=3)
            hint = f"Nearest: {', '.join(map(repr, near))}. " if near else ""
            raise ValueError(
                f"name (={self.name!r}) is not known. {hint}"
                f"Known: {', '.join(map(repr, ACTIVATIONS))}."
            )

    @property
    def _function(self) -> str:
        leaky = self.name == "leaky_relu"
        return leaky_relu(self.negative_slope) if leaky else self.name

    def centres(self, here: Site) -> bool:
        return here.centred and self.name == "identity"

    def elementwise(self, here: Site) -> Elementwise:
        del here
        return activation(self._function)

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return after_activation(self._function, here.moments)[0]

    def m_z(self, here: Site) -> Positive:
        if not here.mean_field:
            return number(1.0)
        return after_activation(self._function, here.moments)[1]

    def common_below(self, here: Site) -> Positive | None:
        if here.common is None:
            return None
        return here.common * slope_in_common(self._function, here.moments)

    def aligned_below(self, here: Site) -> Positive | None:
        found = []
        # The same for all inputs: what they have in common may add up to zero.
        if here.common is not None and not here.balanced:
            found.append(here.common * aligned_slope(self._function, here.moments))
        if here.aligned is not None:
            found.append(here.aligned * slope_in_common(self._function, here.moments))
        return functools.reduce(operator.add, found) if found else None


@dataclasses.dataclass(frozen=True, repr=False)
class Dropout(Link):
    """Dropout, which keeps the mean of signal and gradient.

    With the papers' gains it counts as 1 both ways. With mean-field gains both second
    moments grow by `1 / (1 - rate)`: what is kept is squared, times its share. The same
    holds where whole examples are dropped: as the last link of a residual branch it is
    stochastic depth.

    Args:
      rate: the share of entries, or of examples, that are dropped.

    Raises:
      ValueError: where it is not a number in [0, 1).

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Dropout(0.5)
      spec.Dropout(0.5)
    """

    rate: float = 0.0

    featurewise = True

    def validate(self) -> None:
        wanted = "a number in [0, 1)"
        self._canonical_number("rate", wanted, lambda r: 0.0 <= r < 1.0)

    def moments_after(self, here: Site) -> Moments:
        before = here.moments
        if not here.mean_field or not self.rate:
            return before
        # The means stay; what random zeros add to the second moment is variance.
        added = before.q * (self.rate / (1.0 - self.rate))
        variance = before.variance + added
        return Moments(variance, before.spread, before.offset, along=before.along)

    def m_z(self, here: Site) -> Positive:
        return number(1.0 / (1.0 - self.rate) if here.mean_field else 1.0)

    def common_below(self, here: Site) -> Positive | None:
        # Zeros are drawn anew at every position.
        return None if here.common is None else here.common * (1.0 - self.rate)


@dataclasses.dataclass(frozen=True, repr=False)
class Scale(Link):
    """Multiplication by a constant, such as `0.5 * x` or a division by `sqrt(2)`.

    Only the square of the constant counts. With mean-field gains the difference of two
    signals behind kernels, a `Residual` with `Scale(-1)`, is therefore taken for their
    sum: where both have a mean in common, as after ReLUs, its second moment comes out
    too large, by up to a factor of about 2.

    Args:
      factor: the constant, not zero.

    Raises:
      ValueError: where it is not a finite number other than zero.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Scale(0.5)
      spec.Scale(0.5)
    """

    factor: float

    featurewise = True

    def validate(self) -> None:
        wanted = "a finite number other than zero"
        self._canonical_number("factor", wanted, lambda f: 0 < abs(f) < math.inf)

    def elementwise(self, here: Site) -> Elementwise:
        del here
        return lambda values: self.factor * values

    def moments_after(self, here: Site) -> Moments:
        return here.moments * self.m_z(here)

    def m_z(self, here: Site) -> Positive:
        del here
        return number(abs(self.factor)) ** 2  # a log: 1e200 ** 2 is no float

    def aligned_below(self, here: Site) -> Positive | None:
        return here.aligned


@dataclasses.dataclass(frozen=True, repr=False)
class Shift(Link):
    """Addition of a constant: the `1 +` of `x * (1 + scale)`, as in FiLM and adaLN.

    The gradient passes as it is, and the second moment grows:

        m_z = 1,    q <- q + value^2

    With mean-field gains the constant is a mean that all units have in common. Such
    means are positive throughout, as behind a ReLU. So `scale - 1` is `Scale(-1)`,
    `Shift(1)` and `Scale(-1)`, right where only the square counts, as in a `Gate`.

    Args:
      value: the constant, above zero.

    Raises:
      ValueError: where it is not a finite number above zero.

    Examples:
      >>> from backmatch_optax import spec
      >>> modulated = spec.Gate([], [spec.Dense("scale"), spec.Shift(1.0)])
      >>> modulated.gate[1]
      spec.Shift(1.0)
    """

    value: float

    featurewise = True

    def validate(self) -> None:
        wanted = "a finite number above zero"
        self._canonical_number("value", wanted, lambda v: 0 < v < math.inf)

    def elementwise(self, here: Site) -> Elementwise:
        del here
        return lambda values: self.value + values

    def moments_after(self, here: Site) -> Moments:
        before, added = here.moments, number(self.value)
        if not here.mean_field:
            return Moments(before.variance + added**2)
        mean = added if before.offset is None else before.offset**0.5 + added
        return Moments(before.variance, before.spread, mean**2, along=before.along)

    def aligned_below(self, here: Site) -> Positive | None:
        return here.aligned
