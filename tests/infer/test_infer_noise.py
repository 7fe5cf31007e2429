"""Random numbers that are added to a signal or multiply it."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from held_against import ratios, worst

import backmatch_optax as bmo
from backmatch_optax import spec

EXAMPLE = jax.ShapeDtypeStruct((4, 12), jnp.float32)
CODE = spec.Residual(
    [
        spec.Dense("size"),
        spec.Scale(0.5),
        spec.Activation("exp"),
        spec.Gate([], [spec.Input((8,))]),
    ],
    [spec.Dense("mean")],
)


class Autoencoder(nnx.Module):
    """A variational one, which also puts out what its loss needs."""

    def __init__(self, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(12, 32, rngs=rngs)
        self.mean = nnx.Linear(32, 8, rngs=rngs)
        self.size = nnx.Linear(32, 8, rngs=rngs)
        self.decoder = nnx.Linear(8, 12, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        x = nnx.tanh(self.encoder(x))
        mean, size = self.mean(x), self.size(x)
        noise = jax.random.normal(self.rngs.noise(), mean.shape)
        return self.decoder(mean + jnp.exp(0.5 * size) * noise), mean, size


def test_an_autoencoder_with_a_random_code_has_a_chain():
    def reconstruct(model, x):
        return model(x)[0]

    model = Autoencoder(nnx.Rngs(0))
    chain = bmo.infer_spec(model, EXAMPLE, method=reconstruct)
    assert chain.layers == (
        spec.Dense("encoder"),
        spec.Activation("tanh"),
        CODE,
        spec.Dense("decoder"),
    )


def test_what_leads_to_several_outputs_is_tied():
    chain = bmo.infer_spec(Autoencoder(nnx.Rngs(0)), EXAMPLE)
    assert chain.layers[2:] == (
        spec.Outputs(
            [
                [CODE, spec.Dense("decoder")],
                [spec.Tied([spec.Dense("mean")])],
                [spec.Tied([spec.Dense("size")])],
            ]
        ),
    )


class Drawn(nn.Module):
    """A code of either way to write it, without the outputs that the loss needs."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x))
        mean, size = nn.Dense(8)(x), nn.softplus(nn.Dense(8)(x))
        x = mean + size * jax.random.normal(self.make_rng("dropout"), mean.shape)
        return nn.Dense(6)(nn.relu(nn.Dense(24)(x)))


def test_scales_are_near_measured_ones():
    chain = bmo.infer_spec(Drawn(), EXAMPLE)
    assert worst(ratios(Drawn(), chain, EXAMPLE, batch=128)) < 1.6


def test_scales_with_outputs_are_near_measured_ones():
    model = Autoencoder(nnx.Rngs(0))
    chain = bmo.infer_spec(model, EXAMPLE)
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.concatenate(nnx.merge(graphdef, params, others, copy=True)(x), 1)

    x = jax.random.normal(jax.random.key(0), (128, 12))
    found = bmo.compare_scales(chain, params, fn, x, key=jax.random.key(1)).ratios
    assert set(found) == {"encoder", "mean", "size", "decoder"}
    assert all(1 / 1.6 < ratio < 1.6 for ratio in found.values()), found


def test_the_exponential_of_what_has_a_mean_is_refused():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.exp(nn.relu(nn.Dense(6, name="a")(x)))
            return nn.Dense(6, name="b")(x)

    with pytest.raises(ValueError, match="exp is the exponential of what may have a"):
        bmo.infer_spec(Net(), EXAMPLE)


Noise = Callable[[jax.Array, jax.Array], jax.Array]
KINDS: dict[str, tuple[Noise, spec.Link]] = {
    "added": (
        lambda x, key: x + 0.1 * jax.random.normal(key, x.shape),
        spec.Residual([], [spec.Input((32,)), spec.Scale(0.1)]),
    ),
    "subtracted": (
        lambda x, key: x - jax.random.normal(key, x.shape),
        spec.Residual([], [spec.Input((32,))]),
    ),
    "uniform": (
        lambda x, key: x + jax.random.uniform(key, x.shape, minval=-1.0),
        spec.Residual([], [spec.Input((32,)), spec.Scale(0.577)]),
    ),
    # Dropout as Srivastava et al. have it with Gaussian factors: 0.25 / (1 + 0.25).
    "factors of mean 1": (
        lambda x, key: x * (1 + 0.5 * jax.random.normal(key, x.shape)),
        spec.Dropout(0.2),
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_noise_is_an_input_of_its_size(case):
    draw, link = KINDS[case]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(32, name="a")(x))
            return nn.Dense(6, name="b")(draw(x, self.make_rng("dropout")))

    assert bmo.infer_spec(Net(), EXAMPLE).layers == (
        spec.Dense("a"),
        spec.Activation("tanh"),
        link,
        spec.Dense("b"),
    )
    assert (
        worst(ratios(Net(), bmo.infer_spec(Net(), EXAMPLE), EXAMPLE, batch=256)) < 1.3
    )
