r"""Arms of a residual that are functions of one signal: what they have in common.

Arms with kernels of their own are unrelated: second moments add up, and so do backward
factors, LH (13). In `h + relu(h)` they are not. There the output is one function `F` of
a Gaussian signal, and with mean-field gains its moments and its gain `E F'^2` are
integrals over that signal, cross terms included. Links that follow, up to the next
kernel, are functions of the same Gaussian: it is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from backmatch_optax.activations import (
    DENSITY,
    NODES,
    activation,
    after_activation,
)
from backmatch_optax.moments import Activated, Moments
from backmatch_optax.powers import Positive, evaluate, magnitudes, measured, number
from backmatch_optax.spec.link import Elementwise, Site


class Together(NamedTuple):
    """What a sum of elementwise functions of one signal makes of it."""

    moments: Moments
    m_z: Positive


class Remembered(Activated):
    """The Gaussian that a signal is a function of, for the links that follow."""

    source: Moments
    function: Elementwise
    gain: Positive  # `E F'^2` of that function


def together(here: Site) -> Together | None:
    """The arms' sum as one function; None with the papers' gains or unrelated arms."""
    function = elementwise_sum(here) if here.mean_field else None
    if function is None:
        return None
    nothing = Positive(-math.inf)
    source, before, gain_before = _origin(here.moments)

    def whole(values: jax.Array) -> jax.Array:
        return function(before(values))

    # In units of the signal's size, which stays what it is: a norm that may cancel.
    unit = source.q
    sizes = [source.variance, source.spread or nothing, source.offset or nothing]
    ratios = magnitudes([size / unit for size in sizes])
    (size,) = evaluate([unit], jnp.dtype(jnp.float32))
    found = _integrals(whole, *(size * ratio for ratio in ratios))
    variance, spread, offset = (measured(value / size) * unit for value in found[:3])
    moments, gain = Moments(variance, spread, offset), measured(found[3])
    for arm in here.arms.values():
        if arm and "bias" in arm[-1].params:
            moments = moments.with_spread(arm[-1].squared_row_norm("bias"))
    recalled = Remembered("identity", moments)
    recalled.source, recalled.function, recalled.gain = source, whole, gain
    return Together(
        Moments(moments.variance, moments.spread, moments.offset, recalled),
        gain / gain_before,
    )


def elementwise_sum(here: Site) -> Elementwise | None:
    """The sum of all arms as a function of their input; None where one is none."""
    arms = [_composed(arm) for arm in here.arms.values()]
    known = [arm for arm in arms if arm is not None]
    if len(known) < len(arms):
        return None
    return lambda values: sum((arm(values) for arm in known), jnp.zeros_like(values))


def _composed(arm: Sequence[Site]) -> Elementwise | None:
    functions = [site.link.elementwise(site) for site in arm]
    # A bias has either sign from unit to unit; it is added to what the arms put out.
    biased = any("bias" in site.params for site in arm[:-1])
    known = [function for function in functions if function is not None]
    if biased or len(known) < len(functions):
        return None

    def composed(values: jax.Array) -> jax.Array:
        for function in known:
            values = function(values)
        return values

    return composed


def _origin(moments: Moments) -> tuple[Moments, Elementwise, Positive]:
    """The Gaussian that a signal is a function of, the function and its gain."""
    match moments.activated:
        case Remembered() as recalled:
            return recalled.source, recalled.function, recalled.gain
        case Activated(name, before):
            _, gain = after_activation(name, before)
            return before, activation(name), gain
    return moments, lambda values: values, number(1.0)


def _integrals(
    function: Elementwise, variance: jax.Array, spread: jax.Array, offset: jax.Array
) -> tuple[jax.Array, ...]:
    """Variance, spread and offset of the outputs, and `E F'^2`."""
    means = jnp.sqrt(offset) + jnp.sqrt(spread) * NODES
    values = means[:, None] + jnp.sqrt(variance) * NODES[None, :]
    # Elementwise, so that one product with ones is the derivative of each.
    outputs, slopes = jax.jvp(function, (values,), (jnp.ones_like(values),))
    unit_means = outputs @ DENSITY
    common = DENSITY @ unit_means
    return (
        DENSITY @ ((outputs - unit_means[:, None]) ** 2 @ DENSITY),
        DENSITY @ (unit_means - common) ** 2,
        common**2,
        DENSITY @ (slopes**2 @ DENSITY),
    )
