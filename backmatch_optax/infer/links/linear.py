"""How linear layers are recognised: a product, or a convolution, with a kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from backmatch_optax import spec as _spec
from backmatch_optax.infer import layout
from backmatch_optax.infer.graph import Node, above
from backmatch_optax.infer.links.attention import attention
from backmatch_optax.infer.links.learned import moved_axes, origin
from backmatch_optax.infer.links.resize import interpolation
from backmatch_optax.infer.step import (
    Step,
    Unknown,
    description,
    layer_path,
    rule,
)
from backmatch_optax.infer.windows import CONV_PADDINGS, Window, short


def _kernel(node: Node, kernel: Node) -> tuple[Node, tuple[int, ...], list[_spec.Link]]:
    """The parameter that a linear operation multiplies with.

    Returns:
      It; which of its axes each axis of the kernel is; and a `Scale` where the kernel
      is a multiple of it.
    """
    param, order, factor = kernel, (*range(len(kernel.shape)),), 1.0
    while param.op in ("div", "mul", "transpose"):
        first, *others = param.operands
        if not others:
            order = tuple(param.options["permutation"][axis] for axis in order)
            param = first
            continue
        (number,) = others
        if param.op == "mul" and number.value is None:
            first, number = number, first
        if number.value is None or number.shape:
            break
        factor *= float(number.value) ** (1 if param.op == "mul" else -1)
        param = first
    if param.op != "param" or not factor:
        raise Unknown(node, f"the kernel of {node.op} is {description(kernel)}")
    return param, order, [_spec.Scale(factor)] * (factor != 1)


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
    (of_kernel, of_signal), (along_kernel, along_signal) = (
        (pair[which], pair[1 - which]) for pair in layout.contracted(node)
    )
    kernel, order, scale = _kernel(node, kernel)
    path = layer_path(kernel, "kernel")
    # The kernel's own axes and the signal's, those that go along first.
    along = {order[a]: b for a, b in zip(along_kernel, along_signal, strict=True)}
    taken = {order[a]: b for a, b in zip(of_kernel, of_signal, strict=True)}
    paired = along | taken
    if 0 in paired.values() and len(signal.shape) > 1:
        raise Unknown(
            node, f"{node.op} with {path!r} is over the examples of the batch"
        )
    features = [paired[axis] for axis in sorted(paired)]
    positions = [at for at in range(len(signal.shape)) if at not in features]
    made = [axis for axis in sorted(order) if axis not in taken]
    # The axes of the node: those that go along, then the others of either operand.
    free = [("kernel", axis) for axis in order if axis not in paired]
    others = [("signal", at) for at in positions]
    found = [("kernel", axis) for axis in along]
    found += free + others if which == 0 else others + free
    own = others + [("kernel", axis) for axis in made]
    return Step(
        node,
        signal,
        [_contraction(signal, kernel, path, sorted(taken), sorted(along)), *scale],
        contracted=len(features),
        order=(*positions, *features),
        sizes=tuple(kernel.shape[axis] for axis in made),
        placed=tuple(own.index(axis) for axis in found),
        opaque=True,
    )


def outer(node: Node) -> Step | None:
    """`DenseGeneral` that adds nothing up: a feature times several numbers of its own.

    None for what is something else.
    """
    if node.op != "mul" or len(node.flow) != 1:
        return None
    (repeated,) = node.flow
    (numbers,) = (operand for operand in node.operands if not operand.flows)
    signal, kernel = origin(repeated), origin(numbers)
    at, of = _axes_of_origin(repeated), _axes_of_origin(numbers)
    if kernel.op != "param" or not at or not of:
        return None
    at[0] = 0  # the batch, which may have one example
    both = [*zip(of, at, strict=True)]
    along = {a: s for a, s in both if a >= 0 and s >= 0}
    placed = [("signal", s) if a < 0 else ("kernel", a) for a, s in both]
    axes = [*range(len(kernel.shape))]
    features = [along[axis] for axis in axes if axis in along]
    positions = [s for s in range(len(signal.shape)) if s not in features]
    own = [("signal", s) for s in positions] + [("kernel", axis) for axis in axes]
    if not features or len(features) == len(axes) or sorted(placed) != sorted(own):
        return None
    path = layer_path(kernel, "kernel")
    return Step(
        node,
        signal,
        [_spec.DenseGeneral(path, in_axis=(), batch_axis=sorted(along))],
        contracted=len(features),
        order=(*positions, *features),
        sizes=kernel.shape,
        placed=tuple(own.index(axis) for axis in placed),
        opaque=True,
    )


def _axes_of_origin(node: Node) -> list[int]:
    """Which axis of its origin each axis is, -1 where it is repeated.

    Empty where these are parts of axes.
    """
    sizes, axes = origin(node).shape, moved_axes(node)
    found = [[factor for factor in axis if factor[0] >= 0] for axis in axes]
    whole = all(
        len(axis) == len(kept) < 2 and all(sizes[a] == n for a, _, n in kept)
        for axis, kept in zip(axes, found, strict=True)
        if kept
    )
    return [axis[0][0] if axis else -1 for axis in found] if whole else []


def _contraction(
    signal: Node, kernel: Node, path: str, taken: list[int], along: list[int]
) -> Any:
    """The link that contracts some axes of a kernel, and takes others along."""
    rank = len(kernel.shape)
    if taken == [*range(len(taken))] and not along:
        plain = rank == 2 and len(taken) == 1
        return _spec.Dense(path) if plain else _spec.DenseGeneral(path)
    if (rank, taken, along) == (2, [1], []) and _is_table(kernel, signal):
        return _spec.Unembed(layer_path(kernel, "embedding"))
    return _spec.DenseGeneral(path, in_axis=taken, batch_axis=along)


def _is_table(kernel: Node, signal: Node) -> bool:
    """Whether an embedding looks rows up in a kernel, or it has the name of a table."""
    return kernel.path.rpartition("/")[2] == "embedding" or any(
        node.op == "gather" and node.operands[0] is kernel for node in above(signal)
    )


@rule("conv_general_dilated")
def convolution(node: Node) -> Step:
    """`Conv` and `ConvTranspose`, with Flax's order of axes."""
    signal, kernel = node.operands
    if kernel.flows:
        raise Unknown(
            node,
            f"{node.op} multiplies the signal with {description(signal)} on its left",
        )
    kernel, order, scale = _kernel(node, kernel)
    path = layer_path(kernel, "kernel")
    options, rank = node.options, len(node.shape)
    last = (0, rank - 1, *range(1, rank - 1))
    flax = (last, (rank - 1, rank - 2, *range(rank - 2)), last)
    numbers = tuple(map(tuple, options["dimension_numbers"]))
    in_order = [*order] == [*range(rank)]
    if numbers != flax or options["batch_group_count"] != 1 or not in_order:
        raise Unknown(node, f"the axes of {path!r} are not in Flax's order")
    strides, spread = options["window_strides"], options["lhs_dilation"]
    groups, dilation = options["feature_group_count"], options["rhs_dilation"]
    arguments = {"kernel_dilation": short(dilation)}
    taps = kernel.shape[:-2]
    window = Window(taps, options["padding"], CONV_PADDINGS)
    if math.prod(spread) == 1:
        arguments |= {"strides": short(strides), "feature_group_count": groups}
        link = _spec.Conv(path, **arguments)
    elif math.prod(strides) == 1 and groups == 1:
        link = _spec.ConvTranspose(path, strides=short(spread), **arguments)
        window = dataclasses.replace(window, takes_zeros=False)
    else:
        raise Unknown(node, f"{path!r} is both a strided and a transposed convolution")
    return Step(node, signal, [link, *scale], window=window, opaque=True)
