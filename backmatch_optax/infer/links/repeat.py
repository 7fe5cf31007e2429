"""How layers that are the same are recognised: a scan over them."""

from __future__ import annotations

from backmatch_optax.infer import graph
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.step import MEANINGS, Step, Unknown, description, rule


@rule("scan")
def repeated(node: Node) -> Step:
    """`Repeat`: a scan over layers whose parameters are stacked."""
    shared, carried, stacked = graph.loop(node)
    signals = [operand for operand in (*shared, *carried, *stacked) if operand.flows]
    learned = [operand for operand in stacked if operand.uses]
    through = carried[node.result : node.result + 1]
    if signals != [*through]:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    for operand in (*shared, *carried):
        for path in operand.uses if not operand.flows else ():
            raise Unknown(
                node,
                f"{node.op} uses {path!r} in each of its layers, but those of a Repeat "
                "have parameters of their own",
            )
    if not learned:
        raise Unknown(node, f"{node.op} is {MEANINGS[node.op]}")
    for operand in learned:
        if operand.op != "param":
            raise Unknown(
                node,
                f"{node.op} walks layers whose parameters are not stacked along the "
                f"first axis, or are computed: {description(operand)}",
            )
    if node.options["reverse"]:
        raise Unknown(node, f"{node.op} walks its layers from the last to the first")
    (signal,), ends = through, (graph.layer(node),)
    return Step(node, signal, ends=ends, joins="repeat", opaque=True)
