"""A cure for kernels that only ever grow: keep the norm that each of them has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from backmatch_optax import spec as _spec
from backmatch_optax.numerics import wide
from backmatch_optax.optimizers import frobenius_norm, scaled
from backmatch_optax.parameters import is_leafless, join, locate, refuse_parts, text
from backmatch_optax.spec.link import Site

# Fields and types in the states of Optax's optimizers whose steps do not grow with the
# kernel: most of them hold second moments.
_NOT_MOMENTUM = (
    *("nu", "sum_of_squares", "e_g", "v_row", "exp_avg_sq"),
    *("ScaleByAdanState", "ScaleByLBFGSState", "ScaleByLionState", "ScaleByRpropState"),
    "MuonState",
)


def keep_norms(
    inner: optax.GradientTransformation, spec: _spec.LayerChain
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that kernels below a normalisation keep their norm.

    A normalisation takes the norm of the kernel before it away again, so the gradient
    is orthogonal to the kernel, and every step makes it longer. Without weight decay
    nothing stops that, and since a back-matched scale grows with the norm squared, the
    kernel grows exponentially, until it leaves float32. The function that the network
    computes does not depend on that norm, and neither does training with
    `scale_by_backmatch` and momentum: scale, gradient and momentum of a kernel
    :math:`c W` give :math:`c` times the step. So after each step

    .. math::
      W \leftarrow c \, (W + u), \quad v \leftarrow c \, v, \qquad
      c = \frac{\|W\|_F}{\|W + u\|_F}

    with :math:`v` the momentum of the kernel, trains the same function at every step
    (up to the `epsilon` of the normalisation, which a longer kernel makes less of).
    That holds with `optax.add_decayed_weights` after the scale too. Before the scale,
    the decay of a longer kernel is another one, and keeping norms is another method. So
    it is with `normalize=True`, the default, whose mean depends on all norms, and with
    clipping before the scale.

    Args:
      inner: the whole optimizer, from decay to learning rate, such as `backmatch_sgd`.
        What it keeps for each parameter must be momentum, in proportion to the
        parameter's size: `optax.trace`, `optax.sgd`, not Adam.
      spec: the declared layer chain. Kernels right before a `BatchNorm` keep their
        norm, and those right before a `LayerNorm`, `GroupNorm` or `RMSNorm` where they
        have no bias.

    Returns:
      An optimizer with the state of `inner`. Its `update` needs `params`. Norms are
      computed in float32 or wider; what is zero, or about to be, or infinite, stays as
      it is.

    Raises:
      ValueError: in `init`, where no kernel is right before a normalisation, where
        the state of `inner` shows that it is no momentum (second moments, Lion, Muon,
        Rprop), or where the chain does not fit the parameters (see `check_spec`);
        in `update`, where `params` is None, or inside `jax.shard_map` where a kernel is
        one device's part of a whole.

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
      >>> tx = bmo.keep_norms(bmo.backmatch_sgd(0.1, net, normalize=False), net)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> for layer, leaves in params.items():
      ...     print(layer, jnp.linalg.norm(leaves["kernel"]).round(4))
      fc1 2.8284
      fc2 1.62
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        state = inner.init(params)
        if not is_leafless(params):
            _kernels(spec, params)
            for name in _NOT_MOMENTUM:
                if optax.tree.get_all_with_path(state, name):
                    raise ValueError(
                        "keep_norms rescales momentum with its kernel, but the steps "
                        "of this optimizer are not in proportion to the gradient: its "
                        f"state has {name!r}. Wrap one with momentum alone, such as "
                        "backmatch_sgd"
                    )
        return state

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                "keep_norms needs the parameters: call update(updates, state, params), "
                "but params is None"
            )
        refuse_parts(params, spec.paths)
        kept = _kernels(spec, params)
        updates, state = inner.update(updates, state, params, **extra_args)

        def factor(key_path: Any, update: jax.Array, param: jax.Array) -> Any:
            path = text(key_path)
            if path not in kept:
                return None
            dtype = wide(param.dtype)
            old, step = param.astype(dtype), update.astype(dtype)
            before, after = frobenius_norm(old), frobenius_norm(old + step)
            usable = (before > 0) & (after > 0) & jnp.isfinite(after)
            return jnp.where(usable, before / after, 1.0)

        factors = jax.tree_util.tree_map_with_path(factor, updates, params)

        def rescaled(update: jax.Array, param: jax.Array, c: Any) -> jax.Array:
            if c is None:
                return update
            old = param.astype(c.dtype)
            return (c * (old + update.astype(c.dtype)) - old).astype(update.dtype)

        updates = jax.tree.map(rescaled, updates, params, factors)
        return updates, optax.tree.map_params(inner, scaled, state, factors)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _kernels(spec: _spec.LayerChain, params: optax.Params) -> frozenset[str]:
    """The paths of the kernels whose norm the next link takes away."""
    found = frozenset(_before_norms(locate(spec, params, unlisted="identity")))
    if not found:
        raise ValueError(
            "keep_norms found no kernel right before a normalisation in the spec, so "
            "there is no norm that does not matter"
        )
    return found


def _before_norms(sites: Sequence[Site]) -> Iterator[str]:
    """Kernels right before a normalisation, in the chain and in its arms."""
    for site, above in itertools.pairwise(sites):
        centred = isinstance(above.link, _spec.BatchNorm)
        normed = (_spec.LayerNorm, _spec.GroupNorm, _spec.RMSNorm)
        # BatchNorm takes a bias away with the mean; to the others it is part of the
        # signal, and would have to shrink with the kernel.
        if centred or (isinstance(above.link, normed) and "bias" not in site.params):
            link: Any = site.link
            elsewhere = bool(site.uses)  # where its norm may matter
            if "kernel" in site.params and not (link.owns_subtree or elsewhere):
                yield join(link.path, "kernel")
    for site in sites:
        for arm in site.arms.values():
            yield from _before_norms(arm)
