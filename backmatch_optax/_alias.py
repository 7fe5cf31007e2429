"""The optimizer as most people will use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from backmatch_optax import spec as _spec
from backmatch_optax._layer_scales import NORM_FLOOR
from backmatch_optax._locate import Unlisted
from backmatch_optax._moments import Gains
from backmatch_optax._transform import scale_by_backmatch


def backmatch_sgd(
    learning_rate: optax.ScalarOrSchedule,
    spec: _spec.LayerChain,
    *,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    gains: Gains = "paper",
    norm_floor: jax.typing.ArrayLike = NORM_FLOOR,
    normalize: bool = False,
    unlisted: Unlisted = "error",
) -> optax.GradientTransformationExtraArgs:
    """SGD with layer-wise rates from back-matching propagation.

    Weight decay, then the scale, then Nesterov momentum: the order that BM 3.2 found
    better. The scale therefore multiplies the decay too. It equals::

      optax.chain(
          optax.add_decayed_weights(weight_decay, weight_decay_mask),
          backmatch_optax.scale_by_backmatch(spec),
          optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
      )

    Args:
      learning_rate: the global learning rate, a number or a schedule.
      spec: the declared layer chain of the model.
      momentum: the decay of the momentum buffer, in [0, 1); None for no momentum.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: what each parameter is multiplied by before it is added to its
        gradient.
      weight_decay_mask: a tree with booleans, or a function from parameters to one,
        that tells which parameters decay; None for all.
      gains: `"paper"`, or `"mean_field"` for exact Gaussian gains; see `layer_scales`.
      norm_floor: the least that a scale divides by; see `layer_scales`.
      normalize: divides the scales by their mean, so that SGD's learning rate carries
        over; see `layer_scales`.
      unlisted: `"error"`, or `"identity"` to leave the gradients of parameters that no
        declared layer covers as they are.

    Returns:
      The optimizer; its `update` needs `params`.

    Raises:
      ValueError: in `init`, where the chain does not fit the parameters (see
        `check_spec`); in `update`, where `params` is None.

    Examples:
      >>> import jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> net = spec.LayerChain([spec.Dense("fc1")], input_shape=(4,))
      >>> params = {"fc1": {"kernel": jnp.ones((4, 2))}}
      >>> tx = bmo.backmatch_sgd(0.02, net, weight_decay=5e-4)
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Zhang, Chen, Liu, `Train Feedforward Neural Network with Layer-wise Adaptive Rate
      via Approximating Back-matching Propagation
      <https://arxiv.org/abs/1802.09750>`_, 2018
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_backmatch(
            spec,
            gains=gains,
            norm_floor=norm_floor,
            normalize=normalize,
            unlisted=unlisted,
        ),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
