"""All eigenvalues of a small block, and the condition number of any block."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax.local_hessian.krylov import (
    checked_matvecs,
    flat_factor,
    krylov_steps,
    matfree_decomp,
    rounding,
)
from backmatch_optax.local_hessian.operator import LocalHessian, factor_shape

# Of the Jacobian of a block that gets all its eigenvalues: the lesser of rows and
# columns, and the entries, which are a GiB in float64.
_SMALL = 1024
_MOST_ENTRIES = 2**27
_CONVERGED = 0.01  # relative residual of a singular value


def eigenvalues(hessian: LocalHessian) -> np.ndarray:
    """All eigenvalues of the local Hessian of a small block.

    Forms the Jacobian, and takes its singular values in float64. With a target it forms
    the Hessian itself.

    Args:
      hessian: a local Hessian.

    Returns:
      Float64 numbers in ascending order, shape `(size,)`. Rounding errors are 0: from
      singular values of the Jacobian, or with a target from eigenvalues, of up to 10
      epsilons of the block's dtype (in float64 up to 64), relative to the largest.

    Raises:
      ValueError: where the Jacobian would have more than 2^27 entries, or is not
        finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import local_hessian
      >>> hessian = local_hessian.input_hessian(
      ...     lambda kernel, z: z @ kernel, jnp.diag(jnp.arange(3.0)), jnp.ones((1, 3))
      ... )
      >>> print(local_hessian.eigenvalues(hessian))
      [0. 1. 4.]
    """
    rows, size = factor_shape(hessian)
    if rows * size > _MOST_ENTRIES:
        raise ValueError(
            f"a Jacobian of {rows} x {size} is too large for all eigenvalues; use "
            "spectrum or condition, or fewer examples"
        )
    matrix = np.asarray(_dense(hessian), np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError("the block's Jacobian is not finite")
    if hessian.target is not None:
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    elif rounding(hessian) < 1e-8:
        values = np.linalg.svd(matrix, compute_uv=False)[::-1]
    else:  # a fifth of the time, and rounding errors of the block are larger
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(matrix @ matrix.T), 0))
    sizes = np.abs(values)
    values = np.where(sizes > rounding(hessian) * sizes.max(), values, 0.0)
    if hessian.target is not None:
        return values
    return np.concatenate([np.zeros(size - len(values)), values**2])


@jax.jit
def _dense(hessian: LocalHessian) -> jax.Array:
    """The factor or its transpose, whichever has fewer rows than columns."""
    with jax.default_matmul_precision("highest"):
        factor, point = flat_factor(hessian)
        transposed = jax.linear_transpose(factor, point)
        rows, size = factor_shape(hessian)
        lesser = min(rows, size)

        def row(i: jax.Array) -> jax.Array:
            unit = jnp.zeros(lesser, point.dtype).at[i].set(1)
            return transposed(unit)[0] if rows < size else factor(unit)

        return jax.lax.map(row, jnp.arange(lesser), batch_size=64)


class Condition(NamedTuple):
    """What `condition` returns: the extreme non-zero eigenvalues, by absolute value.

    Printed, it is the condition number, with `>=` where it is a lower bound.
    """

    largest: float
    smallest: float  # of those that are not zero; an upper bound where not `converged`
    zeros: float  # share of the eigenvalues that are zero; NaN where not exact
    converged: bool  # both ends are eigenvalues to within 1 %
    exact: bool  # from all eigenvalues

    @property
    def number(self) -> float:
        """The condition number of the Hessian, the square of the Jacobian's."""
        return self.largest / self.smallest if self.smallest else math.nan

    def __str__(self) -> str:
        if math.isnan(self.number):
            return "all zero"
        return f"{'' if self.converged else '>= '}{self.number:.3g}"


