"""Positive numbers held as symbolic powers, so that what cancels cancels exactly.

Every rule of back-matching propagation multiplies, divides or adds positive numbers:
static counts (fan-in, positions) and measured norms. A product over a thousand layers
would overflow, and `x * y / y` would not give back `x` in floating point. So a number
is kept as

    exp(log_constant) * atom_1**p_1 * atom_2**p_2 * ...

with a Python float for everything static and static powers of the measured norms.
Multiplying adds powers, dividing subtracts them, and a norm that cancels is gone before
any floating-point operation is traced. Between two normalised layers that is every norm
but two, whatever the depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp


class Atom:
    """A measured number: the log of its size, and its order of smallness.

    An exact zero (a zero-initialised kernel) is an infinitesimal of order 1 with
    coefficient 1. Products and quotients of zeros then stay finite, and a sum ignores
    the terms of higher order, as it should. Where a number is divided by, `floored`
    stands for its log: a norm counts as no less than its floor.
    """

    def __init__(
        self,
        log: jax.Array,
        order: jax.Array,
        *,
        floor: jax.typing.ArrayLike | None = None,
        floored: jax.Array | None = None,
    ):
        self.log = log
        self.order = order
        self.floor = floor  # the least that a norm counts as; None for what is no norm
        self._floored = floored

    @property
    def floored(self) -> jax.Array:
        """The log where it is divided by; traced once, and only where it is used."""
        if self._floored is None:
            unfloored = self.floor is None
            self._floored = (
                self.log if unfloored else _raised(self.log, self.order, self.floor)
            )
        return self._floored


class Positive:
    """A positive number: a static constant times powers of atoms."""

    __slots__ = ("log_constant", "powers")

    def __init__(
        self,
        log_constant: float = 0.0,
        powers: Mapping[Atom, float] = MappingProxyType({}),
    ):
        self.log_constant = log_constant
        self.powers = powers

    def __mul__(self, other: Positive | float) -> Positive:
        return self._times_power(other, 1)

    def __rmul__(self, other: float) -> Positive:
        return self * other

    def __truediv__(self, other: Positive | float) -> Positive:
        return self._times_power(other, -1)

    def __rtruediv__(self, other: float) -> Positive:
        return number(other) / self

    def __pow__(self, exponent: float) -> Positive:
        powers = {atom: exponent * power for atom, power in self.powers.items()}
        return Positive(exponent * self.log_constant, powers)

    def _times_power(self, other: Positive | float, sign: int) -> Positive:
        if not isinstance(other, Positive):
            other = number(other)
        powers = dict(self.powers)
        for atom, power in other.powers.items():
            powers[atom] = powers.get(atom, 0) + sign * power
            if powers[atom] == 0:
                del powers[atom]
        return Positive(self.log_constant + sign * other.log_constant, powers)

    def __add__(self, other: Positive) -> Positive:
        # What both terms share is taken out first, so that it can still cancel later.
        shared = Positive(
            self.log_constant,
            {
                atom: power
                for atom in self.powers  # in their order, for the same bits every run
                if atom in other.powers
                and (power := sorted((0, self.powers[atom], other.powers[atom]))[1])
            },
        )
        left, right = self / shared, other / shared
        if not left.powers and not right.powers:
            return shared * (1.0 + math.exp(right.log_constant))
        left_log, left_order = _log_order(left)
        right_log, right_order = _log_order(right)
        log = jnp.where(
            left_order < right_order,
            left_log,
            jnp.where(
                right_order < left_order, right_log, jnp.logaddexp(left_log, right_log)
            ),
        )
        hidden = jnp.isnan(left_log) | jnp.isnan(right_log)  # a NaN must not be
        log = jnp.where(hidden, jnp.nan, log)
        floors = [atom.floor for atom in (*left.powers, *right.powers)]
        floor = None if None in floors else floors[0]  # a sum of norms is one
        # A barrier, or XLA computes the sum anew in every kernel that depends on it.
        log, order = jax.lax.optimization_barrier(
            (log, jnp.minimum(left_order, right_order))
        )
        total = Atom(log, order, floor=floor)
        return shared * Positive(0.0, {total: 1})

    def collapsed(self, most: int) -> Positive:
        """The number with its powers made one atom where they are more than `most`.

        What is inside cannot cancel any more. A running product stays short so, and a
        chain of any depth takes linear time.
        """
        if len(self.powers) <= most:
            return self
        product = Positive(0.0, self.powers)
        log, order = _log_order(product)
        floored = jnp.asarray(product.log(floored_where=1))
        log, order, floored = jax.lax.optimization_barrier((log, order, floored))
        return Positive(self.log_constant, {Atom(log, order, floored=floored): 1})

    def log(self, floored_where: int = 0) -> jax.Array | float:
        """Its log; norms with powers of that sign count as no less than their floor."""
        return sum(
            (
                power * (atom.floored if power * floored_where > 0 else atom.log)
                for atom, power in self.powers.items()
            ),
            self.log_constant,
        )


def number(value: float) -> Positive:
    """A static positive number."""
    return Positive(math.log(value))


def measured(
    value: jax.Array, *, floor: jax.typing.ArrayLike | None = None
) -> Positive:
    """A non-negative scalar array of float32 or wider.

    Zero counts as an infinitesimal whose coefficient is one. What has overflowed counts
    as the largest finite number. NaN stays NaN, and a negative number becomes NaN.

    Args:
      value: of a parameter, its squared norm.
      floor: the least that it counts as where it is divided by; None for none.
    """
    return Positive(0.0, {Atom(*_log_and_order(value), floor=floor): 1})


def share(
    part: Positive, rest: float, *, floor: jax.typing.ArrayLike | None = None
) -> Positive:
    """`part / (part + rest)`, as one atom; of an infinitesimal, of its coefficient.

    Args:
      part: the number.
      rest: a positive number.
      floor: the least that the share counts as where it is divided by; None for none.
    """
    log = part.log()
    if not part.powers:
        return Positive(-math.log1p(rest * math.exp(-log)))
    log = _log_share(jnp.asarray(log), math.log(rest))
    return Positive(0.0, {Atom(log, jnp.zeros_like(log), floor=floor): 1})


# Called for every layer, so compiled: its operations are traced once, not each time.
@jax.jit
def _log_share(log: jax.Array, log_rest: jax.typing.ArrayLike) -> jax.Array:
    # Behind a barrier: else XLA computes it anew for every number it enters.
    return jax.lax.optimization_barrier(-jax.nn.softplus(log_rest - log))


@jax.jit  # as above
def _log_and_order(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    limits = jnp.finfo(value.dtype)
    # Subnormals too: XLA may flush them to zero in `log`.
    is_zero = jnp.abs(value) < limits.tiny
    finite = jnp.minimum(jnp.where(is_zero, 1, value), limits.max)
    return jnp.log(finite), is_zero.astype(value.dtype)


@jax.jit  # as above
def _raised(log: jax.Array, order: jax.Array, floor: jax.typing.ArrayLike) -> jax.Array:
    floor = jnp.asarray(floor, log.dtype)
    # No log of 0, so that the derivative with respect to the floor is finite there.
    lowest = jnp.log(jnp.where(floor == 0, 1, floor))
    raised = jnp.where(floor == 0, log, jnp.maximum(log, lowest))
    return jnp.where(order > 0, lowest, raised)


def _log_order(value: Positive) -> tuple[jax.Array, jax.Array]:
    order = sum((p * atom.order for atom, p in value.powers.items()), 0.0)
    return jnp.asarray(value.log()), jnp.asarray(order)


def evaluate(
    values: Sequence[Positive], dtype: jnp.dtype, *, floored: bool = False
) -> list[jax.Array]:
    """The numbers as finite scalars of `dtype`, within its normal range.

    Of an infinitesimal or its reciprocal the coefficient is returned (see `Atom`).

    Args:
      values: the numbers.
      dtype: float32 or float64.
      floored: whether norms that are divided by count as no less than their floor.
    """
    logs = (value.log(floored_where=-1 if floored else 0) for value in values)
    return [_finite_exp(jnp.asarray(log, dtype)) for log in logs]


@jax.jit  # as above
def _finite_exp(log: jax.Array) -> jax.Array:
    limits = jnp.finfo(log.dtype)
    lowest, highest = math.log(limits.tiny), math.log(limits.max)
    # Half a unit inside, so that rounding in `exp` cannot leave the range.
    return jnp.exp(jnp.clip(log, lowest + 0.5, highest - 0.5))


def stacked(scalars: Sequence[jax.Array]) -> jax.Array:
    """Scalars as a vector, of which every entry is computed once.

    The barriers keep XLA from fusing each scalar into every consumer of the vector,
    which makes compilation quadratic in depth.
    """
    barrier = jax.lax.optimization_barrier
    return barrier(jnp.stack([barrier(scalar) for scalar in scalars]))


def magnitudes(values: Sequence[Positive], dtype: jnp.dtype) -> list[jax.Array]:
    """The numbers as scalars of `dtype`, where an infinitesimal is zero."""
    coefficients = evaluate(values, dtype)
    orders = (_log_order(value)[1] for value in values)
    return [
        jnp.where(order > 0, 0, coefficient).astype(dtype)
        for order, coefficient in zip(orders, coefficients, strict=True)
    ]
