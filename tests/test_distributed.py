"""Many devices: the training of one device, and what it costs in communication.

The transformation is part of `examples/distributed.py`, whose four modes run here on
eight virtual devices, and on two processes of four (this file is their program).
"""

import collections
import dataclasses
import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import backmatch_optax as bmo
from backmatch_optax import activations as _activations
from backmatch_optax import spec
from examples import data, distributed, methods, models

pytestmark = pytest.mark.usefixtures("optimized")

DEVICES = 8
BATCH = 352  # four steps in an epoch
ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """A small network, of which every kernel can be cut."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(8, (4, 4), strides=4, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dense(16)(x.reshape((x.shape[0], -1)))
        return nn.Dense(10)(nn.relu(x))


CHAIN = spec.LayerChain(
    [
        spec.Conv("Conv_0", strides=4),
        spec.BatchNorm("BatchNorm_0"),
        spec.Activation("relu"),
        spec.Flatten(),
        spec.Dense("Dense_0"),
        spec.Activation("relu"),
        spec.Dense("Dense_1"),
    ],
    input_shape=(32, 32, 1),
)


@functools.cache
def digits() -> data.Dataset:
    return data.load("digits")


def task_of(method: str = "backmatch") -> distributed.Task:
    tx = methods.optimizer(method, 0.02, CHAIN, weight_decay=5e-4)
    return distributed.Task(Net(), tx, digits())


def program_of(mode: str, method: str = "backmatch") -> distributed.Program:
    if mode == "pmap":
        return distributed.pmapped(task_of(method))
    return distributed.jitted(task_of(method), mode, jax.devices())


def trained(program: distributed.Program) -> Any:
    """The state after an epoch of four steps."""
    state = program.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    for images, labels in distributed.batches(program, digits(), BATCH, rng):
        state, _ = program.step(state, images, labels)
    return state


def kept(state: Any) -> Any:
    """Everything that training changes."""
    return state.params, state.batch_stats, state.opt_state


def whole(tree: Any) -> Any:
    """Arrays put together on every host; under pmap one replica after another."""
    return multihost_utils.process_allgather(tree, tiled=True)


# --- One process ---------------------------------------------------------------------


@functools.cache
def compiled(mode: str, method: str = "backmatch") -> tuple[distributed.Program, Any]:
    """A program whose step is compiled ahead of time, and the compiled step."""
    program = program_of(mode, method)
    images = program.place(digits().train_images[:BATCH])
    labels = program.place(digits().train_labels[:BATCH])
    state = program.init(jax.random.key(0))
    step = program.step.lower(state, images, labels).compile()
    return program._replace(step=step), step


@functools.cache
def result(mode: str) -> Any:
    return trained(compiled(mode)[0])


@functools.cache
def on_one_device() -> Any:
    program = distributed.jitted(task_of(), "data", jax.devices()[:1])
    return whole(kept(trained(program)))


@pytest.mark.parametrize("mode", ["data", "fsdp", "tensor"])
def test_training_on_a_mesh_is_training_on_one_device(mode):
    found = whole(kept(result(mode)))
    assert_trees_all_close(found, on_one_device(), rtol=1e-4, atol=1e-5)


def test_pmap_is_vmap_over_replicas_on_one_device():
    # Each replica normalises by its own part of the batch, as in Flax's examples, so
    # the twin is the same step under `vmap`.
    program = compiled("pmap")[0]
    task = dataclasses.replace(
        task_of(), average=functools.partial(jax.lax.pmean, axis_name="replicas")
    )
    twin = program._replace(
        step=jax.jit(jax.vmap(task.step, axis_name="replicas")),
        # On the first device.
        init=lambda key: jax.tree.map(jnp.asarray, jax.device_get(program.init(key))),
    )
    expected = kept(trained(twin))
    assert_trees_all_close(kept(result("pmap")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["pmap", "data"])
def test_replicas_have_the_same_bits_after_training(mode):
    for leaf in jax.tree.leaves(result(mode)):
        replicas = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(replicas) == DEVICES
        for replica in replicas[1:]:
            np.testing.assert_array_equal(replica, replicas[0])


@pytest.mark.parametrize("mode", ["fsdp", "tensor"])
def test_parameters_and_momentum_stay_cut(mode):
    state = result(mode)
    cut_into = {"fsdp": DEVICES, "tensor": 2}[mode]
    for tree in (state.params, optax.tree.get(state.opt_state, "trace")):
        for layer in ("Conv_0", "Dense_0", "Dense_1"):
            kernel = tree[layer]["kernel"]
            part = kernel.addressable_shards[0].data
            assert part.size * cut_into == kernel.size


def test_equal_gradients_give_the_bits_of_one_device():
    # The difference between one device and many is in the gradients' sums alone.
    tx = task_of().tx
    start = jax.device_get(program_of("data").init(jax.random.key(0)).params)
    mesh = distributed.make_mesh("data", jax.devices())

    @jax.jit
    def steps(params):
        def step(index, carry):
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.sin((index + 1) * p), params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 20, step, (params, tx.init(params)))

    alone = steps(jax.device_put(start, jax.devices()[0]))
    together = steps(jax.device_put(start, NamedSharding(mesh, P())))
    for leaf, expected in zip(
        jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
    ):
        assert len(leaf.addressable_shards) == DEVICES
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected)


# --- Communication, from the compiled programs ---------------------------------------

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(compiled_step: Any) -> list[tuple[str, int]]:
    """Every collective operation, with how many numbers one device takes part with."""
    found = []
    for types, kind in COLLECTIVE.findall(compiled_step.as_text()):
        shapes = re.findall(r"\w\[([\d,]*)\]", types)
        sizes = [
            np.prod([int(n) for n in s.split(",") if n], dtype=int) for s in shapes
        ]
        found.append((kind, int(sum(sizes))))
    return found


@pytest.mark.parametrize("mode", ["pmap", "data"])
def test_data_parallel_training_communicates_as_with_sgd(mode):
    ours = collectives(compiled(mode)[1])
    assert ours
    assert sorted(ours) == sorted(collectives(compiled(mode, "sgd")[1]))


def test_a_sharded_step_has_one_more_all_reduce_at_most_of_one_number_a_kernel():
    ours, sgd = (
        collectives(compiled("fsdp", method)[1]) for method in ("backmatch", "sgd")
    )
    kinds, sgd_kinds = (collections.Counter(k for k, _ in c) for c in (ours, sgd))
    assert (kinds - sgd_kinds).total() <= (
        kinds["all-reduce"] > sgd_kinds["all-reduce"]
    )
    numbers = sum(size for _, size in ours) - sum(size for _, size in sgd)
    assert 0 < numbers <= len(CHAIN.paths) + 1  # BatchNorm has a scale and a bias


def dense_40() -> tuple[spec.LayerChain, Any]:
    names = [f"fc{index}" for index in range(40)]
    kernel = jax.ShapeDtypeStruct((16, 16), "float32")
    chain = spec.LayerChain([spec.Dense(name) for name in names], input_shape=(16,))
    return chain, {name: {"kernel": kernel} for name in names}


def small_resnet() -> tuple[spec.LayerChain, Any]:
    init = functools.partial(models.ResNet((1, 1), features=16).init, train=False)
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    return models.resnet_spec((1, 1)), shapes["params"]


@pytest.mark.parametrize("mode", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize("network", [dense_40, small_resnet])
def test_all_norms_take_one_all_reduce_and_no_kernel_moves(network, mode):
    chain, shapes = network()
    mesh = distributed.make_mesh(mode, jax.devices())

    def place(leaf):
        sharding = NamedSharding(mesh, distributed.cut(mode, mesh, leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    placed = jax.tree.map(place, shapes)
    tx = bmo.scale_by_backmatch(chain, normalize=False)
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params))
    found = collectives(update.lower(placed, placed).compile())
    if mode == "data":
        assert found == []
    else:
        [(kind, numbers)] = found
        assert kind == "all-reduce"
        assert len(chain.paths) / 2 < numbers <= len(jax.tree.leaves(shapes))


@pytest.mark.parametrize("mode", distributed.MODES)
def test_every_buffer_but_the_scales_is_updated_in_place(mode):
    program, step = compiled(mode)
    state = program.init(jax.random.key(0))
    header = step.as_text().partition("entry_computation_layout")[0]
    # The scales of the step before are not even read.
    updated = len(jax.tree.leaves(state)) - len(CHAIN.paths)
    assert header.count("alias)") == updated
    images, labels = (
        program.place(rows[:BATCH])
        for rows in (digits().train_images, digits().train_labels)
    )
    program.step(state, images, labels)
    trace = optax.tree.get(state.opt_state, "trace")
    leaves = jax.tree.leaves((state.params, trace, state.batch_stats))
    assert all(leaf.is_deleted() for leaf in leaves)


# --- Inside shard_map ----------------------------------------------------------------

PAIR = spec.LayerChain(
    [spec.Dense("up"), spec.Activation("gelu"), spec.Dense("down")], input_shape=(16,)
)
NORMED_PAIR = spec.LayerChain(
    [spec.Dense("up"), spec.BatchNorm(), spec.Dense("down")], input_shape=(16,)
)
# Cut as a pair of tensor-parallel layers is: every part fits the chain by its shapes.
PAIR_CUT = {"up": {"kernel": P(None, "d")}, "down": {"kernel": P("d", None)}}


def pair_params() -> Any:
    normal = np.random.default_rng(0).normal
    return {
        "up": {"kernel": jnp.asarray(normal(size=(16, 32)), jnp.float32)},
        "down": {"kernel": jnp.asarray(normal(size=(32, 8)), jnp.float32)},
    }


def in_shard_map(fn: Any, in_specs: Any, out_specs: Any = None, **options: Any) -> Any:
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        fn, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs or P(), **options
    )


every_wrapper = pytest.mark.parametrize(
    "wrap", [lambda fn: fn, jax.jit], ids=["eager", "jit"]
)


@every_wrapper
def test_a_part_of_a_kernel_in_shard_map_is_refused_by_name(wrap):
    def update(params):
        return tx.update(params, tx.init(params), params)[0]

    tx = bmo.scale_by_backmatch(PAIR, normalize=False)
    with pytest.raises(ValueError, match=r"'down/kernel' differs .* 'd' .* outside"):
        wrap(in_shard_map(update, PAIR_CUT, PAIR_CUT))(pair_params())


@pytest.mark.parametrize(
    # Made in the test: a key asks JAX for its devices, before a worker may.
    "transformation",
    [
        bmo.scale_by_lsalr,
        lambda: bmo.scale_by_measured_backmatch(key=jax.random.key(0), normalize=False),
        lambda: bmo.keep_norms(optax.sgd(0.1, momentum=0.9), NORMED_PAIR),
    ],
    ids=["lsalr", "measured", "keep_norms"],
)
def test_norms_of_parts_are_refused_whoever_takes_them(transformation):
    tx = transformation()

    def outputs(params):
        return jnp.ones((2, 1)) * sum(leaf.sum() for leaf in jax.tree.leaves(params))

    def update(params):
        state = tx.init(params)
        return tx.update(params, state, params, outputs_fn=outputs)[0]

    with pytest.raises(ValueError, match="'down/kernel' differs between devices"):
        in_shard_map(update, PAIR_CUT, PAIR_CUT)(pair_params())
    updates, _ = bmo.scale_by_lsalr().update(pair_params(), optax.EmptyState())
    whole_updates = in_shard_map(
        lambda params: bmo.scale_by_lsalr().update(params, optax.EmptyState())[0], P()
    )(pair_params())
    assert_trees_all_close(whole_updates, updates, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1], ids=["in", "out"])
def test_parts_that_do_not_fit_are_refused_for_being_parts(axis):
    def scales(params):
        return bmo.layer_scales(PAIR, params, normalize=False)

    cut = P(*[None] * axis, "d")
    with pytest.raises(ValueError, match="not one device's part"):
        in_shard_map(scales, cut)(pair_params())


def test_a_part_of_what_no_layer_declares_is_no_error():
    def scales(params):
        return bmo.layer_scales(PAIR, params, unlisted="identity", normalize=False)

    params = pair_params()
    expected = bmo.layer_scales(PAIR, params, normalize=False)
    specs = {**dict.fromkeys(params, P()), "experts": P("d")}
    result = jax.jit(in_shard_map(scales, specs))(
        {**params, "experts": jnp.zeros((DEVICES, 4))}
    )
    assert_trees_all_close(result, expected, rtol=1e-6)


def test_whole_kernels_in_shard_map_have_their_scales():
    def scales(params):
        return bmo.layer_scales(PAIR, params, normalize=False)

    params = pair_params()
    result = jax.jit(in_shard_map(scales, P()))(params)
    assert_trees_all_close(
        result, bmo.layer_scales(PAIR, params, normalize=False), rtol=1e-6
    )


@every_wrapper
def test_mean_field_integrals_need_no_tracing_to_end(wrap):
    # They are numbers for Python, where an array inside shard_map has no number.
    chain = spec.LayerChain(
        [spec.Activation("gelu"), spec.Dense("up")], input_shape=(16,)
    )

    def scales(params):
        return bmo.layer_scales(chain, params, gains="mean_field", normalize=False)

    params = {"up": pair_params()["up"]}
    _activations._static_integrals.cache_clear()
    result = wrap(in_shard_map(scales, P()))(params)
    expected = bmo.layer_scales(chain, params, gains="mean_field", normalize=False)
    assert_trees_all_close(result, expected, rtol=1e-6)


def test_a_model_of_its_own_on_every_device_is_trained_unchecked():
    def scales(members):
        params = jax.tree.map(lambda leaf: leaf[0], members)
        return jax.tree.map(
            lambda s: s[None], bmo.layer_scales(PAIR, params, normalize=False)
        )

    members = [
        jax.tree.map(lambda p, n=n: p * (n + 1), pair_params()) for n in range(8)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    mapped = in_shard_map(scales, P("d"), P("d"), check_vma=False)
    result = jax.jit(mapped)(stacked)
    for index, member in enumerate(members):
        assert_trees_all_close(
            jax.tree.map(lambda s, i=index: s[i], result),
            bmo.layer_scales(PAIR, member, normalize=False),
            rtol=1e-6,
        )


# --- Two processes -------------------------------------------------------------------

SPREAD = ("pmap", "data", "fsdp")  # tensor: like fsdp, inside each process


def worker(port: str, process: str, output: str) -> None:
    """One process of two: trains in every mode, and keeps what it ends with."""
    arguments = ["--devices", "4", "--batch-size", str(BATCH), "--num-processes", "2"]
    arguments += ["--coordinator", f"localhost:{port}", "--process-id", process]
    distributed.connect(distributed.parse(arguments))
    arrays = {}
    for mode in SPREAD:
        params = whole(trained(program_of(mode)).params)
        for index, leaf in enumerate(jax.tree.leaves(params)):
            arrays[f"{mode} {index}"] = leaf
    np.savez(output, **arrays)


def worker_arguments(port: int, index: int, folder: Path) -> list[str]:
    return [__file__, str(port), str(index), str(folder / f"{index}.npz")]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", *worker_arguments(port, index, folder)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(printed)
    results = []
    for index in range(2):
        with np.load(folder / f"{index}.npz") as arrays:
            results.append(dict(arrays))
    return results


def test_two_processes_end_with_the_same_bits(two_processes):
    first, second = two_processes
    assert_trees_all_equal(first, second)


@pytest.mark.parametrize("mode", SPREAD)
def test_two_processes_train_as_one(mode, two_processes):
    for index, leaf in enumerate(jax.tree.leaves(result(mode).params)):
        np.testing.assert_allclose(
            two_processes[0][f"{mode} {index}"], leaf, rtol=1e-4, atol=1e-5
        )


# --- The program ---------------------------------------------------------------------


def test_the_example_learns_the_digits_with_cut_parameters(capsys):
    distributed.main(["--mode", "fsdp", "--epochs", "2"])
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"epoch 2: train loss (\S+), test (\S+)%", last)
    assert found and float(found[1]) < 0.2 and float(found[2]) > 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-processes", "2"], "needs --coordinator"),
        (["--batch-size", "100"], "--batch-size 100 does not divide among 8 devices"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        distributed.main(arguments)
    assert message in capsys.readouterr().err + str(error.value)


if __name__ == "__main__":
    worker(*sys.argv[1:])
