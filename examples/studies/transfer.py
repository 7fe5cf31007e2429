"""Does SGD's learning rate carry over? Loss against learning rate, network by network.

Networks differ in width, depth, the size of their initial weights, how these are spread
over the layers, their kind and the number of classes. Each is trained for a few hundred
steps at every learning rate of a grid: by SGD, by backmatch with the papers' scales,
with the default ones, and "normalized", with `limit=None`. The last two are divided by
their mean, so that SGD's rate is theirs.

    python -m examples.studies.transfer
    python -m examples.studies.transfer --dataset cifar10 --networks mlp lenet
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import backmatch_optax as bmo
from examples import cpu, data, methods, models
from examples.arguments import whole
from examples.training import loss_and_gradient

matplotlib.use("Agg")  # pictures go to files, also where there is no screen
import matplotlib.pyplot as plt

METHODS = ("sgd", "backmatch", "backmatch, default", "backmatch, normalized")
LEARNING_RATES = tuple(2.0**power for power in range(-13, 2))
_BATCH, _TEST = 128, 5000  # images a step, and images to test with


@dataclasses.dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
      change: what differs from the others of its panel.
      kind: "mlp", of ReLU layers without normalisation, or "lenet".
      depth: the number of dense layers of an MLP.
      width: the features of an MLP's hidden layers.
      init: what the initial weights are multiplied by.
      imbalance: what those of every other layer are multiplied by and those between
        divided by, which leaves the function of an even number of ReLU layers as it is.
      dataset: instead of the one that was asked for.
    """

    change: str
    kind: str = "mlp"
    depth: int = 4
    width: int = 128
    init: float = 1.0
    imbalance: float = 1.0
    dataset: str | None = None


PANELS: dict[str, tuple[Network, ...]] = {
    "width": tuple(Network(f"width {w}", width=w) for w in (32, 128, 512)),
    "depth": tuple(Network(f"depth {d}", depth=d) for d in (2, 4, 8)),
    "initial weights": tuple(Network(f"times {s:g}", init=s) for s in (0.5, 1, 2)),
    "balance of layers": tuple(
        Network(f"times {s}, over {s}", imbalance=s) for s in (1, 2, 4)
    ),
    "LeNet, classes": (
        Network("10 classes", kind="lenet", dataset="cifar10"),
        Network("100 classes", kind="lenet", dataset="cifar100"),
    ),
}


def shape_of(network: Network) -> Network:
    """A network by what it is, whatever it is compared with."""
    return dataclasses.replace(network, change="")


