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

What does not cancel is an atom of its own: sums, long products, what integrals make of
numbers. Of these nothing is traced before the numbers are asked for. Then a loop makes
all of them, a few in a turn, so that the program is no longer for a thousand layers
than for ten.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from backmatch_optax.numerics import wide

# Without a barrier XLA would compute a number anew in every kernel that depends on it.
_once = lax.optimization_barrier
_ROW = 32  # scalars that are gathered by one kernel
_LANES = 8  # the most sums, products and shares that are made in one turn

Function = Callable[..., Sequence[jax.Array]]
_ages = itertools.count()


@dataclasses.dataclass(eq=False)
class Atom:
    """A measured number, or one that others make.

    An exact zero (a zero-initialised kernel) is an infinitesimal of order 1 with
    coefficient 1. Products and quotients of zeros then stay finite, and a sum ignores
    the terms of higher order, as it should. Where a number is divided by, a norm counts
    as no less than its floor, which is the same for all that meet.
    """

    dtype: jnp.dtype
    floor: jax.typing.ArrayLike | None = None  # None for what is no norm
    value: jax.Array | None = None  # what was measured
    count: int = 1  # what the value is yet to be divided by
    made: _Made | None = None  # what it comes of
    result: int = 0  # which of the results it is
    known: tuple[Any, int] | None = None  # once it is: a table and its row


@dataclasses.dataclass(eq=False)
class _Made:
    """What is made of numbers, all of them older."""

    kind: int | Function  # one of the three below, or a function of `magnitudes`
    parts: Sequence[Positive | None]  # None is zero
    floor: jax.typing.ArrayLike | None = None
    age: int = dataclasses.field(default_factory=lambda: next(_ages))

    def number(self, result: int = 0) -> Positive:
        """A result, as an atom."""
        dtype = wide(*{atom.dtype for part in self.known for atom in part.powers})
        atom = Atom(dtype, floor=self.floor, made=self, result=result)
        return Positive(0.0, {atom: 1})

    @property
    def known(self) -> list[Positive]:
        return [part for part in self.parts if part is not None]

    @property
    def branch(self) -> tuple[Function, tuple[bool, ...]] | None:
        """A function, and which of its arguments are not zero."""
        if not callable(self.kind):
            return None
        return self.kind, tuple(part is not None for part in self.parts)


_PRODUCT, _SUM, _SHARE = range(3)  # `a`, `a + b`, `a / (a + b)`


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
        return shared * _Made(_SUM, [left, right], floor).number()

    def collapsed(self, most: int) -> Positive:
        """The number with its powers made one atom where they are more than `most`.

        What is inside cannot cancel any more. A running product stays short so, and a
        chain of any depth takes linear time.
        """
        return self if len(self.powers) <= most else _Made(_PRODUCT, [self]).number()


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
    return Positive(0.0, {Atom(value.dtype, floor, _once(value), count): 1})


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
    return _Made(_SHARE, [part, number(rest)], floor).number()


def applied(function: Function, values: Sequence[Positive | None]) -> list[Positive]:
    """What a function makes of numbers, each result an atom.

    Args:
      function: of their `magnitudes`; the same object every time, so that it is
        compiled once.
      values: the numbers; None is zero.
    """
    made = _Made(function, values)
    return [made.number(result) for result in range(_count(function, len(values)))]


