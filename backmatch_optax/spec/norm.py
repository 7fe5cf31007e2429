"""Normalisations (BM (36), LH (24))."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Link, Shape, Site, check_path, check_vector


class _Normalisation(Link):
    """What all normalisations share: unit moment, then a scale and a bias."""

    path: str | None

    roles = ("scale", "bias")

    def validate(self) -> None:
        if self.path is not None:
            check_path(self.path)

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

    def centres(self, centred: bool) -> bool:
        del centred
        return False  # it multiplies every example by a number of its own

    def moments_after(self, here: Site) -> Moments:
        remaining = self.remaining(here)
        moments = remaining * (self._squared_scale(here) / remaining.q)
        if "bias" not in here.params:
            return moments
        bias = here.squared_row_norm("bias")
        if here.mean_field:
            return moments.with_spread(bias)
        return Moments(moments.variance + bias)

    def m_W(self, here: Site, role: str) -> Positive:
        # Each entry acts at every position: the scale on a signal of moment 1, the bias
        # on a constant one.
        del role
        return number(here.positions_out)

    def m_z(self, here: Site) -> Positive:
        return self._squared_scale(here) / self.remaining(here).q

    def _squared_scale(self, here: Site) -> Positive:
        return here.squared_row_norm("scale") if "scale" in here.params else number(1.0)


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorm(_Normalisation):
    """Batch normalisation over the last axis, `flax.linen.BatchNorm` or nnx's.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a BatchNorm without either (`use_scale=False, use_bias=False`), as in the
        papers.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.BatchNorm(), spec.BatchNorm("BatchNorm_0")
      (spec.BatchNorm(), spec.BatchNorm('BatchNorm_0'))
    """

    path: str | None = None

    def remaining(self, here: Site) -> Moments:
        # BM (36), LH (24): a unit's variance over the batch. With the papers' gains
        # that is the whole incoming moment.
        return Moments(here.moments.variance)

    def centres(self, centred: bool) -> bool:
        del centred
        return True


@dataclasses.dataclass(frozen=True, repr=False)
class LayerNorm(_Normalisation):
    """Normalisation over the features, `flax.linen.LayerNorm` or `flax.nnx.LayerNorm`.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a LayerNorm without either.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.LayerNorm("LayerNorm_0")
      spec.LayerNorm('LayerNorm_0')
    """

    path: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class GroupNorm(_Normalisation):
    """Normalisation over groups of features and all positions, `flax.linen.GroupNorm`.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a GroupNorm without either.
      num_groups: the number of groups, Flax's 32 by default. As many as there are
        features is `flax.linen.InstanceNorm`.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes, where
        `num_groups` is no positive int, or (at `init`) where it does not divide the
        number of features.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.GroupNorm("GroupNorm_0"), spec.GroupNorm("GroupNorm_1", num_groups=8)
      (spec.GroupNorm('GroupNorm_0'), spec.GroupNorm('GroupNorm_1', num_groups=8))
    """

    path: str | None = None
    num_groups: int = dataclasses.field(default=32, kw_only=True)

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise ValueError(
                f"num_groups (={self.num_groups!r}) must be a positive int"
            )

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
        if spread is None or units == 1:
            return Moments(here.moments.variance)
        return Moments(here.moments.variance, spread * (1.0 - 1.0 / units))


@dataclasses.dataclass(frozen=True, repr=False)
class RMSNorm(_Normalisation):
    """Division by the features' root mean square, `flax.linen.RMSNorm` or nnx's.

    Args:
      path: where its `scale` lies in the parameters; None for one without.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.RMSNorm("RMSNorm_0")
      spec.RMSNorm('RMSNorm_0')
    """

    path: str | None = None

    roles = ("scale",)

    def remaining(self, here: Site) -> Moments:
        return here.moments
