"""Draws the pictures of `recipes.md`, from short runs on the digits.

python docs/pictures/recipes.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import backmatch_optax as bmo
from backmatch_optax import plots

HERE = Path(__file__).parent
IMAGES, LABELS = load_digits(return_X_y=True)
X, Y = jnp.asarray((IMAGES[:256] - 4.9) / 6.0), jnp.asarray(LABELS[:256])
HE = nn.initializers.he_normal()
WIDTHS, SEEDS = (32, 64, 128, 256, 512, 1024), range(8)


class Net(nn.Module):
    """A perceptron of five layers."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of ten classes."""
        for index in range(4):
            x = nn.Dense(self.width, kernel_init=HE, name=f"fc{index + 1}")(x)
            x = nn.relu(x)
        return nn.Dense(10, name="head")(x)


def run(width: int, rate: float, seed: int = 0) -> Iterator[tuple[Any, Any]]:
    """Outputs of the layers, and scales, before the first step and after each."""
    model = Net(width)
    params = model.init(jax.random.key(seed), X)["params"]
    tx = bmo.backmatch_sgd(rate, bmo.infer_spec(model, X), momentum=None)
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            logits, aside = model.apply(
                {"params": params},
                X,
                capture_intermediates=True,
                mutable=["intermediates"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, Y)
            return losses.mean(), aside["intermediates"]

        gradient, outputs = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, outputs

    while True:
        params, state, outputs = step(params, state)
        yield outputs, optax.tree.get(state, "layer_scales")


def main() -> None:
    """One picture of scales, and one of a coordinate check."""
    log = [scales for (_, scales), _ in zip(run(64, 0.3), range(100), strict=False)]
    plots.plot_scales(log).savefig(HERE / "scales.png", dpi=100)

    def outputs_of_seeds(width: int) -> Iterator[Any]:
        for seeds in zip(*(run(width, 0.01, seed) for seed in SEEDS), strict=True):
            yield jax.tree.map(
                lambda *arrays: jnp.stack(arrays), *next(zip(*seeds, strict=True))
            )

    check = plots.coordinate_check(outputs_of_seeds, WIDTHS, num_steps=3)
    plots.plot_coordinates(check).savefig(HERE / "coordinates.png", dpi=100)


if __name__ == "__main__":
    main()
