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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# What is computed layer by layer is a call of one of a few jitted functions, and ends
# in a barrier. JAX traces each once. XLA compiles kernels that are equal once, and
# without a barrier it would compute a number anew in every kernel that depends on it.
_once = lax.optimization_barrier
_ROW = 32  # scalars that are gathered by one kernel

# Log and order of smallness. Two scalars: older XLAs fuse a whole recursion into one
# kernel, and what is a vector in between they compute exponentially often.
Pair = tuple[jax.Array, jax.Array]


class Atom:
    """A measured number: the log of its size, and its order of smallness.

    An exact zero (a zero-initialised kernel) is an infinitesimal of order 1 with
    coefficient 1. Products and quotients of zeros then stay finite, and a sum ignores
    the terms of higher order, as it should. Where a number is divided by, `floored`
    stands for it: a norm counts as no less than its floor.

    Of a norm nothing is traced before it is asked for. What cancels costs nothing.
    """

    def __init__(
        self,
        pair: Pair | None = None,
        *,
        value: jax.Array | None = None,
        count: int = 1,
        floor: jax.typing.ArrayLike | None = None,
        floored: Pair | None = None,
    ):
        self._pair = pair
        self._floored = floored
        self.value = value  # what was measured; None for what is made of other atoms
        self.count = count  # what the value is yet to be divided by
        self.floor = floor  # the least that a norm counts as; None for what is no norm

    @functools.cached_property
    def pair(self) -> Pair:
        """Log and order: 0 or, of an exact zero, 1; of products the sum."""
        if self._pair is not None:
            return self._pair
        assert self.value is not None
        return _measured_pair(self.value, 1.0 / self.count)

    @functools.cached_property
    def floored(self) -> Pair:
        """The same where it is divided by."""
        if self._floored is not None:
            return self._floored
        return self.pair if self.floor is None else _raised_pair(self.pair, self.floor)

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
        floors = [atom.floor for atom in (*left.powers, *right.powers)]
        floor = None if None in floors else floors[0]  # a sum of norms is one
        return shared * _made(_sum(_product(left), _product(right)), floor=floor)

    def collapsed(self, most: int) -> Positive:
        """The number with its powers made one atom where they are more than `most`.

        What is inside cannot cancel any more. A running product stays short so, and a
        chain of any depth takes linear time.
        """
        if len(self.powers) <= most:
            return self
        floored = None
        if any(atom.has_floor for atom in self.powers):
            floored = _one(_product(self, floored_where=1))
        return _made(_one(_product(self)), floored=floored)


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
    return Positive(0.0, {Atom(value=_once(value), count=count, floor=floor): 1})


def _made(
    pair: Pair,
    *,
    floor: jax.typing.ArrayLike | None = None,
    floored: Pair | None = None,
) -> Positive:
    """What other numbers make, as an atom of its own."""
    return Positive(0.0, {Atom(pair, floor=floor, floored=floored): 1})


class Packed(NamedTuple):
    """A number as arrays, which a loop can carry."""

    pair: Pair
    floored: Pair  # where it is divided by


# What is less than anything: an infinitesimal of an order that no product reaches.
ABSENT = Positive(0.0, {Atom((np.float32(0), np.float32(1e6))): 1})  # pyright: ignore


def packed(value: Positive, dtype: jnp.dtype) -> Packed:
    """A number as arrays of a dtype; what is inside cannot cancel any more."""
    pair = _one(_product(value))
    has_floor = any(atom.has_floor for atom in value.powers)
    floored = _one(_product(value, floored_where=1)) if has_floor else pair
    return jax.tree.map(lambda part: part.astype(dtype), Packed(pair, floored))


def unpacked(arrays: Packed, *, floor: jax.typing.ArrayLike | None = None) -> Positive:
    """The number again, as one atom; with a floor, sums with it count as norms."""
    return _made(arrays.pair, floor=floor, floored=arrays.floored)


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
    return _made(_share(_product(part), math.log(rest)), floor=floor)


def magnitudes(values: Sequence[Positive]) -> list[jax.Array]:
    """The numbers as float32 scalars, where an infinitesimal is zero."""
    return [_magnitude(_product(value)) for value in values]


