"""Inferred chains, held against measured scales of the same random model."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import backmatch_optax as bmo
from backmatch_optax import spec


def drawn(x: jax.Array, key: jax.Array, batch: int) -> jax.Array:
    """A random batch of the kind of an example with a batch of its own."""
    shape = (batch, *x.shape[1:])
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.random.randint(key, shape, 0, 10)
    return jax.random.normal(key, shape, x.dtype)


def ratios(
    model: Any, chain: spec.LayerChain, *examples: Any, batch: int = 64, **kwargs: Any
) -> dict[str, float]:
    """Declared over measured scales of all kernels, tables and learned arrays.

    Args:
      model: a Linen module, or a function that makes an NNX one of random streams.
      chain: its chain.
      examples: shapes of its inputs.
      batch: how many examples the scales are measured on.
      kwargs: what else the model takes.
    """
    assert eval(repr(chain)) == chain
    keys = jax.random.split(jax.random.key(0), len(examples) + 2)
    inputs = [drawn(x, key, batch) for x, key in zip(examples, keys[2:], strict=True)]
    if isinstance(model, nn.Module):
        start = jax.jit(
            lambda *inputs: model.init({"params": keys[0]}, *inputs, **kwargs)
        )
        variables = start(*inputs)
        params = variables["params"]
        others = {name: v for name, v in variables.items() if name != "params"}

        def fn(params: Any, *inputs: Any) -> Any:
            return model.apply(
                {"params": params, **others},
                *inputs,
                rngs={"dropout": keys[0]},
                mutable=list(others),
                **kwargs,
            )[0]

    else:
        made = nnx.jit(lambda: model(nnx.Rngs(0)))()
        graphdef, params, others = nnx.split(made, nnx.Param, ...)

        def fn(params: Any, *inputs: Any) -> Any:  # pyright: ignore
            return nnx.merge(graphdef, params, others)(*inputs, **kwargs)

    bmo.check_spec(chain, params)
    compared = bmo.compare_scales(chain, params, fn, *inputs, key=keys[1])
    return {
        path: ratio
        for path, ratio in compared.ratios.items()
        if not math.isinf(compared.measured[path])
    }


def worst(found: dict[str, float], but: tuple[str, ...] = ()) -> float:
    """The largest factor by which a scale is off, other than of normalisations."""
    kept = [
        abs(math.log(ratio))
        for path, ratio in found.items()
        if "norm" not in path.lower() and not any(name in path for name in but)
    ]
    return math.exp(max(kept))
