"""The user's blocks: where they lie in a graph, their numbers, and which would help."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.step import Step, Unknown
from backmatch_optax.spec.link import kind_of

_COORDINATES = 20_000  # that the mean of probes is taken over, if 256 suffice

# What hands no gradient down, so that no numbers could be measured.
_WITHOUT_GRADIENT = ("argmax", "ceil", "floor", "round", "sign", "stop_gradient")


def checked(blocks: Any) -> list[_spec.Block]:
    """The argument of `infer_spec`, if it is one."""
    if isinstance(blocks, _spec.Link | str) or not isinstance(blocks, Sequence):
        raise ValueError(
            f"infer_spec: blocks must be a list such as [spec.Block('attend')], but it "
            f"is {kind_of(blocks)}"
        )
    for index, block in enumerate(blocks):
        if not isinstance(block, _spec.Block):
            raise ValueError(
                f"infer_spec: blocks[{index}] must be a spec.Block such as "
                f"spec.Block('attend'), but it is {kind_of(block)}"
            )
    return list(blocks)


def _is_below(path: str | None, module: str | None) -> bool:
    """Whether a path is a module's, or that of something inside."""
    if path is None or module is None:
        return False
    return f"{path}/".startswith(f"{module}/" if module else "")


class Blocks:
    """Which block each value of a graph belongs to.

    A block stands for the smallest stretch with one input and one output that holds
    everything in its module and every use of its parameters. `Block(None)` stands for
    each stretch without parameters that no link describes.
    """

    def __init__(self, blocks: Sequence[_spec.Block], output: Node, params: Any):
        self.blocks = blocks
        self.params = params
        self.used: set[_spec.Block] = set()
        self._block: dict[Node, _spec.Block] = {}
        self._nodes: dict[_spec.Block, set[Node]] = {block: set() for block in blocks}
        for node in graph.above(output) if blocks else ():
            paths = (graph.module_path(node.scope), *node.uses)
            for block in blocks if node.operands and node.flows else ():
                if any(_is_below(path, block.path) for path in paths):
                    self._block.setdefault(node, block)
                    self._nodes[block].add(node)

    def of(self, node: Node) -> _spec.Block | None:
        """The block that a node belongs to."""
        return self._block.get(node)

    def around(self, node: Node) -> _spec.Block | None:
        """The block that a node which no link describes may become part of."""
        inside = set(graph.above(node, until=node.dominator))
        uses = frozenset().union(*(found.uses for found in inside))
        for block in self.blocks:
            if inside & self._nodes[block] or (block.path is None and not uses):
                return block
        return None

    def step(self, node: Node, start: Node, block: _spec.Block) -> Step:
        """The block as a step that ends at a node."""
        nodes, link = self._nodes[block], block
        if not any(_is_below(path, block.path) for path in self.params):
            # Without parameters it may stand in several places.
            nodes, link = _connected(node, nodes), dataclasses.replace(block, path=None)
        source = node
        for found in (node, *nodes):
            assert found.dominator is not None
            source = graph.common_dominator(source, found.dominator)
        while source.dominator and not jnp.issubdtype(source.dtype, jnp.floating):
            if source.op == "input":
                break
            source = source.dominator  # to where derivatives begin
        inside = set(graph.above(node, until=source))
        if source.op == "inputs" or any(found.op == "memory" for found in inside):
            raise Unknown(node, f"{block} has several signals as its input")
        if nodes - inside or source.depth < start.depth:
            raise Unknown(node, f"{block} has several signals as its output", block)
        uses = frozenset().union(*(found.uses for found in inside))
        others = sorted(path for path in uses if not _is_below(path, block.path))
        if others:
            listed = ", ".join(map(repr, others))
            raise Unknown(
                node,
                f"{block} would hold {listed}, too, to have one input and one output",
            )
        self.used.add(block)
        return Step(node, source, [link], opaque=True)


def _connected(node: Node, nodes: set[Node]) -> set[Node]:
    """Those of some nodes that lead to a node through one another."""
    found, queue = {node}, [node]
    for reached in queue:
        new = [operand for operand in reached.flow if operand in nodes - found]
        found.update(new)
        queue += new
    return found & nodes


# --- Their numbers -------------------------------------------------------------------


def is_measured(block: _spec.Block) -> bool:
    """Whether a block lacks none of its numbers."""
    numbers = [block.input_curvature, block.weight_curvature]
    return None not in numbers[: 1 if block.path is None else 2]


def leaves(step: Step) -> list[Node]:
    """The parameters and other variables of a stretch of the graph."""
    return [found for found in graph.above(step.node, until=step.source) if found.path]


