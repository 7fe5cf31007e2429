"""Small networks drawn at random, with their initial weights and their data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath, keystr

import backmatch_optax as bmo
from backmatch_optax import spec
from examples import cpu, data

Kind = Literal["mlp", "conv", "residual", "attention"]

_KINDS: tuple[Kind, ...] = ("mlp", "conv", "residual", "attention")
_SHARES = (7, 1, 1, 1)  # of each kind among ten networks
_WIDTHS = (16, 24, 32, 48, 64)
BATCH, _TRAIN, _TEST = 64, 8192, 2048  # images a step, to learn from, to test with
HEAD = "head"  # the last layer


@dataclasses.dataclass(frozen=True)
class Network:
    """A network drawn at random.

    Attributes:
      index: its place in the study, and the seed of its weights and batches.
      kind: what it is made of.
      activation: "relu" or "tanh".
      norm: whether there are normalisations; an attention net always has them.
      widths: the features of its hidden layers, blocks or token vectors.
      imbalance: the deviation of the logarithms of what its initial kernels are
        multiplied by; the product of all is 1.
    """

    index: int
    kind: Kind
    activation: str
    norm: bool
    widths: tuple[int, ...]
    imbalance: float

    @property
    def kept_aside(self) -> bool:
        """Whether it is one of those for the final word."""
        return (self.index + self.index // 10) % 5 >= 3

    def __str__(self) -> str:
        """For tables and progress bars."""
        norm = "norm" if self.norm else "plain"
        widths = "-".join(map(str, self.widths))
        return (
            f"{self.index} {self.kind} {self.activation} {norm} {widths} "
            f"x{self.imbalance:.1f}"
        )


def draw(index: int) -> Network:
    """The network of that index; the same at every call."""
    rng = np.random.default_rng([1802, index])
    kind = _KINDS[np.repeat(np.arange(len(_KINDS)), _SHARES)[index % 10]]
    if kind == "mlp":
        depth, choices = int(rng.integers(2, 9)), _WIDTHS
        count = depth - 1
    elif kind == "conv":
        count, choices = int(rng.integers(2, 4)), (6, 8, 12)
    elif kind == "residual":
        count, choices = int(rng.integers(1, 4)), _WIDTHS
    else:
        count, choices = int(rng.integers(1, 3)), (16, 24)
    if kind in ("mlp", "conv") and rng.random() < 0.5:
        widths = tuple(map(int, rng.choice(choices, size=count)))
    else:
        widths = (int(rng.choice(choices)),) * count
    return Network(
        index,
        kind,
        activation=str(rng.choice(["relu", "tanh"])),
        norm=bool(rng.random() < 0.5) or kind == "attention",
        widths=widths,
        imbalance=math.log(2) if rng.random() < 0.5 else 0.0,
    )


def _conv_as_product(
    lhs: jax.Array, rhs: jax.Array, *arguments: Any, **options: Any
) -> jax.Array:
    """A convolution with "SAME" padding as a matrix product.

    With a kernel for each run, XLA's own is many times slower on a CPU.
    """
    del arguments, options
    rows, columns, channels, features = rhs.shape
    _, height, width, _ = lhs.shape
    around = ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    padded = jnp.pad(lhs, around)
    taps = [
        padded[:, i : i + height, j : j + width]
        for i in range(rows)
        for j in range(columns)
    ]
    kernel = rhs.reshape(rows * columns * channels, features)
    return jnp.concatenate(taps, axis=-1) @ kernel


class Model(nn.Module):
    """The Flax model of a network; a BatchNorm uses the batch's statistics always."""

    network: Network
    classes: int
    fast: bool = True  # the convolution that is fast under `vmap`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images, shape (batch, classes)."""
        network = self.network
        if network.kind == "conv":
            for number, width in enumerate(network.widths):
                x = self._activated(self._conv(width)(x))
                if number < 2:
                    pool = cpu.max_pool if self.fast else nn.max_pool
                    x = pool(x, (2, 2), strides=(2, 2))
            x = x.reshape(len(x), -1)
        elif network.kind == "mlp":
            x = x.reshape(len(x), -1)
            for width in network.widths:
                x = self._activated(self._dense(width)(x))
        elif network.kind == "residual":
            x = self._dense(network.widths[0])(x.reshape(len(x), -1))
            for width in network.widths:
                branch = self._activated(self._dense(width)(x))
                x = x + self._dense(width)(branch)
            x = self._activated(x)
        else:
            x = self._attention(x)
        return nn.Dense(self.classes, name=HEAD)(x)

    @property
    def _bias(self) -> bool:
        return not self.network.norm or self.network.kind == "attention"

    def _dense(self, width: int) -> nn.Dense:
        return nn.Dense(width, use_bias=self._bias)

    def _conv(self, width: int) -> nn.Conv:
        return nn.Conv(
            width,
            (3, 3),
            use_bias=self._bias,
            conv_general_dilated=_conv_as_product if self.fast else None,
        )

    def _activated(self, x: jax.Array) -> jax.Array:
        if self.network.norm and self.network.kind != "attention":
            x = nn.BatchNorm(use_running_average=False)(x)
        return getattr(jax.nn, self.network.activation)(x)

    def _attention(self, x: jax.Array) -> jax.Array:
        """A transformer on patches of 2x4 pixels, averaged over its tokens."""
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 4, 4, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 8 * channels)
        size = self.network.widths[0]
        tokens = x.shape[1]
        place = self.param("place", nn.initializers.normal(0.1), (tokens, size))
        x = self._dense(size)(x) + place
        for _ in self.network.widths:
            z = nn.LayerNorm()(x)
            # A key's bias changes nothing, so that its measured scale is infinite.
            query, key, value = (nn.Dense(size, use_bias=False)(z) for _ in range(3))
            logits = jnp.einsum("bqc,bkc->bqk", query, key) / math.sqrt(size)
            weights = jax.nn.softmax(logits)
            mixed = jnp.einsum("bqk,bkc->bqc", weights, value)
            x = x + self._dense(size)(mixed)
            hidden = self._activated(self._dense(2 * size)(nn.LayerNorm()(x)))
            x = x + self._dense(size)(hidden)
        return nn.LayerNorm()(x).mean(1)


