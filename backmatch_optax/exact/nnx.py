"""Flax NNX layers whose backward pass is back-matching propagation.

`Linear`, `Conv` and `BatchNorm` are to Flax's own what those of
`backmatch_optax.exact.linen` are, with the same `damping` and `decay`. The running
average is a `SecondMoment` variable, and after `model.eval()` it stays as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from backmatch_optax import exact
from backmatch_optax.exact.flax_layers import check_layer, moment_shape, solved

__all__ = ["BatchNorm", "Conv", "Linear", "SecondMoment"]


class SecondMoment(nnx.Variable):
    """What a running average of second moments is kept in."""


class _Solved(nnx.Module):
    """What `Linear` and `Conv` share."""

    def __init__(
        self,
        *args: Any,
        damping: float = 0.0,
        decay: float | None = None,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self.damping, self.decay = damping, decay
        check_layer(self, _name(self))
        if decay is not None:
            kernel = self.kernel  # pyright: ignore
            self.second_moment = SecondMoment(jnp.zeros(moment_shape(self, kernel)))
            self.second_moment_weight = SecondMoment(jnp.zeros(()))
            self.use_running_average = False  # what `eval` and `train` of a model set

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Acts on the last axes, spatial and features; the first is the batch."""
        if out_sharding is not None:
            raise ValueError(f"{_name(self)}: out_sharding is not supported")
        layer: Any = self  # Flax's own has its parameters
        arguments = (self, _name(self), inputs, layer.kernel[...], _value(layer.bias))
        if self.decay is None:
            return solved(*arguments)[0]
        total, weight = self.second_moment, self.second_moment_weight
        y, new = solved(*arguments, (total[...], weight[...]))
        if not self.use_running_average:
            total[...], weight[...] = new
        return y


def _name(layer: nnx.Module) -> str:
    return f"exact.nnx.{type(layer).__name__}"


def _value(parameter: nnx.Param | None) -> jax.Array | None:
    return None if parameter is None else parameter[...]


class Linear(_Solved, nnx.Linear):
    """`flax.nnx.Linear` with the backward pass of `exact.dense`.

    Maps `(batch, ..., in)` to `(batch, ..., out)`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from backmatch_optax.exact import nnx as exact_nnx
      >>> layer = exact_nnx.Linear(4, 3, damping=1e-3, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (8, 4))
      >>> direction = nnx.grad(lambda layer: layer(x).sum())(layer)
      >>> print(direction["kernel"].shape)
      (4, 3)
    """


class Conv(_Solved, nnx.Conv):
    """`flax.nnx.Conv` with the backward pass of `exact.conv`.

    Maps `(batch, *positions, in)` to `(batch, *positions_out, out)`.
    """


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with the backward pass of `exact.batch_norm`.

    Keeps the shape, `(batch, ..., features)`. It takes no `axis`, `axis_name` or
    `mask`.
    """

    def __init__(self, num_features: int, **options: Any):
        super().__init__(num_features, **options)
        check_layer(self, _name(self))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises every feature, over all axes but the last."""
        if mask is not None:
            raise ValueError(f"{_name(self)}: mask is not supported")
        # Flax's own keeps the averages.
        super().__call__(jax.lax.stop_gradient(jnp.asarray(x)), use_running_average)
        frozen = use_running_average
        frozen = self.use_running_average if frozen is None else frozen
        return exact.batch_norm(
            x,
            _value(self.scale),
            _value(self.bias),
            mean=self.mean[...] if frozen else None,
            var=self.var[...] if frozen else None,
            epsilon=self.epsilon,
            dtype=self.dtype,
            name=_name(self),
        )
