"""Networks in Flax Linen, each with its declared layer chain beside it.

LeNet and the VGGs are those of Zhang, Chen and Liu (BM 3.3 and 4): no biases, a
BatchNorm without scale and bias before every ReLU, one dense head. The ResNet is as
people use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.typing import DTypeLike

import backmatch_optax as bmo
from backmatch_optax import spec

# Output features of each 3x3 convolution; "M" is a 2x2 max pooling (Simonyan and
# Zisserman, 2015).
_VGG_LAYERS: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", *(256,) * 2, "M", *(512,) * 2, "M", *(512,) * 2, "M"),
    13: (*(64,) * 2, "M", *(128,) * 2, "M", *(256,) * 2, "M", *(512,) * 2, "M",
         *(512,) * 2, "M"),
    16: (*(64,) * 2, "M", *(128,) * 2, "M", *(256,) * 3, "M", *(512,) * 3, "M",
         *(512,) * 3, "M"),
    19: (*(64,) * 2, "M", *(128,) * 2, "M", *(256,) * 4, "M", *(512,) * 4, "M",
         *(512,) * 4, "M"),
}  # fmt: skip


def _normalised_relu(x: jax.Array, train: bool) -> jax.Array:
    x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        use_scale=False,
        use_bias=False,
        dtype=x.dtype,
    )(x)
    return nn.relu(x)


class LeNet(nn.Module):
    """LeNet with BatchNorm, BM 3.3; 32x32 images.

    Attributes:
      num_classes: the number of classes.
      dtype: what it computes in; parameters and logits are float32.
      conv: what computes a convolution, `jax.lax.conv_general_dilated` or its equal.
      max_pool: what pools, `flax.linen.max_pool` or its equal.
    """

    num_classes: int = 10
    dtype: DTypeLike = "float32"
    conv: Callable[..., jax.Array] = jax.lax.conv_general_dilated
    max_pool: Callable[..., jax.Array] = nn.max_pool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of a batch of images, shape (batch, classes)."""
        for name, features in (("cv1", 6), ("cv2", 16)):
            x = nn.Conv(
                features,
                (5, 5),
                padding="VALID",
                use_bias=False,
                dtype=self.dtype,
                conv_general_dilated=self.conv,
                name=name,
            )(x)
            x = _normalised_relu(x, train)
            x = self.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        for name, features in (("fc1", 120), ("fc2", 84)):
            x = _normalised_relu(dense(features, name=name)(x), train)
        return dense(self.num_classes, name="fc3")(x).astype("float32")


def lenet_spec(input_shape: tuple[int, ...] = (32, 32, 3)) -> spec.LayerChain:
    """The declared chain of `LeNet`."""
    relu = spec.Activation("relu")
    return spec.LayerChain(
        [
            spec.Conv("cv1", padding="VALID"),
            spec.BatchNorm(),
            relu,
            spec.MaxPool((2, 2), strides=2),
            spec.Conv("cv2", padding="VALID"),
            spec.BatchNorm(),
            relu,
            spec.MaxPool((2, 2), strides=2),
            spec.Flatten(),
            spec.Dense("fc1"),
            spec.BatchNorm(),
            relu,
            spec.Dense("fc2"),
            spec.BatchNorm(),
            relu,
            spec.Dense("fc3"),
        ],
        input_shape=input_shape,
    )


