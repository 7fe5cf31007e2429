r"""Local Hessians of a block: products, spectra, condition numbers, a report.

Back-propagation is one gradient step on each block's back-matching loss, which asks the
block's output :math:`F(W, z)` to meet a target :math:`t` (LH 5, Proposition 1),

.. math::
  \ell(W, z) = \tfrac{1}{2} \Vert F(W, z) - t \Vert^2 ,

and how far one step gets is decided by the Hessians of that loss (LH 6), which "On the
Local Hessian in Back-propagation" (LH) calls local:

.. math::
  H_z = J_z^T J_z + \sum_i (F - t)_i \nabla_z^2 F_i , \qquad
  H_W = J_W^T J_W + \sum_i (F - t)_i \nabla_W^2 F_i .

The first terms are the Gauss-Newton parts, which LH analyses: (8) and (9) for a dense
layer, (13) and (14) for a residual block, (17) and (18) with batch normalisation. The
means of their diagonals are the numbers `m_z` and `m_W` of the package's recursion.

A block is any function `fn(params, z)` from an array with the batch as first axis to
another. Nothing here forms a Jacobian, except where a block is small.

What is averaged. `H_z` is over the coordinates of all examples in `z`, and not divided
by their number: for a block that treats examples one by one it has one diagonal block
for each, LH's `H_z`. Give one example, `z[:1]`, for a single one. `H_W` is divided by
the batch size, a mean over examples as in BM (2) and in LH's Remark 3; LH (9) and (18)
print the sum.

Batch normalisation. With the batch's own statistics a block couples its examples. LH
(17) and (18) ignore the terms that come of it, which are of order 1 / batch; give a
block whose statistics are fixed (in Flax `use_running_average=True`, with the
statistics of the batch) for the papers' matrices, and one in training mode for the true
ones.

Needs matfree: `pip install "backmatch-optax[local-hessian]"`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from backmatch_optax._measure import checked_count
from backmatch_optax._param_paths import text

__all__ = [
    "Condition",
    "LocalHessian",
    "MarchenkoPastur",
    "MeanDiagonal",
    "Report",
    "Spectrum",
    "condition",
    "eigenvalues",
    "input_hessian",
    "marchenko_pastur",
    "mean_diagonal",
    "report",
    "spectrum",
    "weight_hessian",
]

BlockFn = Callable[[Any, jax.Array], jax.Array]

# In epsilons, relative to the largest. A singular value below the first is a rounding
# error (those of rank-deficient blocks are within one epsilon); a coupling below the
# second ends a Krylov space: what follows would start anew from rounding errors.
_ZERO = 10
_EXHAUSTED = 100
_CONVERGED = 0.01  # relative residual of an eigenvalue
_SMALL = 1024  # rows or columns of a Jacobian whose eigenvalues are all computed
_MOST_ENTRIES = 2**27  # of a Jacobian in float64: a GiB
_NUM_MATVECS = 64


# --- The operator --------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "z", "target"],
    meta_fields=["fn", "wrt"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LocalHessian:
    """A local Hessian as products with vectors; a pytree, to be passed through `jit`.

    Made by `input_hessian` and `weight_hessian`, which check what they are given.
    """

    fn: BlockFn
    wrt: Literal["input", "weights"]
    params: Any
    z: jax.Array  # shape=(batch, ...), real floating dtype
    target: jax.Array | None  # shape of the output; None for the Gauss-Newton part

    @property
    def point(self) -> Any:
        """Where the Hessian is taken: `z`, or the tree of parameters."""
        return self.z if self.wrt == "input" else self.params

    @property
    def size(self) -> int:
        """The number of rows and of columns."""
        return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(self.point))

    def product(self, v: Any) -> Any:
        """The Hessian times `v`: one Jacobian-vector product and one back.

        Args:
          v: a tree like `point`, of its shapes and dtypes.

        Returns:
          A tree like `v`.

        Examples:
          >>> import jax.numpy as jnp
          >>> from backmatch_optax import local_hessian
          >>> kernel, z = jnp.array([[3.0, 4.0]]), jnp.ones((2, 1))
          >>> hessian = local_hessian.input_hessian(lambda w, z: z @ w, kernel, z)
          >>> print(hessian.product(z).ravel())  # W^T W, LH (8), for each example
          [25. 25.]
        """
        return _product(self)(v)


def _output(hessian: LocalHessian, point: Any) -> jax.Array:
    if hessian.wrt == "input":
        return hessian.fn(hessian.params, point)
    # Divided here, so that J^T J is a mean over the batch.
    return hessian.fn(point, hessian.z) / math.sqrt(hessian.z.shape[0])


def _product(hessian: LocalHessian) -> Callable[[Any], Any]:
    """Products with the Hessian; the block itself runs once."""
    point = hessian.point
    if hessian.target is None:
        jacobian = jax.linearize(lambda x: _output(hessian, x), point)[1]
        transposed = jax.linear_transpose(jacobian, point)
        return lambda v: transposed(jacobian(v))[0]
    batch = hessian.z.shape[0] if hessian.wrt == "weights" else 1
    target = hessian.target / math.sqrt(batch)

    def loss(x: Any) -> jax.Array:
        return jnp.sum(jnp.square(_output(hessian, x) - target)) / 2

    return jax.linearize(jax.grad(loss), point)[1]


def input_hessian(
    fn: BlockFn, params: Any, z: jax.Array, *, target: jax.Array | None = None
) -> LocalHessian:
    r"""The local Hessian of a block with respect to its input (LH 6, 8, 13, 17).

    Args:
      fn: the block, `fn(params, z)`, twice differentiable in forward mode where a
        target is given, once where not. Give the same function object again to reuse
        what was compiled.
      params: the block's parameters, a tree of arrays; `{}` where there are none.
      z: the block's input, with the batch as first axis and of real floating dtype.
      target: what the output should be, :math:`z_b^{k+1/2}` of LH (5): the output minus
        the gradient of the loss with respect to it, for back-propagation. None leaves
        the Gauss-Newton part, which is the whole for a target that is the output
        itself, and for a block that is linear in `z`.

    Returns:
      The operator, of `z.size` rows and columns.

    Raises:
      ValueError: where `z`, the target or the output is not an array of real floating
        dtype with the same batch as first axis.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import local_hessian
      >>> def dense(params, z):
      ...     return z @ params["kernel"]
      >>> params = {"kernel": jnp.eye(3, 2)}  # orthonormal, 3 inputs, 2 outputs
      >>> hessian = local_hessian.input_hessian(dense, params, jnp.ones((1, 3)))
      >>> print(local_hessian.eigenvalues(hessian))  # ones and zeros (LH 3.1)
      [0. 1. 1.]
    """
    _check_block(fn, params, z, target)
    return LocalHessian(fn=fn, wrt="input", params=params, z=z, target=target)


def weight_hessian(
    fn: BlockFn, params: Any, z: jax.Array, *, target: jax.Array | None = None
) -> LocalHessian:
    r"""The local Hessian of a block with respect to its weights (LH 6, 9, 14, 18).

    Divided by the batch size: the Hessian of the mean over examples.

    Args:
      fn: the block, as in `input_hessian`.
      params: the block's parameters, a tree of arrays of real floating dtype, at least
        one.
      z: the block's input, with the batch as first axis and of real floating dtype.
      target: as in `input_hessian`.

    Returns:
      The operator, with a row and a column for each number in `params`.

    Raises:
      ValueError: as `input_hessian`, and where a parameter is not of real floating
        dtype or there is none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import local_hessian
      >>> def dense(params, z):
      ...     return z @ params["kernel"]
      >>> z = jnp.diag(jnp.array([1.0, 3.0]))
      >>> hessian = local_hessian.weight_hessian(dense, {"kernel": jnp.ones((2, 1))}, z)
      >>> print(local_hessian.eigenvalues(hessian).round(4))  # of E[z z^T], LH (9)
      [0.5 4.5]
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params holds no array, so the block has no weight Hessian")
    for path, leaf in leaves:
        _check_float(leaf, f"parameter {text(path)!r}")
    _check_block(fn, params, z, target)
    return LocalHessian(fn=fn, wrt="weights", params=params, z=z, target=target)


