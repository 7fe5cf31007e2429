"""The exact back-matching rule: how near the scalar comes, its cost, how it trains.

    python -m examples.studies.exact_study
    python -m examples.studies.exact_study --dataset cifar10 --data-dir DIRECTORY

`directions` compares, layer by layer of LeNet, the scalar rule's direction with the
exact one, from initialisation on while SGD under the scalar rule trains it.
`training` trains an MLP without normalisation and LeNet with the exact rule (damped,
with a running average of its second moments), the scalar rule, SGD, Adam, Muon and, if
asked for and where kfac-jax works (not with jax 0.12), K-FAC. Every method gets twelve
settings, judged by the loss on held-out training images, and then meets test images
with new seeds.
`cost` times a training step of each, all methods taking turns in one run; the time axis
of the pictures is made of these.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
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
from backmatch_optax import spec
from backmatch_optax.exact import linen as exact_linen
from examples import data, methods
from examples.arguments import whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = ("directions", "cost", "training")
BATCH, DECAY = 128, 0.95
DAMPINGS = (0.0, 0.1)  # of the directions that are compared

# Twelve settings each, (learning rate, damping): rates from the first to the last, or
# four of them with three dampings.
RANGES = {
    "sgd": (0.003, 1.0),
    "adam": (0.0003, 0.1),
    "muon": (0.001, 0.1),
    "scalar": (0.003, 1.0),
}
SETTINGS: dict[str, list[tuple[float, float]]] = {
    method: [(float(f"{rate:.2g}"), 0.0) for rate in np.geomspace(*ends, 12)]
    for method, ends in RANGES.items()
} | {
    "exact": list(itertools.product((0.003, 0.01, 0.03, 0.1), (0.01, 0.1, 1.0))),
    "kfac": list(itertools.product((0.003, 0.01, 0.03, 0.1), (0.01, 0.1, 1.0))),
}


class MLP(nn.Module):
    """Three hidden layers with ReLU and biases, no normalisation."""

    layers: Any = nn
    options: Any = dataclasses.field(default_factory=dict)
    relu: Callable[[jax.Array], jax.Array] = nn.relu
    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch of images."""
        x = x.reshape(x.shape[0], -1)
        for index in range(3):
            he = nn.initializers.he_normal()
            name = f"fc{index + 1}"
            x = self.layers.Dense(
                self.width, kernel_init=he, name=name, **self.options
            )(x)
            x = self.relu(x)
        return self.layers.Dense(10, name="head", **self.options)(x)