class VGG(nn.Module):
    """VGG with BatchNorm and one dense layer, BM 4 and LH 4.1; 32x32 images.

    Attributes:
      depth: 11, 13, 16 or 19.
      num_classes: the number of classes.
      width: what every number of features is multiplied by.
      dtype: what it computes in; parameters and logits are float32.
      conv: what computes a convolution, `jax.lax.conv_general_dilated` or its equal.
      max_pool: what pools, `flax.linen.max_pool` or its equal.
    """

    depth: int
    num_classes: int = 10
    width: float = 1.0
    dtype: DTypeLike = "float32"
    conv: Callable[..., jax.Array] = jax.lax.conv_general_dilated
    max_pool: Callable[..., jax.Array] = nn.max_pool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of a batch of images, shape (batch, classes)."""
        for features in _VGG_LAYERS[self.depth]:
            if isinstance(features, str):
                x = self.max_pool(x, (2, 2), strides=(2, 2))
            else:
                x = nn.Conv(
                    int(features * self.width),
                    (3, 3),
                    use_bias=False,
                    dtype=self.dtype,
                    conv_general_dilated=self.conv,
                )(x)
                x = _normalised_relu(x, train)
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(self.num_classes, use_bias=False, dtype=self.dtype)(x)
        return x.astype("float32")


def vgg_spec(depth: int, input_shape: tuple[int, ...] = (32, 32, 3)) -> spec.LayerChain:
    """The declared chain of `VGG` with the same depth, of any width."""
    links: list[spec.Link] = []
    convolutions = 0
    for features in _VGG_LAYERS[depth]:
        if isinstance(features, str):
            links.append(spec.MaxPool((2, 2), strides=2))
        else:
            conv = spec.Conv(f"Conv_{convolutions}")
            links += [conv, spec.BatchNorm(), spec.Activation("relu")]
            convolutions += 1
    links += [spec.Flatten(), spec.Dense("Dense_0")]
    return spec.LayerChain(links, input_shape=input_shape)


def _joined(
    x: jax.Array, y: jax.Array, strides: tuple[int, int], norm: Callable[[], nn.Module]
) -> jax.Array:
    """A block's branch added to its shortcut, a projection where shapes differ."""
    if x.shape != y.shape:
        x = nn.Conv(y.shape[-1], (1, 1), strides, use_bias=False)(x)
        x = norm()(x)  # pyright: ignore[reportCallIssue]
    return nn.relu(x + y)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., 2015)."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Shape (batch, height / strides, width / strides, features)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        strides = (self.strides, self.strides)
        y = nn.Conv(self.features, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        return _joined(x, norm(scale_init=nn.initializers.zeros)(y), strides, norm)


class BottleneckBlock(nn.Module):
    """A 3x3 convolution between two 1x1 ones, around a shortcut (He et al., 2015)."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Shape (batch, height / strides, width / strides, 4 * features)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        strides = (self.strides, self.strides)
        y = nn.relu(norm()(nn.Conv(self.features, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.features, (3, 3), strides, use_bias=False)(y)
        y = nn.Conv(4 * self.features, (1, 1), use_bias=False)(nn.relu(norm()(y)))
        return _joined(x, norm(scale_init=nn.initializers.zeros)(y), strides, norm)


class ResNet(nn.Module):
    """A residual network for 32x32 images, with affine BatchNorms.

    Attributes:
      blocks: the number of blocks in each stage; a stage halves the image and doubles
        the features. (2, 2, 2, 2) with 64 features is ResNet-18.
      num_classes: the number of classes.
      features: of the first stage.
      block: what a block is; (3, 4, 6, 3) of `BottleneckBlock` is ResNet-50.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    num_classes: int = 10
    features: int = 64
    block: type[nn.Module] = BasicBlock

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of a batch of images, shape (batch, classes)."""
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                strides = 2 if stage > 0 and index == 0 else 1
                x = self.block(self.features * 2**stage, strides)(x, train)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def resnet_spec(
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    input_shape: tuple[int, ...] = (32, 32, 3),
) -> spec.LayerChain:
    """The declared chain of `ResNet` with the same basic blocks, of any width."""
    relu = spec.Activation("relu")
    links: list[spec.Link] = [spec.Conv("Conv_0"), spec.BatchNorm("BatchNorm_0"), relu]
    number = 0
    for stage, count in enumerate(blocks):
        for index in range(count):
            path = f"BasicBlock_{number}"
            strides = 2 if stage > 0 and index == 0 else 1
            branch = [
                spec.Conv(f"{path}/Conv_0", strides=strides),
                spec.BatchNorm(f"{path}/BatchNorm_0"),
                relu,
                spec.Conv(f"{path}/Conv_1"),
                spec.BatchNorm(f"{path}/BatchNorm_1"),
            ]
            shortcut = [
                spec.Conv(f"{path}/Conv_2", strides=strides),
                spec.BatchNorm(f"{path}/BatchNorm_2"),
            ]
            links += [spec.Residual(branch, shortcut if strides > 1 else ()), relu]
            number += 1
    links += [spec.GlobalAvgPool(), spec.Dense("Dense_0")]
    return spec.LayerChain(links, input_shape=input_shape)


class Declared(NamedTuple):
    """A network and its declared chain."""

    model: nn.Module
    chain: spec.LayerChain


def _inferred(model: nn.Module, input_shape: tuple[int, ...]) -> Declared:
    """A network whose chain nobody wrote down."""
    image = jax.ShapeDtypeStruct((1, *input_shape), "float32")
    return Declared(model, bmo.infer_spec(model, image, train=True))


MODELS: dict[str, Callable[[int, tuple[int, ...]], Declared]] = {
    "lenet": lambda classes, shape: Declared(LeNet(classes), lenet_spec(shape)),
    "resnet18": lambda classes, shape: Declared(
        ResNet(num_classes=classes), resnet_spec(input_shape=shape)
    ),
    "resnet50": lambda classes, shape: _inferred(
        ResNet((3, 4, 6, 3), classes, block=BottleneckBlock), shape
    ),
    **{
        f"vgg{depth}": lambda classes, shape, depth=depth: Declared(
            VGG(depth, classes), vgg_spec(depth, shape)
        )
        for depth in _VGG_LAYERS
    },
}
