"""Long runs: saved and resumed, killed, wrapped, and 200,000 steps.

One step of Optax's wrappers is in `test_optax_contract.py`, here is what many owe.
"""

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import backmatch_optax as bmo
from backmatch_optax import spec

# Of whole runs, which programs that differ in rounding only drift apart.
assert_runs_close = functools.partial(assert_trees_all_close, rtol=1e-4, atol=1e-5)

ROOT = Path(__file__).parent.parent
MODEL = models.Mlp()
SCALE = bmo.scale_by_backmatch(models.MLP, normalize=False)


def schedule_sgd(chain: spec.LayerChain = models.MLP) -> Any:
    """With everything that has a state: momentum and the count of a schedule."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.05, 3, 20)
    return bmo.backmatch_sgd(rate, chain, weight_decay=1e-3, normalize=False)


def start() -> Any:
    return models.init_params(MODEL, models.MLP)


@jax.jit
def scales_of(params: Any) -> dict[str, jax.Array]:
    return bmo.layer_scales(models.MLP, params, normalize=False)


@jax.jit
def scaled_of(grads: Any, params: Any) -> Any:
    """One update of the transformation alone."""
    return SCALE.update(grads, SCALE.init(params), params)[0]


@jax.jit
def loss_of(params: Any, step: jax.typing.ArrayLike) -> jax.Array:
    """A regression whose batch depends on the step alone."""
    inputs = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (32, 8))
    outputs: Any = MODEL.apply({"params": params}, inputs)
    return jnp.mean((outputs - jnp.tanh(inputs[:, :4])) ** 2)


@jax.jit
def gradient_of(params: Any, step: jax.typing.ArrayLike) -> Any:
    return jax.grad(loss_of)(params, step)


def stepper(tx: Any, gradient: Any = gradient_of) -> Any:
    """A jitted step of `(params, state)`."""

    @jax.jit
    def step(carry, index):
        params, state = carry
        updates, state = tx.update(gradient(params, index), state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(step: Any, carry: Any, indices: Any) -> Any:
    for index in indices:
        carry = step(carry, index)
    return carry


# --- Saved and restored --------------------------------------------------------------


def save(folder: Path, step: int, tree: Any) -> None:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(tree))


def restore(folder: Path, like: Any = None) -> Any:
    """The latest checkpoint, in the form and on the devices of `like`."""
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(
            manager.latest_step(), args=ocp.args.StandardRestore(like)
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Any]:
    """A folder with the fifth step, and what was saved."""
    tx = schedule_sgd()
    carry = run(stepper(tx), (start(), tx.init(start())), range(5))
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder, 5, carry)
    return folder, carry


def test_a_checkpoint_is_restored_to_the_bit_and_in_its_types(saved):
    folder, carry = saved
    restored = restore(folder, like=jax.eval_shape(lambda: carry))
    assert jax.tree.structure(restored) == jax.tree.structure(carry)
    assert_trees_all_equal(restored, carry)
    assert optax.tree.get(restored[1], "layer_scales").keys() == {"fc1", "fc2", "fc3"}


def test_a_checkpoint_without_target_names_every_scale(saved):
    folder, (params, state) = saved
    restored_params, restored_state = restore(folder)
    assert_trees_all_equal(restored_params, params)
    scales = optax.tree.get(state, "layer_scales")
    assert_trees_all_equal(restored_state[1]["layer_scales"], scales)


def test_a_checkpoint_of_one_model_does_not_fit_another(saved):
    folder, _ = saved
    params = models.init_params(models.ConvNet(), models.CONV_NET)
    other = (params, schedule_sgd(models.CONV_NET).init(params))
    with pytest.raises(ValueError):
        restore(folder, like=jax.eval_shape(lambda: other))


def spread(tree: Any, devices: int) -> Any:
    """Every array cut along its last axis, where it divides."""
    mesh = jax.make_mesh(
        (devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def place(leaf):
        cut = [None] * leaf.ndim
        if leaf.ndim and leaf.shape[-1] % devices == 0:
            cut[-1] = "d"
        return jax.device_put(leaf, NamedSharding(mesh, P(*cut)))

    return jax.tree.map(place, tree)


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (4, 2)])
def test_a_run_goes_on_with_another_number_of_devices(tmp_path, before, after):
    tx = schedule_sgd()
    step = stepper(tx)
    carry = run(step, spread((start(), tx.init(start())), before), range(3))
    save(tmp_path, 3, carry)
    restored = restore(tmp_path, like=spread((start(), tx.init(start())), after))
    assert_trees_all_equal(restored, carry)
    for leaf in jax.tree.leaves(restored):
        assert len(leaf.sharding.device_set) == after
    expected = run(step, carry, range(3, 6))
    assert_runs_close(run(step, restored, range(3, 6)), expected)


def test_a_restored_train_state_goes_on_as_if_nothing_had_happened(tmp_path):
    @jax.jit
    def step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=gradient_of(state.params, state.step))

    def steps(state: TrainState, count: int) -> TrainState:
        return functools.reduce(lambda state, _: step(state), range(count), state)

    def create(params: Any) -> TrainState:
        state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
        return state.replace(step=jnp.zeros((), jnp.int32))

    tx = schedule_sgd()
    state = steps(create(start()), 4)
    save(tmp_path, 4, state)
    fresh = create(models.random_like(start(), seed=9))
    resumed = steps(restore(tmp_path, like=fresh), 4)
    assert_trees_all_equal(resumed, steps(state, 4))


def test_a_restored_nnx_optimizer_goes_on_as_if_nothing_had_happened(tmp_path):
    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            inputs = jnp.sin(jnp.arange(64.0)).reshape(8, 8)
            return jnp.mean((model(inputs) - inputs[:, :4]) ** 2)

        optimizer.update(model, nnx.grad(loss_fn)(model))

    def create(seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
        model = models.NnxMlp(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, schedule_sgd(), wrt=nnx.Param)

    pair, resumed = create(0), create(1)
    for _ in range(4):
        step(*pair)
    save(tmp_path, 4, nnx.state(pair))
    nnx.update(resumed, restore(tmp_path, like=nnx.state(resumed)))
    assert_trees_all_equal(
        nnx.as_pure(nnx.state(resumed)), nnx.as_pure(nnx.state(pair))
    )
    for _ in range(4):
        step(*pair)
        step(*resumed)
    assert_trees_all_equal(
        nnx.as_pure(nnx.state(resumed)), nnx.as_pure(nnx.state(pair))
    )


def train_with_checkpoints(folder: Path, steps: int, killed_at: int = -1) -> Any:
    """Trains on from the latest checkpoint, and saves at every second step."""
    tx = schedule_sgd()
    step = stepper(tx)
    carry, first = (start(), tx.init(start())), 0
    with ocp.CheckpointManager(folder) as manager:
        if manager.latest_step() is not None:
            args = ocp.args.StandardRestore(carry)
            carry, first = manager.restore(None, args=args), manager.latest_step() or 0
        for index in range(first, steps):
            if index == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            carry = step(carry, index)
            if index % 2 == 1:
                manager.save(index + 1, args=ocp.args.StandardSave(carry))
                if index + 1 < killed_at:  # the last may be cut off half-way
                    manager.wait_until_finished()
    return carry


def test_a_killed_run_is_resumed_to_the_bit(tmp_path):
    never_killed = train_with_checkpoints(tmp_path / "whole", 10)
    folder = tmp_path / "killed"
    child = subprocess.run(
        [sys.executable, __file__, str(folder), "10", "6"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    resumed = train_with_checkpoints(folder, 10)
    assert_trees_all_equal(resumed, never_killed)


# --- Wrapped, for many steps ---------------------------------------------------------


def test_steps_with_bad_gradients_are_as_if_they_had_not_been():
    def gradient(params, index):
        grads = gradient_of(params, index)
        bad = jnp.where(index % 3 == 1, jnp.nan, 1)
        return jax.tree.map(lambda leaf: leaf * bad, grads)

    tx = schedule_sgd()
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    carry = (start(), guarded.init(start()))
    params, state = run(stepper(guarded, gradient), carry, range(12))
    good = [index for index in range(12) if index % 3 != 1]
    expected = run(stepper(tx), (start(), tx.init(start())), good)
    assert state.total_notfinite == 4
    assert_runs_close((params, state.inner_state), expected)


def test_clipping_before_bounds_the_step_by_the_largest_scale():
    def gradient(params, index):
        spike = jnp.where(index == 5, 1e6, 1)
        return jax.tree.map(lambda leaf: leaf * spike, gradient_of(params, index))

    tx = optax.chain(optax.clip_by_global_norm(0.1), SCALE, optax.sgd(0.05))
    step = stepper(tx, gradient)
    carry = (start(), tx.init(start()))
    for index in range(10):
        before, carry = carry[0], step(carry, index)
        moved = optax.tree.norm(optax.tree.sub(carry[0], before))
        # A gradient of ones comes out as the scales, those of the biases too.
        scales = scaled_of(optax.tree.ones_like(before), before)
        largest = max(leaf.max() for leaf in jax.tree.leaves(scales))
        assert moved <= 0.05 * 0.1 * largest * (1 + 1e-5)


def test_multi_steps_of_equal_gradients_are_plain_steps():
    tx = schedule_sgd()
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    carry = (start(), multi.init(start()))
    step = stepper(multi, lambda params, index: gradient_of(params, index // 4))
    params, state = run(step, carry, range(20))
    expected = run(stepper(tx), (start(), tx.init(start())), range(5))
    assert_runs_close((params, state.inner_opt_state), expected)


def test_multi_steps_leave_out_micro_batches_that_are_not_finite():
    def gradient(params, index):
        # Every step has two micro-batches, and a bad one before them.
        bad = jnp.where(index % 3 == 0, jnp.inf, 1)
        return jax.tree.map(lambda leaf: leaf * bad, gradient_of(params, index // 3))

    tx = schedule_sgd()
    multi = optax.MultiSteps(
        tx, every_k_schedule=2, should_skip_update_fn=optax.skip_not_finite
    )
    step = stepper(multi, gradient)
    params, state = run(step, (start(), multi.init(start())), range(12))
    expected = run(stepper(tx), (start(), tx.init(start())), range(4))
    assert state.gradient_step == 4
    assert_runs_close((params, state.inner_opt_state), expected)


def test_a_schedule_multiplies_the_step_and_leaves_the_scales():
    rate: Any = optax.join_schedules(
        [optax.linear_schedule(0.0, 0.1, 3), optax.cosine_decay_schedule(0.1, 5)], [3]
    )
    tx = bmo.backmatch_sgd(rate, models.MLP, momentum=None, normalize=False)
    params, state = start(), tx.init(start())
    update = jax.jit(tx.update)
    for index in range(8):
        grads = gradient_of(params, index)
        updates, state = update(grads, state, params)
        expected = optax.tree.scale(-rate(index), scaled_of(grads, params))
        assert_trees_all_close(updates, expected, rtol=1e-5)
        scales = optax.tree.get(state, "layer_scales")
        assert_trees_all_close(scales, scales_of(params), rtol=1e-6)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("partition", [optax.partition, optax.multi_transform])
def test_a_frozen_layer_keeps_its_bits_and_its_part_in_the_scales(partition):
    labels = {"fc1": "body", "fc2": "frozen", "fc3": "head"}
    rates = {"body": optax.sgd(0.05, 0.9), "head": optax.sgd(0.01)}
    tx = optax.chain(SCALE, partition(rates | {"frozen": optax.set_to_zero()}, labels))
    step = stepper(tx)
    before = run(step, (start(), tx.init(start())), range(9))
    params, state = step(before, 9)
    assert_trees_all_equal(params["fc2"], start()["fc2"])
    assert_trees_all_close(
        optax.tree.get(state, "layer_scales"),
        scales_of(before[0]),  # of all three layers
        rtol=1e-6,
    )
    # The head has no momentum: its step is its rate times its scaled gradient.
    scaled = scaled_of(gradient_of(before[0], 9), before[0])
    expected = jax.tree.map(lambda p, u: p - 0.01 * u, before[0]["fc3"], scaled["fc3"])
    assert_trees_all_close(params["fc3"], expected, rtol=1e-5)


def test_an_average_of_the_parameters_beside_changes_no_bit():
    tx, average = schedule_sgd(), optax.ema(0.8)

    @jax.jit
    def with_average(carry, index):
        (params, state), seen = carry
        params, state = stepper(tx)((params, state), index)
        mean, seen = average.update(params, seen)
        return ((params, state), seen), mean

    carry = ((start(), tx.init(start())), average.init(start()))
    mean = None
    for index in range(12):
        carry, mean = with_average(carry, index)
    expected = run(stepper(tx), (start(), tx.init(start())), range(12))
    assert_trees_all_equal(carry[0], expected)
    # The average is a model of its own.
    assert loss_of(mean, 99) < loss_of(start(), 99)
    for scale in scales_of(mean).values():
        assert jnp.isfinite(scale) and scale > 0


def test_schedule_free_scales_by_the_parameters_its_gradients_are_taken_at():
    rate = 0.05
    tx = optax.contrib.schedule_free(
        optax.chain(SCALE, optax.sgd(rate)), learning_rate=rate, b1=0.9
    )
    step = stepper(tx)
    y, before = run(step, (start(), tx.init(start())), range(19))
    params, state = step((y, before), 19)
    scaled = scaled_of(gradient_of(y, 19), y)
    expected = jax.tree.map(lambda z, u: z - rate * u, before.z, scaled)
    assert_trees_all_close(state.z, expected, rtol=1e-4, atol=1e-6)
    scales = optax.tree.get(state, "layer_scales")
    assert_trees_all_close(scales, scales_of(y), rtol=1e-5)
    found = optax.contrib.schedule_free_eval_params(state, params)
    assert loss_of(found, 99) < loss_of(start(), 99)


def test_reduce_on_plateau_makes_the_step_smaller_and_leaves_the_scales():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=3, cooldown=0)
    tx = optax.chain(SCALE, optax.sgd(0.1), plateau)
    params, state = start(), tx.init(start())
    grads = gradient_of(params, 0)
    update = jax.jit(tx.update)
    first, state = update(grads, state, params, value=1.0)
    updates = None
    for _ in range(8):  # the loss never falls
        updates, state = update(grads, state, params, value=1.0)
    assert_trees_all_close(updates, optax.tree.scale(0.25, first), rtol=1e-5)
    assert_trees_all_close(
        optax.tree.get(state, "layer_scales"),
        scales_of(params),
        rtol=1e-6,
    )


# --- 200,000 steps -------------------------------------------------------------------

LAYERS, CHUNKS, CHUNK = 12, 20, 10_000
NAMES = [f"fc{index}" for index in range(LAYERS)]
DEEP = {
    "plain": [spec.Dense(name) for name in NAMES],
    "normalised": [
        link for name in NAMES for link in (spec.Dense(name), spec.BatchNorm())
    ],
}


@pytest.mark.parametrize("links", DEEP.values(), ids=DEEP)
def test_200_000_steps_stay_finite_and_neither_leak_nor_recompile(links):
    chain = spec.LayerChain(links, input_shape=(4,))
    normal = np.random.default_rng(0).normal
    turn = jnp.asarray(np.tri(4, k=-1) - np.tri(4, k=-1).T, jnp.float32)
    tx = bmo.backmatch_sgd(0.02, chain, weight_decay=5e-3, normalize=False)
    traces = []

    def gradient(kernel: jax.Array) -> jax.Array:
        # As below a BatchNorm: across the kernel, which without decay only grows, and
        # the smaller the larger the kernel is.
        return kernel @ turn / jnp.sum(jnp.square(kernel))

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(carry):
        traces.append(carry)

        def step(_, carry):
            params, state = carry
            grads = jax.tree.map(gradient, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, CHUNK, step, carry)

    params = {name: {"kernel": np.float32(normal(size=(4, 4)) / 2)} for name in NAMES}
    carry = steps(jax.device_put((params, tx.init(params))))
    live = len(jax.live_arrays())
    for _ in range(CHUNKS - 1):
        carry = steps(carry)
    assert len(traces) == 1
    assert len(jax.live_arrays()) == live
    params, state = jax.device_get(carry)
    for leaf in jax.tree.leaves((params, state)):
        assert np.isfinite(leaf).all()
    assert all(scale > 0 for scale in optax.tree.get(state, "layer_scales").values())
    for roles in params.values():  # nothing has died or run away
        assert 1e-3 < np.linalg.norm(roles["kernel"]) < 1e3


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    train_with_checkpoints(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
