"""Dense and convolutional layers whose backward pass solves the least squares."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backmatch_optax.numerics import wide
from backmatch_optax.spec import windows as _windows
from backmatch_optax.spec.windows import Padding, PerDimension

_PADDINGS = ("SAME", "VALID", "CIRCULAR", "CAUSAL")

# Solves must not see inputs rounded to the bits of a matrix unit.
_HIGHEST = lax.Precision.HIGHEST


def dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    damping: jax.typing.ArrayLike = 0.0,
    second_moment: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    name: str = "exact.dense",
) -> jax.Array:
    r"""`x @ kernel + bias`, whose backward pass is back-matching propagation.

    Its cotangents are the least-squares solutions (BM (10) to (13)): for the input,
    each unit by itself, and for the kernel, all of its entries together,

    .. math::
      \delta' a_j = \frac{w_j^T \delta b}{w_j^T w_j + \lambda_a}, \qquad
      \delta' W = (\mathbb{E}\, a a^T + \lambda_W I)^{-1} \, \mathbb{E}[a \, \delta b^T]

    where :math:`w_j` is row `j` of the kernel. A bias is the weight of one more input
    that is always 1, and is solved for together with the kernel; the papers have none.

    Where the inputs are white, :math:`\mathbb{E}\, a a^T = I`, and the :math:`w_j` have
    unit length, both are BP's cotangents (BM (14), (15)). The cotangent of a unit that
    no weight leaves is zero, the smallest solution.

    Args:
      x: shape=(batch, *positions, in), of real floating dtype.
      kernel: shape=(in, out).
      bias: shape=(out,), or None.
      damping: ridge on both problems, relative and without unit:
        :math:`\lambda_W` is `damping` times the mean diagonal of
        :math:`\mathbb{E}\, a a^T`, :math:`\lambda_a` is `damping` times the mean of
        :math:`w_j^T w_j`. 0 is the papers' rule; as it grows, `damping` times
        :math:`\delta' W` goes to the gradient over that mean diagonal, which is what
        the scalar rule does. May be traced.
      second_moment: what to solve with in the place of the batch's own
        :math:`\mathbb{E}\, a a^T`, such as a running average of what the function
        `second_moment` returns. shape=(1, in, in), or (1, in + 1, in + 1) with a bias.
      dtype: what the forward pass computes in and returns; None for the arguments'
        common dtype. The backward pass computes in float32, or in float64 where an
        argument is, and keeps each argument's dtype.
      precision: of the forward product; the backward pass always takes the highest.
      name: how error messages call the layer.

    Returns:
      shape=(batch, *positions, out).

    Raises:
      ValueError: where shapes do not fit, a dtype is not real floating, or `damping` is
        negative; and, when a gradient is taken, where without damping the batch has
        fewer equations (batch times positions) than the kernel has unknowns, so that
        the system is singular. A system whose rank is short for other reasons (an input
        that is always 0) is not seen while tracing: its solution is NaN or, within
        rounding, arbitrarily large; use some damping.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0], [0.0, 3.0], [2.0, 1.0]])
      >>> kernel = jnp.eye(2)
      >>> change = jnp.array([[2.0, -1.0], [0.5, 3.0]])
      >>> wanted = x @ change  # a change of the output that the kernel can bring about
      >>> def loss(kernel):
      ...     return jnp.sum(wanted * exact.dense(x, kernel), axis=-1).mean()
      >>> print(jnp.allclose(jax.grad(loss)(kernel), change, atol=1e-5))
      True
    """
    geometry = _dense_geometry(x, kernel, precision, name)
    return _checked(geometry, x, kernel, bias, damping, second_moment, dtype)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: PerDimension | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: PerDimension | None = 1,
    feature_group_count: int = 1,
    damping: jax.typing.ArrayLike = 0.0,
    second_moment: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    name: str = "exact.conv",
) -> jax.Array:
    r"""A convolution, whose backward pass is back-matching propagation.

    By im2col it is a dense layer on patches :math:`a_{i2c}`, all positions sharing the
    kernel (BM (22), (23)):

    .. math::
      \delta' a_{ju} = \frac{w_{ju}^T \, \delta b[ju]}{w_{ju}^T w_{ju} + \lambda_a},
      \qquad
      \delta' W = \Big(\mathbb{E} \sum_u a_{i2c} a_{i2c}^T + \lambda_W I\Big)^{-1} \,
      \mathbb{E} \sum_u a_{i2c} \, \delta b_u^T

    where :math:`w_{ju}` are the weights through which feature `j` at position `u` of
    the input really acts on the output, fewer at a border or between strides. With
    groups, each has a system of its own. For damping, bias and the rest see `dense`.

    Args:
      x: shape=(batch, ..., *spatial, in), of real floating dtype; all axes but the
        first and the last are positions.
      kernel: shape=(*window, in / groups, out), for 1, 2 or 3 dimensions.
      bias: shape=(out,), or None.
      strides: an int for all dimensions, or one for each; None is 1, as in Flax.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"`, `"CAUSAL"`, an int, or an int or a
        (low, high) pair for each dimension, as in Flax.
      kernel_dilation: an int for all dimensions, or one for each; None is 1.
      feature_group_count: the number of groups the features are split into.
      damping: relative ridge on both problems; see `dense`.
      second_moment: what to solve with in the place of the batch's own second moment of
        patches; shape=(groups, n, n), where `n` is the number of taps times `in /
        groups`, input features outermost, one more with a bias. See `second_moment`.
      dtype: what the forward pass computes in and returns; see `dense`.
      precision: of the forward convolution.
      name: how error messages call the layer.

    Returns:
      shape=(batch, ..., *spatial after, out).

    Raises:
      ValueError: as `dense`; and where the geometry is none of these, or a circular
        window is larger than its input.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> x = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))
      >>> kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 4))
      >>> wanted = exact.conv(x, 2 * kernel)
      >>> def loss(kernel):
      ...     return jnp.sum(wanted * exact.conv(x, kernel), axis=(1, 2, 3)).mean()
      >>> direction = jax.grad(loss)(kernel)
      >>> print(jnp.allclose(direction, 2 * kernel, atol=1e-4))
      True
    """
    geometry = _conv_geometry(
        x,
        kernel,
        strides,
        padding,
        kernel_dilation,
        feature_group_count,
        precision,
        name,
    )
    return _checked(geometry, x, kernel, bias, damping, second_moment, dtype)


def second_moment(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: PerDimension | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: PerDimension | None = 1,
    feature_group_count: int = 1,
) -> jax.Array:
    r"""The matrix that `dense` and `conv` solve with: :math:`\mathbb{E}\, a a^T`.

    A mean over the batch of sums over positions, of inputs or of patches (BM (13),
    (23)); to be averaged over steps, as K-FAC does, and given back to them.

    Args:
      x: the layer's input, as in `dense` or `conv`.
      kernel: the layer's kernel, of which only the shape matters; two axes are a dense
        layer's.
      bias: the layer's bias, or None; with one, inputs have a last coordinate 1.
      strides: as in `conv`, like the rest; a dense layer has none of them.
      padding: as in `conv`.
      kernel_dilation: as in `conv`.
      feature_group_count: as in `conv`.

    Returns:
      shape=(groups, n, n), dtype float32, or float64 where `x` is; no gradient flows
      through it.

    Raises:
      ValueError: where shapes do not fit or `x` is not of real floating dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> print(exact.second_moment(x, jnp.zeros((2, 5)), jnp.zeros(5)))
      [[[5. 1. 2.]
        [1. 2. 1.]
        [2. 1. 1.]]]
    """
    name, precision = "exact.second_moment", None
    if kernel.ndim == 2:
        geometry = _dense_geometry(x, kernel, precision, name)
    else:
        geometry = _conv_geometry(
            x,
            kernel,
            strides,
            padding,
            kernel_dilation,
            feature_group_count,
            precision,
            name,
        )
    rows = _rows(geometry, lax.stop_gradient(x), kernel, bias, wide(x.dtype))
    return _moment(rows)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """A linear layer without its numbers; a dense one has no spatial dimensions."""

    name: str
    strides: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    wraps: bool = False
    dilation: tuple[int, ...] = ()
    groups: int = 1
    precision: Any = None
    dtype: Any = None  # of the forward pass
    undamped: bool = False  # known while tracing

    @property
    def rank(self) -> int:
        return len(self.strides)

    @property
    def dimension_numbers(self) -> tuple[str, str, str]:
        spatial = "XYZ"[: self.rank]
        return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


def _dense_geometry(
    x: jax.Array, kernel: jax.Array, precision: Any, name: str
) -> _Geometry:
    _check_floating(name, {"x": x, "kernel": kernel})
    if kernel.ndim != 2 or x.ndim < 2 or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name}: expected x of shape (batch, *positions, in) and a kernel of "
            f"shape (in, out), but their shapes are {x.shape} and {kernel.shape}"
        )
    return _Geometry(name, precision=precision)


def _conv_geometry(
    x: jax.Array,
    kernel: jax.Array,
    strides: PerDimension | None,
    padding: Padding,
    kernel_dilation: PerDimension | None,
    groups: int,
    precision: Any,
    name: str,
) -> _Geometry:
    _check_floating(name, {"x": x, "kernel": kernel})
    rank = kernel.ndim - 2
    if not 1 <= rank <= 3 or x.ndim < kernel.ndim:
        raise ValueError(
            f"{name}: expected x of shape (batch, *spatial, in) and a kernel of shape "
            "(*window, in / groups, out) with 1, 2 or 3 spatial dimensions, but their "
            f"shapes are {x.shape} and {kernel.shape}"
        )
    *window, features_in, features_out = kernel.shape
    if features_in * groups != x.shape[-1] or features_out % groups:
        raise ValueError(
            f"{name}: a kernel of shape {kernel.shape} in {groups} groups takes "
            f"{features_in * groups} input features, but x has shape {x.shape}; the "
            "groups must divide the output features too"
        )
    sizes = x.shape[-rank - 1 : -1]
    try:
        steps = _per_dimension("strides", strides, rank)
        dilation = _per_dimension("kernel_dilation", kernel_dilation, rank)
        padding = _windows.canonical_padding(padding, _PADDINGS)
        extents = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
        if padding == "CIRCULAR" and any(map(int.__gt__, extents, sizes)):
            # An output would meet the same input through two taps.
            raise ValueError(
                f"the window {_windows.shape_text(extents)} wraps around its input "
                f"{_windows.shape_text(sizes)} more than once"
            )
        pads = _pads(padding, sizes, extents, steps)
        _windows.output_sizes(
            sizes, window, strides=steps, padding=pads, dilation=dilation
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return _Geometry(
        name,
        strides=steps,
        pads=pads,
        wraps=padding == "CIRCULAR",
        dilation=dilation,
        groups=groups,
        precision=precision,
    )


def _per_dimension(name: str, value: PerDimension | None, rank: int) -> tuple[int, ...]:
    value = 1 if value is None else _windows.canonical_counts(name, value)
    return _windows.per_dimension(name, value, rank)


def _pads(
    padding: Padding, sizes: Any, extents: Any, strides: Any
) -> tuple[tuple[int, int], ...]:
    """What Flax pads with, as (low, high) for each spatial dimension."""
    match padding:
        case "VALID":
            return ((0, 0),) * len(sizes)
        case "CIRCULAR":
            return tuple(((extent - 1) // 2, extent // 2) for extent in extents)
        case "CAUSAL":
            if len(sizes) != 1:
                raise ValueError("padding 'CAUSAL' is for one spatial dimension alone")
            return ((extents[0] - 1, 0),)
        case "SAME":
            pads = lax.padtype_to_pads(sizes, extents, strides, "SAME")
            return tuple((int(low), int(high)) for low, high in pads)
    entries = _windows.per_dimension("padding", padding, len(sizes))
    return tuple((e, e) if isinstance(e, int) else tuple(e) for e in entries)


def _checked(
    geometry: _Geometry,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    damping: jax.typing.ArrayLike,
    second_moment: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    name = geometry.name
    # Traced damping is checked by nobody.
    known = float(damping) if isinstance(damping, numbers.Real) else None
    if known is not None and not 0 <= known < math.inf:
        raise ValueError(f"{name}: damping (={damping!r}) must be finite, at least 0")
    arrays = [x, kernel]
    if bias is not None:
        _check_floating(name, {"bias": bias})
        if bias.shape != kernel.shape[-1:]:
            raise ValueError(
                f"{name}: expected a bias of shape {kernel.shape[-1:]}, but it has "
                f"shape {bias.shape}"
            )
        arrays.append(bias)
    if second_moment is not None:
        unknowns = _unknowns(kernel, bias)
        expected = (geometry.groups, unknowns, unknowns)
        if second_moment.shape != expected:
            raise ValueError(
                f"{name}: expected a second_moment of shape {expected}, but it has "
                f"shape {second_moment.shape}"
            )
    geometry = dataclasses.replace(
        geometry,
        dtype=jnp.result_type(*arrays) if dtype is None else jnp.dtype(dtype),
        undamped=known == 0,
    )
    wide_dtype = wide(*(array.dtype for array in arrays))
    ridge = jnp.asarray(damping, wide_dtype)
    return _linear(geometry, x, kernel, bias, ridge, second_moment)


def _check_floating(name: str, arrays: Mapping[str, jax.Array]) -> None:
    for argument, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name}: {argument} must be of real floating dtype, but it is of "
                f"{array.dtype}"
            )


def _unknowns(kernel: jax.Array, bias: jax.Array | None) -> int:
    """How many weights lead to one unit of the output."""
    return math.prod(kernel.shape[:-1]) + (bias is not None)


# --- The layer -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    geometry: _Geometry,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    damping: jax.Array,
    second_moment: jax.Array | None,
) -> jax.Array:
    del damping, second_moment
    dtype = geometry.dtype
    y = _convolve(geometry, x.astype(dtype), kernel.astype(dtype), geometry.precision)
    return y if bias is None else y + bias.astype(dtype)


def _forward(geometry, x, kernel, bias, damping, second_moment):
    unknowns = _unknowns(kernel, bias)
    y: Any = _linear(geometry, x, kernel, bias, damping, second_moment)
    equations = y.size // y.shape[-1]
    if geometry.undamped and second_moment is None and equations < unknowns:
        raise ValueError(
            f"{geometry.name}: E[a a^T] is singular: {unknowns} unknowns for each "
            f"output, but {equations} equations (batch times positions); use a larger "
            "batch, damping above 0, or a second_moment of its own"
        )
    return y, (x, kernel, bias, damping, second_moment)


def _backward(geometry, residuals, cotangent):
    x, kernel, bias, damping, given = residuals
    dtype = damping.dtype
    cotangent = cotangent.astype(dtype)
    rows = _rows(geometry, x, kernel, bias, dtype)
    moment = _moment(rows) if given is None else given.astype(dtype)
    targets = cotangent.reshape(*rows.shape[:3], -1)
    gradient = jnp.einsum("bpgi,bpgo->gio", rows, targets, precision=_HIGHEST)
    solution = jax.vmap(_ridge, (0, 0, None))(moment, gradient, damping)
    if bias is None:
        bias_change = None
    else:
        bias_change = solution[:, -1].reshape(bias.shape).astype(bias.dtype)
        solution = solution[:, :-1]
    return (
        _input_change(geometry, x, kernel, cotangent, damping).astype(x.dtype),
        _as_kernel(geometry, solution, kernel.shape).astype(kernel.dtype),
        bias_change,
        jnp.zeros_like(damping),
        None if given is None else jnp.zeros_like(given),
    )


_linear.defvjp(_forward, _backward)


def _convolve(
    geometry: _Geometry, x: jax.Array, kernel: jax.Array, precision: Any
) -> jax.Array:
    if not geometry.rank:
        return jnp.matmul(x, kernel, precision=precision)
    leading = x.shape[: -geometry.rank - 1]
    y = lax.conv_general_dilated(
        _padded(geometry, x),
        kernel,
        geometry.strides,
        "VALID",
        rhs_dilation=geometry.dilation,
        dimension_numbers=geometry.dimension_numbers,
        feature_group_count=geometry.groups,
        precision=precision,
    )
    return y.reshape(*leading, *y.shape[1:])


def _padded(geometry: _Geometry, x: jax.Array) -> jax.Array:
    """With its padding and a single leading axis."""
    x = x.reshape(-1, *x.shape[-geometry.rank - 1 :])
    pads = ((0, 0), *geometry.pads, (0, 0))
    return jnp.pad(x, pads, mode="wrap") if geometry.wraps else jnp.pad(x, pads)


def _rows(
    geometry: _Geometry,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """The inputs as the kernel meets them, shape=(batch, positions, groups, n)."""
    batch, x = x.shape[0], x.astype(dtype)
    if geometry.rank:
        x = lax.conv_general_dilated_patches(
            _padded(geometry, x),
            kernel.shape[: geometry.rank],
            geometry.strides,
            "VALID",
            rhs_dilation=geometry.dilation,
            dimension_numbers=geometry.dimension_numbers,
            precision=_HIGHEST,
        )
    unknowns = _unknowns(kernel, None)
    positions = x.size // (batch * geometry.groups * unknowns)
    rows = x.reshape(batch, positions, geometry.groups, unknowns)
    if bias is None:
        return rows
    return jnp.pad(rows, ((0, 0),) * 3 + ((0, 1),), constant_values=1)


def _moment(rows: jax.Array) -> jax.Array:
    total = jnp.einsum("bpgi,bpgj->gij", rows, rows, precision=_HIGHEST)
    return total / rows.shape[0]


def _ridge(moment: jax.Array, gradient: jax.Array, damping: jax.Array) -> jax.Array:
    """`(moment + damping * mean diagonal)^-1 gradient`, by Cholesky."""
    unknowns = moment.shape[0]
    mean = jnp.trace(moment) / unknowns
    # An input that is always zero leaves nothing to be relative to: the solution is 0.
    ridge = damping * jnp.where(mean > 0, mean, 1)
    factor = jax.scipy.linalg.cho_factor(
        moment + ridge * jnp.eye(unknowns, dtype=moment.dtype)
    )
    return jax.scipy.linalg.cho_solve(factor, gradient)


def _as_kernel(
    geometry: _Geometry, matrices: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Matrices of patches by outputs, a group each, in the kernel's own layout."""
    *window, features_in, _ = shape
    matrix = jnp.moveaxis(matrices, 0, 1).reshape(features_in, *window, -1)
    return jnp.moveaxis(matrix, 0, -2)


def _input_change(
    geometry: _Geometry,
    x: jax.Array,
    kernel: jax.Array,
    cotangent: jax.Array,
    damping: jax.Array,
) -> jax.Array:
    """BP's cotangent over the squared length of what leaves each unit, (14), (22)."""
    kernel = kernel.astype(damping.dtype)

    def pull_back(weights: jax.Array, like: jax.Array, cotangent: jax.Array):
        linear = functools.partial(
            _convolve, geometry, kernel=weights, precision=_HIGHEST
        )
        primal = jax.ShapeDtypeStruct(like.shape, damping.dtype)
        return jax.linear_transpose(linear, primal)(cotangent)[0]

    # What leaves a unit, squared and summed: what ones pull back through the squares.
    one = x[(0,) * (x.ndim - geometry.rank - 1)][None]
    ones = jnp.ones((1, *cotangent.shape[-geometry.rank - 1 :]), damping.dtype)
    lengths = pull_back(jnp.square(kernel), one, ones)[0]
    divisor = lengths + damping * lengths.mean()
    change = pull_back(kernel, x, cotangent)
    return jnp.where(divisor > 0, change / jnp.where(divisor > 0, divisor, 1), 0)
