"""What the estimates share: flat vectors, rounding errors, ends of Krylov spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from backmatch_optax.local_hessian.operator import LocalHessian, factor
from backmatch_optax.numerics import checked_count

NUM_MATVECS = 64


def matfree_decomp() -> Any:
    """The decompositions of matfree, or `ImportError` that says what to install."""
    try:
        from matfree import decomp
    except ImportError as error:
        raise ImportError(
            "backmatch_optax.local_hessian estimates spectra with matfree, which is "
            'not installed: pip install "backmatch-optax[local-hessian]"'
        ) from error
    return decomp


def flat_factor(
    hessian: LocalHessian,
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """The factor as a map of flat vectors, and the point, as a vector it takes."""
    point, unravel = ravel_pytree(hessian.point)
    # matfree keeps its vectors in JAX's default dtype. bfloat16 would be too coarse.
    wide = jnp.promote_types(point.dtype, jnp.zeros(()).dtype)
    linear = factor(hessian)

    def apply(v: jax.Array) -> jax.Array:
        image = linear(unravel(v.astype(point.dtype)))
        return ravel_pytree(image)[0].astype(wide)

    return apply, point.astype(wide)


def rounding(hessian: LocalHessian) -> float:
    """The largest rounding error in a singular value, relative to the largest value.

    Singular values that should be zero were found within one epsilon of the block's
    dtype. The second number is the accuracy of LAPACK's decompositions in float64.
    """
    dtype = jnp.result_type(*jax.tree.leaves(hessian.point), hessian.z)
    return max(10 * float(jnp.finfo(dtype).eps), 64 * np.finfo(float).eps)


def krylov_steps(
    hessian: LocalHessian, couplings: np.ndarray, sizes: np.ndarray
) -> int:
    """How many couplings come before the first that vanishes, or all of them.

    A coupling vanishes where it is a rounding error of the largest of the `sizes` so
    far. It ends the Krylov space: later numbers start anew from rounding errors, or are
    NaN from a division by zero.
    """
    tolerance = min(rounding(hessian), 0.01)  # 10 epsilons of bfloat16 are 0.08
    vanish = ~(couplings > tolerance * np.fmax.accumulate(sizes))
    return int(np.append(vanish, True).argmax())


def checked_matvecs(num_matvecs: Any, most: int) -> int:
    """A number of products up to `most`; None is 64, or `most` where that is less."""
    if num_matvecs is None:
        return min(NUM_MATVECS, most)
    matvecs = checked_count("num_matvecs", num_matvecs)
    if matvecs > most:
        raise ValueError(
            f"num_matvecs (={num_matvecs!r}) must be at most the dimension, {most}"
        )
    return matvecs
