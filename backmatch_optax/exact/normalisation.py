r"""BatchNorm with its back-matching rule, BM (24) to (27)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backmatch_optax.exact.arguments import not_negative, real_array, real_dtype
from backmatch_optax.numerics import wide


def batch_statistics(x: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of every feature, over all axes but the last.

    Args:
      x: shape `(batch, *positions, features)`, of real floating dtype.

    Returns:
      Both of shape `(features,)`, dtype float32, or float64 where `x` is; no gradient
      flows through them.

    Raises:
      ValueError: where `x` has fewer than two axes, is empty, or has no real floating
        dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> mean, var = exact.batch_statistics(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
      >>> print(mean, var)
      [2. 0.] [1. 0.]
    """
    x = lax.stop_gradient(_features("exact.batch_statistics", x))
    x = x.astype(wide(x.dtype))
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x - mean).mean(axes)


def batch_norm(
    x: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike | None = None,
    bias: jax.typing.ArrayLike | None = None,
    *,
    mean: jax.typing.ArrayLike | None = None,
    var: jax.typing.ArrayLike | None = None,
    epsilon: jax.typing.ArrayLike = 1e-5,
    dtype: jax.typing.DTypeLike | None = None,
    name: str = "exact.batch_norm",
) -> jax.Array:
    r"""Batch normalisation, whose backward pass is back-matching propagation.

    .. math::
      b = \gamma \, \hat a + \beta, \quad
      \hat a = \frac{a - \mathbb{E}\, a}{\sqrt{\mathrm{Var}\, a + \epsilon}}
      \qquad \Rightarrow \qquad
      \delta' a = \delta b \, \frac{\sqrt{\mathrm{Var}\, a + \epsilon}}{\gamma}

    This is BM (24) and (26), with the usual :math:`\gamma`, :math:`\beta` and
    :math:`\epsilon`. As there, the change of one input leaves mean and variance as they
    are. So unlike BP's, BM (25), what it hands back is not centred. The papers have
    neither scale nor bias; for them the least squares of BM (10) is

    .. math::
      \delta' \gamma = \frac{\mathbb{E} \sum_u \hat a \, \delta b}
      {\mathbb{E} \sum_u \hat a^2}, \qquad
      \delta' \beta = \frac{\mathbb{E} \sum_u \delta b}{\text{positions}}

    for each by itself. With the batch's own mean that is the joint solution too. Where
    :math:`\gamma` or :math:`\hat a` is all zero, so is the solution.

    Args:
      x: shape `(batch, *positions, features)`, of real floating dtype.
      scale: :math:`\gamma`, shape `(features,)`, or None for 1.
      bias: :math:`\beta`, shape `(features,)`, or None for 0.
      mean: shape `(features,)`, replaces the batch's own; give `var` too.
      var: shape `(features,)`, replaces the batch's own; give `mean` too.
      epsilon: what is added to the variance; at least 0. May be traced.
      dtype: of the output; None for the common dtype of `x`, `scale` and `bias`. All is
        computed in float32, or in float64 where `x` is.
      name: how error messages call the layer.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: where shapes do not fit, an array is empty or not of real floating
        dtype, or `epsilon` is negative.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> x = jnp.array([[-3.0], [3.0]])
      >>> y, pull_back = jax.vjp(exact.batch_norm, x)
      >>> print(y.round(4).T, pull_back(jnp.ones_like(y))[0].round(4).T)
      [[-1.  1.]] [[3. 3.]]
    """
    x = _features(name, x)
    not_negative(name, "epsilon", epsilon)
    if (mean is None) != (var is None):
        raise ValueError(f"{name}: give both mean and var, or neither")
    if mean is None or var is None:
        mean, var = batch_statistics(x)
    given = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    gamma, beta, mean, var = (
        None if array is None else real_array(name, argument, array, x.shape[-1:])
        for argument, array in given.items()
    )
    dtype = real_dtype(name, dtype, x, gamma, beta)
    std = jnp.sqrt(jnp.asarray(var, wide(x.dtype)) + epsilon)
    return _normalised(dtype, (x, gamma, beta, mean, std))


def _features(name: str, x: jax.typing.ArrayLike) -> jax.Array:
    array = real_array(name, "x", x)
    if array.ndim < 2:
        raise ValueError(
            f"{name}: expected x of shape (batch, *positions, features), but it has "
            f"shape {array.shape}"
        )
    return array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalised(dtype: jnp.dtype, arguments: tuple[Any, ...]) -> jax.Array:
    x, scale, bias, mean, std = arguments
    y = (x.astype(std.dtype) - mean) / std  # BM (24)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(dtype)


def _forward(dtype, arguments):
    return _normalised(dtype, arguments), arguments


def _backward(dtype, arguments, cotangent: jax.Array):
    x, scale, bias, mean, std = arguments
    cotangent, axes = cotangent.astype(std.dtype), tuple(range(x.ndim - 1))
    change, scale_change, bias_change = cotangent * std, None, None  # BM (26)
    if scale is not None:
        change = _divided(change, scale.astype(std.dtype))
        standardised = (x.astype(std.dtype) - mean) / std
        moment = jnp.square(standardised).sum(axes) / x.shape[0]
        gradient = (cotangent * standardised).sum(axes)
        scale_change = _divided(gradient, moment).astype(scale.dtype)
    if bias is not None:
        positions = math.prod(x.shape[1:-1])
        bias_change = (cotangent.sum(axes) / positions).astype(bias.dtype)
    statistics = jnp.zeros_like(mean), jnp.zeros_like(std)
    return ((change.astype(x.dtype), scale_change, bias_change, *statistics),)


def _divided(change: jax.Array, divisor: jax.Array) -> jax.Array:
    """The smallest least-squares solution: zero where the divisor is."""
    return jnp.where(divisor == 0, 0, change / jnp.where(divisor == 0, 1, divisor))


_normalised.defvjp(_forward, _backward)