def _check_block(fn: BlockFn, params: Any, z: Any, target: Any) -> None:
    if not callable(fn):
        raise ValueError(f"fn (={fn!r}) must be a function of params and z")
    _check_batched(z, "z")
    output = jax.eval_shape(fn, params, z)
    if not isinstance(output, jax.ShapeDtypeStruct):
        raise ValueError(
            "fn must return one array, the block's output, but it returned "
            f"{jax.tree.structure(output)}"
        )
    _check_batched(output, "the output of fn")
    if output.shape[0] != z.shape[0]:
        raise ValueError(
            f"fn must keep the batch as first axis, but it made {output.shape} of z's "
            f"{z.shape}"
        )
    if target is not None:
        _check_float(target, "target")
        if jnp.shape(target) != output.shape:
            raise ValueError(
                f"target must have the output's shape {output.shape}, but it has "
                f"{jnp.shape(target)}"
            )


def _check_float(array: Any, name: str) -> None:
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise ValueError(f"{name} must be an array, but it is a {type(array).__name__}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be of a real floating dtype, but it is {dtype}")


def _check_batched(array: Any, name: str) -> None:
    _check_float(array, name)
    if array.ndim < 1 or 0 in array.shape:
        raise ValueError(
            f"{name} must have the batch as first axis and no empty axis, but its "
            f"shape is {array.shape}"
        )


