"""Trains one network under SGD, LARS, LSALR and backmatch, side by side.

All methods start from the same weights and see the same batches in the same order; at
every batch each takes its step in turn, so that their times compare. Prints a table and
saves learning curves and layer scales as pictures.

    python -m examples.compare
    python -m examples.compare --dataset cifar10 --data-dir ~/tensorflow_datasets
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import backmatch_optax as bmo
from examples import cpu, data, methods, models, training
from examples.arguments import not_negative, whole

matplotlib.use("Agg")  # pictures go to files, also where there is no screen
import matplotlib.pyplot as plt

# Candidates of `--tune`, the same number for each method: around the papers' (BM 3.3
# and 4.1), moved where the best was at their end.
CANDIDATES = {
    "sgd": (0.02, 0.05, 0.1, 0.2, 0.5),
    "lars": (1.0, 2.0, 5.0, 10.0, 20.0),
    "lsalr": (0.002, 0.006, 0.02, 0.05, 0.1),
    "backmatch": (0.02, 0.05, 0.1, 0.2, 0.5),
}
TUNING_SEEDS = (100, 101, 102)

# What `--tune` found on the digits; its table is in examples/README.md.
LEARNING_RATES = {"sgd": 0.1, "lars": 5.0, "lsalr": 0.02, "backmatch": 0.1}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare",
        description="Train one network under several optimizers, from the same initial "
        "weights on the same batches; print a table, save learning curves and layer "
        "scales.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset",
        choices=data.DATASETS,
        default="digits",
        help="digits comes with scikit-learn and needs no network; the others are read "
        "by tensorflow-datasets",
    )
    parser.add_argument(
        "--data-dir",
        help="where tensorflow-datasets keeps its data; without it, the environment "
        "variable TFDS_DATA_DIR or TFDS's own default",
    )
    parser.add_argument(
        "--model", choices=models.MODELS, default="lenet", help="the network"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods.METHODS,
        default=list(methods.METHODS),
        metavar="METHOD",
        help=f"which to train, of {', '.join(methods.METHODS)}",
    )
    parser.add_argument(
        "--learning-rate",
        nargs="+",
        default=[],
        metavar="METHOD=RATE",
        help="learning rates, such as sgd=0.1 backmatch=0.02; those not given are "
        + ", ".join(f"{name}={rate}" for name, rate in LEARNING_RATES.items()),
    )
    parser.add_argument(
        "--epochs", type=whole(1), default=15, help="passes over the data"
    )
    parser.add_argument("--batch-size", type=whole(1), default=64, help="images a step")
    parser.add_argument(
        "--weight-decay", type=not_negative, default=5e-4, help="decay, for all methods"
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="of initial weights and batch order"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead of comparing, try candidate learning rates for each method on "
        "20 %% of the training images held out, and print their mean accuracy over "
        f"{len(TUNING_SEEDS)} seeds",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("outputs/compare"),
        help="where pictures and results.json go",
    )
    options = parser.parse_args(arguments)
    options.rates = dict(LEARNING_RATES)
    for entry in options.learning_rate:
        method, _, rate = entry.partition("=")
        try:
            options.rates[method] = not_negative(rate)
        except argparse.ArgumentTypeError as error:
            parser.error(
                f"--learning-rate {entry!r} must be written METHOD=NUMBER: {error}"
            )
        if method not in methods.METHODS:
            parser.error(
                f"--learning-rate {entry!r} must name one of "
                + ", ".join(methods.METHODS)
            )
    return options


def describe(options: argparse.Namespace, dataset: data.Dataset) -> str:
    """The declared chain with its scales at initialisation."""
    model, chain = models.MODELS[options.model](
        dataset.num_classes, dataset.input_shape
    )
    states = training.create_states(
        model, {"": optax.identity()}, dataset, jax.random.key(options.seed)
    )
    return bmo.describe(chain, states[""].params, normalize=False)


def train(options: argparse.Namespace, dataset: data.Dataset) -> dict[str, dict]:
    """Trains all methods side by side and returns their curves by method."""
    model, chain = models.MODELS[options.model](
        dataset.num_classes, dataset.input_shape
    )
    model = cpu.faster(model)
    optimizers = {
        method: methods.optimizer(
            method, options.rates[method], chain, weight_decay=options.weight_decay
        )
        for method in options.methods
    }
    states = training.create_states(
        model, optimizers, dataset, jax.random.key(options.seed)
    )
    step, accuracy = training.make_train_step(dataset), training.make_accuracy(dataset)
    curves: dict[str, dict] = {
        method: {"loss": [], "accuracy": [], "seconds": [], "scales": []}
        for method in states
    }
    rng = np.random.default_rng(options.seed)
    batches = len(dataset.train_images) // options.batch_size
    if not batches:
        raise SystemExit(
            f"--batch-size {options.batch_size} is more than the "
            f"{len(dataset.train_images)} training images of {dataset.name}"
        )
    with tqdm(total=options.epochs * batches, unit="step") as bar:
        for _ in range(options.epochs):
            losses: dict[str, list[float]] = {method: [] for method in states}
            for chosen in dataset.batches(options.batch_size, rng):
                images = dataset.train_images[chosen]
                labels = dataset.train_labels[chosen]
                for method in states:
                    start = time.perf_counter()
                    states[method], loss = step(states[method], images, labels)
                    losses[method].append(float(loss))  # waits for the step to end
                    curves[method]["seconds"].append(time.perf_counter() - start)
                bar.update()
            for method, state in states.items():
                curve = curves[method]
                curve["loss"].append(float(np.mean(losses[method])))
                curve["accuracy"].append(
                    accuracy(state, dataset.test_images, dataset.test_labels)
                )
                scales = optax.tree.get(state.opt_state, "layer_scales", default={})
                curve["scales"].append({k: float(v) for k, v in scales.items()})
    return curves


def tune(options: argparse.Namespace, dataset: data.Dataset) -> str:
    """Held-out accuracy of every candidate rate; the test images are not touched."""
    dataset = dataset.hold_out(0.2)
    tried: dict[str, list[tuple[float, float]]] = {m: [] for m in options.methods}
    for rates in zip(*(CANDIDATES[m] for m in options.methods), strict=True):
        options.rates = dict(zip(options.methods, rates, strict=True))
        accuracies: dict[str, list[float]] = {m: [] for m in options.methods}
        for options.seed in TUNING_SEEDS:
            for method, curve in train(options, dataset).items():
                accuracies[method].append(curve["accuracy"][-1])
        for method, rate in options.rates.items():
            tried[method].append((rate, float(np.mean(accuracies[method]))))
    lines = []
    for method, results in tried.items():
        best = max(accuracy for _, accuracy in results)
        cells = [
            f"{rate:g}: {accuracy:.2%}{' (best)' if accuracy == best else ''}"
            for rate, accuracy in results
        ]
        lines.append(f"{method:10} {', '.join(cells)}")
    return "\n".join(lines)


def table(curves: dict[str, dict], rates: dict[str, float], images: int) -> str:
    """The results: a row for each method, of so many test images."""
    header = ("method", "rate", "train loss", "test accuracy", f"wrong of {images}")
    header += ("ms/step", "overhead")
    # The first step compiles; the median is robust to whatever else the machine does.
    seconds = {m: float(np.median(c["seconds"][1:] or [0])) for m, c in curves.items()}
    rows: list[tuple[str, ...]] = [header]
    for method, curve in curves.items():
        loss = curve["loss"][-1]
        ratio = seconds[method] / seconds["sgd"] if seconds.get("sgd") else None
        rows.append(
            (
                method,
                f"{rates[method]:g}",
                f"{loss:.4f}" if np.isfinite(loss) else "diverged",
                f"{curve['accuracy'][-1]:.2%}",
                f"{images * (1 - curve['accuracy'][-1]):.0f}",
                f"{seconds[method] * 1e3:.2f}",
                "" if ratio is None or method == "sgd" else f"{ratio - 1:+.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        ).rstrip()
        for row in rows
    )


def plot_curves(curves: dict[str, dict], title: str, path: Path) -> None:
    """Training loss and test accuracy of every method against epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method, curve in curves.items():
        epochs = np.arange(1, len(curve["loss"]) + 1)
        left.plot(epochs, curve["loss"], label=method)
        right.plot(epochs, 100 * np.array(curve["accuracy"]), label=method)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_scales(scales: list[dict[str, float]], title: str, path: Path) -> None:
    """What each layer's gradient was multiplied by, against epochs."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    epochs = np.arange(1, len(scales) + 1)
    for layer in scales[0]:
        axes.plot(epochs, [epoch[layer] for epoch in scales], label=layer)
    axes.set(xlabel="epoch", ylabel="layer scale", yscale="log", title=title)
    axes.legend(ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict]:
    """Runs the comparison; returns the curves by method."""
    options = parse(arguments)
    dataset = data.load(options.dataset, options.data_dir)
    print(f"{describe(options, dataset)}\n")
    if options.tune:
        print(f"\nHeld-out accuracy by learning rate\n{tune(options, dataset)}")
        return {}
    curves = train(options, dataset)
    images = len(dataset.test_images)
    print(f"\n{table(curves, options.rates, images)}\n")
    print(f"One test image is {1 / images:.2%} of the accuracy.")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    title = f"{options.model} on {dataset.name}, seed {options.seed}"
    plot_curves(curves, title, options.output_dir / "learning_curves.png")
    if "backmatch" in curves:
        scales = curves["backmatch"]["scales"]
        plot_scales(scales, title, options.output_dir / "layer_scales.png")
    (options.output_dir / "results.json").write_text(
        json.dumps({"options": vars(options), "curves": curves}, default=str)
    )
    print(f"Pictures and results.json are in {options.output_dir}")
    return curves


if __name__ == "__main__":
    main()
