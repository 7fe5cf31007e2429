"""Models with several inputs or outputs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from agreements import agreement, normal

import backmatch_optax as bmo
from backmatch_optax import spec

RELU = spec.Activation("relu")


class Towers(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        x = nn.relu(nn.Dense(24, name="image")(x))
        y = nn.relu(nn.Dense(16, name="text")(y))
        return nn.Dense(8, name="head")(jnp.concatenate([x, y], axis=-1))


def test_two_towers():
    def draw(key: jax.Array) -> Any:
        x, y = jax.random.split(key)
        return jax.random.normal(x, (16,)), jax.random.normal(y, (12,))

    towers = spec.Concatenate(
        [
            [spec.Dense("image"), RELU],
            [spec.Input((12,)), spec.Dense("text"), RELU],
        ]
    )
    for path, ratio in agreement(Towers(), [towers, spec.Dense("head")], draw).items():
        assert 0.8 < ratio < 1.25, (path, ratio)


class ActorCritic(nn.Module):
    """Two heads on a trunk, and an auxiliary one below its last layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32, name="a")(x))
        auxiliary = nn.Dense(5, name="auxiliary")(x)
        x = nn.relu(nn.Dense(32, name="b")(x))
        policy, value = nn.Dense(6, name="policy")(x), nn.Dense(1, name="value")(x)
        # A weight multiplies the square of an output.
        return policy, 0.5**0.5 * value, 2.0 * auxiliary


HEADS = spec.Outputs([[spec.Dense("policy")], [spec.Dense("value")]], weights=[1, 0.5])
ACTOR_CRITIC = [
    spec.Dense("a"),
    RELU,
    spec.Outputs(
        [[spec.Dense("b"), RELU, HEADS], [spec.Dense("auxiliary")]], weights=(1, 4)
    ),
]


def test_several_outputs_with_weights():
    ratios = agreement(ActorCritic(), ACTOR_CRITIC, normal(16), draws=300)
    assert len(ratios) == 10
    for path, ratio in ratios.items():
        assert 0.8 < ratio < 1.25, (path, ratio)


def test_outputs_of_weight_one_are_one_output():
    # Two heads side by side are one head of their features.
    params: Any = {"a": {"kernel": jnp.eye(4)}}
    heads = {"b": {"kernel": jnp.ones((4, 3))}, "c": {"kernel": 2 * jnp.ones((4, 2))}}
    links = [spec.Dense("a"), spec.Outputs([[spec.Dense("b")], [spec.Dense("c")]])]
    apart = bmo.layer_scales(
        spec.LayerChain(links, input_shape=(4,)), params | heads, normalize=False
    )
    kernel = jnp.concatenate([heads["b"]["kernel"], heads["c"]["kernel"]], axis=1)
    together = bmo.layer_scales(
        spec.LayerChain([spec.Dense("a"), spec.Dense("b")], input_shape=(4,)),
        params | {"b": {"kernel": kernel}},
        normalize=False,
    )
    assert float(apart["a"]) == pytest.approx(float(together["a"]))


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([spec.Input((4,))], r"must be the first link of an arm"),
        (
            [spec.Residual([spec.Flatten(), spec.Input((4,))])],
            r"must be the first link of an arm",
        ),
        (
            [spec.Residual([spec.Input((4,))], [spec.Input((4,))])],
            r"so that nothing reaches what is below",
        ),
        ([HEADS, spec.Flatten()], r"must be the last link of the chain"),
        ([spec.Residual([HEADS])], r"must be the last link of the chain"),
    ],
)
def test_other_inputs_and_outputs_are_at_the_ends(links, message):
    with pytest.raises(ValueError, match=message):
        spec.LayerChain(links, input_shape=(4,))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, "a"), 2.0])
def test_a_weight_for_each_output(weights):
    with pytest.raises(ValueError, match=r"weights \(=.* must be 2 positive numbers"):
        spec.Outputs([[], []], weights=weights)
