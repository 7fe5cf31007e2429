"""The transformations: back-matched scales, and the LSALR baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backmatch_optax import spec as _spec
from backmatch_optax.moments import Gains
from backmatch_optax.numerics import frobenius_norm, scaled, wide
from backmatch_optax.parameters import (
    Unlisted,
    check_chain,
    is_leafless,
    locate,
    refuse_parts,
    text,
)
from backmatch_optax.scales import (
    LIMIT,
    NORM_FLOOR,
    check_options,
    check_state,
    check_update,
    main_paths,
    scale_of_params,
    scaled_params,
    scaled_updates,
    steps_of_params,
    walk,
)
from backmatch_optax.spec.link import Shape, Site
from backmatch_optax.spec.repeat import stacks


class ScaleByBackmatchState(NamedTuple):
    """State of `scale_by_backmatch`: the scales of the latest step, for reading only.

    All ones before the first step.

    `optax.tree.get(opt_state, "layer_scales")` finds them anywhere in a chain.

    The other two are there with `refresh=False` alone: the scales of all parameters but
    the first of each layer, and whether a step has computed them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> links = [spec.Dense("fc1"), spec.Activation("relu"), spec.Dense("fc2")]
      >>> tx = bmo.scale_by_backmatch(spec.LayerChain(links, input_shape=(8,)))
      >>> params = {"fc1": {"kernel": jnp.eye(8)}, "fc2": {"kernel": 2 * jnp.eye(8)}}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> {path: float(scale) for path, scale in state.layer_scales.items()}
      {'fc1': 0.625, 'fc2': 2.0}
    """

    # By path; dtype=jnp.float32, shape=(), or (n,) inside a `spec.Repeat`.
    layer_scales: dict[str, jax.Array]
    other_scales: dict[str, jax.Array] | tuple[()] = ()  # of parameters, as above
    computed: jax.Array | tuple[()] = ()  # shape=(), dtype=jnp.bool


def scale_by_backmatch(
    spec: _spec.LayerChain,
    *,
    gains: Gains = "paper",
    norm_floor: jax.typing.ArrayLike = NORM_FLOOR,
    normalize: bool = True,
    limit: jax.typing.ArrayLike | None = LIMIT,
    refresh: bool = True,
    unlisted: Unlisted = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each layer's gradient by its back-matched scale.

    Back-propagation hands every layer a gradient whose size depends on everything above
    it. Back-matching asks how much a layer's weight must change to produce the wanted
    change of its output; approximated by one scalar for each layer, that divides the
    gradient by the product of the backward gains of the links above and the curvature
    of the layer itself:

    .. math::
      u_W \leftarrow \frac{u_W}{m \, m_W}

    (LH (22), Algorithm 2; BM Algorithm 1; see `layer_scales`). The scales are a
    function of the parameters alone, computed afresh at every step for the price of one
    norm for each kernel. For example, change this::

      tx = optax.chain(
          optax.add_decayed_weights(5e-4),
          optax.sgd(0.1, momentum=0.9, nesterov=True),
      )

    To::

      tx = optax.chain(
          optax.add_decayed_weights(5e-4),
          backmatch_optax.scale_by_backmatch(spec),
          optax.sgd(0.1, momentum=0.9, nesterov=True),
      )

    The learning rate stays. The papers' rule is `normalize=False, norm_floor=0`, and
    needs a rate of its own.

    Args:
      spec: the declared layer chain of the model.
      gains: `"paper"`, or `"mean_field"` for exact Gaussian gains; see `layer_scales`.
      norm_floor: the least that a scale divides by, so that training from zeros works;
        0 is the papers' rule to the letter; see `layer_scales`.
      normalize: divides the scales by their mean, so that SGD's learning rate carries
        over; False is the papers' rule; see `layer_scales`.
      limit: how far a normalized scale may be from 1; see `layer_scales`.
      refresh: whether the scales follow the parameters. False keeps those of the first
        step, so that later steps compute no norm.
      unlisted: what to do about parameters that no declared layer covers: `"error"`
        (at `init`), or `"identity"` to leave their gradients as they are.

    Returns:
      A gradient transformation with state `ScaleByBackmatchState`. Its `update` needs
      `params`, keeps the structure and dtypes of the updates, and multiplies in float32
      or wider.

    Raises:
      ValueError: at once, where an argument is none of the above; in `init`, where the
        chain does not fit the parameters (see `check_spec`); in `update`, where
        `params` is None, the state or an update belongs to other parameters, a gradient
        is not of a floating dtype, or where inside `jax.shard_map` a declared parameter
        is not the same on all devices.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> net = spec.LayerChain(
      ...     [spec.Dense("fc1"), spec.BatchNorm(), spec.Dense("fc2")],
      ...     input_shape=(4,),
      ... )
      >>> params = {
      ...     "fc1": {"kernel": jnp.full((4, 8), 0.5)},
      ...     "fc2": {"kernel": jnp.full((8, 2), 0.5)},
      ... }
      >>> tx = optax.chain(
      ...     optax.add_decayed_weights(5e-4),
      ...     bmo.scale_by_backmatch(net),
      ...     optax.sgd(0.1),
      ... )
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> scales = optax.tree.get(state, "layer_scales")
      >>> for path, scale in scales.items():
      ...     print(path, scale.round(4))
      fc1 1.3333
      fc2 0.6667

    References:
      Zhang, Chen, Liu, `Train Feedforward Neural Network with Layer-wise Adaptive Rate
      via Approximating Back-matching Propagation
      <https://arxiv.org/abs/1802.09750>`_, 2018

      Zhang, Chen, Liu, On the Local Hessian in Back-propagation, NeurIPS 2018

    .. note::
      The rule looks across layers, so it must see all of them: inside `optax.masked` or
      `optax.partition` it raises. Scale outside, freeze inside. The scale also
      multiplies a weight decay that comes before it in the chain. Under `jax.jit` the
      parameters may be sharded in any way, but on a mesh with explicit axes not along
      the layers of a `Repeat`. Under `jax.pmap`, and in `jax.shard_map` with
      `check_vma=False`, every device has to hold whole ones.
    """
    check_options(gains, norm_floor, normalize, limit, unlisted)

    def scales_of(sites: Sequence[Site]) -> dict[str, jax.Array]:
        return scale_of_params(sites, normalize, limit)

    return _by_layer(
        "scale_by_backmatch", spec, scales_of, gains, norm_floor, refresh, unlisted
    )


