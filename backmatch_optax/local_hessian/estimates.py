"""The mean and the spectral density of a local Hessian, from random probes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from backmatch_optax.local_hessian.krylov import (
    checked_matvecs,
    flat_factor,
    krylov_steps,
    matfree_decomp,
)
from backmatch_optax.local_hessian.operator import LocalHessian
from backmatch_optax.numerics import checked_count


class MeanDiagonal(NamedTuple):
    """What `mean_diagonal` returns; the trace is `size` times the mean."""

    mean: float
    standard_error: float  # NaN from a single probe


def mean_diagonal(
    hessian: LocalHessian, *, key: jax.Array, num_probes: int = 8
) -> MeanDiagonal:
    """The mean of the diagonal, which is the mean eigenvalue.

    For the Gauss-Newton parts it is `m_z` and `m_W`. LH's Algorithm 2 replaces a local
    Hessian by these two scalars, and `layer_scales` predicts them from norms and
    shapes. Hutchinson's estimator: the mean of `v^T H v` over random signs `v`.

    Args:
      hessian: a local Hessian.
      key: key of the random signs.
      num_probes: the number of random signs, at least 1. The standard error falls with
        its square root.

    Returns:
      The mean and its standard error.

    Raises:
      ValueError: where `num_probes` is below 1.

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
    probes = checked_count("num_probes", num_probes)
    # A loop inside would run convolutions several times as slowly on CPU.
    traces = [_trace(hessian, probe) for probe in jax.random.split(key, probes)]
    samples = np.asarray(traces, np.float64) / hessian.size
    error = samples.std(ddof=1) / math.sqrt(probes) if probes > 1 else math.nan
    return MeanDiagonal(float(samples.mean()), float(error))


@jax.jit
def _trace(hessian: LocalHessian, key: jax.Array) -> jax.Array:
    # On GPUs the default precision of float32 products is lower.
    with jax.default_matmul_precision("highest"):
        factor, point = flat_factor(hessian)
        signs = jax.random.rademacher(key, point.shape, point.dtype)
        image = factor(signs)
        return image @ (image if hessian.target is None else signs)


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
        """The share of eigenvalues up to `x`, any shape; a node at `x` counts half."""
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

    Each probe runs matfree's Lanczos method with full reorthogonalisation from random
    signs. Its Ritz values are the nodes, weighted by their share of the start. They
    reproduce the first `2 num_matvecs` moments of the density as that start sees it.
    Details finer than about the range over `num_matvecs` are not resolved. Single
    eigenvalues inside are not found; for the ends, see `condition`.

    Needs memory for `num_matvecs` vectors like `hessian.point`.

    Args:
      hessian: a local Hessian.
      key: key of the random signs.
      num_matvecs: products for each probe, at least 1 and at most `hessian.size`; None
        for 64, or the size where that is less.
      num_probes: how many random starts to average, at least 1. The error falls with
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
    matvecs = checked_matvecs(num_matvecs, hessian.size)
    probes = checked_count("num_probes", num_probes)
    matrices = _lanczos(hessian, jax.random.split(key, probes), matvecs)
    nodes, weights = [], []
    for matrix in np.asarray(matrices, np.float64):
        diagonal = np.abs(np.diagonal(matrix)[:-1])
        couplings = np.abs(np.diagonal(matrix, -1))
        sizes = np.fmax(diagonal, couplings)
        steps = krylov_steps(hessian, couplings, sizes) + 1
        # matfree's own tridiagonal matrix averages couplings with what follows the end
        # of the Krylov space.
        leading = matrix[:steps, :steps]
        if not np.isfinite(leading).all():
            raise ValueError("products with the local Hessian are not finite")
        values, vectors = np.linalg.eigh((leading + leading.T) / 2)
        nodes.append(values)
        weights.append(vectors[0] ** 2 / probes)
    nodes, weights = np.concatenate(nodes), np.concatenate(weights)
    order = np.argsort(nodes)
    return Spectrum(nodes=nodes[order], weights=weights[order], size=hessian.size)


@functools.partial(jax.jit, static_argnums=2)
def _lanczos(hessian: LocalHessian, keys: jax.Array, num_matvecs: int) -> jax.Array:
    """Each probe's Hessenberg matrix; shape=(num_probes, num_matvecs, num_matvecs)."""
    hessenberg = matfree_decomp().hessenberg
    with jax.default_matmul_precision("highest"):
        factor, point = flat_factor(hessian)
        transposed = jax.linear_transpose(factor, point)

        def product(v: jax.Array) -> jax.Array:
            image = factor(v)
            return transposed(image)[0] if hessian.target is None else image

        def decompose(key: jax.Array) -> jax.Array:
            signs = jax.random.rademacher(key, point.shape, point.dtype)
            decomposition = hessenberg(num_matvecs, reortho="full", custom_vjp=False)
            return decomposition(product, signs).J_small

        return jax.lax.map(decompose, keys)
