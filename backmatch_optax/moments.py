"""The moments of a signal, and what a nonlinearity does to them.

With the papers' gains only the second moment `q` is known, and a nonlinearity leaves
it alone. With mean-field gains a unit's pre-activation is Gaussian: over inputs and
positions it has a `variance` about its mean, and over units those means have a `spread`
about an `offset` common to all. They are kept apart because a BatchNorm divides by the
first and removes the others, a random kernel keeps their squares but no common sign,
and a shortcut keeps the sign too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax.powers import Positive, applied, magnitudes, measured, number

Gains = Literal["paper", "mean_field"]

# phi(c * x) = c * phi(x) for c > 0: their gains do not depend on the signal's size.
_HOMOGENEOUS = ("identity", "leaky_relu", "relu")

# Those whose slope is zero but for a few units about 0, and up to which size of the
# signal the nodes below are dense enough there.
_SATURATING = {
    **dict.fromkeys(("hard_tanh", "sigmoid", "soft_sign", "tanh"), 5.0),
    **dict.fromkeys(("hard_sigmoid", "relu6"), 15.0),
}

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
    spread: Positive | None = None  # of the units' means about theirs; None is zero
    offset: Positive | None = None  # square of the mean of all units; None is zero
    activated: Activated | None = None

    @functools.cached_property
    def maxima(self) -> dict[tuple[str, int], tuple[Moments, Positive]]:
        """What activations and poolings have made of it, by name and window.

        The rules for signal and gradient both ask. The same atoms cancel.
        """
        return {}

    @functools.cached_property
    def mean_square(self) -> Positive | None:
        """The mean square of the units' means."""
        return _sum_of_known(self.spread, self.offset)

    @functools.cached_property
    def q(self) -> Positive:
        """The second moment."""
        mean = self.mean_square
        return self.variance if mean is None else self.variance + mean

    def __mul__(self, factor: Positive | float) -> Moments:
        """The moments of a signal whose square is `factor` times as large."""
        return Moments(
            self.variance * factor,
            None if self.spread is None else self.spread * factor,
            None if self.offset is None else self.offset * factor,
        )

    def __add__(self, other: Moments) -> Moments:
        """The moments of the sum of two unrelated signals; their offsets add up."""
        offset = _sum_of_known(
            None if self.offset is None else self.offset**0.5,
            None if other.offset is None else other.offset**0.5,
        )
        return Moments(
            self.variance + other.variance,
            _sum_of_known(self.spread, other.spread),
            None if offset is None else offset**2,
        )

    def times(self, other: Moments) -> Moments:
        """The moments of the product of two unrelated signals."""
        variance = _sum_of_known(
            self.variance * other.variance,
            _product_of_known(self.variance, other.mean_square),
            _product_of_known(self.mean_square, other.variance),
        )
        assert variance is not None
        spread = _sum_of_known(
            _product_of_known(self.spread, other.spread),
            _product_of_known(self.spread, other.offset),
            _product_of_known(self.offset, other.spread),
        )
        return Moments(variance, spread, _product_of_known(self.offset, other.offset))

    def mixed(self, gain: Positive | float) -> Moments:
        """The moments after a random linear map: its units' means have either sign."""
        mean = self.mean_square
        return Moments(self.variance * gain, None if mean is None else mean * gain)

    def averaged(self, window: int) -> Moments:
        """The moments of the mean of `window` values, independent about their mean."""
        return Moments(self.variance / window, self.spread, self.offset)

    def with_mean_kept(self, share: float) -> Moments:
        """The moments when of the units' means only a share stays a mean."""
        mean = self.mean_square
        if mean is None or share == 1.0:
            return self
        if share == 0.0:
            return Moments(self.variance + mean)
        return Moments(self.variance + mean * (1.0 - share), mean * share)

    def with_spread(self, spread: Positive) -> Moments:
        """The same with a constant of that mean square added to each unit."""
        return Moments(self.variance, _sum_of_known(self.spread, spread), self.offset)

    def collapsed(self, most: int) -> Moments:
        """The same, with what all parts have in common as one atom beyond `most`."""
        parts = (self.variance, self.spread, self.offset)
        known = [part for part in parts if part is not None]
        if all(len(part.powers) <= most for part in known):
            return self  # with all that was made of it
        common = {
            atom: power
            for atom, power in self.variance.powers.items()
            if all(part.powers.get(atom) == power for part in known)
        }
        unit = Positive(0.0, common)
        short = unit.collapsed(most)
        variance, spread, offset = (
            None if part is None else (part / unit * short).collapsed(most)
            for part in parts
        )
        assert variance is not None
        return Moments(variance, spread, offset, self.activated)

    def without_offset(self) -> Moments:
        """The same with the mean of all units taken away."""
        return Moments(self.variance, self.spread)


