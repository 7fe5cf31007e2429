"""A traced function as a graph of values, and what a piece of that graph computes.

`read` turns a jaxpr into nodes. Every call is inlined, so it does not matter which
parts of a model are compiled, rematerialised or were traced before. `evaluate` puts a
few sample values through an elementwise or normalising piece: a piece is known by what
it computes, not by how it is written. `run` computes nodes with real arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.source_info_util import summarize

# Primitives that are calls: their body takes the equation's place. A custom_vjp is not:
# its derivative need not be the one of its body.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "call"}
_CALLS |= {"remat", "remat2", "checkpoint"}
# Primitives that hand on what they are given.
_ALIASES = {"copy", "copy_p", "device_put", "name", "optimization_barrier"}
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
      path: of a leaf, its path among the parameters or other variables.
      value: of a constant, its value if that is the same everywhere.
      array: of a constant, all of it.
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
    return _read(closed.jaxpr, closed.consts, arguments, "", "", {})


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
        elif op in _ALIASES or _is_harmless(op, operands, eqn):
            results = operands[: len(eqn.outvars)]
        elif (part := _unstacked(op, operands, eqn.params)) is not None:
            results = [part]
        else:
            results = [
                _node(jaxpr, eqn, index, operands, within, line)
                for index in range(len(eqn.outvars))
            ]
        if op == "concatenate":
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


def _line(eqn: Any) -> str:
    """Where in the code an equation comes from; empty inside of JAX's own functions."""
    text = summarize(eqn.source_info)
    return text if ":" in text else ""


def _is_harmless(op: str, operands: Sequence[Node], eqn: Any) -> bool:
    if op == "psum":  # over named axes, which are traced with one device each
        return all(isinstance(axis, str) for axis in eqn.params["axes"])
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
    if taken is None or stack is None or stack.op != "stack":
        return None
    axis, index = stack.options["axis"], taken.options["start_indices"]
    one = (*stack.shape[:axis], 1, *stack.shape[axis + 1 :])
    if tuple(options["dimensions"]) != (axis,) or taken.shape != one:
        return None
    return stack.operands[index[axis]]


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


def memory(output: Node) -> Node | None:
    """The output of an encoder, read at several places where other inputs flow.

    Returns:
      The last value that all of one input's ways to the other inputs' pass through,
      with parameters below it and more than one use above; None where there is none.
    """
    order = _in_order(output)
    reached: dict[Node, frozenset[Node]] = {}
    for node in order:
        below = (reached[operand] for operand in node.flow)
        own = {node} if node.op == "input" else ()
        reached[node] = frozenset(own).union(*below)
    for begin in [node for node in order if node.op == "input"]:
        border = {
            operand
            for node in order
            for operand in node.flow
            if reached[node] > reached[operand] == {begin}
        }
        found = functools.reduce(common_dominator, border) if border else begin
        uses = [node for node in order if found in node.flow]
        learned = any(node.uses for node in above(found))
        if found.operands and len(uses) > 1 and learned:
            return found
    return None


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
        new = dataclasses.replace(
            node,
            operands=tuple(copies.get(x, x) for x in node.operands),
            parts=tuple(copies.get(x, x) for x in node.parts),
        )
        copies[node] = new
        if new.flow:
            new.recalls = all(operand.recalls for operand in new.flow)
            _find_dominator(new)
    return copies[output], given


def _in_order(output: Node) -> list[Node]:
    """The nodes that a signal flows through, each behind those it is computed from."""
    found: dict[Node, None] = {}
    pending = [output]
    while pending:
        node = pending[-1]
        missing = [operand for operand in node.flow if operand not in found]
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


# --- What a piece of the graph computes ----------------------------------------------

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.logical_and,
    "cbrt": np.cbrt,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "convert_element_type": np.trunc,  # only those that round are left
    "cos": np.cos,
    "div": np.divide,
    "eq": np.equal,
    "erf": np.vectorize(math.erf, otypes=[float]),
    "erfc": np.vectorize(math.erfc, otypes=[float]),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.logical_not,
    "or": np.logical_or,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: np.choose(np.asarray(which, int), cases),
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tanh": np.tanh,
}

