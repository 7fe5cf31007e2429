"""How unequal the weights of a softmax over positions are, by the size of its logits.

Logits count as independent Gaussians. With `X = exp(logit)` and `Z` the sum over `n`
of them, a weight is `X / Z`. A power of `1 / Z` is an integral over `exp(-s Z)`, which
is a product over positions. So means over all draws are integrals of one variable:

    E sum_j a_j^2 = n int s E[X^2 exp(-s X)] E[exp(-s X)]^(n - 1) ds

They are taken once, for a row of variances, and read off between these.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Variances of logits from 0 on, evenly spaced in `log(variance + _SMALL)`: below, the
# weights are nearly linear in the variance, and from several hundred on its powers.
_SMALL = 0.05
_STEPS = np.linspace(0.0, 9.6, 65)
_VARIANCES = _SMALL * np.expm1(_STEPS)

_NODES = np.linspace(-8.0, 8.0, 400)
_DENSITY = np.exp(-0.5 * _NODES**2) / np.exp(-0.5 * _NODES**2).sum()


@dataclasses.dataclass(frozen=True)
class Weights:
    """Means over queries and draws, as functions of the variance of the logits.

    Each is the log of something that is nearly a power of small and large variances.
    """

    table: np.ndarray  # a row for each of the properties, a column for each variance

    def __call__(self, variance: jax.Array) -> tuple[jax.Array, ...]:
        """Three means, for the weights `a_j` of a query.

        Returns:
          `S = E sum_j a_j^2`, `(1 - S)^2`, and the mean of `sum_j a_j^2 (v_j - o)^2`
          for values of variance 1 with the weighted mean `o`. Each is a mean over
          queries that see more or fewer positions.
        """
        table = jnp.asarray(self.table, variance.dtype)
        place = jnp.log(variance + _SMALL) - np.log(_SMALL)
        place = jnp.maximum(place / (_STEPS[1] - _STEPS[0]), 0.0)
        below = jnp.minimum(place.astype(jnp.int32), len(_STEPS) - 2)
        share = place - below  # above 1 beyond the last: powers go on
        logs = table[:, below] * (1 - share) + table[:, below + 1] * share
        odds, others, spread = logs
        return jax.nn.sigmoid(odds), jnp.exp(others), jnp.exp(spread)


@functools.cache
def softmax_weights(
    positions: int, causal: bool = False, attended: float | None = None
) -> Weights:
    """The weights of queries that see all of `positions`, or all before themselves.

    Args:
      positions: how many keys there are.
      causal: whether a query sees only as many as its own place says.
      attended: the number of equal weights instead, of those that it sees.
    """
    starts, counts = _groups(positions) if causal else ([positions], [1])
    shares = np.asarray(counts) / sum(counts)
    rows = []
    for start, count in zip(starts, counts, strict=True):
        length = start + (count - 1) // 2
        if attended is None:
            rows.append(_moments(length))
        else:
            one = np.full(len(_STEPS), 1.0 / min(length, attended))
            rows.append((one, one**2, one**2))
    squares, cubes, products = np.moveaxis(np.asarray(rows), 1, 0)
    kept = np.einsum("r,rt->t", shares, squares)
    others = np.einsum("r,rt->t", shares, (1.0 - squares) ** 2)
    spread = np.einsum("r,rt->t", shares, squares + products - 2.0 * cubes)
    tiny = 1e-30  # of one position, but for rounding
    logs = [np.log(np.maximum(part, tiny)) for part in (kept, 1.0 - kept)]
    rest = [np.log(np.maximum(part, tiny)) for part in (others, spread)]
    return Weights(np.stack([logs[0] - logs[1], *rest]))


def _moments(positions: int) -> tuple[np.ndarray, ...]:
    """Means of `sum a^2`, `sum a^3` and `(sum a^2)^2`, for every variance."""
    none, squares, cubes, fourths, steps = _transforms()
    n = float(positions)
    others, pairs = np.exp((n - 1) * none), np.exp((n - 2) * none) * (n - 1)
    return (
        n * (squares * others).sum(axis=1) * steps,
        n * (cubes * others).sum(axis=1) * steps / 2,
        n * (fourths * others + squares**2 * pairs).sum(axis=1) * steps / 6,
    )


@functools.cache
def _transforms() -> tuple[np.ndarray, ...]:
    """The log of `E exp(-s X)`, and `E (s X)^k exp(-s X)` for `k` of 2, 3 and 4.

    In rows of variances, over even steps of `log s`, the last of what is returned.
    """
    rows, steps = [], []
    for variance in _VARIANCES:
        size = np.sqrt(variance)
        # From where ten million positions have the largest sum to one has the smallest.
        log_s, step = np.linspace(-8 * size - 20, 8 * size + 4, 400, retstep=True)
        log_sx = log_s[:, None] + size * _NODES
        sx = np.exp(np.minimum(log_sx, 50.0))  # above, `exp(-s X)` is zero
        some = -np.expm1(-sx) @ _DENSITY
        powers = [np.exp(k * log_sx - sx) @ _DENSITY for k in (2, 3, 4)]
        rows.append([np.log1p(-np.minimum(some, 1 - 1e-15)), *powers])
        steps.append(step)
    stacked: np.ndarray = np.asarray(rows)
    return (*(stacked[:, part] for part in range(4)), np.asarray(steps))


def _groups(most: int) -> tuple[list[int], list[int]]:
    """1 to `most` in groups that grow with the number: their starts and sizes."""
    edges = np.unique(np.rint(np.geomspace(1, most + 1, 40)).astype(int))
    return edges[:-1].tolist(), np.diff(edges).tolist()
