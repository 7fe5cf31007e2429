"""Differences of means over seeds, with intervals, as numbers, words and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from matplotlib.axes import Axes


class Difference(NamedTuple):
    """Of two means, with its 95 % interval; NaN ends where a mean is of one seed."""

    mean: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def words(self, digits: int = 1) -> str:
        """What may be said of it."""
        if np.isnan(self.low):
            return "one seed, no interval"
        if self.shown:
            return "higher" if self.mean > 0 else "lower"
        limit = max(-self.low, self.high)
        return (
            f"no difference that these runs could show, smaller than {limit:.{digits}f}"
        )


def welch(
    values: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray
) -> Difference:
    """The mean of one sample less that of another, by Welch's unpaired t interval.

    >>> difference = welch([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    >>> [round(float(number), 2) for number in difference]
    [2.0, -0.27, 4.27]
    >>> difference.words()
    'no difference that these runs could show, smaller than 4.3'
    """
    a, b = np.asarray(values, float), np.asarray(reference, float)
    mean = float(a.mean() - b.mean())
    if min(a.size, b.size) < 2:
        return Difference(mean, float("nan"), float("nan"))
    result = scipy.stats.ttest_ind(a, b, equal_var=False)
    interval = result.confidence_interval(0.95)
    return Difference(mean, float(interval.low), float(interval.high))


def forest(
    axis: Axes, rows: Sequence[tuple[str, Difference | None]], label: str
) -> None:
    """A line for each difference, the first above; None makes its text a heading."""
    axis.axvline(0, color="0.5", lw=1, zorder=0)
    for place, (_, row) in enumerate(rows):
        if row is not None:
            colour = "0.35" if not row.shown else "C0" if row.mean > 0 else "C1"
            axis.plot([row.low, row.high], [place, place], color=colour, lw=2)
            filled = "none" if np.isnan(row.low) else colour  # of one seed
            axis.plot(row.mean, place, "o", color=colour, mfc=filled, ms=5)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    axis.set_yticks(range(len(rows)), [text for text, _ in rows])
    for text, (_, row) in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row is None else "normal")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
