"""A small GPT under many optimizers: back-matched scales before SGD and after others.

Each method gets the same number of learning rates, half an octave apart, with one
seed. Where the best of them is at an end of its grid, the grid is extended. Three other
seeds of the best rate then meet; where one of them diverges, three of the next best.
Scales of the layers by their role, from the closed form and measured, are a picture of
their own.

    python -m examples.studies.language_model
    python -m examples.studies.language_model --report

Every run is added to the results file. What is there is not run again: after a kill,
the same command goes on where it stopped. `--report` only writes tables and pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.measured import module_of
from backmatch_optax.parameters import text as path_text
from examples import language_model as lm
from examples.arguments import whole
from examples.methods import direction
from examples.studies import markdown, results_file
from examples.studies.intervals import Difference, forest, welch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results" / "language_model"
SIZE = lm.Size(layers=4, width=64, heads=4, context=64)
# The models whose scales are compared. Flax's own embeddings are of the third's size,
# and GPT-2's vocabulary is of the fourth's.
PICTURED = {
    "at initialisation": SIZE,
    "after 300 steps of AdamW": SIZE,
    "small embeddings": dataclasses.replace(SIZE, embedding=SIZE.width**-0.5),
    "50,257 tokens": dataclasses.replace(SIZE, tokens=50257),
}
TUNING_SEED, SEEDS = 100, (0, 1, 2)
RATES, MOST_RATES = 5, 10  # of a method's grid, before and after it is extended

# Learning rates of "Blockwise Learning Rate" (arXiv 2502.19002), as multiples of the
# base rate. Its program leaves learned positions and the head at the base rate.
BLOCKWISE = {
    "embedding": 10.0,
    "query": 8.0,
    "key": 8.0,
    "up": 6.0,
    "gate": 6.0,
    "down": 6.0,
    "value": 4.0,
    "output": 4.0,
}

# By method, the power of 2 in the middle of its grid.
MIDDLES = {
    "sgd": -1.5,
    "backmatch, first scales": -2.0,
    "measured, first scales": -2.5,
    "adamw": -7.0,
    "muon": -6.0,
    "muon, scales^1/4": -6.0,
    "muon, scales^1/2": -6.0,
    "adamw, scales^1/4": -7.0,
    "adamw, scales^1/2": -7.0,
    "adamw, blockwise": -9.5,
    "backmatch": -2.0,
    "backmatch, no limit, mean field": -2.0,
    "measured": -2.5,
    "backmatch, mean field": -2.0,
    "backmatch, no limit": -2.0,
    "lion": -9.0,
    "adamw, steps": -5.0,
    "lion, steps": -6.0,
    "muon, steps": -5.0,
    "muon, group by steps": -5.5,
    "muon, group x2": -5.5,
    "muon, group x4": -5.5,
    "muon, group x8": -5.5,
}
_EXPONENTS = {"scales^1/4": 0.25, "scales^1/2": 0.5}
_GROUPS = {"group x2": 2.0, "group x4": 4.0, "group x8": 8.0}

Record = dict[str, Any]


def role(path: str) -> str:
    """What the layer of a path does in the model.

    >>> role("blocks/3/attention/query"), role("blocks/0/norm2"), role("norm")
    ('query', 'norm', 'last norm')
    """
    known = {"embed": "embedding", "norm": "last norm", "out": "output"}
    last = path.rpartition("/")[2]
    return known.get(last, last.rstrip("12"))


def times(
    factors_of: Callable[[optax.Params], optax.Params],
) -> optax.GradientTransformationExtraArgs:
    """Multiplies every update by a factor of its array, computed in `init`."""

    def init_fn(params):
        return factors_of(params)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree.map(jnp.multiply, updates, state), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def by_layer(factors: Mapping[str, Any], params: optax.Params) -> optax.Params:
    """Factors of layers for each array, divided by their mean over all entries."""
    found = jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.float32(factors[module_of(path_text(path))]), params
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    mean = jnp.average(jnp.stack(jax.tree.leaves(found)), weights=jnp.array(sizes))
    return jax.tree.map(lambda factor: factor / mean, found)


def by_steps(chain: spec.LayerChain, params: optax.Params) -> optax.Params:
    """What Muon's Adam group is to be multiplied by, so that all steps count the same.

    Each of its arrays then changes the output by as much as Muon's kernels do in
    geometric mean, whose entries are a fifth of Adam's.
    """
    tx = bmo.scale_steps_by_backmatch(chain)
    ones = jax.tree.map(jnp.ones_like, params)
    steps, _ = tx.update(ones, tx.init(params), params)
    steps = jax.tree.map(jnp.mean, steps)
    kernels = are_kernels(params)
    pairs = zip(jax.tree.leaves(steps), jax.tree.leaves(kernels), strict=True)
    logs = jnp.stack([jnp.log(step) for step, kernel in pairs if kernel])
    mean = jnp.exp(logs.mean())
    return jax.tree.map(
        lambda step, kernel: jnp.ones(()) if kernel else 0.2 * step / mean,
        steps,
        kernels,
    )


def are_kernels(params: optax.Params) -> optax.Params:
    """Whether an array is one of Muon's; the others are in its Adam group."""
    return jax.tree.map(
        lambda numbers: numbers is not None,
        lm.matrices(params),
        is_leaf=lambda x: isinstance(x, MuonDimensionNumbers | None),
    )


