"""The random-matrix law of Gaussian kernels, to compare spectra with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarchenkoPastur:
    """The limit of the eigenvalues' distribution for Gaussian kernels, LH (10)."""

    ratio: float  # outputs over inputs, LH's c
    mean: float  # of the eigenvalues

    @property
    def zeros(self) -> float:
        """The share of eigenvalues that are zero: `1 - c` below 1, LH (10)."""
        return max(0.0, 1 - self.ratio)

    @property
    def support(self) -> tuple[float, float]:
        """The least and the largest non-zero eigenvalue, LH's `c_-` and `c_+`."""
        root = math.sqrt(self.ratio)
        lower, upper = (self.mean * (1 + s * root) ** 2 / self.ratio for s in (-1, 1))
        return lower, upper

    @property
    def condition_number(self) -> float:
        """Largest over least non-zero eigenvalue; infinite at ratio 1."""
        lower, upper = self.support
        return upper / lower if lower > 0 else math.inf

    def density(self, x: Any) -> np.ndarray:
        """The density at `x`, any shape, without the mass at zero: LH (11), (19)."""
        x = np.asarray(x, np.float64)
        lower, upper = self.support
        inside = (x > lower) & (x < upper)
        safe = np.where(inside, x, (lower + upper) / 2)
        root = np.sqrt((upper - safe) * (safe - lower))
        return np.where(inside, self.ratio * root / (2 * np.pi * self.mean * safe), 0.0)

    def cdf(self, x: Any) -> np.ndarray:
        """The share of eigenvalues up to `x`, any shape, with the mass at zero."""
        x = np.asarray(x, np.float64)
        lower, upper = self.support
        # With x = middle + half cos(angle) the density integrates in closed form.
        middle, half = (upper + lower) / 2, (upper - lower) / 2
        angle = np.arccos(np.clip((x - middle) / half, -1, 1))
        geometric = math.sqrt(lower * upper)
        turn = np.arctan2(
            math.sqrt(lower) * np.sin(angle / 2), math.sqrt(upper) * np.cos(angle / 2)
        )
        above = middle * angle - half * np.sin(angle) - 2 * geometric * turn
        share = 1 - self.ratio / (2 * np.pi * self.mean) * above
        return np.where(x < 0, 0.0, share)


def marchenko_pastur(ratio: float, *, mean: float = 1.0) -> MarchenkoPastur:
    r"""The Marchenko-Pastur law of `H_z = W^T W` for a Gaussian kernel (LH 10, 11, 19).

    Here `c = ratio`, outputs over inputs, both large, and :math:`\sigma^2` is the mean
    eigenvalue:

    .. math::
      d\nu(\lambda) = \frac{c}{2 \pi \sigma^2}
      \frac{\sqrt{(c_+ - \lambda)(\lambda - c_-)}}{\lambda} \, d\lambda , \qquad
      c_\pm = \frac{\sigma^2 (1 \pm \sqrt{c})^2}{c} .

    For `c` below 1 there is also a point mass of `1 - c` at zero. LH (11) is for
    entries of variance :math:`\sigma^2` over the number of outputs. In general the mean
    eigenvalue is `F / in`, the `m_z` of a dense layer, with `F` the squared norm of the
    kernel. For entries of variance `1 / in` it is `c`. With a batch normalisation and
    whitened input every row of the kernel counts as a unit vector. So it is `c`
    whatever the kernel's scale: LH (19) and Remark 2.

    Args:
      ratio: outputs over inputs, positive.
      mean: the mean eigenvalue, positive.

    Returns:
      A `MarchenkoPastur`, with `density`, `cdf`, `support` and `zeros`.

    Raises:
      ValueError: where `ratio` or `mean` is not positive and finite.

    Examples:
      >>> from backmatch_optax import local_hessian
      >>> law = local_hessian.marchenko_pastur(0.25, mean=0.25)  # LH (19)
      >>> law.support, law.zeros
      ((0.25, 2.25), 0.75)
      >>> law.cdf([0.0, 0.25, 2.25]).round(3).tolist()
      [0.75, 0.75, 1.0]
    """
    for name, value in (("ratio", ratio), ("mean", mean)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} (={value!r}) must be positive and finite")
    return MarchenkoPastur(ratio=float(ratio), mean=float(mean))
