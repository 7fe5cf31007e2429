"""Flax NNX layers whose backward pass is back-matching propagation.

They take the arguments of Flax's own, and have their parameters and names: a model
changes its imports and nothing else. Those of linear layers take two more:

* `damping`: the relative ridge, see `backmatch_optax.exact.dense`.
* `decay`: how much of a running average of the second moment of the inputs each call
  keeps, in [0, 1); None solves with the batch's own. The average is a `SecondMoment`
  variable, unbiased from the first call, which it includes; after `model.eval()` it
  stays as it is.

Use `nnx.relu`, `nnx.max_pool` without overlap, reshapes and dropout between them. Read
layer chains (`infer_spec`) off the model with Flax's own layers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from backmatch_optax import exact
from backmatch_optax.exact.running import averaged, check_decay

__all__ = ["BatchNorm", "Conv", "Linear", "SecondMoment"]


class SecondMoment(nnx.Variable):
    """What a running average of second moments is kept in."""


class Linear(nnx.Linear):
    """`flax.nnx.Linear` with the backward pass of `exact.dense`.

    Maps (batch, ..., in) to (batch, ..., out).

    Args:
      in_features: features of the input.
      out_features: features of the output.
      damping: the relative ridge, at least 0.
      decay: of the running average of the second moment; None for the batch's own.
      **options: the other arguments of `nnx.Linear`.

    Raises:
      ValueError: where `decay` is not in [0, 1) or an argument of Flax's that would
        have no effect is given; in a call, where `damping` is below 0 or an
        `out_sharding` is given.

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

    damping: float
    decay: float | None
    second_moment: SecondMoment
    second_moment_weight: SecondMoment
    use_running_average: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        damping: float = 0.0,
        decay: float | None = None,
        **options: Any,
    ):
        _refuse(
            nnx.Linear,
            options,
            "dot_general",
            "dot_general_cls",
            "preferred_element_type",
            "promote_dtype",
        )
        super().__init__(in_features, out_features, **options)
        _keep(self, damping, decay, 1, in_features)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Acts on the last axis; the first is the batch."""
        _refuse_sharding(out_sharding)
        kernel, bias = _kernel_and_bias(self)
        return exact.dense(
            inputs,
            kernel,
            bias,
            damping=self.damping,
            second_moment=_running(self, inputs, kernel, bias),
            dtype=self.dtype,
            precision=self.precision,
            name="exact.nnx.Linear",
        )


class Conv(nnx.Conv):
    """`flax.nnx.Conv` with the backward pass of `exact.conv`.

    Maps (batch, *positions, in) to (batch, *positions_out, out).

    Args:
      in_features: features of the input.
      out_features: features of the output.
      kernel_size: the window.
      damping: the relative ridge, at least 0.
      decay: of the running average of the second moment; None for the batch's own.
      **options: the other arguments of `nnx.Conv`.

    Raises:
      ValueError: where `decay` is not in [0, 1) or an argument of Flax's that would
        have no effect is given; in a call, where `damping` is below 0 or an
        `out_sharding` is given.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from backmatch_optax.exact import nnx as exact_nnx
      >>> layer = exact_nnx.Conv(1, 3, (3, 3), rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> direction = nnx.grad(lambda layer: layer(x).sum())(layer)
      >>> print(direction["kernel"].shape)
      (3, 3, 1, 3)
    """

    damping: float
    decay: float | None
    second_moment: SecondMoment
    second_moment_weight: SecondMoment
    use_running_average: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        damping: float = 0.0,
        decay: float | None = None,
        **options: Any,
    ):
        _refuse(
            nnx.Conv,
            options,
            "input_dilation",
            "mask",
            "promote_dtype",
            "conv_general_dilated",
            "preferred_element_type",
        )
        super().__init__(in_features, out_features, kernel_size, **options)
        window = math.prod(self.kernel.shape[:-2])
        groups = self.feature_group_count
        _keep(self, damping, decay, groups, window * (in_features // groups))

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Acts on the last axes, spatial and features; the first is the batch."""
        _refuse_sharding(out_sharding)
        kernel, bias = _kernel_and_bias(self)
        geometry: dict[str, Any] = {
            "strides": self.strides,
            "padding": self.padding,
            "kernel_dilation": self.kernel_dilation,
            "feature_group_count": self.feature_group_count,
        }
        return exact.conv(
            inputs,
            kernel,
            bias,
            damping=self.damping,
            second_moment=_running(self, inputs, kernel, bias, **geometry),
            dtype=self.dtype,
            precision=self.precision,
            name="exact.nnx.Conv",
            **geometry,
        )


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with the backward pass of `exact.batch_norm`.

    Keeps the shape, (batch, ..., features).

    Args:
      num_features: features of the input.
      **options: the other arguments of `nnx.BatchNorm`.

    Raises:
      ValueError: where an `axis`, an `axis_name` or a `mask` is given.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from backmatch_optax.exact import nnx as exact_nnx
      >>> layer = exact_nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.array([[-3.0], [3.0]])).round(4).T)
      [[-1.  1.]]
    """

    def __init__(self, num_features: int, **options: Any):
        _refuse(
            nnx.BatchNorm,
            options,
            "axis",
            "axis_name",
            "axis_index_groups",
            "promote_dtype",
        )
        super().__init__(num_features, **options)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises every feature, over all axes but the last."""
        if mask is not None:
            raise ValueError("exact.nnx.BatchNorm takes no mask")
        frozen = use_running_average
        frozen = self.use_running_average if frozen is None else frozen
        used = self.mean[...], self.var[...]
        if not frozen:
            used = exact.batch_statistics(x)
            for average, of_batch in zip((self.mean, self.var), used, strict=True):
                kept = self.momentum * average[...]
                average[...] = kept + (1 - self.momentum) * of_batch
        return exact.batch_norm(
            x,
            None if self.scale is None else self.scale[...],
            None if self.bias is None else self.bias[...],
            mean=used[0],
            var=used[1],
            epsilon=self.epsilon,
            dtype=self.dtype,
            name="exact.nnx.BatchNorm",
        )


