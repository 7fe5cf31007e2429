"""Positions that are folded into the batch: windows, and attention along each axis."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from held_against import ratios, worst
from zoo_linen import array

from backmatch_optax import infer_spec, spec


class Axial(nn.Module):
    """Attention along one axis, then along the other, as for frames of a video."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        batch, frames, places, _ = x.shape
        y = nn.LayerNorm(name="norm0")(x).reshape(batch * frames, places, 16)
        y = nn.MultiHeadDotProductAttention(2, name="within")(y)
        x = x + y.reshape(x.shape)
        y = nn.LayerNorm(name="norm1")(x).transpose(0, 2, 1, 3)
        y = y.reshape(batch * places, frames, 16)
        y = nn.MultiHeadDotProductAttention(2, name="across")(y)
        x = x + y.reshape(batch, places, frames, 16).transpose(0, 2, 1, 3)
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_along_each_axis(batch):
    chain = infer_spec(Axial(), array(batch, 4, 6, 8))
    swap = spec.Transpose((1, 0, 2))
    links = [
        spec.Dense("stem"),
        spec.Residual([spec.LayerNorm("norm0"), spec.Attention("within")]),
        spec.Residual([spec.LayerNorm("norm1"), swap, spec.Attention("across"), swap]),
        spec.Dense("head"),
    ]
    assert chain == spec.LayerChain(links, input_shape=(4, 6, 8))
    assert worst(ratios(Axial(), chain, array(2, 4, 6, 8))) < 2


class Windows(nn.Module):
    """Attention within windows of two by two, moved by one and masked (Swin).

    Flax's own, or written out: then the logits are unfolded to meet the mask.
    """

    written_out: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        batch, side, _, _ = x.shape
        y = jnp.roll(nn.LayerNorm(name="norm")(x), (-1, -1), (1, 2))
        y = y.reshape(batch, side // 2, 2, side // 2, 2, 16)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 16)
        parts = np.ones((side // 2, side // 2, 4, 4), bool)
        parts[-1] &= np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
        parts = parts.reshape(-1, 1, 4, 4)
        if self.written_out:
            q, k, v = (nn.DenseGeneral((2, 8), name=name)(y) for name in "qkv")
            logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(8)
            logits = logits.reshape(batch, -1, 2, 4, 4) + jnp.where(parts, 0.0, -100.0)
            weights = nn.softmax(logits.reshape(-1, 2, 4, 4))
            y = jnp.einsum("nhqk,nkhd->nqhd", weights, v)
            y = nn.DenseGeneral(16, axis=(-2, -1), name="out")(y)
        else:
            mask = np.tile(parts, (batch, 1, 1, 1))
            y = nn.MultiHeadDotProductAttention(2, name="attention")(y, mask=mask)
        y = y.reshape(batch, side // 2, side // 2, 2, 2, 16)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return nn.Dense(3, name="head")(x + jnp.roll(y, (1, 1), (1, 2)))


@pytest.mark.parametrize("written_out", [False, True])
def test_attention_within_windows(written_out):
    model = Windows(written_out)
    chain = infer_spec(model, array(2, 8, 8, 4))
    residual = chain.layers[1]
    assert isinstance(residual, spec.Residual)
    kind = spec.DotProductAttention if written_out else spec.Attention
    (attention,) = (link for link in residual.branch if isinstance(link, kind))
    # Of a quarter of the windows half is masked.
    expected = 1 / np.mean([1 / 4, 1 / 4, 1 / 4, 1 / 2])
    assert attention.attended == pytest.approx(expected, rel=1e-3)
    assert worst(ratios(model, chain, array(2, 8, 8, 4))) < 2


class Frames(nnx.Module):
    """Frames folded into the batch from the first layer on."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Linear(8, 16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        y = self.stem(x.reshape(-1, *x.shape[2:]))
        y = y + self.attention(y)
        return self.head(y.reshape(*x.shape[:-1], 16).mean((1, 2)))


def test_frames_folded_from_the_first_layer_on():
    chain = infer_spec(Frames(nnx.Rngs(0)), array(2, 4, 6, 8))
    assert chain.input_shape == (4, 6, 8)
    assert worst(ratios(Frames, chain, array(2, 4, 6, 8))) < 2.5
