"""Layers whose parameters are stacked along an axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from backmatch_optax.numerics import checked_count
from backmatch_optax.spec.link import (
    Link,
    Shape,
    checked_links,
    inside,
    own_path,
    with_paths,
)
from backmatch_optax.spec.memory import Memory, Recall


@dataclasses.dataclass(frozen=True, repr=False)
class Repeat(Link):
    """The same layer `n` times, its parameters stacked: `flax.linen.scan`, `nnx.scan`.

    Each parameter of the layer has one more axis, the first, with an entry for each of
    the `n` layers. The rules are those of the layer's links, walked `n` times. On the
    way up, layer `k` takes the moments that layer `k - 1` puts out. On the way down it
    takes the backward factor `m` that layer `k + 1` hands on:

        q_k+1 = q after layer k,    m_k = m_k+1 * (product of m_z of layer k)

    So layer `k` has its own scale `1 / (m * m_W)` for each of its parameters. The
    scales of one parameter are a vector of shape `(n,)`, and multiply its gradient
    along the first axis. Both walks are loops on the device (`jax.lax.scan`) over the
    norms of all layers. The time to compile does not depend on `n`.

    The scales are those of the chain written out, to rounding, with two exceptions.
    With mean-field gains, the integrals of a ReLU are computed where a chain written
    out may have them in closed form. That changes scales by less than a thousandth.
    Norms below `norm_floor` may count as the floor in other places.

    Args:
      chain: the links of one layer, from input to output, with the paths of the stacked
        parameters. What it puts out has the shape of what it takes.
      n: the number of layers.

    Raises:
      ValueError: where an entry is not a link, a link is `Tied`, a `Memory` or a
        `Recall`, or `n` is not an int of at least 1; (at `init`) where the shape
        changes, or a parameter has no first axis of length `n`; (in `update`) where its
        first link, a pooling or a residual, needs to know the activation that the layer
        before ended with.

    Examples:
      >>> import jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> net = spec.LayerChain(
      ...     [spec.Repeat([spec.Dense("layers")], 3), spec.Dense("head")],
      ...     input_shape=(4,),
      ... )
      >>> params = {
      ...     "layers": {"kernel": jnp.stack([jnp.eye(4), 2 * jnp.eye(4), jnp.eye(4)])},
      ...     "head": {"kernel": jnp.eye(4)},
      ... }
      >>> for path, scale in bmo.layer_scales(net, params, normalize=False).items():
      ...     print(path, scale.round(4))
      layers [0.25 1.   0.25]
      head 0.25
    """

    chain: Sequence[Link]
    n: int

    adds_arms = featurewise = True  # as far as its links do

    def validate(self) -> None:
        self._canonical(
            chain=checked_links("chain", self.chain), n=checked_count("n", self.n)
        )
        for link in inside(self.chain):
            if isinstance(link, Memory | Recall):
                raise ValueError(
                    f"{link} is inside: a layer of a Repeat has one signal"
                )
        for link in with_paths(self.chain, declared=False):
            raise ValueError(
                f"{link} is Tied, but a layer of a Repeat may use no parameter twice"
            )

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"chain": self.chain}


def stacks(links: Sequence[Link], outer: Shape = ()) -> Iterator[tuple[str, Shape]]:
    """The declared paths, with the axes that each `Repeat` around them adds."""
    for link in links:
        path = own_path(link)
        if path is not None:
            yield path, outer
        inner = (*outer, link.n) if isinstance(link, Repeat) else outer
        for arm in link.arms.values() if link.declares_arms else ():
            yield from stacks(arm, inner)
