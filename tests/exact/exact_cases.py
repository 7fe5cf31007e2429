"""Linear layers of every kind, with their shapes and ordinary counterparts."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backmatch_optax import exact

X, KERNEL = jnp.ones((8, 3)), jnp.ones((3, 2))
IMAGES, WINDOW = jnp.ones((8, 4, 4, 3)), jnp.ones((3, 3, 3, 2))


def normal(*shape, seed=0):
    """NumPy's, since every shape would be a program of its own to JAX."""
    return np.random.default_rng([seed, *shape]).normal(size=shape)


@dataclasses.dataclass
class Case:
    """A linear layer of some kind, its shapes and its ordinary counterpart."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def exact(self, x, kernel, bias=None, **options):
        layer = exact.dense if len(self.kernel) == 2 else exact.conv
        return layer(x, kernel, bias, **self.options, **options)

    def ordinary(self, x, kernel) -> Any:
        """Flax's own layer, without bias."""
        features, window = self.kernel[-1], self.kernel[:-2]
        if not window:
            module = nn.Dense(features, use_bias=False)
        else:
            module = nn.Conv(features, window, use_bias=False, **self.options)
        return module.apply({"params": {"kernel": kernel}}, x)

    @functools.cached_property
    def arrays(self):
        """Input, kernel, bias, and a wanted change of the output."""
        x, kernel = normal(*self.x), normal(*self.kernel, seed=1)
        shape = jax.eval_shape(self.ordinary, jnp.asarray(x), jnp.asarray(kernel)).shape
        return x, kernel, normal(self.kernel[-1], seed=2), normal(*shape, seed=3)

    @functools.cached_property
    def compiled(self):
        """`fn(damping)`: output and directions of input, kernel and bias."""
        x, kernel, bias, wanted = self.arrays

        @jax.jit
        def run(damping, x, kernel, bias, wanted):
            layer = functools.partial(self.exact, damping=damping)
            y, pull_back = jax.vjp(layer, x, kernel, bias)
            return y, *pull_back(wanted / len(wanted))

        return lambda damping: list(
            map(np.asarray, run(damping, x, kernel, bias, wanted))
        )

    @functools.cached_property
    def system(self):
        """What every weight does to every output: (outputs, weights and bias)."""
        x, kernel, bias, wanted = self.arrays
        basis = np.eye(kernel.size).reshape(-1, *kernel.shape)
        weights = jax.jit(jax.vmap(self.ordinary, (None, 0)))(x, basis)
        ones = np.broadcast_to(np.eye(len(bias)), (*wanted.shape, len(bias)))
        return np.concatenate(
            [
                np.asarray(weights).reshape(kernel.size, -1).T,
                ones.reshape(-1, len(bias)),
            ],
            axis=1,
        )

    @functools.cached_property
    def columns(self):
        """What every unit of one example does to every output: (units, outputs)."""
        basis = np.eye(math.prod(self.x[1:])).reshape(-1, *self.x[1:])
        return np.asarray(jax.jit(self.ordinary)(basis, self.arrays[1])).reshape(
            len(basis), -1
        )


CASES = {
    "dense": Case((7, 3), (3, 4)),
    "dense on an image": Case((2, 3, 3, 4), (4, 2)),
    "conv": Case((3, 5, 5, 2), (3, 3, 2, 3), {"padding": "VALID"}),
    "padded": Case((3, 4, 4, 2), (3, 3, 2, 3)),
    "strided": Case((3, 6, 5, 2), (3, 2, 2, 3), {"strides": 2, "padding": [1, (0, 2)]}),
    "dilated": Case((4, 9, 2), (3, 2, 3), {"kernel_dilation": 2, "padding": "CAUSAL"}),
    "circular": Case((3, 4, 5, 2), (3, 4, 2, 3), {"padding": "CIRCULAR"}),
    "grouped": Case((4, 4, 4, 4), (2, 2, 2, 6), {"feature_group_count": 2}),
    "cropped": Case((3, 6, 2), (3, 2, 3), {"padding": [(-1, 2)]}),
    "low": Case((3, 6, 2), (2, 2, 3), {"padding": "SAME_LOWER", "strides": (3,)}),
    "3d": Case((3, 3, 4, 3, 1), (2, 2, 2, 1, 2)),
    "video": Case((2, 3, 5, 5, 2), (2, 2, 2, 3), {"strides": (2, 1)}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def as_list(array) -> Any:
    """What the types of the functions do not promise to take, but they do."""
    return np.asarray(array).tolist()


def directions(layer, wanted, *arguments):
    """Its cotangents for a wanted change of the output, under a mean over the batch."""

    @jax.jit
    def pulled_back(wanted, *arguments):
        return jax.vjp(layer, *arguments)[1](wanted / wanted.shape[0])

    return list(map(np.asarray, pulled_back(jnp.asarray(wanted), *arguments)))
