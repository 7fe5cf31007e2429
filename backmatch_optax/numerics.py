"""Dtypes, norms and counts that several modules need."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


@functools.cache
def wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype to compute in: float32, or float64 where one of them is."""
    widest = max((jnp.finfo(dtype).bits for dtype in dtypes), default=32)
    return jnp.dtype(jnp.float64 if widest == 64 else jnp.float32)


def scaled(update: jax.Array, scale: jax.Array | None) -> jax.Array:
    """An update times its scale, in its own dtype; without a scale as it is.

    A scale with axes has one number for each entry along the update's first axes.
    """
    if scale is None:
        return update
    update = jnp.asarray(update)  # of NumPy's float64, what JAX makes of it
    if scale.ndim:
        scale = jnp.expand_dims(scale, [*range(scale.ndim, update.ndim)])
    if jnp.iscomplexobj(update):
        return (update * scale).astype(update.dtype)
    # In the wider of the two dtypes: a scale above 65504 is no float16.
    dtype = wide(update.dtype, scale.dtype)
    return (update.astype(dtype) * scale.astype(dtype)).astype(update.dtype)


def frobenius_norm(entries: jax.Array, stacked: int = 0) -> jax.Array:
    """The root of the sum of squares, also where squares would leave the dtype.

    For each entry along the first axes, as many as are `stacked`.
    """
    # All axes at once: a reshape would gather, or refuse, a sharded array.
    over = {"axis": tuple(range(stacked, entries.ndim)), "keepdims": stacked > 0}
    largest = jnp.max(jnp.abs(entries), initial=0, **over)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit * jnp.sqrt(jnp.sum(jnp.square(entries / unit), **over))


def checked_count(name: str, count: Any) -> int:
    """An int of at least 1, or `ValueError`."""
    try:
        number = 0 if isinstance(count, bool) else operator.index(count)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} (={count!r}) must be an int of at least 1")
    return number


def check_number(
    name: str, value: Any, *, least: float, below: float = math.inf
) -> None:
    """Raises `ValueError` for what is no number from `least` to, not with, `below`.

    A scalar array counts as a number. Where it is traced, its value is not known.
    """
    if isinstance(value, Tracer) and value.shape == ():
        return
    is_scalar = (
        isinstance(value, jax.Array | np.ndarray | np.generic) and not value.ndim
    )
    number: Any = value.item() if is_scalar else value
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not least <= number < below:
        less = "a finite number" if below == math.inf else f"a number below {below}"
        raise ValueError(f"{name} (={value!r}) must be {less} of at least {least}")
