"""What is estimated of a local Hessian: mean, spectral density, condition number."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax.local_hessian.flat import (
    MOST_ENTRIES,
    epsilon,
    exhaustion,
    factor_rows,
    flatten,
    is_small,
)
from backmatch_optax.local_hessian.operator import LocalHessian
from backmatch_optax.numerics import checked_count

# In epsilons, relative to the largest: a singular value below it is a rounding error
# (those of rank-deficient blocks are within one epsilon).
_ZERO = 10
_CONVERGED = 0.01  # relative residual of an eigenvalue
NUM_MATVECS = 64


def _matfree() -> tuple[Any, Any]:
    try:
        from matfree import decomp, stochtrace
    except ImportError as error:
        raise ImportError(
            "backmatch_optax.local_hessian estimates spectra with matfree, which is "
            'not installed: pip install "backmatch-optax[local-hessian]"'
        ) from error
    return decomp, stochtrace


def check_count(name: str, count: Any, most: int | None = None) -> int:
    """A count of at least 1 and at most `most`, the dimension, or `ValueError`."""
    number = checked_count(name, count)
    if most is not None and number > most:
        raise ValueError(f"{name} (={count!r}) must be at most the dimension, {most}")
    return number


class MeanDiagonal(NamedTuple):
    """What `mean_diagonal` returns; the trace is `size` times it."""

    mean: float
    standard_error: float  # NaN from a single probe


def mean_diagonal(
    hessian: LocalHessian, *, key: jax.Array, num_probes: int = 8
) -> MeanDiagonal:
    """The mean of the diagonal, which is the mean eigenvalue.

    Of the Gauss-Newton parts it is `m_z` and `m_W`, the two scalars by which LH's
    Algorithm 2 stands for a local Hessian, and which `layer_scales` predicts from norms
    and shapes. Hutchinson's estimator: `v^T H v` with random signs `v`.

    Args:
      hessian: a local Hessian.
      key: key of the random signs.
      num_probes: the number of products, at least 1. The standard error falls with its
        square root.

    Returns:
      The mean and its standard error.

    Raises:
      ValueError: where `num_probes` is below 1.
      ImportError: where matfree is not installed.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import local_hessian
      >>> hessian = local_hessian.input_hessian(
      ...     lambda kernel, z: z @ kernel, 2 * jnp.eye(4), jnp.ones((3, 4))
      ... )
      >>> local_hessian.mean_diagonal(hessian, key=jax.random.key(0)).mean
      4.0
    """
    probes = check_count("num_probes", num_probes)
    # A loop inside would run convolutions several times as slowly on CPU.
    traces = [_trace(hessian, probe) for probe in jax.random.split(key, probes)]
    samples = np.asarray(traces, np.float64) / hessian.size
    error = samples.std(ddof=1) / math.sqrt(probes) if probes > 1 else math.nan
    return MeanDiagonal(float(samples.mean()), float(error))


@jax.jit
def _trace(hessian: LocalHessian, key: jax.Array) -> jax.Array:
    stochtrace = _matfree()[1]
    # On GPUs the default precision of float32 products is lower.
    with jax.default_matmul_precision("highest"):
        flat = flatten(hessian)
        signs = stochtrace.sampler_signs(flat.start, num=1)
        estimate = stochtrace.estimator_monte_carlo(
            stochtrace.monte_carlo_trace(), signs
        )
        return estimate(flat.product, key)


def eigenvalues(hessian: LocalHessian) -> np.ndarray:
    """All eigenvalues of the local Hessian of a small block.

    Forms the Jacobian, and its Gram matrix in float64.

    Args:
      hessian: a local Hessian.

    Returns:
      Float64 numbers in ascending order, shape `(size,)`. Those of a Gauss-Newton part
      that are within rounding of zero, 10 epsilons of the block's dtype for singular
      values of the Jacobian, are 0.

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
    rows, size = factor_rows(hessian), hessian.size
    if rows * size > MOST_ENTRIES:
        raise ValueError(
            f"a Jacobian of {rows} x {size} is too large for all eigenvalues; use "
            "spectrum or condition, or fewer examples"
        )
    with jax.default_matmul_precision("highest"):
        factor = np.asarray(_dense_factor(hessian), np.float64)
    if not np.isfinite(factor).all():
        raise ValueError("the block's Jacobian is not finite")
    if hessian.target is not None:
        return np.linalg.eigvalsh((factor + factor.T) / 2)
    gram = factor @ factor.T if rows < size else factor.T @ factor
    values = np.linalg.eigvalsh(gram)
    least = max((_ZERO * epsilon(hessian)) ** 2, len(gram) * np.finfo(float).eps)
    values[values <= least * values[-1]] = 0.0
    return np.concatenate([np.zeros(size - len(values)), values])


