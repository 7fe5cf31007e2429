"""Trains a group of runs as one program: same method, own rates, decays and seeds.

Everything that training needs lives on the device: images as uint8, one state with a
leading axis over the runs. On a GPU an epoch is one compiled program; on a CPU, where a
convolution inside `jax.lax.scan` is several times slower, a loop of compiled steps.
Whatever is random is a function of seed, epoch and step, so that a state and its epoch
are all a checkpoint needs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.scipy.ndimage import map_coordinates
from jax.tree_util import keystr
from tqdm import tqdm

from examples import cpu, data, methods, models
from examples.studies.cifar.experiments import Experiment
from examples.training import loss_and_gradient, train_logits

State = dict[str, Any]
_EVAL_BATCH = 1000
_MAX_ROTATION = np.pi / 12  # 15 degrees; the papers say "random rotation" only


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      method: of `examples.methods`.
      learning_rate: at the start.
      weight_decay: as the method understands it.
      seed: of initial weights, order of batches and augmentation, for every method.
      tuning: whether a tenth of the training images stands in for the test images.
    """

    method: str
    learning_rate: float
    weight_decay: float
    seed: int
    tuning: bool = False


@dataclasses.dataclass
class History:
    """What is known of a group of runs after each epoch, shape (epochs, runs)."""

    loss: np.ndarray  # mean training loss of the epoch; NaN before it is over
    accuracy: np.ndarray  # on the images that judge, in [0, 1]
    seconds: np.ndarray  # that the epoch took, for all runs together; shape=(epochs,)
    layer_scales: dict[str, np.ndarray]  # where the method has them
    norms: dict[str, np.ndarray]  # of every kernel, Frobenius


class OutOfTime(Exception):
    """Training stopped at its deadline; the same call goes on from its checkpoint."""


def split(dataset: data.Dataset, experiment: Experiment, tuning: bool) -> data.Dataset:
    """The images to train on, and in the test's place those that judge."""
    if count := experiment.train_images:
        if count > len(dataset.train_images):
            raise SystemExit(
                f"--train-images {count} is more than the {len(dataset.train_images)} "
                f"of {dataset.name}; 0 takes all"
            )
        dataset = dataset._replace(
            train_images=dataset.train_images[:count],
            train_labels=dataset.train_labels[:count],
        )
    return dataset.hold_out(0.1) if tuning else dataset


