"""Normalisations (LH (16), BM (24); their rule is BM (36), LH (24))."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from backmatch_optax.activations import DENSITY
from backmatch_optax.moments import NOTHING, Moments
from backmatch_optax.numerics import checked_count, wide
from backmatch_optax.powers import (
    Positive,
    applied,
    magnitudes,
    measured,
    number,
    share,
)
from backmatch_optax.spec.link import (
    Elementwise,
    Link,
    Shape,
    Site,
    check_path,
    check_vector,
)


@dataclasses.dataclass(frozen=True, repr=False)
class _Normalisation(Link):
    """What all normalisations share: unit moment, then a scale and a bias."""

    path: str | None = None
    epsilon: float = dataclasses.field(default=1e-6, kw_only=True)

    roles = ("scale", "bias")

    def validate(self) -> None:
        if self.path is not None:
            check_path(self.path)
        wanted = "a finite number of at least 0"
        self._canonical_number("epsilon", wanted, lambda e: 0.0 <= e < math.inf)

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's."""
        for role in self.roles:
            check_vector(role, param_shapes, input_shape[-1])
        return input_shape

    def remaining(self, here: Site) -> Moments:
        """The signal's moments without the means that it takes away."""
        return here.moments.without_offset()

    def centres(self, here: Site) -> bool:
        del here
        return False  # it multiplies every example by a number of its own

    def takes_away_norm(self, has_bias: bool) -> bool:
        # A bias is part of the signal: it would have to shrink with the kernel.
        return not has_bias

    def unit(self, here: Site) -> Positive:
        """The moment of what its scale multiplies: 1, or `q / (q + epsilon)`.

        The papers have no epsilon. With mean-field gains it counts, as a factor of the
        papers' rule: the norms inside `q` still cancel.
        """
        if not here.mean_field or not self.epsilon:
            return number(1.0)
        q, floor = self.remaining(here).q, here.norm_floor
        return here.once("unit", lambda: share(q, self.epsilon, floor=floor))

    def elementwise(self, here: Site) -> Elementwise:
        remaining, scale = self.remaining(here), jnp.float32(1.0)
        if "scale" in here.params:
            scale = magnitudes([self.scale_square(here) ** 0.5])[0]

        def normalised(values: jax.Array) -> jax.Array:
            fixed = jax.lax.stop_gradient(values)  # statistics are constants, BM (36)
            means = jnp.zeros(())
            if remaining.offset is None:
                means = (fixed @ DENSITY)[:, None]
                means = means if remaining.spread is None else DENSITY @ means
            q = DENSITY @ ((fixed - means) ** 2 @ DENSITY)
            divisor = jnp.sqrt(jnp.where(q > 0, q + self.epsilon, 1.0))
            return (values - means) * (scale / divisor)

        return normalised

    def moments_after(self, here: Site) -> Moments:
        moments = self.remaining(here) * self.m_z(here)
        if "bias" not in here.params:
            return moments
        bias = here.squared_row_norm("bias")
        if here.mean_field:
            return moments.with_spread(bias)
        return Moments(moments.variance + bias)

    def m_W(self, here: Site, role: str) -> Positive:
        # Each entry acts at every position; the bias on a constant one.
        if role == "bias":
            return here.added(here.positions_out)
        remaining = self.remaining(here)
        return (
            self.unit(here)
            * here.met(remaining, here.positions_out, 1)
            / (remaining.variance if here.centred else remaining.q)
        )

    def m_z(self, here: Site) -> Positive:
        # BM (36), LH (24): signal and gradient are divided by the same deviation.
        gain = self.unit(here) / self.remaining(here).q
        return gain * self.scale_square(here) if "scale" in here.params else gain

    def aligned_below(self, here: Site) -> Positive | None:
        return here.aligned

    def scale_square(self, here: Site) -> Positive:
        """The mean square of what the normalised signal is multiplied by."""
        return here.squared_row_norm("scale")


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorm(_Normalisation):
    """Batch normalisation over the last axis, `flax.linen.BatchNorm` or nnx's.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a BatchNorm without either (`use_scale=False, use_bias=False`), as in the
        papers.
      epsilon: what it adds to the variance. It counts with mean-field gains.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.BatchNorm(), spec.BatchNorm("BatchNorm_0", epsilon=1e-3)
      (spec.BatchNorm(), spec.BatchNorm('BatchNorm_0', epsilon=0.001))
    """

    epsilon: float = dataclasses.field(default=1e-5, kw_only=True)

    divides = True

    def remaining(self, here: Site) -> Moments:
        # A unit's variance over the batch: with the papers' gains all of `q`.
        return Moments(here.moments.variance, along=here.moments.along)

    def centres(self, here: Site) -> bool:
        del here
        return True

    def aligned_below(self, here: Site) -> Positive | None:
        del here
        return None  # what goes with the signal is taken away, as the mean is

    def takes_away_norm(self, has_bias: bool) -> bool:
        del has_bias  # it goes with the mean
        return True


