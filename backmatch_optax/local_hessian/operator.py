"""The local Hessian of a block, as products with vectors."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

BlockFn = Callable[[Any, jax.Array], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "z", "target"],
    meta_fields=["fn", "wrt"],
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LocalHessian:
    """A local Hessian as products with vectors; a pytree, to be passed through `jit`.

    Made by `input_hessian` and `weight_hessian`, which check their arguments.
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
        linear = factor(self)
        if self.target is not None:
            return linear(v)
        return jax.linear_transpose(linear, self.point)(linear(v))[0]


def factor(hessian: LocalHessian) -> Callable[[Any], Any]:
    """The Jacobian `J` where the Hessian is `J^T J`, else the Hessian, as a linear map.

    Its singular values, squared where it is `J`, are the eigenvalues' sizes. The block
    itself runs once.
    """
    of_input = hessian.wrt == "input"
    # Divided before the squares, so that J^T J is a mean over the batch.
    root = 1.0 if of_input else math.sqrt(hessian.z.shape[0])

    def output(x: Any) -> jax.Array:
        inputs = (hessian.params, x) if of_input else (x, hessian.z)
        return hessian.fn(*inputs) / root

    if hessian.target is None:
        return jax.linearize(output, hessian.point)[1]
    target = hessian.target / root

    def loss(x: Any) -> jax.Array:
        return jnp.sum(jnp.square(output(x) - target)) / 2

    return jax.linearize(jax.grad(loss), hessian.point)[1]


def factor_shape(hessian: LocalHessian) -> tuple[int, int]:
    """Rows and columns of the factor."""
    if hessian.target is not None:
        return hessian.size, hessian.size
    output = jax.eval_shape(hessian.fn, hessian.params, hessian.z)
    return output.size, hessian.size


def input_hessian(
    fn: BlockFn, params: Any, z: jax.Array, *, target: jax.Array | None = None
) -> LocalHessian:
    r"""The local Hessian of a block with respect to its input (LH 6, 8, 13, 17).

    Args:
      fn: the block, `fn(params, z)`, differentiable in forward mode, twice with a
        target. Pass the same function object again to reuse what was compiled.
      params: the block's parameters, a tree of arrays; `{}` where there are none.
      z: the block's input, with the batch as first axis and of real floating dtype.
      target: what the output should be, :math:`z_b^{k+1/2}` of LH (5). In
        back-propagation that is the output minus the loss's gradient there. None leaves
        the Gauss-Newton part. It is all there is where the target is met, and for a
        block that is linear in `z`.

    Returns:
      The operator, with a row and a column for each number in `z`.

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
      params: the block's parameters, one or more arrays of real floating dtype.
      z: as in `input_hessian`.
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
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        _check_float(leaf, f"parameter {name!r}")
    _check_block(fn, params, z, target)
    return LocalHessian(fn=fn, wrt="weights", params=params, z=z, target=target)


def _check_block(fn: BlockFn, params: Any, z: Any, target: Any) -> None:
    if not callable(fn):
        raise ValueError(f"fn (={fn!r}) must be a function of params and z")
    _check_float(z, "z", batched=True)
    output = jax.eval_shape(fn, params, z)
    if not isinstance(output, jax.ShapeDtypeStruct):
        structure = jax.tree.structure(output)
        raise ValueError(
            f"fn must return one array, the block's output, but it returned {structure}"
        )
    _check_float(output, "the output of fn", batched=True)
    if output.shape[0] != z.shape[0]:
        raise ValueError(
            f"fn must keep the batch as first axis, but it made {output.shape} of z's "
            f"{z.shape}"
        )
    if target is not None:
        _check_float(target, "target")
        if target.shape != output.shape:
            raise ValueError(
                f"target must have the output's shape {output.shape}, but it has "
                f"{target.shape}"
            )


def _check_float(array: Any, name: str, *, batched: bool = False) -> None:
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise ValueError(f"{name} must be an array, but it is a {type(array).__name__}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be of a real floating dtype, but it is {dtype}")
    if batched and (array.ndim < 1 or 0 in array.shape):
        raise ValueError(
            f"{name} must have the batch as first axis and no empty axis, but its "
            f"shape is {array.shape}"
        )
