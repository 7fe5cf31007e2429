"""Which per-layer rule pays? A benchmark of networks drawn at random.

Small networks of many shapes are trained for some hundred steps by every method, from
the same initial weights and on the same batches. Each method's learning rate is tuned
for each network on the powers of 2, by training loss, over a range that grows until
the best rate lies inside. Of five networks two are kept aside: the others serve to
choose a rule, these to say what it is worth.

    python -m examples.studies.random_networks
    python -m examples.studies.random_networks --report
    python -m examples.studies.random_networks --dataset digits --networks 8

Results are appended to a file, a line for each network and method. A run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import KeyPath, keystr
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from examples import data
from examples.studies import results_file
from examples.studies.cifar import cpu

RESULTS = Path(__file__).parent / "results" / "random_networks.jsonl"

Kind = Literal["mlp", "conv", "residual", "attention"]
Declared = Literal["paper", "mean_field"]
Gains = Literal["paper", "mean_field", "measured"]

_KINDS: tuple[Kind, ...] = ("mlp", "conv", "residual", "attention")
_SHARES = (7, 1, 1, 1)  # of each kind among ten networks
_WIDTHS = (16, 24, 32, 48, 64)

_BATCH, _TRAIN, _TEST = 64, 8192, 2048  # images a step, to learn from, to test with
_REFRESH = 10  # steps between two looks at the weights where scales are live
_AT_ONCE = 8  # runs side by side in one program
_PROBED = 256  # images that scales are measured on

_DIVERGED = 2.5  # a loss above that of guessing, log(10)
_HEAD = "head"  # the last layer

# ---------------------------------------------------------------------- the networks


@dataclasses.dataclass(frozen=True)
class Network:
    """A network drawn at random.

    Attributes:
      index: its place in the study, and the seed of its weights and batches.
      kind: what it is made of.
      activation: "relu" or "tanh".
      norm: whether there are normalisations; an attention net always has them.
      widths: the features of its hidden layers, blocks or token vectors.
      imbalance: the deviation of the logarithms of what its initial kernels are
        multiplied by; the product of all is 1.
    """

    index: int
    kind: Kind
    activation: str
    norm: bool
    widths: tuple[int, ...]
    imbalance: float

    @property
    def kept_aside(self) -> bool:
        """Whether it is one of those for the final word."""
        return (self.index + self.index // 10) % 5 >= 3

    def lacks(self, method: Method) -> bool:
        """Whether the scales of a method are not there for it.

        Measured ones serve where none can be declared; beside SGD everywhere.
        """
        if not method.scale:
            return False
        if self.kind == "attention":
            return method.gains != "measured"
        return method.gains == "measured" and method.optimizer != "sgd"

    def __str__(self) -> str:
        """For tables and progress bars."""
        norm = "norm" if self.norm else "plain"
        widths = "-".join(map(str, self.widths))
        return (
            f"{self.index} {self.kind} {self.activation} {norm} {widths} "
            f"x{self.imbalance:.1f}"
        )


def draw(index: int) -> Network:
    """The network of that index; the same at every call."""
    rng = np.random.default_rng([1802, index])
    kind = _KINDS[np.repeat(np.arange(len(_KINDS)), _SHARES)[index % 10]]
    if kind == "mlp":
        depth, choices = int(rng.integers(2, 9)), _WIDTHS
        count = depth - 1
    elif kind == "conv":
        count, choices = int(rng.integers(2, 4)), (6, 8, 12)
    elif kind == "residual":
        count, choices = int(rng.integers(1, 4)), _WIDTHS
    else:
        count, choices = int(rng.integers(1, 3)), (16, 24)
    if kind in ("mlp", "conv") and rng.random() < 0.5:
        widths = tuple(map(int, rng.choice(choices, size=count)))
    else:
        widths = (int(rng.choice(choices)),) * count
    return Network(
        index,
        kind,
        activation=str(rng.choice(["relu", "tanh"])),
        norm=bool(rng.random() < 0.5) or kind == "attention",
        widths=widths,
        imbalance=math.log(2) if rng.random() < 0.5 else 0.0,
    )


def _conv_as_product(
    lhs: jax.Array, rhs: jax.Array, *arguments: Any, **options: Any
) -> jax.Array:
    """A convolution with "SAME" padding as a matrix product.

    With a kernel for each run, XLA's own is many times slower on a CPU.
    """
    del arguments, options
    rows, columns, channels, features = rhs.shape
    _, height, width, _ = lhs.shape
    around = ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    padded = jnp.pad(lhs, around)
    taps = [
        padded[:, i : i + height, j : j + width]
        for i in range(rows)
        for j in range(columns)
    ]
    kernel = rhs.reshape(rows * columns * channels, features)
    return jnp.concatenate(taps, axis=-1) @ kernel


class Model(nn.Module):
    """The Flax model of a network; a BatchNorm uses the batch's statistics always."""

    network: Network
    classes: int
    fast: bool = True  # the convolution that is fast under `vmap`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images, shape (batch, classes)."""
        network = self.network
        if network.kind == "conv":
            for number, width in enumerate(network.widths):
                x = self._activated(self._conv(width)(x))
                if number < 2:
                    pool = cpu.max_pool if self.fast else nn.max_pool
                    x = pool(x, (2, 2), strides=(2, 2))
            x = x.reshape(len(x), -1)
        elif network.kind == "mlp":
            x = x.reshape(len(x), -1)
            for width in network.widths:
                x = self._activated(self._dense(width)(x))
        elif network.kind == "residual":
            x = self._dense(network.widths[0])(x.reshape(len(x), -1))
            for width in network.widths:
                branch = self._activated(self._dense(width)(x))
                x = x + self._dense(width)(branch)
            x = self._activated(x)
        else:
            x = self._attention(x)
        return nn.Dense(self.classes, name=_HEAD)(x)

    @property
    def _bias(self) -> bool:
        return not self.network.norm or self.network.kind == "attention"

    def _dense(self, width: int) -> nn.Dense:
        return nn.Dense(width, use_bias=self._bias)

    def _conv(self, width: int) -> nn.Conv:
        return nn.Conv(
            width,
            (3, 3),
            use_bias=self._bias,
            conv_general_dilated=_conv_as_product if self.fast else None,
        )

    def _activated(self, x: jax.Array) -> jax.Array:
        if self.network.norm and self.network.kind != "attention":
            x = nn.BatchNorm(use_running_average=False)(x)
        return getattr(jax.nn, self.network.activation)(x)

    def _attention(self, x: jax.Array) -> jax.Array:
        """A transformer on patches of 2x4 pixels, averaged over its tokens."""
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 4, 4, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 8 * channels)
        size = self.network.widths[0]
        tokens = x.shape[1]
        place = self.param("place", nn.initializers.normal(0.1), (tokens, size))
        x = self._dense(size)(x) + place
        for _ in self.network.widths:
            z = nn.LayerNorm()(x)
            # A key's bias changes nothing, so that its measured scale is infinite.
            query, key, value = (nn.Dense(size, use_bias=False)(z) for _ in range(3))
            logits = jnp.einsum("bqc,bkc->bqk", query, key) / math.sqrt(size)
            weights = jax.nn.softmax(logits)
            mixed = jnp.einsum("bqk,bkc->bqc", weights, value)
            x = x + self._dense(size)(mixed)
            hidden = self._activated(self._dense(2 * size)(nn.LayerNorm()(x)))
            x = x + self._dense(size)(hidden)
        return nn.LayerNorm()(x).mean(1)


