"""Blocks of a network scored by their local Hessians."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax.local_hessian.estimates import MeanDiagonal, mean_diagonal
from backmatch_optax.local_hessian.extremes import Condition, condition, is_small
from backmatch_optax.local_hessian.krylov import NUM_MATVECS
from backmatch_optax.local_hessian.operator import (
    BlockFn,
    LocalHessian,
    factor_shape,
    input_hessian,
    weight_hessian,
)
from backmatch_optax.numerics import checked_count
from backmatch_optax.text import aligned


class BlockReport(NamedTuple):
    """One block of a `Report`; without weights their two numbers are None."""

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
        return aligned(rows)


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
    num_matvecs: int = NUM_MATVECS,
    num_probes: int = 8,
) -> Report:
    """Scores blocks by their local Hessians, as LH (section 4) suggests for design.

    A low condition number of `H_z` makes a block good to back-propagate through. A low
    one of `H_W` makes it good to train. Pass the blocks of a model, or one block in
    variants: plain, with batch normalisation, with a skip connection.

    Here `H_z` is with respect to the first example's input, with the others fixed.
    `H_W` is the mean over the batch.

    Args:
      blocks: by name, the block's function, parameters and input, as `input_hessian`
        takes them. A batch too small for the parameters leaves zeros in `H_W`.
      key: key of the random probes.
      num_matvecs: for the larger blocks, see `condition`.
      num_probes: for the means, see `mean_diagonal`.

    Returns:
      A `Report`. Printed, it is a table of the mean eigenvalues `m_z` and `m_W`, the
      condition numbers, `>=` where they are lower bounds, and the shares of zeros.

    Raises:
      ValueError: where a count is below 1, or a block is refused, see `input_hessian`.
        The message names the block.
      ImportError: where a block is large and matfree is not installed.

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
    checked_count("num_probes", num_probes)
    checked_count("num_matvecs", num_matvecs)
    scored = {}
    for index, (name, block) in enumerate(blocks.items()):
        probe = jax.random.fold_in(key, index)
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
            for hessian in hessians:
                most = min(num_matvecs, *factor_shape(hessian))
                matvecs = None if is_small(hessian) else most
                scores.append(mean_diagonal(hessian, key=probe, num_probes=num_probes))
                scores.append(condition(hessian, key=probe, num_matvecs=matvecs))
        except ValueError as error:
            raise ValueError(f"block {name!r}: {error}") from error
        scored[name] = BlockReport(*scores, *[None] * (4 - len(scores)))
    return Report(blocks=scored)


def _of_first_example(fn: BlockFn, params: Any, z: jax.Array) -> LocalHessian:
    alone = np.asarray(fn(params, z[:1]), np.float64)
    together = np.asarray(fn(params, z), np.float64)
    if np.abs(alone - together[:1]).max() <= 1e-3 * np.abs(together).max():
        return input_hessian(fn, params, z[:1])
    others = z[1:]  # a normalisation by the batch couples them to the first

    def with_others(params: Any, first: jax.Array) -> jax.Array:
        return fn(params, jnp.concatenate([first, others]))

    return LocalHessian(
        fn=with_others, wrt="input", params=params, z=z[:1], target=None
    )
