"""What the chain declares, held against Jacobians of the real Flax model.

A scale is the reciprocal of the mean diagonal of `J^T J`, for one example and summed
over everything the model puts out.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import backmatch_optax as bmo
from backmatch_optax import spec

Draw = Callable[[jax.Array], Any]


def normal(*shape: int) -> Draw:
    """A white Gaussian input."""
    return lambda key: jax.random.normal(key, shape)


def agreement(
    model: nn.Module,
    links: list[spec.Link],
    draw: Draw,
    *,
    gains: Any = "mean_field",
    draws: int = 200,
    change: Callable[[Any, jax.Array], Any] = lambda params, key: params,
) -> dict[str, float]:
    """Declared curvature over measured, for every parameter by its path.

    Args:
        model: what is declared; called on a batch of one.
        links: its links.
        draw: makes one random input, without the batch, from a key.
        gains: the gains of the declared scales.
        draws: how many random parameters and inputs the mean is taken over.
        change: makes other parameters of those that the model draws.
    """
    example: Any = jax.eval_shape(draw, jax.random.key(0))
    first = example[0] if isinstance(example, tuple) else example
    chain = spec.LayerChain(links, input_shape=first.shape)
    assert eval(repr(chain)) == chain
    transformation = bmo.scale_by_backmatch(
        chain, gains=gains, norm_floor=0.0, normalize=False
    )

    def curvatures(key: jax.Array) -> Any:
        drawn, initial, changed = jax.random.split(key, 3)
        inputs = jax.tree.map(lambda x: x[None], draw(drawn))
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        params = model.init(initial, *inputs)["params"]
        params = change(params, changed)
        ones = jax.tree.map(jnp.ones_like, params)
        scales, _ = transformation.update(ones, transformation.init(params), params)
        jacobian = jax.jacrev(lambda p: model.apply({"params": p}, *inputs))(params)
        # Of several outputs each has a Jacobian.
        outputs = jacobian if isinstance(jacobian, tuple) else (jacobian,)
        measured = jax.tree.map(
            lambda p, *j: sum(jnp.sum(jnp.square(one)) for one in j) / p.size,
            params,
            *outputs,
        )
        return jax.tree.map(lambda s: 1 / jnp.mean(s), scales), measured

    keys = jax.random.split(jax.random.key(1), draws)
    both = jax.jit(lambda keys: jax.lax.map(curvatures, keys, batch_size=20))(keys)
    declared, measured = jax.tree.map(jnp.mean, both)
    ratios = jax.tree.map(lambda d, m: float(d / m), declared, measured)
    entries = jax.tree_util.tree_leaves_with_path(ratios)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): ratio
        for path, ratio in entries
    }
