"""How normalisations are recognised."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.pieces import SIGNAL, Piece
from backmatch_optax.infer.step import Step, rule
from backmatch_optax.spec.link import Shape


@rule()
def normalisation(piece: Piece, node: Node, source: Node) -> Step | None:
    """`BatchNorm`, `LayerNorm`, `GroupNorm`, `RMSNorm`, with scale and bias."""
    if not (piece.reduced or piece.paths["state"]) or piece.masks:
        return None
    for path, params, biases in _owners(piece.paths["param"]):
        leaves = {"scale": 1.0, "bias": 0.0}
        leaves |= {role: piece.leaves[found] for role, found in params.items()}
        for index, (link, centred, square) in enumerate(_normalised(piece, source)):
            one_plus = isinstance(link, _spec.RMSNorm) and link.one_plus
            scale = leaves["scale"] + one_plus
            affine = centred / np.sqrt(square) * scale + leaves["bias"]
            factor = _constant_ratio(piece.values, affine)
            own = {*params} - {"bias"} if biases else {*params}
            if link is None or factor is None or not own <= {*link.roles}:
                continue
            links: list[_spec.Link] = [dataclasses.replace(link, path=path)]
            if abs(factor - 1) > 2e-3:
                if params:  # it would not leave the bias alone
                    continue
                links.append(_spec.Scale(factor))
            # Against small values the epsilon counts.
            small = pieces.evaluate(node, source, SIGNAL * 1e-3)
            _, centred, square = [*_normalised(small, source)][index]
            normalised = (small.values - leaves["bias"]) / scale / factor
            epsilon = np.median((centred / normalised) ** 2 - square)
            if not np.isclose(epsilon, link.epsilon, rtol=1e-2, atol=1e-10):
                found = float(f"{max(epsilon, 0.0):.3g}")
                links[0] = dataclasses.replace(link, path=path, epsilon=found)
            return Step(node, source, [*links, *biases])
    return None


def _owners(
    paths: Sequence[str],
) -> Iterator[tuple[str | None, dict[str, str], list[_spec.Link]]]:
    """What a link's path may be, which parameters it has by role, and a later bias.

    A module's own where its parameters have Flax's names, or the scale's.
    """
    named = [f"/{path}".rpartition("/")[::2] for path in paths]
    modules, names = {module for module, _ in named}, {name for _, name in named}
    if not paths:
        yield None, {}, []
    elif len(modules) == 1 and names <= {"scale", "bias"} and modules != {""}:
        by_role = {role: path for (_, role), path in zip(named, paths, strict=True)}
        yield modules.pop()[1:], by_role, []
    elif len(paths) <= 2:
        for scale, *rest in itertools.permutations(paths):
            roles = zip(("scale", "bias"), (scale, *rest), strict=False)
            yield scale, dict[str, str](roles), [_spec.Bias(bias) for bias in rest]


def _constant_ratio(values: Any, reference: Any) -> float | None:
    """The number that makes the one out of the other, None where there is none."""
    ratio = values / reference
    factor = float(np.median(ratio))
    if not np.allclose(ratio, factor, rtol=1e-3) or factor == 0:
        return None
    return factor


def _normalised(piece: Piece, source: Node) -> Iterator[tuple[Any, Any, Any]]:
    """Each normalisation that is possible: what it divides, by the root of what."""
    signal, states = piece.signal, [piece.leaves[path] for path in piece.paths["state"]]
    if states and piece.reduced:
        return
    if len(states) == 2:
        for mean, variance in itertools.permutations(states):
            yield _spec.BatchNorm(), signal - mean, variance
    if piece.reduced:
        link = _normalisation_over(piece, source.shape)
        mean, variance = signal.mean(1, keepdims=True), signal.var(1, keepdims=True)
        yield link, signal - mean, variance
        if isinstance(link, _spec.LayerNorm):
            square = np.mean(signal**2, axis=1, keepdims=True)
            yield _spec.RMSNorm(), signal, square
            if piece.paths["param"]:
                yield _spec.RMSNorm(one_plus=True), signal, square


def _normalisation_over(piece: Piece, shape: Shape) -> Any:
    """Which normalisation takes its statistics over these axes, None for none."""
    last = len(shape) - 1
    axes = {axis for axis, _, _ in piece.reduced}
    # Positions must be taken whole, of the features the inner part of each group.
    for axis in axes:
        inner = math.prod(size for a, _, size in piece.reduced if a == axis)
        within = min(within for a, within, _ in piece.reduced if a == axis)
        if within != 1 or (axis != last and inner != shape[axis]):
            return None
    features = math.prod(size for axis, _, size in piece.reduced if axis == last)
    positions = {axis for axis in range(1, last) if shape[axis] > 1}
    if 0 in axes:
        return _spec.BatchNorm() if positions <= axes and last not in axes else None
    if not positions & axes and features == shape[last]:
        return _spec.LayerNorm()
    groups = shape[last] // features
    return _spec.GroupNorm(num_groups=groups) if positions <= axes else None
