"""Model families as people write them, small enough to be measured in seconds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Function = Callable[[jax.Array], jax.Array]


class ResNet(nn.Module):
    """Residual blocks of two convolutions, He et al. (2016)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """What it makes of a batch."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(16, (3, 3), use_bias=False)(x)))
        for features, strides in ((16, 1), (32, 2)):
            y = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
            y = nn.Conv(features, (3, 3), use_bias=False)(nn.relu(norm()(y)))
            if x.shape != y.shape:
                x = norm()(nn.Conv(features, (1, 1), strides, use_bias=False)(x))
            x = nn.relu(x + norm()(y))
        return nn.Dense(10)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """Every layer sees all before it, Huang et al. (2017)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """What it makes of a batch."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(3):
            y = nn.Conv(16, (1, 1), use_bias=False)(nn.relu(norm()(x)))
            y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(norm()(y)))
            x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(10)(nn.relu(norm()(x)).mean((1, 2)))


class UNet(nn.Module):
    """Skips from the way down to the way up, Ronneberger et al. (2015)."""

    upsampling: str
    features: int = 24

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        few, more = self.features, 2 * self.features
        a = self.layer(x, few)
        b = self.layer(nn.max_pool(a, (2, 2), (2, 2)), more)
        c = self.layer(nn.max_pool(b, (2, 2), (2, 2)), 2 * more)
        b = self.layer(jnp.concatenate([self.grow(c, more), b], axis=-1), more)
        a = self.layer(jnp.concatenate([self.grow(b, few), a], axis=-1), few)
        return nn.Conv(3, (1, 1))(a)

    def layer(self, x: jax.Array, features: int) -> jax.Array:
        """A convolution, its normalisation and a ReLU."""
        return nn.relu(nn.GroupNorm(2)(nn.Conv(features, (3, 3))(x)))

    def grow(self, x: jax.Array, features: int) -> jax.Array:
        """Twice as many positions along either axis."""
        if self.upsampling == "transposed":
            return nn.ConvTranspose(features, (2, 2), (2, 2))(x)
        shape = (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
        x = jax.image.resize(x, shape, self.upsampling)
        return nn.Conv(features, (3, 3))(x)


class Diffusion(nn.Module):
    """A U-Net that knows a time and a class, as Ho et al. (2020) and later ones."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        known = embedded(time) + nn.Embed(64, 64)(label)
        a = self.block(nn.Conv(24, (3, 3))(x), known)
        b = self.block(nn.Conv(48, (3, 3), strides=2)(a), known)
        b = self.block(b, known)
        shape = (x.shape[0], x.shape[1], x.shape[2], 48)
        b = nn.Conv(24, (3, 3))(jax.image.resize(b, shape, "nearest"))
        a = self.block(nn.Conv(24, (1, 1))(jnp.concatenate([a, b], -1)), known)
        return nn.Conv(3, (3, 3))(nn.swish(nn.GroupNorm(2)(a)))

    def block(self, x: jax.Array, known: jax.Array) -> jax.Array:
        """A residual to which what is known is added at all positions."""
        features = x.shape[-1]
        h = nn.Conv(features, (3, 3))(nn.swish(nn.GroupNorm(2)(x)))
        h = h + nn.Dense(features)(nn.swish(known))[:, None, None]
        return x + nn.Conv(features, (3, 3))(nn.swish(nn.GroupNorm(2)(h)))


