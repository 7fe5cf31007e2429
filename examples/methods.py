"""The optimizers that are compared, with weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import KeyPath, keystr

import backmatch_optax as bmo
from backmatch_optax import spec

# Those the papers compare (BM 4), then what a reader of today would try.
METHODS = ("sgd", "lars", "lsalr", "backmatch")
OTHERS = ("backmatch, default", "adamw", "lion", "muon")
# Followed by `scale_steps_by_backmatch`, which gives the rate a meaning of its own.
STEPS = ("adamw, steps", "lion, steps", "muon, steps")

# The same budget of rates and decays as backmatch shows what each part of it is worth.
ABLATIONS = (
    "backmatch, decay after",  # the scale does not multiply the weight decay
    "backmatch, mean field",
    "backmatch, measured",  # on the model itself, every 20 steps
    "backmatch, frozen",  # the scales of the initial weights, all along
    "backmatch, norms kept",  # of the kernels below a BatchNorm
    "backmatch, normalized",  # for SGD's learning rate
    "own norm",  # ||W||^2_{2,mu} of the layer itself, nothing of those above
    "fan-in",  # 1 / sqrt(fan-in), as many set their initial weights
)
ALL = (*METHODS, *OTHERS, *STEPS, *ABLATIONS)


def optimizer(
    method: str,
    learning_rate: optax.ScalarOrSchedule,
    chain: spec.LayerChain,
    *,
    weight_decay: float | jax.Array = 0.0,
    momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer by its name, with decay before everything else as in BM 3.2.

    LARS, AdamW, Lion and Muon define where their decay goes, and there it goes.
    "backmatch, measured" needs `outputs_fn` with each update.
    """
    decay = optax.add_decayed_weights(weight_decay)
    sgd = optax.sgd(learning_rate, momentum=momentum, nesterov=True)
    # Every "backmatch" is the papers' rule but for what its name says.
    papers = bmo.scale_by_backmatch(chain, normalize=False)
    match method:
        case "sgd":
            return optax.chain(decay, sgd)
        case "lsalr":
            return optax.chain(decay, bmo.scale_by_lsalr(), sgd)
        case "lars":
            return optax.lars(
                learning_rate, weight_decay, momentum=momentum, nesterov=True
            )
        case "adamw":
            return optax.adamw(learning_rate, weight_decay=weight_decay)
        case "lion":
            return optax.lion(learning_rate, weight_decay=weight_decay)
        case "muon":
            muon = optax.contrib.muon(
                learning_rate,
                weight_decay=weight_decay,
                adam_weight_decay=weight_decay,
                muon_weight_dimension_numbers=_matrices(chain),
                consistent_rms=0.2,
            )
            return optax.with_extra_args_support(muon)
        case "adamw, steps" | "lion, steps" | "muon, steps":
            return optax.chain(
                direction(method.removesuffix(", steps"), _matrices(chain)),
                bmo.scale_steps_by_backmatch(chain),
                decay,
                optax.scale_by_learning_rate(learning_rate),
            )
        case "backmatch":
            return optax.chain(decay, papers, sgd)
        case "backmatch, default":
            return optax.chain(decay, bmo.scale_by_backmatch(chain), sgd)
        case "backmatch, decay after":
            return optax.chain(papers, decay, sgd)
        case "backmatch, norms kept":
            tx = optax.chain(decay, papers, sgd)
            return bmo.keep_norms(tx, chain)
        case "backmatch, normalized":
            scale = bmo.scale_by_backmatch(chain, limit=None)
            return optax.chain(decay, scale, sgd)
        case "backmatch, mean field":
            scale = bmo.scale_by_backmatch(chain, gains="mean_field", normalize=False)
            return optax.chain(decay, scale, sgd)
        case "backmatch, measured":
            scale = bmo.scale_by_measured_backmatch(
                key=jax.random.key(0), normalize=False
            )
            return optax.chain(decay, scale, sgd)
        case "backmatch, frozen":
            return optax.chain(decay, _at_initial(papers), sgd)
        case "own norm":
            # F / out = ||W||^2_{2,mu} times fan-in / out: what BatchNorm divides by.
            norm = optax.stateless(
                lambda updates, params: jax.tree.map(
                    lambda u, p: u * (p**2).sum() / p.shape[-1], updates, params
                )
            )
            return optax.chain(decay, norm, sgd)
        case "fan-in":
            fan_in = optax.stateless(
                lambda updates, _: jax.tree.map(
                    lambda u: u * (u.shape[-1] / u.size) ** 0.5, updates
                )
            )
            return optax.chain(decay, fan_in, sgd)
    known = ", ".join(map(repr, ALL))
    raise ValueError(f"method (={method!r}) must be one of {known}")


def direction(
    optimizer: str, matrices: Callable[[optax.Params], optax.Params]
) -> optax.GradientTransformation:
    """An optimizer's steps alone, of entries near 1 as `scale_steps_by_backmatch` asks.

    Args:
      optimizer: "adamw", "lion" or "muon".
      matrices: for Muon, which kernels are matrices, and how.
    """
    match optimizer:
        case "adamw":
            return optax.scale_by_adam()
        case "lion":
            return optax.scale_by_lion()
        case "muon":  # which descends
            return optax.contrib.muon(
                -1.0, muon_weight_dimension_numbers=matrices, consistent_rms=1.0
            )
    raise ValueError(f"optimizer (={optimizer!r}) must be 'adamw', 'lion' or 'muon'")


def _matrices(chain: spec.LayerChain) -> Callable[[optax.Params], optax.Params]:
    """Kernels as matrices from (taps, in) to out; Adam for all else and the head.

    Muon's authors leave the output layer to Adam.
    """
    *_, head = chain.paths

    def numbers(path: KeyPath, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        is_head = keystr(path, simple=True, separator="/").startswith(f"{head}/")
        if is_head or leaf.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), -1)

    return lambda params: jax.tree_util.tree_map_with_path(numbers, params)


def _at_initial(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that is always shown the parameters that `init` was given."""

    def init_fn(params: optax.Params) -> tuple[optax.OptState, optax.Params]:
        return tx.init(params), params

    def update_fn(updates, state, params=None, **extra_args):
        del params
        inner, initial = state
        updates, inner = tx.update(updates, inner, initial, **extra_args)
        return updates, (inner, initial)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
