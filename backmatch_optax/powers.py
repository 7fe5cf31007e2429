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
from jax import lax

_inlined = functools.partial(jax.jit, inline=True)  # traced once, and no call in XLA
_once = lax.optimization_barrier  # what has several uses is not computed for each
_ROW = 32  # scalars that are gathered by one kernel


class Atom:
    """A measured number: the log of its size, and its order of smallness.

    An exact zero (a zero-initialised kernel) is an infinitesimal of order 1 with
    coefficient 1. Products and quotients of zeros then stay finite, and a sum ignores
    the terms of higher order, as it should. Where a number is divided by, `floored`
    stands for its log: a norm counts as no less than its floor.

    Nothing is traced before it is asked for. What cancels costs nothing.
    """

    def __init__(
        self,
        log_and_order: Callable[[], tuple[jax.Array, jax.Array]],
        *,
        value: jax.Array | None = None,
        count: int = 1,
        floor: jax.typing.ArrayLike | None = None,
        floored: Callable[[], jax.Array] | None = None,
    ):
        self._log_and_order = log_and_order
        self._floored = floored
        self.value = value  # what was measured; None for what is made of other atoms
        self.count = count  # what the value is yet to be divided by
        self.floor = floor  # the least that a norm counts as; None for what is no norm

    @functools.cached_property
    def log_and_order(self) -> tuple[jax.Array, jax.Array]:
        """Both as scalars."""
        return self._log_and_order()

    @property
    def log(self) -> jax.Array:
        """The log of its size."""
        return self.log_and_order[0]

    @property
    def order(self) -> jax.Array:
        """0 or, of an exact zero, 1; of products the sum."""
        return self.log_and_order[1]

    @functools.cached_property
    def floored(self) -> jax.Array:
        """The log where it is divided by."""
        if self._floored is not None:
            return self._floored()
        if self.floor is None:
            return self.log
        return _raised(*self.log_and_order, self.floor)

    @property
    def has_floor(self) -> bool:
        """Whether it may count as more where it is divided by."""
        return self.floor is not None or self._floored is not None


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
        dtype = jnp.promote_types(left_log.dtype, right_log.dtype)
        terms = (left_log, left_order, right_log, right_order)
        log_and_order = _log_of_sum(*(term.astype(dtype) for term in terms))
        floors = [atom.floor for atom in (*left.powers, *right.powers)]
        floor = None if None in floors else floors[0]  # a sum of norms is one
        return shared * _computed(*log_and_order, floor=floor)

    def collapsed(self, most: int) -> Positive:
        """The number with its powers made one atom where they are more than `most`.

        What is inside cannot cancel any more. A running product stays short so, and a
        chain of any depth takes linear time.
        """
        if len(self.powers) <= most:
            return self
        product = Positive(0.0, self.powers)
        floored = None
        if any(atom.has_floor for atom in self.powers):
            floored = jnp.asarray(product.log(floored_where=1))
        log, order = _log_order(product)
        return Positive(self.log_constant) * _computed(log, order, floored=floored)

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
    value: jax.Array,
    *,
    count: int = 1,
    floor: jax.typing.ArrayLike | None = None,
) -> Positive:
    """A non-negative scalar array of float32 or wider, divided by a count.

    Zero counts as an infinitesimal whose coefficient is one. What has overflowed counts
    as the largest finite number. NaN stays NaN, and a negative number becomes NaN.

    Args:
      value: of a parameter, its squared norm.
      count: what it is divided by.
      floor: the least that it counts as where it is divided by; None for none.
    """

    def log_and_order() -> tuple[jax.Array, jax.Array]:
        limits = jnp.finfo(value.dtype)
        return _log_and_order(value, 1.0 / count, limits.tiny, limits.max)

    value = _once(value)
    atom = Atom(log_and_order, value=value, count=count, floor=floor)
    return Positive(0.0, {atom: 1})


def _computed(
    log: jax.Array,
    order: jax.Array,
    *,
    floor: jax.typing.ArrayLike | None = None,
    floored: jax.Array | None = None,
) -> Positive:
    """What other numbers make, as an atom of its own."""
    log, order = _once((log, order))  # not by each of the many numbers that use them
    later = None
    if floored is not None:
        floored = _once(floored)
        later = functools.partial(lambda known: known, floored)
    return Positive(0.0, {Atom(lambda: (log, order), floor=floor, floored=later): 1})


