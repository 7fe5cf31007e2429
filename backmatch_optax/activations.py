"""What a nonlinearity or a max-pool does to the moments of a signal, by integrals.

An activation that commutes with scaling has constants; of others the integrals are
computed from the moments, at nodes that are the same for all.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax.moments import NOTHING, Activated, Moments
from backmatch_optax.powers import Positive, applied, magnitudes, measured, number

# The slopes below 0 of those with phi(c * x) = c * phi(x) for c > 0, whose gains do not
# depend on the signal's size. Others of a leaky ReLU stand in its name.
_SLOPES = {"identity": 1.0, "leaky_relu": 0.01, "relu": 0.0}

# Those whose slope is zero but for a few units about 0, and up to which size of the
# signal the nodes below are dense enough there.
_SATURATING = {
    **dict.fromkeys(("hard_tanh", "sigmoid", "soft_sign", "tanh"), 5.0),
    **dict.fromkeys(("hard_sigmoid", "relu6"), 15.0),
}

# Those that repeat themselves, and the variance from which on their phase is as good as
# uniform: the nodes below would miss periods of a larger one.
_PERIODIC = {"sin": 25.0}

# A Gaussian's values and their shares. Even in number: none lies on a kink at 0.
NODES = np.linspace(-8.0, 8.0, 160, dtype=np.float32)
DENSITY = np.float32(np.exp(-0.5 * NODES**2) / np.exp(-0.5 * NODES**2).sum())


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function of that name, as Flax has it; see `leaky_relu`."""
    own, _, slope = name.partition(" ")
    if slope:
        return functools.partial(jax.nn.leaky_relu, negative_slope=float(slope))
    ours = {"identity": lambda x: x, "exp": jnp.exp, "sin": jnp.sin}
    return ours.get(own) or getattr(jax.nn, own)


def leaky_relu(slope: float) -> str:
    """The name of a leaky ReLU with that slope below 0."""
    return "leaky_relu" if slope == _SLOPES["leaky_relu"] else f"leaky_relu {slope!r}"


def _slope(name: str) -> float | None:
    """The slope below 0 of what commutes with scaling; None for what does not."""
    own, _, slope = name.partition(" ")
    return float(slope) if slope else _SLOPES.get(own)


def _unit(name: str, before: Moments) -> Positive:
    """What moments are divided by before integrals are taken of them."""
    return number(1.0) if _slope(name) is None else before.q


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
    unit = _unit(name, before)
    parts = (before.variance, before.spread, before.offset)
    sizes = [None if part is None else part / unit for part in parts]
    known = [size for size in sizes if size is not None]
    if any(size.powers for size in known):
        after = applied(_named_integrals(name, window), sizes)
    else:
        figures = (0.0 if s is None else math.exp(s.log_constant) for s in sizes)
        static = _static_integrals(name, window, *figures)
        after = [None if value < NOTHING else number(value) for value in static]
    variance, spread, offset, gain = after
    if variance is None or gain is None:
        raise ValueError(f"{name!r} passes on neither signal nor gradient")
    moments = Moments(variance, spread, offset) * unit
    if before.along is not None and window == 1:
        along = _in_common(name, before)[0] * unit
        moments = dataclasses.replace(moments, along=along)
    return dataclasses.replace(moments, activated=Activated(name, before)), gain


def slope_in_common(name: str, before: Moments) -> Positive:
    """The share of `E phi'(x)^2` that all positions of an input have in common."""
    return _in_common(name, before)[1]


def straight(after: Moments) -> Positive:
    """The part of a signal's second moment that goes with the Gaussian it was before.

    `v (E phi'(x))^2` behind an activation, the variance without one.
    """
    if after.activated is None:
        return after.variance
    name, before = after.activated
    _, gain = after_activation(name, before)
    return before.variance * gain * slope_in_common(name, before)


def aligned_slope(name: str, before: Moments) -> Positive:
    """The squared correlation of `phi'(x)` with `x` over the positions of an input.

    Where the cotangent above is the same at all of them.
    """
    return _in_common(name, before)[2]


def _in_common(name: str, before: Moments) -> list[Positive]:
    """What positions have in common of the outputs' variance, and of the slopes.

    And how far the slopes go with the signal.
    """
    if name not in before.commons:
        before.commons[name] = _commons_of(name, before)
    return before.commons[name]


