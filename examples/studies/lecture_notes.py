"""Classic advice on training networks, each piece of it with back-matched scales.

A tanh network on the digits: Xavier, Kaiming and orthogonal initial weights; the
momentum schedule of Sutskever et al. (2013); mini-batches; dropout; early stopping on a
validation set; Adam after the scale. Every row is one change of the first; SGD and
backmatch each have a learning rate per row, judged on the validation set, and then meet
on the test images.

    python -m examples.studies.lecture_notes
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from examples import data
from examples.arguments import whole

INITIALIZERS: dict[str, Callable[[], nn.initializers.Initializer]] = {
    "xavier": nn.initializers.xavier_normal,
    "kaiming": nn.initializers.kaiming_normal,
    "orthogonal": nn.initializers.orthogonal,
}
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
ADAM_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
HIDDEN = (64, 64, 64)
TUNING_SEEDS, TEST_SEEDS = (100, 101), (0, 1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """One way to train.

    Attributes:
      initializer: of `INITIALIZERS`.
      momentum: the momentum, or None for that of `momentum_schedule`.
      batch_size: images a step.
      dropout: the share of hidden units dropped at each step.
      patience: stop once the validation loss has not improved for so many epochs, and
        keep the best parameters; None to train to the end.
      adam: Adam in place of momentum, after the scale.
    """

    initializer: str = "xavier"
    momentum: float | None = 0.9
    batch_size: int = 32
    dropout: float = 0.0
    patience: int | None = None
    adam: bool = False


LESSONS = {
    "Xavier, momentum 0.9": Lesson(),
    "Kaiming": Lesson(initializer="kaiming"),
    "orthogonal": Lesson(initializer="orthogonal"),
    "momentum schedule": Lesson(momentum=None),
    "batches of 8": Lesson(batch_size=8),
    "batches of 128": Lesson(batch_size=128),
    "dropout 0.2": Lesson(dropout=0.2),
    "early stopping": Lesson(patience=5),
    "Adam": Lesson(adam=True),
}


class MLP(nn.Module):
    """Dense layers with tanh and dropout between them."""

    hidden: Sequence[int] = HIDDEN
    initializer: str = "xavier"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of flat images, shape (batch, pixels)."""
        init = INITIALIZERS[self.initializer]()
        for features in self.hidden:
            x = nn.tanh(nn.Dense(features, kernel_init=init)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10, kernel_init=init)(x)


