"""Parameters may be kept in any of Flax's containers: the training is the same."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from flax.training.train_state import TrainState

import backmatch_optax as bmo
from backmatch_optax import spec

TX = bmo.backmatch_sgd(0.01, models.CONV_NET, weight_decay=1e-2, normalize=False)
STEPS = 3


@pytest.fixture(scope="module")
def params() -> Any:
    shapes = jax.eval_shape(
        lambda: models.init_params(models.ConvNet(), models.CONV_NET)
    )
    return models.random_like(shapes, seed=0)


@pytest.fixture(scope="module")
def gradients(params) -> list[Any]:
    return [models.random_like(params, seed) for seed in range(1, STEPS + 1)]


def train_bare(params: Any, gradients: list[Any]) -> Any:
    """Three steps in a bare Optax loop: the parameters and the last scales."""
    state = TX.init(params)
    for grads in gradients:
        updates, state = TX.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, optax.tree.get(state, "layer_scales")


@pytest.fixture(scope="module")
def expected(params, gradients) -> Any:
    """What a plain dict in a bare loop comes to."""
    return train_bare(params, gradients)


# --- The containers that a bare loop may hold ----------------------------------------


def boxed(params: Any) -> Any:
    """As `nn.with_partitioning` declares it; no mesh is needed to hold it."""
    return jax.tree.map(
        lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), params
    )


def nnx_model(params: Any) -> nnx.Module:
    model = models.NnxConvNet(nnx.Rngs(0))
    nnx.update(model, params)
    return model


def split(params: Any) -> nnx.State:
    """The parameters as `nnx.split` returns them, in variables."""
    return nnx.split(nnx_model(params), nnx.Param, ...)[1]


# By name: to the container, and back to nested dicts.
CONTAINERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "FrozenDict": (freeze, unfreeze),
    "Partitioned": (boxed, nn.unbox),
    "nnx.split": (split, nnx.to_pure_dict),
}
every_container = pytest.mark.parametrize(
    ("put", "take"), CONTAINERS.values(), ids=CONTAINERS
)


@every_container
def test_container_trains_bitwise_as_a_dict(params, gradients, expected, put, take):
    trained, scales = train_bare(put(params), [put(grads) for grads in gradients])
    assert_trees_all_equal((take(trained), scales), expected)


@every_container
def test_updates_come_in_the_container_of_the_gradients(params, put, take):
    held = put(params)
    tx = bmo.scale_by_backmatch(models.CONV_NET, normalize=False)
    updates, _ = tx.update(held, tx.init(held), held)
    assert jax.tree.structure(updates) == jax.tree.structure(held)
    assert type(updates) is type(held)


@every_container
def test_function_of_a_block_gets_nested_dicts_of_arrays(params, put, take):
    def squared_norm(block: Any) -> Any:
        return jnp.sum(block["kernel"] ** 2)

    block = spec.Block("head", weight_curvature=squared_norm, input_curvature=1.0)
    chain = spec.LayerChain([block], input_shape=(6,))
    scales = bmo.layer_scales(chain, put(params), unlisted="identity", normalize=False)
    expected = 1 / jnp.sum(params["head"]["kernel"] ** 2)
    np.testing.assert_allclose(scales["head"], expected, rtol=1e-5)


# --- Flax's own training objects -----------------------------------------------------


@pytest.mark.parametrize("container", [dict, FrozenDict])
def test_train_state_trains_bitwise_as_a_dict(params, gradients, expected, container):
    state = TrainState.create(
        apply_fn=models.ConvNet().apply, params=container(params), tx=TX
    )
    for grads in gradients:
        state = state.apply_gradients(grads=container(grads))
    scales = optax.tree.get(state.opt_state, "layer_scales")
    assert_trees_all_equal((unfreeze(state.params), scales), expected)


def test_nnx_optimizer_trains_bitwise_as_a_dict(params, gradients, expected):
    model = nnx_model(params)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    for grads in gradients:
        optimizer.update(model, split(grads))
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    scales = optax.tree.get(nnx.as_pure(optimizer.opt_state), "layer_scales")
    assert_trees_all_equal((trained, scales), expected)


def test_nnx_optimizer_steps_inside_nnx_jit():
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 8))) ** 2))(model)
        optimizer.update(model, grads)

    trained = []
    for step_fn in (step, nnx.jit(step)):
        model = models.NnxMlp(nnx.Rngs(0))
        tx = bmo.backmatch_sgd(1e-3, models.MLP, normalize=False)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(3):
            step_fn(model, optimizer)
        scales = optax.tree.get(nnx.as_pure(optimizer.opt_state), "layer_scales")
        trained.append((nnx.to_pure_dict(nnx.state(model)), scales))
    assert_trees_all_close(*trained, rtol=1e-5)


def test_abstract_nnx_model_is_enough_for_init():
    abstract = nnx.eval_shape(lambda: models.NnxConvNet(nnx.Rngs(0)))
    state = TX.init(nnx.state(abstract, nnx.Param))
    scales = optax.tree.get(state, "layer_scales")
    assert scales == dict.fromkeys(models.CONV_NET.paths, 1.0)


def test_checkpoint_restores_the_scales(tmp_path):
    # Paths with slashes are keys of the state.
    chain = spec.LayerChain([spec.Dense("Block_0/Dense_1")], input_shape=(4,))
    params = {"Block_0": {"Dense_1": {"kernel": jnp.full((4, 8), 0.5)}}}
    tx = bmo.backmatch_sgd(0.1, chain, normalize=False)
    _, state = tx.update(params, tx.init(params), params)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with orbax.StandardCheckpointer() as checkpointer:
        abstract = jax.eval_shape(tx.init, params)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert_trees_all_equal(restored, state)


# --- Keys ----------------------------------------------------------------------------


class ListOfLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])


def test_layers_of_a_list_are_reached_by_their_index():
    chain = spec.LayerChain(
        [spec.Dense(f"blocks/{index}") for index in range(3)], input_shape=(4,)
    )
    params = nnx.state(ListOfLayers(nnx.Rngs(0)), nnx.Param)
    scales = bmo.layer_scales(chain, params, normalize=False)
    named = spec.LayerChain(
        [spec.Dense(name) for name in ("first", "second", "third")], input_shape=(4,)
    )
    blocks: Any = nnx.to_pure_dict(params)["blocks"]
    expected = bmo.layer_scales(
        named,
        {"first": blocks[0], "second": blocks[1], "third": blocks[2]},
        normalize=False,
    )
    assert list(scales.values()) == list(expected.values())


def deep_mlp(names: list[str]) -> tuple[spec.LayerChain, Any]:
    """A chain of twelve layers, each of its own width."""
    normal = np.random.default_rng(0).normal
    params = {
        name: {"kernel": jnp.asarray(normal(size=(4 + index, 5 + index)))}
        for index, name in enumerate(names)
    }
    chain = spec.LayerChain([spec.Dense(name) for name in names], input_shape=(4,))
    return chain, params


def test_order_comes_from_the_spec_and_not_from_the_names():
    # JAX sorts keys, which puts Dense_10 before Dense_2.
    numbered, in_order = (
        deep_mlp(names)
        for names in ([f"Dense_{i}" for i in range(12)], [*"abcdefghijkl"])
    )
    scales, expected = (
        bmo.layer_scales(*numbered, normalize=False),
        bmo.layer_scales(*in_order, normalize=False),
    )
    assert list(scales) == [f"Dense_{index}" for index in range(12)]
    assert list(scales.values()) == list(expected.values())


def test_order_of_insertion_changes_nothing():
    chain, params = deep_mlp([f"Dense_{index}" for index in range(12)])
    tx = bmo.scale_by_backmatch(chain, normalize=False)
    backwards = dict(reversed(params.items()))
    result = tx.update(backwards, tx.init(backwards), backwards)
    assert_trees_all_equal(result, tx.update(params, tx.init(params), params))