def scale_steps_by_backmatch(
    spec: _spec.LayerChain,
    *,
    gains: Gains = "mean_field",
    norm_floor: jax.typing.ArrayLike = NORM_FLOOR,
    refresh: bool = False,
    unlisted: Unlisted = "error",
) -> optax.GradientTransformationExtraArgs:
    r"""Gives each layer the step that changes the network's output by one; after Adam.

    Adam, Lion and other optimizers with steps of one size forget the size of the
    gradient, so that a scale before them does nothing. After them, the recursion tells
    what a step does to the output. A step :math:`\Delta W` with entries of
    root-mean-square 1, in general position, changes the `size_out` coordinates of the
    network's output :math:`f` by

    .. math::
      \mathbb{E} \Vert \Delta f \Vert^2 = \mathrm{size}(W) \, m \, m_W ,

    the trace of :math:`J^T J`. So each step is multiplied by

    .. math::
      \sqrt{\frac{\mathrm{size_{out}}}{\mathrm{size}(W) \, m \, m_W}} ,

    and the learning rate is what a step of one array of parameters changes a coordinate
    of the output by. It carries over from a narrow network to a wide one.
    Change this::

      tx = optax.adamw(1e-3, weight_decay=1e-2)

    To::

      tx = optax.chain(
          optax.scale_by_adam(),
          backmatch_optax.scale_steps_by_backmatch(spec),
          optax.add_decayed_weights(1e-2),
          optax.scale_by_learning_rate(2e-2),
      )

    The learning rate is a new one: begin with 0.02. The weight decay comes later, and
    is not scaled. What this gains, and where it does not, is in docs/adam.md.

    Args:
      spec: the declared layer chain of the model.
      gains: `"mean_field"` or `"paper"`; see `layer_scales`.
      norm_floor: the least that a step divides by; see `layer_scales`.
      refresh: whether the multipliers follow the parameters. By default they are those
        of the first step, as in muP, and later steps compute no norm.
      unlisted: what to do about parameters that no declared layer covers: `"error"`
        (at `init`), or `"identity"` to leave their steps as they are.

    Returns:
      A gradient transformation with state `ScaleByBackmatchState`; its `layer_scales`
      are the multipliers of the kernels. Its `update` needs `params`, keeps the
      structure and dtypes of the updates, and multiplies in float32 or wider.

    Raises:
      ValueError: as `scale_by_backmatch` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> links = [spec.Dense("fc1"), spec.BatchNorm(), spec.Dense("fc2")]
      >>> net = spec.LayerChain(links, input_shape=(4,))
      >>> params = {
      ...     "fc1": {"kernel": jnp.full((4, 8), 0.5)},
      ...     "fc2": {"kernel": jnp.full((8, 2), 0.5)},
      ... }
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(),
      ...     bmo.scale_steps_by_backmatch(net),
      ...     optax.scale_by_learning_rate(0.02),
      ... )
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> for path, step in optax.tree.get(state, "layer_scales").items():
      ...     print(path, step.round(4))
      fc1 0.3536
      fc2 0.3536
    """
    check_options(gains, norm_floor, False, None, unlisted)
    return _by_layer(
        "scale_steps_by_backmatch",
        spec,
        steps_of_params,
        gains,
        norm_floor,
        refresh,
        unlisted,
    )


