"""Softmax and its logarithm, which mostly end a network: `Softmax`, `LogSoftmax`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Link, Shape, Site


@dataclasses.dataclass(frozen=True, repr=False)
class _NearlyUniform(Link):
    """A function of `C` logits with Jacobian `c (I - 1 1^T / C)` where they are equal.

    The mean diagonal of `J^T J` is then `c^2 (C - 1) / C`.
    """

    def _at_equal_logits(self, count: int) -> tuple[float, float]:
        """The slope `c`, and what every output is."""
        raise NotImplementedError

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's."""
        del param_shapes
        if input_shape[-1] < 2:
            raise ValueError(
                f"needs at least 2 features, but its input has shape {input_shape}: of "
                "a single feature it is constant"
            )
        return input_shape

    def moments_after(self, here: Site) -> Moments:
        # What all logits have in common makes no difference.
        moments = here.moments.without_offset() * self.m_z(here)
        common = number(self._at_equal_logits(here.fan_in)[1]) ** 2
        if here.mean_field:
            return Moments(moments.variance, moments.spread, common)
        return Moments(moments.variance + common)

    def m_z(self, here: Site) -> Positive:
        slope, _ = self._at_equal_logits(here.fan_in)
        return number(slope**2 * (here.fan_in - 1) / here.fan_in)

    def centres(self, here: Site) -> bool:
        del here
        return False  # every example has probabilities of its own


@dataclasses.dataclass(frozen=True, repr=False)
class LogSoftmax(_NearlyUniform):
    """Logarithm of the probabilities of `C` logits, over the last axis.

    With `p` the probabilities, `J = I - 1 p^T`, and the mean diagonal of `J^T J` is

        1 - 2 / C + sum(p^2)

    Probabilities count as nearly uniform, as they are at the start of training. Then
    `m_z = (C - 1) / C`. For any other probabilities that is too small by at most 2.

    Raises:
      ValueError: (at `init`) where there is one logit.

    Examples:
      >>> from backmatch_optax import spec
      >>> policy = [spec.Dense("logits"), spec.LogSoftmax()]
      >>> spec.Outputs([policy, [spec.Dense("value")]]).branches[0][1]
      spec.LogSoftmax()
    """

    def _at_equal_logits(self, count: int) -> tuple[float, float]:
        return 1.0, math.log(count)


@dataclasses.dataclass(frozen=True, repr=False)
class Softmax(_NearlyUniform):
    """Probabilities of `C` logits, over the last axis.

    With `p` the probabilities, `J = diag(p) - p p^T`, and the mean diagonal of `J^T J`
    is

        (sum(p^2) - 2 sum(p^3) + sum(p^2)^2) / C

    Probabilities count as nearly uniform, as they are at the start of training. Then
    `m_z = (C - 1) / C^3`. Where one probability comes near 1, the curvature goes to 0.

    Raises:
      ValueError: (at `init`) where there is one logit.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.LayerChain([spec.Dense("logits"), spec.Softmax()], input_shape=(8,))
      spec.LayerChain(
          [
              spec.Dense('logits'),
              spec.Softmax(),
          ],
          input_shape=(8,),
      )
    """

    approximate = "its probabilities count as nearly uniform"

    def _at_equal_logits(self, count: int) -> tuple[float, float]:
        return 1.0 / count, 1.0 / count
