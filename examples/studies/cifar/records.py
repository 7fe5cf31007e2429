"""The results file: one line of JSON for every run, whatever became of it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.studies.cifar.experiments import Experiment
from examples.studies.cifar.trainer import History, Run

RESULTS = Path(__file__).parents[1] / "results" / "cifar" / "runs.jsonl"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "backmatch-optax", "numpy")


def identity(name: str, experiment: Experiment, run: Run) -> dict[str, Any]:
    """What makes a run the same run: its experiment's name, protocol and numbers."""
    return {
        "experiment": name,
        "protocol": dataclasses.asdict(experiment),
        "run": dataclasses.asdict(run),
    }


def fingerprint(parts: Iterable[dict[str, Any]]) -> str:
    """A short name for a group of runs, for its checkpoints."""
    text = json.dumps(list(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_group(
    name: str, experiment: Experiment, runs: Iterable[Run], history: History
) -> list[dict[str, Any]]:
    """A record for each run of a group that has ended."""
    device = jax.devices()[0]
    context = {
        "versions": {p: metadata.version(p) for p in _PACKAGES}
        | {"python": platform.python_version()},
        "device": f"{device.platform} {device.device_kind}",
        "cores": os.cpu_count(),
    }
    records = []
    for index, run in enumerate(runs):
        trained = int((~np.isnan(history.accuracy[:, index])).sum())
        loss = history.loss[:trained, index]
        finite = np.isfinite(loss)
        if not finite.all():
            outcome = f"diverged in epoch {int((~finite).argmax()) + 1}"
        elif trained < experiment.epochs:
            outcome = f"stopped early after epoch {trained}"
        else:
            outcome = "finished"
        records.append(
            identity(name, experiment, run)
            | {
                "outcome": outcome,
                "loss": _rounded(loss),
                "accuracy": _rounded(history.accuracy[:trained, index]),
                "layer_scales": {
                    path: _rounded(values[:trained, index])
                    for path, values in history.layer_scales.items()
                },
                "norms": {
                    path: _rounded(values[:trained, index])
                    for path, values in history.norms.items()
                },
                "seconds": _rounded(history.seconds[:trained]),
                "runs_at_once": history.loss.shape[1],
            }
            | context
        )
    return records


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
            f"{path} could not be written ({error.strerror}) and is as it was. The "
            "runs are in their checkpoint: the same command only adds them."
        ) from error


def write_log(path: Path, runs: Sequence[Run], history: History, epochs: int) -> None:
    """A group's epochs so far as CSV, a line for each run and epoch, to be watched."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        fields = [field.name for field in dataclasses.fields(Run)]
        writer.writerow([*fields, "epoch", "loss", "accuracy", "seconds"])
        for epoch in range(epochs):
            for index, run in enumerate(runs):
                writer.writerow(
                    [
                        *dataclasses.astuple(run),
                        epoch + 1,
                        history.loss[epoch, index],
                        history.accuracy[epoch, index],
                        history.seconds[epoch],
                    ]
                )


def load(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first; none where there is no file.

    What a protocol or a run did not have yet when it was recorded is at its default.

    Raises:
      SystemExit: where a line is no record, naming file and line.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            record["protocol"] = dataclasses.asdict(Experiment(**record["protocol"]))
            record["run"] = dataclasses.asdict(Run(**record["run"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number} is no record of a run "
                f"({type(error).__name__}: {error}). Without that line, the same "
                "command trains its run again."
            ) from None
        records.append(record)
    return records


def _rounded(values: np.ndarray) -> list[float | None]:
    """Five digits; None for what is not a finite number, which JSON does not know."""
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in values]
