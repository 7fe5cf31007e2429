"""What a recognised layer is: a step of the graph, and who recognises which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph, layout
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.pieces import Piece
from backmatch_optax.infer.windows import Window
from backmatch_optax.spec.link import Shape

# What stands behind primitives that no link describes.
MEANINGS = {
    "argmax": "an index taken from the signal",
    "concatenate": "a concatenation",
    "cond": "a branch on data",
    "custom_jvp_call": "a function with a derivative of its own",
    "custom_vjp_call": "a function with a derivative of its own",
    "cumsum": "a cumulative sum",
    "dot_general": "a matrix product that is no Dense layer",
    "dynamic_slice": "indexing",
    "dynamic_update_slice": "an update of a part",
    "fft": "a Fourier transform",
    "gather": "indexing, or an embedding",
    "pad": "padding that no convolution follows",
    "reduce_max": "a maximum over features or batch",
    "reduce_sum": "a sum over features or batch",
    "scan": "a loop (recurrence)",
    "slice": "indexing",
    "sort": "an order by value",
    "split": "a split",
    "stop_gradient": "a stopped gradient",
    "while": "a loop (recurrence)",
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """How the axes of queries, keys and values stand to one another in attention.

    Attributes:
      query: a letter for each axis of the queries: `d` for what is contracted with the
        keys, `b` for what goes along with an axis of the keys, `p` for others.
      key: the same for the keys.
      value: the same for the values; `p` for what is contracted with the weights.
      out: for each axis of the outcome, factors of the axes of the queries.
      factor: what the logits are multiplied by.
      causal: whether a position attends only to itself and to those before it.
      attended: to how many positions, where a mask leaves fewer.
      bias: the links to learned numbers that are added to the logits.
    """

    query: str
    key: str
    value: str
    out: Sequence[layout.Axis]
    factor: float
    causal: bool
    attended: float | None
    bias: Sequence[_spec.Link] = ()


@dataclasses.dataclass
class Step:
    """What happens between a node and the one it is computed from."""

    node: Node
    source: Node
    links: Sequence[_spec.Link] = ()  # one after the other
    ends: tuple[Node, ...] = ()  # several signals that meet in the node,
    joins: str = ""  # in what way: "sum", "product", "concatenate" and so on,
    heads: Heads | None = None  # of attention,
    arms: Sequence[list[Step]] = ()  # and the steps that lead to each
    moves: bool = False  # the same values in other places, or repeated
    contracted: int = 1  # how many of the last axes are its features,
    order: tuple[int, ...] = ()  # where they are others: the axes as the link has them,
    sizes: Shape = ()  # the features that it makes, in the same order,
    placed: tuple[int, ...] = ()  # and which of all its axes is where in the node
    taken: tuple[int, ...] = ()  # of an axis: (axis, start, stop, stride)
    resized: tuple[Any, ...] = ()  # an axis: (axis, its new place and size, method)
    bias: str = ""  # path of a parameter added to the signal; `links` if standing alone
    window: Window | None = None  # that the first of its links slides over positions
    padding: tuple[Any, ...] = ()  # (low, high) per axis, for a convolution to come
    mode: str = ""  # how that is filled: "CIRCULAR", "REFLECT"; empty for zeros
    elementwise: bool = False  # so that the order of the axes does not matter
    begins: bool = False  # that the chain begins behind it
    # Whether a piece of the graph that goes on beyond it cannot be one link.
    opaque: bool = False
    late: bool = False  # Whether it is a link only where longer pieces are none.
    again: bool = False  # Whether another arm, before this one, has it too.

    def shared(self) -> set[Node]:
        """The nodes that each of its arms leads through."""
        return set.intersection(*({*nodes(arm)} for arm in self.arms))


class Unknown(Exception):
    """Something on the way from the input to the output that no link describes."""

    def __init__(self, node: Node, reason: str, block: _spec.Block | None = None):
        super().__init__(reason)
        self.node = node
        self.reason = reason
        self.block = block  # that would describe it, taken from here on


def nodes(steps: Sequence[Step]) -> Iterator[Node]:
    """The nodes that steps lead to, those inside arms too."""
    for step in steps:
        yield step.node
        for arm in step.arms:
            yield from nodes(arm)


RULES: dict[str, Callable[[Node], Step]] = {}


PATTERNS: list[Callable[[Piece, Node, Node], Step | None]] = []


def rule(*primitives: str) -> Callable[[Any], Any]:
    """Enters a function under primitives, or among those that know pieces."""

    def enter(function: Any) -> Any:
        RULES.update({primitive: function for primitive in primitives})
        if not primitives:
            PATTERNS.append(function)
        return function

    return enter


def layer_path(param: Node, name: str) -> str:
    """The path of a layer that has a parameter of this name, or that of the parameter.

    Flax's own layers have a `kernel` or an `embedding`. Of any other name it is a layer
    by itself.
    """
    module, _, found = f"/{param.path}".rpartition("/")
    return module[1:] if found == name else param.path


def description(node: Node) -> str:
    """What a value is that the input does not reach."""
    if "random" in node.origins:
        return "random numbers"
    paths = [repr(found.path) for found in graph.above(node) if found.path]
    return f"what is computed from {', '.join(paths)}" if paths else "an array"
