"""Models with an encoder whose output is read several times."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from held_against import ratios, worst
from zoo_linen import array

from backmatch_optax import spec
from backmatch_optax.infer import infer_spec
from examples.studies import families, which_models

SOURCE, TARGET = array(2, 9, dtype=jnp.int32), array(2, 7, dtype=jnp.int32)


def attention(index: int, **options) -> spec.Link:
    return spec.Attention(f"MultiHeadDotProductAttention_{index}", **options)


def mlp(first: int) -> list[spec.Link]:
    up, down = spec.Dense(f"Dense_{first + 1}"), spec.Dense(f"Dense_{first}")
    return [up, spec.Activation("relu"), down]


def normed(index: int, *links: spec.Link) -> spec.Link:
    return spec.Residual([spec.LayerNorm(f"LayerNorm_{index}"), *links])


@pytest.mark.parametrize("shared", [False, True])
def test_an_encoder_that_a_decoder_attends_to(shared):
    chain = infer_spec(families.Translation(shared, depth=2), SOURCE, TARGET)
    links: Any = chain.layers
    recall, (read, placed) = spec.Recall((9, 32)), links[:2]
    assert read == spec.Embed("read")
    *encoder, memory = links[2:]
    assert encoder == [
        normed(0, attention(0)),
        normed(1, *mlp(0)),
        normed(2, attention(1)),
        normed(3, *mlp(2)),
        spec.LayerNorm("LayerNorm_4"),
    ]
    assert [type(link) for link in placed.shortcut] == [spec.Input, spec.Scale]
    start, write, _, *decoder = memory.links
    again = spec.Tied([read]) if shared else spec.Embed("write")
    assert (start, write) == (spec.Input((7,)), again)
    head = [spec.Tied([spec.Unembed("read")]), spec.Scale(0.17677669)]
    assert decoder == [
        normed(5, attention(2, causal=True)),
        normed(6, attention(3, memory=recall)),
        normed(7, *mlp(4)),
        normed(8, attention(4, causal=True)),
        normed(9, attention(5, memory=recall)),
        normed(10, *mlp(6)),
        spec.LayerNorm("LayerNorm_11"),
        *(head if shared else [spec.Dense("Dense_8")]),
    ]


class Reader(nnx.Module):
    """Two layers that attend to what a kernel makes of the second input."""

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(16, 16, rngs=rngs)
        self.embed = nnx.Linear(16, 16, rngs=rngs)
        self.a, self.b = (
            nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs) for _ in range(2)
        )

    def __call__(self, x: jax.Array, other: jax.Array) -> jax.Array:
        kept, x = nnx.tanh(self.encoder(other)), self.embed(x)
        x = x + self.a(x, kept)
        return x + self.b(x, kept)


def test_in_nnx_and_with_the_encoder_second():
    shapes = array(2, 5, 16), array(2, 7, 16)
    chain = infer_spec(nnx.eval_shape(lambda: Reader(nnx.Rngs(0))), *shapes)
    layers = [
        spec.Residual([spec.Attention(name, memory=spec.Recall((7, 16)))])
        for name in "ab"
    ]
    memory = spec.Memory([spec.Input((5, 16)), spec.Dense("embed"), *layers])
    encoder = [spec.Dense("encoder"), spec.Activation("tanh")]
    assert chain == spec.LayerChain([*encoder, memory], input_shape=(7, 16))
    assert worst(ratios(Reader, chain, *shapes)) < 2


class Conditioned(nn.Module):
    """Layers that each read the other inputs by kernels of their own."""

    reads: tuple[str, ...]

    @nn.compact
    def __call__(self, x, *others):
        x = nn.Dense(16)(x)
        for _ in range(2):
            for how, other in zip(self.reads, others, strict=True):
                if how == "attention":
                    x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), other)
                    continue
                of = nn.Embed(10, 32) if how == "label" else nn.Dense(32)
                scale, shift = jnp.split(of(other)[:, None], 2, -1)
                x = nn.relu(nn.Dense(16)(x) * (1 + scale) + shift)
        return nn.Dense(3)(x)


VECTOR, TOKENS = array(2, 6), array(2, 7, 6)


@pytest.mark.parametrize(
    ("reads", "others", "recalls"),
    [
        (["attention"], [TOKENS], ["(7, 6)"]),
        (["features"], [VECTOR], ["(6,)"]),
        (["label"], [array(2, dtype=jnp.int32)], ["()"]),
        (["features", "attention"], [VECTOR, TOKENS], ["(6,), 'inputs[1]'", "(7, 6)"]),
    ],
    ids=["attention", "features", "label", "features and attention"],
)
def test_an_input_that_several_layers_read_as_it_is(reads, others, recalls):
    model, inputs = Conditioned(tuple(reads)), [array(2, 5, 8), *others]
    chain = infer_spec(model, *inputs)
    (memory,) = chain.layers
    assert isinstance(memory, spec.Memory)
    assert memory.name == ""
    for recall in recalls:
        assert repr(chain).count(f"spec.Recall({recall})") > 1
    assert worst(ratios(model, chain, *inputs)) < 2.5


class Recurrent(nn.Module):
    """An encoder that is no chain."""

    @nn.compact
    def __call__(self, x, y):
        kept = nn.RNN(nn.SimpleCell(8, name="cell"))(x)
        for _ in range(2):
            y = y + nn.MultiHeadDotProductAttention(2)(y, kept)
        return nn.Dense(3)(y)


def test_what_an_encoder_lacks_names_a_block_that_works():
    shapes = array(2, 7, 6), array(2, 5, 8)
    with pytest.raises(ValueError, match="Pass blocks=") as refusal:
        infer_spec(Recurrent(), *shapes)
    assert which_models.named_blocks(refusal.value) == "[spec.Block('cell')]"
    block, memory = infer_spec(Recurrent(), *shapes, blocks=[spec.Block("cell")]).layers
    assert isinstance(block, spec.Block)
    assert isinstance(memory, spec.Memory)