@functools.cache
def _count(function: Function, arguments: int) -> int:
    """How many results a function has."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return len(jax.eval_shape(function, *[scalar] * arguments))


# What is less than anything: an infinitesimal of an order that no product reaches.
_NEVER = np.array([[0, 1e6, 0]], np.float32)
ABSENT = Positive(0.0, {Atom(_NEVER.dtype, known=(_NEVER, 0)): 1})


def packed(value: Positive, dtype: jnp.dtype) -> jax.Array:
    """A number as a row of `_table`, which a loop can carry: nothing cancels inside."""
    return _rows_of([value])[0].astype(dtype)


def unpacked(row: jax.Array, *, floor: jax.typing.ArrayLike | None = None) -> Positive:
    """The number again, as one atom; with a floor, sums with it count as norms."""
    atom = Atom(row.dtype, floor, known=(row[None], 0))
    return Positive(0.0, {atom: 1})


def magnitudes(values: Sequence[Positive]) -> list[jax.Array]:
    """The numbers as float32 scalars, where an infinitesimal is zero."""
    return separate(_magnitudes(_rows_of(values)))


def evaluate(values: Sequence[Positive], dtype: jnp.dtype) -> jax.Array:
    """The numbers as a vector of `dtype`, finite and within its normal range.

    Of an infinitesimal or its reciprocal the coefficient is returned (see `Atom`).
    """
    return finite_exp(log_vector(values, dtype))


def log_vector(
    values: Sequence[Positive], dtype: jnp.dtype, *, floored: bool = False
) -> jax.Array:
    """The logs of the numbers as a vector, see `evaluate`.

    Args:
      values: the numbers.
      dtype: that of the logs.
      floored: whether norms that they are divided by count as no less than their floor.
    """
    table, rows = _table(values)
    places, powers, constants = _products(values, rows, dtype)
    columns = np.where((powers < 0) & floored, 2, 0)
    logs = table.at[places, columns].get(mode="promise_in_bounds").astype(dtype)
    return jnp.sum(powers * logs, axis=1) + constants


class _Products(NamedTuple):
    """Numbers as powers of the rows of a table; or those of all turns of a loop."""

    rows: np.ndarray  # shape=(..., products, powers); 0 where there are fewer powers
    powers: np.ndarray  # of the same shape
    constants: np.ndarray  # shape=(..., products): logs


class _Turns(NamedTuple):
    """What the turns of a loop make: a few numbers, and the results of a function."""

    starts: np.ndarray  # shape=(turns,): the first row of the results
    kinds: np.ndarray  # shape=(turns, lanes)
    has_floor: np.ndarray  # shape=(turns, lanes)
    branches: np.ndarray  # shape=(turns,): which function, from 1; 0 for none
    products: _Products  # left parts of each lane, right parts, arguments


def _table(values: Sequence[Positive]) -> tuple[jax.Array, dict[Atom, int]]:
    """All atoms that are in some numbers, as rows of a table.

    Returns:
      An array of shape (rows, 3): log, order, and the log where it is divided by. And
      the row of each atom; row 0 stands for 1.
    """
    atoms, made = _needed(values)
    dtype = wide(*{atom.dtype for atom in atoms})
    floor = next((atom.floor for atom in atoms if atom.floor is not None), 0.0)
    norms = [atom for atom in atoms if atom.value is not None and atom.known is None]
    others = {atom: atom.known for atom in atoms if atom.known is not None}
    parts = [jnp.zeros((1, 3), dtype)]  # row 0
    if norms:
        parts.append(_rows_of_norms(norms, floor, dtype))
    parts += [table[row : row + 1] for table, row in others.values()]
    rows = {atom: row for row, atom in enumerate([*norms, *others], start=1)}
    table = jnp.concatenate([part.astype(dtype) for part in parts])
    if made:
        table = _with_made(table, rows, atoms, made, floor)
    for atom in atoms:
        if atom.known is None:
            atom.known = table, rows[atom]
    return table, rows


def _needed(values: Sequence[Positive]) -> tuple[list[Atom], list[_Made]]:
    """The atoms in numbers and in what these are made of; what is yet to be made."""
    atoms: dict[Atom, None] = {}
    made: dict[_Made, None] = {}
    stack = [*values]
    while stack:
        for atom in stack.pop().powers:
            if atom not in atoms and atom.known is None and atom.made is not None:
                stack += atom.made.known * (atom.made not in made)
                made[atom.made] = None
            atoms[atom] = None
    return [*atoms], sorted(made, key=lambda one: one.age)


def _with_made(
    table: jax.Array,
    rows: dict[Atom, int],
    atoms: Sequence[Atom],
    made: Sequence[_Made],
    floor: jax.typing.ArrayLike,
) -> jax.Array:
    """The table with all that is made below; adds its rows to those of the atoms."""
    branches = [*dict.fromkeys(one.branch for one in made if one.branch)]
    place_of: dict[Any, int] = {branch: place for place, branch in enumerate(branches)}
    lanes = min(_LANES, sum(one.branch is None for one in made))
    results = max((_count(f, len(given)) for f, given in branches), default=0)
    turns, places = _scheduled(made, lanes)
    height = lanes + results  # rows of a turn
    for atom in atoms:
        if atom.made in places:
            turn, place = places[atom.made]
            rows[atom] = len(table) + turn * height + place + atom.result

    arguments = max((sum(given) for _, given in branches), default=0)
    shape = len(turns), 2 * lanes + arguments
    parts = np.full(shape, None)
    kinds, has_floor = np.zeros((2, len(turns), lanes), np.int32)
    chosen = np.zeros(len(turns), np.int32)
    for turn, (in_lanes, called) in enumerate(turns):
        for lane, one in enumerate(in_lanes):
            parts[turn, lane : lane + lanes * len(one.parts) : lanes] = one.parts
            assert not callable(one.kind)
            kinds[turn, lane], has_floor[turn, lane] = one.kind, one.floor is not None
        for one in called:
            parts[turn, 2 * lanes : 2 * lanes + len(one.known)] = one.known
            chosen[turn] = 1 + place_of[one.branch]
    products = _products([*parts.flat], rows, table.dtype)
    products = _Products(
        *(array.reshape(*shape, *array.shape[1:]) for array in products)
    )
    starts = len(table) + np.arange(len(turns), dtype=np.int32) * height
    space = jnp.zeros((len(turns) * height, 3), table.dtype)
    return _looped(
        tuple(branches),
        jnp.concatenate([table, space]),
        _Turns(starts, kinds, has_floor > 0, chosen, products),
        floor,
    )


def _scheduled(
    made: Sequence[_Made], lanes: int
) -> tuple[list[tuple[list[_Made], list[_Made]]], dict[Any, tuple[int, int]]]:
    """In which turn each is made: as soon as what it needs is, and there is room.

    Returns:
      Of each turn what its lanes make and, one or none, which function it calls. And of
      all that is made the turn, and the place of the first result in it.
    """
    turns: list[tuple[list[_Made], list[_Made]]] = []
    places: dict[Any, tuple[int, int]] = {}
    for one in made:
        needs = (places.get(a.made) for part in one.known for a in part.powers)
        turn = max((place[0] + 1 for place in needs if place), default=0)
        calls = one.branch is not None
        while turn < len(turns) and len(turns[turn][calls]) == (1 if calls else lanes):
            turn += 1
        if turn == len(turns):
            turns.append(([], []))
        places[one] = turn, lanes if calls else len(turns[turn][0])
        turns[turn][calls].append(one)
    return turns, places


def _products(
    values: Sequence[Positive | None], rows: Mapping[Atom, int], dtype: jnp.dtype
) -> _Products:
    """Numbers as powers of rows; None is 1."""
    most = max((len(value.powers) for value in values if value), default=0)
    places = np.zeros((len(values), most), np.int32)
    powers, constants = np.zeros(places.shape, dtype), np.zeros(len(values), dtype)
    for index, value in enumerate(values):
        if value is not None:
            count = len(value.powers)
            places[index, :count] = [rows[atom] for atom in value.powers]
            powers[index, :count] = [*value.powers.values()]
            constants[index] = value.log_constant
    return _Products(places, powers, constants)


@functools.partial(jax.jit, static_argnums=0)
def _looped(
    branches: Sequence[tuple[Function, Sequence[bool]]],
    table: jax.Array,
    turns: _Turns,
    floor: jax.typing.ArrayLike,
) -> jax.Array:
    """The table, turn by turn filled with what is made of the rows above."""
    lanes = turns.kinds.shape[1]
    results = max((_count(f, len(given)) for f, given in branches), default=0)

    def called(
        function: Function, given: Sequence[bool], sizes: jax.Array
    ) -> jax.Array:
        known = iter(sizes)
        found = function(*(next(known) if g else jnp.float32(0) for g in given))
        return jnp.zeros(results).at[: len(found)].set(jnp.stack(_once(found)))

    functions = [lambda _: jnp.zeros(results)]
    functions += [functools.partial(called, *branch) for branch in branches]

    def turned(table: jax.Array, turn: _Turns) -> tuple[jax.Array, None]:
        left, right, sizes = jnp.split(
            _rows_of_products(turn.products, table), [lanes, 2 * lanes]
        )
        rows = _in_lanes(turn, left, right, floor)
        if branches:
            found = lax.switch(turn.branches, functions, _magnitudes(sizes))
            limits = jnp.finfo(found.dtype)
            log, order = _measured(found, limits.tiny, limits.max)
            found = jnp.stack([log, order, log], axis=-1).astype(table.dtype)
            rows = jnp.concatenate([rows, found])
        table = lax.dynamic_update_slice_in_dim(table, _once(rows), turn.starts, axis=0)
        return table, None

    return lax.scan(turned, table, turns)[0]


def _in_lanes(turn: _Turns, left: jax.Array, right: jax.Array, floor: Any) -> jax.Array:
    """Products, sums and shares of a left and a right part each."""
    kinds, log, order = turn.kinds, left[:, 0], left[:, 1]
    right_log, right_order = right[:, 0], right[:, 1]
    total = jnp.logaddexp(log, right_log)
    # A term of higher order plays no part, unless it is NaN, which must not be hidden.
    total = jnp.where(right_order < order, right_log, total)
    total = jnp.where(order < right_order, log, total)
    total = jnp.where(jnp.isnan(log) | jnp.isnan(right_log), jnp.nan, total)
    kept = -jax.nn.softplus(right_log - log)
    log = jnp.select([kinds == _SUM, kinds == _SHARE], [total, kept], log)
    of_sum = jnp.minimum(order, right_order)
    order = jnp.select([kinds == _SUM, kinds == _SHARE], [of_sum, 0], order)
    divisor = jnp.where(turn.has_floor, _raised(log, order, floor), log)
    divisor = jnp.where(kinds == _PRODUCT, left[:, 2], divisor)
    return jnp.stack([log, order, divisor], axis=-1)


def _rows_of_products(products: _Products, table: jax.Array) -> jax.Array:
    """The numbers: shape (products, 3). A product of norms has norms' floors."""
    entries = table.at[products.rows].get(mode="promise_in_bounds")
    logs, orders, divisors = jnp.moveaxis(entries, -1, 0)
    divisors = jnp.where(products.powers > 0, divisors, logs)
    log, order, divisor = (
        jnp.sum(products.powers * part, axis=-1) for part in (logs, orders, divisors)
    )
    constants = products.constants
    return jnp.stack([constants + log, order, constants + divisor], axis=-1)