class TextToImage(Diffusion):
    """One that attends to a text, Rombach et al. (2022)."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, text: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        known = embedded(time)
        text = nn.Embed(64, 32)(text)
        text = text + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(text))
        text = nn.LayerNorm()(text + nn.Dense(32)(nn.gelu(nn.Dense(128)(text))))
        a = self.attend(self.block(nn.Conv(24, (3, 3))(x), known), text)
        b = self.block(nn.Conv(48, (3, 3), strides=2)(a), known)
        b = self.attend(b, text)
        shape = (x.shape[0], x.shape[1], x.shape[2], 48)
        b = nn.Conv(24, (3, 3))(jax.image.resize(b, shape, "nearest"))
        a = self.block(nn.Conv(24, (1, 1))(jnp.concatenate([a, b], -1)), known)
        return nn.Conv(3, (3, 3))(nn.swish(nn.GroupNorm(2)(self.attend(a, text))))

    def attend(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """Each position attends to the text."""
        h = x.reshape(x.shape[0], -1, x.shape[-1])
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h), text)
        inner = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(h)))
        return (h + nn.Dense(x.shape[-1])(inner)).reshape(x.shape)


class JoinedText(nn.Module):
    """Tokens of a text beside those of an image, of which only the latter are read."""

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Conv(32, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, 32)
        positions = x.shape[1]
        x = jnp.concatenate([x, nn.Embed(64, 32)(text)], axis=1)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(48)(nn.LayerNorm()(x[:, :positions]))


class Film(nn.Module):
    """A convolution modulated by a class, a ReLU and a mean, Perez et al. (2018)."""

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        gate = nn.Dense(32)(nn.Embed(64, 32)(label))
        x = nn.relu(nn.Conv(32, (3, 3))(x) * (1 + gate[:, None, None]))
        return nn.Dense(10)(x.mean((1, 2)))


class WeightedPositions(nn.Module):
    """A mean over positions with a learned weight for each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = x.reshape(x.shape[0], -1, 32)
        weight = self.param("scale", nn.initializers.normal(1.0), (x.shape[1], 1))
        return nn.Dense(10)((x * weight).mean(1))


class DiffusionTransformer(nn.Module):
    """Norms and branches modulated by a time and a class, Peebles and Xie (2023)."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        known = nn.swish(embedded(time) + nn.Embed(64, 64)(label))
        x = nn.Conv(32, (4, 4), (4, 4))(x).reshape((x.shape[0], -1, 32))
        x = x + self.param("positions", nn.initializers.normal(1), x.shape[1:])
        for _ in range(2):
            parts = jnp.split(nn.Dense(6 * 32)(known)[:, None], 6, -1)
            y = self.modulated(x, parts[0], parts[1])
            x = x + parts[2] * nn.MultiHeadDotProductAttention(2)(y)
            y = nn.gelu(nn.Dense(128)(self.modulated(x, parts[3], parts[4])))
            x = x + parts[5] * nn.Dense(32)(y)
        shift, scale = jnp.split(nn.Dense(2 * 32)(known)[:, None], 2, -1)
        return nn.Dense(48)(self.modulated(x, shift, scale))

    def modulated(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
        """The signal, normalised, then scaled and shifted alike at all positions."""
        return nn.LayerNorm(use_scale=False, use_bias=False)(x) * (1 + scale) + shift


def embedded(time: jax.Array) -> jax.Array:
    """Features of a time, as diffusion models have them; inside a module."""
    angles = time[:, None] * 1e-4 ** (jnp.arange(32) / 32)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return nn.Dense(64)(nn.swish(nn.Dense(64)(waves)))


class MobileNet(nn.Module):
    """Inverted residuals with squeeze and excite: MobileNetV3 and EfficientNet."""

    activation: Function
    gate: Function

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """What it makes of a batch."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = self.activation(norm()(conv(24, (3, 3), 2)(x)))
        for features, strides in ((24, 1), (48, 2)):
            inner = 3 * x.shape[-1]
            y = self.activation(norm()(conv(inner, (1, 1))(x)))
            depthwise = conv(inner, (3, 3), strides, feature_group_count=inner)
            y = self.activation(norm()(depthwise(y)))
            squeezed = nn.relu(nn.Conv(24, (1, 1))(y.mean((1, 2), keepdims=True)))
            y = y * self.gate(nn.Conv(inner, (1, 1))(squeezed))
            y = norm()(conv(features, (1, 1))(y))
            x = x + y if x.shape == y.shape else y
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNext(nn.Module):
    """Depthwise convolutions and layer scale, Liu et al. (2022)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.LayerNorm()(nn.Conv(16, (4, 4), (4, 4))(x))
        for index in range(2):
            y = nn.LayerNorm()(nn.Conv(16, (7, 7), feature_group_count=16)(x))
            y = nn.Dense(16)(nn.gelu(nn.Dense(64)(y)))
            gamma = self.param(f"gamma_{index}", nn.initializers.constant(0.5), (16,))
            x = x + gamma * y
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class Mixer(nn.Module):
    """Kernels over positions and over features in turn, Tolstikhin et al. (2021)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Conv(16, (4, 4), (4, 4))(x).reshape((x.shape[0], -1, 16))
        for _ in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            x = x + nn.Dense(y.shape[-1])(nn.gelu(nn.Dense(32)(y))).swapaxes(1, 2)
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Vit(nn.Module):
    """Patches as tokens, Dosovitskiy et al. (2021)."""

    pool: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        normal = nn.initializers.normal(1.0)
        x = nn.Conv(16, (4, 4), (4, 4))(x).reshape((x.shape[0], -1, 16))
        if self.pool == "token":
            token = jnp.tile(self.param("token", normal, (1, 1, 16)), (len(x), 1, 1))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.param("positions", normal, (1, x.shape[1], 16))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2)(y, y)
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)
        if self.pool == "attention":
            probe = jnp.tile(self.param("probe", normal, (1, 1, 16)), (len(x), 1, 1))
            x = nn.MultiHeadDotProductAttention(2)(probe, x)
        return nn.Dense(10)(x.mean(1) if self.pool == "mean" else x[:, 0])


