"""Attention, from dot products of queries and keys."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, applied, number
from backmatch_optax.softmax_weights import Weights, softmax_weights
from backmatch_optax.spec.composite import Input
from backmatch_optax.spec.link import (
    Link,
    Shape,
    Site,
    check_path,
    checked_links,
    checked_number,
)
from backmatch_optax.spec.memory import Recall
from backmatch_optax.spec.windows import checked_shape


@dataclasses.dataclass(frozen=True, repr=False)
class DenseGeneral(Link):
    """A dense layer on several axes: `DenseGeneral`, `nnx.LinearGeneral` and `Einsum`.

    Flax's `DenseGeneral` has a kernel of shape `(*in, *out)`, such as (features, heads,
    head_dim). That of an `Einsum` has its axes in any order, which `in_axis` tells. For
    the rules, and for the links above and below, the axes of each kind are one axis of
    features, those of the output in the order that the kernel has them. An output adds
    up `in` products and an input takes part in `out` of them, whatever the order. So
    the rules are those of `Dense`, BM (32) and (34).

    Axes that both the input and the output have (`batch_axis`) make a kernel of its own
    for each of their entries: the whole is a `Dense` whose kernel is zero outside of
    blocks. The zeros change none of the rules. With `in_axis=()` each feature becomes
    several, as where numbers of a table become tokens.

    Args:
      path: where the layer's `kernel` and optional `bias` lie in the parameters, or
        the path of the kernel itself.
      in_axis: which axes of the kernel are contracted with the input, an int or
        several; None for the first ones, as many as make up the input's features.
      batch_axis: which axes of the kernel the input and the output have, too.

    Raises:
      ValueError: where `path` is not a string of names joined by single slashes, an
        axis is no int or named twice, or (at `init`) the kernel has no such axis or
        these axes do not make up the input's features.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.DenseGeneral("attention/query")
      spec.DenseGeneral('attention/query')

      A kernel of shape (heads, features, head_dim), `nnx.Einsum("BTD,NDH->BTNH", ...)`:

      >>> spec.DenseGeneral("q_einsum", in_axis=1)
      spec.DenseGeneral('q_einsum', in_axis=1)

      A kernel of shape (features, width), `x[..., None] * kernel`, and then tokens:

      >>> tokens = [
      ...     spec.DenseGeneral("tokens", in_axis=(), batch_axis=0),
      ...     spec.Reshape((13, 64)),
      ... ]
    """

    path: str
    in_axis: int | Sequence[int] | None = dataclasses.field(default=None, kw_only=True)
    batch_axis: int | Sequence[int] = dataclasses.field(default=(), kw_only=True)

    roles = ("kernel", "bias")
    required_roles = ("kernel",)

    def validate(self) -> None:
        check_path(self.path)
        in_axis = None if self.in_axis is None else _axes("in_axis", self.in_axis)
        self._canonical(batch_axis=_short(_axes("batch_axis", self.batch_axis)))
        if in_axis is not None:
            self._canonical(in_axis=_short(in_axis))
        if in_axis is None and self.batch_axis != ():
            raise ValueError(f"batch_axis (={self.batch_axis!r}) needs in_axis")
        if in_axis == () and self.batch_axis == ():
            raise ValueError("in_axis (=()) needs batch_axis")

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, with the product of the output's axes as its features."""
        kernel, bias = param_shapes["kernel"], param_shapes.get("bias")
        out = self._out_sizes(kernel, input_shape[-1])
        if bias is not None and sorted(bias) != sorted(out):
            raise ValueError(f"its bias has shape {bias}, but expected {out}")
        return (*input_shape[:-1], math.prod(out))

    def _out_sizes(self, kernel: Shape, features: int) -> Shape:
        """The axes of the kernel that the output has, in order."""
        rank = len(kernel)
        if self.in_axis is None:
            for end in range(1, rank):
                if math.prod(kernel[:end]) == features:
                    return kernel[end:]
            raise ValueError(
                f"the first axes of its kernel of shape {kernel} do not make up the "
                f"{features} features of its input"
            )
        taken, along = _axes("", self.in_axis), _axes("", self.batch_axis)
        if not all(-rank <= axis < rank for axis in (*taken, *along)):
            raise ValueError(
                f"its kernel of shape {kernel} lacks one of the axes {taken + along}"
            )
        named = [axis % rank for axis in (*taken, *along)]
        if len({*named}) < len(named):
            raise ValueError(f"names an axis of its kernel of shape {kernel} twice")
        sizes = math.prod(kernel[axis] for axis in named)
        if sizes != features:
            raise ValueError(
                f"the axes {taken + along} of its kernel of shape {kernel} do not make "
                f"up the {features} features of its input"
            )
        inside = named[: len(taken)]
        return tuple(size for axis, size in enumerate(kernel) if axis not in inside)

    def moments_after(self, here: Site) -> Moments:
        after = here.moments.mixed(self._row_norm(here, "kernel"))
        if here.mean_field and "bias" in here.params:
            after = after.with_spread(self._row_norm(here, "bias"))
        return after

    def m_W(self, here: Site, role: str) -> Positive:
        if role != "kernel":
            return here.added(here.positions_out)
        return here.met(here.moments, here.positions_out, here.fan_in)

    def m_z(self, here: Site) -> Positive:
        return self._row_norm(here, "kernel") * here.fan_out / here.fan_in

    def _row_norm(self, here: Site, role: str) -> Positive:
        last = here.params[role].shape[-1]
        return here.squared_row_norm(role) * last / here.fan_out


