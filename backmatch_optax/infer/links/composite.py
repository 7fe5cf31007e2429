"""How signals that meet are recognised: side by side, or as several outputs."""

from __future__ import annotations

from backmatch_optax import spec as _spec
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links.learned import is_aligned, origin
from backmatch_optax.infer.links.reshape import wrapped
from backmatch_optax.infer.links.rotation import rotation
from backmatch_optax.infer.step import Step, Unknown, description, rule


@rule("concatenate")
def concatenation(node: Node) -> Step:
    """`Concatenate`, `ClassToken`; or padding with parts of the signal itself."""
    axis, rank = node.options["dimension"], len(node.shape)
    rotated = rotation(node) if axis == rank - 1 else None
    if rotated is not None:
        return rotated
    padded = wrapped(node, axis) if 0 < axis < rank - 1 else None
    if padded is not None:
        return padded
    if axis == 0:
        raise Unknown(node, f"{node.op} joins examples of the batch")
    ends = node.flow
    assert node.dominator is not None
    if all(operand.flows for operand in node.operands):
        return Step(node, node.dominator, ends=ends, joins="concatenate", opaque=True)
    first, *others = node.operands
    path = origin(first).path
    token = first.origins == {"param"} and is_aligned(first, path)
    if token and len(others) == len(ends) == 1 and (axis, rank) == (1, 3):
        return Step(node, others[0], [_spec.ClassToken(path)], opaque=True)
    constant = next(operand for operand in node.operands if not operand.flows)
    raise Unknown(node, f"{node.op} joins the signal with {description(constant)}")


@rule("outputs")
def outputs(node: Node) -> Step:
    """`Outputs`: the end of a model with several."""
    assert node.dominator is not None
    ends = node.operands
    return Step(node, node.dominator, ends=ends, joins="outputs", opaque=True)