class Windowed(nn.Module):
    """Attention within windows, moved in every other layer, Liu et al. (2021).

    Each layer has a table of biases for relative positions.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Conv(32, (2, 2), (2, 2))(x)
        batch, side, _, features = x.shape
        places = jnp.stack(jnp.divmod(jnp.arange(16), 4), -1)
        apart = (places[:, None] - places + 3) @ jnp.asarray([7, 1])
        for index in range(4):
            table = self.param(f"table_{index}", nn.initializers.normal(0.02), (49, 4))
            bias = table[apart.reshape(-1)].reshape(16, 16, 4).transpose(2, 0, 1)
            y = nn.LayerNorm()(x)
            if index % 2:
                y = jnp.roll(y, (-1, -1), (1, 2))
            y = y.reshape(batch, side // 4, 4, side // 4, 4, features)
            y = y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, features)
            y = biased(4, bias)(y)
            y = y.reshape(batch, side // 4, side // 4, 4, 4, features)
            y = y.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
            x = x + (jnp.roll(y, (1, 1), (1, 2)) if index % 2 else y)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean((1, 2)))


def biased(
    heads: int, bias: jax.Array, name: str | None = None
) -> nn.MultiHeadDotProductAttention:
    """Attention whose logits get a bias, of shape (heads, queries, keys)."""
    fn = functools.partial(nn.dot_product_attention, bias=bias)
    return nn.MultiHeadDotProductAttention(heads, attention_fn=fn, name=name)


class Axial(nn.Module):
    """Attention along rows, then along columns, Ho et al. (2019)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Conv(32, (2, 2), (2, 2))(x)
        x = x + self.param("positions", nn.initializers.normal(1.0), x.shape[1:])
        batch, rows, columns, features = x.shape
        for _ in range(2):
            y = nn.LayerNorm()(x).reshape(-1, columns, features)
            x = x + nn.MultiHeadDotProductAttention(4)(y).reshape(x.shape)
            y = nn.LayerNorm()(x).swapaxes(1, 2).reshape(-1, rows, features)
            y = nn.MultiHeadDotProductAttention(4)(y)
            x = x + y.reshape(batch, columns, rows, features).swapaxes(1, 2)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean((1, 2)))


class FeatureTokens(nn.Module):
    """Each column of a table as a token, and a class token, Gorishniy et al. (2021)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        kernel, bias, token = (
            self.param(name, init, shape)
            for name, shape in (
                ("kernel", (x.shape[1], 32)),
                ("bias", (x.shape[1], 32)),
                ("token", (1, 1, 32)),
            )
        )
        x = x[:, :, None] * kernel + bias
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 32)), x], 1)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(32)(nn.relu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(2)(nn.relu(nn.LayerNorm()(x[:, 0])))


class Perceiver(nn.Module):
    """Latents that attend to the pixels as they are, Jaegle et al. (2021)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        pixels = x.reshape((len(x), -1, x.shape[-1]))
        latents = self.param("latents", nn.initializers.normal(1.0), (6, 32))
        x = jnp.broadcast_to(latents, (len(x), 6, 32))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), pixels)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Detector(nn.Module):
    """Queries for objects that attend to an encoded image, Carion et al. (2020)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Classes and boxes for each query of a batch."""
        normal = nn.initializers.normal(1.0)
        image = nn.Conv(32, (4, 4), (4, 4))(x).reshape((len(x), -1, 32))
        image = image + self.param("positions", normal, (1, image.shape[1], 32))
        y = nn.LayerNorm()(image)
        image = image + nn.MultiHeadDotProductAttention(4)(y)
        image = image + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(image))))
        image = nn.LayerNorm()(image)
        queries = self.param("queries", normal, (5, 32))
        x = jnp.broadcast_to(queries, (len(x), 5, 32))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), image)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)
        return nn.Dense(10)(x), nn.sigmoid(nn.Dense(4)(x))


