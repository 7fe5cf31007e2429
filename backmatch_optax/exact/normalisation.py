"""BatchNorm and ReLU with their back-matching rules."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backmatch_optax.exact.linear import _check_floating
from backmatch_optax.numerics import wide


def batch_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of every feature, over all axes but the last.

    Args:
      x: shape=(batch, *positions, features), of real floating dtype.

    Returns:
      Both of shape=(features,), dtype float32, or float64 where `x` is; no gradient
      flows through them.

    Raises:
      ValueError: where `x` has fewer than two axes, or no real floating dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> mean, var = exact.batch_statistics(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
      >>> print(mean, var)
      [2. 0.] [1. 0.]
    """
    _check_features("exact.batch_statistics", x)
    x = lax.stop_gradient(x).astype(wide(x.dtype))
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x - mean).mean(axes)


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array | None = None,
    var: jax.Array | None = None,
    epsilon: float = 1e-5,
    dtype: jax.typing.DTypeLike | None = None,
    name: str = "exact.batch_norm",
) -> jax.Array:
    r"""Batch normalisation, whose backward pass is back-matching propagation.

    .. math::
      b = \gamma \, \hat a + \beta, \quad
      \hat a = \frac{a - \mathbb{E}\, a}{\sqrt{\mathrm{Var}\, a + \epsilon}}
      \qquad \Rightarrow \qquad
      \delta' a = \delta b \, \frac{\sqrt{\mathrm{Var}\, a + \epsilon}}{\gamma}

    which is BM (26) for :math:`\gamma = 1`: as there, the change of one input leaves
    mean and variance as they are. So unlike BP's, what it hands back is not centred.
    For scale and bias, which the papers leave out, the least squares (10) is

    .. math::
      \delta' \gamma = \frac{\mathbb{E} \sum_u \hat a \, \delta b}
      {\mathbb{E} \sum_u \hat a^2}, \qquad
      \delta' \beta = \frac{\mathbb{E} \sum_u \delta b}{\text{positions}}

    for each by itself, and with the batch's own mean that is the joint solution too.
    Where :math:`\gamma` or :math:`\hat a` is all zero, so is the solution.

    Args:
      x: shape=(batch, *positions, features), of real floating dtype.
      scale: :math:`\gamma`, shape=(features,), or None for 1.
      bias: :math:`\beta`, shape=(features,), or None for 0.
      mean: shape=(features,), to normalise with in the place of the batch's own; give
        both or neither.
      var: shape=(features,).
      epsilon: what is added to the variance.
      dtype: of the output; None for the common dtype of `x`, `scale` and `bias`. All is
        computed in float32, or in float64 where `x` is.
      name: how error messages call the layer.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: where shapes do not fit, or a dtype is not real floating.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> x = jnp.array([[-3.0], [3.0]])
      >>> y, pull_back = jax.vjp(exact.batch_norm, x)
      >>> print(y.round(4).T, pull_back(jnp.ones_like(y))[0].round(4).T)
      [[-1.  1.]] [[3. 3.]]
    """
    _check_features(name, x)
    arrays = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    arrays = {argument: a for argument, a in arrays.items() if a is not None}
    _check_floating(name, arrays)
    for argument, array in arrays.items():
        if array.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: expected {argument} of shape {x.shape[-1:]}, but it has "
                f"shape {array.shape}"
            )
    if mean is None and var is None:
        mean, var = batch_statistics(x)
    if mean is None or var is None:
        raise ValueError(f"{name}: give both mean and var, or neither")
    if dtype is None:
        affine = [array for array in (scale, bias) if array is not None]
        dtype = jnp.result_type(x, *affine)
    config = (float(epsilon), jnp.dtype(dtype))
    return _normalised(config, x, scale, bias, mean, var)


def relu(x: jax.Array) -> jax.Array:
    """`jax.nn.relu`: its back-matched value is BP's own, BM (30), (31).

    An activation acts on each unit by itself, with derivative 1 or 0; the least squares
    (11) then gives what passes back, or nothing. At 0, where BM (29) takes the
    derivative 1, it is 0, as everywhere in JAX.

    Args:
      x: an array of any shape.

    Returns:
      The larger of `x` and 0.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> print(exact.relu(jnp.array([-2.0, 3.0])))
      [0. 3.]
    """
    return jax.nn.relu(x)


def _check_features(name: str, x: jax.Array) -> None:
    _check_floating(name, {"x": x})
    if x.ndim < 2:
        raise ValueError(
            f"{name}: expected x of shape (batch, *positions, features), but it has "
            f"shape {x.shape}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalised(
    config: tuple[float, Any],
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array,
    var: jax.Array,
) -> jax.Array:
    epsilon, dtype = config
    y = _standardised(x, mean, var, epsilon)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.astype(dtype)


def _standardised(
    x: jax.Array, mean: jax.Array, var: jax.Array, epsilon: float
) -> jax.Array:
    x = x.astype(wide(x.dtype))
    return (x - mean) * lax.rsqrt(var + epsilon)


def _forward(config, x, scale, bias, mean, var):
    y = _normalised(config, x, scale, bias, mean, var)
    return y, (x, scale, bias, mean, var)


def _backward(config, residuals, cotangent):
    x, scale, bias, mean, var = residuals
    epsilon, _ = config
    cotangent = cotangent.astype(wide(x.dtype))
    change = cotangent * jnp.sqrt(var + epsilon)
    scale_change = bias_change = None
    axes = tuple(range(x.ndim - 1))
    if scale is not None:
        change = _divided(change, scale.astype(change.dtype))
        standardised = _standardised(x, mean, var, epsilon)
        moment = jnp.square(standardised).sum(axes) / x.shape[0]
        gradient = (cotangent * standardised).sum(axes)
        scale_change = _divided(gradient, moment).astype(scale.dtype)
    if bias is not None:
        positions = math.prod(x.shape[1:-1])
        bias_change = (cotangent.sum(axes) / positions).astype(bias.dtype)
    return (
        change.astype(x.dtype),
        scale_change,
        bias_change,
        jnp.zeros_like(mean),
        jnp.zeros_like(var),
    )


def _divided(change: jax.Array, divisor: jax.Array) -> jax.Array:
    """The smallest least-squares solution: zero where the divisor is."""
    return jnp.where(divisor == 0, 0, change / jnp.where(divisor == 0, 1, divisor))


_normalised.defvjp(_forward, _backward)
