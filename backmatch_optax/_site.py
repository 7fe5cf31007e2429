"""A link at its place in the chain: everything its rules may depend on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from backmatch_optax._moments import Moments
from backmatch_optax._positive import Positive, measured, number, wide

if TYPE_CHECKING:
    from backmatch_optax.spec import Link

Shape = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Site:
    """A link between its input and its output, with the parameters it owns.

    Shapes carry no batch dimension; the last axis holds the features, all others are
    positions. The recursion's two passes write `moments`, of the incoming signal, and
    `m`, the backward factor at the output.
    """

    link: Link
    label: str  # how error messages and tables call it
    input_shape: Shape
    output_shape: Shape
    params: Mapping[str, Any]  # by role, "kernel"; a Block's are nested dicts
    arms: Mapping[str, list[Site]]  # of a link that holds chains itself
    mean_field: bool = False  # exact Gaussian gains instead of the papers'
    centred: bool = False  # whether cotangents at the output have mean zero
    moments: Moments = dataclasses.field(default_factory=lambda: Moments(number(1.0)))
    m: Positive = dataclasses.field(default_factory=lambda: number(1.0))
    _row_norms: dict[str, Positive] = dataclasses.field(default_factory=dict)

    @property
    def q(self) -> Positive:
        """The second moment of the incoming signal."""
        return self.moments.q

    @property
    def fan_in(self) -> int:
        """Features of the input; kernel taps do not count (BM: rows of W_col)."""
        return self.input_shape[-1]

    @property
    def fan_out(self) -> int:
        """Features of the output (BM: rows of W_row)."""
        return self.output_shape[-1]

    @property
    def positions_in(self) -> int:
        """Positions of the input."""
        return math.prod(self.input_shape[:-1])

    @property
    def positions_out(self) -> int:
        """Positions of the output."""
        return math.prod(self.output_shape[:-1])

    @property
    def size_in(self) -> int:
        """Coordinates of the input."""
        return math.prod(self.input_shape)

    @property
    def size_out(self) -> int:
        """Coordinates of the output."""
        return math.prod(self.output_shape)

    def squared_row_norm(self, role: str) -> Positive:
        """BM's `||W||^2_{2,mu}`: the mean over output features of `||w||^2`.

        Flax keeps the output features on the last axis of every parameter, so for a
        BatchNorm's scale or bias this is its mean square. Every call returns the same
        atom, so that norms cancel.
        """
        if role not in self._row_norms:
            mean = _mean_over_last(self.params[role])
            self._row_norms[role] = measured(mean, is_norm=True)
        return self._row_norms[role]


@jax.jit  # traced once for every shape, not for every layer
def _mean_over_last(leaf: jax.Array) -> jax.Array:
    # At least float32: squares overflow float16 from 256 on. One plain reduction over
    # all axes: a reshape would gather, or refuse, a sharded kernel.
    return jnp.sum(jnp.square(leaf.astype(wide(leaf.dtype)))) / leaf.shape[-1]
