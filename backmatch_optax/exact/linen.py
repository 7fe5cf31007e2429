"""Flax Linen layers whose backward pass is back-matching propagation.

They take the arguments of Flax's own, and have their parameters and names: a model
changes its imports and nothing else. `Dense` and `Conv` take two more arguments:

* `damping`: the relative ridge, at least 0; see `backmatch_optax.exact.dense`.
* `decay`: how much of a running average of the second moment of the inputs each step
  keeps, in [0, 1); None solves with the batch's own. The average is kept, as a
  BatchNorm's, in a collection: `mutable=["batch_stats", "second_moments"]`. It is
  unbiased from the first step, which it includes.

An argument of Flax's that would have no effect raises `ValueError`. Flax's
`dot_general` is one: that function sees neither the bias, which is solved for together
with the kernel, nor what a circular padding repeats.

Use `nn.relu`, `nn.max_pool` without overlap and reshapes between the layers. Read layer
chains (`infer_spec`) off the model with Flax's own layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from backmatch_optax import exact
from backmatch_optax.exact.flax_layers import check_layer, moment_shape, solved

__all__ = ["BatchNorm", "Conv", "Dense"]


class _Exact(nn.Module):
    """Checks its arguments when it is made."""

    def __post_init__(self):
        check_layer(self, f"exact.linen.{type(self).__name__}")
        super().__post_init__()


def _name(layer: nn.Module) -> str:
    return f"exact.linen.{type(layer).__name__} at {'/'.join(layer.path)!r}"


class _Solved(_Exact):
    """What `Dense` and `Conv` share; the class after it is Flax's own."""

    damping: float = 0.0
    decay: float | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Acts on the last axes, spatial and features; the first is the batch."""
        if not self.has_variable("params", "kernel"):
            flax_layer: Any = super()
            flax_layer.__call__(inputs)  # makes the parameters, or says what is amiss
        params = nn.unbox(self.variables["params"])
        kernel, bias = params["kernel"], params.get("bias")
        arguments = (self, _name(self), inputs, kernel, bias)
        if self.decay is None:
            return solved(*arguments)[0]
        name, size = "second_moments", moment_shape(self, kernel)
        total = self.variable(name, "total", jnp.zeros, size)
        weight = self.variable(name, "weight", jnp.zeros, ())
        y, new = solved(*arguments, (total.value, weight.value))
        if self.is_mutable_collection(name) and not self.is_initializing():
            total.value, weight.value = new
        return y


class Dense(_Solved, nn.Dense):
    """`flax.linen.Dense` with the backward pass of `exact.dense`.

    Maps `(batch, ..., in)` to `(batch, ..., out)`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax.exact import linen
      >>> layer = linen.Dense(3, damping=1e-3)
      >>> x = jax.random.normal(jax.random.key(0), (8, 4))
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> direction = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)
      >>> jax.tree.map(jnp.shape, direction)
      {'bias': (3,), 'kernel': (4, 3)}
    """


class Conv(_Solved, nn.Conv):
    """`flax.linen.Conv` with the backward pass of `exact.conv`.

    Maps `(batch, *positions, in)` to `(batch, *positions_out, out)`.
    """


class BatchNorm(_Exact, nn.BatchNorm):
    """`flax.linen.BatchNorm` with the backward pass of `exact.batch_norm`.

    Keeps the shape, `(batch, ..., features)`. It takes no `axis`, `axis_name` or
    `mask`.
    """

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
        # Flax's own makes the parameters and keeps the averages.
        super().__call__(jax.lax.stop_gradient(jnp.asarray(x)), use_running_average)
        variables = nn.unbox(self.variables)
        params, stats = variables.get("params", {}), {}
        if self.use_running_average or use_running_average:
            stats = variables["batch_stats"]
        return exact.batch_norm(
            x,
            params.get("scale"),
            params.get("bias"),
            mean=stats.get("mean"),
            var=stats.get("var"),
            epsilon=self.epsilon,
            dtype=self.dtype,
            name=_name(self),
        )