Apply = Callable[[Any, jax.Array], jax.Array]


class Task(NamedTuple):
    """A network with its initial weights, its chain and its data."""

    apply: Apply
    params: Any
    chain: spec.LayerChain | None  # None where it cannot be declared
    images: np.ndarray  # shape=(n, 8, 8, channels), float32
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    order: np.ndarray  # the images of each batch, shape=(steps, batch)


def make_task(network: Network, dataset: data.Dataset, steps: int) -> Task:
    """What the methods are given: all of them the same."""
    images = small(dataset, dataset.train_images[:_TRAIN])
    test_images = small(dataset, dataset.test_images[:_TEST])
    model = Model(network, dataset.num_classes)
    # What initialises is not compiled, which would take seconds.
    shapes: Any = dict(jax.eval_shape(model.init, jax.random.key(0), images[:2]))
    rng = np.random.default_rng(network.index)
    params = initial_params(shapes.pop("params"), network, rng)
    # BatchNorm's running statistics, which are never read.
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        mutable = list(variables)
        logits: Any = model.apply({"params": params, **variables}, x, mutable=mutable)
        return logits[0]

    chain = None
    if network.kind != "attention":
        chain = bmo.infer_spec(model.clone(fast=False), images[:2])
    # Every image once, then every image once again.
    epochs = math.ceil(steps * _BATCH / len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])
    order = order[: steps * _BATCH].reshape(steps, _BATCH)
    labels = dataset.train_labels[:_TRAIN]
    test_labels = dataset.test_labels[:_TEST]
    return Task(apply, params, chain, images, labels, test_images, test_labels, order)


