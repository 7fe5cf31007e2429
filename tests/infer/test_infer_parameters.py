"""Parameters that are transformed, cut or shifted before they are used."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

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
