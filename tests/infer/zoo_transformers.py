"""Transformers as people write them in NNX and Linen, tiny."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

FEATURES, HEADS, TOKENS, LENGTH = 16, 2, 20, 12


class Attention(nnx.Module):
    """Self-written causal attention, with one kernel for queries, keys and values."""

    def __init__(self, fused: bool, rngs: nnx.Rngs):
        self.fused = fused
        if fused:
            self.qkv = nnx.Linear(FEATURES, 3 * FEATURES, rngs=rngs)
        else:
            shape = (HEADS, FEATURES // HEADS)
            self.query = nnx.LinearGeneral(FEATURES, shape, rngs=rngs)
            self.key = nnx.LinearGeneral(FEATURES, shape, use_bias=False, rngs=rngs)
            self.value = nnx.LinearGeneral(FEATURES, shape, rngs=rngs)
        self.proj = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.fused:
            qkv = self.qkv(x).reshape((*x.shape[:-1], 3, HEADS, -1))
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
            mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
            y = nnx.dot_product_attention(q, k, v, mask=mask)
        return self.proj(y.reshape(x.shape))


class WrittenOut(nnx.Module):
    """Causal attention without any function of a library."""

    def __init__(self, rngs: nnx.Rngs):
        self.q, self.k, self.v, self.o = (
            nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(batch, length, HEADS, -1).transpose(0, 2, 1, 3)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        logits = jnp.where(jnp.tri(length) == 0, -jnp.inf, logits)
        y = jax.nn.softmax(logits, -1) @ v
        return self.o(y.transpose(0, 2, 1, 3).reshape(x.shape))


class Gelu(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
        self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class SwiGlu(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.gate, self.up = (
            nnx.Linear(FEATURES, 3 * FEATURES, use_bias=False, rngs=rngs)
            for _ in range(2)
        )
        self.down = nnx.Linear(3 * FEATURES, FEATURES, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, attention: Any, norm: Any, mlp: Any, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (norm(FEATURES, rngs=rngs) for _ in range(2))
        self.attention, self.mlp = attention(rngs), mlp(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nnx.Module):
    """A decoder with learned positions, before its head a normalisation."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        attention: Any = WrittenOut,
        norm: Any = nnx.LayerNorm,
        mlp: Any = Gelu,
        tied: bool = False,
        depth: int = 2,
    ):
        self.embed = nnx.Embed(TOKENS, FEATURES, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, FEATURES, rngs=rngs)
        self.blocks = nnx.List(
            [Block(attention, norm, mlp, rngs) for _ in range(depth)]
        )
        self.norm = norm(FEATURES, rngs=rngs)
        if not tied:
            self.head = nnx.Linear(FEATURES, TOKENS, use_bias=False, rngs=rngs)
        self.tied = tied

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.embed.attend(x) if self.tied else self.head(x)


class MultiHead(nnx.Module):
    """NNX's own attention with a causal mask."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x, mask=nnx.make_causal_mask(x[..., 0]))


class LinenGpt(nn.Module):
    """The decoder of `tests/spec/test_attention.py`, with padding masked, too."""

    padding: bool = False
    depth: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = True) -> jax.Array:
        embed = nn.Embed(TOKENS, FEATURES, name="embed")
        shape = (1, LENGTH, FEATURES)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.02), shape)
        mask = nn.make_causal_mask(tokens)
        if self.padding:
            mask = nn.combine_masks(
                mask, nn.make_attention_mask(tokens > 0, tokens > 0)
            )
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            attention = nn.MultiHeadDotProductAttention(
                HEADS, dropout_rate=0.1, deterministic=not train
            )
            x += nn.Dropout(0.1, deterministic=not train)(attention(y, mask=mask))
            y = nn.LayerNorm()(x)
            y = nn.silu(nn.Dense(48)(y)) * nn.Dense(48)(y)
            x += nn.Dense(FEATURES)(y)
        return embed.attend(nn.LayerNorm()(x))


class Vit(nn.Module):
    """A vision transformer: patches, a class token or a mean, learned positions."""

    pool: str = "token"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(FEATURES, (4, 4), strides=(4, 4), padding="VALID", name="patch")(
            images
        )
        x = x.reshape((x.shape[0], -1, FEATURES))
        if self.pool == "token":
            token = self.param("cls", nn.initializers.normal(1.0), (1, 1, FEATURES))
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        shape = (1, x.shape[1], FEATURES)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS)(y, y)
            y = nn.Dense(4 * FEATURES)(nn.LayerNorm()(x))
            x = x + nn.Dense(FEATURES)(nn.gelu(y))
        x = nn.LayerNorm()(x)
        x = x[:, 0] if self.pool == "token" else x.mean(axis=1)
        return nn.Dense(10, name="head")(x)
