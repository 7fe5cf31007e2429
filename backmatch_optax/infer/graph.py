"""A traced function as a graph of values.

`read` turns a jaxpr into nodes. Every call is inlined, so it does not matter which
parts of a model are compiled, rematerialised or were traced before. `run` computes
nodes with real arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.source_info_util import summarize

# Primitives that are calls: their body takes the equation's place. A custom_vjp is not:
# its derivative need not be the one of its body.
_CALLS = {"jit", "closed_call", "call", "remat2"}
# Primitives that hand on what they are given.
_ALIASES = {"copy", "device_put", "name", "optimization_barrier"}
_ALIASES |= {"reduce_precision", "reshard", "sharding_constraint"}


@dataclasses.dataclass(eq=False)
class Node:
    """A value of the traced function.

    Attributes:
      op: the primitive that computes it, or what kind of leaf it is.
      operands: what it is computed from.
      jaxpr: what the equation that computes it lies in; None for a leaf.
      eqn: that equation.
      result: which of the equation's results it is.
      shape: its shape.
      dtype: its dtype.
      origins: the kinds of leaves it depends on; `"data"` in place of `"input"` for a
        mask, through which no signal flows.
      scope: the name stack it was traced under.
      source: the line of code it comes from.
      path: of a leaf, its path among the parameters or other variables; of a value
        that is kept, its name.
      value: of a constant, its value if that is the same everywhere.
      array: of a constant all of it, once that is known.
      uses: the paths of the parameters that it is computed from. A value that depends
        on the input tells only those that it meets here.
      dominator: the last value that all paths from the input to it pass through; None
        where the input does not reach it.
      depth: how many dominators there are above.
      parts: of a concatenation, what it is of, another concatenation first; empty where
        these are its operands.
      body: of a scan, what `layer` found.
      recalls: whether all that flows to it is kept from before, see `kept_apart`.
    """

    op: str
    operands: tuple[Node, ...] = ()
    jaxpr: Any = None
    eqn: Any = None
    result: int = 0
    shape: tuple[int, ...] = ()
    dtype: Any = None
    origins: frozenset[str] = frozenset()
    scope: str = ""
    source: str = ""
    path: str = ""
    value: Any = None
    array: Any = None
    uses: frozenset[str] = frozenset()
    dominator: Node | None = None
    depth: int = 0
    parts: tuple[Node, ...] = ()
    body: Node | None = None
    recalls: bool = False

    @property
    def options(self) -> Mapping[str, Any]:
        """The primitive's parameters."""
        return {} if self.eqn is None else self.eqn.params

    @property
    def flows(self) -> bool:
        """Whether it depends on the input."""
        return "input" in self.origins

    @property
    def learned(self) -> bool:
        """Whether it is an input that is a learned array; see `with_inputs`."""
        return self.op == "input" and "param" in self.origins

    @property
    def flow(self) -> tuple[Node, ...]:
        """Those of its operands that depend on the input."""
        operands = self.parts or self.operands
        return tuple(operand for operand in operands if operand.flows)

    def dominators(self) -> Iterator[Node]:
        """The values that all paths to it pass through, nearest first."""
        node = self.dominator
        while node is not None:
            yield node
            node = node.dominator


def leaf(kind: str, path: str, shape: tuple[int, ...], dtype: Any) -> Node:
    """An argument: `"input"`, `"param"`, `"state"` or `"random"`."""
    uses = frozenset({path} if kind == "param" else ())
    origins = frozenset({kind})
    return Node(kind, shape=shape, dtype=dtype, path=path, origins=origins, uses=uses)


def read(closed: Any, arguments: Sequence[Node]) -> list[Node]:
    """The outputs of a closed jaxpr as nodes; inputs get a common dominator."""
    everything = Node("inputs")
    for argument in arguments:
        if argument.flows:
            argument.dominator, argument.depth = everything, 1
    outputs = _read(closed.jaxpr, closed.consts, arguments, "", "", {})
    _regroup_all(outputs)
    return outputs


