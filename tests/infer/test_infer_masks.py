"""Masks of attention: which positions are met, whatever the mask is made of."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo_linen import Call, array

from backmatch_optax import spec
from backmatch_optax.infer import infer_spec

TOKENS = array(3, 16, dtype=jnp.int32)


def decoder(mask_of: Callable[[Any], Any]) -> nn.Module:
    def function(_: nn.Module, tokens: Any) -> Any:
        x = nn.Embed(500, 32, name="e")(tokens)
        mask = nn.combine_masks(mask_of(tokens), nn.make_causal_mask(tokens))
        return x + nn.MultiHeadDotProductAttention(2, name="a")(x, mask=mask)

    return Call(function)


# Whether a token is padding is not known before the data are. 1 is what the trace
# takes the place of an input by, and also the padding of some tokenizers.
PADDING: dict[str, Callable[[Any], Any]] = {
    "0": lambda t: (t != 0)[:, None, None, :],
    "1": lambda t: (t != 1)[:, None, None, :],
    "not": lambda t: ~(t == 1)[:, None, None, :],
    "numbers": lambda t: (1 - (t == 1).astype(int))[:, None, None, :] > 0,
    "both": lambda t: nn.make_attention_mask(t > 0, t > 0),
    "lengths": lambda t: (
        (jnp.arange(16) < t[:, :1])[:, None, None, :] & (t != 1)[:, None, None, :]
    ),
    "segments": lambda t: nn.make_attention_mask(t // 4, t // 4, jnp.equal),
}


@pytest.mark.parametrize("case", PADDING)
def test_what_a_mask_takes_from_the_input_counts_as_full(case):
    model = decoder(PADDING[case])
    declared = spec.LayerChain(
        [spec.Embed("e"), spec.Residual([spec.Attention("a", causal=True)])],
        input_shape=(16,),
    )
    assert infer_spec(model, TOKENS) == declared


@pytest.mark.parametrize("padding", [True, False])
def test_a_mask_that_is_an_input(padding):
    def function(_: nn.Module, x: Any, mask: Any) -> Any:
        mask = (~mask if padding else mask)[:, None, None, :]
        return nn.MultiHeadDotProductAttention(2, name="a")(x, mask=mask)

    found = infer_spec(Call(function), array(2, 8, 4), array(2, 8, dtype=bool))
    assert found.layers == (spec.Attention("a"),)


def by_head(mask_of: Callable[[Any, Any], Any], windows: int = 0) -> Any:
    """Attention with four heads whose logits are given to a function."""

    def function(_: nn.Module, x: Any) -> Any:
        q, k, v = (nn.DenseGeneral((4, 4), name=name)(x) for name in "qkv")
        logits = mask_of(jnp.einsum("...qhd,...khd->...hqk", q, k) / 2, x)
        met = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), v)
        return nn.DenseGeneral(16, axis=(-2, -1), name="o")(met)

    shape = (2, windows, 8, 16) if windows else (2, 8, 16)
    return infer_spec(Call(function), array(*shape)).layers[0]


HEADS = np.arange(4)[:, None, None]
FAR = np.arange(8)[:, None] - np.arange(8)


def test_heads_and_windows_with_masks_of_their_own():
    # One head of four meets all 8 positions, the others themselves alone.
    alone = by_head(lambda w, _: jnp.where((HEADS == 0) | (FAR == 0), w, -1e9))
    assert alone.attended == pytest.approx(1 / np.mean([1 / 8, 1, 1, 1]), rel=1e-3)
    causal = by_head(lambda w, _: jnp.where((HEADS >= 0) & (FAR >= 0), w, -1e9))
    assert causal.causal and causal.attended is None
    # The last of three windows is in two parts, told apart by -100 as in Swin.
    parts = np.zeros((3, 1, 8, 8), np.float32)
    parts[2] = np.where(np.arange(8)[:, None] // 4 == np.arange(8) // 4, 0.0, -100.0)
    swin = by_head(lambda w, _: w + parts, windows=3)
    assert swin.attended == pytest.approx(1 / np.mean([1 / 8, 1 / 8, 1 / 4]), rel=1e-3)


def test_slopes_of_each_head_count_though_the_first_has_none():
    slopes = np.array([0.0, 2.0, 4.0, 8.0])[:, None, None]
    link = by_head(lambda w, _: w + -slopes * np.abs(FAR))
    weights = np.exp(-slopes * np.abs(FAR))
    squares = (weights**2).sum(-1) / weights.sum(-1) ** 2
    assert link.attended == pytest.approx(1 / squares.mean(), rel=1e-3)


def test_other_numbers_in_the_place_of_logits_are_no_mask():
    with pytest.raises(ValueError, match="numbers that are no mask"):
        by_head(lambda w, _: jnp.where(FAR == 0, w, 0.5))


def test_a_mask_that_leaves_one_position():
    link = by_head(lambda w, _: jnp.where(FAR == 0, w, -1e9))
    assert link.attended == pytest.approx(1.0, abs=1e-3)


class Masked(nnx.Module):
    """One head whose mask is an attribute."""

    def __init__(self, rngs: nnx.Rngs, mask: Any):
        self.q, self.k, self.v = (
            nnx.Linear(8, 4, use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.tril = mask()

    def __call__(self, x):
        weights = self.q(x) @ self.k(x).swapaxes(-1, -2) / 2
        weights = jnp.where(self.tril == 0, -jnp.inf, weights)
        return jax.nn.softmax(weights, -1) @ self.v(x)


@pytest.mark.parametrize("library", [np, jnp])
def test_a_mask_may_be_an_attribute(library):
    def mask() -> Any:
        return library.tril(library.ones((6, 6)))

    q, k, v = ([spec.Dense(name)] for name in "qkv")
    chain = infer_spec(Masked(nnx.Rngs(0), mask), array(2, 6, 8))
    assert chain.layers == (spec.DotProductAttention(q, k, v, causal=True),)


def test_a_mask_without_values_is_named():
    model = nnx.eval_shape(lambda: Masked(nnx.Rngs(0), lambda: jnp.ones((6, 6))))
    with pytest.raises(ValueError, match=r"'tril'.* Pass the model itself"):
        infer_spec(model, array(2, 6, 8))
