"""A cure for kernels that only ever grow: keep the norm that each of them has."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from backmatch_optax import spec as _spec
from backmatch_optax.numerics import frobenius_norm, scaled, wide
from backmatch_optax.parameters import (
    check_chain,
    is_leafless,
    locate,
    refuse_parts,
    text,
)
from backmatch_optax.scales import param_path
from backmatch_optax.spec.link import Site, kind_of


def keep_norms(
    inner: optax.GradientTransformation, spec: _spec.LayerChain
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that kernels below a normalisation keep their norm.

    A normalisation takes the norm of the kernel before it away again. So the gradient
    is orthogonal to the kernel, and every step makes it longer. A back-matched scale
    grows with the norm squared: without weight decay the kernel grows exponentially,
    until it leaves float32. The network's function does not depend on that norm.
    Neither does training with `scale_by_backmatch` and momentum: scale, gradient and
    momentum of a kernel :math:`c W` give :math:`c` times the step. So after each step

    .. math::
      W \leftarrow c \, (W + u), \quad v \leftarrow c \, v, \qquad
      c = \frac{\|W\|_F}{\|W + u\|_F}

    with :math:`v` the momentum of the kernel, trains the same function at every step
    (up to the `epsilon` of the normalisation, which a longer kernel makes less of).
    That holds with `optax.add_decayed_weights` after the scale too. With the decay
    before it, with `normalize=True`, the default, with clipping, or with the decay of
    `optax.contrib.mechanize` itself, keeping norms is another method.

    Args:
      inner: the whole optimizer, from decay to learning rate, such as `backmatch_sgd`.
        Its steps must be in proportion to the gradient, as those of `optax.sgd` with
        momentum are, and those of Adam are not.
      spec: the declared layer chain. Kernels right before a `BatchNorm` keep their
        norm, and those right before a `LayerNorm`, `GroupNorm` or `RMSNorm` where they
        have no bias. Inside a `Repeat` each layer's kernel keeps its own norm, if the
        normalisation is in the same layer.

    Returns:
      An optimizer with the state of `inner`. Its `init` tries `inner` on a few
      gradients of the parameters' shapes, also where it is traced: that takes about ten
      times their memory, once. Its `update` needs `params`. Norms are computed in
      float32 or wider; what is zero, or about to be, or infinite, stays as it is.

    Raises:
      ValueError: where `inner` is no transformation or `spec` no chain; in `init`,
        where no kernel is right before a normalisation, where a first step of `inner`
        is not in proportion to the gradient, or where the chain does not fit the
        parameters (see `check_spec`); in `update`, where `params` is None, or inside
        `jax.shard_map` where a kernel is one device's part of a whole.

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
    check_chain(spec)
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            "keep_norms(inner, spec): inner must be an optax.GradientTransformation, "
            f"but it is {kind_of(inner)}"
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        state = inner.init(params)
        if not is_leafless(params):
            refuse_parts(params, spec.paths)
            _check_proportion(inner, params, _kernels(spec, params))
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
        if is_leafless(params):
            return inner.update(updates, state, params, **extra_args)
        refuse_parts(params, spec.paths)
        kept = _kernels(spec, params)
        updates, state = inner.update(updates, state, params, **extra_args)

        def factor(key_path: Any, update: Any, param: jax.Array) -> Any:
            path = text(key_path)
            if path not in kept or update is None:
                return None
            dtype, depth = wide(param.dtype), kept[path]
            old, step = param.astype(dtype), update.astype(dtype)
            before = frobenius_norm(old, depth)
            after = frobenius_norm(old + step, depth)
            usable = (before > 0) & (after > 0) & jnp.isfinite(after)
            return jnp.where(usable, before / after, 1.0)

        is_none = functools.partial(operator.is_, None)
        factors = jax.tree_util.tree_map_with_path(
            factor, updates, params, is_leaf=is_none
        )

        def rescaled(update: Any, param: jax.Array, c: Any) -> Any:
            if c is None:
                return update
            old = param.astype(c.dtype)
            return (c * (old + update.astype(c.dtype)) - old).astype(update.dtype)

        updates = jax.tree.map(rescaled, updates, params, factors, is_leaf=is_none)
        return updates, optax.tree.map_params(inner, scaled, state, factors)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_proportion(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    kernels: Collection[str],
) -> None:
    """Raises `ValueError` where twice the gradient makes no steps of twice the size.

    A few steps are tried at constant parameters of the same shapes: without a gradient,
    so that decay does not count, with one and with twice that one. Gradients are small,
    so that clipping does not count, or else large, so that rounding does not. The loss
    is smaller, so that Polyak's step does.
    """

    def ordinary(leaf: jax.Array) -> jax.Array:
        return jnp.full(leaf.shape, max(*leaf.shape[-1:], 1) ** 0.5 / leaf.size**0.5)

    def outputs(at: optax.Params) -> jax.Array:
        return jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(at)])[None]

    def peak(change: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(change), initial=0)

    def gradient(times: jax.typing.ArrayLike) -> optax.Updates:
        def of_leaf(key_path: Any, leaf: jax.Array) -> jax.Array:
            one = times * (text(key_path) in kernels) / len(kernels) ** 0.5
            return jnp.zeros(leaf.shape).at[(0,) * leaf.ndim].set(one)

        return jax.tree_util.tree_map_with_path(of_leaf, params)

    @functools.partial(jax.jit, static_argnames="steps")
    def tried(size: jax.typing.ArrayLike, steps: int) -> tuple[jax.Array, jax.Array]:
        """Whether the steps are in proportion, and whether there are any."""
        at = jax.tree.map(ordinary, params)
        extra: Any = {"value": jnp.float32(1e-5), "outputs_fn": outputs}

        def step(states: Any, _: None) -> tuple[Any, Any]:
            (none, one, two), states = zip(
                *(
                    inner.update(gradient(times * size), state, at, **extra)
                    for times, state in enumerate(states)
                ),
                strict=True,
            )
            fits = jax.tree.map(
                lambda n, o, t: (
                    peak(t - 2 * o + n) <= 1e-3 * peak(t - n) + 1e-5 * peak(n)
                ),
                *(none, one, two),
            )
            moves = jax.tree.map(lambda n, t: peak(t - n) > 0, none, two)
            return states, [jnp.stack(jax.tree.leaves(each)) for each in (fits, moves)]

        _, (fits, moves) = jax.lax.scan(step, (inner.init(at),) * 3, length=steps)
        return fits.all(), moves.any()

    def in_proportion() -> bool:
        # Accumulation may wait for many gradients.
        steps = 8 if tried(0.25, 8)[1] else 64
        return bool(tried(0.25, steps)[0] or tried(64.0, steps)[0])

    problem = "its steps are not in proportion to the gradient"
    try:
        # This thread may be tracing a function or be inside `shard_map`.
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
            if executor.submit(in_proportion).result():
                return
    except jax.errors.UnexpectedTracerError:
        return  # a learning rate is traced: nothing can be tried
    except (TypeError, ValueError) as error:  # an argument is missing
        problem = f"it needs more than gradients and parameters ({error})"
    raise ValueError(
        "keep_norms rescales momentum with its kernel, but this optimizer is more than "
        f"momentum: {problem}. Wrap one such as backmatch_sgd"
    )


def _kernels(spec: _spec.LayerChain, params: optax.Params) -> dict[str, int]:
    """The paths of the kernels whose norm the next link takes away.

    With how many first axes have an entry for each layer.
    """
    found = dict(_before_norms(locate(spec, params, unlisted="identity")))
    if not found:
        raise ValueError(
            "keep_norms found no kernel right before a normalisation in the spec, so "
            "there is no norm that does not matter"
        )
    return found


def _before_norms(sites: Sequence[Site]) -> Iterator[tuple[str, int]]:
    """Kernels right before a normalisation, in the chain and in its arms."""
    for site, above in itertools.pairwise(sites):
        link: Any = site.link
        elsewhere = bool(site.uses)  # where its norm may matter
        has_kernel = "kernel" in site.params and not (link.owns_subtree or elsewhere)
        if has_kernel and above.link.takes_away_norm("bias" in site.params):
            yield param_path(site, "kernel"), len(site.stacked)
    for site in sites:
        for arm in site.arms.values():
            yield from _before_norms(arm)
