"""How an embedding is recognised: rows of a table."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout, pieces
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links.resize import nearest
from backmatch_optax.infer.step import MEANINGS, Step, Unknown, layer_path, rule


@rule("gather")
def embedding(node: Node) -> Step:
    """`Embed`: rows of a table, one for each integer."""
    table, indices = node.operands
    if table.flows:
        return nearest(node)
    if table.op != "param" or not indices.flows:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    found = node.options["dimension_numbers"]
    rows = (found.collapsed_slice_dims, found.start_index_map)
    source = indices
    while source.op != "input" and jnp.issubdtype(source.dtype, jnp.integer):
        if source.dominator is None or source.dominator.op == "inputs":
            break
        source = source.dominator
    if source.op != "input" and not jnp.issubdtype(source.dtype, jnp.integer):
        raise Unknown(
            node,
            f"{node.op} looks up what was rounded to integers, which has no derivative",
        )
    embed = _spec.Embed(layer_path(table, "embedding"))
    if rows == ((0,), (0,)) and len(table.shape) == 2:
        if source.shape == node.shape[:-1]:
            return Step(node, source, [embed], opaque=True)
        column = _column(indices, source)
        if source.shape[:-1] == node.shape[:-1] and column is not None:
            links = [_spec.Slice((column, column + 1), axis=-1), embed]
            return Step(node, source, links, opaque=True)
    raise Unknown(node, f"{node.op} with {table.path!r} takes no row for each input")


def _column(indices: Node, source: Node) -> int | None:
    """Which entry along the last axis of some integers others are; None for none."""
    # Of an integer its place: what is done to a negative one does not happen.
    places = {source: lambda index: np.asarray(index[-1])}
    every = [*np.indices(indices.shape, sparse=True)]
    try:
        found = np.unique(pieces.entries(indices, every, places))
    except (layout.Unmatched, IndexError):
        return None
    return int(found[0]) if found.size == 1 else None
