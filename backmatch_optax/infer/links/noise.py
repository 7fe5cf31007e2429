"""How random numbers are recognised that are added to a signal, or multiply it."""

from __future__ import annotations

from typing import Any

import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph, layout, pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.step import Step

_NONE = 1e-6  # the most that a mean's share of the mean square may be by chance
# Those that bits make a number in [1, 2) of, as evenly as a grid does.
_MANTISSAS = 1 + (np.arange(20_000).reshape(2, -1) + 0.5) / 20_000


def noise(node: Node) -> Step | None:
    """`Residual` or `Gate` with random numbers, or `Dropout`; None for none.

    They are an `Input` of their size, as in a variational autoencoder. Factors with a
    mean are what a `Dropout` has, which keeps the mean of the signal.
    """
    if node.op not in ("add", "mul", "sub") or len(node.flow) != 1:
        return None
    (signal,) = node.flow
    (numbers,) = (operand for operand in node.operands if not operand.flows)
    if numbers.origins != {"random"}:
        return None
    if any(found.dtype == bool for found in graph.above(numbers)):  # a mask
        return None
    values = drawn(numbers)
    if values is None or len({signal.shape, numbers.shape, node.shape}) > 1:
        return None
    mean, square = float(np.mean(values)), float(np.mean(values**2))
    if node.op == "mul" and mean**2 > _NONE * square:
        links: list[_spec.Link] = [_spec.Dropout(_short(1 - mean**2 / square))]
        return Step(node, signal, [*links, *_scale(mean)], elementwise=True)
    if mean**2 > _NONE * square or not square:
        return None
    arms = [], [_spec.Input(node.shape[1:]), *_scale(square**0.5)]
    joined = _spec.Gate(*arms) if node.op == "mul" else _spec.Residual(*arms)
    return Step(node, signal, [joined])


def _scale(factor: float) -> list[_spec.Link]:
    return [] if abs(factor - 1) < 1e-3 else [_spec.Scale(_short(factor))]


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def drawn(node: Node) -> Any | None:
    """What is made of random bits, for even ones; None where that is not known.

    Known is what comes of `jax.random.uniform`, as `jax.random.normal` does.
    """
    while node.op in ("broadcast_in_dim", "reshape", "squeeze"):
        node = node.operands[0]
    bits = [found for found in graph.above(node) if found.op == "bitcast_convert_type"]
    if len(bits) != 1:
        return None
    try:
        piece = pieces.evaluate(node, bits[0], _MANTISSAS)
    except layout.Unmatched:
        return None
    return None if piece.masks else piece.values
