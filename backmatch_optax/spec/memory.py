"""A signal that is kept, and read again further on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backmatch_optax.moments import Moments
from backmatch_optax.spec.composite import Beginning
from backmatch_optax.spec.link import Link, Site, checked_links


@dataclasses.dataclass(frozen=True, repr=False)
class Memory(Link):
    """Keeps the signal that comes in, for arms anywhere inside that `Recall` it.

    An encoder's output, which several layers of a decoder attend to. What is used more
    than once has a Jacobian that is the sum of those of its uses, and so has the mean
    diagonal of `J^T J`, but for the products of two uses. These have either sign where
    each use begins with kernels of its own, as cross attention does. So the backward
    factor that is handed on to the encoder is

        m = sum over all Recalls of m at the Recall

    Args:
      links: the links from here on. They begin with the `Input` of the decoder; without
        one, they go on from the signal itself, whose `m` is one more of the sum.

    Raises:
      ValueError: where an entry is not a link, none of them is a `Recall`, or (at
        `init`) a `Recall` has another shape than the signal.

    Examples:
      >>> from backmatch_optax import spec
      >>> translation = spec.LayerChain(
      ...     [
      ...         spec.Embed("source"),
      ...         spec.Dense("encoder"),
      ...         spec.Memory(
      ...             [
      ...                 spec.Input((7,)),
      ...                 spec.Embed("target"),
      ...                 spec.Residual(
      ...                     [spec.Attention("cross", memory=spec.Recall((9, 16)))]
      ...                 ),
      ...                 spec.Dense("logits"),
      ...             ]
      ...         ),
      ...     ],
      ...     input_shape=(9,),
      ... )
      >>> translation.paths[:2]
      ('source', 'encoder')
    """

    links: Sequence[Link]

    featurewise = True  # as far as its links do

    def validate(self) -> None:
        self._canonical(links=checked_links("links", self.links))
        if not any(recalls(self.links)):
            raise ValueError("none of its links is a spec.Recall")

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"links": self.links}

    def moments_after(self, here: Site) -> Moments:
        return here.arm_moments[0]

    def bind(self, here: Site, inside: Sequence[Site]) -> None:
        """Tells each `Recall` inside what it recalls; raises where it does not fit."""
        for site in inside:
            if not isinstance(site.link, Recall) or site.memory is not None:
                continue  # that of a Memory further in
            if site.output_shape != here.input_shape:
                raise ValueError(
                    f"keeps a signal of shape {here.input_shape}, but {site.link} is "
                    "inside"
                )
            site.memory = here
            here.recalled.append(site)


@dataclasses.dataclass(frozen=True, repr=False)
class Recall(Beginning):
    """What the nearest `Memory` around it keeps, at the start of an arm.

    Args:
      shape: of one signal without the batch dimension.

    Raises:
      ValueError: where `shape` is not a sequence of positive ints; or (in `LayerChain`)
        it is not the first link of an arm, or not inside a `Memory`.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Attention("cross", memory=spec.Recall((9, 16)))
      spec.Attention('cross', memory=spec.Recall((9, 16)))
    """

    def moments_after(self, here: Site) -> Moments:
        memory: Any = here.memory
        return memory.moments


def recalls(links: Sequence[Link]) -> Iterator[Recall]:
    """Those among links, but for what belongs to a `Memory` inside."""
    for link in links:
        if isinstance(link, Recall):
            yield link
        for arm in () if isinstance(link, Memory) else link.arms.values():
            yield from recalls(arm)
