"""How linear layers are recognised: a product, or a convolution, with a kernel."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout
from backmatch_optax.infer.graph import Node
from backmatch_optax.infer.links.attention import attention
from backmatch_optax.infer.links.resize import interpolation
from backmatch_optax.infer.step import Step, Unknown, description, rule
from backmatch_optax.infer.windows import CONV_PADDINGS, Window, short


def _kernel_path(node: Node, name: str = "kernel") -> str:
    """The path of the layer whose kernel a linear operation multiplies with."""
    signal, kernel = node.operands
    if kernel.flows and node.op == "dot_general":
        signal, kernel = kernel, signal
    if kernel.flows:
        raise Unknown(
            node,
            f"{node.op} multiplies the signal with {description(signal)} on its left",
        )
    if kernel.op != "param":
        raise Unknown(node, f"the kernel of {node.op} is {description(kernel)}")
    path, _, found = f"/{kernel.path}".rpartition("/")
    if found != name:
        raise Unknown(
            node,
            f"{node.op} multiplies with {kernel.path!r}. Parameters are known by their "
            "names, as Flax gives them: call it 'kernel' in the model, and a bias "
            "'bias', to make it a layer",
        )
    return path[1:]


@rule("dot_general")
def dense(node: Node) -> Step:
    """`Dense`, `DenseGeneral` and `Unembed`: a kernel over some axes of the signal."""
    if all(operand.flows for operand in node.operands):
        return attention(node)
    resized = interpolation(node)
    if resized is not None:
        return resized
    which = int(node.operands[0].flows)  # of the operands is the kernel
    signal, kernel = node.operands[1 - which], node.operands[which]
    contracted, batched = (tuple(map(tuple, o)) for o in layout.contracted(node))
    table = kernel.operands[0] if kernel.op == "transpose" else kernel
    if table.path.rpartition("/")[2] == "embedding" and len(table.shape) == 2:
        # The rows of the table, transposed or not, are the new features.
        over = (len(signal.shape) - 1,), (int(table is kernel),)
        if which and (contracted, batched) == (over, ((), ())):
            link = _spec.Unembed(table.path.rpartition("/")[0])
            return Step(node, signal, [link], opaque=True)
    path = _kernel_path(node)
    count, last = len(contracted[0]), len(signal.shape)
    over = (*range(last - count, last),), (*range(count),)
    if not which or (contracted, batched) != (over, ((), ())):
        return _contraction(node, signal, kernel, path, which)
    plain = len(kernel.shape) == 2 and count == 1
    link = _spec.Dense(path) if plain else _spec.DenseGeneral(path)
    return Step(node, signal, [link], contracted=count, opaque=True)


def _contraction(node: Node, signal: Node, kernel: Node, path: str, which: int) -> Step:
    """`DenseGeneral` with the axes of its kernel in any order, as `Einsum` has them."""
    contracted, batched = layout.contracted(node)
    # The kernel's axes and the signal's, those that go along first.
    pairs = [*zip(batched[which], batched[1 - which], strict=True)]
    pairs += zip(contracted[which], contracted[1 - which], strict=True)
    of_signal = dict(pairs)
    if any(axis == 0 for axis in of_signal.values()):
        raise Unknown(
            node, f"{node.op} with {path!r} is over the examples of the batch"
        )
    rank = len(kernel.shape)
    free = [axis for axis in range(rank) if axis not in of_signal]
    features = [of_signal[axis] for axis in sorted(of_signal)]
    positions = [at for at in range(len(signal.shape)) if at not in features]
    # The axes of the node: those that go along, then the others of either operand.
    sides = [[("kernel", axis) for axis in free], [("signal", at) for at in positions]]
    found = [("kernel", axis) for axis in batched[which]]
    found += itertools.chain(*(sides if which == 0 else reversed(sides)))
    made = [axis for axis in range(rank) if axis not in contracted[which]]
    own = [("signal", at) for at in positions] + [("kernel", axis) for axis in made]
    axes = [tuple(sorted(taken)) for taken in (contracted[which], batched[which])]
    first = axes[0] == (*range(len(axes[0])),) and not axes[1]
    options: Any = (
        {} if first else dict(zip(("in_axis", "batch_axis"), axes, strict=True))
    )
    plain = first and rank == 2
    link = _spec.Dense(path) if plain else _spec.DenseGeneral(path, **options)
    return Step(
        node,
        signal,
        [link],
        contracted=len(features),
        order=(*positions, *features),
        sizes=tuple(kernel.shape[axis] for axis in made),
        placed=tuple(own.index(axis) for axis in found),
        opaque=True,
    )


@rule("conv_general_dilated")
def convolution(node: Node) -> Step:
    """`Conv` and `ConvTranspose`, with Flax's order of axes."""
    path, options, rank = _kernel_path(node), node.options, len(node.shape)
    last = (0, rank - 1, *range(1, rank - 1))
    flax = (last, (rank - 1, rank - 2, *range(rank - 2)), last)
    numbers = tuple(map(tuple, options["dimension_numbers"]))
    if numbers != flax or options["batch_group_count"] != 1:
        raise Unknown(node, f"the axes of {path!r} are not in Flax's order")
    strides, spread = options["window_strides"], options["lhs_dilation"]
    groups, dilation = options["feature_group_count"], options["rhs_dilation"]
    arguments = {"kernel_dilation": short(dilation)}
    taps = node.operands[1].shape[:-2]
    window = Window(taps, options["padding"], CONV_PADDINGS)
    if math.prod(spread) == 1:
        arguments |= {"strides": short(strides), "feature_group_count": groups}
        link = _spec.Conv(path, **arguments)
    elif math.prod(strides) == 1 and groups == 1:
        link = _spec.ConvTranspose(path, strides=short(spread), **arguments)
        window = dataclasses.replace(window, takes_zeros=False)
    else:
        raise Unknown(node, f"{path!r} is both a strided and a transposed convolution")
    return Step(node, node.operands[0], [link], window=window, opaque=True)