def _read(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Node],
    scope: str,
    code: str,
    joined: dict[Any, Node],
) -> list[Node]:
    env = dict(zip(jaxpr.invars, arguments, strict=True))
    env |= {
        variable: _constant(value)
        for variable, value in zip(jaxpr.constvars, consts, strict=True)
    }

    def look_up(atom: Any) -> Node:
        literal = isinstance(atom, jex.core.Literal)
        return _constant(atom.val) if literal else env[atom]

    for eqn in jaxpr.eqns:
        op = eqn.primitive.name
        operands = tuple(map(look_up, eqn.invars))
        within = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
        line = _line(eqn) or code
        if op in _CALLS or _is_of_jax(op, eqn):
            body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = getattr(body, "jaxpr", body)
            consts = getattr(body, "consts", ())
            results = _read(inner, consts, operands, within, line, joined)
        elif op == "stack":
            inner = _as_concatenation(eqn)
            results = _read(inner, (), operands, scope, code, joined)
        elif (phases := _phases(op, operands, eqn)) is not None:
            inner, whole = phases
            results = _read(inner, (), [whole], scope, code, joined)
        elif op in _ALIASES or _is_harmless(op, operands, eqn):
            results = operands[: len(eqn.outvars)]
        elif (part := _unstacked(op, operands, eqn.params)) is not None:
            results = [part]
        else:
            results = [
                _node(jaxpr, eqn, index, operands, within, line)
                for index in range(len(eqn.outvars))
            ]
        if op == "concatenate" and results[0].op == op:
            _shorten(results[0], joined)
        env.update(zip(eqn.outvars, results, strict=True))
    return list(map(look_up, jaxpr.outvars))


class Loop(NamedTuple):
    """What a scan is given."""

    shared: tuple[Node, ...]  # the same in each turn
    carried: tuple[Node, ...]
    stacked: tuple[Node, ...]  # an entry for each turn, along the first axis


def loop(node: Node) -> Loop:
    """The operands of a scan by what they are for."""
    inner, outer = _body(node), node.eqn
    # JAX keeps the counts in ways that change; what is stacked has one more axis.
    stacked = _longer(outer.invars, inner.invars)
    carried = len(outer.outvars) - _longer(outer.outvars, inner.outvars)
    last = len(node.operands) - stacked
    first = last - carried
    operands = node.operands
    return Loop(operands[:first], operands[first:last], operands[last:])


def _body(node: Node) -> Any:
    closed = node.options["jaxpr"]
    return getattr(closed, "jaxpr", closed)


