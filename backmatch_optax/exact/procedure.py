"""LH's Procedure 1, of which back-propagation is a solution (LH Proposition 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from backmatch_optax.exact.arguments import real_array


def procedure_1(
    blocks: Sequence[Callable[[Any, jax.Array], jax.Array]],
    params: Sequence[Any],
    x: jax.typing.ArrayLike,
    loss: Callable[[jax.Array], jax.Array],
    *,
    step_size: jax.typing.ArrayLike,
) -> list[Any]:
    r"""Back-matching propagation, each problem by one gradient step (LH Procedure 1).

    From the last block to the first, LH (3) and (4) make the block's back-matching
    loss, LH (5), smaller:

    .. math::
      \ell_b(W, z) = \tfrac12 \big\| z_b^{k + 1/2} - F_b(W, z) \big\|^2, \qquad
      \ell_B(W, z) = \mathrm{loss}\big(F_B(W, z)\big)

    LH (3) is a gradient step of `step_size` for the parameters, LH (4) one of size 1
    for the input, which becomes the target :math:`z_{b-1}^{k+1/2}` of the block below.
    The result is that of a gradient step of `step_size` on the whole network (LH
    Proposition 1), up to rounding.

    Args:
      blocks: `fn(params, z)` for each block, input to output; each returns an array of
        real floating dtype.
      params: the parameters of each block, any tree of arrays.
      x: the input of the first block.
      loss: maps the output of the last block to a scalar.
      step_size: of the steps on the parameters, LH's :math:`\mu`.

    Returns:
      The new parameters of each block.

    Raises:
      ValueError: where there are not as many `params` as `blocks`, there is no block,
        or `x` or what a block returns is empty or no array of real floating dtype.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import exact
      >>> blocks = [lambda w, z: z @ w, lambda w, z: jnp.tanh(z @ w)]
      >>> params = [jnp.eye(2), jnp.ones((2, 1))]
      >>> x = jnp.array([[0.5, -0.5]])
      >>> new = exact.procedure_1(blocks, params, x, jnp.sum, step_size=0.1)
      >>> gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w @ params[1])))(params[0])
      >>> print(jnp.allclose(new[0], params[0] - 0.1 * gradient))
      True
    """
    if len(blocks) != len(params) or not blocks:
        raise ValueError(
            "procedure_1: expected one tree of params for each block and at least one "
            f"block, but there are {len(blocks)} blocks and {len(params)} params"
        )
    signals = [real_array("procedure_1", "x", x)]
    for index, (block, weights) in enumerate(zip(blocks, params, strict=True)):
        output = block(weights, signals[-1])
        what = f"the output of blocks[{index}]"
        if isinstance(output, (list, tuple)):  # arrays that would become one
            raise ValueError(
                f"procedure_1: {what} must be an array, but it is a "
                f"{type(output).__name__}"
            )
        signals.append(real_array("procedure_1", what, output))

    new_params: list[Any] = []
    target: jax.Array | None = None
    for block, weights, signal in reversed(
        list(zip(blocks, params, signals[:-1], strict=True))
    ):

        def matching_loss(weights, z, block=block, target=target):
            output = block(weights, z)
            if target is None:
                return loss(output)
            return jnp.sum(jnp.square(target - output)) / 2

        gradient, slope = jax.grad(matching_loss, argnums=(0, 1))(weights, signal)
        new_params.append(
            jax.tree.map(lambda w, g: w - step_size * g, weights, gradient)
        )
        target = signal - slope
    return new_params[::-1]
