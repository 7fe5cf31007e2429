"""Windows that slide over positions, and their padding by Flax's names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

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
    pairs: tuple[tuple[int, int], ...]
    names: Sequence[str]  # that a padding may have
    takes_zeros: bool = True  # whether zeros around its input are like its padding

    def name(self, link: Any, sizes: Shape, before: tuple[Any, ...], mode: str) -> Any:
        """Its padding as Flax calls it, what was padded before included.

        Raises:
          ValueError: where Flax has no such padding.
        """
        pairs = self.pairs
        if before:
            if not self.takes_zeros or (mode and any(map(any, pairs))):
                raise ValueError("follows on padding")
            both = zip(before, pairs, strict=True)
            pairs = tuple((a + c, b + d) for (a, b), (c, d) in both)
        dilation = getattr(link, "kernel_dilation", 1)
        for name in (mode,) if mode else self.names:
            if name in link.paddings and (name != "CAUSAL" or len(sizes) == 1):
                named = dataclasses.replace(link, padding=name)
                if tuple(named.window(sizes, self.taps, dilation).pads) == pairs:
                    return name
        if mode:
            raise ValueError(f"has {mode} padding of {pairs}, which is not Flax's")
        return pairs[0][0] if len({*itertools.chain(*pairs)}) == 1 else pairs
