"""Convolution and pooling of the same value, faster on a CPU.

XLA is slow on a CPU in three places, which `conv` and `max_pool` avoid, and `faster`
puts them into a network:

* A convolution of few input channels. LeNet's two take most of a training step.
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
        channels = lhs.shape[-1]
        if unpadded and set(window_strides) == {1} and channels <= 8:
            sizes = [*image, *(i - k + 1 for i, k in zip(image, kernel, strict=True))]
            # A larger block has a larger product, and more of it is zeros.
            for size in (4, 2) if channels <= 3 else (2,):
                if not any(pixels % size for pixels in sizes):
                    return in_blocks(lhs, rhs, size)
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


def in_blocks(lhs: jax.Array, rhs: jax.Array, size: int) -> jax.Array:
    """A convolution without padding or strides, as one product over blocks of pixels.

    A block's pixels are channels of a coarser image, and so are its outputs, so that
    the product's matrix is large enough for a CPU.

    Args:
      lhs: images, shape (batch, height, width, channels).
      rhs: kernel, shape (rows, columns, channels, features).
      size: height and width of a block; divides the image and what the kernel leaves.

    Returns:
      Shape (batch, height - rows + 1, width - columns + 1, features).
    """
    rows, columns, channels, features = rhs.shape
    batch, height, width, _ = lhs.shape
    # Else XLA computes what leads to the image anew for each block that reads it.
    lhs = jax.lax.optimization_barrier(lhs)
    blocks = lhs.reshape(batch, height // size, size, width // size, size, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(*blocks.shape[:3], -1)
    # The blocks that a block of outputs reads, side by side.
    down, across = (-(-(taps + size - 1) // size) for taps in (rows, columns))
    height, width = (height - rows + 1) // size, (width - columns + 1) // size
    read = [
        blocks[:, i : i + height, j : j + width]
        for i in range(down)
        for j in range(across)
    ]
    # One shifted kernel for each pixel of a block of outputs.
    below, right = down * size - rows, across * size - columns
    shifted = jnp.stack(
        [
            jnp.pad(rhs, ((i, below - i), (j, right - j), (0, 0), (0, 0)))
            for i in range(size)
            for j in range(size)
        ],
        axis=-2,
    )
    shifted = shifted.reshape(down, size, across, size, channels, size**2 * features)
    shifted = shifted.transpose(0, 2, 1, 3, 4, 5)
    y = jnp.concatenate(read, axis=-1) @ shifted.reshape(-1, size**2 * features)
    y = y.reshape(batch, height, width, size, size, features)
    y = y.transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, size * height, size * width, features)


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
