"""From a declared chain and parameters to one scale for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backmatch_optax import recursion
from backmatch_optax import spec as _spec
from backmatch_optax.moments import Gains, Moments
from backmatch_optax.numerics import check_number, scaled, wide
from backmatch_optax.parameters import (
    Unlisted,
    listed,
    locate,
    places,
    refuse_parts,
    text,
)
from backmatch_optax.powers import finite_exp, number, separate
from backmatch_optax.spec.link import Site, every, scaled_roles

# It matters where training starts from zeros, a zero-initialised head or last BatchNorm
# of a residual branch: what lies behind is scaled by the norm's reciprocal while its
# gradient grows with the norm's root, so that the second step would throw it far away.
NORM_FLOOR = 0.1

# How far a normalized scale may be from SGD's 1. At SGD's best rate a network bears a
# factor of 2 in a layer's rate (docs/rates.md has the networks that say so).
LIMIT = 2.0


def layer_scales(
    spec: _spec.LayerChain,
    params: optax.Params,
    *,
    gains: Gains = "paper",
    norm_floor: jax.typing.ArrayLike = NORM_FLOOR,
    normalize: bool = True,
    limit: jax.typing.ArrayLike | None = LIMIT,
    unlisted: Unlisted = "error",
) -> dict[str, jax.Array]:
    r"""The scale of every declared layer: what its gradient is to be multiplied by.

    Walks the chain from the output to the input with a backward factor `m`, from
    `m = 1`, as in Algorithm 2 of the local-Hessian paper (LH) and Algorithm 1 of the
    back-matching paper (BM):

    .. math::
      \mathrm{scale}(W) = \frac{1}{m \, m_W}, \qquad m \leftarrow m \, m_z

    where :math:`m_W` and :math:`m_z` are the mean diagonals of :math:`J^T J` of the
    layer with respect to its weight and to its input. A pure function of shapes and of
    one norm for each parameter, to be used under `jax.jit` or outside.

    Args:
      spec: the declared chain.
      params: the model's parameters: nested dicts, FrozenDicts or an `nnx.State`, with
        arrays of real floating dtype.
      gains: what a nonlinearity does to the signal: `"paper"`, nothing; `"mean_field"`,
        what it does to a Gaussian signal in a wide network, with the mean that a
        BatchNorm removes told apart from the variance it divides by, pooling on
        activations and taps that fall on padding taken into account.
      norm_floor: where a scale divides by a kernel's `||W||^2_{2,mu}` (BM 3.1; by the
        mean square of a normalisation's scale), it divides by no less than this; 1 is a
        kernel that keeps its signal's size. With the default, a network with a
        zero-initialised head, or a zero-initialised BatchNorm at the end of a residual
        branch, learns. 0 is the papers' rule to the letter. Where a norm cancels, as
        that of every kernel below a BatchNorm does, it plays no part.
      normalize: divides all scales by their mean, so that SGD's learning rate carries
        over. It is the harmonic mean over every entry of every declared parameter: the
        trace of the scaled Gauss-Newton matrix that the chain predicts is then SGD's.
        False is the papers' rule. The sizes of the layers and of the head then enter
        every scale, and the learning rate must be tuned anew for each network.
      limit: how far a normalized scale may be from 1, up or down. With the default of
        2, no parameter learns at more than twice SGD's rate or less than half of it,
        whatever the chain says. None is no limit: the ratios between layers are then
        the papers'. Without `normalize` it plays no part.
      unlisted: `"error"`, or `"identity"` to allow parameters that no layer covers.

    Returns:
      A positive, finite scalar for each declared layer with parameters, keyed by its
      path and in the order of the chain (under `jax.jit`, by name). It is the scale of
      the layer's kernel (of BatchNorm's scale and bias; of all of a `Block`); a bias
      may have another one, since it meets a constant instead of the layer's input. The
      dtype is float32, or float64 where a declared parameter is.

      A kernel of zeros below a BatchNorm counts as one that keeps its signal's size,
      so that it can move. What has overflowed float32 counts as its largest number, and
      NaN in a parameter is NaN in the scales it enters.

    Raises:
      ValueError: where the chain does not fit the parameters, see `check_spec`; where
        an option is none of the above; or inside `jax.shard_map`, where a parameter is
        not the same on all devices, so that it may be a part of one.

    Examples:
      >>> import jax.numpy as jnp
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
      >>> for path, scale in bmo.layer_scales(net, params).items():
      ...     print(path, scale.round(4))
      fc1 1.3333
      fc2 0.6667
      >>> for path, scale in bmo.layer_scales(net, params, normalize=False).items():
      ...     print(path, scale.round(4))
      fc1 2.0
      fc2 1.0
    """
    check_options(gains, norm_floor, normalize, limit, unlisted)
    sites = walk(spec, params, gains=gains, norm_floor=norm_floor, unlisted=unlisted)
    scales = scale_of_params(sites, normalize, limit)
    return {layer: scales[path] for layer, path in main_paths(sites).items()}


def walk(
    spec: _spec.LayerChain,
    params: optax.Params,
    *,
    gains: Gains,
    norm_floor: jax.typing.ArrayLike,
    unlisted: Unlisted,
) -> list[Site]:
    """The chain's sites with moments and `m` filled in by the two passes."""
    refuse_parts(params, getattr(spec, "paths", ()))
    sites = locate(spec, params, unlisted=unlisted)
    check_arrays(params)
    for site in every(sites):
        site.mean_field = gains == "mean_field"
        site.norm_floor = norm_floor
    # The input counts as whitened, and the derivative of the loss with respect to the
    # network's output as the wanted change of it (BM 3.2).
    recursion.mark_centred(sites)
    recursion.mark_divided(sites)
    output = recursion.forward(sites, Moments(number(1.0)))
    recursion.backward(sites, output.q)  # m is 1 there
    return sites


