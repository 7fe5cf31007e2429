"""Text for people: tables and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as a table: left-justified columns, two spaces between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def indexed(name: str, index: Sequence[int]) -> str:
    """The name of one layer of a stack: `"layers/Dense_0[3]"`."""
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def by_entry(name: str, values: Any) -> dict[str, float]:
    """The entries of an array, each with its index behind the name; a scalar's name."""
    array = np.asarray(values)
    return {
        indexed(name, index): float(array[index]) for index in np.ndindex(array.shape)
    }