@jax.jit
def _dense_factor(hessian: LocalHessian) -> jax.Array:
    """The Jacobian, or the Hessian itself; shape=(rows, size)."""
    flat = flatten(hessian)
    size, dtype = flat.start.size, flat.start.dtype
    if flat.rows < size:
        transposed = jax.linear_transpose(flat.factor, flat.start)
        units = jnp.arange(flat.rows)
        return jax.lax.map(
            lambda i: transposed(jnp.zeros(flat.rows, dtype).at[i].set(1))[0],
            units,
            batch_size=64,
        )
    return jax.lax.map(
        lambda i: flat.factor(jnp.zeros(size, dtype).at[i].set(1)),
        jnp.arange(size),
        batch_size=64,
    ).T


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """An estimate of the density of eigenvalues: points with weights that sum to 1."""

    nodes: np.ndarray  # ascending; shape=(num_nodes,), dtype=float64
    weights: np.ndarray  # shape=(num_nodes,), dtype=float64
    size: int  # the number of eigenvalues

    @property
    def mean(self) -> float:
        """The mean eigenvalue."""
        return float(self.nodes @ self.weights)

    def cdf(self, x: Any) -> np.ndarray:
        """The share of eigenvalues up to `x`, any shape; a node counts by half at it.

        Args:
          x: where to evaluate.
        """
        x = np.asarray(x, np.float64)
        sums = np.concatenate([[0.0], np.cumsum(self.weights)])
        below = np.searchsorted(self.nodes, x, side="left")
        upto = np.searchsorted(self.nodes, x, side="right")
        return (sums[below] + sums[upto]) / 2

    def density(self, x: Any, *, width: float) -> np.ndarray:
        """The density at `x`, any shape, each node widened to a normal distribution.

        Args:
          x: where to evaluate.
          width: the standard deviation, in units of the eigenvalues.

        Raises:
          ValueError: where `width` is not positive.
        """
        if not width > 0:
            raise ValueError(f"width (={width!r}) must be positive")
        offsets = (np.asarray(x, np.float64)[..., None] - self.nodes) / width
        bells = np.exp(-(offsets**2) / 2) / (math.sqrt(2 * math.pi) * width)
        return bells @ self.weights


def spectrum(
    hessian: LocalHessian,
    *,
    key: jax.Array,
    num_matvecs: int | None = None,
    num_probes: int = 4,
) -> Spectrum:
    """The spectral density, by stochastic Lanczos quadrature.

    Each probe runs matfree's Lanczos with full reorthogonalisation from random signs;
    its Ritz values, weighted by their share of the start, reproduce the first
    `2 num_matvecs` moments of the density as that start sees it. Details finer than
    about the range over `num_matvecs` are not resolved, and single eigenvalues inside
    are not found: for the ends, see `condition`.

    Needs memory for `num_matvecs` vectors like `hessian.point`.

    Args:
      hessian: a local Hessian.
      key: key of the random signs.
      num_matvecs: products for each probe, at least 1 and at most `hessian.size`; None
        for 64, or the size where that is less.
      num_probes: how many random starts to average, at least 1; the error falls with
        the square root of `num_probes * hessian.size`.

    Returns:
      A `Spectrum`.

    Raises:
      ValueError: where a count is out of range, or the Hessian is not finite.
      ImportError: where matfree is not installed.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import local_hessian
      >>> hessian = local_hessian.input_hessian(
      ...     lambda kernel, z: z @ kernel, 3 * jnp.eye(4), jnp.ones((2, 4))
      ... )
      >>> estimate = local_hessian.spectrum(hessian, key=jax.random.key(0))
      >>> estimate.cdf([8.9, 9.1]).round(3).tolist()
      [0.0, 1.0]
    """
    size = hessian.size
    if num_matvecs is None:
        num_matvecs = min(NUM_MATVECS, size)
    matvecs = check_count("num_matvecs", num_matvecs, size)
    probes = check_count("num_probes", num_probes)
    matrices = np.asarray(
        _lanczos(hessian, jax.random.split(key, probes), matvecs), np.float64
    )
    exhausted = exhaustion(hessian)
    nodes, weights = [], []
    for matrix in matrices:
        # matfree's own tridiagonal matrix averages couplings with what follows the end
        # of the Krylov space, where vectors are rounding errors.
        steps = _steps(np.diagonal(matrix), np.diagonal(matrix, -1), exhausted)
        leading = matrix[:steps, :steps]
        if not np.isfinite(leading).all():
            raise ValueError("products with the local Hessian are not finite")
        values, vectors = np.linalg.eigh((leading + leading.T) / 2)
        nodes.append(values)
        weights.append(vectors[0] ** 2 / probes)
    nodes, weights = np.concatenate(nodes), np.concatenate(weights)
    order = np.argsort(nodes)
    return Spectrum(nodes=nodes[order], weights=weights[order], size=size)


@functools.partial(jax.jit, static_argnums=2)
def _lanczos(hessian: LocalHessian, keys: jax.Array, num_matvecs: int) -> jax.Array:
    """Each probe's Hessenberg matrix; shape=(num_probes, num_matvecs, num_matvecs)."""
    decomp, stochtrace = _matfree()
    with jax.default_matmul_precision("highest"):
        flat = flatten(hessian)
        signs = stochtrace.sampler_signs(flat.start, num=1)
        decompose = decomp.hessenberg(num_matvecs, reortho="full", custom_vjp=False)
        return jax.lax.map(
            lambda key: decompose(flat.product, signs(key)[0]).J_small, keys
        )


