"""How many positions a sliding window has: the static geometry of Conv and pooling."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from backmatch_optax.spec.link import Link, Shape

# Paddings whose output size is ceil(input / stride), as Flax implements them.
SIZE_KEEPING = ("SAME", "SAME_LOWER", "CIRCULAR", "REFLECT", "CAUSAL")

# As users may write them; an int stands for the same in every dimension, as in Flax.
PerDimension = int | Sequence[int]
Padding = str | int | Sequence[int | Sequence[int]]


def canonical_counts(name: str, value: Any) -> PerDimension:
    """Strides, dilation or window: positive ints; all equal is written as one int."""
    entries = value if isinstance(value, Sequence) else (value,)
    try:
        counts = tuple(operator.index(entry) for entry in entries)
    except TypeError:
        counts = ()
    if not counts or isinstance(value, str) or min(counts) < 1:
        raise ValueError(
            f"{name} (={value!r}) must be a positive int or a sequence of positive ints"
        )
    return counts[0] if len(set(counts)) == 1 else counts


def canonical_window(name: str, value: Any) -> tuple[int, ...]:
    """A window shape: one positive int for each spatial dimension."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(
            f"{name} (={value!r}) must be a sequence of positive ints, one for each "
            "spatial dimension, such as (2, 2)"
        )
    counts = canonical_counts(name, value)
    return (counts,) * len(value) if isinstance(counts, int) else tuple(counts)


def canonical_padding(value: Any, allowed: Sequence[str]) -> Padding:
    """A padding name, an int, or (low, high) pairs; equal pairs become one int."""
    wanted = (
        f"padding (={value!r}) must be one of {', '.join(map(repr, allowed))}, an int, "
        "or a (low, high) pair of ints for each spatial dimension, none negative"
    )
    if isinstance(value, str):
        if value.upper() not in allowed:
            raise ValueError(wanted)
        return value.upper()
    try:
        entries = tuple(value) if isinstance(value, Sequence) else (value,)
        pairs = tuple(
            (operator.index(low), operator.index(high))
            for low, high in (
                entry if isinstance(entry, Sequence) else (entry, entry)
                for entry in entries
            )
        )
    except (TypeError, ValueError):
        raise ValueError(wanted) from None
    if not pairs or min(min(pair) for pair in pairs) < 0:
        raise ValueError(wanted)
    low, high = pairs[0]
    return low if low == high and len(set(pairs)) == 1 else pairs


