"""The papers' networks in Flax Linen, each with its declared layer chain beside it.

No biases, a BatchNorm without scale and bias before every ReLU, one dense head (BM 3.3
and 4): the networks of Zhang, Chen and Liu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

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
        use_running_average=not train, momentum=0.9, use_scale=False, use_bias=False
    )(x)
    return nn.relu(x)


class LeNet(nn.Module):
    """LeNet with BatchNorm, BM 3.3; 32x32 images."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of a batch of images, shape (batch, classes)."""
        for name, features in (("cv1", 6), ("cv2", 16)):
            x = nn.Conv(features, (5, 5), padding="VALID", use_bias=False, name=name)(x)
            x = _normalised_relu(x, train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        for name, features in (("fc1", 120), ("fc2", 84)):
            x = nn.Dense(features, use_bias=False, name=name)(x)
            x = _normalised_relu(x, train)
        return nn.Dense(self.num_classes, use_bias=False, name="fc3")(x)


def lenet_spec(input_shape: tuple[int, ...] = (32, 32, 3)) -> spec.LayerChain:
    """The declared chain of `LeNet`."""
    relu = spec.Activation("relu")
    return spec.LayerChain(
        [
            spec.Conv("cv1", padding="VALID"),
            spec.BatchNorm(),
            relu,
            spec.MaxPool((2, 2), strides=(2, 2)),
            spec.Conv("cv2", padding="VALID"),
            spec.BatchNorm(),
            relu,
            spec.MaxPool((2, 2), strides=(2, 2)),
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
    """

    depth: int
    num_classes: int = 10
    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of a batch of images, shape (batch, classes)."""
        for features in _VGG_LAYERS[self.depth]:
            if isinstance(features, str):
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            else:
                x = nn.Conv(int(features * self.width), (3, 3), use_bias=False)(x)
                x = _normalised_relu(x, train)
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(self.num_classes, use_bias=False)(x)


def vgg_spec(depth: int, input_shape: tuple[int, ...] = (32, 32, 3)) -> spec.LayerChain:
    """The declared chain of `VGG` with the same depth, of any width."""
    links: list[spec.Link] = []
    convolutions = 0
    for features in _VGG_LAYERS[depth]:
        if isinstance(features, str):
            links.append(spec.MaxPool((2, 2), strides=(2, 2)))
        else:
            conv = spec.Conv(f"Conv_{convolutions}")
            links += [conv, spec.BatchNorm(), spec.Activation("relu")]
            convolutions += 1
    links += [spec.Flatten(), spec.Dense("Dense_0")]
    return spec.LayerChain(links, input_shape=input_shape)


class Declared(NamedTuple):
    """A network and its declared chain."""

    model: nn.Module
    chain: spec.LayerChain


MODELS: dict[str, Callable[[int, tuple[int, ...]], Declared]] = {
    "lenet": lambda classes, shape: Declared(LeNet(classes), lenet_spec(shape)),
    **{
        f"vgg{depth}": lambda classes, shape, depth=depth: Declared(
            VGG(depth, classes), vgg_spec(depth, shape)
        )
        for depth in _VGG_LAYERS
    },
}