def _rows_of(values: Sequence[Positive]) -> jax.Array:
    table, rows = _table(values)
    return _rows_of_products(_products(values, rows, table.dtype), table)


def _magnitudes(rows: jax.Array) -> jax.Array:
    sizes = finite_exp(rows[:, 0].astype(jnp.float32))
    return jnp.where(rows[:, 1] > 0, 0, sizes)


def _measured(
    value: jax.Array, tiny: jax.typing.ArrayLike, largest: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
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


def _rows_of_norms(
    atoms: Sequence[Atom], floor: jax.typing.ArrayLike, dtype: jnp.dtype
) -> jax.Array:
    """What was measured, from the values."""
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
    log, order = _measured(vector * factors, tiny, largest)
    has_floor = np.array([atom.floor is not None for atom in atoms])
    divisor = jnp.where(has_floor, _raised(log, order, floor), log)
    return jnp.stack([log, order, divisor], axis=-1)


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
    value lies behind a barrier. So does the vector: what made it is computed once.
    """
    # Unsigned: no operations for places that count from the end.
    places = [np.uint32(place) for place in range(vector.shape[0])]
    vector, places = _once((vector, places))
    return [_entry(vector, place) for place in places]


@jax.jit
def _entry(vector: jax.Array, place: jax.Array) -> jax.Array:
    return _once(lax.dynamic_slice(vector, (place,), (1,)).reshape(()))
