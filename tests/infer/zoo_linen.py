"""Networks as people write them in Linen, for `infer_spec`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from backmatch_optax.infer import infer_spec


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a projection where the shape changes."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train)
        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = nn.Conv(
                self.features, (1, 1), self.strides, use_bias=False, name="proj"
            )(x)
            x = norm(name="proj_norm")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, and a projection where the shape changes."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train)
        conv = partial(nn.Conv, use_bias=False)
        shortcut = x
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.strides)(y)))
        y = norm()(conv(4 * self.features, (1, 1))(y))
        if shortcut.shape != y.shape:
            shortcut = conv(4 * self.features, (1, 1), self.strides, name="proj")(x)
            shortcut = norm(name="proj_norm")(shortcut)
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """A residual network for images, as in He et al. (2016)."""

    stages: Sequence[int]
    block: Callable[..., nn.Module]
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(
            self.width, (7, 7), 2, padding=[(3, 3), (3, 3)], use_bias=False, name="stem"
        )(x)
        x = nn.BatchNorm(use_running_average=not train, name="stem_norm")(x)
        x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(self.stages):
            for index in range(count):
                strides = 2 if stage and not index else 1
                x = self.block(self.width * 2**stage, strides)(x, train)
        return nn.Dense(10, name="head")(jnp.mean(x, axis=(1, 2)))


class PreActivation(nn.Module):
    """A residual block that normalises first."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(nn.BatchNorm, use_running_average=not train)
        y = nn.relu(norm(name="norm1")(x))
        if x.shape[-1] != self.features or self.strides != 1:
            x = nn.Conv(self.features, (1, 1), self.strides, name="proj")(y)
        y = nn.Conv(self.features, (3, 3), self.strides, name="conv1")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = nn.Conv(self.features, (3, 3), name="conv2")(y)
        return x + y


class PreActivationNet(nn.Module):
    """A residual network whose blocks normalise first."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = PreActivation(8, name="block1")(x, train)
        x = PreActivation(16, 2, name="block2")(x, train)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(10, name="head")(nn.relu(x).mean(axis=(1, 2)))


class Call(nn.Module):
    """Whatever a function does with its own module and the input."""

    function: Callable[..., Any]

    @nn.compact
    def __call__(self, *inputs: jax.Array, train: bool = False) -> Any:
        del train
        return self.function(self, *inputs)


IMAGES = (2, 8, 8, 6)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def infer(function: Callable[..., Any], *shape: int, **options: Any) -> Any:
    """The links of what a function does within a Linen module."""
    return list(infer_spec(Call(function), array(*(shape or IMAGES)), **options).layers)