def _axes(name: str, axes: Any) -> tuple[int, ...]:
    """Axes of a kernel as a tuple, or `ValueError`."""
    found = (axes,) if isinstance(axes, int) else axes
    fits = isinstance(found, Sequence) and all(type(axis) is int for axis in found)
    if not fits or len({*found}) < len(found):
        raise ValueError(f"{name} (={axes!r}) must be an int or different ints")
    return tuple(found)


def _short(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    return axes[0] if len(axes) == 1 else axes


@dataclasses.dataclass(frozen=True, repr=False)
class DotProductAttention(Link):
    r"""Softmax attention between three chains: queries, keys and values.

    For each head of `d` features, `o_i = sum_j a_ij v_j` with the weights
    `a_ij = softmax_j(q_i . k_j / sqrt(d))`. Its derivatives are

        d o_i / d v_j = a_ij
        d o_i / d k_j = a_ij (v_j - o_i) q_i^T / sqrt(d)
        d o_i / d q_i = sum_j a_ij (v_j - o_i) k_j^T / sqrt(d)

    A kernel adds them up over the positions `j`. So what counts are covariances under
    the weights: of values and keys for queries, of values and the input for keys. Let
    `V` and `K` be the variances of values and keys, `Q` the second moment of queries,
    `t = Q K` the variance of the logits, `D` the features of their input, `S` the mean
    over queries of `sum_j a_ij^2`, and `P` that of `sum_j a_ij^2 (v_j - o_i)^2` for
    values of variance 1, `S + sum_jk a_ij^2 a_ik^2 - 2 sum_j a_ij^3`. For as many
    queries as keys

        m_value = m (S + (1 - S)^2 t / D)
        m_key   = m Q V (P + (1 - S)^2 / D)
        m_query = m K V (P + (1 - S)^2 / D)
        variance after = V (S + (1 - S)^2 t / D)

    The terms with `D` do not vanish with the number of positions: keys and values are
    functions of the same `D` features, and so their covariance is `1 / D` of their
    variances. A constant added to all keys changes nothing; only their variance counts.

    **A bias of the logits**, such as one for each relative position, has terms of its
    own, `d o_i / d b_ij = a_ij (v_j - o_i)`. Its variance makes weights as unequal as
    that of the logits does, and one of its entries has, for `keys` of them,

        m_bias = m V P size_out / (queries * keys * heads)

    **What positions have in common.** With nearly uniform weights all queries get
    nearly the same: a share `1 / positions` of `V` is common to all positions, and a
    mean over positions keeps it. Backward, where all positions get the same cotangent
    from such a mean, the terms of a value add up to it instead of cancelling:
    `m_value = m`. Without a mean above, too, values get nearly the same back at all
    positions where weights are nearly uniform: as these sum to 1, a share
    `m / (positions m_value)`. Causal weights are larger for the first positions,
    `m_value = 2 m` for many. Further axes of positions, in front of those that attend,
    make groups that attend by themselves; what one group has in common counts in
    proportion for all. All this counts with mean-field gains.

    **Assumptions.** Positions are unrelated about their units' means, the input is
    white, and kernels are random. A bias of the values passes whole, but this rule
    takes it for a part of them, so that its scale is too large. The papers have no rule
    for attention; this one holds with both gains.

    **The weights.** Logits count as independent Gaussians of variance `t`. For small
    ones attention is nearly uniform and `S` is one over the number of positions; for
    large ones most queries attend to one position, and `P` is what the few with two
    nearly equal logits make of it, about `1 / sqrt(t)`. Pass `attended` where the model
    is known to attend to more or to fewer: then weights are equal over so many
    positions and zero elsewhere.

    Args:
      query: the links from the input to the queries, all heads side by side.
      key: the links to the keys. They may have fewer heads than the queries, which then
        share them (grouped-query attention).
      value: the links to the values, of as many heads as the keys.
      causal: whether a position attends only to itself and to those before it.
      attended: the effective number of positions that a query attends to, `1 / S` or
        nearly `exp` of the mean entropy of its weights; None for what is said above.
      bias: the links to what is added to the logits, of shape (queries, keys, heads),
        or with one head for all. They begin with an `Input` or with `Queries`.

    Raises:
      ValueError: where an entry is not a link, `attended` is not a number above 1, or
        (at `init`) the shapes of queries, keys, values and bias do not fit each other.

    Examples:
      >>> from backmatch_optax import spec
      >>> fused = [  # one kernel for all three
      ...     spec.Dense("qkv"),
      ...     spec.DotProductAttention(
      ...         [spec.Slice((0, 64), axis=-1)],
      ...         [spec.Slice((64, 128), axis=-1)],
      ...         [spec.Slice((128, 192), axis=-1)],
      ...         causal=True,
      ...     ),
      ...     spec.Dense("out"),
      ... ]
      >>> spec.DotProductAttention([spec.Dense("q")], [], [], attended=8)
      spec.DotProductAttention((spec.Dense('q'),), (), (), attended=8.0)

      A table with a row for each distance and a column for each head, as in a T5 or a
      Swin, for 49 positions:

      >>> distance = [spec.Input((49, 49)), spec.Embed("relative_attention_bias")]
      >>> relative = spec.DotProductAttention([], [], [], bias=distance)
    """

    query: Sequence[Link]
    key: Sequence[Link]
    value: Sequence[Link]
    causal: bool = dataclasses.field(default=False, kw_only=True)
    attended: float | None = dataclasses.field(default=None, kw_only=True)
    bias: Sequence[Link] = dataclasses.field(default=(), kw_only=True)

    approximate_in_depth = (
        "many layers of attention make positions alike, so that its queries and keys "
        "may be off by a factor of 15"
    )
    approximate_below_a_mean = (
        "every position gets the same signal back from the mean, and equal terms add "
        "up where independent ones cancel; only gains='mean_field' count that"
    )

    def validate(self) -> None:
        for name in ("query", "key", "value", "bias"):
            self._canonical(**{name: checked_links(name, getattr(self, name))})
        self._canonical(attended=_checked_attended(self.attended))

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        arms = {"query": self.query, "key": self.key, "value": self.value}
        return arms | {"bias": self.bias} if self.bias else arms

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The queries'."""
        query, key, value = shapes["query"], shapes["key"], shapes["value"]
        listed = f"queries {query}, keys {key}, values {value}"
        if min(map(len, (query, key, value))) < 2 or key != value:
            raise ValueError(
                "its keys and values must have one shape, (positions, features): "
                + listed
            )
        if query[:-2] != key[:-2] or query[-1] % key[-1]:
            raise ValueError(
                "its queries must have the features of its keys or a multiple, and may "
                "differ in the last axis of positions alone: " + listed
            )
        if self.causal and query[-2] != key[-2]:
            raise ValueError(
                f"causal attention needs as many keys as queries: {listed}"
            )
        if key[-2] == 1:
            raise ValueError(
                f"attends to one position, which is no choice, so that queries and "
                f"keys have no gradient: {listed}"
            )
        bias = shapes.get("bias", (query[-2], key[-2], 1))
        if bias[:-1] != (query[-2], key[-2]) or key[-1] % bias[-1]:
            raise ValueError(
                f"its bias of shape {bias} must have shape (queries, keys, heads), or "
                f"(queries, keys, 1): {listed}"
            )
        return query

    def moments_after(self, here: Site) -> Moments:
        value = here.arm_moments[2]
        after = value.shrunk(self._gain(here, "kept"), self._gain(here, "lost"))
        # What all queries attend to in equal parts, of their own group of positions.
        *groups, positions, _ = here.arm_shapes[1]
        shared = _met_again(positions, self.causal) / positions / math.prod(groups)
        along = value.variance * shared
        along = along if after.along is None else along + after.along
        return dataclasses.replace(after, along=along)

    def m_arm(self, here: Site, arm: int) -> Positive:
        query, key, value, *_ = here.arm_moments
        uses = here.size_out / math.prod(here.arm_shapes[arm])
        if arm == 2:
            return self._handed(here) * uses
        if arm == 3:
            return self._gain(here, "spread") * value.variance * uses
        of = (key.variance, query.q)[arm]
        return self._gain(here, "chosen") * of * value.variance * uses

    def arm_common(self, here: Site, arm: int) -> Positive | None:
        # What all keys get sums to zero, and so do the logits of a query.
        if arm in (1, 3) or not here.mean_field:
            return None
        queries, keys = (shape[-2] for shape in here.arm_shapes[:2])
        if arm == 2:  # weights sum to 1: the mean over keys is a mean over queries
            groups = math.prod(here.arm_shapes[2][:-2])
            shared = number(1.0 / groups)
            if here.common is not None:
                shared = shared + here.common * (queries - 1.0 / groups)
            return shared / (self._handed(here) * keys)
        if here.common is None:
            return None
        return here.common * self._gain(here, "agreed")

    def _handed(self, here: Site) -> Positive:
        """What a value is handed, each head's `m` being 1."""
        kept = self._gain(here, "kept")
        if here.common is None:
            return kept
        return kept + here.common * self._gain(here, "together")

    def centres(self, here: Site) -> bool:
        del here
        return False

    def _gain(self, here: Site, name: str) -> Positive:
        """What is kept of the values, and what queries and keys choose from."""
        return here.once("gains", lambda: self._gains(here))[name]

    def _gains(self, here: Site) -> dict[str, Positive]:
        query, key, _, *bias = here.arm_moments
        queries, keys = (shape[-2] for shape in here.arm_shapes[:2])
        again = _met_again(keys, self.causal) * queries / keys
        gains = _means(_made_of(here), keys, self.causal, self.attended, again)
        added = bias[0].variance if bias else None
        parts = [query.q * key.variance, added]
        return dict(zip(_GAINS, applied(gains, parts), strict=True))


def _made_of(here: Site) -> int:
    """Of how many features keys and values are functions."""
    kernels = [site.fan_in for site in here.arms["key"] if "kernel" in site.params]
    return kernels[0] if kernels else min(here.fan_in, here.fan_out)


_GAINS = ("kept", "lost", "chosen", "spread", "together", "agreed")


@functools.cache
def _met_again(positions: int, causal: bool) -> float:
    """Mean square of the weights that a position has in all queries, equal in each."""
    if not causal:
        return 1.0
    weights = 1.0 / np.arange(1, positions + 1)
    return float(np.mean(np.cumsum(weights[::-1]) ** 2))


@functools.cache
def _means(
    features: int, positions: int, causal: bool, attended: float | None, again: float
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """Means over queries, by the variance of their logits and that of a bias."""
    weights = softmax_weights(positions, causal, attended)
    return functools.partial(_means_of, features, positions, weights, again)


def _means_of(
    features: int,
    positions: int,
    weights: Weights,
    again: float,
    t: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, ...]:
    squares, others, spread = weights(t + bias)
    kept = squares + others * t / features
    lost, together = jnp.maximum(1 - kept, 0), jnp.maximum(again - kept, 0)
    agreed = jnp.minimum(1 / (positions * squares), 1)
    return kept, lost, spread + others / features, spread, together, agreed


@dataclasses.dataclass(frozen=True, repr=False)
class Attention(Link):
    """Attention with its four kernels, `MultiHeadDotProductAttention` of Flax.

    Consists of a `DenseGeneral` for each of `query`, `key`, `value` and `out` below the
    path, and of the `DotProductAttention` between them, whose rule and assumptions it
    has. Each kernel has a scale of its own.

    Args:
      path: where `query`, `key`, `value` and `out` lie in the parameters.
      causal: whether a position attends only to itself and to those before it.
      attended: the effective number of positions that a query attends to; None leaves
        it to the size of the logits. See `DotProductAttention`.
      memory: for cross attention, the shape of the other input, (positions, features),
        that keys and values are made of; its second moment counts as 1. A `Recall`
        where they are made of what a `Memory` keeps.

    Raises:
      ValueError: where `path` is not names joined by single slashes, `attended` is not
        a number above 1, `memory` is no shape, or (at `init`) a kernel does not fit.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Residual(
      ...     [
      ...         spec.LayerNorm("LayerNorm_0"),
      ...         spec.Attention("MultiHeadDotProductAttention_0", causal=True),
      ...     ]
      ... ).branch[1]
      spec.Attention('MultiHeadDotProductAttention_0', causal=True)
    """

    path: str
    causal: bool = dataclasses.field(default=False, kw_only=True)
    attended: float | None = dataclasses.field(default=None, kw_only=True)
    memory: Sequence[int] | Recall | None = dataclasses.field(
        default=None, kw_only=True
    )

    adds_arms = True

    def validate(self) -> None:
        check_path(self.path)
        self._canonical(attended=_checked_attended(self.attended))
        if self.memory is not None and not isinstance(self.memory, Recall):
            self._canonical(memory=checked_shape("memory", self.memory))

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        def dense(name: str) -> Link:
            return DenseGeneral(f"{self.path}/{name}" if self.path else name)

        other: list[Link] = []
        if isinstance(self.memory, Recall):
            other = [self.memory]
        elif self.memory is not None:
            other = [Input(self.memory)]
        joined = DotProductAttention(
            [dense("query")],
            [*other, dense("key")],
            [*other, dense("value")],
            causal=self.causal,
            attended=self.attended,
        )
        return {"attention": (joined, dense("out"))}

    def moments_after(self, here: Site) -> Moments:
        return here.arm_moments[0]


def _checked_attended(attended: float | None) -> float | None:
    if attended is None:
        return None
    wanted = "a number above 1, or None"
    return checked_number("attended", attended, wanted, lambda n: 1.0 < n < math.inf)
