"""The declared chain as a table, with what the recursion makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from backmatch_optax import spec as _spec
from backmatch_optax.moments import Gains
from backmatch_optax.parameters import Unlisted, locate
from backmatch_optax.powers import evaluate
from backmatch_optax.scales import (
    LIMIT,
    NORM_FLOOR,
    check_arrays,
    check_options,
    main_path,
    scale_of_params,
    walk,
)
from backmatch_optax.spec.link import Site, every
from backmatch_optax.spec.windows import shape_text
from backmatch_optax.text import aligned, by_entry

_FEW = 3  # attentions, after which positions are not yet alike
_HEADER = ("layer", "path", "kernel", "output", "positions", "q", "m", "scale")


def describe(
    spec: _spec.LayerChain,
    params: optax.Params,
    *,
    gains: Gains = "paper",
    norm_floor: jax.typing.ArrayLike = NORM_FLOOR,
    normalize: bool = True,
    limit: jax.typing.ArrayLike | None = LIMIT,
    unlisted: Unlisted = "error",
) -> str:
    """A table of the chain: what was understood, and the scale that comes of it.

    One row for each link, input to output:

    * `layer`, `path`: the link's kind and the path of its parameters;
    * `kernel`: the shape of its first parameter (the kernel; a BatchNorm's scale);
    * `output`, `positions`: the shape of its output without the batch dimension, and
      the product of all its axes but the last;
    * `q`: the second moment of the signal that enters it;
    * `m`: the backward factor at its output;
    * `scale`: what the gradient of its first parameter is multiplied by:
      `1 / (m * m_W)`, divided by the mean of all with `normalize`, and then held
      within `limit`.

    Inside a `Repeat` a row is that of all layers: it has the least and the largest
    scale, and neither `q` nor `m`.

    Below the table stand the links whose rule may be far off in this chain, and why.

    Args:
      spec: the declared chain.
      params: the model's parameters, concrete arrays.
      gains: as in `layer_scales`, and so are the other options.
      norm_floor: the least that a scale divides by.
      normalize: whether scales are divided by their mean.
      limit: how far a normalized scale may be from 1.
      unlisted: `"error"`, or `"identity"` to allow parameters that no layer covers.

    Returns:
      The table as text.

    Raises:
      ValueError: where the chain does not fit the parameters, see `check_spec`; where
        these are not concrete; or where an option is none of the above.

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
      >>> print(bmo.describe(net, params, normalize=False))
      layer      path  kernel  output  positions  q  m    scale
      Dense      fc1   4*8     8       1          1  0.5  2
      BatchNorm                8       1          1  0.5
      Dense      fc2   8*2     2       1          1  1    1
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "describe writes numbers and needs concrete arrays; under jit, return "
            "layer_scales(spec, params) instead"
        )
    check_options(gains, norm_floor, normalize, limit, unlisted)
    sites = locate(spec, params, unlisted=unlisted)
    check_arrays(params)
    approximations: list[str] = []

    @jax.jit  # one program compiles faster than its parts
    def figures(params: optax.Params) -> tuple[dict[str, jax.Array], jax.Array]:
        walked = walk(
            spec, params, gains=gains, norm_floor=norm_floor, unlisted=unlisted
        )
        approximations[:] = _approximations(walked)
        scales = scale_of_params(walked, normalize, limit)
        shown = [n for site in _shown(walked) for n in (site.q, site.m)]
        return scales, evaluate(shown, jnp.dtype(jnp.float32))

    scales, shown = figures(params)
    moments = (f"{figure:.4g}" for figure in shown.tolist())
    table = aligned([_HEADER, *_rows(sites, scales, moments, depth=0)])
    return "\n".join([table, *approximations])


def _approximations(sites: Sequence[Site]) -> Iterator[str]:
    """A line for each reason why rules may be far off, with the links it is about."""
    found, mean_above = [*every(sites)], False
    attentions = sum(
        math.prod(site.arms["value"][-1].stacked) if site.arms["value"] else 1
        for site in found
        if isinstance(site.link, _spec.DotProductAttention)
    )
    labels: dict[str, list[str]] = {}
    for site in reversed(found):
        link = site.link
        mean_above |= isinstance(link, _spec.GlobalAvgPool) and not site.mean_field
        reason = link.why_approximate(site)
        reason = reason or (mean_above and link.approximate_below_a_mean)
        if not reason and attentions > _FEW:
            reason = link.approximate_in_depth
        if reason:
            labels.setdefault(reason, []).append(site.label)
    for reason, of in labels.items():
        more = f" and {len(of) - 3} more" if len(of) > 3 else ""
        yield f"approximate: {', '.join(of[:3])}{more}: {reason}"


def _shown(sites: Sequence[Site]) -> Iterator[Site]:
    """The sites with moments of their own in the table, in its order."""
    return (site for site in every(sites) if not site.stacked)


def _rows(
    sites: Sequence[Site],
    scales: Mapping[str, jax.Array],
    moments: Iterator[str],
    depth: int,
) -> Iterator[tuple[str, ...]]:
    """Rows of the table; `moments` are those of `_shown`, one after the other."""
    indent = "  " * depth
    for site in sites:
        link = site.link
        scale = kernel = ""
        if site.params:
            role = next(iter(site.params))
            figures = by_entry("", scales[main_path(site)]).values()
            scale = " to ".join(
                f"{f:.4g}" for f in sorted({min(figures), max(figures)})
            )
            if link.owns_subtree:
                kernel = f"{len(jax.tree.leaves(site.params))} arrays"
            else:
                kernel = shape_text(jnp.shape(site.params[role]))
        if isinstance(link, _spec.Repeat):
            kernel = f"{link.n} layers"
        yield (
            indent + type(link).__name__,
            getattr(link, "path", None) or "",
            kernel,
            shape_text(site.output_shape),
            str(site.positions_out),
            *(("", "") if site.stacked else (next(moments), next(moments))),
            scale,
        )
        for arm, chain in site.arms.items():
            yield (f"{indent}  {arm}:", *[""] * (len(_HEADER) - 1))
            yield from _rows(chain, scales, moments, depth + 2)