def applied(
    function: Callable[..., Sequence[jax.Array]], values: Sequence[Positive | None]
) -> list[Positive]:
    """What a function makes of numbers, each result an atom.

    Args:
      function: of their `magnitudes`; the same object every time, so that it is traced
        once.
      values: the numbers; None is zero.
    """
    products = [None if value is None else _product(value) for value in values]
    return [_made(pair) for pair in _applied(function, products)]


class _Product(NamedTuple):
    """A number as the jitted functions below take it."""

    log_constant: jax.typing.ArrayLike
    powers: Sequence[jax.typing.ArrayLike]
    pairs: Sequence[Pair]


def _product(value: Positive, floored_where: int = 0) -> _Product:
    """Norms with powers of the sign given count as no less than their floor."""
    pairs = [
        atom.floored if power * floored_where > 0 else atom.pair
        for atom, power in value.powers.items()
    ]
    return _Product(value.log_constant, [*value.powers.values()], pairs)


def _log_and_order(of: _Product, beside: Sequence[Pair] = ()) -> Pair:
    """Log and order, in a dtype that serves what stands beside the number as well."""
    pairs = (*of.pairs, *beside)
    dtype = jnp.result_type(jnp.float32, *(log for log, _ in pairs))
    log, order = jnp.asarray(of.log_constant, dtype), jnp.zeros((), dtype)
    for power, (atom_log, atom_order) in zip(of.powers, of.pairs, strict=True):
        log, order = log + power * atom_log, order + power * atom_order
    return log, order


@jax.jit
def _one(product: _Product) -> Pair:
    return _once(_log_and_order(product))


@jax.jit
def _sum(left: _Product, right: _Product) -> Pair:
    """A sum, in which the term of higher order plays no part."""
    left_log, left_order = _log_and_order(left, beside=right.pairs)
    right_log, right_order = _log_and_order(right, beside=left.pairs)
    log = jnp.logaddexp(left_log, right_log)
    log = jnp.where(right_order < left_order, right_log, log)
    log = jnp.where(left_order < right_order, left_log, log)
    hidden = jnp.isnan(left_log) | jnp.isnan(right_log)  # it must not be
    log = jnp.where(hidden, jnp.nan, log)
    return _once((log, jnp.minimum(left_order, right_order)))


@jax.jit
def _share(part: _Product, log_rest: jax.typing.ArrayLike) -> Pair:
    log = -jax.nn.softplus(log_rest - _log_and_order(part)[0])
    return _once((log, jnp.zeros_like(log)))


@jax.jit
def _magnitude(product: _Product) -> jax.Array:
    log, order = _log_and_order(product)
    return _once(jnp.where(order > 0, 0, finite_exp(log.astype(jnp.float32))))


@functools.partial(jax.jit, static_argnums=0)
def _applied(
    function: Callable[..., Sequence[jax.Array]], products: Sequence[_Product | None]
) -> list[Pair]:
    results = function(
        *(jnp.float32(0) if p is None else _magnitude(p) for p in products)
    )
    return [_measured_pair(result, 1.0) for result in _once(results)]


@jax.jit
def _measured_pair(value: jax.Array, factor: jax.typing.ArrayLike) -> Pair:
    limits = jnp.finfo(value.dtype)
    return _once(_measured(value * factor, limits.tiny, limits.max))


@jax.jit
def _raised_pair(pair: Pair, floor: jax.typing.ArrayLike) -> Pair:
    return _once(_raised(*pair, floor)), pair[1]


def _measured(
    value: jax.Array, tiny: jax.typing.ArrayLike, largest: jax.typing.ArrayLike
) -> Pair:
    """Logs and orders, elementwise."""
    # Subnormals too: XLA may flush them to zero in `log`.
    is_zero = jnp.abs(value) < tiny
    finite = jnp.minimum(jnp.where(is_zero, 1, value), largest)
    return jnp.log(finite), is_zero.astype(value.dtype)


