"""How each kind of layer is recognised in a graph: one function for each.

To teach inference a new kind of layer, write one function in the module that is named
after the links it finds. Under the names of primitives, `@rule(...)` makes it
responsible for what these compute. Under none it is asked about every elementwise or
normalising piece of the graph, with what the piece makes of sample values.
"""

# Each module enters its rules when it is imported.
from backmatch_optax.infer.links import (
    attention,
    composite,
    elementwise,
    embed,
    learned,
    linear,
    noise,
    norm,
    pool,
    repeat,
    reshape,
    resize,
    rotation,
)

__all__ = [
    "attention",
    "composite",
    "elementwise",
    "embed",
    "learned",
    "linear",
    "noise",
    "norm",
    "pool",
    "repeat",
    "reshape",
    "resize",
    "rotation",
]
