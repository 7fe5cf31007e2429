"""What spectra of local Hessians cost, in time and memory, beside a gradient.

    python -m examples.studies.local_hessian_cost

For residual blocks of growing size: the gradient of the block's back-matching loss with
respect to its input, the means of the diagonals, a spectral density and a condition
number, all jitted, in seconds and in bytes of temporary memory as XLA plans it.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax import local_hessian
from backmatch_optax.local_hessian import estimates, extremes
from examples import models
from examples.arguments import whole

MATVECS = 16  # products of a spectrum or of a condition number
PROBES = 8  # products of a mean diagonal


class Cost(NamedTuple):
    """Of one compiled program."""

    seconds: float  # median of the rounds
    mebibytes: float  # temporary memory, beside arguments and results


def block(features: int, batch: int) -> tuple[Callable, Any, jax.Array]:
    """A ResNet's block on images of 32x32, with fixed statistics, as `report` takes."""
    model = models.BasicBlock(features)
    z = jax.random.normal(jax.random.key(0), (batch, 32, 32, features))
    variables = model.init(jax.random.key(1), z[:1], train=False)
    statistics = {"batch_stats": variables["batch_stats"]}
    # The last BatchNorm's scale starts at zero, with which the branch does nothing.
    params = jax.tree.map(
        lambda leaf: jnp.ones_like(leaf) if leaf.ndim == 1 else leaf,
        variables["params"],
    )

    def fn(params: Any, z: jax.Array) -> jax.Array:
        output = model.apply({"params": params, **statistics}, z, train=False)
        assert isinstance(output, jax.Array)
        return output

    return fn, params, z


def costs(features: int, batch: int, rounds: int) -> dict[str, Cost]:
    """The cost of each program on one block, by name."""
    fn, params, z = block(features, batch)
    hessian = local_hessian.input_hessian(fn, params, z)
    key = jax.random.key(2)

    def loss(z: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(fn(params, z))) / 2

    gradient = jax.jit(jax.grad(loss))
    product = jax.jit(local_hessian.LocalHessian.product)
    programs: dict[str, tuple[Callable[[], Any], Any]] = {
        "gradient": (partial(gradient, z), gradient.lower(z)),
        "product": (partial(product, hessian, z), product.lower(hessian, z)),
        f"mean diagonal, {PROBES} products": (
            partial(local_hessian.mean_diagonal, hessian, key=key, num_probes=PROBES),
            estimates._trace.lower(hessian, key),
        ),
        f"spectrum, {MATVECS} products": (
            partial(
                local_hessian.spectrum,
                hessian,
                key=key,
                num_matvecs=MATVECS,
                num_probes=1,
            ),
            estimates._lanczos.lower(hessian, jax.random.split(key, 1), MATVECS),
        ),
        f"condition number, {MATVECS} products": (
            partial(local_hessian.condition, hessian, key=key, num_matvecs=MATVECS),
            extremes._bidiagonal.lower(hessian, key, MATVECS),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, (run, _) in programs.items():  # taking turns: the machine may drift
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    memory = {
        name: lowered.compile().memory_analysis().temp_size_in_bytes / 2**20
        for name, (_, lowered) in programs.items()
    }
    # The first round compiles.
    return {n: Cost(float(np.median(seconds[n][1:])), memory[n]) for n in programs}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.local_hessian_cost",
        description="What spectra of local Hessians cost beside a gradient.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=whole(1), default=5, help="runs timed of each")
    parser.add_argument("--batch", type=whole(1), default=8, help="images of 32x32")
    parser.add_argument(
        "--features",
        nargs="+",
        type=whole(1),
        default=[8, 16, 32],
        help="of the blocks",
    )
    options = parser.parse_args(arguments)
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}, Python {platform.python_version()}, "
        f"{options.batch} images of 32x32\n\n"
        "| features | rows of H_z | program | s | over gradient | MiB "
        "| over gradient |\n"
        "|---|---|---|---|---|---|---|"
    )
    for features in options.features:
        rows = options.batch * 32 * 32 * features
        measured = costs(features, options.batch, options.rounds)
        gradient = measured["gradient"]
        for name, cost in measured.items():
            print(
                f"| {features} | {rows:,} | {name} | {cost.seconds:.3f} "
                f"| {cost.seconds / gradient.seconds:.1f} | {cost.mebibytes:.1f} "
                f"| {cost.mebibytes / gradient.mebibytes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