# What stands for a signal, one population in each row: the range where activations
# bend, and large values, so that the epsilon of a normalisation does not matter. Two
# populations, as one statistic looks like another where there is only one.
_BENDING = np.linspace(-9.0, 10.0, 78)
SIGNAL = np.stack(
    [
        np.concatenate([_BENDING, [-41.0, 37.0, 300.0, 450.0]]),
        np.concatenate([_BENDING[::-1] + 1 / 3, [-200.0, 90.0, 110.0, 350.0]]),
    ]
)
MASK = np.arange(SIGNAL.shape[1]) % 3 != 0

# An axis as the factors of original axes that it is made of: (axis, size of all that is
# inside of the factor, size). Axis -1 stands for values repeated along an axis.
Factor = tuple[int, int, int]
Axis = tuple[Factor, ...]


class Unmatched(Exception):
    """A piece that cannot be evaluated, because of one of its nodes."""

    def __init__(self, node: Node):
        super().__init__(node.op)
        self.node = node


@dataclasses.dataclass
class _Sampled:
    values: Any
    axes: tuple[Axis, ...]
    reduced: frozenset[Factor] = frozenset()


@dataclasses.dataclass
class Piece:
    """What the part of the graph between two nodes makes of a signal.

    Attributes:
      signal: the samples.
      values: the outcome, in the shape of the signal: all of the graph's axes are the
        axis of samples, and there is one row for each population.
      reduced: the factors of the input's axes that statistics are taken over.
      leaves: the values that stand for parameters and other variables, by path.
      paths: the paths of the leaves by kind, `"param"` and `"state"`.
      masks: the random bits, which `MASK` stands for.
    """

    signal: Any
    values: Any = None
    reduced: frozenset[Factor] = frozenset()
    leaves: dict[str, Any] = dataclasses.field(default_factory=dict)
    paths: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: {"param": [], "state": []}
    )
    masks: list[Node] = dataclasses.field(default_factory=list)


def evaluate(end: Node, start: Node, signal: Any = SIGNAL) -> Piece:
    """Evaluates what lies between a node and one of its dominators.

    The population that statistics are taken over and the features are both the axis of
    samples: a reduction is a mean over it, times the true count. Which axes that would
    be is followed beside the values.

    Args:
      end: the node.
      start: the dominator.
      signal: the samples, two populations of them.

    Returns:
      What the piece makes of the samples.

    Raises:
      Unmatched: where something in between is neither elementwise nor a statistic that
        is put back where it was taken from.
    """
    rng = np.random.default_rng(0)
    piece, size = Piece(signal), np.var(signal) / np.var(SIGNAL)
    whole = tuple(((axis, 1, length),) for axis, length in enumerate(start.shape))
    known = {start: _Sampled(piece.signal, whole)}

    def variable(node: Node) -> _Sampled:
        if node.path not in piece.leaves:
            # Positive, as a variance is, and far above any epsilon.
            values = rng.uniform(0.5, 2.0, signal.shape[1])
            piece.leaves[node.path] = (
                values if node.op == "param" else values * 1e3 * size
            )
            piece.paths[node.op].append(node.path)
        axes = [_repeated(size) for size in node.shape]
        # A parameter's last axis is that of the features; a single one fits any axis.
        if axes and start.shape and 1 < node.shape[-1] == start.shape[-1]:
            axes[-1] = whole[-1]
        return _Sampled(piece.leaves[node.path], tuple(axes))

    def sample(node: Node) -> _Sampled:
        if node not in known:
            if node.op in ("param", "state"):
                known[node] = variable(node)
            elif node.op == "constant" and node.value is not None:
                axes = tuple(map(_repeated, node.shape))
                known[node] = _Sampled(np.float64(node.value), axes)
            elif start.flows and node.origins == {"random"} and node.dtype == bool:
                piece.masks.append(node)
                known[node] = _Sampled(MASK, tuple(map(_repeated, node.shape)))
            elif not node.operands or node.op in ("inputs", "input"):
                raise Unmatched(node)
            else:
                rule = _elementwise if node.op in _ELEMENTWISE else _SHAPED.get(node.op)
                if rule is None:
                    raise Unmatched(node)
                known[node] = rule(node, [sample(operand) for operand in node.operands])
        return known[node]

    with np.errstate(all="ignore"):
        result = sample(end)
    if end.shape != start.shape:
        raise Unmatched(end)
    _unify(end, result.axes, whole)
    piece.values = np.broadcast_to(result.values, piece.signal.shape)
    piece.reduced = result.reduced
    return piece