def _check_count(name: str, count: Any, most: int | None = None) -> int:
    number = checked_count(name, count)
    if most is not None and number > most:
        raise ValueError(f"{name} (={count!r}) must be at most the dimension, {most}")
    return number


# --- Flat vectors, for the linear algebra --------------------------------------------


class _Flat(NamedTuple):
    """Linear maps of flat vectors, in the dtype the linear algebra is done in.

    `factor` is the Jacobian `J` where the Hessian is `J^T J`, else the Hessian: its
    singular values, squared where `squared`, are the eigenvalues' sizes.
    """

    product: Callable[[jax.Array], jax.Array]
    factor: Callable[[jax.Array], jax.Array]
    squared: bool
    rows: int  # of the factor; its columns are the Hessian's
    start: jax.Array  # shape=(size,), the point itself: what vectors look like


def _flat(hessian: LocalHessian) -> _Flat:
    point, unravel = ravel_pytree(hessian.point)
    # matfree keeps its vectors in JAX's default dtype; bfloat16 would be too coarse.
    wide = jnp.promote_types(point.dtype, jnp.zeros(()).dtype)

    def flattened(linear: Callable[[Any], Any]) -> Callable[[jax.Array], jax.Array]:
        def apply(v: jax.Array) -> jax.Array:
            image = linear(unravel(v.astype(point.dtype)))
            return ravel_pytree(image)[0].astype(wide)

        return apply

    start = point.astype(wide)
    product = flattened(_product(hessian))
    if hessian.target is not None:
        return _Flat(product, product, False, start.size, start)
    jacobian = jax.linearize(lambda x: _output(hessian, x), hessian.point)[1]
    output = jax.eval_shape(hessian.fn, hessian.params, hessian.z)
    return _Flat(product, flattened(jacobian), True, output.size, start)


def _rows(hessian: LocalHessian) -> int:
    """Rows of the factor."""
    if hessian.target is not None:
        return hessian.size
    return jax.eval_shape(hessian.fn, hessian.params, hessian.z).size


def _is_small(hessian: LocalHessian) -> bool:
    """Whether all eigenvalues cost seconds."""
    rows, size = _rows(hessian), hessian.size
    return min(rows, size) <= _SMALL and rows * size <= _MOST_ENTRIES


def _epsilon(hessian: LocalHessian) -> float:
    """Of the dtype that the block computes in."""
    dtype = jnp.result_type(*jax.tree.leaves(hessian.point), hessian.z)
    return float(jnp.finfo(dtype).eps)


def _exhausted(hessian: LocalHessian) -> float:
    return min(_EXHAUSTED * _epsilon(hessian), 0.01)  # bfloat16 has an epsilon of 0.008


