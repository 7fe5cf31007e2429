"""The rules of a link, as the package has them and as real Jacobians have them.

A rule states the mean diagonal of `J^T J`, for one example and summed over everything
the layer puts out, with respect to a parameter (`m_W`) or to the input (`m_z`).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import backmatch_optax as bmo
from backmatch_optax import spec

RTOL = 1e-5


def curvatures(
    link: spec.Link | Sequence[spec.Link],
    params: Any,
    input_shape: tuple[int, ...],
    *,
    moment: float = 1.0,
    gains: Any = "paper",
) -> dict[str, float]:
    """What the package takes for `m_W` of each parameter of a link, and for `m_z`.

    Of several links, for those of all.

    A block of unit curvature in front of the link gives its signal the second moment
    wanted, and the scale of the block tells the factor that it receives from the link.
    """
    chain = spec.LayerChain(
        [
            spec.Block(
                "below",
                weight_curvature=1.0,
                input_curvature=1.0,
                forward_gain=moment,
            ),
            *([link] if isinstance(link, spec.Link) else link),
        ],
        input_shape=input_shape,
    )
    tree: Any = {"below": {"kernel": jnp.ones(1)}}
    if params:
        tree["layer"] = params
    transformation = bmo.scale_by_backmatch(
        chain, gains=gains, norm_floor=0.0, normalize=False
    )
    updates: Any = transformation.update(
        jax.tree.map(jnp.ones_like, tree), transformation.init(tree), tree
    )[0]
    scales = {role: jnp.mean(leaf) for role, leaf in updates.pop("layer", {}).items()}
    scales["input"] = updates["below"]["kernel"][0]
    return {name: 1 / float(scale) for name, scale in scales.items()}


def measured(apply: Any, params: Any, x: jax.Array) -> dict[str, float]:
    """The same from the Jacobian of `apply(params, x)`; the mean over the batch `x`."""
    jacobian = jax.jit(jax.jacrev(apply, argnums=(0, 1)))(params, x)
    of_params, of_input = jacobian
    # The examples of a batch do not meet, so the Jacobian of the batch by the input has
    # a block for each of them: its sum over the blocks is that of all the examples.
    totals = {role: np.sum(np.square(j)) for role, j in of_params.items()}
    means = {role: t / len(x) / params[role].size for role, t in totals.items()}
    return means | {"input": np.sum(np.square(of_input)) / x.size}


def layer_and_params(layer: nn.Module, x: jax.Array, seed: int = 0) -> tuple[Any, Any]:
    """The layer as a function, and random values for all of its parameters."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x).get("params", {})
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)
    return lambda p, x: layer.apply({"params": p}, x), params


def signs(*shape: int, seed: int = 1) -> jax.Array:
    """Random entries of +1 and -1: a white signal whose squares are all one."""
    return jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], size=shape))


def assert_close(actual: dict[str, float], desired: dict[str, float]):
    assert set(actual) == set(desired)
    for name, value in desired.items():
        np.testing.assert_allclose(actual[name], value, rtol=RTOL, err_msg=name)


def distinct(*shape: int) -> jax.Array:
    """An input without ties, so that a maximum is taken in one place."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))
