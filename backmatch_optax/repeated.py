"""The two walks through the layers of a `Repeat`, as loops on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from backmatch_optax.moments import Activated, Moments
from backmatch_optax.numerics import wide
from backmatch_optax.powers import ABSENT, Positive, packed, unpacked
from backmatch_optax.spec.link import Site, every, scaled_roles


class Walks(NamedTuple):
    """The recursion itself, for the links of one layer (see `recursion`)."""

    forward: Callable[[Sequence[Site], Moments], Moments]
    backward: Callable[..., Positive]
    mark_centred: Callable[[Sequence[Site], tuple[bool, bool]], tuple[bool, bool]]
    log_scales: Callable[..., tuple[jax.Array, list[jax.Array]]]


# The carry of both loops holds a few scalars: what one layer tells the next. Inside a
# layer numbers are symbolic powers, as everywhere. In the carry each is one atom.


class _Form(NamedTuple):
    """What is known of the moments between two layers, whatever their values."""

    spread: bool
    offset: bool
    along: bool
    are_norms: bool  # so that their sums are, and have a floor
    activated: bool

    @classmethod
    def of(cls, moments: Moments) -> _Form:
        parts = (moments.variance, moments.spread, moments.offset, moments.along)
        atoms = [atom for part in parts if part is not None for atom in part.powers]
        return cls(
            moments.spread is not None,
            moments.offset is not None,
            moments.along is not None,
            all(atom.floor is not None for atom in atoms),
            moments.activated is not None,
        )

    def joined(self, other: _Form) -> _Form:
        return _Form(
            self.spread or other.spread,
            self.offset or other.offset,
            self.along or other.along,
            self.are_norms and other.are_norms,
            self.activated or other.activated,
        )


class _Elsewhere(Activated):
    """Stands for the activation that the layer before ended with.

    To read it raises: no loop can carry it.
    """

    def __iter__(self) -> Iterator[Any]:
        raise ValueError(
            "spec.Repeat: a pooling, or a residual without kernels, needs to know the "
            "activation that the layer before ended with. Put it behind the activation "
            "at the end of the layer, or declare all layers one by one."
        )

    name = property(__iter__)  # pyright: ignore


class _Carry(NamedTuple):
    """The moments between two layers: the second one, and what share each part has."""

    q: jax.Array
    shares: Sequence[jax.Array]


class _Handed(NamedTuple):
    """What a layer hands to the one below it."""

    n: jax.Array
    shares: Sequence[jax.Array | None]  # common and aligned; None is zero


class _Layer(NamedTuple):
    """The parameters of one layer, or of all, for every site in it."""

    params: Sequence[Any]
    squares: Sequence[dict[str, jax.Array]]  # squared norms, by role


class _Climbed(NamedTuple):
    """What the walk up finds out about the layers, for the walk down."""

    form: _Form
    layers: _Layer  # stacked
    entries: _Carry  # at the input of each layer, stacked
    out: Positive  # the second moment behind the last layer, one atom
    dtype: jnp.dtype  # of what is carried


def up_layers(site: Site, walks: Walks) -> Moments:
    """The moments behind the layers of a Repeat."""
    layers, floor, form = _stacked(site), site.norm_floor, _Form.of(site.moments)
    measured = [*jax.tree.leaves(layers.params), *site.moments.q.powers]
    dtype = wide(*(one.dtype for one in measured))
    found: list[_Form] = []

    def up(form: _Form, carry: _Carry, layer: _Layer) -> tuple[_Carry, _Carry]:
        moments, _ = _unpacked_moments(carry, form, floor)
        after = walks.forward(_one_layer(site, layer), moments)
        found.append(_Form.of(after))
        return _packed_moments(after, form, dtype), carry

    while True:  # what is known behind one layer is known before the next
        start = _packed_moments(site.moments, form, dtype)
        jax.eval_shape(functools.partial(up, form), start, _shapes_of_one(layers))
        after = found.pop()
        if form == form.joined(after):
            break
        form = form.joined(after)
    end, entries = jax.lax.scan(functools.partial(up, form), start, layers)
    last = form._replace(activated=after.activated)
    moments, out = _unpacked_moments(end, last, floor)
    site.climbed = _Climbed(form, layers, entries, out, dtype)
    return moments


def down_layers(site: Site, walks: Walks) -> Positive:
    """Carries `n` through the layers of a Repeat, and notes the scales of each.

    A loop walks layers of one kind: whether their cotangents are centred, and which
    power of its second moment `n` holds. The last layer may be of another kind.
    """
    climbed: _Climbed = site.climbed
    chain, dtype, floor = site.arms["chain"], climbed.dtype, site.norm_floor
    found: list[tuple[float, float | None, list[bool]]] = []

    def down(
        kind: tuple[tuple[bool, bool], float], carry: _Handed, at: Any
    ) -> tuple[_Handed, Any]:
        (n, shares), (layer, entry) = carry, at
        sites = _one_layer(site, layer)
        moments, unit = _unpacked_moments(entry, climbed.form, floor)
        walks.mark_centred(sites, kind[0])
        after = walks.forward(sites, moments)
        top = _with_factor(n, after.q, kind[1])
        below = walks.backward(
            sites, top, *(None if s is None else unpacked(s) for s in shares)
        )
        left = sites[0].common_below, sites[0].aligned_below
        (atom,) = unit.powers
        share = below / top
        static = None if share.powers else share.log_constant
        known = [share is not None for share in left]
        found.append((below.powers.get(atom, 0), static, known))
        shares = tuple(
            None if before is None else packed(after or ABSENT, dtype)
            for before, after in zip(shares, left, strict=True)
        )
        handed = _Handed(packed(below, dtype), shares)
        return handed, walks.log_scales([*scaled_roles(sites)], dtype)

    (out,) = climbed.out.powers
    kind = (site.centred, site.balanced), site.n.powers.get(out, 0)
    link: Any = site.link
    count = stop = link.n
    shares = tuple(s and packed(s, dtype) for s in (site.common, site.aligned))
    handed, runs = _Handed(packed(site.n, dtype), shares), []
    kept: float | None = 0.0  # log of the share of `n` that is left, where it is static
    while stop:
        layers = climbed.layers, climbed.entries
        jax.eval_shape(functools.partial(down, kind), handed, _shapes_of_one(layers))
        power, share, known = found.pop()
        more = tuple(
            packed(ABSENT, dtype) if new and old is None else old
            for new, old in zip(known, handed.shares, strict=True)
        )
        if any(s is not old for s, old in zip(more, handed.shares, strict=True)):
            handed = handed._replace(shares=more)
            continue
        below = walks.mark_centred(chain, kind[0]), power
        start = 0 if below == kind else stop - 1
        if stop - start < count:
            layers = jax.tree.map(lambda leaf: leaf[start:stop], layers)  # noqa: B023
        walk = functools.partial(down, kind)
        handed, logs = jax.lax.scan(walk, handed, layers, reverse=True)
        runs.insert(0, logs)
        if kept is not None:
            kept = None if share is None else kept + share * (stop - start)
        kind, stop = below, start
    _note_scales(site, *jax.tree.map(lambda *logs: jnp.concatenate(logs), *runs))
    n, shares = handed
    site.common_below, site.aligned_below = (
        None if share is None else unpacked(share) for share in shares
    )
    if kind[1]:
        return _with_factor(n, site.q, kind[1])
    # Where only constants come in, what `n` is made of may cancel further down.
    return unpacked(n) if kept is None else site.n * Positive(kept)


def _with_factor(n: jax.Array, factor: Positive, power: float) -> Positive:
    """`n`, with a power of something that it holds as a factor of its own.

    So the norm of a kernel cancels from its own scale, and its floor plays no part.
    """
    if not power:
        return unpacked(n)
    known = factor**power
    return unpacked(n - packed(known, n.dtype)) * known


def _note_scales(site: Site, single: jax.Array, stacked: Sequence[jax.Array]) -> None:
    """Keeps the logs of the scales of all layers at the sites that they belong to."""
    places = [*scaled_roles(site.arms["chain"])]
    depth = len(site.stacked) + 1
    inner = iter(stacked)
    columns = iter(jnp.moveaxis(single, -1, 0))
    for found, role in places:
        at = columns if len(found.stacked) == depth else inner
        found.log_scales[role] = next(at)


def _packed_moments(moments: Moments, form: _Form, dtype: jnp.dtype) -> _Carry:
    parts = [moments.variance] * (form.spread or form.offset)
    parts += [moments.spread] * form.spread + [moments.offset] * form.offset
    parts += [moments.along] * form.along
    q = packed(moments.q, dtype)
    shares = [packed(ABSENT if part is None else part, dtype) - q for part in parts]
    return _Carry(q, tuple(shares))


def _unpacked_moments(
    carry: _Carry, form: _Form, floor: jax.typing.ArrayLike
) -> tuple[Moments, Positive]:
    """The moments, and the second one as an atom."""
    unit, *shares = [
        unpacked(arrays, floor=floor if form.are_norms else None)
        for arrays in (carry.q, *carry.shares)
    ]
    parts = [unit * share for share in shares]
    variance = parts.pop(0) if form.spread or form.offset else unit
    spread = parts.pop(0) if form.spread else None
    offset = parts.pop(0) if form.offset else None
    moments = Moments(variance, spread, offset, along=parts.pop() if parts else None)
    if form.activated:
        elsewhere = _Elsewhere("", moments)
        moments = dataclasses.replace(moments, activated=elsewhere)
    return moments, unit


def _stacked(site: Site) -> _Layer:
    """The parameters of all layers, and the norms that their links ask for."""
    inner, depth = [*every(site.arms["chain"])], len(site.stacked) + 1

    def squares(found: Site) -> dict[str, jax.Array]:
        if found.link.owns_subtree or len(found.stacked) != depth:
            return {}
        return {role: _squares(leaf) for role, leaf in found.params.items()}

    return _Layer([dict(found.params) for found in inner], [*map(squares, inner)])


def _shapes_of_one(layers: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers
    )


@jax.jit  # traced once for every shape
def _squares(stack: jax.Array) -> jax.Array:
    entries = stack.astype(wide(stack.dtype))
    return jnp.sum(jnp.square(entries), axis=tuple(range(1, stack.ndim)))


def _one_layer(site: Site, layer: _Layer) -> list[Site]:
    """The sites of one layer of a Repeat."""
    given = zip(layer.params, layer.squares, strict=True)

    def bound(found: Site) -> Site:
        params, squares = next(given)
        return dataclasses.replace(
            found,
            # In their own order: JAX sorts the keys of what a loop is given.
            params={role: params[role] for role in found.params},
            squares=squares,
            stacked=found.stacked[1:],
            arms={name: [*map(bound, arm)] for name, arm in found.arms.items()},
            log_scales={},
            _known={},
        )

    return [*map(bound, site.arms["chain"])]
