"""The layer chain of a Flax model, read off one abstract trace.

Three passes: the trace becomes a graph (`_infer_graph`); from its output to its input
the graph is cut into steps (`_infer_steps`); from its input to its output the steps
become links (`_infer_links`). Here are the traces themselves.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from backmatch_optax import spec as _spec
from backmatch_optax.infer import graph
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links import chain
from backmatch_optax.infer.steps import Unknown, above, module_path
from backmatch_optax.parameters import text

_OUT = (
    "Write the chain by hand with a spec.Block for it, or pass "
    "blocks=[spec.Block(path, ...)] for a module that holds it; or use measured "
    "scales (measure_layer_scales), which need no spec."
)


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

    Nothing is computed and nothing allocated: the model is traced with abstract inputs,
    and what flows from its input to its output is recognised by what it does, however
    it is written: modules or functions, in any order and nesting, inside `jax.jit`,
    `jax.checkpoint` and their Flax counterparts or not. The result is an ordinary
    `spec.LayerChain`; its `repr` is code to paste, edit and keep.

    The chain begins behind what only prepares the input: a transpose, a reshape that
    adds the axis of the features, a shift and division by constants.

    Train and eval mode give the same chain but for `spec.Dropout`, which leaves no
    trace in eval mode. What cannot be told apart by what it computes gets one name:
    `silu` for `swish`, `elu` for `celu`, `Conv` for a `ConvTranspose` of stride 1,
    `"SAME"` for a padding of 1 around a 3x3 kernel of stride 1. Of a residual's two
    arms the one with more links is the branch, the first where they have as many.

    Args:
      model: a `flax.linen.Module`, not bound, or a `flax.nnx.Module`, concrete or made
        by `nnx.eval_shape`.
      inputs: what the model is called with, batch dimension included: arrays or
        `jax.ShapeDtypeStruct`s. One of them is the input of the chain.
      method: the method to call instead of `__call__`, or a function of the model and
        the inputs, such as `lambda model, x: model(x)[0]` to choose one of several
        outputs.
      rngs: Linen only: random keys by stream, as for `Module.apply`. Not needed for
        dropout.
      mutable: Linen only: which collections the model may write, as for
        `Module.apply`; None for all but the parameters.
      axis_names: names of device axes that the model averages over, as
        `BatchNorm(axis_name="batch")` does in training.
      blocks: a `spec.Block` for each module, by its `path`, whose inside is not to be
        looked at.
      kwargs: other arguments of the model, such as `train=False`.

    Returns:
      The chain, whose `input_shape` is that of the input without its batch dimension.

    Raises:
      ValueError: where something between input and output is described by no link
        (attention, recurrence, gating, concatenation, an embedding, a derivative of the
        user's own, a parameter used twice or transformed before use), or there are
        several outputs. The message names the module, the operation, its line of code,
        and the ways out.
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
    if isinstance(model, flax.linen.Module):
        tracer = _linen(model, method, rngs, mutable)
    elif isinstance(model, flax.nnx.Module):
        if rngs is not None or mutable is not None:
            raise ValueError("infer_spec: rngs and mutable are for Linen modules only")
        tracer = _nnx(model, method)
    else:
        raise ValueError(
            "infer_spec: model must be a flax.linen.Module or a flax.nnx.Module, but "
            f"it is {model!r}, a {type(model).__name__}"
        )
    # What is not an array, such as train=True, is part of the program.
    leaves, tree = jax.tree.flatten((inputs, kwargs))
    arrays = {
        index: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for index, leaf in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }

    def arguments(values: Mapping[int, Any]) -> tuple[Any, Any]:
        filled = [values.get(index, leaf) for index, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, filled)

    function, variables = tracer(arguments, arrays)
    params = _by_path(variables["param"])
    try:
        closed = jax.make_jaxpr(function, axis_env=[(name, 1) for name in axis_names])(
            variables, arrays
        )
        outputs = graph.read(closed, _arguments(variables, arrays))
        return chain(
            outputs, {path: leaf.shape for path, leaf in params.items()}, blocks
        )
    except Unknown as unknown:
        raise ValueError(_message(unknown)) from None
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(
            f"infer_spec: the model averages over devices ({error}); name the axes it "
            'does so over, as in axis_names=["batch"], or pass it in eval mode'
        ) from None


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
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


def _message(unknown: Unknown) -> str:
    node = unknown.node
    module = module_path(node.scope)
    if module is None:
        nearest = next((n.path for n in above(node) if n.op == "param"), "")
        module = nearest.rpartition("/")[0]
        place = f"next to {module!r}" if module else "in the model"
    else:
        place = f"in module {module!r}" if module else "at the top of the model"
    line = f" ({node.source})" if node.source else ""
    return f"infer_spec: {place}: {unknown.reason}{line}. {_OUT}"


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

        return function, {"param": params, "random": keys, "state": collections}

    return tracer


def _nnx(model: Any, method: Any) -> Callable[..., Any]:
    """The trace of an NNX module: a function, and its variables by kind."""
    from flax import nnx

    def tracer(arguments: Any, arrays: Any) -> Any:
        del arrays
        graphdef, *states = nnx.split(model, nnx.Param, nnx.RngState, ...)
        variables = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            dict(zip(("param", "random", "state"), states, strict=True)),
        )

        def function(variables: Any, arrays: Any) -> Any:
            args, kwargs = arguments(arrays)
            # A copy of the model, so that it can be given names and be updated.
            copy = nnx.merge(graphdef, *variables.values())
            for path, module in nnx.iter_modules(copy):
                _name(module, "/".join(map(str, path)))
            if method is None:
                return copy(*args, **kwargs)
            call = getattr(type(copy), method) if isinstance(method, str) else method
            return call(copy, *args, **kwargs)

        return function, variables

    return tracer


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
