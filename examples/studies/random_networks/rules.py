"""Optimizers, each with a multiplier for every array of parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

import backmatch_optax as bmo
from backmatch_optax import spec
from examples.studies.random_networks.networks import Network, Task

Declared = Literal["paper", "mean_field"]
Gains = Literal["paper", "mean_field", "measured"]

_PROBED = 256  # images that scales are measured on

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

    def suits(self, network: Network) -> bool:
        """Whether a network has the scales.

        Measured ones serve where none can be declared; beside SGD everywhere.
        """
        if not self.scale:
            return True
        if network.kind == "attention":
            return self.gains == "measured"
        return self.gains != "measured" or self.optimizer == "sgd"

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


DECLARED: tuple[Declared, ...] = ("paper", "mean_field")
EXPONENTS = tuple(map(Fraction, ("1/4", "1/2", "1")))
_HALF = Fraction(1, 2)


def _methods() -> Iterator[Method]:
    one = Fraction(1)
    yield Method("sgd")
    yield Method("sgd", size=-_HALF)
    yield Method("sgd", inputs=-_HALF)
    yield Method("sgd", one, live=True, papers=True)
    for gains in DECLARED:
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
        for gains in (*DECLARED, "measured"):
            for exponent in EXPONENTS:
                yield Method(optimizer, exponent, gains=gains)
            yield Method(optimizer, _HALF, -_HALF, gains=gains)


METHODS = tuple(_methods())

# Where the search for the best rate begins, as a power of 2.
FIRST = {"sgd": -4, "adam": -7, "lion": -10, "muon": -4}


# Those of a program share what it computes besides. Muon's matrices are too dear.
PROGRAMS = (("sgd", "adam", "lion"), ("muon",))


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
    raise ValueError(f"optimizer (={optimizer!r}) must be one of {list(FIRST)}")


def _matrix(leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    if leaf.ndim < 2:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), -1)


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


def initial_log_scales(task: Task) -> dict[Gains, np.ndarray]:
    """Logarithms of the initial scales, by where they come from."""
    found: dict[Gains, Any] = {"measured": measured_log_scales(task)}
    chain = task.chain
    if chain is not None:

        @jax.jit
        def declared(params: optax.Params) -> list[jax.Array]:
            return [declared_log_scales(params, chain, gains) for gains in DECLARED]

        found |= zip(DECLARED, declared(task.params), strict=True)
    return {gains: np.asarray(logs) for gains, logs in found.items()}


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
    (program,) = (names for names in PROGRAMS if method.optimizer in names)
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