def check_arrays(params: optax.Params) -> None:
    """Raises `ValueError` where a parameter is a shape only."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{text(path)!r} is a ShapeDtypeStruct, but scales need concrete "
                "arrays; check_spec does with shapes"
            )


def check_options(
    gains: str,
    norm_floor: Any,
    normalize: Any,
    limit: Any,
    unlisted: str,
) -> None:
    """Raises `ValueError` for an option that is none of those `layer_scales` tells.

    The value of an array is not looked at where it is traced.
    """
    if gains not in ("paper", "mean_field"):
        raise ValueError(f"gains (={gains!r}) must be 'paper' or 'mean_field'")
    if unlisted not in ("error", "identity"):
        raise ValueError(f"unlisted (={unlisted!r}) must be 'error' or 'identity'")
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize (={normalize!r}) must be True or False")
    check_number("norm_floor", norm_floor, least=0)
    if limit is not None:
        check_number("limit", limit, least=1)


def path_of(site: Site) -> str:
    """The path of a link that has parameters."""
    link: Any = site.link
    return link.path


def main_path(site: Site) -> str:
    """The path of the parameter whose scale stands for a layer; of a Block its own."""
    return param_path(site, next(iter(site.params)))


def param_path(site: Site, role: str) -> str:
    """The path of one of a site's parameters; of a Block its own."""
    if site.link.owns_subtree:
        return path_of(site)
    return places(site.link, site.is_array)[role]


def scaled_params(sites: Sequence[Site]) -> Iterator[tuple[str, Site, str]]:
    """Path, site and role of all that has a scale; a Block is one, with the role ""."""
    for site, role in scaled_roles(sites):
        yield param_path(site, role), site, role


def _leaves(site: Site, role: str) -> list[Any]:
    """The arrays that share a scale: a parameter; with the role "" all of a Block."""
    return jax.tree.leaves(site.params[role] if role else dict(site.params))


def scale_of_params(
    sites: Sequence[Site], normalize: bool, limit: jax.typing.ArrayLike | None
) -> dict[str, jax.Array]:
    """The scale of every declared parameter by its path; of a Block by the block's."""
    found = {path: (site, role) for path, site, role in scaled_params(sites)}
    single = [path for path, (site, _) in found.items() if not site.stacked]
    stacked = [path for path, (site, _) in found.items() if site.stacked]
    leaves = [leaf for place in found.values() for leaf in _leaves(*place)]
    dtype = wide(*(leaf.dtype for leaf in leaves))
    logs, of_layers = recursion.log_scales([*found.values()], dtype)
    if stacked:  # the scales of all layers behind the others
        logs = jnp.concatenate([logs, *map(jnp.ravel, of_layers)])
    counts = [math.prod(found[path][0].stacked) for path in stacked]
    if normalize:
        sizes = [_size(*found[path]) for path in single]
        for path, count in zip(stacked, counts, strict=True):
            sizes += [_size(*found[path])] * count
        logs = _over_their_mean(logs, sizes)
    scales = finite_exp(logs)
    if normalize:
        scales = within(limit, scales)
    if not stacked:
        return dict(zip(single, separate(scales), strict=True))
    alone, *of_layers = jnp.split(scales, np.cumsum([len(single), *counts[:-1]]))
    by_path = dict(zip(single, separate(alone), strict=True))
    for path, entries in zip(stacked, of_layers, strict=True):
        by_path[path] = entries.reshape(found[path][0].stacked)
    return {path: by_path[path] for path in found}


