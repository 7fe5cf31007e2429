"""Small networks of many kinds on data that scikit-learn ships, each ready to train.

The digits are 8x8 here. Every image comes in four copies with Gaussian noise of its
own, as strong as the signal, so that a training loss does not fall to zero in a few
hundred steps and 2 % of it is more than rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import backmatch_optax as bmo
from backmatch_optax import spec
from examples.models import lenet_spec

Batch = dict[str, Any]
_COPIES = 4  # of every example, each with its own noise
_LATENTS = 8  # of the VAE


@dataclasses.dataclass(frozen=True)
class Network:
    """What to train, and on what.

    Attributes:
      model: a Linen module, called with what `inputs` takes from a batch.
      examples: the training set, arrays with the example first, by name.
      loss: of the model's outputs and a batch, one number.
      loss_curvature: the mean diagonal of the loss's Hessian with respect to the
        outputs of one example, at the start.
      chain: the declared chain, or None where scales have to be measured.
      inputs: the names in `examples` of the model's arguments.
      adjust: what is done to the initial parameters.
      powers: the least and the largest power of 2 of SGD's grid of learning rates.
      one_by_one: train one run after the other, not all as one batch.
    """

    model: nn.Module
    examples: Batch
    loss: Callable[[Any, Batch], jax.Array]
    loss_curvature: float
    chain: spec.LayerChain | None
    inputs: tuple[str, ...] = ("x",)
    adjust: Callable[[Any], Any] = lambda params: params
    powers: tuple[int, int] = (-9, 1)
    one_by_one: bool = False


def conv_as_product(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` as one matrix product: batches of kernels too.

    Under `jax.vmap` over kernels XLA's own is slow on a CPU. No dilation, no groups.
    """
    del options
    # Else XLA computes what comes before anew for every tap.
    lhs = jax.lax.optimization_barrier(lhs)
    rows, columns, _, features = rhs.shape
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(
            lhs.shape[1:3], (rows, columns), window_strides, padding
        )
    lhs = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    down, right = window_strides
    high, wide = lhs.shape[1] - rows + 1, lhs.shape[2] - columns + 1
    taps = [
        lhs[:, row : row + high : down, column : column + wide : right]
        for row in range(rows)
        for column in range(columns)
    ]
    patches = jnp.concatenate(taps, -1) if len(taps) > 1 else taps[0]
    patches = jax.lax.optimization_barrier(patches)
    return jax.lax.optimization_barrier(patches @ rhs.reshape(-1, features))


def halves(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """2x2 windows reduced to one entry."""
    batch, height, width, features = x.shape
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, features)
    return reduce(blocks, (2, 4))


class CNN(nn.Module):
    """The public Flax MNIST example's net: two convolutions, two dense layers."""

    features: tuple[int, int, int] = (8, 16, 256)
    fast: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        conv = conv_as_product if self.fast else None
        for count in self.features[:2]:
            x = nn.relu(nn.Conv(count, (3, 3), conv_general_dilated=conv)(x))
            x = (
                nn.avg_pool(x, (2, 2), strides=(2, 2))
                if not self.fast
                else halves(x, jnp.mean)
            )
        x = x.reshape((len(x), -1))
        return nn.Dense(10)(nn.relu(nn.Dense(self.features[2])(x)))