def _matfree() -> tuple[Any, Any]:
    try:
        from matfree import decomp, stochtrace
    except ImportError as error:
        raise ImportError(
            "backmatch_optax.local_hessian estimates spectra with matfree, which is "
            'not installed: pip install "backmatch-optax[local-hessian]"'
        ) from error
    return decomp, stochtrace


# --- Mean of the diagonal ------------------------------------------------------------


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
    probes = _check_count("num_probes", num_probes)
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
        flat = _flat(hessian)
        signs = stochtrace.sampler_signs(flat.start, num=1)
        estimate = stochtrace.estimator_monte_carlo(
            stochtrace.monte_carlo_trace(), signs
        )
        return estimate(flat.product, key)


# --- All eigenvalues of a small block ------------------------------------------------


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
    rows, size = _rows(hessian), hessian.size
    if rows * size > _MOST_ENTRIES:
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
    least = max((_ZERO * _epsilon(hessian)) ** 2, len(gram) * np.finfo(float).eps)
    values[values <= least * values[-1]] = 0.0
    return np.concatenate([np.zeros(size - len(values)), values])


@jax.jit
def _dense_factor(hessian: LocalHessian) -> jax.Array:
    """The Jacobian, or the Hessian itself; shape=(rows, size)."""
    flat = _flat(hessian)
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


# --- The spectral density ------------------------------------------------------------


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
        num_matvecs = min(_NUM_MATVECS, size)
    matvecs = _check_count("num_matvecs", num_matvecs, size)
    probes = _check_count("num_probes", num_probes)
    matrices = np.asarray(
        _lanczos(hessian, jax.random.split(key, probes), matvecs), np.float64
    )
    exhausted = _exhausted(hessian)
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
        flat = _flat(hessian)
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


# --- Extreme eigenvalues -------------------------------------------------------------


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

    Small blocks, with up to 1024 rows or columns of the Jacobian, get all their
    eigenvalues, and the answer is exact. Others get matfree's Golub-Kahan
    bidiagonalisation with full reorthogonalisation, from a start within the range of
    :math:`J^T`. Their answer is a lower bound. A Ritz value :math:`\theta` is at most
    the largest eigenvalue, and the smallest non-zero one is at most
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
    zero = _ZERO * _epsilon(hessian)
    if num_matvecs is None and _is_small(hessian):
        sizes = np.sort(np.abs(eigenvalues(hessian)))
        # Those of a Gauss-Newton part have been cut already, as squares.
        cut = 0.0 if hessian.target is None else zero * sizes[-1]
        found = sizes[sizes > cut]
        smallest, largest = found[[0, -1]] if len(found) else (0.0, 0.0)
        zeros = 1 - len(found) / hessian.size
        return Condition(float(largest), float(smallest), zeros, True, True)
    most = min(_rows(hessian), hessian.size)
    if num_matvecs is None:
        num_matvecs = min(_NUM_MATVECS, most)
    matvecs = _check_count("num_matvecs", num_matvecs, most)
    upper, norm, last = (
        np.asarray(array, np.float64) for array in _bidiagonal(hessian, key, matvecs)
    )
    if not np.isfinite(norm):
        raise ValueError("the block's Jacobian is not finite")
    upper, exhausted = _leading(upper, _exhausted(hessian))
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
        flat = _flat(hessian)
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