class LeNet(nn.Module):
    """The papers' LeNet (`models.LeNet`), of Flax's layers or the exact ones."""

    layers: Any = nn
    options: Any = dataclasses.field(default_factory=dict)
    relu: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch of images, normalised by the batch's own statistics."""

        def activated(x: jax.Array) -> jax.Array:
            norm = self.layers.BatchNorm(False, use_scale=False, use_bias=False)
            return self.relu(norm(x))

        options = {"use_bias": False, **self.options}
        for name, features in (("cv1", 6), ("cv2", 16)):
            x = self.layers.Conv(
                features, (5, 5), padding="VALID", name=name, **options
            )(x)
            x = nn.max_pool(activated(x), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for name, features in (("fc1", 120), ("fc2", 84)):
            x = activated(self.layers.Dense(features, name=name, **options)(x))
        return self.layers.Dense(10, name="fc3", **options)(x)


@dataclasses.dataclass
class Problem:
    """A network and its data."""

    name: str
    network: Callable[..., nn.Module]
    chain: spec.LayerChain
    dataset: data.Dataset
    steps: int

    @functools.cached_property
    def _init(self) -> Callable[..., Any]:
        return jax.jit(self.network(exact_linen, {"decay": DECAY}).init)

    def variables(self, seed: int) -> dict[str, Any]:
        """Initial parameters and state, the same for every method."""
        images = jnp.zeros((2, *self.dataset.input_shape))
        return dict(self._init(jax.random.key(seed), images))

    @functools.cached_property
    def test(self) -> Callable[[Any], tuple[jax.Array, jax.Array]]:
        """`fn(variables) -> (loss, accuracy)` on all test images, as one batch."""
        net, labels = self.network(), jnp.asarray(self.dataset.test_labels)

        @jax.jit
        def test(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, _ = net.apply(
                variables, self.dataset.standardise(images), mutable=["batch_stats"]
            )
            return cross_entropy(logits, labels), (logits.argmax(-1) == labels).mean()

        return lambda variables: test(variables, self.dataset.test_images)

    def batches(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same ones for every method."""
        rng = np.random.default_rng(seed)
        images, labels = self.dataset.train_images, self.dataset.train_labels
        while True:
            for chosen in self.dataset.batches(BATCH, rng):
                yield images[chosen], labels[chosen]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_and_gradient(
    problem: Problem, layers: Any, options: dict[str, Any]
) -> Callable[..., Any]:
    """`fn(params, state, images, labels) -> ((loss, state), gradient)`."""
    net = problem.network(layers, options)

    def loss_fn(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, new = net.apply(
            {"params": params, **state},
            problem.dataset.standardise(images),
            mutable=["batch_stats", "second_moments"],
        )
        return cross_entropy(logits, labels), {**state, **new}

    return jax.value_and_grad(loss_fn, has_aux=True)


# --- Methods -------------------------------------------------------------------------


class OptaxMethod:
    """A training step in which rate and damping are numbers, compiled once."""

    def __init__(self, problem: Problem, method: str):
        def tx(rate: Any) -> optax.GradientTransformation:
            if method == "adam":
                return optax.adam(rate)
            known = {"scalar": "backmatch", "exact": "sgd"}.get(method, method)
            return methods.optimizer(known, rate, problem.chain)

        def step(variables, opt_state, images, labels, rate, damping):
            params = variables["params"]
            state = {k: v for k, v in variables.items() if k != "params"}
            options = {"damping": damping, "decay": DECAY} if method == "exact" else {}
            layers = exact_linen if method == "exact" else nn
            gradient_fn = loss_and_gradient(problem, layers, options)
            (loss, state), gradient = gradient_fn(params, state, images, labels)
            updates, opt_state = tx(rate).update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            return {"params": params, **state}, opt_state, loss

        self.init = lambda variables, batch: tx(0.0).init(variables["params"])
        self.step = jax.jit(step)


class KfacMethod:
    """kfac-jax's optimizer with its own defaults but for the rate and the damping."""

    def __init__(self, problem: Problem):
        import kfac_jax  # pyright: ignore[reportMissingImports]

        _let_kfac_jax_evaluate()
        # Its tracer knows no call within a call, such as nn.relu is.
        net = problem.network(relu=lambda x: jnp.maximum(x, 0))
        self._state: dict[str, Any] = {}

        def loss_fn(params: Any, batch: Any) -> jax.Array:
            images, labels = batch
            logits, _ = net.apply(
                {"params": params, **self._state},
                problem.dataset.standardise(images),
                mutable=["batch_stats"],
            )
            kfac_jax.register_softmax_cross_entropy_loss(logits, labels)
            return cross_entropy(logits, labels)

        self._optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss_fn), l2_reg=0.0, num_burnin_steps=0
        )

    def init(self, variables: Any, batch: Any) -> Any:
        """The optimizer's state for these variables."""
        self._state = {"batch_stats": variables.get("batch_stats", {})}
        return self._optimizer.init(variables["params"], jax.random.key(0), batch)

    def step(self, variables, opt_state, images, labels, rate, damping):
        """A step with the signature of `OptaxMethod`'s."""
        params = jax.tree.map(jnp.copy, variables["params"])  # it donates them
        stepped: Any = self._optimizer.step(
            params,
            opt_state,
            jax.random.key(0),
            batch=(images, labels),
            learning_rate=rate,
            momentum=jnp.asarray(0.9),
            damping=damping,
        )
        params, opt_state, stats = stepped
        return {**variables, "params": params}, opt_state, stats["loss"]


def _let_kfac_jax_evaluate() -> None:
    """kfac-jax 0.0.8 expects of jax what it returned before 0.10."""
    import kfac_jax._src.tag_graph_matcher as matcher  # pyright: ignore[reportMissingImports]

    def eval_jaxpr_eqn(eqn: Any, in_values: list[Any]) -> list[Any]:
        primitive = eqn.primitive
        out = primitive.bind(*in_values, **primitive.get_bind_params(eqn.params))
        return list(out) if primitive.multiple_results else [out]

    if isinstance(jax.lax.add_p.get_bind_params({}), dict):
        matcher.eval_jaxpr_eqn = eval_jaxpr_eqn


def compiled_methods(problem: Problem, names: Sequence[str]) -> dict[str, Any]:
    """The methods by name; K-FAC only where it works, and says so where it does not."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = (
                KfacMethod(problem) if name == "kfac" else OptaxMethod(problem, name)
            )
        except (ImportError, AttributeError) as error:
            print(f"{name} is left out: {type(error).__name__}: {error}")
    return found


# --- Directions ----------------------------------------------------------------------


def compare_directions(problem: Problem, images: int) -> list[dict[str, Any]]:
    """Cosine and ratio of norms of the scalar and the exact direction, by layer."""
    variables = problem.variables(0)
    method = OptaxMethod(problem, "scalar")
    x, y = problem.dataset.train_images[:images], problem.dataset.train_labels[:images]
    opt_state = method.init(variables, None)
    batches = problem.batches(0)
    last = problem.steps
    moments = {0, *np.geomspace(min(4, last), last, 4).round().astype(int).tolist()}

    @jax.jit
    def directions(params: Any, state: Any) -> Any:
        (_, _), gradient = loss_and_gradient(problem, nn, {})(params, state, x, y)
        scales = bmo.layer_scales(problem.chain, params, normalize=False)
        scalar = {path: scales[path] * gradient[path]["kernel"] for path in scales}
        exact = {}
        for damping in DAMPINGS:
            options = {"damping": damping}
            gradient_fn = loss_and_gradient(problem, exact_linen, options)
            (_, _), found = gradient_fn(params, state, x, y)
            exact[damping] = {path: found[path]["kernel"] for path in scales}
        plain = {path: gradient[path]["kernel"] for path in scales}
        return plain, scalar, exact

    rows = []
    for step in range(problem.steps + 1):
        if step in moments:
            state = {"batch_stats": variables.get("batch_stats", {})}
            plain, scalar, exact = directions(variables["params"], state)
            for damping, found in exact.items():
                cosines = {path: cosine(scalar[path], found[path]) for path in found}
                ratios = {
                    path: norm(scalar[path]) / norm(found[path]) for path in found
                }
                whole = [cosine(rule, found) for rule in (plain, scalar)]
                rows.append(
                    {
                        "step": step,
                        "damping": damping,
                        "cosines": cosines,
                        "ratios": ratios,
                        "whole": whole,
                    }
                )
        variables, opt_state, _ = method.step(
            variables, opt_state, *next(batches), 0.03, 0.0
        )
    return rows


def norm(tree: Any) -> float:
    """Euclidean, of all arrays together."""
    return float(jnp.asarray(optax.tree.norm(tree)))


def cosine(one: Any, other: Any) -> float:
    """Of the angle between two trees of arrays."""
    return float(jnp.asarray(optax.tree.vdot(one, other))) / (norm(one) * norm(other))


def report_directions(rows: list[dict[str, Any]], output: Path) -> None:
    """Prints the comparison and draws it."""
    layers = list(rows[0]["cosines"])
    figure, axes = plt.subplots(
        len(DAMPINGS),
        2,
        figsize=(9, 6),
        sharex=True,
        sharey="col",
        layout="constrained",
    )
    for row, damping in zip(axes, DAMPINGS, strict=True):
        chosen = [r for r in rows if r["damping"] == damping]
        print(f"scalar against exact, damping {damping:g}")
        for r in chosen:
            cosines = ", ".join(f"{p} {r['cosines'][p]:.3f}" for p in layers)
            ratios = ", ".join(f"{p} {r['ratios'][p]:.2g}" for p in layers)
            print(
                f"  step {r['step']}: cosine {cosines}; norm ratio {ratios}; "
                f"all layers as one vector: BP's cosine {r['whole'][0]:.3f}, the "
                f"scalar rule's {r['whole'][1]:.3f}"
            )
        for path in layers:
            steps = [r["step"] for r in chosen]
            row[0].plot(steps, [r["cosines"][path] for r in chosen], "o-", label=path)
            row[1].plot(steps, [r["ratios"][path] for r in chosen], "o-", label=path)
        row[0].set(ylim=(0, 1), ylabel=f"cosine, damping {damping:g}")
        row[1].set(yscale="log", ylabel="norm, scalar over exact")
        row[1].axhline(1, color="0.7", zorder=0)
        for ax in row:
            ax.set_xscale("symlog", linthresh=4)
    axes[0][0].legend()
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    save(figure, output)


# --- Cost and training ---------------------------------------------------------------


def measure_cost(
    problem: Problem, found: dict[str, Any], rounds: int
) -> dict[str, float]:
    """Milliseconds of a training step: medians, all methods taking turns.

    On CPU of processor time, so that what else the machine does counts for nobody.
    """
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    images, labels = next(problem.batches(0))
    times: dict[str, list[float]] = {name: [] for name in found}
    states = {}
    for name, method in found.items():
        variables = problem.variables(0)
        states[name] = variables, method.init(variables, (images, labels))
    for turn in range(rounds + 2):
        for name, method in found.items():
            start = clock()
            *states[name], loss = method.step(*states[name], images, labels, 1e-4, 0.1)
            jax.block_until_ready((states[name], loss))
            if turn >= 2:  # the first compile
                times[name].append(1e3 * (clock() - start))
    reference = times["sgd"]
    print(
        f"a training step, {problem.name}, batch {BATCH}, {rounds} rounds in turn, "
        f"{'processor' if on_cpu else 'wall'} time"
    )
    print("| network | method | ms / step | over SGD |\n|---|---|---|---|")
    for name, milliseconds in times.items():
        ratio = np.median(np.divide(milliseconds, reference))
        print(
            f"| {problem.name} | {name} | {np.median(milliseconds):.2f} | {ratio:.2f} |"
        )
    return {name: float(np.median(values)) for name, values in times.items()}


def train(
    problem: Problem, method: Any, setting: tuple[float, float], seed: int
) -> tuple[np.ndarray, float, float]:
    """Loss at every step; loss and accuracy on the test images."""
    rate, damping = setting
    variables, batches = problem.variables(seed), problem.batches(seed)
    batch = next(batches)
    opt_state = method.init(variables, batch)
    losses = []
    for step in range(problem.steps):
        decayed = rate * (1 - step / problem.steps)
        variables, opt_state, loss = method.step(
            variables, opt_state, *batch, jnp.asarray(decayed), jnp.asarray(damping)
        )
        losses.append(loss)
        batch = next(batches)
    loss, accuracy = problem.test(variables)
    return np.asarray(losses), float(loss), float(accuracy)


def compare_training(
    problem: Problem,
    found: dict[str, Any],
    seeds: int,
    cost: dict[str, float],
    output: Path,
) -> dict[str, list[float]]:
    """Prints tuning and comparison, draws the curves; test accuracies by method."""
    # One program serves both, so that held-out images are standardised alike.
    mean, std = problem.dataset.mean, problem.dataset.std
    held_out = problem.dataset.hold_out(0.2)._replace(mean=mean, std=std)
    tuning = dataclasses.replace(problem, dataset=held_out)
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    tested: dict[str, list[float]] = {}
    print(
        f"{problem.name}: {len(problem.dataset.train_images)} training images, "
        f"{problem.steps} steps of {BATCH}, rate falling to 0, tuned on "
        f"{len(held_out.test_images)} held-out training images",
        flush=True,
    )
    for name, method in found.items():
        settings = SETTINGS[name]
        scores = {}
        for setting in tqdm(settings, desc=f"{problem.name}, {name}", leave=False):
            losses, loss, _ = train(tuning, method, setting, 100)
            finite = np.isfinite(loss) and np.isfinite(losses).all()
            scores[setting] = loss if finite else np.inf
        best = min(scores, key=lambda setting: scores[setting])
        listed = ", ".join(f"{describe(s)}: {v:.3f}" for s, v in scores.items())
        print(f"  held-out loss, {name}: {listed}")
        runs = [train(problem, method, best, seed) for seed in range(seeds)]
        curves, losses, accuracies = zip(*runs, strict=True)
        tested[name] = list(accuracies)
        last = np.mean([curve[-len(curve) // 10 :].mean() for curve in curves])
        spread = np.std(accuracies, ddof=1) if seeds > 1 else float("nan")
        print(
            f"  {name} at {describe(best)}: training loss {last:.3f}, test loss "
            f"{np.mean(losses):.3f}, test accuracy {np.mean(accuracies):.2%} +- "
            f"{spread:.2%} ({seeds} seeds)",
            flush=True,
        )
        curve = np.mean(curves, axis=0)
        width = max(1, problem.steps // 20)
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        steps = np.arange(width, problem.steps + 1)
        axes[0].semilogy(steps, smooth, label=name)
        if name in cost:
            axes[1].semilogy(steps * cost[name] / 1e3, smooth, label=name)
    axes[0].set(xlabel="step", ylabel="training loss", title=problem.name)
    axes[1].set(xlabel="seconds, at the measured cost of a step")
    axes[0].legend()
    save(figure, output)
    return tested


def describe(setting: tuple[float, float]) -> str:
    """A setting as `rate` or `rate/damping`."""
    rate, damping = setting
    return f"{rate:g}/{damping:g}" if damping else f"{rate:g}"


def save(figure: Any, output: Path) -> None:
    """Writes a picture and says where."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)
    print(f"  picture: {output.name}", flush=True)


def subset(dataset: data.Dataset, train: int, test: int, step: int) -> data.Dataset:
    """The first images, every `step`-th pixel of them."""
    return dataset._replace(
        train_images=dataset.train_images[:train, ::step, ::step],
        train_labels=dataset.train_labels[:train],
        test_images=dataset.test_images[:test, ::step, ::step],
        test_labels=dataset.test_labels[:test],
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the chosen parts; returns the directions and accuracies."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.exact_study",
        description="The exact back-matching rule: directions, cost, training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--networks", nargs="+", choices=("mlp", "lenet"), default=["mlp", "lenet"]
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=SETTINGS,
        default=[name for name in SETTINGS if name != "kfac"],
        help="kfac needs kfac-jax, and is slow on convolutions",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=100, help="of LeNet; twice of MLP"
    )
    parser.add_argument(
        "--images", type=whole(1), default=1024, help="of the directions"
    )
    parser.add_argument("--train-images", type=whole(1), default=10000, help="at most")
    parser.add_argument("--seeds", type=whole(1), default=3, help="of the final runs")
    parser.add_argument("--rounds", type=whole(1), default=20, help="of the timing")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__} on {jax.default_backend()}")
    loaded = data.load(options.dataset, options.data_dir)
    step = 4 if options.dataset == "digits" else 2  # digits are 8x8 in truth
    problems = []
    for name in options.networks:
        network, every, steps = (
            (MLP, step, 2 * options.steps)
            if name == "mlp"
            else (LeNet, 1, options.steps)
        )
        chosen = subset(loaded, options.train_images, 2000, every)
        images = chosen.standardise(jnp.asarray(chosen.train_images[:2]))
        chain = bmo.infer_spec(network(), images)
        title = f"{name} on {options.dataset}"
        problems.append(Problem(title, network, chain, chosen, steps))
    results: dict[str, Any] = {}
    for problem in problems:
        stem = problem.name.replace(" on ", "_")
        if "directions" in options.parts and problem.network is LeNet:
            rows = compare_directions(problem, options.images)
            print(f"{problem.name}, {options.images} images")
            picture = options.output_dir / f"exact_directions_{options.dataset}.png"
            report_directions(rows, picture)
            results["directions"] = rows
        if {"cost", "training"}.isdisjoint(options.parts):
            continue
        found = compiled_methods(problem, options.methods)
        cost: dict[str, float] = {}
        if "cost" in options.parts:
            cost = measure_cost(problem, found, options.rounds)
        if "training" in options.parts:
            picture = options.output_dir / f"exact_training_{stem}.png"
            results[problem.name] = compare_training(
                problem, found, options.seeds, cost, picture
            )
    return results


if __name__ == "__main__":
    main()
