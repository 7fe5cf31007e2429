"""A signal that is kept, and read again further on; and what may be asked of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.composite import Beginning
from backmatch_optax.spec.link import Link, Shape, Site, check_path, checked_links


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
      links: the links from here on. They begin with the `Input` of the decoder, or with
        a `Recall` of another `Memory` around it; without either, they go on from the
        signal itself, whose `m` is one more of the sum.
      name: by which a `Recall` inside knows it, where there are several, such as a time
        and a text.

    Raises:
      ValueError: where an entry is not a link, none of them is a `Recall` of its name,
        or (at `init`) a `Recall` has another shape than the signal.

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
    name: str = ""

    featurewise = True  # as far as its links do

    def validate(self) -> None:
        self._canonical(links=checked_links("links", self.links))
        if not any(recall.name == self.name for recall in recalls(self.links)):
            named = f" of {self.name!r}" if self.name else ""
            raise ValueError(f"none of its links is a spec.Recall{named}")

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"links": self.links}

    def moments_after(self, here: Site) -> Moments:
        return here.arm_moments[0]

    def bind(self, here: Site, inside: Sequence[Site]) -> None:
        """Tells each `Recall` inside what it recalls; raises where it does not fit."""
        for site in inside:
            if not isinstance(site.link, Recall) or site.link.name != self.name:
                continue
            if site.memory is not None:
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
    """What the nearest `Memory` of its name around it keeps, at the start of an arm.

    Args:
      shape: of one signal without the batch dimension.
      name: that of the `Memory`.

    Raises:
      ValueError: where `shape` is not a sequence of positive ints; or (in `LayerChain`)
        it is not the first link of an arm, or not inside such a `Memory`.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Attention("cross", memory=spec.Recall((9, 16)))
      spec.Attention('cross', memory=spec.Recall((9, 16)))
    """

    name: str = ""

    def moments_after(self, here: Site) -> Moments:
        memory: Any = here.memory
        return memory.moments


@dataclasses.dataclass(frozen=True, repr=False)
class Queries(Beginning):
    """A learned array at the start of an arm, the same for all inputs.

    The queries of a DETR, the latents of a Perceiver, the probe of attention pooling.
    An entry stands at one place, and nothing lies below:

        m_W = 1,    q = mean(array^2)

    Args:
      shape: of the array, as it stands for one input: (positions, features).
      path: the path of the array itself, such as `"latents"`. Axes of length 1 may be
        in front.

    Raises:
      ValueError: where `shape` is not a sequence of positive ints, `path` not names
        joined by single slashes, or (at `init`) not that of an array of this shape; or
        (in `LayerChain`) it is not the first link of an arm.

    Examples:
      >>> from backmatch_optax import spec
      >>> pooled = [
      ...     spec.Memory(
      ...         [
      ...             spec.Queries((1, 64), "probe"),
      ...             spec.Attention("attention", memory=spec.Recall((49, 64))),
      ...         ]
      ...     ),
      ... ]
      >>> spec.LayerChain([spec.Dense("patches"), *pooled], input_shape=(49, 12)).paths
      ('patches', 'probe', 'attention/query', 'attention/key', 'attention/value', \
'attention/out')
    """

    path: str

    roles = required_roles = ("",)  # the path is the array's own

    def validate(self) -> None:
        super().validate()
        check_path(self.path)

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """As declared."""
        shape, found = super().shape_after(input_shape, {}), param_shapes[""]
        more = len(found) - len(shape)
        if more < 0 or found != (1,) * more + shape:
            raise ValueError(f"its array has shape {found}, but expected {shape}")
        return shape

    def moments_after(self, here: Site) -> Moments:
        rows = math.prod(here.params[""].shape[:-1])
        return Moments(here.squared_row_norm("") / rows)

    def m_W(self, here: Site, role: str) -> Positive:
        del here, role
        return number(1.0)


def recalls(links: Sequence[Link], kept: Collection[str] = ()) -> Iterator[Recall]:
    """Those among links, but for what belongs to a `Memory` inside.

    Args:
      links: the links.
      kept: the names of what is kept around them.
    """
    for link in links:
        if isinstance(link, Recall) and link.name not in kept:
            yield link
        inside = {*kept, link.name} if isinstance(link, Memory) else kept
        for arm in link.arms.values():
            yield from recalls(arm, inside)
