"""Checks of arguments that the functions and layers of `exact` share."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def real_array(
    name: str, argument: str, value: Any, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """An array of real floating dtype with entries, of a shape if given."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: {argument} must be an array, but it is a {type(value).__name__}"
        ) from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name}: {argument} must be of real floating dtype, but it is of "
            f"{array.dtype}"
        )
    if not array.size:
        raise ValueError(
            f"{name}: {argument} of shape {array.shape} has no entries; without them "
            "there is no mean over the batch"
        )
    if shape is not None and array.shape != shape:
        raise ValueError(
            f"{name}: expected {argument} of shape {shape}, but it has shape "
            f"{array.shape}"
        )
    return array


def real_dtype(name: str, dtype: Any, *arrays: jax.Array | None) -> jnp.dtype:
    """`dtype`, or without one the common dtype of `arrays`."""
    if dtype is None:
        return jnp.result_type(*(array for array in arrays if array is not None))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}: dtype (={dtype!r}) must be a real floating one")
    return jnp.dtype(dtype)


def not_negative(name: str, argument: str, value: Any) -> float | None:
    """A finite number of at least 0; None where it is traced and so unknown."""
    traced = isinstance(value, Tracer)
    scalar = value if traced else np.asarray(value)
    real = any(jnp.issubdtype(scalar.dtype, kind) for kind in (np.floating, np.integer))
    if scalar.shape or not real or not (traced or 0 <= float(scalar) < math.inf):
        raise ValueError(
            f"{name}: {argument} (={value!r}) must be a finite number, at least 0"
        )
    return None if traced else float(scalar)