def optimizer(
    method: str, rate: optax.ScalarOrSchedule, chain: spec.LayerChain
) -> optax.GradientTransformationExtraArgs:
    """One of the example's optimizers, or one with factors after it.

    For "scales^p" the factor of a layer is `(1 / (m m_W))^p`, with mean-field gains, at
    the initial weights. "steps" is `scale_steps_by_backmatch`. "group" is of the arrays
    that Muon leaves to Adam. Nothing decays, so nothing but the step is multiplied.
    """
    base, _, after = method.partition(", ")

    def factors(params: optax.Params) -> optax.Params:
        if after in _EXPONENTS:
            scales = bmo.layer_scales(chain, params, gains="mean_field", limit=None)
            powers = {path: s ** _EXPONENTS[after] for path, s in scales.items()}
            return by_layer(powers, params)
        if after == "blockwise":
            return by_layer(
                {path: BLOCKWISE.get(role(path), 1.0) for path in chain.paths}, params
            )
        if after == "group by steps":
            return by_steps(chain, params)
        return jax.tree.map(
            lambda kernel: jnp.float32(1.0 if kernel else _GROUPS[after]),
            are_kernels(params),
        )

    if after == "steps":
        return optax.chain(
            direction(base, lm.matrices),
            bmo.scale_steps_by_backmatch(chain),
            optax.scale_by_learning_rate(rate),
        )
    if after in (*_EXPONENTS, *_GROUPS, "blockwise", "group by steps"):
        return optax.chain(lm.optimizer(base, rate, chain), times(factors))
    return lm.optimizer(method, rate, chain)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How every run is trained."""

    steps: int = 300
    batch_size: int = 12
    every: int = 20


class Study:
    """Trains what is missing from the results file.

    Args:
      text: what to train on.
      protocol: how.
      results: a line for each run.
      size: of the model.
    """

    def __init__(
        self, text: lm.Text, protocol: Protocol, results: Path, size: lm.Size = SIZE
    ):
        self._text, self._protocol = text, protocol
        self._results, self._size = results, size
        self._trainer = functools.cache(self._new_trainer)
        # Resuming with another text would mix what cannot be compared.
        self.identity = {
            "protocol": dataclasses.asdict(protocol),
            "size": dataclasses.asdict(size),
            "sha256": text.source["sha256"],
        }
        for record in results_file.read(results):
            if any(record[name] != value for name, value in self.identity.items()):
                raise SystemExit(
                    f"{results} holds runs of another protocol, model or Python, which "
                    "cannot be compared. Give another --results."
                )

    def __call__(self, methods: Sequence[str]) -> None:
        """Tunes each method and trains the best rate with every seed.

        Where one of them diverges, the next best rate is taken.
        """
        with tqdm(methods, unit="method") as bar:
            for method in bar:
                bar.set_description(method)
                for rate in self.tuned(method):
                    losses = [self.loss(method, rate, seed) for seed in SEEDS]
                    if np.isfinite(losses).all():
                        break
                self._trainer.cache_clear()

    def tuned(self, method: str) -> list[float]:
        """The rates, best first, of a grid that goes on where its best is at an end."""
        first = MIDDLES[method] - (RATES - 1) / 4
        powers = [first + index / 2 for index in range(RATES)]

        def loss(power: float) -> float:
            return self.loss(method, 2.0**power, TUNING_SEED)

        losses = {power: loss(power) for power in powers}
        while len(losses) < MOST_RATES:
            best = min(losses, key=lambda power: losses[power])
            if best == min(losses):
                power = best - 0.5
            elif best == max(losses):
                power = best + 0.5
            else:
                break
            losses[power] = loss(power)
        return [2.0**power for power in sorted(losses, key=lambda power: losses[power])]

    def loss(self, method: str, rate: float, seed: int) -> float:
        """The last validation loss of a run; infinite where it diverged."""
        run = {"method": method, "rate": rate, "seed": seed}
        for record in results_file.read(self._results):
            if all(record[name] == value for name, value in run.items()):
                break
        else:
            record = self._train(**run)
            results_file.append([record], self._results)
        return float("inf") if record["diverged"] else record["validation"][-1]

    def _new_trainer(self, method: str) -> lm.Trainer:
        numbers = dataclasses.asdict(self._protocol)
        return lm.Trainer(
            self._size, method, self._text, make_optimizer=optimizer, **numbers
        )

    def _train(self, method: str, rate: float, seed: int) -> Record:
        trainer = self._trainer(method)
        start = time.process_time()
        _, history = trainer.run(rate, seed)
        steps = history.train.reshape(-1, self._protocol.every)
        packages = ("jax", "flax", "optax", "backmatch-optax")
        return {
            "method": method,
            "rate": rate,
            "seed": seed,
            **self.identity,
            "diverged": history.diverged,
            "validation": results_file.rounded(history.validation),
            "train": results_file.rounded(steps.mean(1)),  # means between validations
            "cpu_seconds": round(time.process_time() - start, 1),
            "text": self._text.source,
            "versions": {name: metadata.version(name) for name in packages}
            | {"python": platform.python_version()},
            "device": jax.devices()[0].device_kind,
            "cores": len(os.sched_getaffinity(0)),
        }


def scales_by_layer(
    size: lm.Size, text: lm.Text, steps: int = 0
) -> dict[str, dict[str, Any]]:
    """The scales of every layer, with those measured on a text.

    None is normalised: the head's scale is about one over the number of positions.

    Args:
      size: of the model.
      text: to train and to measure on.
      steps: how many the model is trained by AdamW.
    """
    chain = lm.declared(size)
    if steps:
        batch = Protocol.batch_size
        trainer = lm.Trainer(
            size, "adamw", text, steps=steps, batch_size=batch, every=steps
        )
        state, _ = trainer.run(2.0 ** MIDDLES["adamw"], 0)
        params = state["params"]
    else:
        model = jax.jit(lambda: nnx.state(lm.GPT(size, rngs=nnx.Rngs(0)), nnx.Param))
        params = model()
    declared = {
        gains: bmo.layer_scales(
            chain, params, gains=gains, norm_floor=0, normalize=False
        )
        for gains in ("mean_field", "paper")
    }
    found = {
        path: {"role": role(path)}
        | {gains: float(scales[path]) for gains, scales in declared.items()}
        for path in chain.paths
    }
    graph = nnx.graphdef(nnx.eval_shape(lambda: lm.GPT(size, rngs=nnx.Rngs(0))))
    sequences = max(6400 // size.tokens, 4)  # logits are the most of the memory
    measured = bmo.measure_layer_scales(
        lambda params, tokens: nnx.merge(graph, params)(tokens),
        params,
        lm.windows(text.train, size.context, sequences)[:, :-1],
        key=jax.random.key(0),
        num_probes=16,
        layer_of=main_layer,
    )
    for path, layer in found.items():
        layer["measured"] = float(measured.layer_scales[path])
        layer["standard_error"] = float(measured.standard_errors[path])
    return found


def main_layer(path: str) -> str:
    """The layer of a parameter, a bias apart from the rest of its layer."""
    return path if path.endswith("/bias") else module_of(path)


def by_role(scales: Mapping[str, Record], kind: str) -> dict[str, float]:
    """Geometric means over the layers of each role, the largest first."""
    found: dict[str, list[float]] = {}
    for layer in scales.values():
        found.setdefault(layer["role"], []).append(layer[kind])
    means = {name: float(np.exp(np.log(each).mean())) for name, each in found.items()}
    return dict(sorted(means.items(), key=lambda pair: -pair[1]))


def plot_scales(scales: Mapping[str, Mapping[str, Record]], path: Path) -> None:
    """Scales by role, those of the closed form beside those that were measured."""
    columns = -(-len(scales) // 2)
    figure, panels = plt.subplots(
        2,
        columns,
        figsize=(5 * columns, 8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    roles = list(by_role(next(iter(scales.values())), "mean_field"))
    looks = {
        "mean_field": ("o", "C0", -0.15, "closed form"),
        "measured": ("s", "C1", 0.15, "measured at the same weights"),
    }
    for axes, (title, layers) in zip(panels.flat, scales.items(), strict=False):
        for kind, (marker, color, shift, label) in looks.items():
            means = by_role(layers, kind)
            for layer in layers.values():
                place = roles.index(layer["role"]) + shift
                value = layer[kind] / means["norm"]
                axes.plot(value, place, ".", color=color, alpha=0.4)
            places = [roles.index(name) + shift for name in means]
            values = [mean / means["norm"] for mean in means.values()]
            axes.plot(values, places, marker, color=color, ls="", label=label)
        theirs = [name for name in roles if name in BLOCKWISE] + ["norm"]
        axes.plot(
            [BLOCKWISE.get(name, 1.0) for name in theirs],
            [roles.index(name) for name in theirs],
            "D",
            color="0.4",
            mfc="none",
            label="rates of Blockwise Learning Rate",
        )
        axes.set(xscale="log", title=title)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(scales) :]:
        axes.set_axis_off()
    panels[0, 0].set_yticks(range(len(roles)), roles)
    panels[0, 0].set_ylim(len(roles) - 0.5, -0.5)
    figure.supxlabel("scale over that of the norms inside the blocks", size=10)
    lines, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, ncols=3, frameon=False, loc="outside upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of a method."""

    tuning: dict[float, float]  # last loss by rate; infinite where it diverged
    rate: float  # the best of those at which no seed diverged
    given_up: list[float]  # better ones
    curves: np.ndarray  # validation losses of its seeds; shape=(seeds, evaluations)
    runs: int
    diverged: int  # of the runs

    @property
    def last(self) -> np.ndarray:
        """The last losses; infinite where they are no numbers."""
        return np.nan_to_num(self.curves[:, -1], nan=np.inf)


