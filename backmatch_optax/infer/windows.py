"""Windows that slide over positions, and their padding by Flax's names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from backmatch_optax.spec.link import Shape


def short(counts: Sequence[int]) -> Any:
    """Strides and the like as people write them: one number where all are the same."""
    return counts[0] if len(set(counts)) == 1 else tuple(counts)


CONV_PADDINGS = ("SAME", "VALID", "CAUSAL")


POOL_PADDINGS = ("VALID", "SAME", "SAME_LOWER")


@dataclasses.dataclass(frozen=True)
class Window:
    """A window that slides over the positions, and how these are padded."""

    taps: Sequence[int]
    strides: Sequence[int]
    dilation: Sequence[int]
    pairs: tuple[tuple[int, int], ...]
    names: Sequence[str]  # that a padding may have
    spread: Sequence[int] = ()  # strides of a transposed convolution
    takes_zeros: bool = True  # whether zeros around its input are like its padding

    def name(self, sizes: Shape, before: tuple[Any, ...], mode: str) -> Any:
        """Its padding as Flax calls it, what was padded before included.

        Raises:
          ValueError: where Flax has no such padding.
        """
        taps = zip(self.taps, self.dilation, strict=True)
        extents = [(count - 1) * step + 1 for count, step in taps]
        pairs = self.pairs
        if before:
            if not self.takes_zeros or (mode and any(map(any, pairs))):
                raise ValueError("follows on padding")
            both = zip(before, pairs, strict=True)
            pairs = tuple((a + c, b + d) for (a, b), (c, d) in both)
        if mode:
            if self.names is not CONV_PADDINGS or pairs != tuple(
                ((extent - 1) // 2, extent // 2) for extent in extents
            ):
                raise ValueError(f"has {mode} padding of {pairs}, which is not Flax's")
            return mode
        known = (
            self._transposed(extents) if self.spread else self._known(sizes, extents)
        )
        for name, candidate in known:
            if tuple(candidate) == pairs:
                return name
        return pairs[0][0] if len({*itertools.chain(*pairs)}) == 1 else pairs

    def _known(
        self, sizes: Shape, extents: Sequence[int]
    ) -> Iterator[tuple[str, Sequence[tuple[int, int]]]]:
        for name in self.names:
            if name != "CAUSAL":
                yield name, jax.lax.padtype_to_pads(sizes, extents, self.strides, name)
            elif len(sizes) == 1:
                yield name, [(extents[0] - 1, 0)]

    def _transposed(
        self, extents: Sequence[int]
    ) -> Iterator[tuple[str, Sequence[tuple[int, int]]]]:
        same, valid = [], []
        for extent, stride in zip(extents, self.spread, strict=True):
            total = extent + stride - 2
            low = extent - 1 if stride > extent - 1 else -(-total // 2)
            same.append((low, total - low))
            valid.append((extent - 1, total + max(extent - stride, 0) - extent + 1))
        yield from (("SAME", same), ("VALID", valid))