def condition(
    hessian: LocalHessian, *, key: jax.Array, num_matvecs: int | None = None
) -> Condition:
    r"""The condition number: largest over smallest non-zero eigenvalue (LH 3.2).

    LH's `C` of a Jacobian is over its singular values. It is the square root of this
    condition number of the Gauss-Newton matrix.

    Small blocks get all their eigenvalues, and the answer is exact. Small means up to
    1024 rows or columns of the Jacobian and up to 2^27 entries. Other blocks get
    matfree's Golub-Kahan bidiagonalisation with full reorthogonalisation, from a start
    within the range of :math:`J^T`. Its answer is a lower bound:

    * A Ritz value :math:`\theta` is at most the largest eigenvalue.
    * The smallest non-zero eigenvalue is at most :math:`\theta / (1 - \rho^2)`. Here
      :math:`\rho < 1` is the relative residual, rounding errors included. No more than
      :math:`\rho` of the Ritz vector can lie in the null space.

    `converged` says that the residuals place an eigenvalue within 1 % of both ends. No
    Krylov method can know that there is no smaller one: it does not see a direction
    whose share of the start is a rounding error. The upper end converges within few
    products, the lower end slowly. After several layers the spectrum usually reaches
    down to zero without a gap, and the lower end does not converge in practice. In
    bfloat16 rounding errors alone exceed 1 %.

    Needs memory for `num_matvecs` vectors like `hessian.point` and as many like the
    block's output.

    Args:
      hessian: a local Hessian.
      key: key of the random start.
      num_matvecs: products with the Jacobian and back, at least 1 and at most the
        lesser of its rows and columns, also for a small block; None for all eigenvalues
        of a small block and for 64 of others.

    Returns:
      A `Condition`. Of a Hessian that is zero both ends are 0, and the number is NaN.

    Raises:
      ValueError: where `num_matvecs` is out of range, or the Jacobian is not finite.
      ImportError: where matfree is needed and not installed.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import local_hessian
      >>> hessian = local_hessian.input_hessian(
      ...     lambda kernel, z: z @ kernel, jnp.diag(jnp.arange(4.0)), jnp.ones((1, 4))
      ... )
      >>> conditioned = local_hessian.condition(hessian, key=jax.random.key(0))
      >>> print(conditioned, conditioned.zeros)
      9 0.25
    """
    if num_matvecs is None and is_small(hessian):
        sizes = np.sort(np.abs(eigenvalues(hessian)))
        found = sizes[sizes > 0]
        smallest, largest = found[[0, -1]] if len(found) else (0.0, 0.0)
        zeros = 1 - len(found) / hessian.size
        return Condition(float(largest), float(smallest), zeros, True, True)
    matvecs = checked_matvecs(num_matvecs, min(factor_shape(hessian)))
    upper, norm, last = (
        np.asarray(array, np.float64) for array in _bidiagonal(hessian, key, matvecs)
    )
    if not np.isfinite(norm):
        raise ValueError("the block's Jacobian is not finite")
    # In the order they were computed in: diagonal and upper diagonal take turns.
    above = np.append(np.diagonal(upper, 1), last)
    couplings = np.stack([np.diagonal(upper), above], axis=1).ravel()
    steps = krylov_steps(hessian, couplings, couplings)
    if steps == 0:
        return Condition(0.0, 0.0, math.nan, True, False)
    left, values, _ = np.linalg.svd(
        upper[: (steps + 1) // 2, : steps // 2 + 1], full_matrices=False
    )
    error = rounding(hessian) * values[0]
    left, values = left[-1, values > error], values[values > error]
    residual = last if steps == len(couplings) else 0.0
    residuals = (residual * np.abs(left) + error) / values
    inside = residuals < 1
    bounds = values[inside] / np.sqrt(1 - residuals[inside] ** 2)
    power = 2 if hessian.target is None else 1
    return Condition(
        largest=float(values[0] ** power),
        smallest=float(bounds.min(initial=values[0]) ** power),
        zeros=math.nan,
        converged=bool(max(residuals[0], residuals[-1]) <= _CONVERGED),
        exact=False,
    )


def is_small(hessian: LocalHessian) -> bool:
    """Whether all eigenvalues cost seconds."""
    shape = factor_shape(hessian)
    return min(shape) <= _SMALL and math.prod(shape) <= _MOST_ENTRIES


@functools.partial(jax.jit, static_argnums=2)
def _bidiagonal(
    hessian: LocalHessian, key: jax.Array, num_matvecs: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The factor's upper bidiagonal matrix, the start's norm and the last coupling."""
    bidiag = matfree_decomp().bidiag
    with jax.default_matmul_precision("highest"):
        factor, point = flat_factor(hessian)
        rows = factor_shape(hessian)[0]
        transposed = jax.linear_transpose(factor, point)
        (start,) = transposed(jax.random.normal(key, (rows,), point.dtype))
        decomposed = bidiag(num_matvecs, reortho="full")(factor, start)
    norms = (jnp.linalg.norm(start), jnp.linalg.norm(decomposed.residual))
    return decomposed.J_small, *norms
