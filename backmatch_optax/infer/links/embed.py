"""How an embedding is recognised: rows of a table."""

from __future__ import annotations

import jax.numpy as jnp

from backmatch_optax import spec as _spec
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
    whole = (len(source.shape), len(table.shape)) == (len(node.shape) - 1, 2)
    if rows != ((0,), (0,)) or not whole or source.shape != node.shape[:-1]:
        raise Unknown(
            node, f"{node.op} with {table.path!r} takes no row for each input"
        )
    link = _spec.Embed(layer_path(table, "embedding"))
    return Step(node, source, [link], opaque=True)
