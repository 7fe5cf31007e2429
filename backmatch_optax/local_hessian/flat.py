"""A local Hessian as a linear map of flat vectors, for the linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from backmatch_optax.local_hessian.operator import (
    LocalHessian,
    output_at,
    product_with,
)

# Of a Jacobian: rows or columns with which all eigenvalues are computed, and entries
# in float64, a GiB.
_SMALL = 1024
MOST_ENTRIES = 2**27
# In epsilons, relative to the largest: a coupling below it ends a Krylov space, since
# what follows would start anew from rounding errors.
_EXHAUSTED = 100


class Flat(NamedTuple):
    """Linear maps of flat vectors, in the dtype the linear algebra is done in.

    `factor` is the Jacobian `J` where the Hessian is `J^T J`, else the Hessian: its
    singular values, squared where it is `J`, are the eigenvalues' sizes.
    """

    product: Callable[[jax.Array], jax.Array]
    factor: Callable[[jax.Array], jax.Array]
    rows: int  # of the factor; its columns are the Hessian's
    start: jax.Array  # shape=(size,), the point itself: what vectors look like


def flatten(hessian: LocalHessian) -> Flat:
    """The maps; the block itself runs once."""
    point, unravel = ravel_pytree(hessian.point)
    # matfree keeps its vectors in JAX's default dtype; bfloat16 would be too coarse.
    wide = jnp.promote_types(point.dtype, jnp.zeros(()).dtype)

    def flattened(linear: Callable[[Any], Any]) -> Callable[[jax.Array], jax.Array]:
        def apply(v: jax.Array) -> jax.Array:
            image = linear(unravel(v.astype(point.dtype)))
            return ravel_pytree(image)[0].astype(wide)

        return apply

    start = point.astype(wide)
    product = flattened(product_with(hessian))
    if hessian.target is not None:
        return Flat(product, product, start.size, start)
    jacobian = jax.linearize(lambda x: output_at(hessian, x), hessian.point)[1]
    return Flat(product, flattened(jacobian), factor_rows(hessian), start)


def factor_rows(hessian: LocalHessian) -> int:
    """Rows of the factor."""
    if hessian.target is not None:
        return hessian.size
    return jax.eval_shape(hessian.fn, hessian.params, hessian.z).size


def is_small(hessian: LocalHessian) -> bool:
    """Whether all eigenvalues cost seconds."""
    rows, size = factor_rows(hessian), hessian.size
    return min(rows, size) <= _SMALL and rows * size <= MOST_ENTRIES


def epsilon(hessian: LocalHessian) -> float:
    """Of the dtype that the block computes in."""
    dtype = jnp.result_type(*jax.tree.leaves(hessian.point), hessian.z)
    return float(jnp.finfo(dtype).eps)


def exhaustion(hessian: LocalHessian) -> float:
    """The coupling, relative to the largest, below which a Krylov space ends."""
    return min(_EXHAUSTED * epsilon(hessian), 0.01)  # bfloat16 has an epsilon of 0.008
