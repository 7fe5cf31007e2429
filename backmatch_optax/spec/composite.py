"""Links made of others, and blocks of any kind."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from backmatch_optax.moments import Moments
from backmatch_optax.numerics import wide
from backmatch_optax.powers import Positive, measured, number
from backmatch_optax.spec import crossterms
from backmatch_optax.spec.link import (
    Elementwise,
    Link,
    Shape,
    Site,
    check_path,
    checked_links,
    kind_of,
)
from backmatch_optax.spec.windows import checked_shape

_LARGEST = sys.float_info.max

# A Block's curvature: a number, or a function of the block's parameters.
Curvature = float | Callable[[Mapping[str, Any]], jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True, repr=False)
class Block(Link):
    """A block of any kind, with the two scalars of LH Algorithm 2 given by the user.

    Every parameter below `path` is scaled by `1 / (m * weight_curvature)`, and the
    backward factor `m` is multiplied by `input_curvature`, LH (22) and (23).

    Args:
      path: where the block's parameters lie; None for a block without any.
      weight_curvature: `m_W`, the mean diagonal of `J^T J` with respect to the block's
        parameters: a positive number, or a function of the block's parameters (nested
        dicts of arrays) that returns a positive scalar. None leaves it to `infer_spec`,
        which measures it.
      input_curvature: `m_z`, the same with respect to the block's input.
      forward_gain: by how much the block multiplies the second moment of its signal;
        a number or a function. 1 is right for a block that ends in a normalisation.
      output_shape: shape of the block's output without the batch dimension; None if it
        is the input's.

    Raises:
      ValueError: where a curvature is neither a positive number nor a function, or (at
        `init`) a function returns something that is not a real scalar, or a negative
        one. Under `jax.jit` a negative number makes scales of NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import spec
      >>> def squared_norm(params):
      ...     return jnp.sum(params["kernel"] ** 2)
      >>> spec.Block("mixer", weight_curvature=2.0, input_curvature=squared_norm)
      spec.Block('mixer', weight_curvature=2.0, input_curvature=squared_norm)
    """

    path: str | None
    weight_curvature: Curvature | None = dataclasses.field(default=None, kw_only=True)
    input_curvature: Curvature | None = dataclasses.field(default=None, kw_only=True)
    forward_gain: Curvature = dataclasses.field(default=1.0, kw_only=True)
    output_shape: Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    owns_subtree = True

    def validate(self) -> None:
        if self.path is not None:
            check_path(self.path)
        for name in ("weight_curvature", "input_curvature", "forward_gain"):
            value = getattr(self, name)
            if callable(value) or (value is None and name != "forward_gain"):
                continue
            if not isinstance(value, numbers.Real):
                raise ValueError(
                    f"{name} (={value!r}) must be a positive number or a function of "
                    "the block's parameters"
                )
            if not 0 < value <= _LARGEST:  # pyright: ignore
                raise ValueError(f"{name} (={value!r}) must be positive and finite")
            self._canonical(**{name: float(value)})
        if self.output_shape is not None:
            self._canonical(
                output_shape=checked_shape("output_shape", self.output_shape)
            )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """As declared."""
        del param_shapes
        for name in ("weight_curvature", "input_curvature")[self.path is None :]:
            if getattr(self, name) is None:
                raise ValueError(
                    f"needs {name}, a positive number; infer_spec measures it for a "
                    "block among its blocks"
                )
        return input_shape if self.output_shape is None else tuple(self.output_shape)

    def moments_after(self, here: Site) -> Moments:
        return here.moments * self._value(here, "forward_gain")

    def centres(self, centred: bool) -> bool:
        del centred
        return False

    def m_W(self, here: Site, role: str) -> Positive:
        del role  # one number for all the block's parameters
        return self._value(here, "weight_curvature")

    def m_z(self, here: Site) -> Positive:
        return self._value(here, "input_curvature")

    def _value(self, here: Site, name: str) -> Positive:
        declared = getattr(self, name)
        if not callable(declared):
            return number(declared)
        value = declared(here.params)
        if isinstance(value, float):
            value = jnp.float32(value)
        dtype: Any = getattr(value, "dtype", None)
        shape = getattr(value, "shape", None)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            found = kind_of(value) if dtype is None else f"shape {shape} of {dtype}"
            raise ValueError(
                f"spec layer {here.label}: {name} must return a real scalar, but it "
                f"returned {found}"
            )
        known = not isinstance(value, jax.core.Tracer)
        if known and float(value) < 0:  # pyright: ignore
            raise ValueError(
                f"spec layer {here.label}: {name} must return a positive number, but "
                f"it returned {value}"
            )
        return measured(jnp.asarray(value, wide(dtype)))  # traced, below 0 it is NaN


@dataclasses.dataclass(frozen=True, repr=False)
class Residual(Link):
    """Two chains side by side whose outputs are added: `branch(x) + shortcut(x)`.

    Second moments add, and so do backward factors: the Gauss-Newton part of
    `(I + J)^T (I + J)`, LH (13), with the cross terms left out. With mean-field gains
    they count where both arms are elementwise functions of the same input, as in
    `x + relu(x)`.

    Args:
      branch: the links of the branch, from input to output.
      shortcut: the links of the shortcut; empty for the identity.

    Raises:
      ValueError: where an entry is not a link, or (at `init`) the two outputs differ in
        shape.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Residual([spec.Dense("Dense_0"), spec.BatchNorm()])
      spec.Residual((spec.Dense('Dense_0'), spec.BatchNorm()))
    """

    branch: Sequence[Link]
    shortcut: Sequence[Link] = ()

    def validate(self) -> None:
        self._canonical(
            branch=checked_links("branch", self.branch),
            shortcut=checked_links("shortcut", self.shortcut),
        )

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"branch": self.branch, "shortcut": self.shortcut}

    def elementwise(self, here: Site) -> Elementwise | None:
        return crossterms.elementwise_sum(here)

    def moments_after(self, here: Site) -> Moments:
        together = crossterms.together(here)
        if together:
            here.m_z_of_arms = together.m_z
            return together.moments
        branch, shortcut = here.arm_moments
        return branch + shortcut