def summaries(runs: Sequence[Record]) -> dict[str, Summary]:
    """By method, those with a best rate that has a seed, the least loss first."""
    found = {}
    for method in dict.fromkeys(record["method"] for record in runs):
        own = [record for record in runs if record["method"] == method]
        tuning = {
            r["rate"]: float("inf") if r["diverged"] else r["validation"][-1]
            for r in sorted(own, key=lambda record: record["rate"])
            if r["seed"] == TUNING_SEED
        }
        diverged = sum(r["diverged"] for r in own)
        given_up: list[float] = []
        for rate in sorted(tuning, key=lambda rate: tuning[rate]):
            seeds = [r for r in own if r["seed"] in SEEDS and r["rate"] == rate]
            if not seeds:
                break
            curves = np.array([r["validation"] for r in seeds], float)
            found[method] = Summary(
                tuning, rate, [*given_up], curves, len(own), diverged
            )
            if not any(r["diverged"] for r in seeds):
                break
            given_up.append(rate)
    return dict(sorted(found.items(), key=lambda pair: pair[1].last.mean()))


def steps_to(curve: np.ndarray, loss: float, every: int) -> float:
    """When a curve first reaches a loss, on lines between validations; else NaN.

    >>> steps_to(np.array([4.0, 2.0, 1.0]), 1.5, 20)
    30.0
    """
    below = np.flatnonzero(curve <= loss)
    if not below.size:
        return float("nan")
    at = int(below[0])
    if at == 0:
        return 0.0
    before, after = curve[at - 1], curve[at]
    return float(every * (at - 1 + (before - loss) / (before - after)))


