"""Sines: as activations (SIREN), and as features of places (NeRF)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from held_against import ratios, worst
from zoo_linen import array

from backmatch_optax import infer_spec, spec


def test_sines_as_activations():
    class Siren(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.sin(30 * nn.Dense(32, name="first")(x))
            return nn.Dense(1, name="last")(x)

    chain = infer_spec(Siren(), array(2, 3))
    links = [spec.Dense("first"), spec.Scale(30.0), spec.Activation("sin")]
    assert chain == spec.LayerChain([*links, spec.Dense("last")], input_shape=(3,))
    assert worst(ratios(Siren(), chain, array(2, 3))) < 2


FREQUENCIES = 2.0 ** np.arange(6)


def places(x, itself):
    """Sines and cosines of six frequencies, and perhaps the place itself."""
    waves = (x[..., None, :] * FREQUENCIES[:, None]).reshape(*x.shape[:-1], -1)
    waves = jnp.sin(jnp.concatenate([waves, waves + 0.5 * jnp.pi], axis=-1))
    return jnp.concatenate([x, waves], axis=-1) if itself else waves


class Field(nn.Module):
    """Its place is read again on the way, its direction at the end."""

    itself: bool

    @nn.compact
    def __call__(self, x, direction):
        place = places(x, self.itself)
        x = nn.relu(nn.Dense(32, name="first")(place))
        x = nn.relu(nn.Dense(32, name="second")(jnp.concatenate([x, place], -1)))
        density = nn.Dense(1, name="density")(x)
        x = nn.Dense(32, name="third")(x)
        x = jnp.concatenate([x, places(direction, self.itself)], -1)
        return nn.Dense(3, name="color")(x), density


@pytest.mark.parametrize("itself", [False, True])
def test_features_of_places(itself):
    model, x = Field(itself), array(2, 3)
    chain = infer_spec(model, x, x)
    waves: list[spec.Link] = [spec.Scale(0.71)]
    if itself:
        joined = spec.Concatenate([[], [spec.Input((36,)), *waves]])
        assert (chain.layers[0], chain.input_shape) == (joined, (3,))
    else:
        assert (chain.layers[0], chain.input_shape) == (waves[0], (36,))
    assert worst(ratios(model, chain, x, x, batch=256)) < 2


def test_features_of_fixed_random_directions():
    directions = np.random.default_rng(0).normal(size=(3, 16))

    class Fourier(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.concatenate([jnp.sin(x @ directions), jnp.cos(x @ directions)], -1)
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(32, name="first")(x)))

    chain = infer_spec(Fourier(), array(2, 3))
    assert chain.layers[:2] == (spec.Scale(0.71), spec.Dense("first"))
    assert chain.input_shape == (32,)


def test_a_sine_of_the_input_itself_is_an_activation():
    class Wave(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(jnp.sin(x))

    chain = infer_spec(Wave(), array(2, 3))
    assert chain.layers == (spec.Activation("sin"), spec.Dense("head"))
