"""A Flax training step and an evaluation, as every example uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.typing import ArrayLike

from examples.data import Dataset

_EVAL_BATCH = 1000


class TrainState(train_state.TrainState):
    """Flax's own, with BatchNorm's running statistics."""

    batch_stats: Any


def create_states(
    model: nn.Module,
    optimizers: Mapping[str, optax.GradientTransformation],
    dataset: Dataset,
    key: jax.Array,
) -> dict[str, TrainState]:
    """One training state for each optimizer, all from the same initial weights."""
    images = jnp.zeros((1, *dataset.input_shape))
    variables = model.init(key, images, train=False)
    return {
        name: TrainState.create(
            apply_fn=model.apply,
            # A copy each, since the training step donates its state.
            params=jax.tree.map(jnp.copy, variables["params"]),
            batch_stats=jax.tree.map(jnp.copy, variables["batch_stats"]),
            tx=tx,
        )
        for name, tx in optimizers.items()
    }


def train_logits(
    apply_fn: Callable[..., Any], params: Any, batch_stats: Any, images: jax.Array
) -> tuple[Any, Any]:
    """`logits, new batch_stats` of a batch, as `loss_and_gradient` takes them."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, mutated = apply_fn(variables, images, train=True, mutable=["batch_stats"])
    return logits, mutated.get("batch_stats", {})


def loss_and_gradient(
    apply_fn: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[tuple[jax.Array, Any], Any]:
    """`(loss, new batch_stats), gradient` of the mean cross-entropy of a batch.

    Args:
      apply_fn: of a Flax model that takes `train`.
      params: what the gradient is with respect to.
      batch_stats: BatchNorm's running statistics, {} for a model without.
      images: standardised, the batch first.
      labels: integers, shape=(batch,).
    """

    def loss_fn(params):
        logits, stats = train_logits(apply_fn, params, batch_stats, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), stats

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


def make_train_step(
    dataset: Dataset,
) -> Callable[[TrainState, ArrayLike, ArrayLike], tuple[TrainState, jax.Array]]:
    """`step(state, images, labels) -> (state, loss)`, jitted, the state donated."""

    def step(state: TrainState, images: jax.Array, labels: jax.Array):
        images = dataset.standardise(images)
        (loss, batch_stats), gradient = loss_and_gradient(
            state.apply_fn, state.params, state.batch_stats, images, labels
        )
        state = state.apply_gradients(grads=gradient, batch_stats=batch_stats)
        return state, loss

    return jax.jit(step, donate_argnums=0)


def make_accuracy(
    dataset: Dataset,
) -> Callable[[TrainState, np.ndarray, np.ndarray], float]:
    """`accuracy(state, images, labels)`: the share classified right, in [0, 1]."""

    @jax.jit
    def count_right(state: TrainState, images: jax.Array, labels: jax.Array):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = state.apply_fn(variables, dataset.standardise(images), train=False)
        return jnp.sum(logits.argmax(-1) == labels)

    def accuracy(state: TrainState, images: np.ndarray, labels: np.ndarray) -> float:
        batches = range(0, len(images), _EVAL_BATCH)
        right = [
            count_right(state, images[i : i + _EVAL_BATCH], labels[i : i + _EVAL_BATCH])
            for i in batches
        ]
        return float(sum(right)) / len(images)

    return accuracy