class LinenGpt(nn.Module):
    """A decoder with learned positions, SwiGLU and a tied head."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        embed = nn.Embed(64, 32)
        x = embed(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.3), (1, 16, 32))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            mask = nn.make_causal_mask(tokens)
            x = x + nn.MultiHeadDotProductAttention(4)(y, mask=mask)
            y = nn.LayerNorm()(x)
            x = x + nn.Dense(32)(nn.silu(nn.Dense(64)(y)) * nn.Dense(64)(y))
        return embed.attend(nn.LayerNorm()(x))


class ParallelGpt(nn.Module):
    """A decoder whose attention and MLP read one normalised signal, as in PaLM."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Embed(64, 32)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.3), (1, 16, 32))
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(y, mask=mask)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(y)))
        return nn.Dense(64)(nn.LayerNorm()(x))


class GptLayer(nn.Module):
    """A layer of `ScannedGpt`."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """What it makes of a batch, and nothing beside it."""
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4)(y, mask=mask)
        x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return x, None


class RelativeGpt(nn.Module):
    """A decoder that knows distances alone: a table of them, or a slope for each head.

    The table is that of a T5, Raffel et al. (2020), which all layers share; the slopes
    are ALiBi's, Press et al. (2022).
    """

    slopes: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        places = jnp.arange(tokens.shape[1])
        distance = jnp.maximum(places[:, None] - places, 0)
        if self.slopes:
            bias = -(2.0 ** -jnp.arange(2, 10, 2))[:, None, None] * distance
        else:
            # One row for each of the nearest four, and then ever coarser.
            far = 4 + (4 * jnp.log(jnp.maximum(distance, 1) / 4) / jnp.log(4.0))
            row = jnp.where(distance < 4, distance, jnp.minimum(far.astype(int), 7))
            bias = nn.Embed(8, 4, embedding_init=nn.initializers.normal(1.0))(row)
            bias = bias.transpose(2, 0, 1)
        mask = nn.make_causal_mask(tokens)
        x = nn.Embed(64, 32)(tokens)
        for _ in range(3):
            x = x + biased(4, bias)(nn.RMSNorm()(x), mask=mask)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.RMSNorm()(x))))
        return nn.Dense(64)(nn.RMSNorm()(x))


class ScannedGpt(nn.Module):
    """A decoder whose layers are one, scanned over stacked parameters."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Embed(64, 32)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.3), (1, 16, 32))
        layers: Any = nn.scan(
            nn.remat(GptLayer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore
            length=6,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
        return nn.Dense(64)(nn.LayerNorm()(x))


class NnxGpt(nnx.Module):
    """A decoder with one kernel for queries, keys and values."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(64, 32, rngs=rngs)
        self.positions = nnx.Embed(16, 32, rngs=rngs)
        self.norm_1, self.norm_2, self.norm = (
            nnx.RMSNorm(32, rngs=rngs) for _ in range(3)
        )
        self.qkv = nnx.Linear(32, 96, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(32, 32, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(32, 128, rngs=rngs)
        self.down = nnx.Linear(128, 32, rngs=rngs)
        self.head = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        heads = self.qkv(self.norm_1(x)).reshape((*x.shape[:2], 3, 4, 8))
        q, k, v = (heads[:, :, index] for index in range(3))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.reshape(x.shape))
        x = x + self.down(nnx.gelu(self.up(self.norm_2(x))))
        return self.head(self.norm(x))


class Rotary(nn.Module):
    """A decoder whose positions are rotations of queries and keys."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Embed(64, 32)(tokens)
        y = nn.RMSNorm()(x)
        q, k, v = (nn.DenseGeneral((4, 8))(y) for _ in range(3))
        angles = jnp.arange(16)[:, None] * 100.0 ** (-jnp.arange(4) / 4)
        sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]

        def rotated(heads: jax.Array) -> jax.Array:
            a, b = jnp.split(heads, 2, axis=-1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        y = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + nn.DenseGeneral(32, axis=(-2, -1))(y)
        return nn.Dense(64)(nn.RMSNorm()(x))


class PlusOne(nn.Module):
    """A division by the root mean square, times one more than a learned scale."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        scale = self.param("scale", nn.initializers.normal(0.1), x.shape[-1:])
        size = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x * size * (1.0 + scale)


class Packed(nn.Module):
    """A decoder of a longer table of positions: `lm1b` and `nlp_seq` of Flax.

    With `plus_one`, normalisations by one more than a scale.
    """

    plus_one: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        norm = PlusOne if self.plus_one else nn.LayerNorm
        normal = nn.initializers.normal(1.0)
        x = nn.Embed(64, 32, embedding_init=normal)(tokens)
        table = self.param("positions", normal, (1, 64, 32))
        x = x + table[:, : tokens.shape[1], :]
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            y = norm()(x)
            x = x + nn.MultiHeadDotProductAttention(4, use_bias=False)(y, mask=mask)
            x = x + nn.Dense(32)(nn.relu(nn.Dense(64)(norm()(x))))
        return nn.Dense(64)(norm()(x))


class OnePlus(nnx.Module):
    """`PlusOne` in NNX."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.scale = nnx.Param(0.1 * jax.random.normal(rngs.params(), (features,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        size = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x * size * (1.0 + self.scale[...])


class EinsumAttention(nnx.Module):
    """Causal attention of 4 heads whose kernels are those of Einsums.

    With fewer heads of keys and values, several queries share one. With `bounded`, the
    logits are bounded by a tanh; with `normed`, queries and keys are normalised.
    """

    def __init__(self, shared: int, bounded: bool, normed: bool, rngs: nnx.Rngs):
        self.shared, self.bounded, self.normed = shared, bounded, normed
        normal = nnx.initializers.normal(32**-0.5)
        einsum = functools.partial(nnx.Einsum, kernel_init=normal, rngs=rngs)
        if shared == 4:
            self.qkv = einsum("BTD,SNDH->SBTNH", (3, 4, 32, 8))
        else:
            self.q = einsum("BTD,NDH->BTNH", (4, 32, 8))
            self.kv = einsum("BTD,CKDH->CBTKH", (2, shared, 32, 8))
        if normed:
            self.q_norm, self.k_norm = (OnePlus(8, rngs) for _ in range(2))
        self.out = einsum("BTNH,NHD->BTD", (4, 8, 32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        if self.shared == 4:
            q, k, v = self.qkv(x)
        else:
            q, (k, v) = self.q(x), self.kv(x)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotated(q) * 8**-0.5, self.rotated(k)
        q = q.reshape((*q.shape[:2], self.shared, -1, 8))
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, k)
        if self.bounded:
            logits = 50 * jnp.tanh(logits / 50)
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))[:, None, None]
        weights = nnx.softmax(jnp.where(mask, logits, -2e38), axis=-1)
        y = jnp.einsum("BTKGS,BSKH->BTKGH", weights, v)
        return self.out(y.reshape((*y.shape[:2], 4, 8)))

    def rotated(self, heads: jax.Array) -> jax.Array:
        """Rotary positions."""
        angles = jnp.arange(heads.shape[1])[:, None] * 100.0 ** (-jnp.arange(4) / 4)
        sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
        a, b = jnp.split(heads, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class GemmaLayer(nnx.Module):
    """A layer of `Gemma`: normalisations before and after, and a gated GELU."""

    def __init__(self, shared: int, bounded: bool, normed: bool, rngs: nnx.Rngs):
        self.norms = nnx.List([OnePlus(32, rngs) for _ in range(4)])
        self.attention = EinsumAttention(shared, bounded, normed, rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate, self.up = linear(32, 64), linear(32, 64)
        self.down = linear(64, 32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = x + self.norms[1](self.attention(self.norms[0](x)))
        y = self.norms[2](x)
        y = self.down(nnx.gelu(self.gate(y)) * self.up(y))
        return x + self.norms[3](y)


class Gemma(nnx.Module):
    """A decoder as in Flax's `gemma`, with one kernel for keys and values, or all."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        shared: int = 2,
        bounded: bool = False,
        normed: bool = False,
        depth: int = 2,
    ):
        normal = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(64, 32, embedding_init=normal, rngs=rngs)
        self.layers = nnx.List(
            [GemmaLayer(shared, bounded, normed, rngs) for _ in range(depth)]
        )
        self.norm = OnePlus(32, rngs)
        self.bounded = bounded

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = self.embed(tokens) * jnp.sqrt(32.0)
        for layer in self.layers:
            x = layer(x)
        logits = self.embed.attend(self.norm(x))
        return 30 * jnp.tanh(logits / 30) if self.bounded else logits


class WaveNet(nn.Module):
    """Layers that each put out one signal for the next and another for the end."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Conv(32, (1,))(x)
        ends = []
        for index in range(4):
            y, gate = jnp.split(
                nn.Conv(64, (2,), kernel_dilation=2**index, padding="CAUSAL")(x), 2, -1
            )
            y = nn.tanh(y) * nn.sigmoid(gate)
            ends.append(nn.Conv(32, (1,))(y))
            if index < 3:
                x = x + nn.Conv(32, (1,))(y)
        return nn.Conv(16, (1,))(nn.relu(sum(ends[1:], ends[0])))


class Siren(nn.Module):
    """Sines as activations, Sitzmann et al. (2020), with Flax's own initialisation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = jnp.sin(30 * nn.Dense(64)(x))
        for _ in range(3):
            x = jnp.sin(nn.Dense(64)(x))
        return nn.Dense(3)(x)


class RadianceField(nn.Module):
    """A density and a color for each place and direction, Mildenhall et al. (2020)."""

    @nn.compact
    def __call__(
        self, x: jax.Array, direction: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What it makes of a batch."""
        place = waves(x, 8)
        x = place
        for index in range(6):
            x = nn.relu(nn.Dense(64)(x))
            if index == 3:
                x = jnp.concatenate([x, place], axis=-1)
        density = nn.Dense(1)(x)
        x = jnp.concatenate([nn.Dense(64)(x), waves(direction, 4)], axis=-1)
        return nn.Dense(3)(nn.relu(nn.Dense(32)(x))), density


def waves(x: jax.Array, count: int) -> jax.Array:
    """Coordinates with their sines and cosines of so many frequencies."""
    angles = jnp.concatenate([x * 2.0**power for power in range(count)], axis=-1)
    both = jnp.concatenate([angles, angles + 0.5 * jnp.pi], axis=-1)
    return jnp.concatenate([x, jnp.sin(both)], axis=-1)


class TwoTowers(nn.Module):
    """Images and text side by side, Radford et al. (2021)."""

    @nn.compact
    def __call__(
        self, images: jax.Array, tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What it makes of a batch."""
        image = nn.relu(nn.Conv(16, (4, 4), (4, 4))(images)).mean((1, 2))
        text = nn.Embed(64, 16)(tokens)
        text = text + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(text))
        return nn.Dense(16)(image), nn.Dense(16)(text[:, 0])


class ActorCritic(nn.Module):
    """A policy and a value on one body."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What it makes of a batch."""
        x = nn.relu(nn.Conv(8, (4, 4), (2, 2))(x))
        x = nn.relu(nn.Dense(32)(x.reshape((x.shape[0], -1))))
        return nn.Dense(4)(x), nn.Dense(1)(x)


class Recurrent(nn.Module):
    """An LSTM over tokens."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        return nn.Dense(64)(nn.RNN(nn.LSTMCell(32))(nn.Embed(64, 32)(tokens)))


class Variational(nn.Module):
    """An autoencoder whose code is drawn at random."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.relu(nn.Dense(32)(x.reshape((x.shape[0], -1))))
        mean, deviation = nn.Dense(8)(x), jnp.exp(0.5 * nn.Dense(8)(x))
        noise = jax.random.normal(self.make_rng("params"), mean.shape)
        return nn.Dense(64)(nn.relu(nn.Dense(32)(mean + noise * deviation)))


class Translation(nn.Module):
    """An encoder that several layers of a decoder attend to: Flax's `wmt`."""

    shared: bool = False  # one table for both languages, and for the logits
    depth: int = 2

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        normal = nn.initializers.normal(1.0)
        table = functools.partial(nn.Embed, 64, 32, embedding_init=normal)
        read = table(name="read")
        write = read if self.shared else table(name="write")
        seen = nn.make_attention_mask(source > 0, source > 0)
        x = self.placed(read(source))
        for _ in range(self.depth):
            x = x + self.attention()(nn.LayerNorm()(x), mask=seen)
            x = x + self.mlp(nn.LayerNorm()(x))
        encoded = nn.LayerNorm()(x)
        seen = nn.combine_masks(
            nn.make_attention_mask(target > 0, target > 0), nn.make_causal_mask(target)
        )
        across = nn.make_attention_mask(target > 0, source > 0)
        y = self.placed(write(jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]))
        for _ in range(self.depth):
            y = y + self.attention()(nn.LayerNorm()(y), mask=seen)
            y = y + self.attention()(nn.LayerNorm()(y), encoded, mask=across)
            y = y + self.mlp(nn.LayerNorm()(y))
        y = nn.LayerNorm()(y)
        return write.attend(y) / 32**0.5 if self.shared else nn.Dense(64)(y)

    def attention(self) -> Any:
        """Attention without biases."""
        return nn.MultiHeadDotProductAttention(4, use_bias=False)

    def mlp(self, x: jax.Array) -> jax.Array:
        """Two layers and a ReLU."""
        return nn.Dense(32)(nn.relu(nn.Dense(64)(x)))

    def placed(self, x: jax.Array) -> jax.Array:
        """With sines and cosines for its positions."""
        place = np.arange(64)[:, None] * 1e4 ** (-np.arange(16) / 15)
        table = np.concatenate([np.sin(place), np.cos(place)], axis=1)
        return x + jnp.asarray(table, x.dtype)[None, : x.shape[1]]


class MnistNet(nnx.Module):
    """Convolutions with BatchNorm and average pooling: Flax's `mnist`."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv_1 = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.conv_2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm_1, self.norm_2 = (nnx.BatchNorm(n, rngs=rngs) for n in (16, 32))
        self.dense_1 = nnx.Linear(512, 64, rngs=rngs)
        self.dense_2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        for conv, norm in ((self.conv_1, self.norm_1), (self.conv_2, self.norm_2)):
            x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.dense_2(nnx.relu(self.dense_1(x.reshape((len(x), -1)))))


class Tagger(nn.Module):
    """A label for each word, from attention in both directions: Flax's `nlp_seq`."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        place = np.arange(64)[:, None] * 1e4 ** (-np.arange(0, 32, 2) / 32)
        table = np.stack([np.sin(place), np.cos(place)], axis=2).reshape(1, 64, 32)
        x = nn.Embed(64, 32, embedding_init=nn.initializers.normal(1.0))(tokens)
        x = x + jnp.asarray(table, x.dtype)[:, : tokens.shape[1]]
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4, use_bias=False)(y)
            x = x + nn.Dense(32)(nn.elu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(16)(nn.LayerNorm()(x))


class WeightedMean(nn.Module):
    """A mean of words, weighted by what is made of each of them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        scores = nn.Dense(1, use_bias=False)(
            nn.tanh(nn.Dense(32, use_bias=False)(x))
        ).squeeze(-1)
        return (jnp.expand_dims(nn.softmax(scores), 1) @ x).squeeze(1)


class Sentiment(nn.Module):
    """An LSTM in both directions, and a weighted mean of the words: Flax's `sst2`."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        x = nn.Embed(64, 32)(tokens)
        ahead, back = (nn.RNN(nn.LSTMCell(16)) for _ in range(2))
        both: Any = nn.Bidirectional(ahead, back)(x)
        x = WeightedMean()(both)
        return nn.Dense(1, use_bias=False)(nn.tanh(nn.Dense(32)(x)))


class Adder(nn.Module):
    """An LSTM that reads and one that writes, over vectors: Flax's `seq2seq`."""

    @nn.compact
    def __call__(self, read: jax.Array, written: jax.Array) -> jax.Array:
        """What it makes of a batch."""
        reader = nn.RNN(nn.LSTMCell(32), return_carry=True, name="reader")
        carry, _ = reader(read)
        writer = nn.RNN(nn.LSTMCell(32), name="writer")
        return nn.Dense(16)(writer(written, initial_carry=carry))
