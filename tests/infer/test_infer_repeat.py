"""Scans over layers with stacked parameters, as Flax documents them; other scans."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from held_against import ratios, worst

import backmatch_optax as bmo
from backmatch_optax import spec

FEATURES, LAYERS = 16, 4
X = jax.ShapeDtypeStruct((2, FEATURES), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 12), jnp.int32)
STACKED: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


# --- Linen: the patterns of `flax.linen.scan` and `flax.linen.remat_scan` ------------


class ResidualMLPBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.Dense(FEATURES, name="dense")(x)
        return x + nn.relu(h), None


class Scanned(nn.Module):
    """Any layer, scanned over, with a head."""

    layer: Any = ResidualMLPBlock
    options: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options: Any = STACKED | dict(self.options or {})
        layers: Any = nn.scan(self.layer, length=LAYERS, **options)
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(3, name="head")(x)


RESIDUAL = spec.Residual([spec.Dense("layers/dense"), spec.Activation("relu")])
MLP = [spec.Repeat([RESIDUAL], LAYERS), spec.Dense("head")]


def test_a_scan_over_layers_is_a_repeat():
    chain = bmo.infer_spec(Scanned(), X)
    assert chain == spec.LayerChain(MLP, input_shape=(FEATURES,))
    assert eval(repr(chain)) == chain


@pytest.mark.parametrize("jit", [False, True])
def test_layers_may_be_rematerialised_and_compiled(jit):
    layer: Any = nn.remat(ResidualMLPBlock, prevent_cse=False)
    model = Scanned(nn.jit(layer) if jit else layer)
    assert bmo.infer_spec(model, X).layers == tuple(MLP)


def test_a_rematerialised_scan_of_scans_is_a_repeat_of_repeats():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layers: Any = nn.remat_scan(nn.Dense, lengths=(3, 2))
            return layers(FEATURES, name="deep")(x)

    inner = spec.Repeat([spec.Dense("deep")], 2)
    chain = bmo.infer_spec(Deep(), X)
    assert chain.layers == (spec.Repeat([inner], 3),)
    params = Deep().init(jax.random.key(0), jnp.ones(X.shape))["params"]
    assert bmo.layer_scales(chain, params)["deep"].shape == (3, 2)


class Block(nn.Module):
    """A layer of a GPT, with its dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(name="norm1")(x)
        x += nn.MultiHeadDotProductAttention(2, name="attend")(y, mask=mask)
        y = nn.gelu(nn.Dense(4 * FEATURES, name="up")(nn.LayerNorm(name="norm2")(x)))
        y = nn.Dense(FEATURES, name="down")(y)
        return x + nn.Dropout(0.1, deterministic=False)(y), None


