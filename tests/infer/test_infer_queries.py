"""Learned arrays in the place of an input: probes, latents, queries for objects."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx
from held_against import ratios, worst
from zoo_linen import array

from backmatch_optax import infer_spec, spec

NORMAL = nn.initializers.normal(1.0)


class Pooled(nn.Module):
    """Attention pooling by one probe."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(32, name="stem")(x))
        probe = jnp.tile(self.param("probe", NORMAL, (1, 1, 32)), (len(x), 1, 1))
        x = nn.MultiHeadDotProductAttention(2, name="pool")(probe, x)
        return nn.Dense(3, name="head")(x[:, 0])


@pytest.mark.parametrize("batch", [1, 2])
def test_attention_pooling(batch):
    chain = infer_spec(Pooled(), array(batch, 9, 24))
    attention = spec.Attention("pool", memory=spec.Recall((9, 32)))
    rest = [spec.Flatten(), spec.Dense("head")]
    links = [
        spec.Dense("stem"),
        spec.LayerNorm("norm"),
        spec.Memory([spec.Queries((1, 32), "probe"), attention, *rest]),
    ]
    assert chain == spec.LayerChain(links, input_shape=(9, 24))
    assert worst(ratios(Pooled(), chain, array(2, 9, 24))) < 2


class Latents(nn.Module):
    """A Perceiver; its input is read by each layer."""

    encoded: bool

    @nn.compact
    def __call__(self, x):
        if self.encoded:
            x = nn.Dense(16, name="stem")(x)
        latents = self.param("latents", NORMAL, (5, 16))
        z = jnp.broadcast_to(latents, (len(x), 5, 16))
        for _ in range(2):
            z = z + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(z), x)
            z = z + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(z))))
        return nn.Dense(3)(z.mean(1))


@pytest.mark.parametrize("encoded", [False, True])
def test_latents_that_attend_to_the_input(encoded):
    model, x = Latents(encoded), array(2, 9, 16)
    chain = infer_spec(model, x)
    *below, memory = chain.layers
    assert isinstance(memory, spec.Memory)
    assert below == [spec.Dense("stem")] * encoded
    assert memory.links[0] == spec.Queries((5, 16), "latents")
    assert worst(ratios(model, chain, x)) < 2.5


class Objects(nn.Module):
    """Queries that attend to each other and to an encoder, with two heads."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.LayerNorm()(x)
        z = jnp.repeat(self.param("queries", NORMAL, (4, 16))[None], len(x), axis=0)
        for _ in range(2):
            z = z + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(z))
            z = z + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(z), x)
            z = z + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(z))))
        return nn.Dense(3)(z), nn.sigmoid(nn.Dense(4)(z))


def test_queries_for_objects():
    model, x = Objects(), array(2, 9, 16)
    chain = infer_spec(model, x)
    (memory,) = (link for link in chain.layers if isinstance(link, spec.Memory))
    assert memory.links[0] == spec.Queries((4, 16), "queries")
    assert worst(ratios(model, chain, x)) < 2.5


class NnxPooled(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Linear(8, 16, rngs=rngs)
        self.probe = nnx.Param(rngs.normal((2, 16)))
        self.pool = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        probe = jnp.broadcast_to(self.probe[...], (len(x), 2, 16))
        return self.head(self.pool(probe, self.stem(x)))


def test_a_probe_of_nnx():
    chain = infer_spec(NnxPooled(nnx.Rngs(0)), array(2, 9, 8))
    assert chain.paths[:2] == ("stem", "probe")


def test_what_is_repeated_and_only_added_is_none():
    class Added(nn.Module):
        @nn.compact
        def __call__(self, x):
            places = self.param("places", NORMAL, (9, 8))
            return nn.Dense(3)(x + jnp.broadcast_to(places, x.shape))

    chain = infer_spec(Added(), array(2, 9, 8))
    assert chain.layers == (spec.Bias("places"), spec.Dense("Dense_0"))
