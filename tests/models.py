"""Small networks in Linen and in NNX, with the chains that declare them.

The two forms of a network name their layers alike, so one chain serves both.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from backmatch_optax import spec


def init_params(model: nn.Module, chain: spec.LayerChain, seed: int = 0) -> Any:
    """Random parameters for a Linen network, as nested dicts.

    Without compiling the network, which takes seconds; no scale is 1 and no bias 0.
    """
    rng = np.random.default_rng(seed)
    example = jnp.zeros((1, *chain.input_shape))
    shapes = jax.eval_shape(model.init, jax.random.key(seed), example)["params"]

    def random_leaf(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spread = 1 / math.sqrt(math.prod(leaf.shape[:-1]) or 1)
        return jnp.asarray(rng.normal(size=leaf.shape) * spread, leaf.dtype)

    return jax.tree.map(random_leaf, shapes)


def init_variables(model: nn.Module, chain: spec.LayerChain, seed: int = 0) -> Any:
    """All the variables of a Linen network as it initialises them."""
    example = jnp.zeros((1, *chain.input_shape))
    return jax.jit(model.init)(jax.random.key(seed), example)


# LeNet with batch normalization, as the back-matching paper (BM 3.3) trains it: no
# biases, and a normalization without scale and bias after every layer but the last.
LENET = spec.LayerChain(
    [
        spec.Conv("cv1", padding="VALID"),
        spec.BatchNorm(),
        spec.Activation("relu"),
        spec.MaxPool((2, 2), strides=2),
        spec.Conv("cv2", padding="VALID"),
        spec.BatchNorm(),
        spec.Activation("relu"),
        spec.MaxPool((2, 2), strides=2),
        spec.Flatten(),
        spec.Dense("fc1"),
        spec.BatchNorm(),
        spec.Activation("relu"),
        spec.Dense("fc2"),
        spec.BatchNorm(),
        spec.Activation("relu"),
        spec.Dense("fc3"),
    ],
    input_shape=(32, 32, 3),
)


class LeNet(nn.Module):
    """LeNet with batch normalization, in Linen; `LENET` declares it."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def normalize_and_activate(x: jax.Array) -> jax.Array:
            norm = nn.BatchNorm(
                use_running_average=not train, use_bias=False, use_scale=False
            )
            return nn.relu(norm(x))

        for name, features in (("cv1", 6), ("cv2", 16)):
            x = nn.Conv(features, (5, 5), padding="VALID", use_bias=False, name=name)(x)
            x = nn.max_pool(normalize_and_activate(x), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        for name, features in (("fc1", 120), ("fc2", 84)):
            x = normalize_and_activate(nn.Dense(features, use_bias=False, name=name)(x))
        return nn.Dense(10, use_bias=False, name="fc3")(x)


class NnxLeNet(nnx.Module):
    """LeNet with batch normalization, in NNX; `LENET` declares it."""

    def __init__(self, rngs: nnx.Rngs):
        def conv(features_in: int, features_out: int) -> nnx.Conv:
            return nnx.Conv(
                features_in,
                features_out,
                (5, 5),
                padding="VALID",
                use_bias=False,
                rngs=rngs,
            )

        def dense(features_in: int, features_out: int) -> nnx.Linear:
            return nnx.Linear(features_in, features_out, use_bias=False, rngs=rngs)

        def norm(features: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(features, use_bias=False, use_scale=False, rngs=rngs)

        self.cv1, self.bn1 = conv(3, 6), norm(6)
        self.cv2, self.bn2 = conv(6, 16), norm(16)
        self.fc1, self.bn3 = dense(400, 120), norm(120)
        self.fc2, self.bn4 = dense(120, 84), norm(84)
        self.fc3 = dense(84, 10)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in ((self.cv1, self.bn1), (self.cv2, self.bn2)):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        for dense, norm in ((self.fc1, self.bn3), (self.fc2, self.bn4)):
            x = nnx.relu(norm(dense(x)))
        return self.fc3(x)


# A small convolutional network as people write them: biases, and affine normalization.
CONV_NET = spec.LayerChain(
    [
        spec.Conv("conv1"),
        spec.BatchNorm("norm1"),
        spec.Activation("relu"),
        spec.AvgPool((2, 2), strides=2),
        spec.Conv("conv2", strides=2),
        spec.BatchNorm("norm2"),
        spec.Activation("relu"),
        spec.GlobalAvgPool(),
        spec.Dense("head"),
    ],
    input_shape=(8, 8, 3),
)


class ConvNet(nn.Module):
    """A small convolutional network in Linen; `CONV_NET` declares it."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        frozen = not train
        x = nn.Conv(4, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=frozen, name="norm1")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(6, (3, 3), strides=2, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=frozen, name="norm2")(x))
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


class NnxConvNet(nnx.Module):
    """A small convolutional network in NNX; `CONV_NET` declares it."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean(axis=(1, 2)))


# A multilayer perceptron with biases and without normalization.
MLP = spec.LayerChain(
    [
        spec.Dense("fc1"),
        spec.Activation("relu"),
        spec.Dense("fc2"),
        spec.Activation("relu"),
        spec.Dense("fc3"),
    ],
    input_shape=(8,),
)


class Mlp(nn.Module):
    """A multilayer perceptron in Linen; `MLP` declares it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(16, name="fc1")(x))
        x = nn.relu(nn.Dense(12, name="fc2")(x))
        return nn.Dense(4, name="fc3")(x)


class NnxMlp(nnx.Module):
    """A multilayer perceptron in NNX; `MLP` declares it."""

    def __init__(self, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(8, 16, rngs=rngs)
        self.fc2 = nnx.Linear(16, 12, rngs=rngs)
        self.fc3 = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)


def random_like(tree: Any, seed: int = 0) -> Any:
    """A tree of normal float32 entries in the shapes of another; compiles nothing."""
    normal = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(normal(size=leaf.shape)), tree)
