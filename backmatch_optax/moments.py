"""The moments of a signal.

With the papers' gains only the second moment `q` is known, and a nonlinearity leaves
it alone. With mean-field gains a unit's pre-activation is Gaussian: over inputs and
positions it has a `variance` about its mean, and over units those means have a `spread`
about an `offset` common to all. They are kept apart because a BatchNorm divides by the
first and removes the others, a random kernel keeps their squares but no common sign,
and a shortcut keeps the sign too. Of the variance, a part may be common to all
positions of one input (`along`), as after attention: a mean over positions keeps it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

from backmatch_optax.powers import Positive, number

Gains = Literal["paper", "mean_field"]

NOTHING = 1e-9  # below the rounding of the integrals


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
    along: Positive | None = None  # of the variance, what positions have in common

    @functools.cached_property
    def maxima(self) -> dict[tuple[str, int], tuple[Moments, Positive]]:
        """What activations and poolings have made of it, by name and window.

        The rules for signal and gradient both ask. The same atoms cancel.
        """
        return {}

    @functools.cached_property
    def commons(self) -> dict[str, list[Positive]]:
        """What positions have in common behind activations, by name; as above."""
        return {}

    @functools.cached_property
    def mean_square(self) -> Positive | None:
        """The mean square of the units' means."""
        return _sum_of_known(self.spread, self.offset)

    @property
    def common(self) -> Positive | None:
        """The part that all positions of one input have in common."""
        return _sum_of_known(self.mean_square, self.along)

    @property
    def varying(self) -> Positive | None:
        """The part that differs between positions; None is zero.

        Where only a part of the variance is common, all of it.
        """
        return None if self.along is self.variance else self.variance

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
            along=None if self.along is None else self.along * factor,
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
            along=_sum_of_known(self.along, other.along),
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
        along = _sum_of_known(
            _product_of_known(self.along, other.common),
            _product_of_known(self.mean_square, other.along),
        )
        offset = _product_of_known(self.offset, other.offset)
        return Moments(variance, spread, offset, along=along)

    def mixed(self, gain: Positive | float) -> Moments:
        """The moments after a random linear map: its units' means have either sign."""
        mean, along = self.mean_square, self.along
        return Moments(
            self.variance * gain,
            None if mean is None else mean * gain,
            along=None if along is None else along * gain,
        )

    def averaged(self, window: int) -> Moments:
        """The moments of the mean of `window` values, independent but for `along`."""
        return self.shrunk(1.0 / window)

    def shrunk(self, kept: Positive | float, rest: Positive | None = None) -> Moments:
        """The moments when only a share is kept of what differs between positions.

        Args:
          kept: that share.
          rest: `1 - kept`, where that is no float.
        """
        variance, along = self.variance * kept, self.along
        if along is not None:
            if isinstance(kept, float):
                rest = number(1.0 - kept) if kept < 1.0 else None
            variance = variance if rest is None else variance + along * rest
        return Moments(variance, self.spread, self.offset, along=along)

    def with_mean_kept(self, share: float) -> Moments:
        """The moments when of the units' means only a share stays a mean."""
        mean, along = self.mean_square, self.along
        if share == 1.0 or (mean is None and along is None):
            return self
        if share == 0.0:
            return Moments(self.q)
        along = None if along is None else along * share
        if mean is None:
            return Moments(self.variance, along=along)
        variance = self.variance + mean * (1.0 - share)
        return Moments(variance, mean * share, along=along)

    def with_spread(self, spread: Positive) -> Moments:
        """The same with a constant of that mean square added to each unit."""
        total = _sum_of_known(self.spread, spread)
        return Moments(self.variance, total, self.offset, along=self.along)

    def collapsed(self, most: int) -> Moments:
        """The same, with what all parts have in common as one atom beyond `most`."""
        parts = (self.variance, self.spread, self.offset, self.along)
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
        variance, spread, offset, along = (
            None if part is None else (part / unit * short).collapsed(most)
            for part in parts
        )
        assert variance is not None
        return Moments(variance, spread, offset, self.activated, along)

    def without_offset(self) -> Moments:
        """The same with the mean of all units taken away."""
        return Moments(self.variance, self.spread, along=self.along)


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
    differing, along = None, mean("along", shares)
    if not units:  # a unit's mean is that over all positions, what differs is variance
        differing = mean("spread", [share * (1.0 - share) for share in shares])
        spread = mean("spread", [share**2 for share in shares])
        along = mean("along", [share**2 for share in shares])
    pairs = zip(parts, shares, strict=True)
    leaning = sum(share for part, share in pairs if part.offset is not None)
    if offset is not None and leaning < 1.0 - NOTHING:
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
        activation = Activated(activated[0].name, before)
        return Moments(variance, spread, offset, activation, along)
    return Moments(variance, spread, offset, along=along)


def _sum_of_known(*terms: Positive | None) -> Positive | None:
    known = [term for term in terms if term is not None]
    return functools.reduce(operator.add, known) if known else None


def _product_of_known(left: Positive | None, right: Positive | None) -> Positive | None:
    return None if left is None or right is None else left * right
