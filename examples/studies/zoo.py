"""Which normalisation of the scales keeps SGD's learning rate? A zoo of small networks.

Every candidate turns the scales into multiples of SGD's rate, one for each array. Each
network is trained by SGD (Nesterov, momentum 0.9, no decay) on a grid of learning rates
by powers of 2; SGD's best is the one with the least final training loss. Then each
candidate is trained at that very rate, and at multiples of it.

    python -m examples.studies.zoo
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax.parameters import text
from backmatch_optax.powers import stacked
from backmatch_optax.scales import NORM_FLOOR, scale_of_params, walk
from examples.arguments import whole
from examples.studies import markdown, results_file
from examples.studies.networks import NETWORKS, Network

RESULTS = Path(__file__).parent / "results"
_BATCH, _CHUNK, _EVALUATED = 32, 20, 256

# Where the scales come from. Without a declared chain, all are measured.
SOURCES = ("live", "frozen", "mean field", "measured", "measured, frozen")
# What they are divided by.
MEANS = (
    "none",
    "harmonic, entries",
    "harmonic, arrays",
    "geometric, entries",
    "geometric, arrays",
    "arithmetic, entries",
    "max",
    "gradient dot",
    "gradient norm",
    "geometric, layers",
)


class Candidate(NamedTuple):
    """A rule, as numbers, so that one compiled program serves all.

    With `s` the scales, `n` the sizes of the arrays, `o` their output features and `c`
    the loss's mean curvature: `t = s^power / n^size / o^out / c^loss`, divided by its
    mean, then
    `(1 + damping) / (1 / t + damping)`, then, with a `soft` bound `b`,
    `(1 + b t) / (b + t)`, then between `floor` and `cap`.
    """

    source: Any = 0
    mean: Any = 1
    power: Any = 1.0
    size: Any = 0.0
    out: Any = 0.0
    loss: Any = 0.0
    damping: Any = 0.0
    soft: Any = 0.0
    floor: Any = 0.0
    cap: Any = np.inf


def candidate(source: str = "live", mean: str = "harmonic, entries", **numbers: float):
    """A candidate by the names of its source and its mean."""
    return Candidate(SOURCES.index(source), MEANS.index(mean), **numbers)


SGD = candidate(power=0.0)


def multiples(
    scales: jax.Array,
    sizes: np.ndarray,
    outs: np.ndarray,
    own: np.ndarray,
    energies: jax.Array,
    rule: Candidate,
    curvature: float,
) -> jax.Array:
    """What each array's rate is of SGD's, by a rule.

    Args:
      scales: of the arrays.
      sizes: how many entries each has.
      outs: how many output features.
      own: 1 for an array that stands for its layer, 0 for a bias.
      energies: the squared norm of each array's gradient.
      rule: the candidate.
      curvature: of the loss.
    """
    n = jnp.asarray(sizes, jnp.float32)
    logs = rule.power * jnp.log(scales) - rule.size * jnp.log(n)
    logs = logs - rule.out * jnp.log(jnp.asarray(outs, jnp.float32))
    logs = logs - rule.loss * np.log(curvature)
    top = logs.max()
    t = jnp.exp(logs - top)
    share, energy = n / n.sum(), energies / jnp.maximum(energies.sum(), 1e-30)
    means = jnp.stack(
        [
            jnp.exp(-top),
            1 / (share / t).sum(),
            1 / (1 / t).mean(),
            jnp.exp((share * jnp.log(t)).sum()),
            jnp.exp(jnp.log(t).mean()),
            (share * t).sum(),
            t.max(),
            (energy * t).sum(),
            jnp.sqrt((energy * t**2).sum()),
            jnp.exp((own * jnp.log(t)).sum() / own.sum()),
        ]
    )
    t = t / means[rule.mean]
    t = (1 + rule.damping) / (1 / t + rule.damping)
    t = jnp.where(rule.soft > 0, (1 + rule.soft * t) / (rule.soft + t), t)
    return jnp.clip(t, rule.floor, rule.cap)


class Trainer:
    """Trains one network by many rules and rates at once.

    Every function is compiled once, whatever the rules, the rates and the seed.

    Args:
      network: what to train.
      steps: how many steps, a multiple of 20.
    """

    def __init__(self, network: Network, steps: int):
        self.network, self.steps = network, steps
        self.examples = {k: jnp.asarray(v) for k, v in network.examples.items()}
        self.evaluated = {k: v[:_EVALUATED] for k, v in self.examples.items()}
        variables = self._init(0)
        self.stats = {k: v for k, v in variables.items() if k != "params"}
        leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
        self.paths = [text(path) for path, _ in leaves]
        self.sizes = np.array([leaf.size for _, leaf in leaves])
        self.outs = np.array([leaf.shape[-1] for _, leaf in leaves])
        self.own = np.array([float(not p.endswith("bias")) for p in self.paths])
        over_runs = _one_by_one if network.one_by_one else jax.vmap
        self._chunk = jax.jit(over_runs(self._chunk_of_run))
        self._scales = {
            "frozen": jax.jit(over_runs(functools.partial(self._declared, "paper"))),
            "mean field": jax.jit(
                over_runs(functools.partial(self._declared, "mean_field"))
            ),
            "measured": jax.jit(over_runs(self._measured)),
        }
        self._loss_all = jax.jit(
            over_runs(lambda params: self._loss(params, self.evaluated))
        )

    def __call__(
        self, rules: Candidate, rates: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses at every 20th step, and the multiples of SGD's rate there.

        Shapes are (runs, chunks + 1), the first before training, and (runs, chunks,
        arrays).
        """
        runs = len(rates)
        first: Any = self.network.adjust(self._init(seed)["params"])
        params = jax.tree.map(lambda leaf: jnp.stack([leaf] * runs), first)
        trace = jax.tree.map(jnp.zeros_like, params)
        rng = np.random.default_rng(seed)
        total = len(next(iter(self.examples.values())))
        chosen = rng.integers(total, size=(self.steps // _CHUNK, _CHUNK, _BATCH))
        rules = jax.tree.map(jnp.asarray, rules)
        rates = jnp.asarray(rates, jnp.float32)  # pyright: ignore[reportAssignmentType]
        needed = {SOURCES[int(index)] for index in np.unique(rules.source)}
        start: dict[str, jax.Array] = {}
        losses: list[Any] = [self._loss_all(params)]
        factors: list[Any] = []
        for indices in chosen:
            found = self._refreshed(needed, params, start)
            start = start or found
            source = jnp.stack([found[name] for name in SOURCES], 1)
            refreshed = source[jnp.arange(runs), rules.source]
            tiled = jnp.broadcast_to(indices, (runs, *indices.shape))
            params, trace, last, loss = self._chunk(
                params, trace, refreshed, rules, rates, tiled
            )
            losses.append(loss)
            factors.append(last)
        return np.stack(losses, 1), np.stack(factors, 1)

    def _init(self, seed: int) -> Any:
        return self.network.model.init(jax.random.key(seed), *self._of(self.evaluated))

    def _of(self, batch: Mapping[str, Any]) -> list[jax.Array]:
        return [batch[name] for name in self.network.inputs]

    def _outputs(self, params: Any, *inputs: jax.Array) -> Any:
        # BatchNorm by the batch, as in training.
        variables = {"params": params, **self.stats}
        mutable = list(self.stats) or ["none"]
        return self.network.model.apply(variables, *inputs, mutable=mutable)[0]

    def _loss(self, params: Any, batch: dict[str, Any]) -> jax.Array:
        return self.network.loss(self._outputs(params, *self._of(batch)), batch)

    def _declared(self, gains: Any, params: Any) -> jax.Array:
        assert self.network.chain is not None
        sites = walk(
            self.network.chain,
            params,
            gains=gains,
            norm_floor=NORM_FLOOR,
            unlisted="error",
        )
        scales = scale_of_params(sites, False, None)
        return stacked([scales[path] for path in self.paths])

    def _measured(self, params: Any) -> jax.Array:
        found = bmo.measure_layer_scales(
            self._outputs,
            params,
            *self._of(self.evaluated),
            key=jax.random.key(0),
            num_probes=4,
            layer_of=lambda path: path,
        ).layer_scales
        # Of an array that does not reach the output, as below a head of zeros, one.
        scales = jnp.stack([found[path] for path in self.paths])
        return jnp.where(scales < 1e20, scales, 1.0)

    def _refreshed(
        self, needed: set[str], params: Any, start: dict[str, jax.Array]
    ) -> dict[str, Any]:
        """The scales by source that a chunk begins with; those not needed are ones."""
        ones = jnp.ones((len(jax.tree.leaves(params)[0]), len(self.sizes)))
        found: dict[str, Any] = dict.fromkeys(SOURCES, ones)
        if self.network.chain is None:
            now = self._scales["measured"](params)
            kept = start.get("frozen", now)
            return dict.fromkeys(SOURCES, now) | {"frozen": kept, SOURCES[4]: kept}
        if "frozen" in needed:
            found["frozen"] = start.get("frozen", self._scales["frozen"](params))
        if "mean field" in needed:
            found["mean field"] = self._scales["mean field"](params)
        if "measured" in needed:
            found["measured"] = self._scales["measured"](params)
        if SOURCES[4] in needed:
            found[SOURCES[4]] = start.get(SOURCES[4], self._scales["measured"](params))
        return found

    def _chunk_of_run(
        self,
        params: Any,
        trace: Any,
        refreshed: jax.Array,
        rule: Candidate,
        rate: jax.Array,
        indices: jax.Array,
    ) -> tuple[Any, Any, jax.Array, jax.Array]:
        """20 steps of one run, the last multiples and the loss afterwards."""

        def step(carry, index):
            params, trace = carry
            batch = {name: array[index] for name, array in self.examples.items()}
            gradient = jax.grad(self._loss)(params, batch)
            scales = refreshed
            if self.network.chain is not None:
                scales = jax.lax.cond(
                    (rule.source == 0) & (rule.power > 0),
                    lambda: self._declared("paper", params),
                    lambda: refreshed,
                )
            gradients, tree = jax.tree.flatten(gradient)
            energies = stacked([jnp.sum(g**2) for g in gradients])
            factors = multiples(
                scales,
                self.sizes,
                self.outs,
                self.own,
                energies,
                rule,
                self.network.loss_curvature,
            )
            factors = jax.lax.optimization_barrier(factors)
            updates = tree.unflatten(
                [-rate * f * g for f, g in zip(factors, gradients, strict=True)]
            )
            trace = jax.tree.map(lambda t, u: 0.9 * t + u, trace, updates)
            updates = jax.tree.map(lambda t, u: 0.9 * t + u, trace, updates)
            return (optax.apply_updates(params, updates), trace), factors

        (params, trace), factors = jax.lax.scan(step, (params, trace), indices)
        return params, trace, factors[-1], self._loss(params, self.evaluated)


def _one_by_one(fn: Callable[..., Any]) -> Callable[..., Any]:
    """As `jax.vmap(fn)`, in a loop: for convolutions on a CPU."""
    return lambda *args: jax.lax.map(lambda each: fn(*each), args)


CANDIDATES: dict[str, Candidate] = {
    "the papers' scales": candidate(mean="none"),
    "loss as last link": candidate(mean="none", loss=1.0),
    "loss as last link, cap 1": candidate(mean="none", loss=1.0, cap=1.0),
    "harmonic": candidate(),
    "harmonic, cap 1": candidate(cap=1.0),
    "harmonic, cap 2": candidate(cap=2.0),
    "harmonic, cap 4": candidate(cap=4.0),
    "harmonic, cap 8": candidate(cap=8.0),
    "harmonic, damped 1": candidate(damping=1.0),
    "harmonic, damped 3": candidate(damping=3.0),
    "harmonic, between 1/2 and 2": candidate(floor=0.5, cap=2.0),
    "max": candidate(mean="max"),
    "arithmetic": candidate(mean="arithmetic, entries"),
    "geometric": candidate(mean="geometric, entries"),
    "geometric over arrays": candidate(mean="geometric, arrays"),
    "harmonic over arrays": candidate(mean="harmonic, arrays"),
    "geometric over arrays, cap 2": candidate(mean="geometric, arrays", cap=2.0),
    "root, harmonic": candidate(power=0.5),
    "root, harmonic, cap 2": candidate(power=0.5, cap=2.0),
    "root, max": candidate(mean="max", power=0.5),
    "root, arithmetic": candidate(mean="arithmetic, entries", power=0.5),
    "root, geometric over arrays": candidate(mean="geometric, arrays", power=0.5),
    "fourth root, harmonic": candidate(power=0.25),
    "fourth root, max": candidate(mean="max", power=0.25),
    "over size, harmonic": candidate(size=1.0),
    "over root of size, harmonic": candidate(size=0.5),
    "root over root of size, harmonic": candidate(power=0.5, size=0.5),
    "root over fourth root of size, harmonic": candidate(power=0.5, size=0.25),
    "same length as the gradient": candidate(mean="gradient norm"),
    "same length, cap 2": candidate(mean="gradient norm", cap=2.0),
    "same length, cap 4": candidate(mean="gradient norm", cap=4.0),
    "same slope as the gradient": candidate(mean="gradient dot"),
    "root, same length": candidate(mean="gradient norm", power=0.5),
    "root, same slope": candidate(mean="gradient dot", power=0.5),
    "harmonic, between 1/4 and 4": candidate(floor=0.25, cap=4.0),
    "harmonic, between 1/8 and 2": candidate(floor=0.125, cap=2.0),
    "geometric over arrays, between 1/2 and 2": candidate(
        mean="geometric, arrays", floor=0.5, cap=2.0
    ),
    "geometric over arrays, between 1/4 and 4": candidate(
        mean="geometric, arrays", floor=0.25, cap=4.0
    ),
    "geometric over layers, between 1/2 and 2": candidate(
        mean="geometric, layers", floor=0.5, cap=2.0
    ),
    "root, geometric over layers": candidate(mean="geometric, layers", power=0.5),
    "root, geometric over arrays, cap 2": candidate(
        mean="geometric, arrays", power=0.5, cap=2.0
    ),
    "root, geometric over arrays, between 1/2 and 2": candidate(
        mean="geometric, arrays", power=0.5, floor=0.5, cap=2.0
    ),
    "root, geometric over arrays, frozen": candidate(
        "frozen", mean="geometric, arrays", power=0.5
    ),
    "root, geometric over arrays, measured": candidate(
        "measured", mean="geometric, arrays", power=0.5
    ),
    "fourth root, geometric over arrays": candidate(
        mean="geometric, arrays", power=0.25
    ),
    "same slope, cap 2": candidate(mean="gradient dot", cap=2.0),
    "same length, frozen": candidate("frozen", mean="gradient norm"),
    "same length, measured": candidate("measured", mean="gradient norm"),
    "same length, mean field": candidate("mean field", mean="gradient norm"),
    "harmonic, between 1/2 and 2, frozen": candidate("frozen", floor=0.5, cap=2.0),
    "harmonic, between 1/2 and 2, measured": candidate("measured", floor=0.5, cap=2.0),
    "harmonic, between 1/2 and 2, mean field": candidate(
        "mean field", floor=0.5, cap=2.0
    ),
    "geometric over arrays, between 1/2 and 2, frozen": candidate(
        "frozen", mean="geometric, arrays", floor=0.5, cap=2.0
    ),
    "geometric over arrays, between 1/2 and 2, measured": candidate(
        "measured", mean="geometric, arrays", floor=0.5, cap=2.0
    ),
    "root, geometric over arrays, between 1/2 and 2, frozen": candidate(
        "frozen", mean="geometric, arrays", power=0.5, floor=0.5, cap=2.0
    ),
    "root, geometric over arrays, between 1/4 and 4": candidate(
        mean="geometric, arrays", power=0.5, floor=0.25, cap=4.0
    ),
    "root, geometric over arrays, mean field": candidate(
        "mean field", mean="geometric, arrays", power=0.5
    ),
    "harmonic, between 1 and 2": candidate(floor=1.0, cap=2.0),
    "geometric over arrays, between 1 and 2": candidate(
        mean="geometric, arrays", floor=1.0, cap=2.0
    ),
    "harmonic, softly between 1/2 and 2": candidate(soft=2.0),
    "geometric over arrays, softly between 1/2 and 2": candidate(
        mean="geometric, arrays", soft=2.0
    ),
    "geometric over arrays, softly between 1/4 and 4": candidate(
        mean="geometric, arrays", soft=4.0
    ),
    "over outputs, harmonic": candidate(out=1.0),
    "over outputs, geometric over arrays": candidate(mean="geometric, arrays", out=1.0),
    "over outputs, harmonic, between 1/2 and 2": candidate(out=1.0, floor=0.5, cap=2.0),
    "over outputs, geometric over arrays, between 1/2 and 2": candidate(
        mean="geometric, arrays", out=1.0, floor=0.5, cap=2.0
    ),
    "over outputs, harmonic, between 1/4 and 4": candidate(
        out=1.0, floor=0.25, cap=4.0
    ),
    "over outputs, root, harmonic": candidate(power=0.5, out=0.5),
    "over outputs, root, geometric over arrays": candidate(
        mean="geometric, arrays", power=0.5, out=0.5
    ),
    "over outputs, root, harmonic, between 1/2 and 2": candidate(
        power=0.5, out=0.5, floor=0.5, cap=2.0
    ),
    "over root of outputs, harmonic, between 1/2 and 2": candidate(
        out=0.5, floor=0.5, cap=2.0
    ),
    "over root of outputs, geometric over arrays": candidate(
        mean="geometric, arrays", out=0.5
    ),
    "over root of outputs, geometric over arrays, between 1/2 and 2": candidate(
        mean="geometric, arrays", out=0.5, floor=0.5, cap=2.0
    ),
    "geometric over arrays, between 2/3 and 3/2": candidate(
        mean="geometric, arrays", floor=2 / 3, cap=1.5
    ),
    "harmonic, frozen": candidate("frozen"),
    "root, harmonic, frozen": candidate("frozen", power=0.5),
    "harmonic, mean field": candidate("mean field"),
    "root, harmonic, mean field": candidate("mean field", power=0.5),
    "harmonic, measured": candidate("measured"),
    "root, harmonic, measured": candidate("measured", power=0.5),
}
# What the slow networks are trained by, unless asked for more.
FINALISTS = (
    "root, geometric over arrays, between 1/2 and 2",
    "root, geometric over arrays",
    "geometric over arrays, between 1/2 and 2",
    "harmonic, between 1/2 and 2",
    "harmonic",
    "the papers' scales",
)
_SLOW = ("lenet", "mnist cnn", "resnet18", "lstm", "transformer")
_RELATIVE = (-2, -1, 0, 1, 2)  # powers of 2 around SGD's best rate
_AT_ONCE = 15  # runs of one call
_DIVERGED = 9.0  # the ratio that a divergence counts as in a mean


def train_all(
    trainer: Trainer,
    runs: Sequence[tuple[Candidate, float]],
    seeds: Sequence[int],
    bar: tqdm,
) -> tuple[np.ndarray, np.ndarray]:
    """Final losses, infinite where a run diverged, and multiples of SGD's rate.

    Shapes are (runs, seeds) and (runs, 2, arrays), at the beginning and the end, of the
    first seed.
    """
    losses = np.full((len(runs), len(seeds)), np.inf)
    factors = np.ones((len(runs), 2, len(trainer.sizes)))
    for first in range(0, len(runs), _AT_ONCE):
        some = list(runs[first : first + _AT_ONCE])
        padded = some + [(SGD, 1e-6)] * (_AT_ONCE - len(some))
        rules, rates = zip(*padded, strict=True)
        stacked_rules = jax.tree.map(lambda *leaves: np.asarray(leaves), *rules)
        for column, seed in enumerate(seeds):
            history, found = trainer(stacked_rules, np.asarray(rates), seed)
            last = max(round(0.2 * trainer.steps / _CHUNK), 1) + 1
            final = history[: len(some), -last:].mean(1)
            start = history[: len(some), 0]
            # Where training ends above where it began, it has diverged too.
            final = np.where(np.isfinite(final) & (final <= start), final, np.inf)
            losses[first : first + len(some), column] = final
            if column == 0:
                factors[first : first + len(some)] = found[: len(some)][:, [0, -1]]
            bar.update(len(some))
    return losses, factors


def _listed(losses: np.ndarray) -> list[list[float | None]]:
    """For JSON, which knows no infinity: None where a run diverged."""
    return [[x if np.isfinite(x) else None for x in row] for row in losses.tolist()]


def _array(losses: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.inf if x is None else x for x in row] for row in losses])