class GPT(nn.Module):
    """As most are written: remat inside of scan, the mask given to all layers."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(20, FEATURES, name="embed")(tokens)
        layers: Any = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
        return nn.Dense(20, name="head")(nn.LayerNorm(name="norm")(x))


GPT_LAYER = [
    spec.Residual(
        [
            spec.LayerNorm("layers/norm1"),
            spec.Attention("layers/attend", causal=True),
        ]
    ),
    spec.Residual(
        [
            spec.LayerNorm("layers/norm2"),
            spec.Dense("layers/up"),
            spec.Activation("gelu"),
            spec.Dense("layers/down"),
            spec.Dropout(0.1),
        ]
    ),
]


def test_a_scanned_gpt_agrees_with_measured_scales():
    chain = bmo.infer_spec(GPT(), TOKENS)
    embed, layers, *head = chain.layers
    assert embed == spec.Embed("embed")
    assert layers == spec.Repeat(GPT_LAYER, LAYERS)
    assert head == [spec.LayerNorm("norm"), spec.Dense("head")]
    found = ratios(GPT(), chain, TOKENS)
    assert {f"layers/down[{layer}]" for layer in range(LAYERS)} < {*found}
    # Of queries and keys, measured scales of few tokens are far from their mean.
    assert worst(found, but=("query", "key", "embed")) < 2.5, found


# --- NNX: the pattern of `flax.nnx.scan` ---------------------------------------------


class Layer(nnx.Module):
    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.linear(x)
        return x + nnx.relu(y if self.dropout is None else self.dropout(y))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rate: float = 0.0):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create_block(rngs: nnx.Rngs) -> Layer:
            return Layer(rate, rngs=rngs)

        self.blocks = create_block(rngs)
        self.head = nnx.Linear(FEATURES, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, model: Layer) -> jax.Array:
            return model(x)

        return self.head(forward(x, self.blocks))


@pytest.mark.parametrize("abstract", [False, True])
def test_a_scan_over_a_stacked_module_is_a_repeat(abstract):
    def make() -> Model:
        return Model(nnx.Rngs(0), rate=0.1)

    chain = bmo.infer_spec(nnx.eval_shape(make) if abstract else make(), X)
    linear, relu = spec.Dense("blocks/linear"), spec.Activation("relu")
    branch = [linear, spec.Dropout(0.1), relu]
    layers = [spec.Repeat([spec.Residual(branch)], LAYERS), spec.Dense("head")]
    assert chain == spec.LayerChain(layers, input_shape=(FEATURES,))


def test_a_stacked_module_agrees_with_measured_scales():
    found = ratios(Model, bmo.infer_spec(Model(nnx.Rngs(0)), X), X)
    assert worst(found) < 2.0, found


def test_an_nnx_optimizer_trains_a_scanned_model():
    model = Model(nnx.Rngs(0))
    chain = bmo.infer_spec(model, X)
    tx = bmo.backmatch_sgd(0.002, chain, gains="mean_field")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, FEATURES))

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradient = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(
            model
        )
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


# --- Other scans ---------------------------------------------------------------------


class Sorted(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sort(nn.Dense(FEATURES, name="dense")(x), axis=-1), None


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        dense = nn.Dense(FEATURES, name="dense")
        return dense(nn.relu(dense(x))), None


SHARED: Any = {
    "variable_axes": {},
    "variable_broadcast": "params",
    "split_rngs": {"params": False},
}


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (ResidualMLPBlock, SHARED, "in each of its layers, but those of a Repeat"),
        (
            ResidualMLPBlock,
            {"variable_axes": {"params": 1}},
            "are not stacked along the first axis, or are computed: what is computed "
            "from 'layers/dense/bias'",
        ),
        (ResidualMLPBlock, {"reverse": True}, "its layers from the last to the first"),
        (Sorted, {}, "scan repeats module 'layers', where sort is an order by value"),
        (Twice, {}, "Tied, but a layer of a Repeat may use no parameter twice"),
    ],
)
def test_what_is_no_repeat_is_refused_by_name(layer, options, message):
    with pytest.raises(ValueError, match=message) as error:
        bmo.infer_spec(Scanned(layer, options), X)
    assert "Pass blocks=[spec.Block('layers/dense')] to make it" in str(error.value)


def test_a_block_that_the_message_names_takes_the_scan_in():
    chain = bmo.infer_spec(Scanned(Sorted), X, blocks=[spec.Block("layers/dense")])
    assert chain.paths == ("layers/dense", "head")


def test_a_scan_that_puts_out_every_layer_is_refused():
    class Each(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x = nn.Dense(FEATURES, name="dense")(x)
            return x, x

    class All(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layers: Any = nn.scan(Each, length=LAYERS, **STACKED)
            return jnp.moveaxis(layers(name="layers")(x, None)[1], 0, 1)

    with pytest.raises(ValueError, match=r"scan is a loop \(recurrence\)"):
        bmo.infer_spec(All(), X)


def test_a_mask_of_each_layer_that_is_computed_there_is_refused():
    """Constants of one layer have no value that holds for all."""

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, each: jax.Array) -> tuple[jax.Array, None]:
            mask = jnp.cumsum(each, 0) > 0
            return nn.MultiHeadDotProductAttention(2, name="a")(x, mask=mask), None

    class All(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            each = jnp.arange(LAYERS * 8 * 8).reshape(LAYERS, 8, 8)
            layers: Any = nn.scan(Masked, in_axes=0, length=LAYERS, **STACKED)
            return layers(name="layers")(x, each)[0]

    with pytest.raises(ValueError, match="logits of attention meet an array"):
        bmo.infer_spec(All(), jax.ShapeDtypeStruct((2, 8, FEATURES), jnp.float32))
