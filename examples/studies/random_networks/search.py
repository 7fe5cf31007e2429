"""The search for the best learning rate, on the powers of 2."""

from __future__ import annotations

import math

_DIVERGED = 2.5  # a loss above that of guessing, log(10)
_MOST = 40  # rates, where none learns

Curve = dict[int, tuple[float, float]]  # training and test loss by power of 2


def best(curve: Curve) -> int:
    """The rate of the lowest training loss; if all have diverged, the lowest rate."""
    # A comparison that is false of NaN.
    learned = [power for power, (loss, _) in curve.items() if loss < _DIVERGED]
    return min(learned, key=lambda power: curve[power]) if learned else min(curve)


def next_powers(curve: Curve, first: int) -> list[int]:
    """The rates to try next; none where the best one lies between two others."""
    if len(curve) >= _MOST:
        return []
    centre = best(curve) if curve else first
    return sorted({centre - 1, centre, centre + 1} - set(curve))


def rounded(loss: float) -> float | None:
    """For JSON, which has no NaN."""
    return round(loss, 4) if math.isfinite(loss) else None
