"""A small transformer on the digits, trained with scales that are measured.

The scales are measured instead of declared: one vector-Jacobian product every so many
steps. That needs no chain. SGD, Adam and measured backmatch get the
same number of learning rates, judged on training images held out, and then meet on the
test images with seeds of their own.

    python -m examples.studies.transformer
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import backmatch_optax as bmo
from examples import data
from examples.arguments import whole
from examples.studies.networks import Transformer

CANDIDATES = {
    "sgd": (0.01, 0.03, 0.1, 0.3, 1.0),
    "adam": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "measured backmatch": (0.001, 0.003, 0.01, 0.03, 0.1),
}
TUNING_SEEDS, TEST_SEEDS = (100, 101), (0, 1, 2, 3, 4)


def optimizer(method: str, rate: float) -> optax.GradientTransformationExtraArgs:
    """SGD with Nesterov momentum, plain or after measured scales, or Adam."""
    if method == "adam":
        return optax.with_extra_args_support(optax.adam(rate))
    sgd = optax.sgd(rate, momentum=0.9, nesterov=True)
    if method == "sgd":
        return optax.with_extra_args_support(sgd)
    return optax.chain(
        bmo.scale_by_measured_backmatch(key=jax.random.key(0), normalize=False), sgd
    )


def images_of(images: np.ndarray, dataset: data.Dataset) -> np.ndarray:
    """Standardised images, 32x32 made 8x8 again."""
    return np.asarray(dataset.standardise(jnp.asarray(images[:, ::4, ::4])))


def train(
    method: str, rate: float, dataset: data.Dataset, seed: int, epochs: int
) -> tuple[float, float]:
    """Mean training loss of the last epoch, and accuracy on the test images."""
    model, tx = Transformer(features=32, heads=4), optimizer(method, rate)
    images = images_of(dataset.train_images, dataset)
    params = model.init(jax.random.key(seed), images[:1])["params"]
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        def outputs(params) -> Any:
            return model.apply({"params": params}, x)

        def loss_fn(params):
            logits = outputs(params)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(gradient, opt_state, params, outputs_fn=outputs)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(seed)
    losses: list[jax.Array] = []
    for _ in range(epochs):
        losses = []
        for chosen in dataset.batches(64, rng):
            params, opt_state, loss = step(
                params, opt_state, images[chosen], dataset.train_labels[chosen]
            )
            losses.append(loss)
    logits = model.apply({"params": params}, images_of(dataset.test_images, dataset))
    right = np.asarray(logits).argmax(-1) == dataset.test_labels
    return float(np.mean(losses)), float(right.mean())


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Prints the tuning and the comparison; returns test accuracies by method."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.transformer",
        description="A small transformer on the digits under SGD, Adam and measured "
        "backmatch, each tuned with the same budget.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--epochs", type=whole(1), default=15, help="passes over the data"
    )
    options = parser.parse_args(arguments)
    digits = data.load("digits")
    held_out = digits.hold_out(0.2)
    runs = sum(map(len, CANDIDATES.values())) * len(TUNING_SEEDS)
    best: dict[str, float] = {}
    with tqdm(total=runs + len(CANDIDATES) * len(TEST_SEEDS), unit="run") as bar:
        for method, rates in CANDIDATES.items():
            scores = {}
            for rate in rates:
                accuracies = []
                for seed in TUNING_SEEDS:
                    result = train(method, rate, held_out, seed, options.epochs)
                    accuracies.append(result[1])
                    bar.update()
                scores[rate] = np.mean(accuracies)
            best[method] = max(scores, key=lambda rate: scores[rate])
            listed = ", ".join(f"{rate:g}: {s:.2%}" for rate, s in scores.items())
            bar.write(f"held out, {method}: {listed}")
        tested: dict[str, list[float]] = {}
        for method, rate in best.items():
            results = []
            for seed in TEST_SEEDS:
                results.append(train(method, rate, digits, seed, options.epochs))
                bar.update()
            losses, accuracies = zip(*results, strict=True)
            tested[method] = list(accuracies)
            bar.write(
                f"test, {method} at {rate:g}: accuracy {np.mean(accuracies):.2%} "
                f"+- {np.std(accuracies, ddof=1):.2%}, training loss "
                f"{np.mean(losses):.4f} ({len(TEST_SEEDS)} seeds)"
            )
    return tested


if __name__ == "__main__":
    main()