def _steps(diagonal: np.ndarray, couplings: np.ndarray, tolerance: float) -> int:
    """How many Krylov vectors there are: the first coupling that vanishes ends them."""
    largest = 0.0
    for step, coupling in enumerate(couplings):
        largest = max(largest, abs(diagonal[step]))
        if not abs(coupling) > tolerance * largest:  # NaN comes of dividing by it
            return step + 1
        largest = max(largest, abs(coupling))
    return len(diagonal)


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

    LH's `C` of a Jacobian is over its singular values, the square root of this one of
    its Gauss-Newton matrix.

    Small blocks, with up to 1024 rows or columns of the Jacobian and up to 2^27
    entries, get all their eigenvalues, and the answer is exact. Others get matfree's
    Golub-Kahan bidiagonalisation with full reorthogonalisation, from a start within the
    range of :math:`J^T`. Their answer is a lower bound. A Ritz value :math:`\theta` is
    at most the largest eigenvalue, and the smallest non-zero one is at most
    :math:`\theta / (1 - \rho^2)`, with :math:`\rho < 1` its relative residual, because
    no more than :math:`\rho` of the Ritz vector lies in the null space. The upper end
    converges within few products; the lower one slowly, and where the spectrum reaches
    down to zero without a gap, as it does after several layers, not in practice.
    `converged` says whether the residuals place an eigenvalue within 1 % of both ends;
    that there is none below it no Krylov method can know.

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
    zero = _ZERO * epsilon(hessian)
    if num_matvecs is None and is_small(hessian):
        sizes = np.sort(np.abs(eigenvalues(hessian)))
        # Those of a Gauss-Newton part have been cut already, as squares.
        cut = 0.0 if hessian.target is None else zero * sizes[-1]
        found = sizes[sizes > cut]
        smallest, largest = found[[0, -1]] if len(found) else (0.0, 0.0)
        zeros = 1 - len(found) / hessian.size
        return Condition(float(largest), float(smallest), zeros, True, True)
    most = min(factor_rows(hessian), hessian.size)
    if num_matvecs is None:
        num_matvecs = min(NUM_MATVECS, most)
    matvecs = check_count("num_matvecs", num_matvecs, most)
    upper, norm, last = (
        np.asarray(array, np.float64) for array in _bidiagonal(hessian, key, matvecs)
    )
    if not np.isfinite(norm):
        raise ValueError("the block's Jacobian is not finite")
    upper, exhausted = _leading(upper, exhaustion(hessian))
    left, values, _ = np.linalg.svd(upper, full_matrices=False)
    nonzero = values > zero * values.max(initial=0.0)
    if not nonzero.any():
        return Condition(0.0, 0.0, math.nan, True, False)
    values = values[nonzero]
    # Residuals of J^T J on a Ritz vector, relative to the Ritz value.
    # A last coupling of zero has been multiplied with 0 / 0.
    last = 0.0 if exhausted or np.isnan(last) else last
    residuals = last * np.abs(left[-1, nonzero]) / values
    # Rounding errors grow into the null space, so that a Ritz value may be on its way
    # to zero. But its vector's part there is no longer than its residual.
    outside = 1 - np.minimum(residuals, 1) ** 2
    bounds = values[outside > 0] / np.sqrt(outside[outside > 0])
    largest, smallest = values[0], np.min(bounds, initial=values[0])
    power = 2 if hessian.target is None else 1
    return Condition(
        float(largest**power),
        float(smallest**power),
        zeros=math.nan,
        converged=bool(max(residuals[0], residuals[-1]) <= _CONVERGED),
        exact=False,
    )


@functools.partial(jax.jit, static_argnums=2)
def _bidiagonal(
    hessian: LocalHessian, key: jax.Array, num_matvecs: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The factor's upper bidiagonal matrix, the start's norm and the last coupling."""
    decomp = _matfree()[0]
    with jax.default_matmul_precision("highest"):
        flat = flatten(hessian)
        transposed = jax.linear_transpose(flat.factor, flat.start)
        (start,) = transposed(jax.random.normal(key, (flat.rows,), flat.start.dtype))
        decomposed = decomp.bidiag(num_matvecs, reortho="full")(flat.factor, start)
    norms = (jnp.linalg.norm(start), jnp.linalg.norm(decomposed.residual))
    return decomposed.J_small, *norms


def _leading(upper: np.ndarray, tolerance: float) -> tuple[np.ndarray, bool]:
    """A bidiagonal matrix up to the end of its Krylov space, and whether there is one.

    It ends where a coupling vanishes; what follows is rounding errors, or NaN of
    dividing by zero.
    """
    largest = 0.0
    for step, diagonal in enumerate(np.diagonal(upper)):
        if not diagonal > tolerance * largest:
            return upper[:step, : step + 1], True
        largest = max(largest, diagonal)
        if step + 1 < len(upper):
            coupling = upper[step, step + 1]
            if not coupling > tolerance * largest:
                return upper[: step + 1, : step + 1], True
            largest = max(largest, coupling)
    return upper, False