def between(difference: Difference) -> str:
    """A difference with its interval, and what may be said of it."""
    if not np.isfinite(difference.mean):
        return ""
    if np.isnan(difference.low):
        return f"{difference.mean:+.3f} (one seed)"
    interval = (
        f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    )
    return interval if difference.shown else f"{interval}, {difference.words(3)}"


def report(runs: Sequence[Record], scales: Mapping[str, Mapping[str, Record]]) -> str:
    """The results as a page."""
    found = summaries(runs)
    first = runs[0]
    protocol, size, source = first["protocol"], first["size"], first["text"]
    total = sum(record["cpu_seconds"] for record in runs) / 60
    lines = [
        "# A small GPT on the standard library",
        "",
        "    python -m examples.studies.language_model",
        "",
        f"{size['layers']} layers, width {size['width']}, {size['heads']} heads, "
        f"context {size['context']}, {protocol['steps']} steps of "
        f"{protocol['batch_size']} sequences. Python {source['python']}'s "
        f"{source['files']} modules, "
        f"{source['train_tokens']:,} characters to train on and "
        f"{source['validation_tokens']:,} of other files for validation (sha256 "
        f"{source['sha256'][:16]}). The rate rises over a twentieth of the steps, then "
        "falls linearly to zero. Nothing decays.",
        "",
        f"Each method had {RATES} rates, half an octave apart, with one seed. Where "
        "the best was at an end, the grid was extended. Other seeds at the best rate "
        "give the validation loss after the last step, in nats per character. Where "
        "one of them diverged, the next best rate was taken, with the same seeds. "
        "Differences have unpaired 95 % intervals (Welch).",
        "",
    ]
    rows = []
    for method, summary in found.items():
        last = summary.last
        cells = [method, f"{summary.rate:.3g}", str(len(last))]
        if np.isfinite(last).all():
            spread = f" ± {last.std(ddof=1):.3f}" if len(last) > 1 else ""
            cells.append(f"{last.mean():.3f}{spread}")
        else:
            cells.append(f"{np.isinf(last).sum()} diverged")
        if summary.given_up:
            tried = ", ".join(f"{rate:.3g}" for rate in summary.given_up)
            cells[1] += f" (a seed diverged at {tried})"
        for other in ("sgd", "adamw", "muon"):
            known = other in found and other != method
            cells.append(between(welch(last, found[other].last)) if known else "")
        rows.append(cells)
    header = ["method", "rate", "seeds", "loss"]
    header += ["less SGD's", "less AdamW's", "less Muon's"]
    lines += markdown.table(header, rows)
    if "muon" in found:
        loss = float(found["muon"].last.mean())
        lines += [
            "",
            "## Steps to plain Muon's final loss",
            "",
            f"Muon ends at {loss:.3f} after {protocol['steps']} steps. The mean curve "
            "of each method reaches that after",
            "",
        ]
        rows = []
        for method, summary in found.items():
            steps = steps_to(summary.curves.mean(0), loss, protocol["every"])
            share = steps / protocol["steps"]
            reached = [f"{steps:.0f}", f"{share:.2f}"]
            rows.append([method, *(reached if steps == steps else ["not reached", ""])])
        lines += markdown.table(["method", "steps", "of Muon's"], rows)
    lines += [
        "",
        "## Tuning",
        "",
        f"Validation loss after the last step with seed {TUNING_SEED}. The last two "
        "columns count every run of the method, whatever its seed.",
        "",
    ]
    rows = []
    for method, summary in found.items():
        tried = ", ".join(
            f"{rate:.3g}: {'diverged' if loss == float('inf') else f'{loss:.3f}'}"
            for rate, loss in summary.tuning.items()
        )
        rows.append([method, tried, str(summary.runs), str(summary.diverged)])
    lines += markdown.table(["method", "loss by rate", "runs", "diverged"], rows)
    lines += ["", "## Scales at initialisation", "", *scale_tables(scales)]
    lines += [
        "",
        f"{len(runs)} runs, {total:.0f} CPU-minutes on {first['cores']} core, "
        f"{', '.join(f'{k} {v}' for k, v in first['versions'].items())}. Every run is "
        "in [runs.jsonl](runs.jsonl).",
    ]
    return "\n".join(lines) + "\n"