def measured(
    block: _spec.Block, step: Step, values: Mapping[Node, Any], compiled: dict[str, Any]
) -> _spec.Block:
    """A block with the numbers that it lacks, from a run of what it stands for.

    The run has the real shapes, a normal signal and random parameters. Signs that are
    pulled back give the mean diagonals of `J^T J`, as in `measure_layer_scales`.

    Args:
      block: the block.
      step: the stretch of the graph that it stands for.
      values: what its parameters and other variables are to be.
      compiled: what was compiled before, to which this run is added.

    Returns:
      The block, with numbers of three digits.

    Raises:
      ValueError: where the derivative is zero or not finite, or there is none.
    """
    if is_measured(block):
        return block
    node, source = step.node, step.source
    if not jnp.issubdtype(node.dtype, jnp.floating):
        raise ValueError(f"infer_spec: {block}: {node.dtype} has no derivative")
    inside = list(graph.above(node, until=source))
    weights = [leaf for leaf in leaves(step) if leaf.op == "param"]
    others = [leaf for leaf in leaves(step) if leaf.op != "param"]
    differentiable = jnp.issubdtype(source.dtype, jnp.floating)

    def numbers(arrays: Any, other_arrays: Any, keys: Any) -> Any:
        def output(arrays: Any, signal: Any) -> Any:
            given = {source: signal} | dict(zip(weights, arrays, strict=True))
            given |= zip(others, other_arrays, strict=True)
            return graph.run([node], given)[0]

        def probe(key: Any) -> Any:
            keys = jax.random.split(key)
            signal = _signal(source, inside, keys[0])
            if differentiable:
                result, pull_back = jax.vjp(output, arrays, signal)
            else:
                result, pull_back = jax.vjp(lambda a: output(a, signal), arrays)
            signs = jax.random.rademacher(keys[1], result.shape, result.dtype)
            return [_mean_square(tree) for tree in (result, *pull_back(signs))]

        return [samples.mean() for samples in jax.lax.map(probe, keys)]

    fewest = min(math.prod(given.shape) for given in (*weights, source))
    probes = min(max(_COORDINATES // max(fewest, 1), 32), 256)
    arguments = (
        [values[leaf] for leaf in weights],
        [values[leaf] for leaf in others],
        jax.random.split(jax.random.key(0), probes),
    )
    # Blocks that are the same but for their names are compiled once.
    traced = jax.make_jaxpr(numbers)(*arguments)
    constants = [np.asarray(constant).tobytes() for constant in traced.consts]
    program = f"{traced} {constants}"
    if program not in compiled:
        compiled[program] = jax.jit(numbers)
    gain, of_weights, *rest = compiled[program](*arguments)
    of_input = rest[0] if differentiable else 1.0
    found: dict[str, Any] = {"input_curvature": of_input}
    if block.path is not None:
        found["weight_curvature"] = of_weights / source.shape[0]
    found = {name: new for name, new in found.items() if getattr(block, name) is None}
    if block.forward_gain == 1.0:
        found["forward_gain"] = gain
    if not of_input and source.op == "input":
        found["input_curvature"] = 1.0  # nothing is below
    rounded = {name: float(f"{float(value):.3g}") for name, value in found.items()}
    for name, value in rounded.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"infer_spec: {block}: its {name} was measured as {value}; give it a "
                "positive number"
            )
    return dataclasses.replace(block, **rounded)  # pyright: ignore


def _signal(source: Node, inside: Sequence[Node], key: Any) -> Any:
    if jnp.issubdtype(source.dtype, jnp.floating):
        signal = jax.random.normal(key, source.shape, source.dtype)
        return signal / jnp.sqrt(_mean_square(signal)).astype(signal.dtype)
    tables = [found.operands[0] for found in inside if found.op == "gather"]
    rows = min((table.shape[0] for table in tables if not table.flows), default=2)
    return jax.random.randint(key, source.shape, 0, rows).astype(source.dtype)


def _mean_square(tree: Any) -> Any:
    """The mean square of all entries."""
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves)
    return jnp.asarray(total / max(sum(leaf.size for leaf in leaves), 1))


# --- Which would help ----------------------------------------------------------------


def that_help(
    unknown: Unknown,
    blocks: Sequence[_spec.Block],
    params: Sequence[str],
    attempt: Callable[[Sequence[_spec.Block]], Sequence[_spec.Block]],
) -> list[_spec.Block]:
    """Blocks with which a model that is not known has a chain; empty for none.

    Args:
      unknown: what is not known.
      blocks: those that were given.
      params: the paths of all parameters.
      attempt: tries some blocks; returns those used, or raises `Unknown` again.

    Returns:
      The smallest blocks that were found to do, one after the other.
    """
    found, seen = list(blocks), set()
    while unknown.node not in seen:
        node = unknown.node
        seen.add(node)
        if node.op in _WITHOUT_GRADIENT or not node.flows:
            break
        for path in _candidates(node, params):
            if any(block.path == path for block in found):
                continue
            kept = [block for block in found if not _is_below(block.path, path)]
            tried = [*kept, _spec.Block(path)]
            try:
                used = attempt(tried)
                return [block for block in tried if block in used]
            except Unknown as after:
                if after.node not in seen:
                    found, unknown = tried, after
                    break
    return []


def _candidates(node: Node, params: Sequence[str]) -> Iterator[str | None]:
    """Paths of blocks that may take a node in, the smallest first."""
    inside = graph.above(node, until=node.dominator)
    uses = sorted(frozenset().union(*(found.uses for found in inside)))
    if not uses:
        yield None
    modules = [path.rpartition("/")[0] for path in uses]
    common = os.path.commonpath(modules) if modules and all(modules) else ""
    around = {path.rpartition("/")[0] for path in params if _is_below(path, common)}
    if len(uses) == 1 and (not common or around != {common}):
        yield uses[0]  # its module holds other modules, too
    for module in (common, graph.module_path(node.scope) or ""):
        while module:
            yield module
            module = module.rpartition("/")[0]
    yield ""
