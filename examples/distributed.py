"""Trains one network on many devices, in one process or several.

Nothing of the optimizer changes with the devices: `scale_by_backmatch` sees whole
arrays, wherever their parts lie. One switch chooses who holds what:

    pmap    every device a copy of everything, `jax.pmap`
    data    the same by `jax.jit` over a mesh: only the batch is cut
    fsdp    parameters and momentum are cut too, over the same devices
    tensor  kernels are cut by output features over two devices, the batch over the rest

Eight CPU devices, or two processes of four (the same command, once with id 0 and once
with id 1):

    python -m examples.distributed --mode fsdp --devices 8
    python -m examples.distributed --mode fsdp --devices 4 \
        --coordinator localhost:1234 --num-processes 2 --process-id 0

Every process draws the same order of the whole training set and reads, of each batch,
only the rows that its own devices hold. So a run does not depend on the number of
processes, and no image is read twice.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples import data, methods, models
from examples.arguments import not_negative, whole
from examples.training import TrainState, loss_and_gradient

MODES = ("pmap", "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: nothing here knows how many devices there are."""

    model: nn.Module
    tx: optax.GradientTransformation
    dataset: data.Dataset
    # Over the replicas, where each sees only its own part of the batch.
    average: Callable[[Any], Any] = lambda tree: tree

    def init(self, key: jax.Array) -> TrainState:
        """The training state before the first step."""
        images = jnp.zeros((1, *self.dataset.input_shape))
        variables = self.model.init(key, images, train=False)
        return TrainState.create(
            apply_fn=self.model.apply,
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            tx=self.tx,
        )

    def step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        """One step of training, and its loss."""
        images = self.dataset.standardise(images)
        (loss, batch_stats), gradient = self.average(
            loss_and_gradient(
                state.apply_fn, state.params, state.batch_stats, images, labels
            )
        )
        return state.apply_gradients(grads=gradient, batch_stats=batch_stats), loss

    def share_right(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        """The share of a batch that is classified right, in [0, 1]."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        images = self.dataset.standardise(images)
        logits = state.apply_fn(variables, images, train=False)
        return self.average(jnp.mean(logits.argmax(-1) == labels))


class Program(NamedTuple):
    """A task on its devices: the same four functions in every mode."""

    init: Callable[[jax.Array], TrainState]
    place: Callable[[np.ndarray], Any]  # this process's rows of a batch on its devices
    step: Any  # jitted: (state, images, labels) -> (state, loss); donates the state
    share_right: Callable[[TrainState, jax.Array, jax.Array], jax.Array]


def pmapped(task: Task) -> Program:
    """A copy of everything on each device; gradients are averaged by hand."""
    devices = jax.local_device_count()
    task = dataclasses.replace(
        task, average=lambda tree: jax.lax.pmean(tree, axis_name="data")
    )
    # Every device draws the same initial weights.
    init = jax.pmap(task.init)
    return Program(
        init=lambda key: init(jnp.broadcast_to(key, (devices,))),
        place=lambda rows: rows.reshape(devices, -1, *rows.shape[1:]),
        step=jax.pmap(task.step, axis_name="data", donate_argnums=0),
        share_right=jax.pmap(task.share_right, axis_name="data"),
    )


def jitted(task: Task, mode: str, devices: Sequence[Any]) -> Program:
    """Arrays over a mesh: where they lie is said once, the compiler does the rest."""
    mesh = make_mesh(mode, devices)
    state = jax.tree.map(
        lambda leaf: NamedSharding(mesh, cut(mode, mesh, leaf.shape)),
        jax.eval_shape(task.init, jax.random.key(0)),
    )
    batch, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def place(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) * jax.process_count(), *rows.shape[1:])
        return jax.make_array_from_process_local_data(batch, rows, shape)

    return Program(
        init=jax.jit(task.init, out_shardings=state),
        place=place,
        step=jax.jit(task.step, donate_argnums=0, out_shardings=(state, whole)),
        share_right=jax.jit(task.share_right, out_shardings=whole),
    )


def make_mesh(mode: str, devices: Sequence[Any]) -> Mesh:
    """Devices in a row; for tensor parallelism in rows of two."""
    axes = {"data": len(devices)}
    if mode == "tensor":
        axes = {"data": len(devices) // 2, "model": 2}
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=devices,
    )


def cut(mode: str, mesh: Mesh, shape: tuple[int, ...]) -> P:
    """How an array of the training state, and so its momentum too, is cut.

    `fsdp` cuts the longest axis, `tensor` the last, the output features. What does not
    divide stays whole.
    """
    axes = sorted(range(len(shape)), key=lambda axis: shape[axis], reverse=True)
    name, axes = {
        "data": ("data", []),
        "fsdp": ("data", axes),
        "tensor": ("model", [len(shape) - 1] if shape else []),
    }[mode]
    for axis in axes:
        if shape[axis] % mesh.shape[name] == 0:
            return P(*[None] * axis, name)
    return P()


def my_rows(rows: np.ndarray) -> np.ndarray:
    """Of the rows of a batch, those that this process reads."""
    return rows.reshape(jax.process_count(), -1)[jax.process_index()]


def number(value: jax.Array) -> float:
    """A number that all devices hold, from the first of this process."""
    return np.asarray(value.addressable_data(0)).item()


def accuracy(
    program: Program, state: TrainState, dataset: data.Dataset, batch_size: int
) -> float:
    """The share of test images classified right, counted by all devices together."""
    count = len(dataset.test_labels)
    right = 0.0
    for start in range(0, count, batch_size):
        rows = my_rows(np.arange(start, start + batch_size))
        inside = np.minimum(rows, count - 1)
        # The last batch is filled up with a label that no image has.
        labels = np.where(rows < count, dataset.test_labels[inside], -1)
        images = program.place(dataset.test_images[inside])
        share = program.share_right(state, images, program.place(labels))
        right += batch_size * number(share)
    return right / count


def batches(
    program: Program, dataset: data.Dataset, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[Any, Any]]:
    """The training set once in random order, images and labels on their devices.

    `rng` is to be the same in every process; what does not fill a batch is left out.
    """
    for batch in dataset.batches(batch_size, rng):
        rows = my_rows(batch)
        images = program.place(dataset.train_images[rows])
        yield images, program.place(dataset.train_labels[rows])


def train(
    program: Program, dataset: data.Dataset, *, batch_size: int, epochs: int, seed: int
) -> TrainState:
    """Trains and prints; returns the last state, on the devices that hold it."""
    state = program.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        losses = []
        for images, labels in batches(program, dataset, batch_size, rng):
            state, loss = program.step(state, images, labels)
            losses.append(loss)
        loss = np.mean([number(loss) for loss in losses])
        right = accuracy(program, state, dataset, batch_size)
        if jax.process_index() == 0:
            print(f"epoch {epoch + 1}: train loss {loss:.4f}, test {right:.2%}")
    return state


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.distributed",
        description="Train one network on many devices, in one process or several.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--mode", choices=MODES, default="data", help="who holds what")
    add("--devices", type=whole(1), help="use this many virtual CPU devices a process")
    add("--coordinator", help="host:port of process 0, for several processes")
    add("--num-processes", type=whole(1), default=1)
    add("--process-id", type=whole(0), default=0, help="of this process, from 0")
    add("--dataset", choices=data.DATASETS, default="digits")
    add("--data-dir", help="where tensorflow-datasets keeps its data")
    add("--model", choices=models.MODELS, default="lenet")
    add("--method", choices=methods.METHODS, default="backmatch")
    add("--learning-rate", type=not_negative, default=0.1)
    add("--weight-decay", type=not_negative, default=5e-4)
    add("--batch-size", type=whole(1), default=128, help="of all devices together")
    add("--epochs", type=whole(1), default=8)
    add("--seed", type=whole(0), default=0)
    options = parser.parse_args(arguments)
    if options.num_processes > 1 and not options.coordinator:
        parser.error("--num-processes needs --coordinator host:port")
    return options


def connect(options: argparse.Namespace) -> None:
    """Chooses this process's devices and meets the other processes.

    Before anything else asks JAX for its devices.
    """
    if options.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.coordinator:
        jax.distributed.initialize(
            options.coordinator, options.num_processes, options.process_id
        )
    if options.batch_size % jax.device_count():
        raise SystemExit(
            f"--batch-size {options.batch_size} does not divide among "
            f"{jax.device_count()} devices"
        )
    if options.mode == "tensor" and jax.local_device_count() % 2:
        raise SystemExit("--mode tensor needs an even number of devices a process")


def build(options: argparse.Namespace, dataset: data.Dataset) -> Program:
    """The program that the options ask for."""
    model, chain = models.MODELS[options.model](
        dataset.num_classes, dataset.input_shape
    )
    tx = methods.optimizer(
        options.method,
        options.learning_rate,
        chain,
        weight_decay=options.weight_decay,
    )
    task = Task(model, tx, dataset)
    if options.mode == "pmap":
        return pmapped(task)
    return jitted(task, options.mode, jax.devices())


def main(arguments: Sequence[str] | None = None) -> TrainState:
    """Trains as the arguments say; returns the last state."""
    options = parse(arguments)
    connect(options)
    dataset = data.load(options.dataset, options.data_dir)
    return train(
        build(options, dataset),
        dataset,
        batch_size=options.batch_size,
        epochs=options.epochs,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