def scale_tables(scales: Mapping[str, Mapping[str, Record]]) -> list[str]:
    """Scales by role, a table for each model."""
    lines = [
        "By role, geometric means over the layers, divided by that of the norms inside "
        'the blocks. "Blockwise" are the rates of Blockwise Learning Rate (arXiv '
        "2502.19002), over the rate of its norms.",
    ]
    for title, layers in scales.items():
        kinds = {
            kind: by_role(layers, kind) for kind in ("mean_field", "paper", "measured")
        }
        names = {"mean_field": "mean-field gains", "paper": "papers' gains"}
        lines += [
            "",
            f"### {title[0].upper()}{title[1:]}",
            "",
        ]
        rows = []
        for name in kinds["mean_field"]:
            cells = [f"{means[name] / means['norm']:.2g}" for means in kinds.values()]
            theirs = BLOCKWISE.get(name, 1.0 if "norm" in name else None)
            rows.append([name, *cells, theirs or ""])
        header = ["role", *(names.get(kind, kind) for kind in kinds), "Blockwise"]
        lines += markdown.table(header, rows)
        ratios = {p: v["mean_field"] / v["measured"] for p, v in layers.items()}
        low, high = (f(ratios, key=lambda p: ratios[p]) for f in (min, max))
        lines += [
            "",
            "Declared over measured, layer by layer, with mean-field gains: "
            f"{ratios[low]:.2f} ({low}) to {ratios[high]:.2f} ({high}).",
        ]
        for kind in kinds:
            order = " < ".join(pooled(layers, kind))
            lines += ["", f"From least sharp, {names.get(kind, kind)}: {order}."]
    return lines


