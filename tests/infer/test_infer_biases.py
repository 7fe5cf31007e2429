"""Numbers that are added to the logits of attention: tables, arrays, slopes."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from held_against import ratios, worst
from zoo_linen import Call, array

from backmatch_optax import check_spec, infer_spec, spec
from examples.studies import families

UNIT = nn.initializers.normal(1.0)
ORTHOGONAL = nn.initializers.orthogonal()
PLACES = np.arange(6)
APART = np.clip(PLACES - PLACES[:, None], -3, 3) + 3


attention = functools.partial(families.biased, 2)


def stem(x):
    """A layer below that keeps what it gets white."""
    return nn.Dense(16, name="stem", kernel_init=ORTHOGONAL)(x)


def attentions(links) -> Iterator[Any]:
    """The attention among links and inside residuals."""
    for link in links:
        if isinstance(link, spec.Residual):
            yield from attentions(link.branch)
        if isinstance(link, spec.DotProductAttention | spec.Attention):
            yield link


class Text(nn.Module):
    """One table of distances for all layers (T5)."""

    layers: int = 2
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        x = stem(x)
        table = nn.Embed(7, 2, embedding_init=UNIT, name="distances")
        bias = table(APART).transpose(2, 0, 1)[None]
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        for index in range(self.layers):
            y = nn.RMSNorm(name=f"norm{index}")(x)
            x = x + attention(bias, name=f"attention{index}")(y, mask=mask)
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize("causal", [False, True])
def test_a_table_of_distances_for_all_layers(causal):
    chain = infer_spec(Text(causal=causal), array(1, 6, 16))
    first, second = attentions(chain.layers)
    table = (spec.Input((6, 6)), spec.Embed("distances"))
    assert first.bias == table
    assert second.bias == (table[0], spec.Tied([table[1]]))
    assert first.causal is causal and first.attended is None
    assert worst(ratios(Text(causal=causal), chain, array(1, 6, 16), batch=256)) < 2.2


class Windows(nn.Module):
    """A table with a row for each distance between two places of a window (Swin)."""

    @nn.compact
    def __call__(self, x):
        x = stem(x)
        batch, side, _, _ = x.shape
        y = nn.LayerNorm(name="norm")(x)
        y = y.reshape(batch, side // 2, 2, side // 2, 2, 16)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 16)
        table = self.param("table", UNIT, (9, 2))
        rows, columns = np.divmod(np.arange(4), 2)
        apart = (rows[:, None] - rows + 1) * 3 + columns[:, None] - columns + 1
        bias = table[apart.reshape(-1)].reshape(4, 4, 2).transpose(2, 0, 1)
        y = attention(bias[None], name="attention")(y)
        y = y.reshape(batch, side // 2, side // 2, 2, 2, 16)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return nn.Dense(3, name="head")(x + y)


def test_a_table_for_windows_folded_into_the_batch():
    chain = infer_spec(Windows(), array(1, 4, 4, 16))
    assert "bias=(spec.Input((4, 4)), spec.Embed('table'))" in repr(chain)
    assert worst(ratios(Windows(), chain, array(1, 4, 4, 16), batch=256)) < 2.2


@pytest.mark.parametrize(
    ("shape", "move"),
    [((2, 6, 6), spec.Transpose((1, 2, 0))), ((6, 6), spec.Reshape((6, 6, 1)))],
)
def test_a_learned_number_for_each_query_and_key(shape, move):
    def function(module, x):
        bias = module.param("b", UNIT, shape)
        x = stem(x)
        return nn.Dense(3, name="head")(attention(bias, name="a")(x))

    model = Call(function)
    chain = infer_spec(model, array(1, 6, 16))
    (link,) = attentions(chain.layers)
    assert link.bias == (spec.Queries(shape, "b"), move)
    assert worst(ratios(model, chain, array(1, 6, 16), batch=256)) < 2.2


def test_a_bias_beside_a_mask_that_is_added():
    def function(module, x):
        hidden = np.where(np.tri(6), 0.0, -1e9)
        bias = nn.Embed(7, 2, name="distances")(APART).transpose(2, 0, 1) + hidden
        return attention(bias, name="a")(stem(x))

    (link,) = attentions(infer_spec(Call(function), array(1, 6, 16)).layers)
    assert link.causal
    assert link.bias == (spec.Input((6, 6)), spec.Embed("distances"))


class Streams(nnx.Module):
    """The same in NNX, with heads of its own."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(16, 16, kernel_init=ORTHOGONAL, rngs=rngs)
        self.q, self.k, self.v = (
            nnx.LinearGeneral(16, (2, 8), rngs=rngs) for _ in range(3)
        )
        self.distances = nnx.Embed(7, 2, embedding_init=UNIT, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        bias = self.distances(jnp.asarray(APART)).transpose(2, 0, 1)
        y = nnx.dot_product_attention(self.q(x), self.k(x), self.v(x), bias=bias)
        return self.head(x + y.reshape(x.shape))


def test_a_table_in_nnx():
    chain = infer_spec(Streams(nnx.Rngs(0)), array(1, 6, 16))
    assert "bias=(spec.Input((6, 6)), spec.Embed('distances'))" in repr(chain)
    assert worst(ratios(Streams, chain, array(1, 6, 16), batch=256)) < 2.2


class Slopes(nn.Module):
    """A slope for each head by distance, with nothing learned (ALiBi)."""

    slopes: tuple[float, ...] = (0.5, 0.25)
    causal: bool = True

    @nn.compact
    def __call__(self, x):
        x = stem(x)
        far = jnp.minimum(PLACES - PLACES[:, None], 0)
        bias = jnp.asarray(self.slopes)[:, None, None] * far
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x = x + attention(bias, name="a")(x, mask=mask)
        return nn.Dense(3, name="head")(x)


def test_slopes_leave_fewer_positions_to_attend_to():
    (link,) = attentions(infer_spec(Slopes(), array(1, 6, 16)).layers)
    # The weights of the last query, which meets all that there is.
    weights = np.exp(np.multiply.outer((0.5, 0.25), PLACES - 5.0))
    weights /= weights.sum(1, keepdims=True)
    assert link.causal and not getattr(link, "bias", ())
    assert link.attended == pytest.approx(1 / (weights**2).sum(1).mean(), rel=1e-3)


def test_slopes_against_measured_scales():
    chain = infer_spec(Slopes(), array(1, 6, 16))
    assert worst(ratios(Slopes(), chain, array(1, 6, 16), batch=256)) < 2.2


def test_slopes_of_zero_are_none():
    flat = infer_spec(Slopes((0.0, 0.0)), array(1, 6, 16))
    assert "attended" not in repr(flat) and "causal=True" in repr(flat)


def test_a_bias_that_is_made_of_learned_numbers_is_refused():
    def function(module, x):
        bias = nn.Dense(2, name="made")(jnp.asarray(APART, float)[..., None])
        return attention(bias.transpose(2, 0, 1), name="a")(nn.Dense(16)(x))

    with pytest.raises(ValueError, match=r"to the logits of attention .* is added"):
        infer_spec(Call(function), array(1, 6, 16))


def test_a_bias_of_each_pair_of_positions_is_refused():
    def function(module, x):
        pairs = nn.Dense(2, name="pairs")(x[:, :, None] * x[:, None])
        return attention(pairs.transpose(0, 3, 1, 2), name="a")(nn.Dense(16)(x))

    with pytest.raises(ValueError, match="no product of queries and keys") as error:
        infer_spec(Call(function), array(1, 6, 16))
    assert "batch dimension" not in str(error.value)  # it is there


def test_a_bias_for_each_key_alone_is_refused():
    def function(module, x):
        return attention(module.param("b", UNIT, (6,)), name="a")(nn.Dense(16)(x))

    with pytest.raises(ValueError, match="which is no number for each query and key"):
        infer_spec(Call(function), array(1, 6, 16))


def test_the_table_is_declared_as_it_is_laid_out():
    chain = infer_spec(Text(), array(1, 6, 16))
    params = Text().init(jax.random.key(0), jnp.ones((1, 6, 16)))["params"]
    check_spec(chain, params)
    params["distances"]["embedding"] = jnp.ones((7, 3))
    with pytest.raises(ValueError, match=r"its bias of shape \(6, 6, 3\) must have"):
        check_spec(chain, params)