class Program:
    """The compiled functions of a group: `init`, `epoch` and `accuracy`.

    Args:
      experiment: the protocol.
      runs: of one method, each with its own numbers.
      dataset: as `split` gives it.
    """

    def __init__(
        self, experiment: Experiment, runs: Sequence[Run], dataset: data.Dataset
    ):
        self.experiment, self.dataset = experiment, dataset
        self.steps = len(dataset.train_images) // experiment.batch_size
        if not self.steps:
            raise SystemExit(
                f"--batch-size: a batch of {experiment.batch_size} is more than the "
                f"{len(dataset.train_images)} training images"
            )
        (self._method,) = {run.method for run in runs}
        self._seeds = jnp.array([run.seed for run in runs])
        self._numbers = {
            name: jnp.array([getattr(run, name) for run in runs], jnp.float32)
            for name in ("learning_rate", "weight_decay")
        }
        model, self._chain = models.MODELS[experiment.model](
            dataset.num_classes, dataset.input_shape
        )
        on_cpu = jax.default_backend() == "cpu"
        model = cpu.faster(model)
        if experiment.width != 1:
            model = model.clone(width=experiment.width)
        self._model = model.clone(dtype=experiment.dtype)
        self._train = jax.device_put((dataset.train_images, dataset.train_labels))
        self._test = jax.device_put((dataset.test_images, dataset.test_labels))
        self._init = jax.jit(jax.vmap(self._init_one))
        self._order = jax.jit(jax.vmap(self._order_one, in_axes=(0, None)))
        in_axes = (0, 0, 0, 0, None, None, None, None)
        steps = jax.vmap(self._step_one, in_axes=in_axes)
        self._step = jax.jit(steps, donate_argnums=0)
        self._epoch = None if on_cpu else jax.jit(self._scan(steps), donate_argnums=0)
        self._count_right = jax.jit(jax.vmap(self._count_right_one, (0, None, None)))
        self._watched = jax.jit(jax.vmap(self._watch_one))

    def init(self) -> State:
        """The state before training, with a leading axis over the runs."""
        return self._init(self._numbers, self._seeds)

    def order(self, epoch: int) -> jax.Array:
        """The images of each batch of an epoch, shape (runs, steps, batch)."""
        return self._order(self._seeds, epoch)

    def epoch(
        self, state: State, epoch: int, on_step: Callable[[int], Any]
    ) -> tuple[State, np.ndarray]:
        """Trains for one epoch; also returns the runs' mean loss, shape (runs,).

        `on_step` is called with the number of steps done since the last call. The host
        waits for the device once, at the end.
        """
        order = self.order(epoch)
        rest = (self._numbers, self._seeds, order)
        if self._epoch is not None:
            state, losses = self._epoch(state, *rest, epoch, *self._train)
            mean = np.asarray(losses)
            on_step(self.steps)
            return state, mean
        losses = []
        for step in range(self.steps):
            state, loss = self._step(state, *rest, epoch, step, *self._train)
            losses.append(loss)
            on_step(1)
        return state, np.mean(jax.device_get(losses), axis=0)

    def accuracy(self, state: State) -> np.ndarray:
        """Share of the judging images that is classified right, shape (runs,)."""
        images, labels = self._test
        variables = {"params": state["params"], "batch_stats": state["batch_stats"]}
        right = [
            self._count_right(
                variables, images[i : i + _EVAL_BATCH], labels[i : i + _EVAL_BATCH]
            )
            for i in range(0, len(images), _EVAL_BATCH)
        ]
        return np.sum(jax.device_get(right), axis=0) / len(images)

    def watch(self, state: State) -> dict[str, dict[str, np.ndarray]]:
        """The layers' scales and the kernels' norms, each of shape (runs,)."""
        return jax.device_get(self._watched(state))

    def optimizer(
        self, numbers: dict[str, jax.Array]
    ) -> optax.GradientTransformationExtraArgs:
        """The method at a learning rate and a weight decay, with its schedule."""
        factor = self.experiment.decay_of_rate(self.steps)
        tx = methods.optimizer(
            self._method,
            lambda step: numbers["learning_rate"] * factor(step),
            self._chain,
            weight_decay=numbers["weight_decay"],
            momentum=self.experiment.momentum,
        )
        if self.experiment.schedule != "plateau":
            return tx
        return optax.chain(
            tx,
            optax.contrib.reduce_on_plateau(
                factor=0.5, patience=10, accumulation_size=self.steps
            ),
        )

    def _init_one(self, numbers: dict[str, jax.Array], seed: jax.Array) -> State:
        image = jnp.zeros((1, *self.dataset.input_shape))
        variables = self._model.init(jax.random.key(seed), image, train=False)
        params = variables["params"]
        return {
            "params": params,
            "batch_stats": variables["batch_stats"],
            "opt_state": self.optimizer(numbers).init(params),
        }

    def _order_one(self, seed: jax.Array, epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        order = jax.random.permutation(key, len(self.dataset.train_images))
        size = self.steps * self.experiment.batch_size
        return order[:size].reshape(self.steps, self.experiment.batch_size)

    def _step_one(
        self, state: State, numbers, seed, order, epoch, step, images, labels
    ) -> tuple[State, jax.Array]:
        chosen = order[step]
        x, y = self.dataset.standardise(images[chosen]), labels[chosen]
        if self.experiment.augment:
            key = jax.random.fold_in(jax.random.key(seed), epoch)
            x = augment(jax.random.fold_in(key, step), x)

        def outputs(params: Any) -> Any:
            return train_logits(self._model.apply, params, state["batch_stats"], x)[0]

        (loss, batch_stats), gradient = loss_and_gradient(
            self._model.apply, state["params"], state["batch_stats"], x, y
        )
        updates, opt_state = self.optimizer(numbers).update(
            gradient,
            state["opt_state"],
            state["params"],
            value=loss,  # for reduce_on_plateau
            outputs_fn=outputs,  # for measured scales
        )
        params = optax.apply_updates(state["params"], updates)
        state = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}
        return state, loss

    def _scan(self, steps: Callable) -> Callable:
        def run(state, numbers, seeds, order, epoch, images, labels):
            def body(state, step):
                return steps(state, numbers, seeds, order, epoch, step, images, labels)

            state, losses = jax.lax.scan(body, state, jnp.arange(self.steps))
            return state, losses.mean(0)

        return run

    def _count_right_one(self, variables, images, labels) -> jax.Array:
        images = self.dataset.standardise(images)
        logits: Any = self._model.apply(variables, images, train=False)
        return jnp.sum(logits.argmax(-1) == labels)

    def _watch_one(self, state: State) -> dict[str, dict[str, jax.Array]]:
        norms = {
            keystr(path[:-1], simple=True, separator="/"): jnp.linalg.norm(leaf.ravel())
            for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])
        }
        scales: Any = optax.tree.get(state["opt_state"], "layer_scales", default={})
        if not isinstance(scales, dict):  # measured ones, in the order of the modules
            scales = dict(zip(norms, scales, strict=True))
        return {"layer_scales": scales, "norms": norms}


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """A random flip and a random rotation of each image."""

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        flip, turn = jax.random.split(key)
        image = jnp.where(jax.random.bernoulli(flip), image[:, ::-1], image)
        angle = jax.random.uniform(turn, minval=-1, maxval=1) * _MAX_ROTATION
        return rotate(image, angle)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def rotate(image: jax.Array, angle: jax.Array | float) -> jax.Array:
    """An image turned about its centre; bilinear, the nearest pixel beyond the edge.

    Args:
      image: shape (height, width, channels).
      angle: in radians, counter-clockwise.
    """
    centre = (np.array(image.shape[:2]) - 1) / 2
    down, right = np.indices(image.shape[:2]) - centre[:, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    read = [
        cos * down + sin * right + centre[0],
        cos * right - sin * down + centre[1],
    ]
    turn = functools.partial(map_coordinates, coordinates=read, order=1, mode="nearest")
    return jax.vmap(turn, -1, -1)(image)


def train(
    experiment: Experiment,
    runs: Sequence[Run],
    dataset: data.Dataset,
    directory: Path,
    *,
    deadline: float = float("inf"),
    on_epoch: Callable[[int, History], Any] = lambda epoch, history: None,
) -> History:
    """Trains a group of runs, from its latest checkpoint if there is one.

    Args:
      experiment: the protocol.
      runs: of one method and one value of `tuning`.
      dataset: the whole data set, as `examples.data.load` gives it.
      directory: an absolute path, for this group's checkpoints.
      deadline: of `time.monotonic()`, checked after every epoch.
      on_epoch: called with the number of epochs done and the history.

    Returns:
      The history; epochs that were not trained are NaN. A run whose loss is not a
      finite number stays as it is; the group stops early once that is so of all.

    Raises:
      OutOfTime: at the deadline.
      SystemExit: where the checkpoint cannot be read.
    """
    (tuning,) = {run.tuning for run in runs}
    program = Program(experiment, runs, split(dataset, experiment, tuning))
    state = program.init()
    watched = program.watch(state)
    blank = np.full((experiment.epochs, len(runs)), np.nan)
    history = History(
        loss=blank.copy(),
        accuracy=blank.copy(),
        seconds=np.full(experiment.epochs, np.nan),
        **{
            name: {path: blank.copy() for path in watched[name]}
            for name in ("layer_scales", "norms")
        },
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(directory, options=options) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            blank_save = {"state": state, "history": dataclasses.asdict(history)}
            try:
                saved = checkpoints.restore(
                    done, args=ocp.args.StandardRestore(blank_save)
                )
            except Exception as error:  # Orbax and its stores have many kinds
                raise SystemExit(
                    f"The checkpoint {directory / str(done)} cannot be read "
                    f"({type(error).__name__}: {error}). Remove {directory}, and the "
                    "same command trains these runs from the start."
                ) from error
            state, history = saved["state"], History(**saved["history"])
        total = experiment.epochs * program.steps
        with tqdm(
            total=total,
            initial=done * program.steps,
            unit="step",
            desc=runs[0].method,
        ) as bar:
            for epoch in range(done, experiment.epochs):
                if _finished(history, epoch, experiment.patience):
                    break
                if time.monotonic() > deadline:
                    raise OutOfTime
                start = time.perf_counter()
                state, loss = program.epoch(state, epoch, bar.update)
                history.loss[epoch] = loss
                history.seconds[epoch] = time.perf_counter() - start
                history.accuracy[epoch] = program.accuracy(state)
                for name, values in program.watch(state).items():
                    for path, value in values.items():
                        getattr(history, name)[path][epoch] = value
                checkpoints.save(
                    epoch + 1,
                    args=ocp.args.StandardSave(
                        {"state": state, "history": dataclasses.asdict(history)}
                    ),
                )
                bar.set_postfix(
                    loss=f"{loss.min():.3f}",
                    accuracy=f"{history.accuracy[epoch].max():.2%}",
                )
                on_epoch(epoch + 1, history)
    return history


def _finished(history: History, epochs: int, patience: int) -> bool:
    """Whether every run has diverged or stopped to improve."""
    if not epochs:
        return False
    diverged = ~np.isfinite(history.loss[:epochs]).all(0)
    stale = np.zeros_like(diverged)
    if patience:
        best = history.accuracy[:epochs].argmax(0)
        stale = epochs - 1 - best >= patience
    return bool((diverged | stale).all())