Apply = Callable[[Any, jax.Array], jax.Array]


class Task(NamedTuple):
    """A network with its initial weights, its chain and its data."""

    apply: Apply
    params: Any
    chain: spec.LayerChain | None  # None where it cannot be declared
    images: np.ndarray  # shape=(n, 8, 8, channels), float32
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    order: np.ndarray  # the images of each batch, shape=(steps, batch)


def make_task(network: Network, dataset: data.Dataset, steps: int) -> Task:
    """What the methods are given: all of them the same."""
    images = small(dataset, dataset.train_images[:_TRAIN])
    test_images = small(dataset, dataset.test_images[:_TEST])
    model = Model(network, dataset.num_classes)
    # What initialises is not compiled, which would take seconds.
    shapes: Any = dict(jax.eval_shape(model.init, jax.random.key(0), images[:2]))
    rng = np.random.default_rng(network.index)
    params = initial_params(shapes.pop("params"), network, rng)
    # BatchNorm's running statistics, which are never read.
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        mutable = list(variables)
        logits: Any = model.apply({"params": params, **variables}, x, mutable=mutable)
        return logits[0]

    chain = None
    if network.kind != "attention":
        chain = bmo.infer_spec(model.clone(fast=False), images[:2])
    # Every image once, then every image once again.
    epochs = math.ceil(steps * BATCH / len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])
    order = order[: steps * BATCH].reshape(steps, BATCH)
    labels = dataset.train_labels[:_TRAIN]
    test_labels = dataset.test_labels[:_TEST]
    return Task(apply, params, chain, images, labels, test_images, test_labels, order)


def initial_params(shapes: Any, network: Network, rng: np.random.Generator) -> Any:
    """Normal kernels that keep a signal's size, out of balance or not."""
    kernels = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(shapes))
    logs = network.imbalance * rng.normal(size=kernels)
    factors = iter(np.exp(logs - logs.mean()))

    def initial(path: KeyPath, leaf: Any) -> jax.Array:
        name = keystr(path, simple=True, separator="/")
        if leaf.ndim < 2:
            return jnp.full(leaf.shape, float(name.endswith("scale")))
        gain = 2 if network.activation == "relu" and HEAD not in name else 1
        size = math.sqrt(gain * leaf.shape[-1] / leaf.size) * next(factors)
        return jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(initial, shapes)


def small(dataset: data.Dataset, images: np.ndarray) -> np.ndarray:
    """Standardised images, 32x32 averaged down to 8x8."""
    n, height, width, channels = images.shape
    x = np.asarray(dataset.standardise(jnp.asarray(images)), np.float32)
    x = x.reshape(n, 8, height // 8, 8, width // 8, channels)
    return x.mean((2, 4))