# --- Random-matrix theory ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarchenkoPastur:
    """The limit of the eigenvalues' distribution for Gaussian kernels, LH (10)."""

    ratio: float  # outputs over inputs, LH's c
    mean: float  # of the eigenvalues

    @property
    def zeros(self) -> float:
        """The share of eigenvalues that are zero: `1 - c` below 1, LH (10)."""
        return max(0.0, 1 - self.ratio)

    @property
    def support(self) -> tuple[float, float]:
        """The least and the largest non-zero eigenvalue, LH's `c_-` and `c_+`."""
        root = math.sqrt(self.ratio)
        lower, upper = (self.mean * (1 + s * root) ** 2 / self.ratio for s in (-1, 1))
        return lower, upper

    @property
    def condition_number(self) -> float:
        """Largest over least non-zero eigenvalue; infinite at ratio 1."""
        lower, upper = self.support
        return upper / lower if lower > 0 else math.inf

    def density(self, x: Any) -> np.ndarray:
        """The density at `x`, any shape, without the zeros' point mass: LH (11), (19).

        Args:
          x: where to evaluate.
        """
        x = np.asarray(x, np.float64)
        lower, upper = self.support
        inside = (x > lower) & (x < upper)
        safe = np.where(inside, x, (lower + upper) / 2)
        root = np.sqrt((upper - safe) * (safe - lower))
        return np.where(inside, self.ratio * root / (2 * np.pi * self.mean * safe), 0.0)

    def cdf(self, x: Any) -> np.ndarray:
        """The share of eigenvalues up to `x`, any shape, with the point mass at zero.

        Args:
          x: where to evaluate.
        """
        x = np.asarray(x, np.float64)
        lower, upper = self.support
        # With x = middle + half cos(angle) the density integrates in closed form.
        middle, half = (upper + lower) / 2, (upper - lower) / 2
        angle = np.arccos(np.clip((x - middle) / half, -1, 1))
        geometric = math.sqrt(lower * upper)
        turn = np.arctan2(
            math.sqrt(lower) * np.sin(angle / 2), math.sqrt(upper) * np.cos(angle / 2)
        )
        above = middle * angle - half * np.sin(angle) - 2 * geometric * turn
        share = 1 - self.ratio / (2 * np.pi * self.mean) * above
        return np.where(x < 0, 0.0, share)


def marchenko_pastur(ratio: float, *, mean: float = 1.0) -> MarchenkoPastur:
    r"""The Marchenko-Pastur law of `H_z = W^T W` for a Gaussian kernel (LH 10, 11, 19).

    With `c = ratio`, outputs over inputs, both large, and :math:`\sigma^2` the mean
    eigenvalue,

    .. math::
      d\nu(\lambda) = \frac{c}{2 \pi \sigma^2}
      \frac{\sqrt{(c_+ - \lambda)(\lambda - c_-)}}{\lambda} \, d\lambda , \qquad
      c_\pm = \frac{\sigma^2 (1 \pm \sqrt{c})^2}{c} ,

    and for `c` below 1 a point mass of `1 - c` at zero. LH (11) is for entries of
    variance :math:`\sigma^2` over the number of outputs. In general the mean eigenvalue
    is `F / in`, the `m_z` of a dense layer, with `F` the squared norm of the kernel:
    for entries of variance `1 / in` it is `c`. With a batch normalisation, and whitened
    input, every row of the kernel counts as a unit vector, so that it is `c` whatever
    the kernel's scale: LH (19) and Remark 2.

    Args:
      ratio: outputs over inputs, positive.
      mean: the mean eigenvalue, positive.

    Returns:
      A `MarchenkoPastur`, with `density`, `cdf`, `support` and `zeros`.

    Raises:
      ValueError: where `ratio` or `mean` is not positive and finite.

    Examples:
      >>> from backmatch_optax import local_hessian
      >>> law = local_hessian.marchenko_pastur(0.25, mean=0.25)  # LH (19)
      >>> law.support, law.zeros
      ((0.25, 2.25), 0.75)
      >>> law.cdf([0.0, 0.25, 2.25]).round(3).tolist()
      [0.75, 0.75, 1.0]
    """
    for name, value in (("ratio", ratio), ("mean", mean)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} (={value!r}) must be positive and finite")
    return MarchenkoPastur(ratio=float(ratio), mean=float(mean))


# --- The report ----------------------------------------------------------------------


