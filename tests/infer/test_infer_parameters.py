"""Parameters that are transformed, cut or shifted before they are used."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from held_against import ratios, worst
from zoo_linen import array

import backmatch_optax as bmo
from examples.studies import families, which_models


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.WeightNorm(nn.Dense(8))(x)))


class SpectralNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(8))(x, update_stats=True)
        return nn.Dense(3)(nn.relu(x))


class ResponseNorm(nn.Module):
    """As in ConvNeXt V2: features are compared over all positions."""

    @nn.compact
    def __call__(self, x):
        gamma = self.param("gamma", nn.initializers.ones, x.shape[-1:])
        beta = self.param("beta", nn.initializers.zeros, x.shape[-1:])
        size = jnp.sqrt((x**2).sum((1, 2), keepdims=True))
        return x + beta + gamma * x * size / (size.mean(-1, keepdims=True) + 1e-6)


class NnxWeightNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.WeightNorm(nnx.Linear(4, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.inner(x)))


class NnxSpectralNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.SpectralNorm(nnx.Linear(4, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.inner(x, update_stats=True)))


class Inner(nn.Module):
    """The kernel and its scale in a module of their own, so that the block is small."""

    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(8))(x)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("weight", ""),
        ("weight alone", "layers_0"),
        ("spectral", "Dense_0"),
        ("response", "layers_1"),
        ("nnx weight", "inner"),
        ("nnx spectral", "inner"),
    ],
)
def test_transformed_kernels_and_response_norms_name_a_block_that_works(name, path):
    model, x = {
        "weight": (WeightNormed(), jnp.ones((2, 4))),
        "spectral": (SpectralNormed(), jnp.ones((2, 4))),
        "response": (
            nn.Sequential([nn.Dense(8), ResponseNorm(), nn.Dense(3)]),
            jnp.ones((2, 6, 6, 3)),
        ),
        "weight alone": (
            nn.Sequential([Inner(), nn.relu, nn.Dense(3)]),
            jnp.ones((2, 4)),
        ),
        "nnx weight": (NnxWeightNormed(nnx.Rngs(0)), jnp.ones((2, 4))),
        "nnx spectral": (NnxSpectralNormed(nnx.Rngs(0)), jnp.ones((2, 4))),
    }[name]
    with pytest.raises(ValueError, match="Pass blocks=") as refusal:
        bmo.infer_spec(model, x)
    text = which_models.named_blocks(refusal.value)
    blocks = eval(text, {"spec": bmo.spec})
    # Where NNX keeps the scale of a WeightNorm depends on its version.
    assert blocks[0].path in (path, f"{path}/layer_instance")
    assert bmo.infer_spec(model, x, blocks=blocks).layers


# Each feature becomes a token: numbers of its own times the feature.
TOKENS: dict[str, Callable[[Any, Any], Any]] = {
    "repeated": lambda x, w: x[:, :, None] * w,
    "on the right": lambda x, w: w[None] * jnp.expand_dims(x, 2),
    "einsum": lambda x, w: jnp.einsum("bf,fd->bfd", x, w),
    "transposed": lambda x, w: (x[:, None] * w.T).transpose(0, 2, 1),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", TOKENS)
def test_features_that_become_tokens(way, batch):
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.normal(1.0)
            x = TOKENS[way](x, self.param("w", init, (7, 16)))
            x = x + self.param("b", init, (7, 16))
            y = nn.LayerNorm(name="norm")(x)
            x = x + nn.MultiHeadDotProductAttention(2, name="a")(y)
            return nn.Dense(3, name="head")(x.mean(1))

    chain = bmo.infer_spec(Tokens(), jnp.ones((batch, 7)))
    assert chain.layers[:3] == (
        bmo.spec.DenseGeneral("w", in_axis=(), batch_axis=0),
        bmo.spec.Reshape((7, 16)),
        bmo.spec.Bias("b"),
    )
    assert worst(ratios(Tokens(), chain, array(1, 7), batch=128)) < 2.5


def test_a_signal_that_comes_again_before_and_behind_its_features():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(1.0), (5, 8, 3))
            x = nn.Dense(8)(x)[:, None, :, None] * w
            return nn.Dense(3)(x.reshape(len(x), 5, 24))

    chain = bmo.infer_spec(Both(), jnp.ones((2, 4)))
    link = bmo.spec.DenseGeneral("w", in_axis=(), batch_axis=1)
    assert link in chain.layers
    assert worst(ratios(Both(), chain, array(1, 4), batch=128)) < 2.5


def test_a_table_that_is_cut_anywhere_else_is_no_bias():
    class Later(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = self.param("positions", nn.initializers.normal(1.0), (1, 9, 4))
            return nn.Dense(3)(x + table[:, 2:6])

    with pytest.raises(ValueError, match="positions"):
        bmo.infer_spec(Later(), jnp.ones((2, 4, 4)))


def test_one_plus_scale_counts_as_one_more():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    model = nn.Sequential([nn.Dense(8), families.PlusOne(), nn.Dense(3)])
    chain = bmo.infer_spec(model, x)
    assert chain.layers[1] == bmo.spec.RMSNorm("layers_1", one_plus=True)
    params = model.init(jax.random.key(1), x)["params"]
    params["layers_1"]["scale"] = jnp.ones(8)
    doubled = bmo.layer_scales(chain, params, normalize=False)
    params["layers_1"]["scale"] = jnp.zeros(8)
    as_it_is = bmo.layer_scales(chain, params, normalize=False)
    for path, factor in (("layers_0", 4), ("layers_1", 1), ("layers_2", 4)):
        assert as_it_is[path] / doubled[path] == pytest.approx(factor)