def _raised(log: jax.Array, order: jax.Array, floor: jax.typing.ArrayLike) -> jax.Array:
    """The logs of what counts as no less than the floor, elementwise."""
    floor = jnp.asarray(floor, log.dtype)
    # No log of 0, so that the derivative with respect to the floor is finite there.
    lowest = jnp.log(jnp.where(floor == 0, 1, floor))
    raised = jnp.where(floor == 0, log, jnp.maximum(log, lowest))
    return jnp.where(order > 0, lowest, raised)


def evaluate(values: Sequence[Positive], dtype: jnp.dtype) -> jax.Array:
    """The numbers as a vector of `dtype`, finite and within its normal range.

    Of an infinitesimal or its reciprocal the coefficient is returned (see `Atom`).
    """
    return finite_exp(log_vector(values, dtype))


def log_vector(
    values: Sequence[Positive], dtype: jnp.dtype, *, floored: bool = False
) -> jax.Array:
    """The logs of the numbers as a vector, see `evaluate`.

    All at once: a few operations on vectors, whatever the depth. XLA would compile as
    many scalars one by one.
    """
    # Columns: norms, norms raised to their floor, and what other numbers have made.
    groups: tuple[dict[Atom, int], ...] = ({}, {}, {}, {})

    def group(atom: Atom, power: float) -> int:
        """0 and 1 for norms, 2 and 3 for others; odd where the floor counts."""
        return 2 * (atom.value is None) + (floored and power < 0 and atom.has_floor)

    for value in values:
        for atom, power in value.powers.items():
            groups[group(atom, power)].setdefault(atom, 0)
    norms, raised, made, made_raised = groups
    parts = [jnp.zeros(1, dtype)]  # for numbers with fewer powers than others
    if norms:
        parts.append(_log_norms([*norms], dtype)[0])
    if raised:
        parts.append(_raised(*_log_norms([*raised], dtype), _floors([*raised], dtype)))
    if made or made_raised:
        pairs = [atom.pair for atom in made] + [atom.floored for atom in made_raised]
        parts.append(stacked([log.astype(dtype) for log, _ in pairs]))
    place = 0
    for atoms in groups:
        for atom in atoms:
            atoms[atom] = place = place + 1
    most = max((len(value.powers) for value in values), default=0)
    places, powers = np.zeros((2, len(values), most))
    for row, value in enumerate(values):
        for column, (atom, power) in enumerate(value.powers.items()):
            places[row, column] = groups[group(atom, power)][atom]
            powers[row, column] = power
    table = jnp.concatenate(parts)
    logs = table.at[places.astype(np.int32)].get(mode="promise_in_bounds")
    constants = jnp.asarray(np.array([v.log_constant for v in values]), dtype)
    return constants + jnp.sum(jnp.asarray(powers, dtype) * logs, axis=1)


def _floors(atoms: Sequence[Atom], dtype: jnp.dtype) -> jax.Array:
    first = atoms[0].floor
    if all(atom.floor is first for atom in atoms):
        return jnp.asarray(first, dtype)
    return jnp.stack([jnp.asarray(atom.floor, dtype) for atom in atoms])


def _log_norms(atoms: Sequence[Atom], dtype: jnp.dtype) -> Pair:
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
    return _measured(vector * factors, tiny, largest)


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
    width = min(_ROW, count)
    padded = [*scalars, *[scalars[-1]] * (-count % width)]
    rows = [_row(*padded[i : i + width]) for i in range(0, len(padded), width)]
    return _once(lax.concatenate(rows, 0)[:count])


@jax.jit
def _row(*scalars: jax.Array) -> jax.Array:
    return _once(jnp.stack(scalars))


def separate(vector: jax.Array) -> list[jax.Array]:
    """The entries of a vector as scalars, which all XLA kernels take alike.

    A slice at a static place is a kernel of its own for every place, compiled one by
    one, and so is whatever XLA fuses it into. Here the place is an operand, and its
    value lies behind a barrier.
    """
    places = _once([np.int32(place) for place in range(vector.shape[0])])
    return [_entry(vector, place) for place in places]


@jax.jit
def _entry(vector: jax.Array, place: jax.Array) -> jax.Array:
    return _once(lax.dynamic_index_in_dim(vector, place, keepdims=False))