def _longer(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(o.aval.ndim > i.aval.ndim for o, i in pairs)


def layer(node: Node) -> Node:
    """What a scan makes of its signal in one of the layers it walks.

    Args:
      node: a result of a scan over the layers of a model: a signal goes in and comes
        out of each, and all else is stacked or the same for all.

    Returns:
      The signal after one layer. It depends on the signal that enters the scan as if
      that entered the layer, and on parameters of the shape that a layer has.
    """
    if node.body is None:
        given = loop(node)
        carried = [_of_a_layer(operand, operand.shape) for operand in given.carried]
        carried[node.result] = given.carried[node.result]
        stacked = [_of_a_layer(operand, operand.shape[1:]) for operand in given.stacked]
        arguments, place = (
            (*given.shared, *carried, *stacked),
            (node.scope, node.source),
        )
        consts = getattr(node.options["jaxpr"], "consts", ())
        node.body = _read(_body(node), consts, arguments, *place, {})[node.result]
        _regroup_all([node.body])
    return node.body


def _of_a_layer(node: Node, shape: tuple[int, ...]) -> Node:
    """A leaf that stands for what each layer is given of a value."""
    if node.path:
        return leaf(node.op, node.path, shape, node.dtype)
    origins = node.origins or frozenset({"array"})
    return Node("array", shape=shape, dtype=node.dtype, origins=origins)


def _shorten(node: Node, joined: dict[Any, Node]) -> None:
    """Puts an earlier concatenation of its first operands in their place.

    So a list that grows, as in a DenseNet, is what was before and one more.
    """
    axis, operands = node.options["dimension"], node.operands
    for count in range(len(operands) - 1, 1, -1):
        found = joined.get((axis, operands[:count]))
        if found is not None:
            node.parts = (found, *operands[count:])
            _find_dominator(node)
            break
    joined[axis, operands] = node


def _is_of_jax(op: str, eqn: Any) -> bool:
    """Whether it is a custom_jvp of JAX's own, as its activations are.

    Those have the derivative of their body; what a user defines need not.
    """
    if op != "custom_jvp_call":
        return False
    origin = eqn.params["call_jaxpr"].jaxpr.debug_info.func_src_info or ""
    return os.path.dirname(jax.__file__) in origin


def _as_concatenation(eqn: Any) -> Any:
    """What stacks arrays, as a concatenation along a new axis, in the same place."""
    axis = eqn.params["axis"]

    def concatenated(*arrays: jax.Array) -> jax.Array:
        expanded = [jax.lax.expand_dims(array, (axis,)) for array in arrays]
        return jax.lax.concatenate(expanded, axis)

    return _traced(concatenated, [variable.aval for variable in eqn.invars], eqn)


def _phases(op: str, operands: Sequence[Node], eqn: Any) -> tuple[Any, Node] | None:
    """Every n-th entry beside the others, as a jaxpr of moves and what it moves.

    So Swin merges patches: `concatenate([x[:, ::2], x[:, 1::2]], -1)` has the same
    values as `x` reshaped, transposed and reshaped. None for anything else.
    """
    if op != "concatenate" or any(part.op != "slice" for part in operands):
        return None
    wholes = {part.operands[0] for part in operands}
    strides = {part.options["strides"] for part in operands}
    if len(wholes) != 1 or len(strides) != 1 or None in strides:
        return None
    (whole,), (steps,), axis = wholes, strides, eqn.params["dimension"]
    strided = [at for at, step in enumerate(steps) if step > 1]
    pairs = [*zip(whole.shape, steps, strict=True)]
    left = tuple(size // step for size, step in pairs)
    even = not any(size % step for size, step in pairs)
    if axis in strided or not even or {part.shape for part in operands} != {left}:
        return None
    starts = [part.options["start_indices"] for part in operands]
    for order in itertools.permutations(strided):
        every = [*np.ndindex(*(steps[at] for at in order))]
        if [tuple(start[at] for at in order) for start in starts] == every:
            break
    else:
        return None
    split = [size for pair in zip(left, steps, strict=True) for size in pair]
    # Of each axis what is left, and before the joined one the phases.
    turned = [2 * at for at in range(len(left))]
    turned[axis:axis] = [2 * at + 1 for at in order]
    turned += [2 * at + 1 for at in range(len(left)) if at not in order]

    def moved(x: jax.Array) -> jax.Array:
        return x.reshape(split).transpose(turned).reshape(eqn.outvars[0].aval.shape)

    return _traced(moved, [whole], eqn), whole


def _traced(function: Any, arguments: Sequence[Any], eqn: Any) -> Any:
    """The jaxpr of what does the same as an equation, in the same place of the code."""
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arguments]
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    eqns = [inner.replace(source_info=eqn.source_info) for inner in jaxpr.eqns]
    return jaxpr.replace(eqns=eqns)


def _line(eqn: Any) -> str:
    """Where in the code an equation comes from; empty inside of JAX's own functions."""
    text = summarize(eqn.source_info)
    return text if ":" in text else ""


def _is_harmless(op: str, operands: Sequence[Node], eqn: Any) -> bool:
    if op == "psum":  # over named axes, which are traced with one device each
        return all(isinstance(axis, str) for axis in eqn.params["axes"])
    if op == "stop_gradient":  # of what no signal flows through
        return not operands[0].flows
    if op == "div":
        return operands[1].value == 1 and operands[0].shape == eqn.outvars[0].aval.shape
    if op != "convert_element_type":
        return False
    kinds = [np.dtype(operands[0].dtype).kind, np.dtype(eqn.params["new_dtype"]).kind]
    # To an integer it rounds; bfloat16 and its like are of kind V to NumPy.
    return kinds[1] not in "iub" or kinds[0] in "iub"


def _unstacked(
    op: str, operands: Sequence[Node], options: Mapping[str, Any]
) -> Node | None:
    """What was stacked before, as Flax stacks statistics to average them at once."""
    taken = operands[0] if op == "squeeze" else None
    stack = taken.operands[0] if taken is not None and taken.op == "slice" else None
    if taken is None or stack is None or stack.op != "concatenate":
        return None
    axis, index = stack.options["dimension"], taken.options["start_indices"]
    one = (*stack.shape[:axis], 1, *stack.shape[axis + 1 :])
    shapes = {taken.shape, *(part.shape for part in stack.operands)}
    if tuple(options["dimensions"]) != (axis,) or shapes != {one}:
        return None
    part = stack.operands[index[axis]]
    if part.op not in ("broadcast_in_dim", "reshape"):
        return None
    (entry,) = part.operands
    return entry if entry.shape == (*one[:axis], *one[axis + 1 :]) else None


def _node(
    jaxpr: Any,
    eqn: Any,
    result: int,
    operands: tuple[Node, ...],
    scope: str,
    source: str,
) -> Node:
    op, aval = eqn.primitive.name, eqn.outvars[result].aval
    origins = frozenset().union(*(operand.origins for operand in operands))
    if op.startswith(("random_", "rng_", "threefry")):
        origins = frozenset({"random"})  # whatever key and counter it comes from
    elif op == "iota":
        origins |= {"array"}
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    flowing = [operand.dtype for operand in operands if operand.flows]
    if np.dtype(bool) == dtype and not any(
        jnp.issubdtype(d, jnp.floating) for d in flowing
    ):
        # A mask made of tokens. What a comparison of floats chooses stays a part of
        # the function of these, as in a ReLU.
        origins = frozenset({"data"}) | origins - {"input"} if flowing else origins
    place = (jaxpr, eqn, result)
    node = Node(op, operands, *place, shape, dtype, origins, scope, source)
    node.uses = frozenset().union(*(o.uses for o in operands if not o.flows))
    if node.flow:
        _find_dominator(node)
    return node


def _regroup_all(outputs: Sequence[Node]) -> None:
    """Adds first those terms of each sum that have most of their way in common.

    So `(x + a(h)) + b(h)`, where `h` is made of `x`, is `x + (a(h) + b(h))`. What is
    read elsewhere, too, stays one term.
    """
    order = _in_order(Node("outputs", tuple(outputs)))
    readers = collections.Counter(read for node in order for read in node.flow)
    for node in order:
        if _is_sum(node):
            _regroup(node, readers)


def _is_sum(node: Node) -> bool:
    return node.op in ("add", "add_any") and len(node.flow) == 2


def _regroup(node: Node, readers: Mapping[Node, int]) -> None:
    terms = _terms(node, readers)
    pairs = itertools.combinations(range(len(terms)), 2)
    shared = {(i, j): common_dominator(terms[i], terms[j]) for i, j in pairs}
    best = max(shared, key=lambda pair: shared[pair].depth)
    if shared[best] is node.dominator:
        return

    def added(*terms: Node) -> Node:
        both = dataclasses.replace(node, operands=terms)
        _find_dominator(both)
        _regroup(both, readers)
        return both

    others = [term for place, term in enumerate(terms) if place not in best]
    both = added(*(terms[place] for place in best))
    node.operands = (functools.reduce(added, others), both)
    _regroup(node, readers)


def _terms(whole: Node, readers: Mapping[Node, int]) -> list[Node]:
    """What a sum adds up, with the terms of its terms that begin where it does."""
    terms, pending = [], [*whole.flow]
    while pending:
        term = pending.pop()
        inside = _is_sum(term) and term.dominator is whole.dominator
        if inside and readers.get(term, 1) == 1:  # those made by `_regroup` have none
            pending += term.flow
        else:
            terms.append(term)
    return terms[::-1]


def _find_dominator(node: Node) -> None:
    dominator = common_dominators(node.flow)
    node.dominator, node.depth = dominator, dominator.depth + 1


def common_dominator(a: Node, b: Node) -> Node:
    """The last value that all paths to either of two nodes pass through."""
    while a is not b:
        if a.depth < b.depth:
            a, b = b, a
        assert a.dominator is not None
        a = a.dominator
    return a


def common_dominators(nodes: Sequence[Node]) -> Node:
    """That of several; of those that only recall only where there are no others."""
    own = [node for node in nodes if not node.recalls]
    return functools.reduce(common_dominator, own or nodes)


def memories(output: Node, raw: bool = False) -> Iterator[Node]:
    """What may be an encoder's output, read at several places where other inputs flow.

    Each is the last value that all ways of some inputs to those of others pass through,
    with more than one use above, and with parameters below it.

    Args:
      output: the end of the graph.
      raw: whether an input may be one as it is, with nothing learned below.
    """
    order = _in_order(output)
    reached: dict[Node, frozenset[Node]] = {}
    for node in order:
        below = (reached[operand] for operand in node.flow)
        own = {node} if node.op == "input" else ()
        reached[node] = frozenset(own).union(*below)
    for inputs in dict.fromkeys(reached.values()):
        border = {
            operand
            for node in order
            for operand in node.flow
            if reached[node] > reached[operand] == inputs
        }
        if not border:
            continue
        found = functools.reduce(common_dominator, border)
        uses = [node for node in order if found in node.flow]
        learned = found.operands and any(node.uses for node in above(found))
        if len(uses) > 1 and (learned or raw):
            yield found


def kept_apart(output: Node, kept: Node) -> tuple[Node, Node]:
    """The graph above a value that is kept, as if that were given.

    Args:
      output: the end of the graph.
      kept: the value.

    Returns:
      The end, and what stands for the value: no dominator, so that what it flows to
      besides others is dominated by those.
    """
    *_, everything = kept.dominators()
    given = dataclasses.replace(kept, op="memory", operands=(), parts=(), eqn=None)
    given.recalls, given.dominator, given.depth = True, everything, 1
    copies = {kept: given}
    for node in _in_order(output):
        changed = any(operand in copies for operand in node.operands)
        if node in copies or not changed:
            continue
        new = copies[node] = _copied(node, copies)
        if new.flow:
            new.recalls = all(operand.recalls for operand in new.flow)
            _find_dominator(new)
    return copies[output], given


def with_inputs(output: Node, arrays: Collection[Node]) -> Node:
    """The graph with some nodes that only move a parameter as inputs of their own.

    Args:
      output: the end of the graph.
      arrays: those nodes. What stands for them has their parameter's path and origin.

    Returns:
      The end.
    """
    *_, everything = output.dominators()
    copies: dict[Node, Node] = {}
    for node in _in_order(output, flowing=False):
        if node in arrays:
            (path,) = node.uses
            new = leaf("input", path, node.shape, node.dtype)
            new.origins |= {"param"}
            new.dominator, new.depth = everything, 1
        elif any(operand in copies for operand in node.operands):
            new = _copied(node, copies)
            new.origins = node.origins | {"input"}
            new.uses = frozenset().union(*(o.uses for o in new.operands if not o.flows))
            _find_dominator(new)
        else:
            continue
        copies[node] = new
    _regroup_all([copies[output]])
    return copies[output]


def _copied(node: Node, copies: Mapping[Node, Node]) -> Node:
    """A node, made of the copies of its operands."""
    return dataclasses.replace(
        node,
        operands=tuple(copies.get(x, x) for x in node.operands),
        parts=tuple(copies.get(x, x) for x in node.parts),
        body=None,
    )


def _in_order(output: Node, flowing: bool = True) -> list[Node]:
    """The nodes that a signal flows through, each behind those it is computed from.

    All nodes, where not only these are asked for.
    """
    found: dict[Node, None] = {}
    pending = [output]
    while pending:
        node = pending[-1]
        operands = node.flow if flowing else node.operands
        missing = [operand for operand in operands if operand not in found]
        if node in found or not missing:
            found[pending.pop()] = None
        else:
            pending += missing
    return [*found]


def _constant(value: Any) -> Node:
    shape = np.shape(value)
    dtype = value.dtype if hasattr(value, "dtype") else np.result_type(type(value))
    node = Node("constant", shape=shape, dtype=dtype, array=value)
    if not isinstance(dtype, np.dtype):  # a random key
        node.origins = frozenset({"random"})
        return node
    array = np.asarray(value)
    if array.size == 1 or (array.size and (array == array.flat[0]).all()):
        node.value = array.flat[0]
    else:
        node.origins = frozenset({"array"})
    return node


def above(*nodes: Node, until: Node | None = None) -> Iterator[Node]:
    """The nodes and what they depend on, breadth first; not beyond a dominator."""
    seen, queue = {until, *nodes}, [*nodes]
    for found in queue:
        yield found
        new = [op for op in dict.fromkeys(found.operands) if op not in seen]
        seen.update(new)
        queue += new


def inputs(*nodes: Node) -> list[Node]:
    """The inputs that a signal flows from to some nodes."""
    seen, queue = {*nodes}, [*nodes]
    for found in queue:
        new = [op for op in dict.fromkeys(found.flow) if op not in seen]
        seen.update(new)
        queue += new
    return [found for found in queue if found.op == "input"]


@functools.cache
def module_path(scope: str) -> str | None:
    """The path of the module that a name stack belongs to, None where it tells none."""
    parts = [part for part in scope.split("/") if part and "(" not in part]
    named = [part for part in parts if part.startswith("@")]
    if named:
        return named[-1][1:].replace(".", "/")
    names: list[str] = []
    for part in parts[1:]:  # the first is the class of the whole model
        name = part.partition(".")[0]  # Linen appends the method, if not __call__
        if name.isidentifier() and (name == part or names[-1:] != [name]):
            names.append(name)
    return "/".join(names) if parts else None


def run(ends: Sequence[Node], values: Mapping[Node, Any]) -> list[Any]:
    """Computes some nodes from the values of others that they depend on."""
    values, pending = dict(values), [*ends]
    while pending:  # no recursion: a piece may be a thousand nodes deep
        node = pending[-1]
        missing = [operand for operand in node.operands if operand not in values]
        if node in values or not missing:
            pending.pop()
            if node not in values:
                values[node] = _result(node, values)
        else:
            pending += missing
    return [values[end] for end in ends]


def _result(node: Node, values: Mapping[Node, Any]) -> Any:
    eqn = node.eqn
    if eqn is None:
        return node.array
    arguments = {}
    for variable, operand in zip(eqn.invars, node.operands, strict=True):
        if not isinstance(variable, jex.core.Literal):
            value = jnp.asarray(values[operand])
            # A conversion between floats is left out of the graph.
            same = value.dtype == variable.aval.dtype
            arguments[variable] = value if same else value.astype(variable.aval.dtype)
    alone = node.jaxpr.replace(
        constvars=[],
        invars=[*arguments],
        outvars=[eqn.outvars[node.result]],
        eqns=[eqn],
        effects=eqn.effects,
    )
    closed = jex.core.ClosedJaxpr(alone, ())  # pyright: ignore
    return jex.core.jaxpr_as_fun(closed)(*arguments.values())[0]
