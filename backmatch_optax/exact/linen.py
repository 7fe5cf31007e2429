"""Flax Linen layers whose backward pass is back-matching propagation.

They take the arguments of Flax's own, and have their parameters and names: a model
changes its imports and nothing else. Those of linear layers take two more:

* `damping`: the relative ridge, see `backmatch_optax.exact.dense`.
* `decay`: how much of a running average of the second moment of the inputs each step
  keeps, in [0, 1); None solves with the batch's own. The average is kept, as a
  BatchNorm's, in a collection: `mutable=["batch_stats", "second_moments"]`. It weighs
  the steps it has seen, so that it is unbiased from the first, which it includes.

Use `nn.relu`, `nn.max_pool` without overlap, reshapes and dropout between them. Read
layer chains (`infer_spec`) off the model with Flax's own layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from backmatch_optax import exact
from backmatch_optax.exact.running import averaged, check_decay

__all__ = ["BatchNorm", "Conv", "Dense"]


class Dense(nn.Dense):
    """`flax.linen.Dense` with the backward pass of `exact.dense`.

    Maps (batch, ..., in) to (batch, ..., out).

    Attributes:
      damping: the relative ridge, at least 0.
      decay: of the running average of the second moment; None for the batch's own.

    Raises:
      ValueError: in `init` and `apply`, where `damping` is below 0, `decay` is not in
        [0, 1) or an argument of Flax's that would have no effect is given.

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

    damping: float = 0.0
    decay: float | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Acts on the last axis; the first is the batch."""
        _refuse(self, "dot_general", "dot_general_cls", "promote_dtype")
        shape = (inputs.shape[-1], self.features)
        kernel, bias = _kernel_and_bias(self, shape)
        return exact.dense(
            inputs,
            kernel,
            bias,
            damping=self.damping,
            second_moment=_running(self, inputs, kernel, bias),
            dtype=self.dtype,
            precision=self.precision,
            name=_name(self),
        )


class Conv(nn.Conv):
    """`flax.linen.Conv` with the backward pass of `exact.conv`.

    Maps (batch, *positions, in) to (batch, *positions_out, out).

    Attributes:
      damping: the relative ridge, at least 0.
      decay: of the running average of the second moment; None for the batch's own.

    Raises:
      ValueError: in `init` and `apply`, where `damping` is below 0, `decay` is not in
        [0, 1) or an argument of Flax's that would have no effect is given.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax.exact import linen
      >>> layer = linen.Conv(3, (3, 3), use_bias=False)
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> params = layer.init(jax.random.key(1), x)["params"]
      >>> direction = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)
      >>> jax.tree.map(jnp.shape, direction)
      {'kernel': (3, 3, 1, 3)}
    """

    damping: float = 0.0
    decay: float | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Acts on the last axes, spatial and features; the first is the batch."""
        _refuse(
            self,
            "input_dilation",
            "mask",
            "promote_dtype",
            "conv_general_dilated",
            "conv_general_dilated_cls",
        )
        size = self.kernel_size
        window = tuple(size) if isinstance(size, Sequence) else (size,)
        fan_in = inputs.shape[-1] // self.feature_group_count
        kernel, bias = _kernel_and_bias(self, (*window, fan_in, self.features))
        geometry = {
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
            name=_name(self),
            **geometry,
        )


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` with the backward pass of `exact.batch_norm`.

    Keeps the shape, (batch, ..., features).

    Raises:
      ValueError: in `init` and `apply`, where an `axis`, an `axis_name` or a `mask` is
        given.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax.exact import linen
      >>> layer = linen.BatchNorm(use_running_average=False)
      >>> x = jnp.array([[-3.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, _ = layer.apply(variables, x, mutable=["batch_stats"])
      >>> print(y.round(4).T)
      [[-1.  1.]]
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises every feature, over all axes but the last."""
        _refuse(self, "axis", "axis_name", "axis_index_groups")
        if mask is not None:
            raise ValueError(f"{_name(self)}: exact BatchNorm takes no mask")
        frozen = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        used = mean.value, var.value
        if not frozen:
            used = exact.batch_statistics(x)
            if not self.is_initializing():
                for average, of_batch in zip((mean, var), used, strict=True):
                    kept = self.momentum * average.value
                    average.value = kept + (1 - self.momentum) * of_batch
        return exact.batch_norm(
            x,
            scale,
            bias,
            mean=used[0],
            var=used[1],
            epsilon=self.epsilon,
            dtype=self.dtype,
            name=_name(self),
        )


def _name(module: nn.Module) -> str:
    path = "/".join(module.path)
    return f"exact.linen.{type(module).__name__} at {path!r}"


def _refuse(module: nn.Module, *arguments: str) -> None:
    """An argument of Flax's layer that would have no effect is an error."""
    defaults = {field.name: field.default for field in dataclasses.fields(module)}
    for argument in arguments:
        if getattr(module, argument, None) is not defaults.get(argument):
            raise ValueError(f"{_name(module)}: {argument} is not supported")


def _kernel_and_bias(
    module: nn.Dense | nn.Conv, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    kernel = module.param("kernel", module.kernel_init, shape, module.param_dtype)
    if not module.use_bias:
        return kernel, None
    bias = module.param("bias", module.bias_init, shape[-1:], module.param_dtype)
    return kernel, bias


def _running(
    module: Dense | Conv,
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    **geometry,
) -> jax.Array | None:
    check_decay(_name(module), module.decay)
    if module.decay is None:
        return None
    moment = exact.second_moment(inputs, kernel, bias, **geometry)
    total = module.variable("second_moments", "total", jnp.zeros_like, moment)
    weight = module.variable("second_moments", "weight", jnp.zeros, ())
    average, new_total, new_weight = averaged(
        moment, total.value, weight.value, module.decay
    )
    if module.is_mutable_collection("second_moments") and not module.is_initializing():
        total.value, weight.value = new_total, new_weight
    return average
