"""What the Flax layers of `exact.linen` and `exact.nnx` share."""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax

from backmatch_optax import exact
from backmatch_optax.exact.arguments import not_negative

# Flax's own arguments that would have no effect.
_REFUSED = set(
    "axis axis_index_groups axis_name conv_general_dilated conv_general_dilated_cls "
    "dot_general dot_general_cls input_dilation mask preferred_element_type "
    "promote_dtype".split()
)


def check_layer(layer: Any, name: str) -> None:
    """Raises `ValueError` where a layer is given what it cannot follow."""
    for argument in ("damping", "epsilon"):
        not_negative(name, argument, getattr(layer, argument, 0))
    decay = getattr(layer, "decay", None)
    if decay is not None and not (isinstance(decay, float | int) and 0 <= decay < 1):
        raise ValueError(f"{name}: decay (={decay!r}) must be in [0, 1), or None")
    flax_layer = next(c for c in type(layer).__mro__ if c.__module__[:5] == "flax.")
    parameters = inspect.signature(flax_layer.__init__).parameters
    for argument in parameters.keys() & _REFUSED:
        given = getattr(layer, argument)
        if given is not parameters[argument].default:
            raise ValueError(f"{name}: {argument} (={given!r}) is not supported")


def moment_shape(layer: Any, kernel: jax.Array) -> tuple[int, int, int]:
    """The shape of what a layer keeps a running average of."""
    unknowns = math.prod(kernel.shape[:-1]) + layer.use_bias
    return getattr(layer, "feature_group_count", 1), unknowns, unknowns


def solved(
    layer: Any, name: str, x: jax.Array, kernel: jax.Array, bias: Any, kept: Any = None
) -> tuple[jax.Array, Any]:
    """The output of `exact.dense` or `exact.conv`, and the new running average.

    The average is kept as a pair, its total and its weight. So it is unbiased from the
    first step, which it includes.
    """
    function: Any = exact.dense
    geometry, average = {}, None
    if kernel.ndim > 2:
        function = exact.conv
        for option in ("strides", "padding", "kernel_dilation", "feature_group_count"):
            geometry[option] = getattr(layer, option)
    if kept is not None:
        moment = exact.second_moment(x, kernel, bias, **geometry)
        total = layer.decay * kept[0] + (1 - layer.decay) * moment
        weight = layer.decay * kept[1] + (1 - layer.decay)
        average, kept = total / weight, (total, weight)
    y = function(
        x,
        kernel,
        bias,
        damping=layer.damping,
        second_moment=average,
        dtype=layer.dtype,
        precision=layer.precision,
        name=name,
        **geometry,
    )
    return y, kept
