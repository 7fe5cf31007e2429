"""The optimizers that are compared, each with Nesterov momentum and weight decay."""

from __future__ import annotations

import optax

import backmatch_optax as bmo
from backmatch_optax import spec

METHODS = ("sgd", "lars", "lsalr", "backmatch")


def optimizer(
    method: str,
    learning_rate: optax.ScalarOrSchedule,
    chain: spec.LayerChain,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """An optimizer by its name in `METHODS`; decay comes before everything, BM 3.2."""
    decay = optax.add_decayed_weights(weight_decay)
    sgd = optax.sgd(learning_rate, momentum=momentum, nesterov=True)
    match method:
        case "sgd":
            return optax.chain(decay, sgd)
        case "lsalr":
            return optax.chain(decay, bmo.scale_by_lsalr(), sgd)
        case "lars":
            return optax.lars(
                learning_rate,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=True,
            )
        case "backmatch":
            return optax.chain(decay, bmo.scale_by_backmatch(chain), sgd)
    raise ValueError(f"method (={method!r}) must be one of {', '.join(METHODS)}")