def beside(parts: Sequence[Moments], shares: Sequence[float], units: bool) -> Moments:
    """Moments of signals side by side, of which each is a share of the whole.

    They are of different `units`, or of the same units at different positions. The
    means of the parts count as unrelated from unit to unit, and the means of all units
    as equal where there are any.
    """
    if len(parts) == 1:
        return parts[0]

    def mean(field: str, weights: Sequence[float]) -> Positive | None:
        values = [getattr(part, field) for part in parts]
        known = [v * w for v, w in zip(values, weights, strict=True) if v is not None]
        return _sum_of_known(*known)

    spread, offset = mean("spread", shares), mean("offset", shares)
    differing = None
    if not units:  # a unit's mean is that over all positions, what differs is variance
        differing = mean("spread", [share * (1.0 - share) for share in shares])
        spread = mean("spread", [share**2 for share in shares])
    pairs = zip(parts, shares, strict=True)
    leaning = sum(share for part, share in pairs if part.offset is not None)
    if offset is not None and leaning < 1.0 - _NOTHING:
        rest = offset * (1.0 - leaning)
        offset = offset * leaning
        if units:
            spread = _sum_of_known(spread, rest)
        else:
            differing = _sum_of_known(differing, rest)
    variance = _sum_of_known(mean("variance", shares), differing)
    assert variance is not None
    activated = [part.activated for part in parts if part.activated is not None]
    if len(activated) == len(parts) and len({name for name, _ in activated}) == 1:
        before = beside([before for _, before in activated], shares, units)
        return Moments(variance, spread, offset, Activated(activated[0].name, before))
    return Moments(variance, spread, offset)


def _sum_of_known(*terms: Positive | None) -> Positive | None:
    known = [term for term in terms if term is not None]
    return functools.reduce(operator.add, known) if known else None