def momentum_schedule() -> optax.Schedule:
    """`min(0.99, 1 - 1 / (2 (floor(t / 250) + 1)))` of step t (Sutskever, 2013).

    >>> [round(float(momentum_schedule()(t)), 3) for t in (0, 249, 250, 500, 10**6)]
    [0.5, 0.5, 0.75, 0.833, 0.99]
    """
    return lambda t: jnp.minimum(0.99, 1 - 0.5 / (jnp.asarray(t) // 250 + 1))


def optimizer(
    lesson: Lesson, backmatch: bool, rate: float, chain: spec.LayerChain
) -> optax.GradientTransformation:
    """Weight decay, the scale or none, then Nesterov momentum or Adam."""
    parts = [optax.add_decayed_weights(1e-4)]
    if backmatch:
        parts.append(bmo.scale_by_backmatch(chain, normalize=False))
    if lesson.adam:
        return optax.chain(*parts, optax.adam(rate))
    if lesson.momentum is None:
        # Numbers of a transformation become functions of the step by this wrapper.
        trace = optax.inject_hyperparams(optax.trace, static_args=("nesterov",))
        parts.append(trace(decay=momentum_schedule(), nesterov=True))
    else:
        parts.append(optax.trace(decay=lesson.momentum, nesterov=True))
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def train(
    lesson: Lesson,
    backmatch: bool,
    rate: float,
    dataset: data.Dataset,
    *,
    seed: int,
    epochs: int,
) -> tuple[float, int]:
    """Accuracy on the test images, and the number of epochs trained.

    With early stopping the last fifth of the training images is the validation set.
    """
    fit = dataset if lesson.patience is None else dataset.hold_out(0.2)
    x, y = pixels_of(fit.train_images, dataset), jnp.asarray(fit.train_labels)
    held_x, held_y = pixels_of(fit.test_images, dataset), jnp.asarray(fit.test_labels)
    model = MLP(initializer=lesson.initializer, dropout=lesson.dropout)
    key = jax.random.key(seed)
    params = model.init(key, x[:1], train=False)["params"]
    tx = optimizer(lesson, backmatch, rate, bmo.infer_spec(model, x[:1], train=False))

    def mean_loss(params, x, y, train: bool, rngs=None) -> jax.Array:
        logits: Any = model.apply({"params": params}, x, train, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def epoch(params, opt_state, key):
        steps = len(x) // lesson.batch_size
        order = jax.random.permutation(key, len(x))[: steps * lesson.batch_size]

        def step(carry, chosen):
            params, opt_state = carry
            rngs = {"dropout": jax.random.fold_in(key, chosen[0])}
            gradient = jax.grad(mean_loss)(params, x[chosen], y[chosen], True, rngs)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        carry, _ = jax.lax.scan(
            step, (params, opt_state), order.reshape(steps, lesson.batch_size)
        )
        return *carry, mean_loss(carry[0], held_x, held_y, False)

    opt_state, best, best_loss, best_epoch, done = tx.init(params), params, np.inf, 0, 0
    for done in range(1, epochs + 1):
        params, opt_state, loss = epoch(
            params, opt_state, jax.random.fold_in(key, done)
        )
        if lesson.patience is None:
            best = params
        elif loss < best_loss:
            best, best_loss, best_epoch = params, float(loss), done
        elif done - best_epoch >= lesson.patience:
            break
    logits = model.apply(
        {"params": best}, pixels_of(dataset.test_images, dataset), False
    )
    return float((jnp.asarray(logits).argmax(-1) == dataset.test_labels).mean()), done


def pixels_of(images: np.ndarray, dataset: data.Dataset) -> jax.Array:
    """Standardised images as vectors, 32x32 made 8x8 again."""
    standardised = dataset.standardise(jnp.asarray(images[:, ::4, ::4]))
    return standardised.reshape(len(images), -1)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Prints a row for each lesson; returns test accuracies by lesson and method."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.lecture_notes",
        description="An MLP on the digits: initial weights, momentum schedule, batch "
        "size, dropout, early stopping and Adam, under SGD and backmatch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--epochs", type=whole(1), default=15, help="passes over the data"
    )
    parser.add_argument(
        "--lessons",
        nargs="+",
        choices=LESSONS,
        default=list(LESSONS),
        metavar="LESSON",
        help="of " + ", ".join(map(repr, LESSONS)),
    )
    options = parser.parse_args(arguments)
    digits = data.load("digits")
    held_out = digits.hold_out(0.2)
    results: dict[str, dict[str, list[float]]] = {}
    for name in tqdm(options.lessons, unit="lesson"):
        lesson, results[name] = LESSONS[name], {}
        for method in ("plain", "backmatch"):
            rates = ADAM_RATES if lesson.adam else LEARNING_RATES

            def accuracy(rate, seed, dataset, lesson=lesson, method=method):
                scaled = method == "backmatch"
                return train(
                    lesson, scaled, rate, dataset, seed=seed, epochs=options.epochs
                )[0]

            scores = {
                rate: np.mean([accuracy(rate, s, held_out) for s in TUNING_SEEDS])
                for rate in rates
            }
            rate = max(scores, key=lambda rate: scores[rate])
            tested = [accuracy(rate, seed, digits) for seed in TEST_SEEDS]
            results[name][method] = tested
            tqdm.write(
                f"{name:22} {method:10} rate {rate:<6g} held out {scores[rate]:.2%}, "
                f"test {np.mean(tested):.2%} +- {np.std(tested, ddof=1):.2%}"
            )
    return results


if __name__ == "__main__":
    main()