def _size(site: Site, role: str) -> int:
    """How many coordinates share a scale."""
    size = sum(leaf.size for leaf in _leaves(site, role))
    return size // math.prod(site.stacked)


def steps_of_params(sites: Sequence[Site]) -> dict[str, jax.Array]:
    """What a step of entries of size 1 is to be multiplied by, by path as above.

    It then changes every coordinate of the network's output by 1: a step `dW` in
    general position changes the output by `size(W) * m * m_W`, summed over squares.
    """
    scales = scale_of_params(sites, normalize=False, limit=None)
    size_out = sites[-1].size_out if sites else 1
    steps = {}
    for path, site, role in scaled_params(sites):
        share = math.sqrt(size_out / _size(site, role))
        steps[path] = jnp.sqrt(scales[path]) * share
    return steps


def within(limit: jax.typing.ArrayLike | None, scale: jax.Array) -> jax.Array:
    """A normalized scale, held between one over the limit and the limit."""
    if limit is None:
        return scale
    most = jnp.asarray(limit, scale.dtype)
    return jnp.clip(scale, 1 / most, most)


def _over_their_mean(logs: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Logs of scales over their harmonic mean over all entries of all parameters."""
    weights = jnp.asarray(np.asarray(sizes) / max(sum(sizes), 1), logs.dtype)
    return logs + jax.nn.logsumexp(-logs, b=weights)


def main_paths(sites: Sequence[Site]) -> dict[str, str]:
    """By layer, the path of the parameter whose scale stands for it."""
    return {path_of(site): main_path(site) for site in every(sites) if site.params}


def scaled_updates(
    updates: optax.Updates,
    params: optax.Params,
    scale_of: Callable[[str], jax.Array | None],
) -> optax.Updates:
    """Each update times the scale of its path, or as it is where that is None.

    Raises `ValueError` for an update that no parameter has asked for, and for one that
    is to be scaled and is no array of floating-point numbers.
    """
    known = {text(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def scaled_update(key_path: jax.tree_util.KeyPath, update: Any) -> Any:
        path = text(key_path)
        if path not in known:
            raise ValueError(
                f"the updates have {path!r}, but the parameters do not: "
                + listed(sorted(known))
            )
        scale = scale_of(path)
        if scale is not None:
            check_update(path, update)
        return scaled(update, scale)

    return jax.tree_util.tree_map_with_path(scaled_update, updates)


def check_update(path: str, update: Any) -> None:
    """Raises `ValueError` for a gradient that cannot be scaled."""
    dtype = getattr(update, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"the gradient of {path!r} must be an array of a floating or complex "
            "dtype, but it is "
            + (f"a {type(update).__name__}" if dtype is None else f"of {dtype}")
        )


def check_state(state: Any, expected: Any) -> None:
    """Raises `ValueError` for a state that is not as `init` makes it.

    Args:
      state: what `update` was given.
      expected: a state for the same parameters; its leaves may be anything of the same
        shapes.
    """
    if jax.tree.structure(state) == jax.tree.structure(expected):
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True)
        if all(jnp.shape(found) == jnp.shape(wanted) for found, wanted in pairs):
            return
    kind = type(expected).__name__
    scales = getattr(state, "layer_scales", None)
    found = f"has those of {listed(scales)}" if isinstance(scales, dict) else "has none"
    raise ValueError(
        f"update needs the {kind} that init of the same transformation makes for these "
        f"parameters, with scales of {listed(expected.layer_scales)}, but the state is "
        f"a {type(state).__name__} that {found}"
    )
