"""The results file: one line of JSON for every run, whatever became of it."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.studies import results_file
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
                "loss": results_file.rounded(loss),
                "accuracy": results_file.rounded(history.accuracy[:trained, index]),
                "layer_scales": {
                    path: results_file.rounded(values[:trained, index])
                    for path, values in history.layer_scales.items()
                },
                "norms": {
                    path: results_file.rounded(values[:trained, index])
                    for path, values in history.norms.items()
                },
                "seconds": results_file.rounded(history.seconds[:trained]),
                "runs_at_once": history.loss.shape[1],
            }
            | context
        )
    return records


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
    records = results_file.read(path)
    for number, record in enumerate(records, start=1):
        try:
            record["protocol"] = dataclasses.asdict(Experiment(**record["protocol"]))
            record["run"] = dataclasses.asdict(Run(**record["run"]))
        except (KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}, line {number} is no record of a run "
                f"({type(error).__name__}: {error}). Without that line, the same "
                "command trains its run again."
            ) from None
    return records