def per_dimension(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One entry for each of `rank` spatial dimensions; an int stands for all alike."""
    if isinstance(value, int):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(
            f"{name} (={value!r}) has {len(value)} entries, "
            f"but there are {rank} spatial dimensions"
        )
    return tuple(value)


def output_sizes(
    input_sizes: Sequence[int],
    window: Sequence[int],
    *,
    strides: PerDimension = 1,
    padding: Padding = "VALID",
    dilation: PerDimension = 1,
) -> tuple[int, ...]:
    """Output size of a sliding window in each spatial dimension.

    Raises:
      ValueError: where an argument has the wrong number of entries, or the window is
        larger than the padded input.
    """
    rank = len(input_sizes)
    strides = per_dimension("strides", strides, rank)
    dilation = per_dimension("kernel_dilation", dilation, rank)
    if isinstance(padding, str) and padding in SIZE_KEEPING:
        return tuple(
            -(-size // stride)
            for size, stride in zip(input_sizes, strides, strict=True)
        )
    if padding == "VALID":
        pairs = ((0, 0),) * rank
    else:
        pairs = tuple(
            (entry, entry) if isinstance(entry, int) else entry
            for entry in per_dimension("padding", padding, rank)
        )
    extents = tuple(
        (size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)
    )
    padded = tuple(
        size + low + high for size, (low, high) in zip(input_sizes, pairs, strict=True)
    )
    if any(extent > size for extent, size in zip(extents, padded, strict=True)):
        raise ValueError(
            f"the window {shape_text(extents)} is larger than its input "
            f"{shape_text(padded)} (dilation and padding counted)"
        )
    return tuple(
        (size - extent) // stride + 1
        for size, extent, stride in zip(padded, extents, strides, strict=True)
    )


def shape_text(shape: Sequence[int]) -> str:
    """`(8, 8, 64)` as `8*8*64`."""
    return "*".join(map(str, shape)) or "1"


def taps_inside(
    input_sizes: Sequence[int],
    window: Sequence[int],
    output_sizes: Sequence[int],
    *,
    strides: PerDimension,
    padding: Padding,
    dilation: PerDimension,
) -> tuple[float, float]:
    """How much of the input the taps of a padded window see.

    On padding a tap meets a zero instead of the input.

    Returns:
      At how many output positions a tap meets the input, the mean over taps (without
      padding, all of them); and of a constant input's square, as the taps hand it on,
      the share that is the same at all positions (without padding, all of it).
    """
    rank = len(input_sizes)
    strides = per_dimension("strides", strides, rank)
    dilation = per_dimension("kernel_dilation", dilation, rank)
    uses = kept = 1.0
    for axis, (size, taps, outputs) in enumerate(
        zip(input_sizes, window, output_sizes, strict=True)
    ):
        stride, step = strides[axis], dilation[axis]
        low = low_padding(padding, axis, size, taps, stride, step)
        inside = [
            sum(0 <= at * stride + tap * step - low < size for at in range(outputs))
            for tap in range(taps)
        ]
        uses *= sum(inside) / taps
        kept *= sum(count**2 for count in inside) / (outputs * sum(inside))
    return uses, kept


def transposed_padding(
    window: Sequence[int], padding: Padding, dilation: PerDimension
) -> Padding:
    """The padding of the convolution that a transposed one is the transpose of.

    That one leads from its outputs to its inputs. `padding` is explicit; only what is
    before the first entry of an axis is told.
    """
    steps = per_dimension("kernel_dilation", dilation, len(window))
    return tuple(
        ((taps - 1) * step - low_padding(padding, axis, 0, taps, 1, step), 0)
        for axis, (taps, step) in enumerate(zip(window, steps, strict=True))
    )


def low_padding(
    padding: Padding, axis: int, size: int, taps: int, stride: int, step: int
) -> int:
    """How much is padded before the first entry of an axis."""
    extent = (taps - 1) * step + 1
    match padding:
        case "VALID":
            return 0
        case "CAUSAL":
            return extent - 1
        case "SAME" | "SAME_LOWER":
            total = max((-(-size // stride) - 1) * stride + extent - size, 0)
            return total // 2 if padding == "SAME" else total - total // 2
        case int():
            return padding
    entry: Any = padding[axis]
    return entry if isinstance(entry, int) else entry[0]


def transposed_sizes(
    input_sizes: Sequence[int],
    window: Sequence[int],
    *,
    strides: PerDimension,
    padding: Padding,
    dilation: PerDimension,
) -> tuple[int, ...]:
    """Output size of a transposed convolution in each spatial dimension."""
    rank = len(input_sizes)
    strides = per_dimension("strides", strides, rank)
    dilation = per_dimension("kernel_dilation", dilation, rank)
    spread = tuple(
        (size - 1) * stride + 1
        for size, stride in zip(input_sizes, strides, strict=True)
    )
    extents = tuple(
        (size - 1) * step + 1 for size, step in zip(window, dilation, strict=True)
    )
    if padding in ("SAME", "CIRCULAR"):
        return tuple(
            size * stride for size, stride in zip(input_sizes, strides, strict=True)
        )
    if padding == "VALID":  # every tap of every input, and at least the stride
        return tuple(
            size + max(extent, stride) - 1
            for size, extent, stride in zip(spread, extents, strides, strict=True)
        )
    return output_sizes(spread, window, padding=padding, dilation=dilation)


def checked_shape(name: str, shape: Any) -> Shape:
    """A shape as a tuple of positive ints, or `ValueError`."""
    try:
        return canonical_window(name, shape)
    except ValueError:
        raise ValueError(
            f"{name} (={shape!r}) must be a sequence of positive ints without the "
            "batch dimension and with the features last, such as (32, 32, 3)"
        ) from None


class Windowed(Link):
    """What links with a window share: arguments that may have an entry a dimension."""

    _in_full: Mapping[str, Sequence[Any]]

    def _canonical_entries(self, **arguments: Any) -> None:
        """As `_canonical`; remembers how many entries the user wrote.

        Equal entries become one, and how many dimensions there are is not known yet.
        """
        written = {name: getattr(self, name) for name in arguments}
        in_full = {
            name: tuple(value)
            for name, value in written.items()
            if isinstance(value, Sequence) and not isinstance(value, str)
        }
        self._canonical(**arguments, _in_full=in_full)

    def _check_entries(self, input_shape: Shape) -> None:
        for name, value in self._in_full.items():
            per_dimension(name, value, len(input_shape) - 1)