def _elementwise(node: Node, operands: list[_Sampled]) -> _Sampled:
    axes = tuple(map(_repeated, node.shape))
    statistics = {operand.reduced for operand in operands if operand.reduced}
    if len(statistics) > 1:
        raise Unmatched(node)  # statistics over different axes
    for operand in operands:
        if operand.axes:  # a scalar literal goes with every shape
            axes = _unify(node, axes, operand.axes)
    values = _ELEMENTWISE[node.op](*(operand.values for operand in operands))
    return _Sampled(values, axes, next(iter(statistics), frozenset()))


def _integer_pow(node: Node, operands: list[_Sampled]) -> _Sampled:
    (x,) = operands
    return dataclasses.replace(x, values=x.values ** float(node.options["y"]))


def _reduce_sum(node: Node, operands: list[_Sampled]) -> _Sampled:
    (x,) = operands
    over = node.options["axes"]
    count = math.prod(node.operands[0].shape[axis] for axis in over)
    reduced = x.reduced.union(
        *([factor for factor in x.axes[axis] if factor[0] >= 0] for axis in over)
    )
    axes = tuple(axis for index, axis in enumerate(x.axes) if index not in over)
    mean = np.mean(x.values, axis=-1, keepdims=True) if np.ndim(x.values) else x.values
    return _Sampled(mean * count, axes, reduced)


