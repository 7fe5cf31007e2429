"""Parameters spread over eight devices: the same scales, and types that stay."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import backmatch_optax as bmo
from backmatch_optax import spec

# Every width is divisible by the number of devices.
DEVICES = 8
CONV_NET = spec.LayerChain(
    [
        spec.Conv("conv"),
        spec.BatchNorm("norm"),
        spec.Activation("relu"),
        spec.GlobalAvgPool(),
        spec.Dense("head"),
    ],
    input_shape=(4, 4, 8),
)
CONV_SHAPES = {
    "conv": {"kernel": (3, 3, 8, 16), "bias": (16,)},
    "norm": {"scale": (16,), "bias": (16,)},
    "head": {"kernel": (16, 8), "bias": (8,)},
}
# Without normalization every scale depends on every norm, whose sums are traced in
# another way.
PLAIN_NAMES = [f"fc{index}" for index in range(12)]
PLAIN_NET = spec.LayerChain([spec.Dense(n) for n in PLAIN_NAMES], input_shape=(8,))
PLAIN_SHAPES = {name: {"kernel": (8, 8)} for name in PLAIN_NAMES}

NETS = {
    "conv net": (CONV_NET, CONV_SHAPES, "paper"),
    "mean field": (CONV_NET, CONV_SHAPES, "mean_field"),
    "plain net": (PLAIN_NET, PLAIN_SHAPES, "paper"),
}
every_net = pytest.mark.parametrize(
    ("chain", "shapes", "gains"), NETS.values(), ids=NETS
)
# Kernels cut along their input or their output features.
every_axis = pytest.mark.parametrize("axis", [-2, -1], ids=["in", "out"])


def random_params(shapes: Any, seed: int = 0) -> Any:
    normal = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda shape: jnp.asarray(normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def make_mesh(axis_type: AxisType) -> Mesh:
    return jax.make_mesh((DEVICES,), ("devices",), axis_types=(axis_type,))


def shard(tree: Any, mesh: Mesh, axis: int) -> Any:
    """Cuts every leaf that has this axis along it; puts the others on all devices."""

    def place(leaf):
        cut = [None] * leaf.ndim
        if leaf.ndim >= -axis:
            cut[axis] = "devices"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*cut)))

    return jax.tree.map(place, tree)


# --- Explicit axes: shardings are part of the types ----------------------------------


@every_net
@every_axis
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_types_are_kept_on_an_explicit_mesh(chain, shapes, gains, axis, jit):
    tx = bmo.backmatch_sgd(0.1, chain, gains=gains, normalize=False)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = shard(random_params(shapes), mesh, axis)
        state = tx.init(params)
        update = jax.jit(tx.update) if jit else tx.update
        after = update(params, state, params)
        types_before = jax.tree.map(jax.typeof, (params, state))
        assert jax.tree.map(jax.typeof, after) == types_before


@every_net
@every_axis
def test_scales_on_an_explicit_mesh_are_those_of_one_device(chain, shapes, gains, axis):
    params = random_params(shapes)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        scales = bmo.layer_scales(
            chain, shard(params, mesh, axis), gains=gains, normalize=False
        )
    expected = bmo.layer_scales(chain, params, gains=gains, normalize=False)
    assert_trees_all_close(scales, expected, rtol=1e-5)


# --- Automatic axes: the compiler spreads the work -----------------------------------


@every_net
@every_axis
def test_sharded_params_train_as_on_one_device(chain, shapes, gains, axis):
    tx = bmo.backmatch_sgd(0.1, chain, gains=gains, normalize=False)
    params, grads = random_params(shapes), random_params(shapes, seed=1)
    expected = tx.update(grads, tx.init(params), params)
    mesh = make_mesh(AxisType.Auto)
    params, grads = shard((params, grads), mesh, axis)
    result = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    assert_trees_all_close(result, expected, rtol=1e-5)


@every_net
@every_axis
def test_updates_keep_the_sharding_of_their_gradients(chain, shapes, gains, axis):
    tx = bmo.scale_by_backmatch(chain, gains=gains, normalize=False)
    params = shard(random_params(shapes), make_mesh(AxisType.Auto), axis)
    updates: Any = jax.jit(tx.update)(params, tx.init(params), params)[0]
    for update, param in zip(
        jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
    ):
        assert update.sharding.is_equivalent_to(param.sharding, param.ndim)


def collectives(params: Any, chain: spec.LayerChain) -> set[str]:
    """The kinds of communication in one compiled update."""
    tx = bmo.scale_by_backmatch(chain, normalize=False)
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    kinds = r"all-(?:reduce|gather|to-all)|collective-\w+|reduce-scatter"
    return set(re.findall(kinds, compiled.as_text() or ""))


@pytest.mark.usefixtures("optimized")
def test_replicated_params_need_no_communication():
    params, mesh = random_params(CONV_SHAPES), make_mesh(AxisType.Auto)
    replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert collectives(replicated, CONV_NET) == set()


@every_axis
@pytest.mark.usefixtures("optimized")
def test_sharded_params_are_reduced_and_never_gathered(axis):
    params = shard(random_params(CONV_SHAPES), make_mesh(AxisType.Auto), axis)
    assert collectives(params, CONV_NET) == {"all-reduce"}


# --- One replica on every device -----------------------------------------------------


def test_pmap_replicas_stay_equal_and_train_as_one_device():
    model = models.Mlp()
    tx = bmo.backmatch_sgd(0.01, models.MLP, normalize=False)
    start = models.init_params(model, models.MLP)
    normal = np.random.default_rng(0).normal
    inputs = jnp.asarray(normal(size=(DEVICES * 4, 8)), jnp.float32)
    targets = jnp.asarray(normal(size=(DEVICES * 4, 4)), jnp.float32)

    def loss_of(params, inputs, targets):
        outputs: Any = model.apply({"params": params}, inputs)
        return jnp.mean((outputs - targets) ** 2)

    def train(mean_over_devices, params, inputs, targets):
        state = tx.init(params)
        for _ in range(3):
            grads = jax.grad(loss_of)(params, inputs, targets)
            updates, state = tx.update(mean_over_devices(grads), state, params)
            params = optax.apply_updates(params, updates)
        return params

    def mean_over_devices(grads):
        return jax.lax.pmean(grads, "devices")

    def over_devices(batch):
        return batch.reshape(DEVICES, -1, batch.shape[-1])

    alone = jax.jit(functools.partial(train, lambda grads: grads))
    together = jax.pmap(
        functools.partial(train, mean_over_devices),
        axis_name="devices",
        in_axes=(None, 0, 0),
    )
    expected = alone(start, inputs, targets)
    replicas = together(start, over_devices(inputs), over_devices(targets))
    replicas = jax.tree.map(np.asarray, replicas)
    first = jax.tree.map(lambda leaf: leaf[0], replicas)
    for device in range(DEVICES):
        replica = jax.tree.map(lambda leaf, device=device: leaf[device], replicas)
        assert_trees_all_equal(replica, first)
    assert_trees_all_close(first, expected, rtol=1e-5, atol=1e-6)
