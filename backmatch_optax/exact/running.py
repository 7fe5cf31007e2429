"""Running averages of second moments, as the Flax layers keep them."""

from __future__ import annotations

import jax


def averaged(
    moment: jax.Array, total: jax.Array, weight: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The unbiased average including `moment`, and the new total and weight."""
    total = decay * total + (1 - decay) * moment
    weight = decay * weight + (1 - decay)
    return total / weight, total, weight


def check_decay(name: str, decay: float | None) -> None:
    """Raises `ValueError` where a decay is no number in [0, 1)."""
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"{name}: decay (={decay!r}) must be in [0, 1), or None")
