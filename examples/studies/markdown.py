"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table.

    >>> table(["rate", "loss"], [[0.1, 2]])
    ['| rate | loss |', '| --- | --- |', '| 0.1 | 2 |']
    """
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