def pooled(layers: Mapping[str, Record], kind: str) -> dict[str, float]:
    """Mean curvatures of the blocks of the Blockwise paper, the least first.

    The paper has Emb << QK < FFN < VO << Norm. It pools queries with keys, values with
    outputs, and all kernels of an MLP.
    """
    blocks = {
        "Emb": ("embedding",),
        "QK": ("query", "key"),
        "VO": ("value", "output"),
        "FFN": ("up", "gate", "down"),
        "Norm": ("norm", "last norm"),
    }
    means = {
        block: float(
            np.mean([1 / v[kind] for v in layers.values() if v["role"] in roles])
        )
        for block, roles in blocks.items()
    }
    return dict(sorted(means.items(), key=lambda pair: pair[1]))


def plot_curves(found: Mapping[str, Summary], every: int, path: Path) -> None:
    """Validation losses over steps, and the differences of the last from SGD's."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.5, 9), layout="constrained")
    shown = [
        "sgd",
        "backmatch, first scales",
        "measured, first scales",
        "adamw",
        "adamw, scales^1/4",
        "adamw, blockwise",
        "muon",
        "muon, scales^1/4",
        "muon, group x4",
    ]
    for index, method in enumerate(name for name in shown if name in found):
        curves = found[method].curves
        steps = every * np.arange(curves.shape[1])
        upper.plot(steps[1:], curves.mean(0)[1:], color=f"C{index}", label=method)
        upper.fill_between(
            steps[1:],
            curves.min(0)[1:],
            curves.max(0)[1:],
            color=f"C{index}",
            alpha=0.2,
        )
    upper.set(xlabel="step", ylabel="validation loss, nats per character")
    lowest = min(summary.curves[:, -1].min() for summary in found.values())
    upper.set_ylim(lowest - 0.05, lowest + 1.2)
    upper.legend(frameon=False)
    if "sgd" in found and np.isfinite(found["sgd"].last).all():
        rows: list[tuple[str, Difference | None]] = [
            (method, welch(summary.last, found["sgd"].last))
            for method, summary in found.items()
            if method != "sgd" and np.isfinite(summary.last).all()
        ]
        forest(lower, rows, "last validation loss less SGD's, with 95 % interval")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_scales(path: Path, text: lm.Text) -> None:
    """Adds the scales of the models that are pictured and not in the file yet."""
    found = json.loads(path.read_text()) if path.exists() else {}
    for title, size in PICTURED.items():
        if title not in found:
            steps = Protocol.steps if title.startswith("after") else 0
            found[title] = scales_by_layer(size, text, steps)
            path.write_text(json.dumps(found, indent=1) + "\n")


def write_report(directory: Path) -> None:
    """README.md and both pictures, from what is in the directory."""
    runs = results_file.read(directory / "runs.jsonl")
    scales = json.loads((directory / "scales.json").read_text())
    plot_scales(scales, directory.parent / "language_model_scales.png")
    found = summaries(runs)
    if found:
        every = runs[0]["protocol"]["every"]
        plot_curves(found, every, directory.parent / "language_model_losses.png")
    page = directory / "README.md"
    page.write_text(report(runs, scales))
    print(f"The report is {page}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not in the results yet, and writes the report."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.language_model",
        description="A small GPT under many optimizers. What is in the results is not "
        "run again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", choices=MIDDLES, default=[*MIDDLES], metavar="METHOD")
    add("--steps", type=whole(1), default=Protocol.steps, help="of a run")
    add("--batch-size", type=whole(1), default=Protocol.batch_size, help="sequences")
    add("--every", type=whole(1), default=Protocol.every, help="steps to a validation")
    add("--results", type=Path, default=RESULTS, help="a directory; pictures go above")
    add("--report", action="store_true", help="no training")
    lm.add_size(parser, SIZE)
    options = parser.parse_args(arguments)
    size = lm.size_of(options, parser)
    if options.steps % options.every:
        parser.error(f"--every {options.every} must divide --steps {options.steps}")
    if not options.report:
        text = lm.read_text()
        protocol = Protocol(options.steps, options.batch_size, options.every)
        with results_file.alone_with(options.results / "runs.jsonl"):
            study = Study(text, protocol, options.results / "runs.jsonl", size)
            study(options.methods)
            write_scales(options.results / "scales.json", text)
    write_report(options.results)


if __name__ == "__main__":
    main()
