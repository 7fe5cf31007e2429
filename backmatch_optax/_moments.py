"""The moments of a signal, and what a nonlinearity does to them.

With the papers' gains only the second moment `q` is known, and a nonlinearity leaves
it alone. With mean-field gains a unit's pre-activation is Gaussian: over units,
its mean is Gaussian of moment `mean_square`, and about that mean it varies with
`variance`. The two are kept apart because a BatchNorm removes the one and divides by
the other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax._positive import Positive, magnitudes, measured, number

Gains = Literal["paper", "mean_field"]

# phi(c * x) = c * phi(x) for c > 0: their gains do not depend on the signal's size.
_HOMOGENEOUS = ("identity", "leaky_relu", "relu")

_NOTHING = 1e-9  # below the rounding of the integrals

# Even in number: no node lies on a kink at 0.
_NODES = np.linspace(-8.0, 8.0, 160)
_DENSITY = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()


class Activated(NamedTuple):
    """What a nonlinearity was applied to: pooling depends on it."""

    name: str
    before: Moments


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of a signal over units, positions and inputs; all in units squared."""

    variance: Positive  # of a unit about its mean
    mean_square: Positive | None = None  # of the units' means; None is exactly zero
    activated: Activated | None = None

    @property
    def q(self) -> Positive:
        """The second moment."""
        if self.mean_square is None:
            return self.variance
        return self.mean_square + self.variance

    def __mul__(self, factor: Positive | float) -> Moments:
        """The moments of a signal whose square is `factor` times as large."""
        mean = None if self.mean_square is None else self.mean_square * factor
        return Moments(self.variance * factor, mean)

    def __add__(self, other: Moments) -> Moments:
        """The moments of the sum of two unrelated signals."""
        return Moments(
            self.variance + other.variance,
            _sum_of_known(self.mean_square, other.mean_square),
        )

    def averaged(self, window: int) -> Moments:
        """The moments of the mean of `window` values, independent about their mean."""
        return Moments(self.variance / window, self.mean_square)

    def with_mean_kept(self, share: float) -> Moments:
        """The moments when of the units' means only a share stays a mean."""
        mean = self.mean_square
        if mean is None or share == 1.0:
            return self
        if share == 0.0:
            return Moments(self.variance + mean)
        return Moments(self.variance + mean * (1.0 - share), mean * share)

    def with_mean(self, mean_square: Positive) -> Moments:
        """The same with the square of a constant for each unit added."""
        return Moments(self.variance, _sum_of_known(self.mean_square, mean_square))


def _sum_of_known(left: Positive | None, right: Positive | None) -> Positive | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function of that name, as Flax has it."""
    return (lambda x: x) if name == "identity" else getattr(jax.nn, name)


def after_activation(name: str, before: Moments) -> tuple[Moments, Positive]:
    """Moments after a nonlinearity, and its backward gain `E phi'(x)^2`."""
    return _after_maximum(name, before, 1)


def after_max_pool(before: Moments, window: int) -> tuple[Moments, Positive]:
    """Moments of the largest of `window` values, and the gain of its gradient.

    The values count as independent about their unit's mean. The largest of several
    ReLUs is active more often than each of them, so its gain is above 1.
    """
    name, inner = before.activated or Activated("identity", before)
    _, alone = _after_maximum(name, inner, 1)
    after, gain = _after_maximum(name, inner, window)
    return Moments(after.variance, after.mean_square), gain / alone


def _after_maximum(name: str, before: Moments, window: int) -> tuple[Moments, Positive]:
    """Moments of `phi` of the largest of `window` values, and `E phi'^2` there."""
    unit = before.q if name in _HOMOGENEOUS else number(1.0)
    mean_square = before.mean_square
    sizes = [before.variance / unit]
    if mean_square is not None:
        sizes.append(mean_square / unit)
    if any(size.powers for size in sizes):
        arrays = magnitudes(sizes, jnp.dtype(jnp.float32))
        after = [measured(value) for value in _integrals(name, window, *arrays)]
    else:
        static = _static_integrals(
            name, window, *(math.exp(size.log_constant) for size in sizes)
        )
        after = [None if value < _NOTHING else number(value) for value in static]
    after_mean, after_variance, gain = after
    if after_variance is None or gain is None:
        raise ValueError(f"{name!r} passes on neither signal nor gradient")
    moments = Moments(
        after_variance * unit, after_mean and after_mean * unit, Activated(name, before)
    )
    return moments, gain


@functools.lru_cache
def _static_integrals(
    name: str, window: int, variance: float, mean_square: float = 0.0
) -> tuple[float, float, float]:
    """`_integrals` of numbers, in closed form where there is one."""
    if name in _HOMOGENEOUS and window == 1:
        slope = {"identity": 1.0, "leaky_relu": 0.01, "relu": 0.0}[name]
        q = variance + mean_square
        gain = (1.0 + slope**2) / 2.0
        after_mean = (1.0 + slope**2) * _relu_kernel(q, mean_square / q)
        after_mean -= 2.0 * slope * _relu_kernel(q, -mean_square / q)
        return after_mean, gain * q - after_mean, gain
    with jax.ensure_compile_time_eval():
        values = _integrals(
            name, window, jnp.float32(variance), jnp.float32(mean_square)
        )
        return tuple(map(float, values))


def _relu_kernel(q: float, correlation: float) -> float:
    """`E relu(x) relu(y)` of Gaussians of moment `q` (Cho and Saul, 2009)."""
    angle = math.acos(max(-1.0, min(1.0, correlation)))
    return q / (2 * math.pi) * (math.sin(angle) + correlation * (math.pi - angle))


def _integrals(
    name: str, window: int, variance: jax.Array, mean_square: jax.typing.ArrayLike = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean square of the units' means, variance about them, and `E phi'^2`."""
    # The largest of n independent variables has their distribution to the power n.
    largest = np.diff(np.cumsum(_DENSITY) ** window, prepend=0.0)
    density, largest, nodes = (
        jnp.asarray(array, jnp.float32) for array in (_DENSITY, largest, _NODES)
    )
    means = jnp.sqrt(mean_square) * nodes
    values = means[:, None] + jnp.sqrt(variance) * nodes[None, :]
    phi = activation(name)
    outputs = phi(values)
    # Elementwise, so that one product with ones is the derivative of each.
    _, slopes = jax.jvp(phi, (values,), (jnp.ones_like(values),))
    mean_after = density @ (outputs @ largest) ** 2
    total = density @ (outputs**2 @ largest)
    return mean_after, total - mean_after, density @ (slopes**2 @ largest)