@dataclasses.dataclass(frozen=True, repr=False)
class LayerNorm(_Normalisation):
    """Normalisation over the features, `flax.linen.LayerNorm` or `flax.nnx.LayerNorm`.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a LayerNorm without either.
      epsilon: what it adds to the variance. It counts with mean-field gains.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.LayerNorm("LayerNorm_0")
      spec.LayerNorm('LayerNorm_0')
    """


@dataclasses.dataclass(frozen=True, repr=False)
class GroupNorm(_Normalisation):
    """Normalisation over groups of features and all positions, `flax.linen.GroupNorm`.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a GroupNorm without either.
      num_groups: the number of groups, Flax's 32 by default. As many as there are
        features is `flax.linen.InstanceNorm`.
      epsilon: what it adds to the variance. It counts with mean-field gains.

    Raises:
      ValueError: where an argument is none of these, or (at `init`) where `num_groups`
        does not divide the number of features.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.GroupNorm("GroupNorm_0"), spec.GroupNorm("GroupNorm_1", num_groups=8)
      (spec.GroupNorm('GroupNorm_0'), spec.GroupNorm('GroupNorm_1', num_groups=8))
    """

    num_groups: int = dataclasses.field(default=32, kw_only=True)

    def validate(self) -> None:
        super().validate()
        self._canonical(num_groups=checked_count("num_groups", self.num_groups))

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        if input_shape[-1] % self.num_groups:
            raise ValueError(
                f"num_groups (={self.num_groups}) must divide the {input_shape[-1]} "
                "features of its input"
            )
        return super().shape_after(input_shape, param_shapes)

    def remaining(self, here: Site) -> Moments:
        # The mean of g units with means of either sign has a g-th of their square.
        units = here.fan_in // self.num_groups
        spread = here.moments.spread
        if units == 1:  # the mean over positions, too, has nothing left
            return Moments(here.moments.variance)
        if spread is None:
            return Moments(here.moments.variance, along=here.moments.along)
        spread = spread * (1.0 - 1.0 / units)
        return Moments(here.moments.variance, spread, along=here.moments.along)

    def m_z(self, here: Site) -> Positive:
        return super().m_z(here) * self._left(here)[0]

    def common_below(self, here: Site) -> Positive | None:
        return self._left(here)[1]

    def aligned_below(self, here: Site) -> Positive | None:
        return self._left(here)[2]

    def _left(self, here: Site) -> tuple[Positive, Positive | None, Positive | None]:
        """What is left of what passes back, and which share of it is of each kind.

        A group's mean is taken away, and what goes with its signal. Both are sums over
        the units of the group, of either sign: of a square, a share of 1 / units.
        """
        parts, units = (here.common, here.aligned), here.fan_in // self.num_groups
        known = [part for part in parts if part is not None]
        if not known:
            return number(1.0), None, None
        function = _taken(units, here.positions_in)
        if any(part.powers for part in known):
            found = here.once("left", lambda: applied(function, parts))
        else:  # so that norms still cancel
            shares = [math.exp(p.log_constant) if p else 0.0 for p in parts]
            figures = function(*shares, maximum=max)
            found = [number(max(figure, NOTHING)) for figure in figures]
        left, common, aligned = found
        if units == 1:
            return left, None, None
        return left, here.common and common, here.aligned and aligned


@functools.cache
def _taken(units: int, positions: int) -> Callable[..., Sequence[Any]]:
    """`GroupNorm._left` for groups of so many units, as a function of both shares."""

    def taken(common: Any, aligned: Any, maximum: Any = jnp.maximum) -> Sequence[Any]:
        # Borders and chance leave something where the rule leaves nothing.
        left = maximum(1.0 - (common + aligned) / units, 1.0 / positions)
        rest = (1.0 - 1.0 / units) / left
        return left, common * rest, aligned * rest

    return taken


@dataclasses.dataclass(frozen=True, repr=False)
class RMSNorm(_Normalisation):
    """Division by the features' root mean square, `flax.linen.RMSNorm` or nnx's.

    Args:
      path: where its `scale` lies in the parameters; None for one without.
      epsilon: what it adds to the mean square. It counts with mean-field gains.
      one_plus: whether the signal is multiplied by `1 + scale`, as in Gemma.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.RMSNorm("RMSNorm_0")
      spec.RMSNorm('RMSNorm_0')
    """

    one_plus: bool = dataclasses.field(default=False, kw_only=True)

    roles = ("scale",)

    def scale_square(self, here: Site) -> Positive:
        if not self.one_plus:
            return super().scale_square(here)
        scale, floor = here.params["scale"], here.norm_floor
        factor = 1.0 + scale.astype(wide(scale.dtype))
        return here.once(
            "one_plus", lambda: measured(jnp.mean(jnp.square(factor)), floor=floor)
        )

    def remaining(self, here: Site) -> Moments:
        return here.moments