class MLP(nn.Module):
    """ReLU layers of equal width, He-initialised."""

    depth: int
    width: int
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits of images, shape (batch, classes)."""
        del train
        x = x.reshape(len(x), -1)
        init = nn.initializers.he_normal()
        for _ in range(self.depth - 1):
            x = nn.relu(nn.Dense(self.width, use_bias=False, kernel_init=init)(x))
        return nn.Dense(self.classes, use_bias=False, kernel_init=init)(x)


def images_for(network: Network, images: np.ndarray, dataset: data.Dataset):
    """Standardised images; for an MLP made smaller, digits 8x8 and CIFAR 16x16."""
    x = np.asarray(dataset.standardise(jnp.asarray(images)), np.float32)
    if network.kind != "mlp":
        return x
    window = 4 if dataset.name == "digits" else 2
    n, height, width, channels = x.shape
    x = x.reshape(n, height // window, window, width // window, window, channels)
    return x.mean((2, 4))


def sensitivity(
    network: Network,
    method: str,
    dataset: data.Dataset,
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
) -> dict[str, np.ndarray]:
    """How training ends at every rate: "loss" and "accuracy", shape (rates, seeds).

    The mean training loss of the last tenth of the steps, NaN where a run diverged, and
    the share of the test images classified right. The rate falls linearly to zero, so
    that the end tells more than the noise of the last steps.
    """
    images = images_for(network, dataset.train_images[:20_000], dataset)
    labels = dataset.train_labels[:20_000]
    test_images = images_for(network, dataset.test_images[:_TEST], dataset)
    test_labels = dataset.test_labels[:_TEST]
    if network.kind == "mlp":
        model: nn.Module = MLP(network.depth, network.width, dataset.num_classes)
        chain = bmo.infer_spec(model, images[:2], train=False)
    else:
        model, chain = models.MODELS[network.kind](
            dataset.num_classes, dataset.input_shape
        )
        model = cpu.faster(model)

    def tx_at(rate: jax.Array) -> optax.GradientTransformation:
        return methods.optimizer(method, lambda step: rate * (1 - step / steps), chain)

    def init(rate: jax.Array, seed: jax.Array) -> tuple[Any, Any, Any]:
        variables: Any = model.init(jax.random.key(seed), images[:2], train=False)
        kernels, tree = jax.tree.flatten(variables["params"])
        params = tree.unflatten(
            kernel * network.init * network.imbalance ** (-1) ** layer
            for layer, kernel in enumerate(kernels)
        )
        return params, variables.get("batch_stats", {}), tx_at(rate).init(params)

    def step(state, rate, x, y):
        params, stats, opt_state = state
        (loss, stats), gradient = loss_and_gradient(model.apply, params, stats, x, y)
        updates, opt_state = tx_at(rate).update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    def share_right(state):
        variables = {"params": state[0], "batch_stats": state[1]}
        logits: Any = model.apply(variables, test_images, train=False)
        return jnp.mean(logits.argmax(-1) == test_labels)

    init_all, test_all = jax.jit(jax.vmap(init)), jax.jit(jax.vmap(share_right))
    step_all = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)), donate_argnums=0)
    runs = np.array([(rate, seed) for rate in rates for seed in seeds])
    # A convolution with kernels of many runs is slow on a CPU; a matrix product is not.
    at_once = len(runs) if network.kind == "mlp" else 1
    final: dict[str, list[np.ndarray]] = {"loss": [], "accuracy": []}
    for first in range(0, len(runs), at_once):
        rate, seed = jnp.asarray(runs[first : first + at_once].T)
        state = init_all(rate, seed.astype(int))
        rng, losses = np.random.default_rng(0), []  # the same batches for every run
        for _ in range(steps):
            chosen = rng.integers(len(images), size=_BATCH)
            state, loss = step_all(state, rate, images[chosen], labels[chosen])
            losses.append(loss)
        last = jax.device_get(losses[-max(steps // 10, 1) :])
        final["loss"].append(np.mean(last, axis=0))
        final["accuracy"].append(np.asarray(test_all(state)))
    return {
        name: np.concatenate(values).reshape(len(rates), len(seeds))
        for name, values in final.items()
    }


def best_rate(losses: np.ndarray, rates: Sequence[float]) -> float:
    """The rate whose mean loss over the seeds is least; one that diverged has none."""
    means = losses.mean(1)
    return rates[int(np.argmin(np.where(np.isfinite(means), means, np.inf)))]


Curves = dict[str, dict[str, dict[str, dict[str, np.ndarray]]]]


def plot(curves: Curves, name: str, path: Path) -> None:
    """A row for each panel, a column for each method, a line for each network."""
    figure, axes = plt.subplots(
        len(curves),
        len(METHODS),
        figsize=(13, 2.6 * len(curves)),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for row, (panel, networks) in zip(axes, curves.items(), strict=True):
        for axis, method in zip(row, METHODS, strict=True):
            for number, (change, results) in enumerate(networks.items()):
                values = results[method][name]
                (line,) = axis.plot(
                    LEARNING_RATES, values.mean(1), "o-", ms=3, label=change
                )
                colour, spread = line.get_color(), (values.min(1), values.max(1))
                axis.fill_between(
                    LEARNING_RATES, *spread, color=colour, alpha=0.2, lw=0
                )
                # Side by side where they fall on one rate.
                best = best_rate(results[method]["loss"], LEARNING_RATES)
                axis.axvline(best * 1.06 ** (number - 1), color=colour, linestyle=":")
            axis.set(xscale="log")
        row[0].set(ylabel=f"{panel}\n{name}")
        row[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        if name == "loss":
            least = [
                min(np.nanmin(result[name]) for result in results.values())
                for results in networks.values()
            ]
            row[0].set(ylim=(min(least) - 0.1, max(least) + 1))
    for axis, method in zip(axes[0], METHODS, strict=True):
        axis.set_title(method)
    for axis in axes[-1]:
        axis.set(xlabel="learning rate")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    """Prints the best rates and saves the curves; returns best rates by network."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.transfer",
        description="Loss against learning rate for networks of several widths, depths "
        "and initial weights, under SGD and backmatch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=data.DATASETS, default="digits")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=("mlp", "lenet"),
        default=["mlp"],
        help="lenet needs CIFAR-10 and -100",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=300, help="training steps of a run"
    )
    parser.add_argument("--seeds", type=whole(1), default=3, help="runs at each rate")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/transfer"))
    options = parser.parse_args(arguments)
    datasets: dict[str, data.Dataset] = {}
    curves: Curves = {}
    found: dict[str, dict[str, list[float]]] = {}
    panels = {
        panel: networks
        for panel, networks in PANELS.items()
        if networks[0].kind in options.networks
    }
    header = "  ".join(f"{method:>22}" for method in METHODS)
    tqdm.write(f"{'best rate, loss, accuracy':38}  {header}")
    # The same network stands in several panels, but is trained once.
    trained: dict[Network, dict[str, dict[str, np.ndarray]]] = {}
    shapes = {shape_of(network) for panel in panels.values() for network in panel}
    total = len(METHODS) * len(shapes)
    with tqdm(total=total, unit="curve") as bar:
        for panel, networks in panels.items():
            curves[panel], found[panel] = {}, {method: [] for method in METHODS}
            for network in networks:
                name = network.dataset or options.dataset
                if name not in datasets:
                    datasets[name] = data.load(name, options.data_dir)
                results = trained.setdefault(shape_of(network), {})
                # A convolution takes minutes a curve on a CPU: one seed there.
                seeds = range(options.seeds if network.kind == "mlp" else 1)
                for method in METHODS:
                    if method not in results:
                        results[method] = sensitivity(
                            network,
                            method,
                            datasets[name],
                            LEARNING_RATES,
                            seeds,
                            options.steps,
                        )
                        bar.update()
                curves[panel][network.change] = results
                cells = []
                for method, result in results.items():
                    best = best_rate(result["loss"], LEARNING_RATES)
                    found[panel][method].append(best)
                    at = LEARNING_RATES.index(best)
                    means = {name: values.mean(1) for name, values in result.items()}
                    cells.append(
                        f"2^{np.log2(LEARNING_RATES[at]):<3g} {means['loss'][at]:.3f} "
                        f"{means['accuracy'][at]:.1%}"
                    )
                tqdm.write(
                    f"{panel + ', ' + network.change:38}  "
                    + "  ".join(f"{cell:>22}" for cell in cells)
                )
    for method in METHODS[1:]:
        ratios = [
            ours / sgds
            for panel in found.values()
            for ours, sgds in zip(panel[method], panel["sgd"], strict=True)
        ]
        print(
            f"{method}: its best rate is {min(ratios):g} to {max(ratios):g} times SGD's"
        )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("loss", "accuracy"):
        plot(curves, name, options.output_dir / f"transfer_{name}.png")
    (options.output_dir / "transfer.json").write_text(
        json.dumps(
            {"options": vars(options), "rates": LEARNING_RATES, "curves": curves},
            default=lambda value: (
                value.tolist() if isinstance(value, np.ndarray) else str(value)
            ),
        )
    )
    print(f"Pictures and transfer.json are in {options.output_dir}")
    return found


if __name__ == "__main__":
    main()
