"""How what acts on every entry alike is recognised."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.activations import activation as named
from backmatch_optax.infer import graph, pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links.noise import drawn
from backmatch_optax.infer.pieces import MASK, SIGNAL, Piece
from backmatch_optax.infer.step import Step, rule
from backmatch_optax.spec.elementwise import ACTIVATIONS


def _is_plain(piece: Piece) -> bool:
    return not (piece.masks or piece.leaves or piece.reduced)


@rule()
def scaling(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Scale`: a constant factor."""
    ratio = piece.values / SIGNAL
    if not _is_plain(piece) or not np.ptp(ratio) <= 1e-6:  # or NaN, as of a logarithm
        return None
    factor = float(np.median(ratio))
    return (
        Step(node, source, [_spec.Scale(factor)], elementwise=True) if factor else None
    )


@rule()
def shift(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Shift`: a constant added, perhaps to a multiple; in a product alone."""
    if not _is_plain(piece) or not np.isfinite(piece.values).all():
        return None
    (zero, one), signal = piece.values.ravel()[:2], SIGNAL.ravel()[:2]
    factor = float(f"{(one - zero) / (signal[1] - signal[0]):.6g}")
    added = piece.values - factor * SIGNAL
    if not np.ptp(added) <= 1e-5:
        return None
    value = float(f"{np.median(added):.6g}")
    if not factor or not value:
        return None
    sign = math.copysign(1.0, value)
    before = [_spec.Scale(sign * factor)] * (sign * factor != 1)
    after = [_spec.Scale(-1.0)] * (sign < 0)
    links = [*before, _spec.Shift(abs(value)), *after]
    return Step(node, source, links, elementwise=True, late=True)


@rule()
def activation(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Activation`: one of the functions that it knows."""
    if not _is_plain(piece) or not jnp.issubdtype(node.dtype, jnp.floating):
        return None
    for name, reference in _activations(jnp.dtype(node.dtype)):
        if np.allclose(piece.values, reference, rtol=1e-4, atol=1e-6):
            return Step(node, source, [_spec.Activation(name)], elementwise=True)
    slope = float(np.median((piece.values / SIGNAL)[SIGNAL < 0]))
    if slope > 0 and np.allclose(piece.values, np.where(SIGNAL > 0, 1, slope) * SIGNAL):
        slope = float(str(np.float32(slope)))  # as a person writes it
        link = _spec.Activation("leaky_relu", negative_slope=slope)
        return Step(node, source, [link], elementwise=True)
    return None


@functools.cache
def _activations(dtype: Any) -> list[tuple[str, Any]]:
    """What every known activation makes of the samples, constants in a dtype."""
    functions = [
        (name, named(name))
        for name in ACTIVATIONS
        if name not in ("identity", "swish", "celu")  # of one value with others
    ]
    functions.append(("gelu", functools.partial(jax.nn.gelu, approximate=False)))
    computed = []
    for name, function in functions:
        closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((1,), dtype))
        argument = graph.leaf("input", "", (1,), dtype)
        (output,) = graph.read(closed, [argument])
        computed.append((name, pieces.evaluate(output, argument).values))
    return computed


@rule()
def dropout(piece: Piece, node: Node, source: Node) -> Step | None:
    """`Dropout`: what is kept makes up for what is dropped."""
    if len(piece.masks) != 1 or piece.leaves or piece.reduced:
        return None
    share, ratio = _share(piece.masks[0]), piece.values / SIGNAL
    for kept, keep in ((MASK, share), (~MASK, 1 - share)):
        factor = float(np.median(ratio[:, kept]))
        if not ratio[:, ~kept].any() and np.ptp(ratio[:, kept]) < 1e-6:
            if abs(factor * keep - 1) < 4e-3:
                link = _spec.Dropout(float(f"{1 - 1 / factor:.6g}"))
                return Step(node, source, [link], elementwise=True)
    return None


def _share(mask: Node) -> float:
    """How many random bits are set, if `jax.random.uniform` decides; else NaN."""
    values = drawn(mask)
    return math.nan if values is None else float(np.mean(values))
