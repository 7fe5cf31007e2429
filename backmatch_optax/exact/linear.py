r"""Dense and convolutional layers whose backward pass solves least squares.

A layer :math:`b = W a` (BM (5), LH (7); a convolution BM (16)) is given the wanted
change :math:`\delta b` of its output. Back-propagation's gradients are BM (6) and (7),
of a convolution BM (17), (18), (20) and (21). BM asks for the changes of the weight and
of the input that bring :math:`\delta b` about:

* BM (8), (10): the weight. All examples (and positions) are equations for one `W`.
  The solution is BM (13), for a convolution BM (23). `_ridge` solves the system.
* BM (9), (11): the input. Each unit is changed by itself. The solution is BM (12), for
  a convolution BM (22). `_input_change` computes it as BM (14): back-propagation's
  value over the squared length of what leaves the unit.

im2col turns a convolution into a dense layer on patches, BM (19). `_linear_map` does
it; a dense layer is the case without spatial dimensions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from backmatch_optax.exact.arguments import not_negative, real_array, real_dtype
from backmatch_optax.numerics import checked_count, wide

# As in Flax: an int stands for all spatial dimensions.
PerDimension = int | Sequence[int]
Padding = str | int | Sequence[int | Sequence[int]]

# A solve must not see inputs that a matrix unit has rounded.
_HIGHEST = lax.Precision.HIGHEST


def dense(
    x: jax.typing.ArrayLike,
    kernel: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    *,
    damping: jax.typing.ArrayLike = 0.0,
    second_moment: jax.typing.ArrayLike | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    name: str = "exact.dense",
) -> jax.Array:
    r"""`x @ kernel + bias`, whose backward pass is back-matching propagation.

    Its cotangents are the least-squares solutions, BM (12) and (13). Each unit of the
    input has a problem of its own; all entries of the kernel share one:

    .. math::
      \delta' a_j = \frac{w_j^T \delta b}{w_j^T w_j + \lambda_a}, \qquad
      \delta' W = (\mathbb{E}\, a a^T + \lambda_W I)^{-1} \, \mathbb{E}[a \, \delta b^T]

    Here :math:`w_j` is row `j` of the kernel. A bias is the weight of one more input,
    which is always 1. It is solved for together with the kernel; the papers have none.

    Where :math:`\mathbb{E}\, a a^T = I` and the :math:`w_j` have unit length, both
    are BP's cotangents, BM (14) and (15). A unit that no weight leaves gets the
    smallest solution, zero.

    Args:
      x: shape `(batch, *positions, in)`, of real floating dtype.
      kernel: shape `(in, out)`.
      bias: shape `(out,)`, or None.
      damping: a ridge on both problems, relative to their mean diagonals:
        :math:`\lambda_W` is `damping` times the mean diagonal of
        :math:`\mathbb{E}\, a a^T`, :math:`\lambda_a` is `damping` times the mean of
        :math:`w_j^T w_j`. 0 is the papers' rule. As it grows, `damping` times
        :math:`\delta' W` tends to what the scalar rule gives. May be traced.
      second_moment: replaces the batch's own :math:`\mathbb{E}\, a a^T`, for instance
        by a running average of what the function `second_moment` returns.
        Shape `(1, in, in)`, or `(1, in + 1, in + 1)` with a bias.
      dtype: what the forward pass computes in and returns; None for the arguments'
        common dtype. The backward pass computes in float32, or in float64 where an
        argument is, and keeps each argument's dtype.
      precision: of the forward product; the backward pass always takes the highest.
      name: how error messages call the layer.

    Returns:
      shape `(batch, *positions, out)`.

    Raises:
      ValueError: where shapes do not fit, an array is empty or not of real floating
        dtype, or `damping` is negative. When a gradient is taken without damping, also
        where the batch has fewer equations (batch times positions) than the kernel has
        unknowns. A system that is singular for another reason, such as an input that
        is always 0, is not seen while tracing. Its solution is NaN or, within
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
    arrays = (x, kernel, bias, second_moment)
    return _solved(name, arrays, (0,), (), damping, dtype, precision)


