"""Declared scales held against measured ones."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from backmatch_optax import spec as _spec
from backmatch_optax.measured import measure_layer_scales
from backmatch_optax.moments import Gains
from backmatch_optax.parameters import Unlisted, listed, locate
from backmatch_optax.scales import (
    check_arrays,
    layer_scales,
    main_path,
    main_paths,
    path_of,
)
from backmatch_optax.spec.link import Site, every
from backmatch_optax.text import aligned, indexed


class ScaleComparison(NamedTuple):
    """What `compare_scales` returns, keyed by the paths of the declared layers.

    The layers of a `spec.Repeat` have an index behind the path, `"layers/Dense_0[3]"`.
    Printed, it is a table.
    """

    declared: dict[str, float]
    measured: dict[str, float]
    standard_errors: dict[str, float]  # of the measured scales
    ratios: dict[
        str, float
    ]  # declared over measured: 1, or the same for all, is right;
    # 0 where no gradient arrives, as below a zero-initialised head
    suspects: dict[str, str]  # what looks wrong, by the layer where the ratio changes

    def __str__(self) -> str:
        rows: list[tuple[str, ...]]
        rows = [("layer", "declared", "measured", "+-", "ratio", "")]
        for path, ratio in self.ratios.items():
            figures = (self.declared[path], self.measured[path])
            error = self.standard_errors[path] / self.measured[path]
            texts = (f"{figure:.4g}" for figure in figures)
            end = (f"{error:.0%}", f"{ratio:.2f}", self.suspects.get(path, ""))
            if math.isinf(self.measured[path]):
                end = ("", "", "no gradient arrives: a zero above it")
            rows.append((path, *texts, *end))
        return aligned(rows)


def compare_scales(
    spec: _spec.LayerChain,
    params: optax.Params,
    fn: Callable[..., Any],
    *inputs: Any,
    key: jax.Array,
    num_probes: int = 8,
    gains: Gains = "mean_field",
    tolerance: float = 3.0,
    unlisted: Unlisted = "error",
) -> ScaleComparison:
    """Holds a declared chain against what the model does: the numeric `check_spec`.

    `check_spec` sees that every declared layer fits its parameters; it cannot see a
    pooling that was forgotten. Measured scales can: an error in one link changes the
    ratio of declared to measured for every layer below it by the same factor. So the
    ratio is followed down the chain, and where it changes by more than `tolerance`, and
    by more than chance, the links there are named.

    At initialisation, with `"mean_field"` gains, the scales of kernels should agree
    within a factor of about 1.2 for Gaussian input and of 3 for images, or for small
    padded ones; those of a normalisation's scale and bias may be off tenfold. Training
    makes kernels and signals less random, and the two part slowly.

    Args:
      spec: the declared chain.
      params: the model's parameters.
      fn: `fn(params, *inputs)`, the model's outputs before the loss, with the batch as
        first axis; with BatchNorm in training mode, as the gradient is taken.
      *inputs: what else `fn` takes, such as a batch of images, standardised.
      key: key of the random probes.
      num_probes: the number of vector-Jacobian products, at least 1; with a single one
        there is no standard error, and chance is not told apart.
      gains: the gains of the declared scales; the papers' own are not meant to agree.
      tolerance: the change of the ratio from one layer to the next that is reported.
      unlisted: `"error"`, or `"identity"` to allow parameters that no layer covers.

    Returns:
      A `ScaleComparison`; printed, it is a table.

    Raises:
      ValueError: where the chain does not fit the parameters (`check_spec`), the model
        cannot be measured (`measure_layer_scales`), or `tolerance` is not above 1.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> def model(params, x):
      ...     x = x @ params["fc1"]["kernel"]
      ...     return 3 * x @ params["fc2"]["kernel"]
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> params = {
      ...     "fc1": {"kernel": jax.random.normal(keys[0], (64, 64)) / 8},
      ...     "fc2": {"kernel": jax.random.normal(keys[1], (64, 8)) / 8},
      ... }
      >>> x = jax.random.normal(keys[2], (256, 64))
      >>> chain = spec.LayerChain(
      ...     [spec.Dense("fc1"), spec.Dense("fc2")], input_shape=(64,)
      ... )
      >>> compared = bmo.compare_scales(chain, params, model, x, key=keys[3])
      >>> bool(compared.ratios["fc2"] > 8)  # the factor of 3 was not declared
      True
    """
    if not tolerance > 1:
        raise ValueError(f"tolerance (={tolerance!r}) must be above 1")
    sites = locate(spec, params, unlisted=unlisted)
    walked = [*_one_by_one(sites)]
    check_arrays(params)
    options: Any = {"gains": gains, "norm_floor": 0, "normalize": False}
    scales_of = functools.partial(layer_scales, spec, unlisted=unlisted, **options)
    declared = jax.jit(scales_of)(params)  # one program compiles faster than its parts
    owners = {main_path(site): site for site in every(sites) if site.params}
    blocks = tuple(p for p, site in owners.items() if site.link.owns_subtree)

    def parameter_or_block(path: str) -> str:
        inside = (b for b in blocks if path == b or path.startswith(f"{b}/") or not b)
        return next(inside, path)

    estimates = measure_layer_scales(
        fn,
        params,
        *inputs,
        key=key,
        num_probes=num_probes,
        layer_of=parameter_or_block,
        stacked=[path for path, site in owners.items() for _ in site.stacked],
    )
    mains = main_paths(sites)
    places = [(path_of(site), at) for site, at in walked if site.params]

    def named(of: dict[str, jax.Array], key_of: Callable[[str], str]) -> Any:
        arrays = {path: np.asarray(of[key_of(path)]) for path in mains}
        return {indexed(path, at): float(arrays[path][at]) for path, at in places}

    scales = named(declared, str)
    measured = named(estimates.layer_scales, mains.__getitem__)
    errors = named(estimates.standard_errors, mains.__getitem__)
    if unmeasured := [path for path, scale in measured.items() if not scale > 0]:
        raise ValueError(
            "fn has derivatives that are not finite numbers, so that no scale of "
            f"{listed(unmeasured)} can be measured"
        )
    ratios = {name: scales[name] / measured[name] for name in scales}
    relative = {name: errors[name] / measured[name] for name in scales}
    return ScaleComparison(
        declared=scales,
        measured=measured,
        standard_errors=errors,
        ratios=ratios,
        suspects=_suspects([site for site, _ in walked], ratios, relative, tolerance),
    )


def _one_by_one(
    sites: Sequence[Site], at: tuple[int, ...] = ()
) -> Iterator[tuple[Site, tuple[int, ...]]]:
    """The sites and those inside them, with the layer that each is met in."""
    for site in sites:
        yield site, at
        link, layers = site.link, [at]
        if isinstance(link, _spec.Repeat):
            layers = [(*at, layer) for layer in range(link.n)]
        for layer in layers:
            for arm in site.arms.values():
                yield from _one_by_one(arm, layer)


def _suspects(
    sites: Sequence[Site],
    ratios: dict[str, float],
    relative_errors: dict[str, float],
    tolerance: float,
) -> dict[str, str]:
    """Where the ratio changes from one layer to the next, with the links in between."""
    owners = [
        index
        for index, site in enumerate(sites)
        if site.params and (not site.uses or site.uses[0] is site)
    ]
    # Not the scale and bias of a normalisation: they act alike at all positions, so
    # cotangents that agree there, as below a GlobalAvgPool, add up.
    reached = [
        (path, index)
        for (path, ratio), index in zip(ratios.items(), owners, strict=True)
        if ratio > 0 and next(iter(sites[index].params)) != "scale"
    ]
    suspects = {}
    for (lower, first), (upper, last) in itertools.pairwise(reached):
        change = ratios[lower] / ratios[upper]
        noise = math.hypot(relative_errors[lower], relative_errors[upper])
        by_chance = abs(math.log(change)) < 3 * noise
        if max(change, 1 / change) > tolerance and not by_chance:
            between = ", ".join(repr(site.link) for site in sites[first : last + 1])
            suspects[lower] = (
                f"{change:.2g} times the ratio of {upper!r}: check {between}"
            )
    # Above the topmost layer nothing can hide an error, nor below it in its input.
    for top, _ in reached[-1:]:
        if max(ratios[top], 1 / ratios[top]) > tolerance:
            first = reached[-2][1] if len(reached) > 1 else 0
            around = ", ".join(repr(site.link) for site in sites[first:])
            suspects[top] = (
                f"{ratios[top]:.2g} times the measured scale: check {around}"
            )
    return suspects
