"""The layer chain of a Flax model, read off one abstract trace.

Three passes. The trace becomes a graph (`_infer_graph`). From the output to the input,
that graph is cut into steps at its dominators, the values that everything passes
through: each primitive with a rule of its own (`_RULES`) is a step, and so is each
elementwise or normalising piece that computes what a link does (`_PIECES`); what
splits and is added up again is a residual. From the input to the output the steps
become links, with shapes, paddings and paths checked against the parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax import _infer_graph as graph
from backmatch_optax import spec as _spec
from backmatch_optax._infer_graph import SIGNAL, Node, Piece
from backmatch_optax._locate import locate
from backmatch_optax._param_paths import text
from backmatch_optax._site import Shape
from backmatch_optax._windows import low_padding, output_sizes

_OUT = (
    "Write the chain by hand with a spec.Block for it, or pass "
    "blocks={path: spec.Block(path, ...)} for a module that holds it; or use measured "
    "scales (measure_layer_scales), which need no spec."
)

# What stands behind primitives that no link describes.
_MEANINGS = {
    "argmax": "an index taken from the signal",
    "argsort": "a sort",
    "concatenate": "a concatenation",
    "cond": "a branch on data",
    "custom_vjp_call": "a function with a derivative of its own",
    "cumsum": "a cumulative sum",
    "dot_general": "a matrix product that is no Dense layer",
    "dynamic_slice": "a slice",
    "dynamic_update_slice": "an update of a part",
    "fft": "a Fourier transform",
    "gather": "indexing, or an embedding",
    "pad": "padding that no convolution follows",
    "reduce_max": "a maximum over features or batch",
    "reduce_sum": "a sum over features or batch",
    "scan": "a loop (recurrence)",
    "slice": "a slice",
    "sort": "a sort",
    "split": "a split",
    "stop_gradient": "a stopped gradient",
    "while": "a loop (recurrence)",
}


@dataclasses.dataclass
class _Step:
    """What happens between a node and the one it is computed from."""

    node: Node
    source: Node
    links: Sequence[_spec.Link] = ()  # one after the other
    arms: tuple[list[_Step], list[_Step]] | None = None  # of a residual
    bias: str = ""  # path of a parameter added to the signal
    padding: tuple[Any, ...] = ()  # (low, high) per axis, for a convolution to come
    mode: str = ""  # how that is filled: "CIRCULAR", "REFLECT"; empty for zeros
    order: tuple[int, ...] = ()  # of a transpose
    # Whether a piece of the graph that goes on beyond it cannot be one link.
    opaque: bool = False


class _Unknown(Exception):  # noqa: N818 - it becomes a ValueError
    """Something on the way from the input to the output that no link describes."""

    def __init__(self, node: Node, reason: str):
        super().__init__(reason)
        self.node = node
        self.reason = reason


def infer_spec(
    model: Any,
    *inputs: Any,
    method: Callable[..., Any] | str | None = None,
    rngs: Mapping[str, Any] | None = None,
    mutable: Any = None,
    blocks: Mapping[str, _spec.Block] | None = None,
    **kwargs: Any,
) -> _spec.LayerChain:
    """The layer chain of a Flax model, from one abstract trace.

    Nothing is computed and nothing allocated: the model is traced with abstract inputs,
    and what flows from its input to its output is recognised by what it does, however
    it is written: modules or functions, in any order and nesting, inside `jax.jit`,
    `jax.checkpoint` and their Flax counterparts or not. The result is an ordinary
    `spec.LayerChain`; its `repr` is code to paste, edit and keep.

    Train and eval mode give the same chain but for `spec.Dropout`, which leaves no
    trace in eval mode. What cannot be told apart by what it computes gets one name:
    `silu` for `swish`, `elu` for `celu`, `"SAME"` for a padding of 1 around a 3x3
    kernel of stride 1. Of a residual's two arms the one with more links is the branch.

    Args:
      model: a `flax.linen.Module`, not bound, or a `flax.nnx.Module`, concrete or made
        by `nnx.eval_shape`.
      *inputs: what the model is called with, batch dimension included: arrays or
        `jax.ShapeDtypeStruct`s. One of them is the input of the chain.
      method: the method to call instead of `__call__`, or a function of the model and
        the inputs, such as `lambda model, x: model(x)[0]` to choose one of several
        outputs.
      rngs: Linen only: random keys by stream, as for `Module.apply`. Not needed for
        dropout.
      mutable: Linen only: which collections the model may write, as for
        `Module.apply`; None for all but the parameters.
      blocks: a `spec.Block` for each module, by its path, whose inside is not to be
        looked at.
      **kwargs: other arguments of the model, such as `train=False`.

    Returns:
      The chain, whose `input_shape` is that of the input without its batch dimension.

    Raises:
      ValueError: where something between input and output is described by no link
        (attention, recurrence, gating, concatenation, an embedding, a parameter used
        twice or transformed before use), or there are several outputs. The message
        names the module, the operation, its line of code, and the ways out.
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
    closed = jax.make_jaxpr(function)(variables, arrays)
    kinds = {
        kind: {
            text(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(variables[kind])
        }
        for kind in variables
    }
    nodes = [
        graph.leaf(kind, path, leaf.shape, leaf.dtype)
        for kind in sorted(kinds)
        for path, leaf in kinds[kind].items()
    ]
    nodes += [
        graph.leaf("input", f"inputs[{index}]", leaf.shape, leaf.dtype)
        for index, leaf in arrays.items()
    ]
    shapes = {path: tuple(leaf.shape) for path, leaf in kinds["param"].items()}
    try:
        outputs = graph.read(closed, nodes)
        chain = _chain(outputs, shapes, blocks or {})
    except _Unknown as unknown:
        raise ValueError(_message(unknown)) from None
    locate(chain, variables["param"], unlisted="identity")
    return chain


def _message(unknown: _Unknown) -> str:
    node = unknown.node
    module = _module(node.scope)
    if module is None:
        above = next((n.path for n in _above(node) if n.op == "param"), "")
        module = above.rpartition("/")[0]
        place = f"next to {module!r}" if module else "in the model"
    else:
        place = f"in module {module!r}" if module else "at the top of the model"
    line = f" ({node.source})" if node.source else ""
    return f"infer_spec: {place}: {unknown.reason}{line}. {_OUT}"


def _above(node: Node) -> Iterator[Node]:
    """The node and what it depends on, breadth first."""
    seen, queue = {node}, [node]
    for found in queue:
        yield found
        new = [operand for operand in found.operands if operand not in seen]
        seen.update(new)
        queue += new


# --- Traces --------------------------------------------------------------------------


def _linen(model: Any, method: Any, rngs: Any, mutable: Any) -> Callable[..., Any]:
    """The trace of a Linen module: a function, and its variables by kind."""
    from flax.core import DenyList

    if model.scope is not None:
        raise ValueError(
            "infer_spec: model is bound to variables; pass it unbound, model.unbind()[0]"
        )

    def tracer(arguments: Any, arrays: Any) -> Any:
        # Streams without a key of their own fall back on that of the parameters.
        keys = jax.eval_shape(lambda: {"params": jax.random.key(0)}) | {
            name: jax.eval_shape(lambda key=key: key) for name, key in (rngs or {}).items()
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
    # The path is an attribute, and so it survives nnx.jit and its like.
    module._infer_spec_scope = "@" + path.replace("/", ".")
    module.__class__ = _naming_class(type(module))


@functools.cache
def _naming_class(base: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(self._infer_spec_scope):
            return base.__call__(self, *args, **kwargs)  # pyright: ignore

    return type(base)(base.__name__, (base,), {"__call__": call})


def _module(scope: str) -> str | None:
    """The path of the module that a name stack belongs to, None where it tells none."""
    parts = [part for part in scope.split("/") if "(" not in part]
    named = [part for part in parts if part.startswith("@")]
    if named:
        return named[-1][1:].replace(".", "/")
    names: list[str] = []
    for part in parts[1:]:  # the first is the class of the whole model
        name = part.partition(".")[0]  # Linen appends the method, if not __call__
        if name == part or names[-1:] != [name]:
            names.append(name)
    return "/".join(names) if parts else None