def share(
    part: Positive, rest: float, *, floor: jax.typing.ArrayLike | None = None
) -> Positive:
    """`part / (part + rest)`, as one atom; of an infinitesimal, of its coefficient.

    Args:
      part: the number.
      rest: a positive number.
      floor: the least that the share counts as where it is divided by; None for none.
    """
    if not part.powers:
        return Positive(-math.log1p(rest * math.exp(-part.log_constant)))

    log = _log_share(jnp.asarray(part.log()), math.log(rest))
    return _computed(log, jnp.zeros_like(log), floor=floor)


@_inlined
def _log_share(log: jax.Array, log_rest: jax.typing.ArrayLike) -> jax.Array:
    excess = log_rest - log  # minus softplus of it
    return -lax.max(excess, lax.full_like(log, 0)) - lax.log1p(
        lax.exp(-lax.abs(excess))
    )


@_inlined
def _log_and_order(
    value: jax.Array,
    factor: jax.typing.ArrayLike,
    tiny: jax.typing.ArrayLike,
    largest: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Elementwise, so that it serves a scalar and a vector of them."""
    value = value * factor
    # Subnormals too: XLA may flush them to zero in `log`.
    is_zero = lax.abs(value) < tiny
    finite = lax.select(is_zero, lax.full_like(value, 1), value)
    finite = lax.min(finite, lax.full_like(value, 0) + largest)
    return lax.log(finite), is_zero.astype(value.dtype)


@_inlined
def _raised(log: jax.Array, order: jax.Array, floor: jax.typing.ArrayLike) -> jax.Array:
    """The log of what counts as no less than the floor; elementwise too."""
    floor = jnp.broadcast_to(jnp.asarray(floor, log.dtype), log.shape)
    # No log of 0, so that the derivative with respect to the floor is finite there.
    one = lax.full_like(floor, 1)
    lowest = lax.log(lax.select(floor == 0, one, floor))
    raised = lax.select(floor == 0, log, lax.max(log, lowest))
    return lax.select(order > 0, lowest, raised)


@_inlined
def _log_of_sum(
    left: jax.Array, left_order: jax.Array, right: jax.Array, right_order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log and order of a sum, in which the term of higher order plays no part."""
    total = lax.max(left, right) + lax.log1p(lax.exp(-lax.abs(left - right)))
    total = lax.select(right_order < left_order, right, total)
    total = lax.select(left_order < right_order, left, total)
    hidden = (left != left) | (right != right)  # a NaN must not be
    total = lax.select(hidden, lax.full_like(total, jnp.nan), total)
    return total, lax.min(left_order, right_order)


def _log_order(value: Positive) -> tuple[jax.Array, jax.Array]:
    order = sum((p * atom.order for atom, p in value.powers.items()), 0.0)
    return jnp.asarray(value.log()), jnp.asarray(order)


def evaluate(
    values: Sequence[Positive], dtype: jnp.dtype, *, floored: bool = False
) -> jax.Array:
    """The numbers as a vector of `dtype`, finite and within its normal range.

    Of an infinitesimal or its reciprocal the coefficient is returned (see `Atom`).

    Args:
      values: the numbers.
      dtype: float32 or float64.
      floored: whether norms that are divided by count as no less than their floor.
    """
    return finite_exp(log_vector(values, dtype, floored=floored))


def log_vector(
    values: Sequence[Positive], dtype: jnp.dtype, *, floored: bool = False
) -> jax.Array:
    """The logs of the numbers as a vector, see `evaluate`.

    All at once: a few operations on vectors, whatever the depth. XLA would compile as
    many scalars one by one.
    """
    raised = [
        [floored and power < 0 and atom.has_floor for atom, power in v.powers.items()]
        for v in values
    ]
    columns: dict[tuple[Atom, bool], int] = {}
    for value, flags in zip(values, raised, strict=True):
        columns.update(dict.fromkeys(zip(value.powers, flags, strict=True), 0))
    # Sorted by how they are computed: norms, norms raised to their floor, and others.
    plain = [atom for atom, flag in columns if atom.value is not None and not flag]
    lifted = [
        atom
        for atom, flag in columns
        if atom.value is not None and flag and atom.floor is not None
    ]
    norms = [(atom, False) for atom in plain] + [(atom, True) for atom in lifted]
    others = [column for column in columns if column[0].value is None]
    columns = {column: place for place, column in enumerate([*norms, *others])}
    parts = []
    if plain:
        parts.append(_log_norms(plain, dtype)[0])
    if lifted:
        floors = [jnp.asarray(atom.floor, dtype) for atom in lifted]
        same = all(atom.floor is lifted[0].floor for atom in lifted)
        floor = floors[0] if same else jnp.stack(floors)
        parts.append(_raised(*_log_norms(lifted, dtype), floor))
    if others:
        logs = [atom.floored if flag else atom.log for atom, flag in others]
        parts.append(stacked([log.astype(dtype) for log in logs]))
    constants = jnp.asarray(np.array([v.log_constant for v in values]), dtype)
    if not parts:
        return constants
    # What a number has fewer powers than others, it takes of a zero at the end.
    most = max(len(value.powers) for value in values)
    places = np.full((len(values), most), len(columns))
    powers = np.zeros((len(values), most))
    for row, (value, flags) in enumerate(zip(values, raised, strict=True)):
        for column, (atom, power) in enumerate(value.powers.items()):
            places[row, column] = columns[atom, flags[column]]
            powers[row, column] = power
    table = jnp.concatenate([*parts, jnp.zeros(1, dtype)])
    logs = table.at[places].get(mode="promise_in_bounds")
    return constants + jnp.sum(jnp.asarray(powers, dtype) * logs, axis=1)


def _log_norms(atoms: Sequence[Atom], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Logs and orders of measured numbers, as vectors."""
    values = [atom.value for atom in atoms if atom.value is not None]
    limits = [jnp.finfo(value.dtype) for value in values]
    factors, tiny, largest = (
        jnp.asarray(np.array(figures), dtype)
        for figures in (
            [1.0 / atom.count for atom in atoms],
            [float(limit.tiny) for limit in limits],
            [float(limit.max) for limit in limits],
        )
    )
    vector = stacked([value.astype(dtype) for value in values])
    return _log_and_order(vector, factors, tiny, largest)


def finite_exp(log: jax.Array) -> jax.Array:
    """The exponential, held within the normal range of its dtype."""
    limits = jnp.finfo(log.dtype)
    lowest, highest = math.log(limits.tiny), math.log(limits.max)
    # Half a unit inside, so that rounding in `exp` cannot leave the range.
    return jnp.exp(jnp.clip(log, lowest + 0.5, highest - 0.5))


def stacked(scalars: Sequence[jax.Array]) -> jax.Array:
    """Scalars as a vector, of which every entry is computed once.

    In rows, each gathered by the same small kernel: one with a thousand operands takes
    long to compile. The barriers keep XLA from fusing each scalar into every consumer
    of the vector, which makes compilation quadratic in depth.
    """
    count = len(scalars)
    padded = [*scalars, *[scalars[-1]] * (-count % min(_ROW, count))]
    width = min(_ROW, count)
    rows = [_row(*padded[i : i + width]) for i in range(0, len(padded), width)]
    return _once(lax.reshape(lax.concatenate(rows, 0), (len(padded),))[:count])


@_inlined
def _row(*scalars: jax.Array) -> jax.Array:
    return _once(lax.concatenate([lax.reshape(x, (1, 1)) for x in scalars], 1))


def separate(vector: jax.Array) -> list[jax.Array]:
    """The entries of a vector as scalars, which all XLA kernels take alike.

    A slice at a static place is a kernel of its own for every place, compiled one by
    one, and so is whatever XLA fuses it into. Here the place is an operand.
    """
    return [_entry(vector, place) for place in _opaque_places(vector.shape[0])]


@_inlined
def _entry(vector: jax.Array, place: jax.Array) -> jax.Array:
    entry = lax.dynamic_slice(vector, (place,), (1,), allow_negative_indices=False)
    return _once(lax.reshape(entry, ()))


def _opaque_places(count: int) -> Sequence[jax.Array]:
    """The numbers from 0 as scalars whose values XLA does not see."""
    return _once([np.int32(place) for place in range(count)])


def magnitudes(values: Sequence[Positive], dtype: jnp.dtype) -> list[jax.Array]:
    """The numbers as scalars of `dtype`, where an infinitesimal is zero."""
    found = []
    for value in values:
        log, order = _log_order(value)
        coefficient = finite_exp(log.astype(dtype))
        found.append(lax.select(order > 0, jnp.zeros_like(coefficient), coefficient))
    return found
