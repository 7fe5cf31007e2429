"""Runs the papers' experiments: one run, a tuning grid, or a whole table.

    python -m examples.studies.cifar --experiment lenet_fig2 --methods backmatch
    python -m examples.studies.cifar --experiment lenet_fig2 --tune --time-limit 3500
    python -m examples.studies.cifar --experiment vgg_tables --model vgg11 vgg13
    python -m examples.studies.cifar.report

Several models or data sets are the entries of a table, one after the other. Without a
learning rate, each method takes the one that its tuning runs found best at the same
weight decay; runs of the tuning grid that are missing come first. Every run is added to
the results file, and what is there already is not run again: after a kill or at the end
of its time, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import shutil
import time
import typing
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from examples import data, methods, models
from examples.arguments import not_negative, positive, whole
from examples.studies import results_file
from examples.studies.cifar import records
from examples.studies.cifar.experiments import (
    EXPERIMENTS,
    LEARNING_RATES,
    WEIGHT_DECAYS,
    Candidate,
    Experiment,
    Schedule,
    climb,
    learning_rates,
    worth,
)
from examples.studies.cifar.trainer import OutOfTime, Run, train

TUNING_SEEDS = (100,)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.cifar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--experiment", choices=EXPERIMENTS, required=True, help="the protocol")
    add(
        "--methods",
        nargs="+",
        choices=LEARNING_RATES,
        default=list(methods.METHODS),
        metavar="METHOD",
        help="of " + ", ".join(map(repr, LEARNING_RATES)) + "; default: the first four",
    )
    add("--seeds", nargs="+", type=whole(0), default=[0, 1, 2], help="default: 0 1 2")
    add(
        "--weight-decays",
        nargs="+",
        type=not_negative,
        help="one run for each; default: the best of the tuning grid",
    )
    add("--learning-rate", type=not_negative, help="for all methods, instead of tuning")
    add(
        "--learning-rates",
        nargs="+",
        type=not_negative,
        help="the tuning grid's, for all methods; default: each method's own five",
    )
    add(
        "--climb",
        action="store_true",
        help="tune from the middle of the grid to the best of its neighbours, until "
        "none is better, instead of the whole grid",
    )
    add(
        "--tuning-seeds",
        nargs="+",
        type=whole(0),
        default=list(TUNING_SEEDS),
        help="held-out accuracies are means over these; default: 100",
    )
    add("--tune", action="store_true", help="the tuning alone")
    add(
        "--tuning-epochs",
        type=whole(1),
        help="default: as many as the experiment has",
    )
    add(
        "--group",
        type=whole(1),
        help="runs in one program; default: 1 on CPU, all on GPU",
    )
    add("--time-limit", type=positive, help="seconds after which to stop, resumable")
    add("--data-dir", help="of tensorflow-datasets; default: TFDS_DATA_DIR or its own")
    add("--results", type=Path, default=records.RESULTS, help="the results file")
    add(
        "--checkpoints",
        type=Path,
        default=Path("outputs/cifar"),
        help="where checkpoints of unfinished runs go, and logs as CSV",
    )
    group = parser.add_argument_group(
        "changes to the protocol",
        "Without these everything is as the experiment has it.",
    )
    add = group.add_argument
    add("--dataset", nargs="+", choices=data.DATASETS, help="one table entry for each")
    add("--model", nargs="+", choices=models.MODELS, help="one table entry for each")
    add("--epochs", type=whole(1), help="passes over the training images")
    add(
        "--schedule",
        choices=typing.get_args(Schedule),
        help="of the learning rate; linear ends at zero",
    )
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random flips and rotations, or none",
    )
    add("--batch-size", type=whole(1), help="images a step")
    add(
        "--momentum",
        type=functools.partial(not_negative, below=1),
        help="of every method but AdamW, Lion and Muon",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what the network computes in",
    )
    add("--train-images", type=whole(0), help="the first so many; 0 for all")
    add(
        "--patience",
        type=whole(0),
        help="stop so many epochs after the best accuracy; 0 to train to the end",
    )
    add("--width", type=positive, help="times as many features in a VGG")
    options = parser.parse_args(arguments)
    experiment = EXPERIMENTS[options.experiment]
    changed = {
        field.name: value
        for field in dataclasses.fields(Experiment)
        if (value := getattr(options, field.name)) is not None
    }
    options.protocols = [
        dataclasses.replace(
            experiment, **changed | {"dataset": dataset, "model": model}
        )
        for dataset in options.dataset or [experiment.dataset]
        for model in options.model or [experiment.model]
    ]
    for protocol in options.protocols:
        if protocol.width != 1 and not protocol.model.startswith("vgg"):
            parser.error(f"--width is for VGGs; {protocol.model} has no width")
    return options


class Runner:
    """Trains what is missing from the results file."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        results_file.require_writable(options.checkpoints)
        self._dataset = functools.cache(lambda name: data.load(name, options.data_dir))
        self._deadline = time.monotonic() + (options.time_limit or float("inf"))

    def accuracies(self, experiment: Experiment, runs: Sequence[Run]) -> list[float]:
        """The final accuracy of every run of a method; NaN where it diverged."""
        done = self._done(experiment, runs)
        missing = [run for run in dict.fromkeys(runs) if run not in done]
        size = self._options.group or (1 if jax.default_backend() == "cpu" else None)
        size = size or max(len(missing), 1)
        for start in range(0, len(missing), size):
            self._train(experiment, missing[start : start + size])
        done = self._done(experiment, runs)
        return [done[run] for run in runs]

    def _done(self, experiment: Experiment, runs: Sequence[Run]) -> dict[Run, float]:
        found = {}
        keys = {
            records.fingerprint([self._identity(experiment, run)]): run for run in runs
        }
        for record in records.load(self._options.results):
            parts = {name: record[name] for name in ("experiment", "protocol", "run")}
            run = keys.get(records.fingerprint([parts]))
            if run is not None:
                diverged = record["outcome"].startswith("diverged")
                final = record["accuracy"][-1]
                found[run] = float("nan") if diverged else final
        return found

    def _identity(self, experiment: Experiment, run: Run) -> dict:
        return records.identity(self._options.experiment, experiment, run)

    def _train(self, experiment: Experiment, runs: Sequence[Run]) -> None:
        name = records.fingerprint(self._identity(experiment, run) for run in runs)
        directory = self._options.checkpoints.absolute() / name
        history = train(
            experiment,
            runs,
            self._dataset(experiment.dataset),
            directory,
            deadline=self._deadline,
            on_epoch=lambda epochs, history: records.write_log(
                directory.with_suffix(".csv"), runs, history, epochs
            ),
        )
        new = records.of_group(self._options.experiment, experiment, runs, history)
        results_file.append(new, self._options.results)
        shutil.rmtree(directory)
        for record in new:
            run = record["run"]
            tqdm.write(
                f"{run['method']}, rate {run['learning_rate']:g}, decay "
                f"{run['weight_decay']:g}, seed {run['seed']}"
                f"{', held out' if run['tuning'] else ''}: {record['outcome']}, "
                f"accuracy {record['accuracy'][-1]:.2%}, loss {record['loss'][-1]}"
            )