def sgd_record(
    name: str, trainer: Trainer, seeds: Sequence[int], bar: tqdm
) -> dict[str, Any]:
    """SGD on its grid of rates."""
    low, high = trainer.network.powers
    rates = [2.0**power for power in range(low, high + 1)]
    losses, _ = train_all(trainer, [(SGD, rate) for rate in rates], seeds, bar)
    return {
        "network": name,
        "candidate": "sgd",
        "steps": trainer.steps,
        "seeds": [*seeds],
        "rates": rates,
        "losses": _listed(losses),
        "best": rates[int(losses.mean(1).argmin())],
        "arrays": dict(zip(trainer.paths, trainer.sizes.tolist(), strict=True)),
    }


def candidate_records(
    name: str,
    trainer: Trainer,
    names: Sequence[str],
    best: float,
    seeds: Sequence[int],
    bar: tqdm,
) -> list[dict[str, Any]]:
    """Candidates at SGD's best rate and around it."""
    rates = [best * 2.0**power for power in _RELATIVE]
    runs = [(CANDIDATES[rule], rate) for rule in names for rate in rates]
    losses, factors = train_all(trainer, runs, seeds, bar)
    records = []
    for index, rule in enumerate(names):
        mine = slice(index * len(rates), (index + 1) * len(rates))
        at = index * len(rates) + _RELATIVE.index(0)
        records.append(
            {
                "network": name,
                "candidate": rule,
                "steps": trainer.steps,
                "seeds": [*seeds],
                "rates": rates,
                "losses": _listed(losses[mine]),
                "multiples": [[float(f"{f:.3g}") for f in row] for row in factors[at]],
            }
        )
    return records


