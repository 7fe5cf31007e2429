"""A file of results: a line of JSON for every run, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Keeps other programs from the results file for as long as this one trains.

    Two programs would train the same missing runs, and each would write the file
    without the other's. The system ends the lock with the program, however that ends.

    Raises:
      SystemExit: where another program has the file, or it cannot be written.
    """
    require_writable(path.parent)
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise SystemExit(f"The results file {path} cannot be written.")
    with path.with_name(f"{path.name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise SystemExit(
                f"{path} is in use by process {lock.read().strip()}. Wait for its end, "
                "or give --results another file; the lines of both can be joined later."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def require_writable(directory: Path) -> None:
    """Makes a directory where there is none, and writes into it.

    Raises:
      SystemExit: where that cannot be done.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise SystemExit(
            f"{directory} cannot be written ({error.strerror}), so nothing is trained."
        ) from None


def append(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Adds records at the end of the file, a line each; all of them or none.

    Raises:
      SystemExit: where the file cannot be written; it is then as it was.
    """
    path = path.resolve()  # what a link points to, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        text += "\n"
    text += "".join(json.dumps(record) + "\n" for record in records)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SystemExit(
            f"{path} could not be written ({error.strerror}) and is as it was. "
            "With room for it, the same command goes on from there."
        ) from error


def read(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first; none where there is no file.

    Raises:
      SystemExit: where a line is no record, naming file and line.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise TypeError(f"a {type(record).__name__}")
        except (ValueError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number} is no record ({type(error).__name__}: "
                f"{error}). Without that line, the same command does its run again."
            ) from None
        records.append(record)
    return records


def rounded(values: Iterable[float]) -> list[float | None]:
    """Five digits; None for what is not a finite number, which JSON does not know."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]
