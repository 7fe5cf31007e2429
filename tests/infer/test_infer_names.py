"""Parameters of any name: hand-written layers, tables, and adapters of low rank."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from held_against import ratios, worst

import backmatch_optax as bmo
from backmatch_optax import spec

IMAGES = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 12), jnp.int32)


class Dense(nnx.Module):
    """As one writes it by hand: `w` and `b`."""

    def __init__(self, features: int, out: int, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs(), (features, out)) / features**0.5)
        self.b = nnx.Param(jnp.zeros(out))

    def __call__(self, x):
        return x @ self.w + self.b


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = Dense(6, 32, rngs)
        # As PyTorch keeps them: (out, in).
        self.second = nnx.Param(jax.random.normal(rngs(), (4, 32)) / 32**0.5)

    def __call__(self, x):
        return nnx.relu(self.first(x)) @ self.second.T


def param(module: Any, name: str, *shape: int, fan_in: int = 1) -> jax.Array:
    return module.param(name, nn.initializers.normal(fan_in**-0.5), shape)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = ("NHWC", "HWIO", "NHWC")
        filters = param(self, "filters", 3, 3, 3, 8, fan_in=27)
        x = jax.lax.conv_general_dilated(x, filters, (1, 1), "SAME", None, None, axes)
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        x = nn.relu(x * param(self, "gamma", 8) + param(self, "beta", 8))
        return x.mean((1, 2)) @ param(self, "head", 8, 5, fan_in=8)


class LanguageModel(nn.Module):
    """Of arrays alone, with a tied head."""

    @nn.compact
    def __call__(self, tokens):
        wte = param(self, "wte", 20, 16, fan_in=16)
        x = wte[tokens] + param(self, "wpe", 12, 16, fan_in=16)[jnp.arange(12)]
        y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        q, k, v = (
            jnp.einsum("btd,ndh->btnh", y, param(self, name, 2, 16, 8, fan_in=16))
            for name in ("wq", "wk", "wv")
        )
        y = nn.dot_product_attention(q, k, v)
        x = x + jnp.einsum("btnh,nhd->btd", y, param(self, "wo", 2, 8, 16, fan_in=16))
        y = nn.gelu(x @ param(self, "up", 16, 32, fan_in=16))
        x = x + y @ param(self, "down", 32, 16, fan_in=32)
        return x @ wte.T


class Adapted(nnx.Module):
    """An adapter beside a kernel, and one that starts as Flax's does, at zero."""

    def __init__(self, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.3)
        options: Any = {"lora_rank": 4, "b_initializer": normal, "rngs": rngs}
        self.first = nnx.LoRALinear(12, 24, **options)
        self.second = nnx.LoRALinear(24, 4, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_kernels_of_other_names_are_layers_by_themselves():
    chain = bmo.infer_spec(Mlp(nnx.Rngs(0)), jax.ShapeDtypeStruct((2, 6), jnp.float32))
    assert chain.layers == (
        spec.Dense("first/w"),
        spec.Bias("first/b"),
        spec.Activation("relu"),
        spec.DenseGeneral("second", in_axis=1),
    )


def test_names_do_not_change_scales():
    keys = jax.random.split(jax.random.key(0), 2)
    first, second = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(6, 32), (32, 4)], strict=True)
    )
    own = spec.LayerChain(
        [
            spec.Dense("first/w"),
            spec.Bias("first/b"),
            spec.Activation("relu"),
            spec.DenseGeneral("second", in_axis=1),
        ],
        input_shape=(6,),
    )
    flax = spec.LayerChain(
        [spec.Dense("first"), spec.Activation("relu"), spec.Dense("second")],
        input_shape=(6,),
    )
    # The papers leave biases out of the signal, but not those that stand alone.
    for bias, options in (0.0, {}), (1.0, {"gains": "mean_field", "normalize": False}):
        bias = jnp.full(32, bias)
        by_hand = {"first": {"w": first, "b": bias}, "second": second.T}
        by_flax = {
            "first": {"kernel": first, "bias": bias},
            "second": {"kernel": second},
        }
        scales = bmo.layer_scales(own, by_hand, **options)
        expected = bmo.layer_scales(flax, by_flax, **options)
        np.testing.assert_allclose(scales["first/w"], expected["first"], rtol=1e-5)
        np.testing.assert_allclose(scales["second"], expected["second"], rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "example", "most"),
    [
        pytest.param(Mlp, jax.ShapeDtypeStruct((2, 6), jnp.float32), 1.4, id="mlp"),
        pytest.param(Convolutional(), IMAGES, 2.2, id="convolutional"),
        pytest.param(LanguageModel(), TOKENS, 2.5, id="language model"),
        pytest.param(
            Adapted, jax.ShapeDtypeStruct((2, 12), jnp.float32), 2, id="adapters"
        ),
    ],
)
def test_scales_are_near_measured_ones(model, example, most):
    made = model if isinstance(model, nn.Module) else model(nnx.Rngs(0))
    chain = bmo.infer_spec(made, example)
    assert worst(ratios(model, chain, example)) < most


def test_a_table_of_another_name_is_an_embedding_and_its_head():
    chain = bmo.infer_spec(LanguageModel(), TOKENS)
    assert chain.layers[0] == spec.Embed("wte")
    assert chain.layers[-1] == spec.Tied([spec.Unembed("wte")])