def moved(node: Node, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """Where the axes of its operand are in a transpose, reshape, squeeze or repeat.

    Args:
      node: a node of one of `MOVES`.
      axes: those of its operand.

    Returns:
      Those of the node.

    Raises:
      Unmatched: where a reshape cuts an axis in a way that is no product.
    """
    options, sizes = node.options, node.operands[0].shape
    if node.op == "broadcast_in_dim":
        found = [_repeated(size) for size in node.shape]
        for index, target in enumerate(options["broadcast_dimensions"]):
            if sizes[index] == node.shape[target]:
                found[target] = axes[index]
        return tuple(found)
    if node.op == "squeeze":
        gone = {axis % len(sizes) for axis in options["dimensions"]}
        return tuple(axis for index, axis in enumerate(axes) if index not in gone)
    if node.op == "transpose":
        return tuple(axes[axis] for axis in options["permutation"])
    if node.op == "tile":
        pairs = zip(axes, options["reps"], strict=True)
        return tuple((*_repeated(int(count)), *axis) for axis, count in pairs)
    return reshaped(node, axes, node.shape)


def reshaped(
    node: Node, axes: Sequence[Axis], shape: Sequence[int]
) -> tuple[Axis, ...]:
    """The axes after a reshape; `Unmatched`, with the node, where there are none."""
    queue = [factor for axis in axes for factor in axis]
    found = []
    for size in shape:
        axis: list[Factor] = []
        while size > 1 or (queue and queue[0][2] == 1 and not axis):
            if not queue:
                raise Unmatched(node)
            factor = queue.pop(0)
            outer, inner = _split(node, factor, size)
            axis.append(outer)
            if inner is not None:
                queue.insert(0, inner)
            size //= outer[2]
        found.append(tuple(axis))
    return tuple(found)


def _moved(node: Node, operands: list[_Sampled]) -> _Sampled:
    return dataclasses.replace(operands[0], axes=moved(node, operands[0].axes))


# What only puts values elsewhere.
MOVES = ("broadcast_in_dim", "reshape", "squeeze", "tile", "transpose")

_SHAPED: dict[str, Callable[[Node, list[_Sampled]], _Sampled]] = {
    "integer_pow": _integer_pow,
    "reduce_sum": _reduce_sum,
} | dict.fromkeys(MOVES, _moved)


Entries = Callable[[Sequence[Any]], Any]


def entries(
    node: Node, index: Sequence[Any], known: Mapping[Node, Entries] = {}
) -> Any:
    """Entries of a value that no parameter and no signal reaches, such as a mask.

    Args:
      node: the value. What of it depends on the input is as for an input of ones.
      index: for each axis of it, an array of indices; they go together as in NumPy.
      known: other values, as functions that give their entries.

    Returns:
      The entries. Nothing else of the value is computed.

    Raises:
      Unmatched: where it depends on something else, or is computed in another way.
    """
    options, operands = node.options, node.operands
    if node in known:
        return known[node](index)
    if node.op == "input":
        return np.ones(())
    if node.op == "constant":
        return np.asarray(node.array)[tuple(index)]
    if node.op == "iota":
        return index[options["dimension"]]
    if node.op in _ELEMENTWISE:
        values = [entries(x, _repeating(x.shape, index), known) for x in operands]
        return _ELEMENTWISE[node.op](*values)
    if not operands:
        raise Unmatched(node)
    (x, *_), shape = operands, node.shape
    if node.op == "integer_pow":
        return entries(x, index, known) ** float(options["y"])
    if node.op == "broadcast_in_dim":
        taken = [index[axis] for axis in options["broadcast_dimensions"]]
        return entries(x, _repeating(x.shape, taken), known)
    if node.op == "squeeze":
        taken = list(index)
        for axis in sorted(axis % len(x.shape) for axis in options["dimensions"]):
            taken.insert(axis, 0)
        return entries(x, taken, known)
    if node.op == "transpose":
        order = options["permutation"]
        return entries(
            x, [index[order.index(axis)] for axis in range(len(order))], known
        )
    if node.op == "reshape":
        if not x.shape:
            return entries(x, (), known)
        together: Any = np.broadcast_arrays(*index)
        places = np.ravel_multi_index(together, shape) if shape else 0
        return entries(x, np.unravel_index(places, x.shape), known)
    if node.op == "split":
        before = sum(int(size) for size in options["sizes"][: node.result])
        taken = list(index)
        taken[options["axis"]] = taken[options["axis"]] + before
        return entries(x, taken, known)
    if node.op == "slice":
        steps = options["strides"] or (1,) * len(shape)
        ranges = zip(index, options["start_indices"], steps, strict=True)
        return entries(x, [at * step + start for at, start, step in ranges], known)
    if node.op == "reduce_sum":
        over = options["axes"]
        taken = [np.asarray(at)[(..., *(None,) * len(over))] for at in index]
        for axis in sorted(over):
            places = [-1 if axis == other else 1 for other in sorted(over)]
            taken.insert(axis, np.arange(x.shape[axis]).reshape(places))
        values = np.asarray(entries(x, taken, known))
        return values.sum(axis=tuple(range(-len(over), 0)))
    if node.op == "concatenate":
        axis, first = options["dimension"], 0
        values: Any = 0.0
        for part in operands:
            at = index[axis] - first
            inside = (at >= 0) & (at < part.shape[axis])
            taken = [*index[:axis], np.where(inside, at, 0), *index[axis + 1 :]]
            values = np.where(inside, entries(part, taken, known), values)
            first += part.shape[axis]
        return values
    raise Unmatched(node)


def _repeating(shape: Sequence[int], index: Sequence[Any]) -> list[Any]:
    """The index of what is repeated along its axes of length 1, or has no axes."""
    pairs = zip(shape, index if shape else (), strict=True)
    return [0 if size == 1 else at for size, at in pairs]


def _repeated(size: int) -> Axis:
    return ((-1, 1, size),) if size > 1 else ()


def _split(node: Node, factor: Factor, size: int) -> tuple[Factor, Factor | None]:
    """A factor as an outer one of at most the given size, and the rest within."""
    axis, within, whole = factor
    if whole <= size:
        if size % whole:
            raise Unmatched(node)
        return factor, None
    if whole % size:
        raise Unmatched(node)
    rest = whole // size
    return (axis, within * rest, size), (axis, within, rest)


def _unify(
    node: Node, first: Sequence[Axis], second: Sequence[Axis]
) -> tuple[Axis, ...]:
    """The axes of an elementwise combination; repeated values fit any axis."""
    if len(first) != len(second):
        raise Unmatched(node)
    return tuple(_unify_axis(node, *pair) for pair in zip(first, second, strict=True))


def _unify_axis(node: Node, first: Axis, second: Axis) -> Axis:
    if first == second or not second or all(axis < 0 for axis, _, _ in second):
        return first or second
    if not first or all(axis < 0 for axis, _, _ in first):
        return second
    left, right = list(first), list(second)
    unified: list[Factor] = []
    while left and right:
        a, b = left.pop(0), right.pop(0)
        size = min(a[2], b[2])
        (a, a_rest), (b, b_rest) = _split(node, a, size), _split(node, b, size)
        left[:0] = [a_rest] if a_rest else []
        right[:0] = [b_rest] if b_rest else []
        if a != b and min(a[0], b[0]) >= 0:
            raise Unmatched(node)
        unified.append(max(a, b))  # axis -1, repeated values, comes before all others
    if left or right:
        raise Unmatched(node)
    return tuple(unified)


def known(node: Node) -> bool:
    """Whether a node is of a kind that pieces can consist of."""
    return node.op in _ELEMENTWISE or node.op in _SHAPED