def run_method(
    runner: Runner, protocol: Experiment, method: str, options: argparse.Namespace
) -> None:
    """The tuning of one method, then the best of it with every seed."""
    if options.learning_rate is not None:
        decays = options.weight_decays or [0.0]
        chosen = [(options.learning_rate, decay) for decay in decays]
    else:
        short = dataclasses.replace(
            protocol, epochs=options.tuning_epochs or protocol.epochs
        )
        rates = options.learning_rates or learning_rates(method, protocol)
        decays = options.weight_decays or WEIGHT_DECAYS[method]

        def held_out(candidates: Sequence[Candidate]) -> dict[Candidate, float]:
            """The mean over the tuning seeds; NaN where one diverged."""
            seeds = options.tuning_seeds
            runs = [Run(method, *c, s, tuning=True) for c in candidates for s in seeds]
            found = np.reshape(runner.accuracies(short, runs), (-1, len(seeds)))
            return dict(zip(candidates, found.mean(1).tolist(), strict=True))

        if options.climb:
            middle = sorted(rates)[len(rates) // 2], sorted(decays)[len(decays) // 2]
            scores = climb(held_out, middle)
        else:
            scores = held_out(list(itertools.product(rates, decays)))
        each_decay = bool(options.weight_decays) and not options.climb
        chosen = best(scores, each_decay=each_decay)
    if not options.tune:
        runner.accuracies(
            protocol, [Run(method, *c, seed) for c in chosen for seed in options.seeds]
        )


def main(arguments: Sequence[str] | None = None) -> bool:
    """Does what is missing; returns whether all of it is done."""
    options = parse(arguments)
    with results_file.alone_with(options.results):
        runner = Runner(options)
        try:
            for protocol in options.protocols:
                for method in options.methods:
                    run_method(runner, protocol, method, options)
        except OutOfTime:
            print("Out of time. The same command goes on from here.")
            return False
    print(f"Done. The results are in {options.results}")
    return True


def best(scores: dict[Candidate, float], *, each_decay: bool) -> list[Candidate]:
    """The candidates with the best score, of all or for each decay; NaN is worst."""

    def value(candidate: Candidate) -> float:
        return worth(scores[candidate])

    if not each_decay:
        return [max(scores, key=value)]
    decays = dict.fromkeys(decay for _, decay in scores)
    return [max((c for c in scores if c[1] == d), key=value) for d in decays]


if __name__ == "__main__":
    main()
