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

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

# Beyond this many terms a number, sums are traced as one matrix-vector product: a plain
# chain (no normalisation) has one term for each layer above, which is quadratic.
_MAX_TERMS_EACH = 8


class Atom:
    """A measured number: the log of its size, and its order of smallness.

    An exact zero (a zero-initialised kernel) is an infinitesimal of order 1 with
    coefficient 1. Products and quotients of zeros then stay finite, and a sum ignores
    the terms of higher order, as it should. Only norms are held above a floor.
    """

    __slots__ = ("is_norm", "log", "order")

    def __init__(self, log: jax.Array, order: jax.Array, *, is_norm: bool):
        self.log = log
        self.order = order
        self.is_norm = is_norm


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
        total = Atom(
            log,
            jnp.minimum(left_order, right_order),
            is_norm=all(atom.is_norm for atom in (*left.powers, *right.powers)),
        )
        return shared * Positive(0.0, {total: 1})


def number(value: float) -> Positive:
    """A static positive number."""
    return Positive(math.log(value))


def measured(value: jax.Array, *, is_norm: bool = False) -> Positive:
    """A non-negative scalar array of float32 or wider; of a parameter the squared norm.

    Zero counts as an infinitesimal whose coefficient is one; what has overflowed counts
    as the largest finite number; NaN stays NaN, and a negative number becomes one.
    """
    return Positive(0.0, {Atom(*_log_and_order(value), is_norm=is_norm): 1})


# Called for every layer, so compiled: its operations are traced once, not each time.
@jax.jit
def _log_and_order(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    limits = jnp.finfo(value.dtype)
    # Subnormals too: XLA may flush them to zero in `log`.
    is_zero = jnp.abs(value) < limits.tiny
    finite = jnp.minimum(jnp.where(is_zero, 1, value), limits.max)
    return jnp.log(finite), is_zero.astype(value.dtype)


def _log_order(value: Positive) -> tuple[jax.Array, jax.Array]:
    log = sum((p * atom.log for atom, p in value.powers.items()), value.log_constant)
    order = sum((p * atom.order for atom, p in value.powers.items()), 0.0)
    return jnp.asarray(log), jnp.asarray(order)


def evaluate(
    values: Sequence[Positive],
    dtype: jnp.dtype,
    *,
    floor: jax.typing.ArrayLike | None = None,
) -> list[jax.Array]:
    """The numbers as finite scalars of `dtype`, within its normal range.

    Of an infinitesimal or its reciprocal the coefficient is returned (see `Atom`). A
    norm below `floor` counts as `floor` where it is divided by.
    """
    if sum(len(value.powers) for value in values) <= _MAX_TERMS_EACH * len(values):
        raised = functools.cache(lambda atom: _raised(atom, floor).astype(dtype))
        logs = [_floored_log(value, dtype, raised) for value in values]
    else:
        logs = _logs_as_matrix_product(values, dtype, floor)
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


def _unstacked(vector: jax.Array) -> list[jax.Array]:
    """The entries of a vector as scalars.

    In two steps: XLA takes six times as long to compile a thousand slices of one array.
    """
    parts = jnp.split(vector, np.arange(32, vector.size, 32))
    return [
        jnp.squeeze(entry, 0)
        for part in jax.lax.optimization_barrier(parts)
        for entry in jnp.split(part, part.size)
    ]


def magnitudes(values: Sequence[Positive], dtype: jnp.dtype) -> list[jax.Array]:
    """The numbers as scalars of `dtype`, where an infinitesimal is zero."""
    coefficients = evaluate(values, dtype)
    orders = (_log_order(value)[1] for value in values)
    return [
        jnp.where(order > 0, 0, coefficient).astype(dtype)
        for order, coefficient in zip(orders, coefficients, strict=True)
    ]


def _raised(atom: Atom, floor: jax.typing.ArrayLike | None) -> jax.Array:
    """The log of an atom, of a norm no less than that of the floor."""
    if floor is None or not atom.is_norm:
        return atom.log
    lowest = jnp.log(jnp.asarray(floor, atom.log.dtype))  # -inf where there is none
    zero = jnp.where(lowest > -jnp.inf, lowest, 0)
    return jnp.where(atom.order > 0, zero, jnp.maximum(atom.log, lowest))


def _floored_log(
    value: Positive, dtype: jnp.dtype, raised: Callable[[Atom], jax.Array]
) -> jax.Array | float:
    terms = (
        power * (atom.log.astype(dtype) if power > 0 else raised(atom))
        for atom, power in value.powers.items()
    )
    return sum(terms, value.log_constant)


def _logs_as_matrix_product(
    values: Sequence[Positive],
    dtype: jnp.dtype,
    floor: jax.typing.ArrayLike | None,
) -> list[jax.Array]:
    """All logs as `powers @ atom_logs + constants`, for numbers of many terms."""
    column: dict[tuple[Atom, bool], int] = {}
    for value in values:
        for atom, power in value.powers.items():
            column.setdefault((atom, power > 0), len(column))
    powers = np.zeros((len(values), len(column)), dtype)
    for row, value in enumerate(values):
        for atom, power in value.powers.items():
            powers[row, column[atom, power > 0]] = power
    constants = np.asarray([value.log_constant for value in values], dtype)
    atoms = stacked(
        [
            (atom.log if positive else _raised(atom, floor)).astype(dtype)
            for atom, positive in column
        ]
    )
    logs = jnp.dot(powers, atoms, precision=jax.lax.Precision.HIGHEST) + constants
    return _unstacked(logs)