class BlockReport(NamedTuple):
    """One block of a `Report`; the weights' numbers are None for a block without."""

    m_z: MeanDiagonal
    input_condition: Condition
    m_W: MeanDiagonal | None
    weight_condition: Condition | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What `report` returns; printed, it is a table."""

    blocks: dict[str, BlockReport]

    def __str__(self) -> str:
        rows = [("block", "m_z", "cond H_z", "zeros", "m_W", "cond H_W", "zeros")]
        for name, block in self.blocks.items():
            of_input = _texts(block.m_z, block.input_condition)
            rows.append((name, *of_input, *_texts(block.m_W, block.weight_condition)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
        )


def _texts(
    mean: MeanDiagonal | None, conditioned: Condition | None
) -> tuple[str, str, str]:
    if mean is None or conditioned is None:
        return "", "", ""
    zeros = f"{conditioned.zeros:.1%}" if conditioned.exact else "?"
    return f"{mean.mean:.3g}", str(conditioned), zeros


def report(
    blocks: Mapping[str, tuple[BlockFn, Any, jax.Array]],
    *,
    key: jax.Array,
    num_matvecs: int = _NUM_MATVECS,
    num_probes: int = 8,
) -> Report:
    """Scores blocks by their local Hessians, as LH (section 4) suggests for design.

    A block is good to back-propagate through where the condition number of `H_z` is
    low, and good to train where that of `H_W` is. Give the blocks of a model, or one
    block in variants: plain, with batch normalisation, with a skip connection.

    `H_z` is here with respect to the first example's input, the others held fixed, and
    `H_W` is the mean over the batch.

    Args:
      blocks: by name, the block's function, parameters and input, as `input_hessian`
        takes them. A batch that is too small for the parameters leaves `H_W` with
        zeros.
      key: key of the random probes.
      num_matvecs: of the larger blocks, see `condition`.
      num_probes: of the means, see `mean_diagonal`.

    Returns:
      A `Report`; printed, it is a table of the mean eigenvalues `m_z` and `m_W`, the
      condition numbers, `>=` where they are lower bounds, and the shares of zeros.

    Raises:
      ValueError: where a count is below 1, or a block is none, see `input_hessian`; the
        block is named.
      ImportError: where matfree is not installed.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import local_hessian
      >>> def plain(kernel, z):
      ...     return z @ kernel
      >>> def with_skip(kernel, z):
      ...     return z + z @ kernel
      >>> kernel, z = jnp.diag(jnp.array([0.1, 0.3])), jnp.eye(2)
      >>> blocks = {"plain": (plain, kernel, z), "with skip": (with_skip, kernel, z)}
      >>> print(local_hessian.report(blocks, key=jax.random.key(0)))
      block      m_z   cond H_z  zeros  m_W  cond H_W  zeros
      plain      0.05  9         0.0%   0.5  1         0.0%
      with skip  1.45  1.4       0.0%   0.5  1         0.0%
    """
    _check_count("num_probes", num_probes)
    _check_count("num_matvecs", num_matvecs)
    scored = {}
    for index, (name, block) in enumerate(blocks.items()):
        try:
            fn, params, z = block
        except (TypeError, ValueError):
            raise ValueError(
                f"block {name!r} must be (fn, params, z), but it is {block!r}"
            ) from None
        try:
            input_hessian(fn, params, z)  # for its checks
            hessians = [_of_first_example(fn, params, z)]
            if jax.tree.leaves(params):
                hessians.append(weight_hessian(fn, params, z))
            scores: list[Any] = []
            for number, hessian in enumerate(hessians):
                probe = jax.random.fold_in(jax.random.fold_in(key, index), number)
                scores.append(mean_diagonal(hessian, key=probe, num_probes=num_probes))
                most = min(num_matvecs, _rows(hessian), hessian.size)
                matvecs = None if _is_small(hessian) else most
                scores.append(condition(hessian, key=probe, num_matvecs=matvecs))
        except ValueError as error:
            raise ValueError(f"block {name!r}: {error}") from error
        scored[name] = BlockReport(*scores, *[None] * (4 - len(scores)))
    return Report(blocks=scored)


def _of_first_example(fn: BlockFn, params: Any, z: jax.Array) -> LocalHessian:
    alone = np.asarray(fn(params, z[:1]), np.float64)
    together = np.asarray(fn(params, z), np.float64)
    largest = np.abs(together).max()
    if np.allclose(alone, together[:1], rtol=0, atol=1e-3 * largest):
        return input_hessian(fn, params, z[:1])
    others = z[1:]  # a normalisation by the batch couples them to the first

    def with_others(params: Any, first: jax.Array) -> jax.Array:
        return fn(params, jnp.concatenate([first, others]))

    return LocalHessian(
        fn=with_others, wrt="input", params=params, z=z[:1], target=None
    )