class ResNet18(nn.Module):
    """ResNet-18 with few features and any normalisation or none."""

    norm: str = "batch"
    features: int = 4
    fast: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        plain = self.norm == "none"
        conv = functools.partial(
            nn.Conv,
            use_bias=plain,
            conv_general_dilated=conv_as_product if self.fast else None,
        )

        def norm(x: jax.Array, last: bool = False) -> jax.Array:
            init = nn.initializers.zeros if last else nn.initializers.ones
            if self.norm == "batch":
                return nn.BatchNorm(use_running_average=False, scale_init=init)(x)
            if self.norm == "group":
                return nn.GroupNorm(num_groups=2, scale_init=init)(x)
            return x

        x = nn.relu(norm(conv(self.features, (3, 3))(x)))
        for stage in range(4):
            for index in range(2):
                strides = 2 if stage > 0 and index == 0 else 1
                count = self.features * 2**stage
                y = nn.relu(norm(conv(count, (3, 3), (strides, strides))(x)))
                y = norm(conv(count, (3, 3))(y), last=True)
                if x.shape != y.shape:
                    x = norm(conv(count, (1, 1), (strides, strides))(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class MLP(nn.Module):
    """Dense layers with biases."""

    features: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    head_init: Any = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs of vectors or images."""
        x = x.reshape((len(x), -1))
        for count in self.features[:-1]:
            x = self.activation(nn.Dense(count)(x))
        return nn.Dense(self.features[-1], kernel_init=self.head_init)(x)


class VAE(nn.Module):
    """The public Flax VAE example's net, narrower."""

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array) -> Any:
        """Logits of the pixels, mean and log variance of the latents."""
        h = nn.relu(nn.Dense(100, name="fc1")(x))
        mean = nn.Dense(_LATENTS, name="fc2_mean")(h)
        log_variance = nn.Dense(_LATENTS, name="fc2_logvar")(h)
        z = mean + noise * jnp.exp(0.5 * log_variance)
        z = nn.relu(nn.Dense(100, name="fc3")(z))
        return nn.Dense(x.shape[-1], name="fc4")(z), mean, log_variance


class ActorCritic(nn.Module):
    """A trunk with two heads."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of the actions, and a value."""
        x = x.reshape((len(x), -1))
        for number in range(2):
            x = nn.relu(nn.Dense(64, name=f"hidden_{number}")(x))
        return nn.Dense(10, name="logits")(x), nn.Dense(1, name="value")(x)


class LSTM(nn.Module):
    """A recurrent network over the rows of an image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        cell = nn.OptimizedLSTMCell(24)
        state = cell.initialize_carry(jax.random.key(0), x[:, 0, :, 0].shape)
        for row in range(x.shape[1]):
            state, _ = cell(state, x[:, row, :, 0])
        return nn.Dense(10)(state[1])


class Transformer(nn.Module):
    """Two pre-norm layers over the rows of an image."""

    features: int = 16
    heads: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        x = x[..., 0]
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (x.shape[1], self.features)
        )
        x = nn.Dense(self.features)(x) + positions
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
            y = nn.Dense(4 * self.features)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.features)(nn.gelu(y))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


@dataclasses.dataclass(frozen=True, repr=False)
class CountedAs(spec.Link):
    """A head's output under the shape of another's, to be declared beside it."""

    shape: tuple[int, ...]

    def shape_after(self, input_shape, param_shapes):
        """The other head's."""
        del input_shape, param_shapes
        return self.shape


class SmallLeNet(nn.Module):
    """`examples.models.LeNet` with 3x3 kernels, for small images."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""

        def normalised_relu(x):
            norm = nn.BatchNorm(
                use_running_average=False, use_scale=False, use_bias=False
            )
            return nn.relu(norm(x))

        for name, features in (("cv1", 6), ("cv2", 16)):
            conv = nn.Conv(
                features,
                (3, 3),
                use_bias=False,
                conv_general_dilated=conv_as_product,
                name=name,
            )
            x = halves(normalised_relu(conv(x)), jnp.max)
        x = x.reshape((len(x), -1))
        for name, features in (("fc1", 120), ("fc2", 84)):
            x = normalised_relu(nn.Dense(features, use_bias=False, name=name)(x))
        return nn.Dense(self.num_classes, use_bias=False, name="fc3")(x)


def _noisy(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x = np.concatenate([x] * _COPIES)
    return (x + rng.normal(size=x.shape)).astype(np.float32)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images with mean 0 and standard deviation 1, in random order, and labels."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 8, 8, 1)
    images = (images - images.mean()) / images.std()
    order = np.random.default_rng(0).permutation(len(images))
    return images[order].astype(np.float32), np.asarray(labels, np.int32)[order]


@functools.cache
def digits() -> Batch:
    """Noisy digits `x`, the clean ones `clean`, pixels in [0, 1] and labels `y`."""
    images, labels = _digits()
    rng = np.random.default_rng(1)
    x = _noisy(images, rng)
    clean = np.concatenate([images] * _COPIES)
    span = clean.max() - clean.min()
    return {
        "x": x,
        "clean": clean.reshape(len(x), -1),
        "pixels": ((clean - clean.min()) / span).reshape(len(x), -1),
        "noise": rng.normal(size=(len(x), _LATENTS)).astype(np.float32),
        "y": np.concatenate([labels] * _COPIES),
    }


@functools.cache
def pairs() -> Batch:
    """Two digits side by side, 8x16, of 100 classes."""
    images, labels = _digits()
    rng = np.random.default_rng(2)
    left, right = rng.integers(len(images), size=(2, _COPIES * len(images)))
    x = np.concatenate([images[left], images[right]], axis=2)
    # A quarter of the noise's variance: 100 classes are hard enough.
    x = x + 0.5 * rng.normal(size=x.shape)
    return {"x": x.astype(np.float32), "y": 10 * labels[left] + labels[right]}


@functools.cache
def diabetes() -> Batch:
    """442 patients: ten numbers and how far the disease went, standardised."""
    x, y = map(np.asarray, sklearn.datasets.load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return {"x": x.astype(np.float32), "y": y[:, None].astype(np.float32)}


def _cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def _vae_loss(outputs: Any, batch: Batch) -> jax.Array:
    logits, mean, log_variance = outputs
    likelihood = optax.sigmoid_binary_cross_entropy(logits, batch["pixels"]).sum(-1)
    divergence = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1)
    return (likelihood + divergence).mean()


def _actor_critic_loss(outputs: tuple[jax.Array, jax.Array], batch: Batch) -> jax.Array:
    """The cross-entropy of the right action, and the squared error of a value."""
    logits, value = outputs
    target = batch["y"] / 4.5 - 1
    return _cross_entropy(logits, batch) + optax.l2_loss(value[:, 0], target).mean()


def _times(factor: float) -> Callable[[Any], Any]:
    """All kernels times a number."""
    return lambda params: jax.tree.map(
        lambda leaf: leaf * factor if leaf.ndim > 1 else leaf, params
    )


def _out_of_balance(params: Any) -> Any:
    """Every other kernel times 2, those between over 2: the same ReLU network."""
    kernels = iter((2.0, 0.5) * len(jax.tree.leaves(params)))
    return jax.tree.map(
        lambda leaf: leaf * next(kernels) if leaf.ndim > 1 else leaf, params
    )


def _classifier(
    model: nn.Module, data: Batch, classes: int = 10, *, declared: bool = True, **kwargs
) -> Network:
    chain = None
    if declared:
        slow = model.clone(fast=False) if hasattr(model, "fast") else model
        chain = bmo.infer_spec(slow, data["x"][:2])
    curvature = (classes - 1) / classes**2
    return Network(model, data, _cross_entropy, curvature, chain, **kwargs)


def _mlp(depth: int = 4, width: int = 64, **kwargs) -> MLP:
    return MLP((width,) * (depth - 1) + (10,), **kwargs)


def _vae() -> Network:
    relu = spec.Activation("relu")
    # d z / d log_variance is half the noise times the deviation.
    log_variance = [spec.Dense("fc2_logvar"), spec.Scale(0.5)]
    chain = spec.LayerChain(
        [
            spec.Dense("fc1"),
            relu,
            spec.Residual([spec.Dense("fc2_mean")], log_variance),
            spec.Dense("fc3"),
            relu,
            spec.Dense("fc4"),
        ],
        input_shape=(64,),
    )
    inputs = ("pixels", "noise")
    return Network(VAE(), digits(), _vae_loss, 0.25, chain, inputs, powers=(-13, -4))


def _actor_critic() -> Network:
    relu = spec.Activation("relu")
    chain = spec.LayerChain(
        [
            spec.Flatten(),
            spec.Dense("hidden_0"),
            relu,
            spec.Dense("hidden_1"),
            relu,
            spec.Residual(
                [spec.Dense("logits")], [spec.Dense("value"), CountedAs((10,))]
            ),
        ],
        input_shape=(8, 8, 1),
    )
    return Network(ActorCritic(), digits(), _actor_critic_loss, 0.17, chain)


def _autoencoder() -> Network:
    model = MLP((128, 64, 16, 64, 128, 64))

    def loss(outputs: jax.Array, batch: Batch) -> jax.Array:
        return optax.l2_loss(outputs, batch["clean"]).mean()

    chain = bmo.infer_spec(model, digits()["x"][:2])
    return Network(model, digits(), loss, 1 / 64, chain, powers=(-4, 6))


def _diabetes() -> Network:
    model = MLP((64, 64, 1))
    chain = bmo.infer_spec(model, diabetes()["x"][:2])

    def loss(outputs: jax.Array, batch: Batch) -> jax.Array:
        return optax.l2_loss(outputs, batch["y"]).mean()

    return Network(model, diabetes(), loss, 1.0, chain)


def _lenet(data: Batch, classes: int) -> Network:
    links = [
        dataclasses.replace(link, padding="SAME")
        if isinstance(link, spec.Conv)
        else link
        for link in lenet_spec().layers
    ]
    chain = spec.LayerChain(links, input_shape=data["x"].shape[1:])
    curvature = (classes - 1) / classes**2
    model = SmallLeNet(classes)
    return Network(model, data, _cross_entropy, curvature, chain, one_by_one=True)


_zeros = nn.initializers.zeros

NETWORKS: dict[str, Callable[[], Network]] = {
    "mlp": lambda: _classifier(_mlp(), digits()),
    "mlp, weights halved": lambda: _classifier(_mlp(), digits(), adjust=_times(0.5)),
    "mlp, weights doubled": lambda: _classifier(_mlp(), digits(), adjust=_times(2)),
    "mlp, out of balance": lambda: _classifier(
        _mlp(), digits(), adjust=_out_of_balance
    ),
    "mlp, zero head": lambda: _classifier(_mlp(head_init=_zeros), digits()),
    "deep tanh mlp": lambda: _classifier(_mlp(10, 32, activation=jnp.tanh), digits()),
    "mlp on diabetes": _diabetes,
    "autoencoder": _autoencoder,
    "vae": _vae,
    "actor-critic": _actor_critic,
    "lenet, 10 classes": lambda: _lenet(digits(), 10),
    "lenet, 100 classes": lambda: _lenet(pairs(), 100),
    "mnist cnn": lambda: _classifier(CNN(fast=True), digits()),
    "mnist cnn, weights doubled": lambda: _classifier(
        CNN(fast=True), digits(), adjust=_times(2)
    ),
    "resnet18, batchnorm": lambda: _classifier(
        ResNet18("batch", fast=True), digits(), one_by_one=True
    ),
    "resnet18, groupnorm": lambda: _classifier(
        ResNet18("group", fast=True), digits(), one_by_one=True
    ),
    "resnet18, no norm": lambda: _classifier(
        ResNet18("none", fast=True), digits(), one_by_one=True
    ),
    "lstm, measured": lambda: _classifier(LSTM(), digits(), declared=False),
    "transformer, measured": lambda: _classifier(
        Transformer(), digits(), declared=False
    ),
}