def _refuse(layer: Any, options: dict[str, Any], *arguments: str) -> None:
    """An argument of Flax's layer that would have no effect is an error."""
    parameters = inspect.signature(layer.__init__).parameters
    for argument in options.keys() & set(arguments):
        if options[argument] is not parameters[argument].default:
            raise ValueError(f"exact.nnx.{layer.__name__}: {argument} is not supported")


def _refuse_sharding(out_sharding: Any) -> None:
    if out_sharding is not None:
        raise ValueError("exact.nnx: out_sharding is not supported")


def _keep(
    layer: Linear | Conv, damping: float, decay: float | None, groups: int, fan_in: int
) -> None:
    check_decay(f"exact.nnx.{type(layer).__name__}", decay)
    layer.damping, layer.decay = damping, decay
    if decay is not None:
        n = fan_in + layer.use_bias
        layer.second_moment = SecondMoment(jnp.zeros((groups, n, n)))
        layer.second_moment_weight = SecondMoment(jnp.zeros(()))
        layer.use_running_average = False  # what `eval` and `train` of a model set


def _kernel_and_bias(layer: nnx.Linear | nnx.Conv) -> tuple[jax.Array, Any]:
    return layer.kernel[...], None if layer.bias is None else layer.bias[...]


def _running(
    layer: Linear | Conv,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    **geometry: Any,
) -> jax.Array | None:
    if layer.decay is None:
        return None
    moment = exact.second_moment(inputs, kernel, bias, **geometry)
    total, weight = layer.second_moment, layer.second_moment_weight
    average, *new = averaged(moment, total[...], weight[...], layer.decay)
    if not layer.use_running_average:
        total[...], weight[...] = new
    return average
