"""What one optimizer update costs: backmatch beside SGD and LARS, in one run.

    python -m examples.benchmark

Times the jitted update alone (weight decay and Nesterov momentum included, no gradient)
on the parameter trees of LeNet, VGG16 and a chain of 1,000 dense layers, the methods
taking turns. Ratios are medians of the ratios within a round, so that a machine whose
speed drifts does not favour anyone.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import backmatch_optax as bmo
from backmatch_optax import spec
from examples import methods, models

METHODS = ("sgd", "lars", "backmatch")


def deep_chain(layers: int) -> tuple[Any, spec.LayerChain]:
    """Equal dense layers of 32 features, each with a BatchNorm; params and spec."""
    params = {f"Dense_{i}": {"kernel": jnp.full((32, 32), 0.1)} for i in range(layers)}
    links = [
        link
        for path in params
        for link in (spec.Dense(path), spec.BatchNorm(), spec.Activation("relu"))
    ]
    return params, spec.LayerChain(links, input_shape=(32,))


def network(name: str) -> tuple[Any, spec.LayerChain]:
    """Initial parameters and spec of one of the examples' networks."""
    model, chain = models.MODELS[name](10, (32, 32, 3))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    return variables["params"], chain


TREES: dict[str, Callable[[], tuple[Any, spec.LayerChain]]] = {
    "LeNet": lambda: network("lenet"),
    "VGG16": lambda: network("vgg16"),
    "1,000 dense layers": lambda: deep_chain(1000),
}


def compiled_update(method: str, params: Any, chain: spec.LayerChain):
    """A compiled update, its initial state, and the seconds it took to compile."""
    tx = methods.optimizer(method, 0.1, chain, weight_decay=5e-4)
    opt_state = tx.init(params)

    def update(gradient, opt_state, params):
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    start = time.perf_counter()
    # Donated, as a training step does: no new buffers for parameters and momentum.
    compiled = jax.jit(update, donate_argnums=(1, 2)).lower(
        params, opt_state, params
    ).compile()  # fmt: skip
    return compiled, opt_state, time.perf_counter() - start


def measure(params: Any, chain: spec.LayerChain, rounds: int) -> dict[str, dict]:
    """Milliseconds of every update in turn, and seconds of compilation, by method."""
    results, states = {}, {}
    gradient = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
    for method in METHODS:
        compiled, opt_state, seconds = compiled_update(method, params, chain)
        states[method] = (jax.tree.map(jnp.copy, params), opt_state)
        results[method] = {"update": compiled, "compile": seconds, "ms": []}
    for turn in tqdm(range(rounds + 3), leave=False):
        for place in range(len(METHODS)):
            method = METHODS[(turn + place) % len(METHODS)]  # nobody is always first
            result = results[method]
            weights, opt_state = states[method]
            start = time.perf_counter()
            states[method] = jax.block_until_ready(
                result["update"](gradient, opt_state, weights)
            )
            result["ms"].append(1e3 * (time.perf_counter() - start))
    for result in results.values():
        result["ms"] = np.array(result["ms"][3:])  # the first rounds warm up
    return results


def inference_seconds() -> float:
    """How long `infer_spec` takes for a ResNet-18 and a batch of 256 images."""
    model, chain = models.MODELS["resnet18"](10, (32, 32, 3))
    images = jax.ShapeDtypeStruct((256, 32, 32, 3), jnp.float32)
    start = time.perf_counter()
    inferred = bmo.infer_spec(model, images, train=True)
    seconds = time.perf_counter() - start
    assert inferred == chain, "the declared chain is what the model does"
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark",
        description="What one optimizer update costs.",
    )
    parser.add_argument("--rounds", type=int, default=200, help="updates timed of each")
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    options = parser.parse_args(arguments)
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}, optax {optax.__version__}, "
        f"Python {platform.python_version()}\n\n"
        "| parameters | method | ms / update | over SGD | compile, s | over SGD |\n"
        "|---|---|---|---|---|---|"
    )
    for tree in options.trees:
        params, chain = TREES[tree]()
        results = measure(params, chain, options.rounds)
        for method, result in results.items():
            ratio = np.median(result["ms"] / results["sgd"]["ms"])
            compile_ratio = result["compile"] / results["sgd"]["compile"]
            print(
                f"| {tree} | {method} | {np.median(result['ms']):.3f} | {ratio:.2f} "
                f"| {result['compile']:.2f} | {compile_ratio:.2f} |",
                flush=True,
            )
    print(f"\ninfer_spec of a ResNet-18: {inference_seconds():.2f} s")


if __name__ == "__main__":
    main()
