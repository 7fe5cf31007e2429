"""How well declared scales predict measured ones, at initialisation.

A declared scale follows from shapes and norms; a measured one from the model itself.
Prints and plots declared over measured for every kernel, with the papers' gains and
with mean-field ones, all BatchNorm scales set to 1.

    python -m examples.studies.predicted_scales
    python -m examples.studies.predicted_scales --dataset cifar10 --data-dir DIRECTORY
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

import backmatch_optax as bmo
from examples import cpu, data, models
from examples.arguments import whole
from examples.training import train_logits

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NETWORKS = {
    "LeNet": models.MODELS["lenet"],
    "VGG11": models.MODELS["vgg11"],
    "ResNet, 15 convolutions": lambda classes, shape: models.Declared(
        models.ResNet((2, 2, 2), classes, 16), models.resnet_spec((2, 2, 2), shape)
    ),
}


def compare(declared: models.Declared, images: jax.Array) -> dict[str, Any]:
    """The comparison with both kinds of gains, all BatchNorm scales set to one."""
    model, chain = cpu.faster(declared.model), declared.chain
    variables = model.init(jax.random.key(1), images[:1], train=False)
    # A zero-initialised branch has no gradient to measure.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "scale" else leaf,
        variables["params"],
    )

    def outputs(params, images):
        stats = variables["batch_stats"]
        return train_logits(model.apply, params, stats, images)[0]

    return {
        gains: bmo.compare_scales(
            chain,
            params,
            outputs,
            images,
            key=jax.random.key(0),
            num_probes=4,
            gains=gains,
        )
        for gains in ("paper", "mean_field")
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Prints the comparisons and saves the picture; returns them by network."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.studies.predicted_scales",
        description="How well declared scales predict measured ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset",
        choices=("noise", "cifar10", "cifar100"),
        default="noise",
        help="what the networks see; noise needs no data",
    )
    parser.add_argument("--data-dir", help="where tensorflow-datasets keeps its data")
    parser.add_argument(
        "--images", type=whole(1), default=128, help="size of the batch"
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/predicted_scales.png")
    )
    options = parser.parse_args(arguments)
    if options.dataset == "noise":
        images = jax.random.normal(jax.random.key(2), (options.images, 32, 32, 3))
    else:
        dataset = data.load(options.dataset, options.data_dir)
        images = dataset.standardise(
            jnp.asarray(dataset.train_images[: options.images])
        )
    figure, all_axes = plt.subplots(
        1,
        len(options.networks),
        figsize=(4.2 * len(options.networks), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    results = {}
    for name, axes in zip(options.networks, all_axes[0], strict=True):
        results[name] = compare(NETWORKS[name](10, (32, 32, 3)), images)
        print(f"{name} on {options.dataset}, {options.images} images")
        axes.axhspan(1 / 1.5, 1.5, color="0.9")
        for gains, compared in results[name].items():
            kernels = {
                path: ratio
                for path, ratio in compared.ratios.items()
                if "BatchNorm" not in path
            }
            listed = ", ".join(f"{path} {r:.2f}" for path, r in kernels.items())
            print(f"  declared / measured, {gains} gains: {listed}")
            axes.semilogy(list(kernels.values()), "o-", label=f"{gains} gains")
        axes.set(xlabel="layer, input to output", title=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[0][0].set_ylabel("declared / measured scale")
    all_axes[0][0].legend()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=150)
    plt.close(figure)
    print(f"The picture is {options.output}; the grey band is a factor of 1.5.")
    return results


if __name__ == "__main__":
    main()