def _product_of_known(left: Positive | None, right: Positive | None) -> Positive | None:
    return None if left is None or right is None else left * right


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function of that name, as Flax has it."""
    return (lambda x: x) if name == "identity" else getattr(jax.nn, name)


def after_activation(name: str, before: Moments) -> tuple[Moments, Positive]:
    """Moments after a nonlinearity, and its backward gain `E phi'(x)^2`."""
    return _after_maximum(name, before, 1)


def after_prelu(slope: jax.Array, before: Moments) -> tuple[Moments, Positive]:
    """As `after_activation`, of a leaky ReLU whose slope is an array."""
    unit = before.q
    zero = Positive(-math.inf)
    parts = (before.variance, before.spread or zero, before.offset or zero)
    variance, spread, offset = magnitudes([part / unit for part in parts])

    def phi(x: jax.Array) -> jax.Array:
        return jnp.where(x >= 0, x, slope * x)

    after = _integrals(phi, 1, variance, spread, offset)
    variance, spread, offset, gain = map(measured, after)
    return Moments(variance, spread, offset) * unit, gain


def after_max_pool(before: Moments, window: int) -> tuple[Moments, Positive]:
    """Moments of the largest of `window` values, and the gain of its gradient.

    The values count as independent about their unit's mean. The largest of several
    ReLUs is active more often than each of them, so its gain is above 1.
    """
    name, inner = before.activated or Activated("identity", before)
    _, alone = _after_maximum(name, inner, 1)
    after, gain = _after_maximum(name, inner, window)
    return dataclasses.replace(after, activated=None), gain / alone


def _after_maximum(name: str, before: Moments, window: int) -> tuple[Moments, Positive]:
    """Moments of `phi` of the largest of `window` values, and `E phi'^2` there."""
    key = (name, window)
    if key not in before.maxima:
        before.maxima[key] = _maximum(name, before, window)
    return before.maxima[key]


def _maximum(name: str, before: Moments, window: int) -> tuple[Moments, Positive]:
    unit = before.q if name in _HOMOGENEOUS else number(1.0)
    parts = (before.variance, before.spread, before.offset)
    sizes = [None if part is None else part / unit for part in parts]
    known = [size for size in sizes if size is not None]
    if any(size.powers for size in known):
        after = applied(_named_integrals(name, window), sizes)
    else:
        figures = (0.0 if s is None else math.exp(s.log_constant) for s in sizes)
        static = _static_integrals(name, window, *figures)
        after = [None if value < _NOTHING else number(value) for value in static]
    variance, spread, offset, gain = after
    if variance is None or gain is None:
        raise ValueError(f"{name!r} passes on neither signal nor gradient")
    moments = Moments(variance, spread, offset) * unit
    return dataclasses.replace(moments, activated=Activated(name, before)), gain


@functools.lru_cache
def _static_integrals(
    name: str, window: int, variance: float, spread: float, offset: float
) -> tuple[float, ...]:
    """`_integrals` of numbers, in closed form where there is one."""
    if name in _HOMOGENEOUS and window == 1 and not offset:
        slope = {"identity": 1.0, "leaky_relu": 0.01, "relu": 0.0}[name]
        q = variance + spread
        gain = (1.0 + slope**2) / 2.0
        mean_square = (1.0 + slope**2) * _relu_kernel(q, spread / q)
        mean_square -= 2.0 * slope * _relu_kernel(q, -spread / q)
        offset = (1.0 - slope) ** 2 * q / (2 * math.pi)
        return gain * q - mean_square, mean_square - offset, offset, gain

    def integrate() -> tuple[float, ...]:
        sizes = (jnp.float32(value) for value in (variance, spread, offset))
        return tuple(map(float, _named_integrals(name, window)(*sizes)))

    # This thread may be tracing a function or be inside `shard_map`, where no array has
    # a value. A new thread is not.
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(integrate).result()


def _relu_kernel(q: float, correlation: float) -> float:
    """`E relu(x) relu(y)` of Gaussians of moment `q` (Cho and Saul, 2009)."""
    angle = math.acos(max(-1.0, min(1.0, correlation)))
    return q / (2 * math.pi) * (math.sin(angle) + correlation * (math.pi - angle))


@functools.cache
def _named_integrals(name: str, window: int) -> Callable[..., tuple[jax.Array, ...]]:
    dense = _SATURATING.get(name, math.inf)
    return functools.partial(_integrals, activation(name), window, dense=dense)


def _integrals(
    phi: Callable[[jax.Array], jax.Array],
    window: int,
    variance: jax.Array,
    spread: jax.Array,
    offset: jax.Array,
    dense: float = math.inf,
) -> tuple[jax.Array, ...]:
    """Variance, spread and offset of the outputs, and `E phi'^2`.

    Up to the size `dense` of the signal the nodes tell the slopes.
    """
    # The largest of n independent variables has their distribution to the power n.
    largest = np.diff(np.cumsum(_DENSITY) ** window, prepend=0.0)
    density, largest, nodes = (
        jnp.asarray(array, jnp.float32) for array in (_DENSITY, largest, _NODES)
    )
    means = jnp.sqrt(offset) + jnp.sqrt(spread) * nodes
    values = means[:, None] + jnp.sqrt(variance) * nodes[None, :]
    # Beside the output in the middle, so that a small variance is no difference.
    middle = phi(means)
    rests = phi(values) - middle[:, None]
    # A larger signal meets those slopes in proportion less often.
    size = jnp.sqrt(variance + spread + offset)
    rarer = jnp.maximum(size / dense, 1.0)
    # Elementwise, so that one product with ones is the derivative of each.
    _, slopes = jax.jvp(phi, (values / rarer,), (jnp.ones_like(values),))
    # One product of matrices: XLA compiles each anew.
    rest, square, slope = jnp.stack([rests, rests**2, slopes**2]) @ largest
    unit_means = middle + rest
    common = density @ unit_means
    return (
        density @ jnp.maximum(square - rest**2, 0.0),
        density @ (unit_means - common) ** 2,
        common**2,
        density @ slope / rarer,
    )