def conv(
    x: jax.typing.ArrayLike,
    kernel: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    *,
    strides: PerDimension | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: PerDimension | None = 1,
    feature_group_count: int = 1,
    damping: jax.typing.ArrayLike = 0.0,
    second_moment: jax.typing.ArrayLike | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    name: str = "exact.conv",
) -> jax.Array:
    r"""A convolution, whose backward pass is back-matching propagation.

    It is a dense layer on patches :math:`a_{i2c}`, BM (19). All positions share the
    kernel, BM (22) and (23):

    .. math::
      \delta' a_{ju} = \frac{w_{ju}^T \, \delta b[ju]}{w_{ju}^T w_{ju} + \lambda_a},
      \qquad
      \delta' W = \Big(\mathbb{E} \sum_u a_{i2c} a_{i2c}^T + \lambda_W I\Big)^{-1} \,
      \mathbb{E} \sum_u a_{i2c} \, \delta b_u^T

    Here :math:`w_{ju}` are the weights through which feature `j` at position `u` of the
    input really acts on the output: fewer at a border or between strides. Each group
    has a system of its own.

    Args:
      x: shape `(batch, ..., *spatial, in)`, of real floating dtype; all axes but the
        first and the last are positions.
      kernel: shape `(*window, in / groups, out)`, for 1, 2 or 3 spatial dimensions.
      bias: as in `dense`.
      strides: an int for all dimensions, or one for each; None is 1, as in Flax.
      padding: `"SAME"`, `"SAME_LOWER"`, `"VALID"`, `"CIRCULAR"`, `"CAUSAL"`, an int, or
        an int or a (low, high) pair for each dimension, as in Flax.
      kernel_dilation: an int for all dimensions, or one for each; None is 1.
      feature_group_count: the number of groups the features are split into.
      damping: as in `dense`.
      second_moment: as in `dense`, with shape `(groups, n, n)`. `n` counts the taps
        times `in / groups`, input features outermost, and one more with a bias.
      dtype: as in `dense`.
      precision: as in `dense`.
      name: as in `dense`.

    Returns:
      shape `(batch, ..., *spatial after, out)`.

    Raises:
      ValueError: as `dense`; and where the geometry is none of these, or the window is
        larger than its input.

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
    geometry = (strides, padding, kernel_dilation, feature_group_count)
    arrays = (x, kernel, bias, second_moment)
    return _solved(name, arrays, (1, 2, 3), geometry, damping, dtype, precision)


def second_moment(
    x: jax.typing.ArrayLike,
    kernel: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    **geometry: Any,
) -> jax.Array:
    r"""The matrix that `dense` and `conv` solve with: :math:`\mathbb{E}\, a a^T`.

    A mean over the batch of sums over positions, of inputs (BM (13)) or patches (BM
    (23)). Average it over steps, as K-FAC does, and hand the average to `dense` or
    `conv`.

    Args:
      x: the layer's input, as in `dense` or `conv`.
      kernel: the layer's kernel, of which only the shape matters. Two axes are those of
        a dense layer.
      bias: the layer's bias, or None; with one, inputs have a last coordinate 1.
      **geometry: for a convolution `strides`, `padding`, `kernel_dilation` and
        `feature_group_count`, as in `conv`.

    Returns:
      shape `(groups, n, n)`, dtype float32, or float64 where `x` is; no gradient flows
      through it.

    Raises:
      ValueError: as `dense` and `conv`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> print(exact.second_moment(x, jnp.zeros((2, 5)), jnp.zeros(5)))
      [[[5. 1. 2.]
        [1. 2. 1.]
        [2. 1. 1.]]]
    """
    name = "exact.second_moment"
    x, kernel = real_array(name, "x", x), real_array(name, "kernel", kernel)
    if kernel.ndim == 2 and geometry:
        raise ValueError(f"{name}: a dense layer has no {', '.join(geometry)}")
    _, rows_of, _ = _linear_map(name, x, kernel, range(4), **geometry)
    x = lax.stop_gradient(x).astype(wide(x.dtype))
    return _moment(rows_of(x, bias is not None))


def _linear_map(
    name: str,
    x: jax.Array,
    kernel: jax.Array,
    ranks: Sequence[int],
    strides: PerDimension | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: PerDimension | None = 1,
    feature_group_count: int = 1,
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array], tuple[int, ...]]:
    """What a layer does: its outputs, the rows a kernel meets, the outputs' shape."""
    geometry = f"{strides=}, {padding=}, {kernel_dilation=}, {feature_group_count=}"
    rank, window, unknowns = kernel.ndim - 2, kernel.shape[:-2], kernel.shape[:-1]
    spatial, sizes = "XYZ"[:rank], x.shape[x.ndim - rank - 1 : -1]
    wraps: list[tuple[int, int]] = []
    options: dict[str, Any] = {}

    def outputs(x: jax.Array, kernel: jax.Array, precision: Any = _HIGHEST):
        """BM (5), BM (16)."""
        if not rank:
            return jnp.matmul(x, kernel, precision=precision)
        groups: dict[str, Any] = {"feature_group_count": feature_group_count}
        y = lax.conv_general_dilated(
            wrapped(x), kernel, **options, **groups, precision=precision
        )
        return y.reshape(*x.shape[: -rank - 1], *y.shape[1:])

    def rows(x: jax.Array, biased: bool) -> jax.Array:
        """BM (19), of shape (batch, positions, groups, unknowns)."""
        batch = x.shape[0]
        if rank:
            x = lax.conv_general_dilated_patches(
                wrapped(x), window, **options, precision=_HIGHEST
            )
        x = x.reshape(batch, -1, feature_group_count, math.prod(unknowns))
        return jnp.pad(x, ((0, 0),) * 3 + ((0, biased),), constant_values=1)

    def wrapped(x: jax.Array) -> jax.Array:
        """With a single leading axis, and circular padding."""
        x = x.reshape(-1, *x.shape[-rank - 1 :])
        return jnp.pad(x, ((0, 0), *wraps, (0, 0)), mode="wrap") if wraps else x

    def entries(argument: str, value: Any) -> tuple[int, ...]:
        value = 1 if value is None else value
        values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
        if len(values) != rank:
            raise ValueError(f"{argument} must have an entry for each dimension")
        return tuple(checked_count(argument, entry) for entry in values)

    try:
        checked_count("feature_group_count", feature_group_count)
        if rank not in ranks or x.ndim < max(kernel.ndim, 2):
            raise ValueError(
                "expected x (batch, *positions, in) and kernel (*window, in / groups, "
                f"out) with {' or '.join(map(str, ranks))} spatial dimensions"
            )
        steps = entries("strides", strides)
        dilation = entries("kernel_dilation", kernel_dilation)
        extents = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
        match padding.upper() if isinstance(padding, str) else padding:
            case "CIRCULAR" if all(map(operator.le, extents, sizes)):
                wraps[:] = [((extent - 1) // 2, extent // 2) for extent in extents]
                pads: Any = "VALID"
            case "CIRCULAR":
                raise ValueError("a circular window is larger than its input")
            case "CAUSAL" if rank == 1:
                pads = [(extents[0] - 1, 0)]
            case str() as pads:
                pass
            case _:
                pads = padding if isinstance(padding, Sequence) else [padding] * rank
                pads = [p if isinstance(p, Sequence) else (p, p) for p in pads]
        if rank:
            numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
            options.update(window_strides=steps, padding=pads, rhs_dilation=dilation)
            options.update(dimension_numbers=numbers)
        shapes = (jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (x, kernel))
        shape = jax.eval_shape(outputs, *shapes).shape
        if 0 in shape:
            raise ValueError("the window is larger than its input")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: x of shape {x.shape} and a kernel of shape {kernel.shape} do not "
            f"fit{' with ' + geometry if ranks[-1] else ''}: {error}"
        ) from None
    return outputs, rows, shape


def _solved(
    name: str,
    arrays: Sequence[Any],
    ranks: Sequence[int],
    geometry: Sequence[Any],
    damping: Any,
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """The layer's output, once the arguments are checked."""
    x, kernel = map(partial(real_array, name), ("x", "kernel"), arrays[:2])
    bias, moment = arrays[2:]
    outputs, rows, shape = _linear_map(name, x, kernel, ranks, *geometry)
    unknowns = math.prod(kernel.shape[:-1]) + (bias is not None)
    if bias is not None:
        bias = real_array(name, "bias", bias, kernel.shape[-1:])
    if moment is not None:
        groups = x.shape[-1] // kernel.shape[-2]
        moment = real_array(name, "second_moment", moment, (groups, *[unknowns] * 2))
    known, singular = not_negative(name, "damping", damping), None
    equations = math.prod(shape[:-1])
    if known == 0 and moment is None and equations < unknowns:
        singular = (
            f"{name}: E[a a^T] is singular: {unknowns} unknowns for each output, but "
            f"{equations} equations (batch times positions); use a larger batch, "
            "damping above 0, or a second_moment of its own"
        )
    reals = [array for array in (x, kernel, bias) if array is not None]
    ridge = jnp.asarray(damping, wide(*(array.dtype for array in reals)))
    forward = (real_dtype(name, dtype, *reals), precision)
    static = (outputs, rows, forward, singular)
    return _linear(static, (x, kernel, bias, ridge, moment))


# --- The layer -----------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static: tuple[Any, ...], arguments: tuple[Any, ...]) -> jax.Array:
    outputs, _, (dtype, precision), _ = static
    x, kernel, bias, *_ = arguments
    y = outputs(x.astype(dtype), kernel.astype(dtype), precision)
    return y if bias is None else y + bias.astype(dtype)


def _forward(static, arguments):
    *_, singular = static
    if singular:
        raise ValueError(singular)
    return _linear(static, arguments), arguments


def _backward(static, arguments, cotangent: jax.Array):
    outputs, rows_of, *_ = static
    x, kernel, bias, damping, moment = arguments
    dtype, biased = damping.dtype, bias is not None
    cotangent = cotangent.astype(dtype)
    rows = rows_of(x.astype(dtype), biased)
    targets = cotangent.reshape(*rows.shape[:3], -1)
    # BP's gradient of a kernel, BM (7) and (21), and what BM (13), (23) make of it.
    gradient = jnp.einsum("bpgi,bpgo->gio", rows, targets, precision=_HIGHEST)
    used = _moment(rows) if moment is None else moment.astype(dtype)
    solution = jax.vmap(_ridge, (0, 0, None))(used, gradient, damping)
    # Rows are features of a group by taps, columns groups by outputs.
    *window, features_in, _ = kernel.shape
    matrix = jnp.moveaxis(solution[:, : solution.shape[1] - biased], 0, 1)
    change = jnp.moveaxis(matrix.reshape(features_in, *window, -1), 0, -2)
    input_change = _input_change(outputs, x, kernel.astype(dtype), cotangent, damping)
    changes = (
        input_change.astype(x.dtype),
        change.astype(kernel.dtype),
        solution[:, -1].reshape(bias.shape).astype(bias.dtype) if biased else None,
        jnp.zeros_like(damping),
        None if moment is None else jnp.zeros_like(moment),
    )
    return (changes,)


_linear.defvjp(_forward, _backward)


def _moment(rows: jax.Array) -> jax.Array:
    total = jnp.einsum("bpgi,bpgj->gij", rows, rows, precision=_HIGHEST)
    return total / rows.shape[0]


def _ridge(moment: jax.Array, gradient: jax.Array, damping: jax.Array) -> jax.Array:
    """`(moment + damping * mean diagonal)^-1 gradient` by Cholesky, BM (15)."""
    unknowns = moment.shape[0]
    mean = jnp.trace(moment) / unknowns
    # An input that is always zero leaves nothing to be relative to: the solution is 0.
    ridge = damping * jnp.where(mean > 0, mean, 1)
    factor = jax.scipy.linalg.cho_factor(
        moment + ridge * jnp.eye(unknowns, dtype=moment.dtype)
    )
    return jax.scipy.linalg.cho_solve(factor, gradient)


def _input_change(
    outputs: Callable, x: Any, kernel: jax.Array, cotangent: jax.Array, damping: Any
) -> jax.Array:
    """BP's value over the squared length of what leaves each unit, BM (14), (22)."""

    def pull_back(weights: jax.Array, shape: tuple[int, ...], cotangent: jax.Array):
        primal = jax.ShapeDtypeStruct(shape, damping.dtype)
        linear = partial(outputs, kernel=weights)
        return jax.linear_transpose(linear, primal)(cotangent)[0]

    # What leaves a unit, squared and summed: what ones pull back through the squares.
    own = kernel.ndim - 1  # axes of one example: spatial and features
    ones = jnp.ones((1, *cotangent.shape[-own:]), damping.dtype)
    lengths = pull_back(jnp.square(kernel), (1, *x.shape[-own:]), ones)[0]
    divisor = lengths + damping * lengths.mean()
    change = pull_back(kernel, x.shape, cotangent)
    return jnp.where(divisor > 0, change / jnp.where(divisor > 0, divisor, 1), 0)
