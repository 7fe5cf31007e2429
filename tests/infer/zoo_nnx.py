"""The networks of `zoo_linen` in NNX, with layers of the same names."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx


def conv(*args: Any, strides: int = 1, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    """A convolution without bias, as normalisations follow."""
    options = {"use_bias": False} | options
    return nnx.Conv(*args, strides=strides, rngs=rngs, **options)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions, and a projection where the shape changes."""

    def __init__(self, inputs: int, features: int, strides: int, rngs: nnx.Rngs):
        self.conv1 = conv(inputs, features, (3, 3), strides=strides, rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(features, features, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        self.projects = inputs != features or strides != 1
        if self.projects:
            self.proj = conv(inputs, features, (1, 1), strides=strides, rngs=rngs)
            self.proj_norm = nnx.BatchNorm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (self.proj_norm(self.proj(x)) if self.projects else x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, and a projection where the shape changes."""

    def __init__(self, inputs: int, features: int, strides: int, rngs: nnx.Rngs):
        self.conv1 = conv(inputs, features, (1, 1), rngs=rngs)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = conv(features, features, (3, 3), strides=strides, rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        self.conv3 = conv(features, 4 * features, (1, 1), rngs=rngs)
        self.norm3 = nnx.BatchNorm(4 * features, rngs=rngs)
        self.projects = inputs != 4 * features or strides != 1
        if self.projects:
            self.proj = conv(inputs, 4 * features, (1, 1), strides=strides, rngs=rngs)
            self.proj_norm = nnx.BatchNorm(4 * features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + (self.proj_norm(self.proj(x)) if self.projects else x))


class ResNet(nnx.Module):
    """A residual network for images, as in He et al. (2016)."""

    def __init__(
        self,
        stages: Sequence[int],
        block: type[BasicBlock] | type[Bottleneck],
        rngs: nnx.Rngs,
        width: int = 64,
    ):
        pads = [(3, 3), (3, 3)]
        self.stem = conv(3, width, (7, 7), strides=2, padding=pads, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(width, rngs=rngs)
        grows = 4 if block is Bottleneck else 1
        inputs, blocks = width, []
        for stage, count in enumerate(stages):
            for index in range(count):
                strides, features = 2 if stage and not index else 1, width * 2**stage
                blocks.append(block(inputs, features, strides, rngs))
                inputs = features * grows
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class PreActivation(nnx.Module):
    """A residual block that normalises first."""

    def __init__(self, inputs: int, features: int, strides: int, rngs: nnx.Rngs):
        self.norm1 = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, features, (3, 3), strides, rngs=rngs)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.projects = inputs != features or strides != 1
        if self.projects:
            self.proj = nnx.Conv(inputs, features, (1, 1), strides, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(x))
        if self.projects:
            x = self.proj(y)
        return x + self.conv2(nnx.relu(self.norm2(self.conv1(y))))


class PreActivationNet(nnx.Module):
    """A residual network whose blocks normalise first."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.block1 = PreActivation(8, 8, 1, rngs)
        self.block2 = PreActivation(8, 16, 2, rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.block2(self.block1(self.stem(x)))
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


VGG_STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class Vgg(nnx.Module):
    """The papers' VGG, narrow, with the layer names Linen gives its own."""

    def __init__(self, depth: int, rngs: nnx.Rngs):
        self.stages = VGG_STAGES[depth]
        inputs, number = 3, 0
        for stage, count in enumerate(self.stages):
            for _ in range(count):
                features = 8 * 2 ** min(stage, 3)
                setattr(
                    self, f"Conv_{number}", conv(inputs, features, (3, 3), rngs=rngs)
                )
                norm = nnx.BatchNorm(
                    features, use_scale=False, use_bias=False, rngs=rngs
                )
                setattr(self, f"norm_{number}", norm)
                inputs, number = features, number + 1
        self.Dense_0 = nnx.Linear(inputs, 10, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        number = 0
        for count in self.stages:
            for _ in range(count):
                x = getattr(self, f"Conv_{number}")(x)
                x = nnx.relu(getattr(self, f"norm_{number}")(x))
                number += 1
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.Dense_0(x.reshape(x.shape[0], -1))


def abstract(make: Callable[[nnx.Rngs], Any]) -> Any:
    """A model without arrays."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))
