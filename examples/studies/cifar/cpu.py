"""Convolution and pooling of the same value, faster on a CPU.

XLA is slow on a CPU in three places, which `conv` and `max_pool` avoid, and `faster`
puts them into a network:

* A convolution of few input channels. LeNet's first takes half of a training step.
* A convolution of an image smaller than the kernel, such as a 2x2 image under a 3x3
  kernel. XLA's algebraic simplifier swaps the two, and the kernel is convolved with the
  image. VGG11 has two on 2x2 images, which take three quarters of a training step.
* The gradient of max-pooling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def faster(model: nn.Module) -> nn.Module:
    """The same network, with `conv` and `max_pool` where it runs on a CPU.

    A network without these two attributes stays as it is. The ResNets have none: on
    32x32 images their smallest has 4x4 pixels, more than a 3x3 kernel has taps.
    """
    if jax.default_backend() == "cpu" and hasattr(model, "max_pool"):
        return model.clone(conv=conv, max_pool=max_pool)
    return model


def conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]] | str,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for Flax's `conv_general_dilated=`.

    Args:
      lhs: images, shape (batch, height, width, channels).
      rhs: kernel, shape (rows, columns, channels, features).
      window_strides: as in `jax.lax.conv_general_dilated`, and all that follow.
      padding: zeros around the images.
      **options: with a dilation, or feature groups, XLA computes it.

    Returns:
      Shape (batch, height, width, features), by `as_product` where the kernel is larger
      than the image, and `in_blocks` where that applies, else by XLA.
    """
    dilations = (options.get("lhs_dilation"), options.get("rhs_dilation"))
    dilated = any(step != 1 for steps in dilations if steps for step in steps)
    if not dilated and options.get("feature_group_count", 1) == 1:
        image, kernel = lhs.shape[1:3], rhs.shape[:2]
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(image, kernel, window_strides, padding)
        if math.prod(kernel) > math.prod(image):
            return as_product(lhs, rhs, window_strides, padding)
        unpadded = not any(size for pair in padding for size in pair)
        even = not any(
            size % 2 or (size - taps + 1) % 2
            for size, taps in zip(image, kernel, strict=True)
        )
        if unpadded and even and set(window_strides) == {1} and lhs.shape[-1] <= 3:
            return in_blocks(lhs, rhs)
    return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def as_product(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """A convolution as one product with a dense matrix, for small images.

    Args:
      lhs: images, shape (batch, height, width, channels).
      rhs: kernel, shape (rows, columns, channels, features).
      window_strides: along height and width.
      padding: zeros before and after, along height and width.

    Returns:
      Shape (batch, height, width, features).
    """

    def taps(size: int, taken: int, stride: int, pads: tuple[int, int]) -> jax.Array:
        """1 where an output reads an input by a tap; shape (inputs, outputs, taps)."""
        outputs = (size + sum(pads) - taken) // stride + 1
        read = stride * np.arange(outputs)[:, None] + np.arange(taken) - pads[0]
        return jnp.asarray(read == np.arange(size)[:, None, None], rhs.dtype)

    rows, columns = map(taps, lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    matrix = jnp.einsum("hpr,wqs,rsio->hwipqo", rows, columns, rhs)
    return jnp.einsum("bhwi,hwipqo->bpqo", lhs, matrix)


def in_blocks(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution without padding or strides, 2x2 blocks of pixels as channels.

    Args:
      lhs: images of even size, shape (batch, height, width, channels).
      rhs: kernel that leaves an even size, shape (rows, columns, channels, features).

    Returns:
      Shape (batch, height - rows + 1, width - columns + 1, features).
    """
    rows, columns, channels, features = rhs.shape
    batch, height, width, _ = lhs.shape
    blocks = lhs.reshape(batch, height // 2, 2, width // 2, 2, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(batch, height // 2, width // 2, 4 * channels)
    # One shifted kernel for each pixel of an output block; the shift makes it even.
    shifted = jnp.stack(
        [
            jnp.pad(rhs, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)))
            for i in range(2)
            for j in range(2)
        ],
        axis=-2,
    )
    rows, columns = (rows + 1) // 2, (columns + 1) // 2
    shifted = shifted.reshape(rows, 2, columns, 2, channels, 4 * features)
    shifted = shifted.transpose(0, 2, 1, 3, 4, 5)
    shifted = shifted.reshape(rows, columns, 4 * channels, 4 * features)
    y = jax.lax.conv_general_dilated(
        blocks, shifted, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    height, width = y.shape[1:3]
    y = y.reshape(batch, height, width, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, 2 * height, 2 * width, features)


def max_pool(
    x: jax.Array, window_shape: tuple[int, int], strides: tuple[int, int]
) -> jax.Array:
    """`flax.linen.max_pool` of windows that do not overlap and leave nothing over.

    Args:
      x: shape (batch, height, width, features), divisible by the window.
      window_shape: height and width of a window.
      strides: the same.

    Returns:
      Shape (batch, height / rows, width / columns, features). Where entries tie, the
      first has the gradient, as in XLA's own.

    Raises:
      ValueError: where windows overlap or do not fit.
    """
    (rows, columns), (batch, height, width, features) = window_shape, x.shape
    if strides != window_shape or height % rows or width % columns:
        raise ValueError(
            f"windows {window_shape} with strides {strides} must tile the image "
            f"({height}, {width})"
        )
    x = x.reshape(batch, height // rows, rows, width // columns, columns, features)
    entries = [x[:, :, i, :, j] for i in range(rows) for j in range(columns)]
    # Not `x.max`: its gradient goes where an entry equals the maximum, and a compiler
    # that computes the entries twice, rounded differently, finds none that does.
    larger = lambda a, b: jnp.where((a >= b) | jnp.isnan(a), a, b)  # noqa: E731
    return functools.reduce(larger, entries)