class Verdict(NamedTuple):
    """How a candidate did on one network."""

    diverged: int  # seeds, at SGD's best rate
    ratio: float  # of its loss to SGD's, at SGD's best rate
    best: float  # its best rate over SGD's
    best_ratio: float  # of its loss at its best rate to SGD's


def verdict(sgd: Mapping[str, Any], record: Mapping[str, Any]) -> Verdict:
    """Compares a candidate with SGD on the same network."""
    reference = _array(sgd["losses"]).mean(1).min()
    losses = _array(record["losses"])
    means = losses.mean(1)
    at = _RELATIVE.index(0)
    found = int(means.argmin())
    return Verdict(
        int(np.isinf(losses[at]).sum()),
        float(means[at] / reference),
        2.0 ** _RELATIVE[found],
        float(means[found] / reference),
    )


def verdicts(
    records: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, dict[str, Verdict]]]:
    """SGD's least loss by network, and the verdicts by candidate and network."""
    sgd = {r["network"]: r for r in records if r["candidate"] == "sgd"}
    found: dict[str, dict[str, Verdict]] = {}
    for record in records:
        if record["candidate"] != "sgd":
            of_network = verdict(sgd[record["network"]], record)
            found.setdefault(record["candidate"], {})[record["network"]] = of_network
    least = {name: float(_array(r["losses"]).mean(1).min()) for name, r in sgd.items()}
    return least, found


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each candidate, counted over the networks it was trained on."""
    _, found = verdicts(records)
    header = ["candidate", "networks", "diverged", "within 2 % or below"]
    header += ["best rate within 2x", "largest ratio", "mean ratio", "at its best rate"]
    table = []

    def mean(ratios: Sequence[float]) -> float:
        return float(np.exp(np.log(np.minimum(ratios, _DIVERGED)).mean()))

    def rank(row: tuple[str, list[Verdict]]) -> tuple[int, int, float]:
        ratios = [v.ratio for v in row[1]]
        return -len(ratios), sum(v.diverged > 0 for v in row[1]), mean(ratios)

    rows = [(name, [*by_network.values()]) for name, by_network in found.items()]
    for name, all_of in sorted(rows, key=rank):
        ratios = [v.ratio for v in all_of]
        cells = [
            name,
            len(all_of),
            sum(v.diverged > 0 for v in all_of),
            sum(ratio <= 1.02 for ratio in ratios),
            sum(0.5 <= v.best <= 2 for v in all_of),
            f"{max(ratios):.3f}",
            f"{mean(ratios):.3f}",
            f"{mean([v.best_ratio for v in all_of]):.3f}",
        ]
        table.append(cells)
    return "\n".join(markdown.table(header, table))


def details(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A row for each network: loss over SGD's at SGD's rate, and best rate over it."""
    least, found = verdicts(records)
    sgd = {r["network"]: r for r in records if r["candidate"] == "sgd"}
    names = [name for name in names if name in found]
    rows = []
    for network, loss in least.items():
        cells = [network, f"{sgd[network]['best']:.3g}", f"{loss:.4g}"]
        for name in names:
            v = found[name].get(network)
            cells.append("" if v is None else f"{v.ratio:.3f} ({v.best:g})")
        rows.append(cells)
    header = ["network", "SGD's best rate", "its loss", *names]
    return "\n".join(markdown.table(header, rows))


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """The results as a page."""
    steps, seeds = records[0]["steps"], len(records[0]["seeds"])
    missing = sorted({*NETWORKS} - {record["network"] for record in records})
    return f"""# Which normalisation keeps SGD's learning rate?

    python -m examples.studies.zoo

{steps} steps of {_BATCH} examples by SGD (Nesterov, momentum 0.9, no decay, a constant
rate), {seeds} seeds. SGD's best rate is the one of a grid of powers of 2 with the least
training loss on {_EVALUATED} examples, the mean over the last fifth of the steps and
the seeds. A candidate is trained at that very rate and at a quarter, half, twice and
four times of it. A run that ends above where it began, or at no number, has diverged.

A candidate turns the scales into multiples of SGD's rate, one for each array:
`python -m examples.studies.zoo` documents them. "Root" is the square root of the
scales, "harmonic" and "geometric" the mean they are divided by ("harmonic" over
entries, so that the predicted trace of the Gauss-Newton matrix is SGD's), "cap" and
"between" the limits of the multiples. Where not said, the scales are live.

The ratio of one seed's loss to SGD's scatters by about 4 %, so that the mean over
{seeds} seeds does by 2 to 3 %: a network just inside or outside of 2 % says little.

## All candidates

"Ratio" is the loss over SGD's, both at SGD's best rate; "at its best rate" is the
candidate's least loss over SGD's least, as a mean. Means are geometric, and a
divergence counts as a ratio of {_DIVERGED:g}.

{summary(records)}

## Network by network

The ratio at SGD's best rate and, in brackets, the candidate's best rate over SGD's.
What is empty has not been run{f"; nor have: {'; '.join(missing)}" if missing else ""}.

{details(records, FINALISTS)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not in the results yet, and writes and prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.zoo",
        description="Which normalisation of the scales keeps SGD's learning rate, on "
        "small networks of many kinds. What is in the results is not run again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], metavar="NAME"
    )
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        metavar="NAME",
        help="all by default, or the finalists for the slow networks",
    )
    parser.add_argument("--steps", type=whole(1), default=200, help="a multiple of 20")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rates",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="powers of 2 of SGD's grid; each network has its own by default",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / "zoo.jsonl",
        help="a line for each network and candidate; the page goes beside it, as .md",
    )
    options = parser.parse_args(arguments)
    if options.steps % _CHUNK:
        parser.error(f"--steps must be a multiple of {_CHUNK}")
    if options.rates is not None and options.rates[0] > options.rates[1]:
        parser.error("--rates: LOW must not be above HIGH")
    with results_file.alone_with(options.results):
        records = results_file.read(options.results)
        for record in records:
            if (record["steps"], record["seeds"]) != (options.steps, options.seeds):
                parser.error(
                    f"{options.results} holds runs of {record['steps']} steps and "
                    f"seeds {record['seeds']}; give another --results"
                )
        run(options, records)
    page = report(records)
    options.results.with_suffix(".md").write_text(page)
    print(page)


def run(options: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Trains what is not in the records yet, and adds it to them and to their file."""
    with tqdm(unit="run", smoothing=0, mininterval=1) as bar:
        for name in options.networks:
            done = {r["candidate"]: r for r in records if r["network"] == name}
            wanted = FINALISTS if name.startswith(_SLOW) else [*CANDIDATES]
            left = [n for n in options.candidates or wanted if n not in done]
            if "sgd" in done and not left:
                continue
            bar.set_description(name)
            network = NETWORKS[name]()
            if options.rates is not None:
                network = dataclasses.replace(network, powers=tuple(options.rates))
            trainer = Trainer(network, options.steps)
            if "sgd" not in done:
                done["sgd"] = sgd_record(name, trainer, options.seeds, bar)
                records.append(done["sgd"])
                results_file.append([done["sgd"]], options.results)
            at_once = _AT_ONCE // len(_RELATIVE)
            for first in range(0, len(left), at_once):
                some = left[first : first + at_once]
                best = done["sgd"]["best"]
                new = candidate_records(name, trainer, some, best, options.seeds, bar)
                records += new
                results_file.append(new, options.results)
            jax.clear_caches()


if __name__ == "__main__":
    main()
