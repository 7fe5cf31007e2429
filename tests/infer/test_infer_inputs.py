"""Models with several inputs, in any order and of any kind."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from held_against import ratios, worst
from zoo_linen import Call, array

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.infer import infer_spec

IMAGE, STATE = array(4, 8, 8, 3, dtype=jnp.uint8), array(4, 16)
MEAN, STD = np.arange(3.0), np.arange(1.0, 4.0)
PREPARED = {
    "pixels": lambda image: image.astype(jnp.float32) / 255,
    "standardised": lambda image: (image.astype(jnp.float32) - MEAN) / STD,
}


@pytest.mark.parametrize("case", PREPARED)
def test_what_prepares_an_input_does_not_count_in_either_order(case):
    def first(_: nn.Module, image: Any, state: Any) -> Any:
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(PREPARED[case](image)))
        x = nn.relu(nn.Dense(32, name="embed")(x.reshape(len(x), -1)))
        state = nn.relu(nn.Dense(32, name="state")(state))
        return nn.Dense(5, name="head")(jnp.concatenate([x, state], -1))

    model = Call(first)
    swapped = Call(lambda module, state, image: first(module, image, state))
    params = model.init(jax.random.key(0), jnp.ones(IMAGE.shape), jnp.ones(STATE.shape))
    one, other = (
        bmo.layer_scales(chain, params["params"])
        for chain in (
            infer_spec(model, IMAGE, STATE),
            infer_spec(swapped, STATE, IMAGE),
        )
    )
    assert one.keys() == other.keys()
    for path, scale in one.items():
        np.testing.assert_allclose(scale, other[path], rtol=1e-5)


def test_the_first_of_several_inputs_may_be_reshaped():
    def function(_: nn.Module, x: Any, state: Any) -> Any:
        x = nn.Conv(4, (3, 3), name="conv")(x.reshape(-1, 8, 8, 3))
        x = nn.Dense(8, name="a")(x.reshape(len(x), -1))
        return jnp.concatenate([x, nn.Dense(8, name="b")(state)], -1)

    (link,) = infer_spec(Call(function), array(4, 192), STATE).layers
    conv, dense = spec.Conv("conv"), spec.Dense("a")
    assert link == spec.Concatenate(
        [
            [spec.Reshape((8, 8, 3)), conv, spec.Flatten(), dense],
            [spec.Input((16,)), spec.Dense("b")],
        ]
    )


LABELS, TIMES = array(64, dtype=jnp.int32), array(64)


@pytest.mark.parametrize("joins", ["sum", "gate", "concatenate"])
def test_a_label_for_each_example(joins):
    def function(_: nn.Module, x: Any, label: Any) -> Any:
        x, label = nn.Dense(64, name="x")(x), nn.Embed(10, 64, name="y")(label)
        both = {
            "sum": lambda: x + label,
            "gate": lambda: x * label,
            "concatenate": lambda: jnp.concatenate([x, label], -1),
        }[joins]()
        return nn.Dense(5, name="head")(nn.relu(both))

    model = Call(function)
    chain = infer_spec(model, array(64, 32), LABELS)
    assert "spec.Input(())" in repr(chain)
    assert worst(ratios(model, chain, array(64, 32), LABELS, batch=256)) < 1.3


def test_a_number_for_each_example():
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        x = nn.Dense(64, name="x")(x) + nn.Dense(64, name="t")(time[:, None])
        return nn.Dense(5, name="head")(nn.relu(x))

    model = Call(function)
    chain = infer_spec(model, array(64, 32), TIMES)
    assert "spec.Input((1,))" in repr(chain)
    assert worst(ratios(model, chain, array(64, 32), TIMES, batch=1024)) < 1.6


@pytest.mark.parametrize("batch", [1, 4])
def test_an_index_that_is_the_same_for_all_examples(batch):
    def function(_: nn.Module, tokens: Any) -> Any:
        kinds = nn.Embed(2, 16, name="kind")(jnp.zeros_like(tokens))
        places = jnp.broadcast_to(jnp.arange(6), tokens.shape)
        x = nn.Embed(10, 16, name="token")(tokens) + kinds
        return x + nn.Embed(6, 16, name="place")(places)

    found = infer_spec(Call(function), array(batch, 6, dtype=jnp.int32))
    assert found.layers == (
        spec.Embed("token"),
        spec.Residual([], [spec.Input((6,)), spec.Embed("kind")]),
        spec.Bias("place/embedding"),
    )


def test_two_views_in_one_batch_are_refused():
    def function(_: nn.Module, a: Any, b: Any) -> Any:
        both = nn.Dense(8, name="d")(jnp.concatenate([a, b], 0))
        return jnp.concatenate(jnp.split(both, 2), -1)

    with pytest.raises(ValueError, match="concatenate joins examples of the batch"):
        infer_spec(Call(function), array(4, 8), array(4, 8))


def test_integers_that_are_only_compared():
    def function(_: nn.Module, tokens: Any) -> Any:
        return nn.Dense(8, name="d")(jax.nn.one_hot(tokens, 10))

    with pytest.raises(ValueError, match=r"jax\.nn\.one_hot, belongs before the model"):
        infer_spec(Call(function), array(4, 6, dtype=jnp.int32))


def test_positions_that_are_rolled():
    def function(_: nn.Module, x: Any) -> Any:
        return nn.Dense(5, name="b")(jnp.roll(nn.Dense(16, name="a")(x), 1, axis=1))

    model = Call(function)
    chain = infer_spec(model, array(4, 6, 8))
    assert worst(ratios(model, chain, array(4, 6, 8))) < 1.3