def test_a_kernel_used_forth_and_back_is_tied():
    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = param(self, "w", 6, 5)
            return nn.tanh(x @ w) @ w.T

    example = jax.ShapeDtypeStruct((2, 6), jnp.float32)
    assert bmo.infer_spec(Autoencoder(), example).layers == (
        spec.Dense("w"),
        spec.Activation("tanh"),
        spec.Tied([spec.DenseGeneral("w", in_axis=1)]),
    )


def test_kernels_that_are_scaled_or_frozen_are_their_parameters():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            # An equalised learning rate, as Karras et al. (2018) have it.
            x = nn.relu(x @ (param(self, "w", 6, 32) * (2 / 6) ** 0.5))
            x = x @ (param(self, "v", 16, 32) / 32**0.5).T + param(self, "b", 16)
            frozen = jax.lax.stop_gradient(param(self, "frozen", 16, 4))
            return x @ (0.25 * frozen)

    example = jax.ShapeDtypeStruct((2, 6), jnp.float32)
    chain = bmo.infer_spec(Net(), example)
    assert chain.layers == (
        spec.Dense("w"),
        spec.Scale(0.57735026),
        spec.Activation("relu"),
        spec.DenseGeneral("v", in_axis=1),
        spec.Scale(0.17677669),
        spec.Bias("b"),
        spec.Dense("frozen"),
        spec.Scale(0.25),
    )
    found = ratios(Net(), chain, example, batch=128)
    assert set(found) == {"w", "v", "b"}  # the other has no gradient
    assert worst(found) < 1.5


NORMS: dict[str, Any] = {
    "first": lambda g, b, x, m, v: g * (x - m) / jnp.sqrt(v + 1e-6) + b,
    "with the root": lambda g, b, x, m, v: (x - m) * (g / jnp.sqrt(v + 1e-6)) + b,
    "last": lambda g, b, x, m, v: b + (x - m) * jax.lax.rsqrt(v + 1e-6) * g,
}


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("axis", [-1, 0])
def test_normalisations_may_have_parameters_of_other_names_anywhere(axis, case):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16, name="a")(x)
            keep = {"axis": axis, "keepdims": True}
            gamma, beta = param(self, "gamma", 16), param(self, "beta", 16)
            x = NORMS[case](gamma, beta, x, x.mean(**keep), x.var(**keep))
            return nn.Dense(3, name="b")(nn.relu(x))

    example = jax.ShapeDtypeStruct((64, 6), jnp.float32)
    kind = spec.LayerNorm if axis else functools.partial(spec.BatchNorm, epsilon=1e-6)
    last = [kind(), spec.LayerScale("gamma"), spec.Bias("beta")]
    norm = last if case == "last" else [kind("gamma"), spec.Bias("beta")]
    relu = spec.Activation("relu")
    chain = bmo.infer_spec(Net(), example)
    assert chain.layers == (spec.Dense("a"), *norm, relu, spec.Dense("b"))
    assert worst(ratios(Net(), chain, example, batch=128)) < 2.2


def test_stacked_kernels_of_another_name_have_a_scale_for_each_layer():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.relu(x @ param(self, "w", 6, 6, fan_in=6)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            split: Any = {"params": True}
            layers = nn.scan(Layer, {"params": 0}, split_rngs=split, length=3)
            x, _ = layers(name="layers")(x, None)
            return nn.Dense(2, name="head")(x)

    x = jax.random.normal(jax.random.key(0), (8, 6))
    chain = bmo.infer_spec(Net(), x)
    branch = [spec.Dense("layers/w"), spec.Activation("relu")]
    assert chain.layers == (
        spec.Repeat([spec.Residual(branch)], 3),
        spec.Dense("head"),
    )
    params = Net().init(jax.random.key(1), x)["params"]
    scales = bmo.layer_scales(chain, params)
    assert scales["layers/w"].shape == (3,)


def test_one_array_may_be_all_of_the_parameters():
    one = spec.LayerChain([spec.Dense("")], input_shape=(4,))
    assert bmo.layer_scales(one, jnp.ones((4, 8))) == {"": 1.0}


def test_adapters_train_from_zero():
    model = Adapted(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (8, 12))
    chain = bmo.infer_spec(model, x)
    assert set(chain.paths) == {
        "first",
        "first/lora/lora_a",
        "first/lora/lora_b",
        "second",
        "second/lora/lora_a",
        "second/lora/lora_b",
    }
    params = nnx.state(model, nnx.Param)
    tx = bmo.scale_by_backmatch(chain)
    updates: Any
    updates, state = tx.update(params, tx.init(params), params)
    scales = optax.tree.get(state, "layer_scales")
    assert all(1 / 2 <= scale <= 2 for scale in scales.values())
    np.testing.assert_allclose(
        updates["first"]["lora"]["lora_a"][...],
        params["first"]["lora"]["lora_a"][...] * scales["first/lora/lora_a"],
        rtol=1e-6,
    )


def test_a_bias_that_is_added_later_is_not_its_kernels():
    class Late(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(x @ param(self, "kernel", 6, 16))
            return x + param(self, "bias", 16)

    model = nn.Sequential([Late(), nn.Dense(3)])
    x = jax.random.normal(jax.random.key(0), (32, 6))
    params = model.init(jax.random.key(1), x)["params"]
    chain = bmo.infer_spec(model, x)
    assert chain.layers[2] == spec.Bias("layers_0/bias")

    def fn(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params}, x)

    found = bmo.compare_scales(
        chain, params, fn, x, key=jax.random.key(2), gains="mean_field", num_probes=64
    )
    assert set(found.ratios) == {"layers_0", "layers_0/bias", "layers_1"}
    assert all(2 / 3 < ratio < 3 / 2 for ratio in found.ratios.values())
