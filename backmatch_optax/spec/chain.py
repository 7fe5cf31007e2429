"""The declared layer chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from backmatch_optax.spec.composite import Outputs
from backmatch_optax.spec.link import Link, checked_links, with_paths
from backmatch_optax.spec.memory import Memory, recalls
from backmatch_optax.spec.repeat import stacks
from backmatch_optax.spec.windows import checked_shape


@dataclasses.dataclass(frozen=True, repr=False)
class LayerChain:
    """The chain of links a network consists of, from its input to its output.

    Everything the transformation needs to know beside the parameters. Not callable and
    not a pytree: a plain value, to be passed around, compared, hashed, printed and
    pasted.

    Args:
      layers: the links, input to output.
      input_shape: shape of one input without the batch dimension, channels last, such
        as `(32, 32, 3)`; `()` for a label, one integer for each example.

    Raises:
      ValueError: where an entry of `layers` is not a link, two links own the same path,
        or `input_shape` is not a sequence of positive ints.

    Examples:
      >>> from backmatch_optax import spec
      >>> mlp = spec.LayerChain(
      ...     [spec.Dense("fc1"), spec.Activation("relu"), spec.Dense("fc2")],
      ...     input_shape=(64,),
      ... )
      >>> mlp
      spec.LayerChain(
          [
              spec.Dense('fc1'),
              spec.Activation('relu'),
              spec.Dense('fc2'),
          ],
          input_shape=(64,),
      )
      >>> eval(repr(mlp)) == mlp
      True
    """

    layers: Sequence[Link]
    input_shape: Sequence[int] = dataclasses.field(kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "layers", checked_links("layers", self.layers))
        input_shape = self.input_shape
        if input_shape != ():
            input_shape = checked_shape("input_shape", input_shape)
        object.__setattr__(self, "input_shape", input_shape)
        owners: dict[str, Any] = {}
        for link in with_paths(self.layers):
            if link.path in owners:
                raise ValueError(
                    f"LayerChain: two layers declare the path {link.path!r}: "
                    f"{owners[link.path]} and {link}. Declare a second use as "
                    f"spec.Tied([{link}])."
                )
            owners[link.path] = link
        stacked = {path for path, stack in stacks(self.layers) if stack}
        for link in with_paths(self.layers, declared=False):
            if link.path in stacked:
                raise ValueError(
                    f"LayerChain: {link} is Tied, but the parameters at {link.path!r} "
                    "are those of several layers of a Repeat"
                )
            if link.path not in owners:
                raise ValueError(
                    f"LayerChain: {link} is Tied, but no other layer declares the path "
                    f"{link.path!r}"
                )
        _check_ends(self.layers)
        for recall in recalls(self.layers):
            raise ValueError(
                f"LayerChain: {recall} is inside no spec.Memory"
                f"{f' of {recall.name!r}' if recall.name else ''}, so that there is "
                "nothing to recall"
            )
        for block in filter(lambda link: link.owns_subtree, owners.values()):
            for path, link in owners.items():
                inside = path.startswith(f"{block.path}/") or block.path == ""
                if block is not link and inside:
                    raise ValueError(
                        f"LayerChain: {link} lies inside {block}, which owns every "
                        "parameter below its path"
                    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all declared layers with parameters, input to output."""
        return tuple(link.path for link in with_paths(self.layers))

    def __repr__(self) -> str:
        layers = "".join(f"        {link!r},\n" for link in self.layers)
        listed = f"[\n{layers}    ]" if layers else "[]"
        return (
            f"spec.LayerChain(\n    {listed},\n    input_shape={self.input_shape},\n)"
        )


def _check_ends(
    links: Sequence[Link], may_begin: bool = False, may_end: bool = True
) -> None:
    """Raises `ValueError` where another input or output is not at an end."""
    for index, link in enumerate(links):
        if link.begins and (index or not may_begin):
            raise ValueError(
                f"LayerChain: {link} must be the first link of an arm; the chain's own "
                "input is input_shape"
            )
        ends = isinstance(link, Outputs)
        if ends and (index + 1 < len(links) or not may_end):
            raise ValueError(
                f"LayerChain: {link} must be the last link of the chain; what follows "
                "an output is one of its branches"
            )
        arms = [*link.arms.values()]
        keeps = isinstance(link, Memory)
        if arms and not keeps and all(arm and arm[0].begins for arm in arms):
            raise ValueError(
                f"LayerChain: all arms of {link} begin with an input of their own, so "
                "that nothing reaches what is below"
            )
        last = keeps and may_end and index + 1 == len(links)
        for arm in arms:
            _check_ends(arm, may_begin=True, may_end=ends or last)