def _commons_of(name: str, before: Moments) -> list[Positive]:
    unit = _unit(name, before)
    parts = (before.variance, before.spread, before.offset, before.along)
    sizes = [None if part is None else part / unit for part in parts]
    known = [size for size in sizes if size is not None]
    if any(size.powers for size in known):
        return applied(_named_commons(name), sizes)
    figures = (0.0 if s is None else math.exp(s.log_constant) for s in sizes)
    return [number(max(f, NOTHING)) for f in _static_commons(name, *figures)]


@functools.cache
def _named_commons(name: str) -> Callable[..., tuple[jax.Array, ...]]:
    return functools.partial(_commons, activation(name), _PERIODIC.get(name))


@functools.lru_cache
def _static_commons(name: str, *figures: float) -> tuple[float, ...]:
    return _elsewhere(_named_commons(name), *figures)


def _commons(
    phi: Callable[[jax.Array], jax.Array],
    most: float | None,
    variance: jax.Array,
    spread: jax.Array,
    offset: jax.Array,
    along: jax.Array,
) -> tuple[jax.Array, ...]:
    """Part of the variance of outputs, share and correlation of the squared slopes."""
    density, nodes = jnp.asarray(DENSITY), jnp.asarray(NODES)

    def means(apart: jax.Array) -> tuple[jax.Array, ...]:
        """Over what differs, for every value of what is in common."""
        shared = jnp.maximum(spread + variance - apart, 0.0)
        if most is not None:
            shared, apart = jnp.minimum(shared, most), jnp.minimum(apart, most)
        centres = jnp.sqrt(offset) + jnp.sqrt(shared) * nodes
        values = centres[:, None] + jnp.sqrt(apart) * nodes[None, :]
        outputs, slopes = jax.jvp(phi, (values,), (jnp.ones_like(values),))
        squares = slopes**2 @ density
        return outputs @ density, slopes @ density, slopes @ (nodes * density), squares

    of_units, *_ = means(variance)
    of_inputs, slopes, along_x, squares = means(jnp.maximum(variance - along, 0.0))
    more = density @ of_inputs**2 - density @ of_units**2
    square = density @ squares
    return (
        jnp.maximum(more, 0.0),
        density @ slopes**2 / square,
        density @ along_x**2 / square,
    )


@functools.lru_cache
def _static_integrals(
    name: str, window: int, variance: float, spread: float, offset: float
) -> tuple[float, ...]:
    """`_integrals` of numbers, in closed form where there is one."""
    slope = _slope(name)
    if slope is not None and window == 1 and not offset:
        q = variance + spread
        gain = (1.0 + slope**2) / 2.0
        mean_square = (1.0 + slope**2) * _relu_kernel(q, spread / q)
        mean_square -= 2.0 * slope * _relu_kernel(q, -spread / q)
        offset = (1.0 - slope) ** 2 * q / (2 * math.pi)
        return gain * q - mean_square, mean_square - offset, offset, gain

    return _elsewhere(_named_integrals(name, window), variance, spread, offset)


def _elsewhere(
    function: Callable[..., Sequence[jax.Array]], *figures: float
) -> tuple[float, ...]:
    """A function of numbers, computed in a thread of its own."""

    def integrate() -> tuple[float, ...]:
        results = function(*(jnp.float32(figure) for figure in figures))
        return tuple(map(float, results))

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
    most = _PERIODIC.get(name)
    return functools.partial(
        _integrals, activation(name), window, dense=dense, most=most
    )


def _integrals(
    phi: Callable[[jax.Array], jax.Array],
    window: int,
    variance: jax.Array,
    spread: jax.Array,
    offset: jax.Array,
    dense: float = math.inf,
    most: float | None = None,
) -> tuple[jax.Array, ...]:
    """Variance, spread and offset of the outputs, and `E phi'^2`.

    Up to the size `dense` of the signal the nodes tell the slopes. Variances above
    `most` make no difference.
    """
    if most is not None:
        variance, spread = jnp.minimum(variance, most), jnp.minimum(spread, most)
    # The largest of n independent variables has their distribution to the power n.
    largest = np.diff(np.cumsum(DENSITY, dtype=np.float64) ** window, prepend=0.0)
    density, largest, nodes = (
        jnp.asarray(array, jnp.float32) for array in (DENSITY, largest, NODES)
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
