"""Does the learning rate of Adam and Lion carry over to other widths and depths?

Multilayer perceptrons on 8x8 CIFAR-10 are trained for some hundred steps, each
optimizer alone and followed by `scale_steps_by_backmatch`. Rates are powers of 2, over
a range that grows until the best one lies inside.

    python -m examples.studies.width
    python -m examples.studies.width --dataset digits --steps 50 --seeds 1
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from examples import data
from examples.arguments import whole
from examples.studies import markdown, results_file
from examples.studies.random_networks import search
from examples.studies.random_networks.networks import small
from examples.studies.random_networks.rules import transformation

RESULTS = Path(__file__).parent / "results" / "width.jsonl"

NETWORKS = {  # hidden layers and their width
    "4 layers, width 32": (3, 32),
    "4 layers, width 128": (3, 128),
    "4 layers, width 512": (3, 512),
    "2 layers, width 64": (1, 64),
    "4 layers, width 64": (3, 64),
    "8 layers, width 64": (7, 64),
}
OPTIMIZERS = ("adam", "lion")
# Where the search for the best rate begins, as a power of 2.
_FIRST = {"adam": -8, "lion": -11}
_FIRST_STEPS = -6
_BATCH = 64


class MLP(nn.Module):
    """ReLU layers, each with a BatchNorm before it or without."""

    depth: int
    width: int
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images, shape (batch, 10)."""
        x = x.reshape(len(x), -1)
        for _ in range(self.depth):
            x = nn.Dense(self.width, use_bias=not self.norm)(x)
            if self.norm:
                x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x)


def optimizer(
    name: str, chain: spec.LayerChain, steps: bool
) -> optax.GradientTransformation:
    """An optimizer with learning rate 1, and what follows it where `steps` is true."""
    plain = transformation(name)
    if not steps:
        return plain
    return optax.chain(plain, bmo.scale_steps_by_backmatch(chain))


def losses_by_rate(
    network: tuple[int, int],
    norm: bool,
    name: str,
    steps: bool,
    dataset: data.Dataset,
    length: int,
    seeds: int,
) -> dict[int, float]:
    """Mean training loss of the last tenth of the steps by the rate's power of 2."""
    images = small(dataset, dataset.train_images[:8192])
    labels = jnp.asarray(dataset.train_labels[:8192])
    model = MLP(*network, norm)
    chain = bmo.infer_spec(model, images[:2])
    tx = optimizer(name, chain, steps)
    rng = np.random.default_rng(0)
    order = rng.integers(0, len(images), (seeds, length, _BATCH))
    pixels = jnp.asarray(images)

    def train(rate: jax.Array, key: jax.Array, order: jax.Array) -> jax.Array:
        variables: Any = dict(model.init(key, pixels[:2]))
        params = variables.pop("params")

        def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits: Any = model.apply(
                {"params": params, **variables}, x, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits[0], y)
            return loss.mean()

        def step(carried: Any, batch: Any) -> Any:
            params, state = carried
            number, chosen = batch
            loss, gradient = jax.value_and_grad(loss_of)(
                params, pixels[chosen], labels[chosen]
            )
            updates, state = tx.update(gradient, state, params)
            lowered = rate * (1 - number / length)
            params = jax.tree.map(lambda p, u: p + lowered * u, params, updates)
            return (params, state), loss

        carried = (params, tx.init(params))
        _, losses = jax.lax.scan(step, carried, (jnp.arange(length), order))
        return losses[-max(length // 10, 1) :].mean()

    compiled = jax.jit(jax.vmap(train, in_axes=(None, 0, 0)))
    keys = jax.random.split(jax.random.key(0), seeds)
    curve: search.Curve = {}
    first = _FIRST_STEPS if steps else _FIRST[name]
    while powers := search.next_powers(curve, first):
        for power in powers:
            loss = float(compiled(jnp.float32(2.0**power), keys, order).mean())
            curve[power] = (loss, loss)
    return {power: loss for power, (loss, _) in sorted(curve.items())}


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """A table for networks with BatchNorm and one for those without, in Markdown."""
    lines = [
        "# Does the learning rate carry over to other widths and depths?",
        "",
        "`python -m examples.studies.width`. Best rate on powers of 2 and final "
        f"training loss; mean of {records[0]['seeds']} seeds, {records[0]['steps']} "
        "steps. The second of each two columns is followed by "
        "`scale_steps_by_backmatch`.",
    ]
    for norm in (False, True):
        cells = {
            (r["network"], r["optimizer"], r["scaled"]): r["losses"]
            for r in records
            if r["norm"] == norm
        }
        names = list(dict.fromkeys((o, s) for _, o, s in cells))
        titles = [name + (", scaled" if scaled else "") for name, scaled in names]
        lines += ["", f"## {'With BatchNorm' if norm else 'Without normalisation'}", ""]
        rows = []
        for network in NETWORKS:
            row = [network]
            for name, scaled in names:
                losses = cells.get((network, name, scaled))
                if losses is None:
                    row.append("-")
                    continue
                curve = {
                    int(power): (math.nan if loss is None else loss, math.nan)
                    for power, loss in losses.items()
                }
                best = search.best(curve)
                row.append(f"2^{best}, {curve[best][0]:.3f}")
            rows.append(row)
        lines += markdown.table(["network", *titles], rows)
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the file of results lacks, and writes the page beside it."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.width",
        description="Does the learning rate carry over to other widths and depths?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--steps", type=whole(10), default=200, help="of a run")
    parser.add_argument("--seeds", type=whole(1), default=2)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    setting = {name: getattr(options, name) for name in ("dataset", "steps", "seeds")}
    with results_file.alone_with(options.results):
        records = results_file.read(options.results)
        for record in records:
            if any(record[name] != value for name, value in setting.items()):
                parser.error(f"{options.results} has runs of another setting")
        keys = ("norm", "optimizer", "scaled", "network")
        done = {tuple(record[key] for key in keys) for record in records}
        wanted = [
            (norm, name, scaled, network)
            for norm in (False, True)
            for name in OPTIMIZERS
            for scaled in (False, True)
            for network in options.networks
        ]
        dataset = data.load(options.dataset, options.data_dir)
        for what in tqdm([what for what in wanted if what not in done], unit="curve"):
            norm, name, scaled, network = what
            losses = losses_by_rate(
                NETWORKS[network],
                norm,
                name,
                scaled,
                dataset,
                options.steps,
                options.seeds,
            )
            record = setting | dict(zip(keys, what, strict=True))
            record["losses"] = {
                str(power): search.rounded(loss) for power, loss in losses.items()
            }
            results_file.append([record], options.results)
            records.append(record)
    page = report(records)
    options.results.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
