"""The layer chain of a Flax model, read off one abstract trace.

The trace becomes a graph (`graph`). The graph is cut into steps (`steps`), and the
steps become links (`build`). What each kind of layer looks like is in `links`, a module
for each; `pieces` says what a piece of the graph computes, and `layout` where its axes
are. `blocks` has the user's own. Here are the traces themselves, and what to do where
one has no chain.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import tree_leaves_with_path

from backmatch_optax import spec as _spec
from backmatch_optax.infer import blocks as _blocks
from backmatch_optax.infer import graph, pieces
from backmatch_optax.infer.graph import Node, above, module_path
from backmatch_optax.infer.links.learned import repeated
from backmatch_optax.infer.step import Step, Unknown
from backmatch_optax.infer.steps import chain
from backmatch_optax.parameters import join, text
from backmatch_optax.spec.link import kind_of


def infer_spec(
    model: Any,
    *inputs: Any,
    method: Callable[..., Any] | str | None = None,
    rngs: Mapping[str, Any] | None = None,
    mutable: Any = None,
    axis_names: Sequence[str] = (),
    blocks: Sequence[_spec.Block] = (),
    **kwargs: Any,
) -> _spec.LayerChain:
    """The layer chain of a Flax model, from one abstract trace.

    Nothing is computed and nothing allocated, but for the numbers of `blocks`. What
    flows from the model's input to its output is recognised by what it does, however it
    is written: as modules or functions, in any order and nesting, inside `jax.jit`,
    `jax.checkpoint` and their Flax counterparts or not. The result is an ordinary
    `spec.LayerChain`; its `repr` is code to paste, edit and keep.

    The chain begins behind what only prepares the input: a transpose, a reshape that
    adds the axis of the features, a shift and division by constants.

    Train and eval mode give the same chain but for `spec.Dropout`, which leaves no
    trace in eval mode. What cannot be told apart by what it computes gets one name:
    `silu` for `swish`, `elu` for `celu`, `Conv` for a `ConvTranspose` of stride 1,
    `"SAME"` for a padding of 1 around a 3x3 kernel of stride 1. Of a residual's two
    arms the one with more links is the branch, the first where they have as many.

    Attention is a softmax between two matrix products. Its mask says whether it is
    causal, or how many positions are met; a mask of padding counts as full. A parameter
    that is used twice is `Tied` at its second use. Several outputs end in `Outputs`, of
    weight 1 each; `method` chooses one. The first input is the chain's own, others are
    `Input`s; a learned array in the place of one is `Queries`. A `Reshape` or
    `Transpose` stands only where a later link needs it.

    Rules that are approximate stay so: scales of a class token or below upsampling may
    be off by more than a factor of 2, as `compare_scales` shows and `describe` says.

    Where no link describes something, the error names `blocks=` that were tried and do.
    A model may also add `h` and `relu(h)`, or multiply them: two signals that
    correlate. `Residual` and `Gate` take their arms as unrelated, so these are refused
    unless a kernel is in between.

    Args:
      model: a `flax.linen.Module`, not bound, or a `flax.nnx.Module`, concrete or made
        by `nnx.eval_shape`.
      inputs: what the model is called with, batch dimension included: arrays or
        `jax.ShapeDtypeStruct`s.
      method: the method to call instead of `__call__`, or a function of the model and
        the inputs, such as `lambda model, x: model(x)[0]` to choose one of several
        outputs.
      rngs: Linen only: random keys by stream, as for `Module.apply`. Not needed for
        dropout.
      mutable: Linen only: which collections the model may write, as for
        `Module.apply`; None for all but the parameters.
      axis_names: names of device axes that the model averages over, as
        `BatchNorm(axis_name="batch")` does in training.
      blocks: what is to be a `spec.Block`. `spec.Block(path)` stands for the module at
        a path, or for the uses of a single parameter. It grows until it has one input
        and one output: from the first call of the module to the last.
        `spec.Block(None)` stands for every stretch without parameters that no link
        describes. Numbers that are not given are measured: that part of the model runs,
        with normal inputs of the shapes given here and with initial parameters.
      kwargs: other arguments of the model, such as `train=False`.

    Returns:
      The chain, whose `input_shape` is that of the input without its batch dimension.

    Raises:
      ValueError: where something between input and output is described by no link
        (recurrence, a scan, experts, a derivative of the user's own, a parameter that
        is transformed before use), or signals meet in a way that arms side by side
        cannot. The message names the module, the operation, its line of code, and what
        to pass instead.
      ImportError: where Flax is not installed.

    Examples:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
      >>> bmo.infer_spec(model, jax.ShapeDtypeStruct((32, 64), jnp.float32))
      spec.LayerChain(
          [
              spec.Dense('layers_0'),
              spec.Activation('relu'),
              spec.Dense('layers_2'),
          ],
          input_shape=(64,),
      )
    """
    try:
        import flax.linen
        import flax.nnx
    except ImportError as error:
        raise ImportError(
            "infer_spec reads Flax models and needs Flax: pip install flax"
        ) from error
    blocks = _blocks.checked(blocks)
    if isinstance(model, flax.linen.Module):
        tracer = _linen(model, method, rngs, mutable)
    elif isinstance(model, flax.nnx.Module):
        if rngs is not None or mutable is not None:
            raise ValueError("infer_spec: rngs and mutable are for Linen modules only")
        tracer = _nnx(model, method)
    else:
        raise ValueError(
            "infer_spec: model must be a flax.linen.Module or a flax.nnx.Module, but "
            f"it is {kind_of(model)}{_instead(model)}"
        )
    _check_inputs(inputs, kwargs)
    # What is not an array, such as train=True, is part of the program.
    passed, tree = jax.tree.flatten((inputs, kwargs))
    arrays = {
        index: jax.eval_shape(lambda leaf: leaf, leaf)  # with a dtype that JAX has
        for index, leaf in enumerate(passed)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }

    def arguments(values: Mapping[int, Any]) -> tuple[Any, Any]:
        filled = [values.get(index, leaf) for index, leaf in enumerate(passed)]
        return jax.tree.unflatten(tree, filled)

    def trace(arrays: Mapping[int, Any]) -> Any:
        function, variables, initial = tracer(arguments, arrays)
        make = jax.make_jaxpr(function, axis_env=[(name, 1) for name in axis_names])
        return make(variables, arrays), variables, initial

    try:
        closed, variables, initial = trace(arrays)
    except Exception as error:
        if isinstance(error, NameError) and "axis name" in str(error):
            raise ValueError(
                f"infer_spec: the model averages over devices ({error}); name the axes "
                'it does so over, as in axis_names=["batch"], or pass it in eval mode'
            ) from None
        _check_batch(trace, arrays, error)
        raise
    given = _arguments(variables, arrays)
    params = {path: leaf.shape for path, leaf in _by_path(variables["param"]).items()}
    ends = [node for node in graph.read(closed, given) if node.flows]
    output = _one_end([*dict.fromkeys(ends)])
    unmeasured: list[Step] = []

    def collect(block: _spec.Block, step: Step) -> _spec.Block:
        unmeasured.extend([] if _blocks.is_measured(block) else [step])
        return block

    def attempt(blocks: Sequence[_spec.Block]) -> Any:
        return chain(output, params, blocks, collect)[1]

    try:
        found, used = chain(output, params, blocks, collect)
    except Unknown as unknown:
        # Of one example it does not show what is repeated for each.
        single = {leaf.shape[:1] for leaf in arrays.values()} == {(1,)}
        if single and repeated(output):
            two = {
                index: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype)
                for index, leaf in arrays.items()
            }
            args, others = arguments(two)
            with contextlib.suppress(Exception):
                return infer_spec(
                    model,
                    *args,
                    method=method,
                    rngs=rngs,
                    mutable=mutable,
                    axis_names=axis_names,
                    blocks=blocks,
                    **others,
                )
        ways_out = _blocks.that_help(unknown, blocks, [*params], attempt)
        raise ValueError(_message(unknown, given, ways_out)) from None
    for block in blocks:
        if block not in used:
            raise ValueError(
                f"infer_spec: blocks: {block} stands for nothing: the output does not "
                f"depend on a module at {block.path!r}; paths of parameters are "
                f"{sorted(params)}"
                if block.path is not None
                else f"infer_spec: blocks: {block} is not needed: links describe all"
            )
    if unmeasured:
        leaves = dict.fromkeys(leaf for s in unmeasured for leaf in _blocks.leaves(s))
        measure = functools.partial(
            _blocks.measured, values=initial([*leaves]), compiled={}
        )
        found, _ = chain(output, params, blocks, measure)
    return found


def _one_end(ends: Sequence[Node]) -> Node:
    """The one output, or what stands for several."""
    if not ends:
        raise ValueError(
            "infer_spec: the model has 0 outputs that depend on its inputs by more "
            "than a comparison. Is it computed from them? What takes integers apart, "
            "such as jax.nn.one_hot, belongs before the model"
        )
    if len(ends) == 1:
        return ends[0]
    source = functools.reduce(graph.common_dominator, ends)
    outputs = Node("outputs", tuple(ends), origins=frozenset({"input"}))
    outputs.dominator, outputs.depth = source, source.depth + 1
    return outputs


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = tree_leaves_with_path(tree)
    return {text(path): leaf for path, leaf in leaves}


def _arguments(variables: Mapping[str, Any], arrays: Mapping[int, Any]) -> list[Node]:
    """The leaves of the graph, in the order that JAX flattens the arguments in."""
    nodes = [
        graph.leaf(kind, path, leaf.shape, leaf.dtype)
        for kind in sorted(variables)
        for path, leaf in _by_path(variables[kind]).items()
    ]
    return nodes + [
        graph.leaf(_input_kind(leaf), f"inputs[{index}]", leaf.shape, leaf.dtype)
        for index, leaf in arrays.items()
    ]


def _input_kind(leaf: Any) -> str:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return "random" if is_key else "input"


# --- What is wrong, and what to do about it ------------------------------------------


def _instead(model: Any) -> str:
    """What may have been meant by a model that is none."""
    if isinstance(model, Mapping):
        return ", the variables perhaps. Pass the module, and no variables"
    if isinstance(model, type):
        return ". Pass an instance of it"
    owner = getattr(model, "__self__", None)
    return f". Pass the {type(owner).__name__} that it is a method of" if owner else ""


def _check_inputs(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if not inputs and not kwargs:
        raise ValueError(
            "infer_spec: the model's inputs are missing: infer_spec(model, images), "
            "with arrays or jax.ShapeDtypeStructs"
        )
    for index, value in enumerate(inputs):
        ints = isinstance(value, tuple | list) and all(type(n) is int for n in value)
        if ints and value:
            raise ValueError(
                f"infer_spec: inputs[{index}] (={value!r}) is a shape. Pass an array "
                f"or jax.ShapeDtypeStruct({tuple(value)}, jnp.float32), with the batch "
                "dimension first"
            )
        if isinstance(value, Mapping) and "params" in value:
            raise ValueError(
                f"infer_spec: inputs[{index}] are the model's variables, which are not "
                "needed. Pass the model and its inputs: infer_spec(model, images)"
            )


def _check_batch(trace: Any, arrays: Mapping[int, Any], error: Exception) -> None:
    """Says so if a model that fails would not with a batch dimension."""
    for index, leaf in arrays.items():
        batched = jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype)
        with contextlib.suppress(Exception):
            trace({**arrays, index: batched})
            break
    else:
        return
    raise ValueError(
        f"infer_spec: the model fails ({type(error).__name__}). {_lacks_batch(leaf)}"
    ) from error


def _lacks_batch(leaf: Any) -> str:
    return (
        f"The input of shape {leaf.shape} seems to lack the batch dimension: pass "
        f"jax.ShapeDtypeStruct({(1, *leaf.shape)}, jnp.{leaf.dtype}). "
    )


def _message(
    unknown: Unknown, given: Sequence[Node], ways_out: Sequence[_spec.Block]
) -> str:
    node = unknown.node
    module = module_path(node.scope)
    if module is None:
        nearest = next((n.path for n in above(node) if n.op == "param"), "")
        module = nearest.rpartition("/")[0]
        place = f"next to {module!r}" if module else "in the model"
    else:
        place = f"in module {module!r}" if module else "at the top of the model"
    line = f" ({node.source})" if node.source else ""
    text = f"infer_spec: {place}: {unknown.reason}{line}. "
    for leaf in given:
        batched = (1, *leaf.shape)
        unbatched = leaf.flows and leaf.shape[:1] != (1,)
        if unbatched and any(n.flows and n.shape == batched for n in above(node)):
            text += _lacks_batch(leaf)
    if ways_out:
        several = (
            "them blocks, which are" if len(ways_out) > 1 else "it a block, which is"
        )
        text += f"Pass blocks={list(ways_out)} to make {several} measured. "
        if ways_out[-1].path == "":
            text += "This is all of the model; a module of its own keeps it small. "
        elif pieces.known(node) and len(node.flow) == 1:
            text += "If you know its rule, put a spec.Link of yours in its place. "
    return (
        f"{text}{'Or use' if ways_out else 'Use'} measured scales "
        "(scale_by_measured_backmatch): they need no chain."
    )


# --- Traces --------------------------------------------------------------------------


def _linen(model: Any, method: Any, rngs: Any, mutable: Any) -> Callable[..., Any]:
    """The trace of a Linen module: a function, and its variables by kind."""
    from flax.core import DenyList

    if model.scope is not None:
        raise ValueError(
            "infer_spec: model is bound to variables; pass model.unbind()[0]"
        )

    def tracer(arguments: Any, arrays: Any) -> Any:
        # Streams without a key of their own fall back on that of the parameters.
        keys = jax.eval_shape(lambda: {"params": jax.random.key(0)}) | {
            name: jax.eval_shape(lambda key=key: key)
            for name, key in (rngs or {}).items()
        }

        def initial(keys: Any, arrays: Any) -> Any:
            args, kwargs = arguments(arrays)
            return model.init(keys, *args, method=method, **kwargs)

        collections = dict(jax.eval_shape(initial, keys, arrays))
        params = collections.pop("params", {})

        def function(variables: Any, arrays: Any) -> Any:
            args, kwargs = arguments(arrays)
            output, _ = model.apply(
                {"params": variables["param"], **variables["state"]},
                *args,
                method=method,
                rngs=variables["random"],
                mutable=DenyList("params") if mutable is None else mutable,
                **kwargs,
            )
            return output

        def values(nodes: Sequence[Node]) -> dict[Node, Any]:
            # Of the initialisation only what these depend on is computed.
            closed, made = jax.make_jaxpr(initial, return_shape=True)(keys, arrays)
            leaves = _arguments({"random": keys}, arrays)
            outputs = dict(zip(_by_path(made), graph.read(closed, leaves), strict=True))
            key = jax.random.key(0)
            given = {
                leaf: (rngs or {}).get(leaf.path, key)
                if leaf.op == "random"
                else np.broadcast_to(np.ones((), leaf.dtype), leaf.shape)
                for leaf in (*leaves, *nodes)
                if leaf.op in ("input", "random")
            }
            ends = {
                node: outputs[join("params" * (node.op == "param"), node.path)]
                for node in nodes
                if node not in given
            }
            computed = graph.run([*ends.values()], given)
            return given | dict(zip(ends, computed, strict=True))

        variables = {"param": params, "random": keys, "state": collections}
        return function, variables, values

    return tracer


def _nnx(model: Any, method: Any) -> Callable[..., Any]:
    """The trace of an NNX module: a function, and its variables by kind."""
    from flax import nnx

    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, Tracer):
                raise ValueError(
                    f"infer_spec: {'/'.join(map(str, (*path, name)))!r} is an array "
                    "and no nnx.Variable, so that nnx.eval_shape leaves it without "
                    "values. Pass the model itself"
                )

    def tracer(arguments: Any, arrays: Any) -> Any:
        del arrays
        # Arrays that are no variables, such as a mask, are part of the program.
        graphdef, constants, *states = nnx.split(
            model, _is_constant, nnx.Param, nnx.RngState, ...
        )
        variables = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            dict(zip(("param", "random", "state"), states, strict=True)),
        )

        def function(variables: Any, arrays: Any) -> Any:
            args, kwargs = arguments(arrays)
            # A copy of the model, so that it can be given names and be updated.
            copy = nnx.merge(graphdef, constants, *variables.values())
            for path, module in nnx.iter_modules(copy):
                _name(module, "/".join(map(str, path)))
            if method is None:
                return copy(*args, **kwargs)
            call = getattr(type(copy), method) if isinstance(method, str) else method
            return call(copy, *args, **kwargs)

        def values(nodes: Sequence[Node]) -> dict[Node, Any]:
            kinds = dict(zip(("param", "random", "state"), states, strict=True))
            found = {kind: _by_path(tree) for kind, tree in kinds.items()}
            return {
                node: np.ones(node.shape, node.dtype)
                if node.op == "input"
                else _value(found[node.op][node.path], node)
                for node in nodes
            }

        return function, variables, values

    return tracer


def _is_constant(path: Any, value: Any) -> bool:
    """Whether an attribute of an NNX module is an array, and known."""
    del path
    return isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer)


def _value(leaf: Any, node: Node) -> Any:
    """An NNX variable's own value; an initial one where the model is abstract."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    name, fan_in = node.path.rpartition("/")[2], math.prod(node.shape[:-1])
    if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), node.shape)
    if node.op == "param" and len(node.shape) > 1:
        key = jax.random.key(zlib.crc32(node.path.encode()))  # another for each
        return jax.random.normal(key, node.shape, node.dtype) / math.sqrt(fan_in)
    # A WeightNorm of NNX has its scales in a dict of that name.
    ones = name in ("scale", "var") or "scales" in node.path.split("/")
    return jnp.full(node.shape, ones, node.dtype)


def _name(module: Any, path: str) -> None:
    """Makes an NNX module trace its calls under its path, as Linen modules do."""
    # The path is in the class, and so it survives nnx.jit and its like; an attribute
    # would be an entry of an nnx.Dict.
    module.__class__ = _naming_class(type(module), "@" + path.replace("/", "."))


@functools.cache
def _naming_class(base: type, scope: str) -> type:
    from flax import nnx

    def naming(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def method(*args: Any, **kwargs: Any) -> Any:
            with jax.named_scope(scope):
                return function(*args, **kwargs)

        return method

    own = [cls for cls in base.__mro__ if cls not in nnx.Module.__mro__]
    members = {
        name: value for cls in reversed(own) for name, value in vars(cls).items()
    }
    methods = {
        name: naming(value)
        for name, value in members.items()
        if isinstance(value, types.FunctionType) and not name.startswith("_")
    }
    if "__call__" in members:  # of any kind, such as what nnx.jit makes of it
        methods["__call__"] = naming(base.__call__)  # pyright: ignore
    return type(base)(base.__name__, (base,), methods)