def initial_params(shapes: Any, network: Network, rng: np.random.Generator) -> Any:
    """Normal kernels that keep a signal's size, out of balance or not."""
    kernels = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(shapes))
    logs = network.imbalance * rng.normal(size=kernels)
    factors = iter(np.exp(logs - logs.mean()))

    def initial(path: KeyPath, leaf: Any) -> jax.Array:
        name = keystr(path, simple=True, separator="/")
        if leaf.ndim < 2:
            return jnp.full(leaf.shape, float(name.endswith("scale")))
        gain = 2 if network.activation == "relu" and _HEAD not in name else 1
        size = math.sqrt(gain * leaf.shape[-1] / leaf.size) * next(factors)
        return jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(initial, shapes)


def small(dataset: data.Dataset, images: np.ndarray) -> np.ndarray:
    """Standardised images, 32x32 averaged down to 8x8."""
    n, height, width, channels = images.shape
    x = np.asarray(dataset.standardise(jnp.asarray(images)), np.float32)
    x = x.reshape(n, 8, height // 8, 8, width // 8, channels)
    return x.mean((2, 4))


# ----------------------------------------------------------------------- the methods


FACTORS = ("scale", "size", "fan_in", "inputs")  # of a multiplier


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer and a multiplier for each array of parameters.

    The multiplier is `scale^a * size^b * fan_in^c * inputs^d`, over a mean, so that all
    methods of an optimizer have their best rates on one grid. For SGD the trace of the
    Gauss-Newton matrix that the scales predict stays as it is, as with
    `normalize=True`; for the others the mean multiplier of all entries is 1. It comes
    before SGD's momentum, and after the other optimizers.

    Attributes:
      optimizer: "sgd" (Nesterov), "adam", "lion" or "muon"; no weight decay.
      scale: the exponent of the back-matched scale.
      size: the exponent of the array's size.
      fan_in: the exponent of the array's size over its features.
      inputs: the exponent of the fan-in of the kernel that reads the images, where all
        other arrays have 1: what is not in the inputs' size is in their correlations.
      gains: where the scale comes from.
      live: whether it follows the weights, or is that of the initial ones.
      papers: divided by its first mean only, which is the papers' rule to the letter.
    """

    optimizer: str
    scale: Fraction = Fraction(0)
    size: Fraction = Fraction(0)
    fan_in: Fraction = Fraction(0)
    inputs: Fraction = Fraction(0)
    gains: Gains = "paper"
    live: bool = False
    papers: bool = False

    @property
    def plain(self) -> Method:
        """Its optimizer without a multiplier."""
        return Method(self.optimizer)

    def __str__(self) -> str:
        """Unique among the methods."""
        factors = [
            name if exponent == 1 else f"{name}^({exponent})"
            for name in FACTORS
            if (exponent := getattr(self, name))
        ]
        parts = [" * ".join([self.optimizer, *factors])]
        if self.scale:
            parts += [self.gains, "live" if self.live else "frozen"]
        if self.papers:
            parts.append("not normalized")
        return ", ".join(parts)


_DECLARED: tuple[Declared, ...] = ("paper", "mean_field")
EXPONENTS = tuple(map(Fraction, ("1/4", "1/2", "1")))
_HALF = Fraction(1, 2)


def _methods() -> Iterator[Method]:
    one = Fraction(1)
    yield Method("sgd")
    yield Method("sgd", size=-_HALF)
    yield Method("sgd", inputs=-_HALF)
    yield Method("sgd", one, live=True, papers=True)
    for gains in _DECLARED:
        for live in (True, False):
            for exponent in EXPONENTS:
                yield Method("sgd", exponent, gains=gains, live=live)
        for scale, size in ((_HALF, _HALF), (one, _HALF), (one, one)):
            yield Method("sgd", scale, -size, gains=gains, live=True)
    for exponent in (_HALF, one):
        yield Method("sgd", exponent, gains="measured")
    yield Method("sgd", one, -_HALF, gains="measured")
    for optimizer in ("adam", "lion", "muon"):
        yield Method(optimizer)
        for exponent in EXPONENTS[:2]:
            yield Method(optimizer, size=-exponent)
        yield Method(optimizer, fan_in=-_HALF)
        yield Method(optimizer, inputs=-_HALF)
        for gains in (*_DECLARED, "measured"):
            for exponent in EXPONENTS:
                yield Method(optimizer, exponent, gains=gains)
            yield Method(optimizer, _HALF, -_HALF, gains=gains)


METHODS = tuple(_methods())

# Where the search for the best rate begins, as a power of 2.
_FIRST = {"sgd": -4, "adam": -7, "lion": -10, "muon": -4}


# Those of a program share what it computes besides. Muon's matrices are too dear.
_PROGRAMS = (("sgd", "adam", "lion"), ("muon",))


def transformation(optimizer: str) -> optax.GradientTransformation:
    """An optimizer by its name, with learning rate 1 and no weight decay."""
    match optimizer:
        case "sgd":
            return optax.sgd(1.0, momentum=0.9, nesterov=True)
        case "adam":
            return optax.adam(1.0)
        case "lion":
            return optax.lion(1.0, weight_decay=0.0)
        case "muon":
            # Updates of the size of Adam's, for kernels as matrices from inputs to
            # features; Adam for vectors.
            return optax.contrib.muon(
                1.0,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=functools.partial(jax.tree.map, _matrix),
            )
    raise ValueError(f"optimizer (={optimizer!r}) must be one of {list(_FIRST)}")


def _matrix(leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    if leaf.ndim < 2:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), -1)


# ------------------------------------------------------------------------ the scales


def declared_log_scales(
    params: Any, chain: spec.LayerChain, gains: Declared
) -> jax.Array:
    """Logarithms of the scales of all arrays, in the order of the tree."""
    tx = bmo.scale_by_backmatch(chain, gains=gains, normalize=False)
    ones = jax.tree.map(lambda _: jnp.ones(()), params)
    scales, _ = tx.update(ones, tx.init(params), params)
    return jnp.log(jnp.stack(jax.tree.leaves(scales)))


def measured_log_scales(task: Task) -> jax.Array:
    """The same, measured on the network itself."""
    measured = bmo.measure_layer_scales(
        task.apply,
        task.params,
        task.images[:_PROBED],
        key=jax.random.key(0),
        layer_of=lambda path: path,
    )
    by_path = measured.layer_scales
    return jnp.log(jnp.stack([by_path[path] for path in paths(task.params)]))


def paths(params: optax.Params) -> list[str]:
    """The names of the arrays, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [keystr(path, simple=True, separator="/") for path, _ in leaves]


def sizes(params: optax.Params) -> np.ndarray:
    """Numbers of entries, in the order of the tree."""
    return np.array([leaf.size for leaf in jax.tree.leaves(params)])


def fan_ins(params: optax.Params) -> np.ndarray:
    """Sizes over features, in the order of the tree; 1 for vectors."""
    return np.array([leaf.size // leaf.shape[-1] for leaf in jax.tree.leaves(params)])


def input_fan_ins(params: optax.Params) -> np.ndarray:
    """The fan-in of the kernel that reads the images; of all other arrays 1."""
    first = [name in ("Dense_0/kernel", "Conv_0/kernel") for name in paths(params)]
    return np.where(first, fan_ins(params), 1)


class Rule(NamedTuple):
    """A method and a rate as arrays, with an entry for each run."""

    rate: Any
    optimizer: Any  # its place in the program
    exponents: Any  # of the factors
    live: Any  # True or False
    mean_field: Any  # whether what is live has those gains
    papers: Any
    by_trace: Any  # whether the mean is that of curvatures, or of entries
    initial: Any  # logarithms of the initial scales, shape=(arrays,)


def rule(method: Method, rate: float, initial: np.ndarray) -> Rule:
    """A method at a rate, its scales at first `exp(initial)`."""
    (program,) = (names for names in _PROGRAMS if method.optimizer in names)
    return Rule(
        rate=np.float32(rate),
        optimizer=np.int32(program.index(method.optimizer)),
        exponents=np.array([float(getattr(method, f)) for f in FACTORS], np.float32),
        live=np.bool_(method.live),
        mean_field=np.bool_(method.gains == "mean_field"),
        papers=np.bool_(method.papers),
        by_trace=np.bool_(method.optimizer == "sgd"),
        initial=initial,
    )


def log_multipliers(of: Rule, log_scales: jax.Array, params: optax.Params) -> jax.Array:
    """Logarithms of a method's multipliers, over their mean.

    Args:
      of: the method.
      log_scales: logarithms of the scales now.
      params: for their shapes.
    """
    counts = (sizes(params), fan_ins(params), input_fan_ins(params))
    shapes = jnp.log(jnp.asarray(counts, jnp.float32))

    def unnormalized(log_scales: jax.Array) -> jax.Array:
        return of.exponents @ jnp.concatenate([log_scales[None], shapes])

    norm_at = jnp.where(of.papers, of.initial, log_scales)
    weights = shapes[0] - jnp.where(of.by_trace, norm_at, 0)
    mean = jax.nn.logsumexp(weights + unnormalized(norm_at))
    return unnormalized(log_scales) - mean + jax.nn.logsumexp(weights)


# ------------------------------------------------------------------------ the running


class Final(NamedTuple):
    """How runs ended."""

    train: jax.Array  # mean loss of the last tenth of the steps
    test: jax.Array  # loss on test images


Trainer = Callable[[Rule], Final]


def make_trainer(task: Task, optimizers: Sequence[str]) -> Trainer:
    """A compiled program that trains by `_AT_ONCE` rules of some optimizers at once.

    The rate falls linearly to zero, so that the end tells more than the noise of the
    last steps.
    """
    tree = jax.tree.structure(task.params)
    if "muon" in optimizers:
        start, unravel, spread = task.params, lambda params: params, tree.unflatten
    else:
        # Parameters as one vector, since XLA compiles a loop for every array.
        start, unravel = ravel_pytree(task.params)
        array_of = np.repeat(np.arange(tree.num_leaves), sizes(task.params))

        def spread(multipliers: jax.Array) -> jax.Array:
            return multipliers[array_of]

    txs = [transformation(optimizer) for optimizer in optimizers]
    some_live = "sgd" in optimizers and task.chain is not None
    steps = len(task.order)
    refresh = _REFRESH if some_live else steps

    def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = task.apply(unravel(params), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def log_scales_now(of: Rule, params: Any) -> jax.Array:
        if not some_live or task.chain is None:
            return of.initial
        paper, mean_field = (
            declared_log_scales(unravel(params), task.chain, gains)
            for gains in _DECLARED
        )
        now = jnp.where(of.mean_field, mean_field, paper)
        return jnp.where(of.live, now, of.initial)

    def train(of: Rule, params: Any, arrays: dict[str, jax.Array]) -> Final:
        def period(state, numbers_and_chosen):
            logs = log_multipliers(of, log_scales_now(of, state[0]), task.params)
            before = spread(jnp.exp(jnp.where(of.by_trace, logs, 0)))
            after = spread(jnp.exp(jnp.where(of.by_trace, 0, logs)))

            def step(state, number_and_chosen):
                params, opt_states = state
                number, chosen = number_and_chosen
                x, y = arrays["images"][chosen], arrays["labels"][chosen]
                loss, gradient = jax.value_and_grad(loss_of)(params, x, y)
                gradient = jax.tree.map(jnp.multiply, before, gradient)
                updates, opt_states = zip(
                    *(
                        tx.update(gradient, opt_state, params)
                        for tx, opt_state in zip(txs, opt_states, strict=True)
                    ),
                    strict=True,
                )
                rate = of.rate * (1 - number / steps)
                params = jax.tree.map(
                    lambda leaf, multiplier, *options: (
                        leaf
                        + rate * multiplier * jax.lax.select_n(of.optimizer, *options)
                    ),
                    params,
                    after,
                    *updates,
                )
                return (params, opt_states), loss

            return jax.lax.scan(step, state, numbers_and_chosen)

        numbers = jnp.arange(steps).reshape(-1, refresh)
        chosen = arrays["order"].reshape(-1, refresh, _BATCH)
        state = params, tuple(tx.init(params) for tx in txs)
        (params, _), losses = jax.lax.scan(period, state, (numbers, chosen))
        test = loss_of(params, arrays["test_images"], arrays["test_labels"])
        return Final(losses.ravel()[-max(steps // 10, 1) :].mean(), test)

    compiled = jax.jit(jax.vmap(train, in_axes=(0, None, None)))
    names = ("images", "labels", "test_images", "test_labels", "order")
    arrays = jax.device_put({name: getattr(task, name) for name in names})
    return lambda rules: compiled(rules, start, arrays)


Curve = dict[int, tuple[float, float]]  # training and test loss by power of 2


def best(curve: Curve) -> int:
    """The rate of the lowest training loss; if all have diverged, the lowest rate."""
    # A comparison that is false of NaN.
    learned = [power for power, (loss, _) in curve.items() if loss < _DIVERGED]
    return min(learned, key=lambda power: curve[power]) if learned else min(curve)


def next_powers(curve: Curve, first: int) -> list[int]:
    """The rates to try next; none where the best one lies between two others."""
    centre = best(curve) if curve else first
    return sorted({centre - 1, centre, centre + 1} - set(curve))


def tune(
    trainer: Trainer,
    first: Mapping[Method, int],
    initial: Callable[[Method], np.ndarray],
) -> dict[Method, Curve]:
    """Loss by rate around the best rate of every method, all of one program.

    Args:
      trainer: the program.
      first: the methods, and where the search for the best rate begins.
      initial: logarithms of a method's initial scales.
    """
    curves: dict[Method, Curve] = {method: {} for method in first}
    while True:
        tried = [
            (method, power)
            for method, curve in curves.items()
            for power in next_powers(curve, first[method])
        ]
        if not tried:
            return curves
        for start in range(0, len(tried), _AT_ONCE):
            batch = tried[start : start + _AT_ONCE]
            # The last one again, so that there is one program only.
            filled = batch + batch[-1:] * (_AT_ONCE - len(batch))
            rules = [rule(m, 2.0**power, initial(m)) for m, power in filled]
            final = trainer(jax.tree.map(lambda *values: np.stack(values), *rules))
            losses = zip(*map(np.asarray, final), strict=True)
            for (method, power), (train, test) in zip(batch, losses, strict=False):
                curves[method][power] = (float(train), float(test))


# ----------------------------------------------------------------------- the results


def initial_log_scales(task: Task) -> dict[Gains, np.ndarray]:
    """Logarithms of the initial scales, by where they come from."""
    found: dict[Gains, Any] = {"measured": measured_log_scales(task)}
    chain = task.chain
    if chain is not None:

        @jax.jit
        def declared(params: optax.Params) -> list[jax.Array]:
            return [declared_log_scales(params, chain, gains) for gains in _DECLARED]

        found |= zip(_DECLARED, declared(task.params), strict=True)
    return {gains: np.asarray(logs) for gains, logs in found.items()}


def study(
    network: Network,
    dataset: data.Dataset,
    steps: int,
    methods: Collection[Method],
) -> Iterator[dict[str, Any]]:
    """Records of a network: of itself, then of each method."""
    task = make_task(network, dataset, steps)
    scales = initial_log_scales(task)
    yield {
        "network": network.index,
        "is": dataclasses.asdict(network),
        "arrays": paths(task.params),
        "sizes": sizes(task.params).tolist(),
        "fan_ins": fan_ins(task.params).tolist(),
        "input_fan_ins": input_fan_ins(task.params).tolist(),
        "log_scales": {
            gains: np.round(logs.astype(float), 3).tolist()
            for gains, logs in scales.items()
        },
    }

    def initial(method: Method) -> np.ndarray:
        return scales[method.gains] if method.scale else scales["measured"]

    for program in _PROGRAMS:
        chosen = [
            method
            for method in methods
            if method.optimizer in program and not network.lacks(method)
        ]
        if not chosen:
            continue
        trainer = make_trainer(task, program)
        plain = {method.plain: _FIRST[method.optimizer] for method in chosen}
        # The others begin at the best rate of the plain optimizer.
        tuned = tune(trainer, plain, initial)
        others = {m: best(tuned[m.plain]) for m in chosen if m != m.plain}
        tuned |= tune(trainer, others, initial)
        for method in chosen:
            curve = tuned[method]
            yield {
                "network": network.index,
                "method": str(method),
                "best": best(curve),
                "losses": {
                    str(power): [rounded(loss) for loss in losses]
                    for power, losses in sorted(curve.items())
                },
            }


def rounded(loss: float) -> float | None:
    """For JSON, which has no NaN."""
    return round(loss, 4) if math.isfinite(loss) else None


def run(options: argparse.Namespace) -> None:
    """Trains what the file of results lacks."""
    dataset = data.load(options.dataset, options.data_dir)
    setting = {"dataset": options.dataset, "steps": options.steps}
    done: dict[int, set[str]] = {}
    for record in results_file.read(options.results):
        if "is" in record:
            if record["setting"] != setting:
                raise SystemExit(
                    f"{options.results} has results of {record['setting']}, not of "
                    f"{setting}: choose another file with --results"
                )
            done.setdefault(record["network"], set())
        else:
            done.setdefault(record["network"], set()).add(record["method"])
    with tqdm(range(options.networks), unit="network") as bar:
        for index in bar:
            network = draw(index)
            bar.set_postfix_str(str(network))
            there = done.get(index, set())
            missing = [m for m in METHODS if str(m) not in there]
            if all(network.lacks(method) for method in missing):
                continue
            for record in study(network, dataset, options.steps, missing):
                if "is" not in record:
                    results_file.append([record], options.results)
                elif index not in done:
                    results_file.append(
                        [record | {"setting": setting}], options.results
                    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, or prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.random_networks",
        description="Per-layer rules on networks drawn at random, the learning rate of "
        "each tuned for each network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--networks", type=int, default=100, help="how many of them")
    parser.add_argument("--steps", type=int, default=300, help="of a run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--report", action="store_true", help="tables and a picture of the results"
    )
    options = parser.parse_args(arguments)
    if options.networks < 1:
        parser.error("--networks must be at least 1")
    if options.steps < 1 or options.steps % _REFRESH:
        parser.error(f"--steps must be a multiple of {_REFRESH}")
    if options.report:
        # It reads the methods from here.
        from examples.studies import random_networks_report

        random_networks_report.write(options.results)
    else:
        with results_file.alone_with(options.results):
            run(options)


if __name__ == "__main__":
    main()