def _by_layer(
    name: str,
    spec: _spec.LayerChain,
    scales_of: Callable[[Sequence[Site]], dict[str, jax.Array]],
    gains: Gains,
    norm_floor: jax.typing.ArrayLike,
    refresh: bool,
    unlisted: Unlisted,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by a number that the walked chain gives its parameter."""
    check_chain(spec)
    if not isinstance(refresh, bool):
        raise ValueError(f"refresh (={refresh!r}) must be True or False")

    def state_with(one: Callable[[Shape], Any], sites: Sequence[Site] | None) -> Any:
        layers = {path: one(shape) for path, shape in stacks(spec.layers)}
        if refresh:
            return ScaleByBackmatchState(layers)
        # Where there are no parameters, one leaf stands for the dict.
        others: Any = one(())
        if sites is not None:
            mains = main_paths(sites).values()
            shapes = {path: site.stacked for path, site, _ in scaled_params(sites)}
            others = {p: one(shape) for p, shape in shapes.items() if p not in mains}
        return ScaleByBackmatchState(layers, others, jnp.zeros((), bool))

    def init_fn(params: optax.Params) -> ScaleByBackmatchState:
        # A tree without leaves has nothing to check: optax.tree.map_params passes one.
        empty = is_leafless(params)
        sites = None if empty else locate(spec, params, unlisted=unlisted)
        return state_with(lambda shape: jnp.ones(shape, jnp.float32), sites)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError(
                f"{name} computes its scales from the parameters: call "
                "update(updates, state, params), but params is None"
            )
        if is_leafless(params) and is_leafless(updates):
            return updates, state

        def walked() -> list[Site]:
            return walk(
                spec, params, gains=gains, norm_floor=norm_floor, unlisted=unlisted
            )

        sites = walked() if refresh else locate(spec, params, unlisted=unlisted)
        check_state(state, state_with(np.zeros, sites))
        mains = main_paths(sites)

        def kept() -> Any:
            layers = {path: state.layer_scales[layer] for layer, path in mains.items()}
            return layers | state.other_scales

        def computed() -> Any:
            scales = scales_of(walked())
            return optax.tree.cast(scales, jnp.float32)

        if refresh:
            scales = scales_of(sites)
        else:
            scales = jax.lax.cond(state.computed, kept, computed)
        layers = {p: scales[main].astype(jnp.float32) for p, main in mains.items()}
        after = state._replace(layer_scales=layers)
        if not refresh:
            others = {path: scales[path] for path in state.other_scales}
            after = after._replace(other_scales=others, computed=jnp.ones((), bool))
        return scaled_updates(updates, params, lambda p: _find(scales, p)), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _find(scales: dict[str, jax.Array], path: str) -> jax.Array | None:
    """The scale declared for a leaf, or for a path that is the beginning of its own."""
    while path not in scales:
        if not path:
            return None
        path = path.rpartition("/")[0]
    return scales[path]


def scale_by_lsalr() -> optax.GradientTransformationExtraArgs:
    r"""Multiplies each array's gradient by `1 + log(1 + 1 / norm)`, its own norm.

    The layer-specific adaptive learning rate of Singh et al., a baseline of the
    back-matching paper (BM 1.1):

    .. math::
      g \leftarrow g \left(1 + \log\left(1 + \frac{1}{\|g\|_2}\right)\right)

    Returns:
      A gradient transformation without state. It keeps the structure and dtypes of the
      updates and computes norms in float32 or wider; a gradient of zeros stays zero.

    Raises:
      ValueError: in `update`, where a gradient is not of a floating dtype, or where
        inside `jax.shard_map` it is not the same on all devices, so that its norm may
        be that of a part.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import backmatch_optax as bmo
      >>> tx = optax.chain(bmo.scale_by_lsalr(), optax.sgd(0.1, momentum=0.9))
      >>> gradient = {"kernel": jnp.array([0.6, 0.8])}
      >>> updates, _ = tx.update(gradient, tx.init(gradient))
      >>> print((updates["kernel"] / -0.1 / gradient["kernel"]).round(4))
      [1.6931 1.6931]

    References:
      Singh et al., `Layer-Specific Adaptive Learning Rates for Deep Networks
      <https://arxiv.org/abs/1510.04609>`_, 2015
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        refuse_parts(updates)
        return jax.tree_util.tree_map_with_path(_scaled_by_own_norm, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scaled_by_own_norm(path: jax.tree_util.KeyPath, update: jax.Array) -> jax.Array:
    check_update(text(path), update)
    sizes = jnp.abs(update) if jnp.iscomplexobj(update) else update
    norm = frobenius_norm(sizes.astype(wide(sizes.dtype)))
    positive = norm > 0
    norm = jnp.where(positive, norm, 1)
    # log(1 + 1 / norm), written so that a tiny norm does not overflow.
    logarithm = jnp.where(
        norm > 1,
        jnp.log1p(1 / jnp.maximum(norm, 1)),
        jnp.log1p(norm) - jnp.log(norm),
    )
    return scaled(update, jnp.where(positive, 1 + logarithm, 1))


def backmatch_sgd(
    learning_rate: optax.ScalarOrSchedule,
    spec: _spec.LayerChain,
    *,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: float | jax.Array = 0.0,
    weight_decay_mask: Any = None,
    gains: Gains = "paper",
    norm_floor: jax.typing.ArrayLike = NORM_FLOOR,
    normalize: bool = True,
    limit: jax.typing.ArrayLike | None = LIMIT,
    refresh: bool = True,
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
        over; False is the papers' rule; see `layer_scales`.
      limit: how far a normalized scale may be from 1; see `layer_scales`.
      refresh: whether the scales follow the parameters. False keeps those of the first
        step, so that later steps compute no norm.
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
      >>> tx = bmo.backmatch_sgd(0.1, net, weight_decay=5e-4)
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
            limit=limit,
            refresh=refresh,
            unlisted=unlisted,
        ),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
