"""Embeddings of tokens, their use as a head, and parameters that are used twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Link, Shape, Site, check_path, checked_links


@dataclasses.dataclass(frozen=True, repr=False)
class _Table(Link):
    """What these share: a table with a row of features for each token."""

    path: str

    roles = required_roles = ("embedding",)

    def validate(self) -> None:
        check_path(self.path)

    def table(self, param_shapes: Mapping[str, Shape]) -> Shape:
        """Its shape, checked."""
        shape = param_shapes["embedding"]
        if len(shape) != 2:
            raise ValueError(
                f"expects an embedding of shape (tokens, features), but it has shape "
                f"{shape}"
            )
        return shape


@dataclasses.dataclass(frozen=True, repr=False)
class Embed(_Table):
    """A row of a table for each token, `flax.linen.Embed` or `flax.nnx.Embed`.

    The first link of a chain, or of an arm, whose input is integers: every axis of its
    input is one of positions. An entry of a row is met once for each position that
    holds its token. Whichever tokens are frequent, the counts of all rows add up to the
    number of positions, so that their mean is

        m_W = positions / tokens,    q = ||E||_F^2 / (tokens * features)

    and nothing is handed on to an integer.

    Args:
      path: where its `embedding`, of shape (tokens, features), lies in the parameters,
        or the path of the table itself.

    Raises:
      ValueError: where `path` is not a string of names joined by single slashes, or (at
        `init`) the embedding has another rank.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.LayerChain([spec.Embed("Embed_0")], input_shape=(128,))
      spec.LayerChain(
          [
              spec.Embed('Embed_0'),
          ],
          input_shape=(128,),
      )
    """

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, with the table's features."""
        return (*input_shape, self.table(param_shapes)[-1])

    def moments_after(self, here: Site) -> Moments:
        return Moments(here.squared_row_norm("embedding") / self._tokens(here))

    def m_W(self, here: Site, role: str) -> Positive:
        times, tokens = here.positions_out, self._tokens(here)
        if here.common is None or times == 1:
            return number(times / tokens)
        # Tokens that are drawn at random: `n (n - 1)` pairs of positions share a row.
        pairs = here.common * ((times - 1) / tokens)
        return (number(1.0) + pairs) * (times / tokens)

    def _tokens(self, here: Site) -> int:
        return here.params["embedding"].shape[0]


@dataclasses.dataclass(frozen=True, repr=False)
class Unembed(_Table):
    """An embedding as a head, `flax.linen.Embed.attend`: `x @ embedding.T`.

    The rules are those of a `Dense` whose kernel is the transposed table. Where the
    table also embeds the input, the head is `Tied([Unembed(path)])`.

    Args:
      path: where its `embedding`, of shape (tokens, features), lies in the parameters,
        or the path of the table itself.

    Raises:
      ValueError: where `path` is not a string of names joined by single slashes, or (at
        `init`) the embedding does not fit the input.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Unembed("Embed_0")
      spec.Unembed('Embed_0')
    """

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, with one feature for each token."""
        tokens, features = self.table(param_shapes)
        if input_shape[-1] != features:
            raise ValueError(
                f"its embedding of shape {(tokens, features)} takes {features} input "
                f"features, but its input has {input_shape[-1]}"
            )
        return (*input_shape[:-1], tokens)

    def moments_after(self, here: Site) -> Moments:
        return here.moments.mixed(self.m_z(here) * here.fan_in / here.fan_out)

    def m_W(self, here: Site, role: str) -> Positive:
        return here.met(here.moments, here.positions_out, here.fan_in)

    def m_z(self, here: Site) -> Positive:
        return here.squared_row_norm("embedding")


@dataclasses.dataclass(frozen=True, repr=False)
class Tied(Link):
    """Links whose parameters are used elsewhere too: a tied head, a shared block.

    The Jacobian of a parameter that is used twice is the sum of two, and so is the mean
    diagonal of `J^T J` but for the products of the two, which have either sign. So
    curvatures add:

        scale(W) = 1 / (m_1 * m_W1 + m_2 * m_W2)

    The first use is declared as it is, every other one inside `Tied`.

    Args:
      links: the links, from input to output.

    Raises:
      ValueError: where an entry is not a link, or (in `LayerChain`) a path is declared
        nowhere else.

    Examples:
      >>> from backmatch_optax import spec
      >>> language_model = spec.LayerChain(
      ...     [
      ...         spec.Embed("embed"),
      ...         spec.Residual([spec.LayerNorm("norm"), spec.Dense("mlp")]),
      ...         spec.Tied([spec.Unembed("embed")]),
      ...     ],
      ...     input_shape=(128,),
      ... )
      >>> language_model.paths
      ('embed', 'norm', 'mlp')
    """

    links: Sequence[Link]

    adds_arms = featurewise = True  # as far as its links do
    declares_arms = False

    def validate(self) -> None:
        self._canonical(links=checked_links("links", self.links))

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"links": self.links}

    def moments_after(self, here: Site) -> Moments:
        return here.arm_moments[0]
