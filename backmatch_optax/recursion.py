r"""The theory: one walk up, one walk down, one number for each layer.

BM is Zhang, Chen and Liu, "Train Feedforward Neural Network with Layer-wise Adaptive
Rate via Approximating Back-matching Propagation", arXiv 1802.09750. LH is theirs, "On
the Local Hessian in Back-propagation", NeurIPS 2018.

**The question.** Of a loss LH (1), back-propagation hands a layer `b = f(W, a)` the
gradients `J_a^T db` (BM (3)) and `J_W^T db` (BM (4)). Back-matching asks which change
of the weight, or of the input, makes the wanted change `db` of the output. The answer
is a least-squares problem for each (BM (8), (11), LH (2) to (5), (20), (21)), and its
solution divides the gradient by the matrix `J^T J`:

    d'a = (J_a^T J_a)^-1 J_a^T db       BM (12), (14); of BatchNorm BM (26)
    d'W = (E J_W^T J_W)^-1 J_W^T db     BM (13), (15)

LH (6) calls the two matrices the layer's local Hessians. Both papers then replace a
matrix by a number, the mean of its diagonal:

    m_z = mean diagonal of J_a^T J_a    BM (34), (35), (36), LH (24)
    m_W = mean diagonal of J_W^T J_W    BM (32), (33)

**The recursion** (BM (37) and Algorithm 1, LH (22), (23) and Algorithm 2). What arrives
at a layer was divided by none of the numbers above it. Their product is the backward
factor `m`, 1 at the output:

    scale(W) = 1 / (m * m_W)            LH (22): what multiplies the gradient of W
    m       <- m * m_z                  LH (23): handed on to the layer below

**What is conserved.** `m_W` grows with the second moment `q` of a layer's input, so a
forward walk carries `q`. A Dense layer with `F = ||W||_F^2` multiplies `q` by `F / out`
on the way up, and `m` by `F / in` on the way down. So the product `n = m * q` changes
by `out / in`, and `n` times the size of the signal does not change at all. The same
holds for convolutions, max-pooling, activations and normalisations. With one constant
`N = n * size` for a whole chain,

    scale(W) = ||W||_F^2 / N

for every kernel. `backward` therefore carries `n` instead of `m`: its norms cancel
inside one link, where they can be seen, and not over a thousand layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from backmatch_optax.moments import Activated, Moments
from backmatch_optax.numerics import wide
from backmatch_optax.powers import (
    ABSENT,
    Packed,
    Positive,
    log_vector,
    packed,
    unpacked,
)
from backmatch_optax.spec.link import Site
from backmatch_optax.spec.repeat import Repeat

_MOST_POWERS = 16  # of a running product, before it becomes one number


def forward(sites: Sequence[Site], moments: Moments) -> Moments:
    """Carries the moments of the signal from the input to the output."""
    for site in sites:
        site.moments = moments
        if isinstance(site.link, Repeat):
            site.moments_out = _up_layers(site)
        else:
            site.arm_moments = [forward(arm, moments) for arm in site.arms.values()]
            site.moments_out = site.link.moments_after(site)
        moments = site.moments_out.collapsed(_MOST_POWERS)
    return moments


def backward(sites: Sequence[Site], n: Positive) -> Positive:
    """Carries `n = m * q` from the output to the input, where `m <- m * m_z`.

    BM (37), LH (23). At each site `m` is then the mean diagonal of `J^T J` of all links
    above it with respect to the site's output.
    """
    for site in reversed(sites):
        site.n = n
        if isinstance(site.link, Repeat):
            n = _down_layers(site)
        elif site.arms:
            n = _through_arms(site)
        else:
            n = n * (site.link.m_z(site) * site.q / site.moments_out.q)
        n = n.collapsed(_MOST_POWERS)
    return n


def _through_arms(site: Site) -> Positive:
    """Arms side by side: each is handed its own curvature, and what returns adds up.

    At the top of an arm `m` becomes `m * m_arm`. Where they meet again the Gauss-Newton
    part of `(J_1 + J_2)^T (J_1 + J_2)` is left, LH (13). Where the arms are related,
    what returns is known, cross terms included.
    """
    m, returned, shares = site.m, [], []
    for index, (arm, moments) in enumerate(
        zip(site.arms.values(), site.arm_moments, strict=True)
    ):
        top = m * site.link.m_arm(site, index) * moments.q
        n = backward(arm, top)
        if arm and arm[0].link.begins:
            continue  # at another input of the model
        returned.append(n)
        # Of `n` times the size of the signal: what becomes of it inside the arm.
        size = math.prod(site.arm_shapes[index]) / site.size_in
        shares.append(n / top / size)
    if site.m_z_of_arms is not None:
        return m * site.m_z_of_arms * site.q
    # Where all arms keep the same share, that is the share of the whole.
    adds_up = (
        site.link.adds_arms
        and all(moments.mean_square is None for moments in site.arm_moments)
        and len(shares) == len(site.arms)
    )
    if adds_up and all(not share.powers for share in shares):
        if len({round(share.log_constant, 9) for share in shares}) == 1:
            return site.n * shares[0] * (site.size_out / site.size_in)
    return functools.reduce(operator.add, returned)


def mark_centred(sites: Sequence[Site], centred: bool = False) -> bool:
    """Marks the sites whose cotangents sum to zero over the batch, for every unit.

    A BatchNorm takes the mean away from what passes back as it does forward, and linear
    links keep it away. A kernel there gets no gradient from the mean of its input.
    Returns whether those below the sites do; below arms, where all of them do.
    """
    for site in reversed(sites):
        site.centred = centred
        centred = site.link.centres(centred)
        for _ in range(_times(site)):
            centred = all([mark_centred(arm, centred) for arm in site.arms.values()])
    return centred


def _times(site: Site) -> int:
    """How many times the arms are walked."""
    if isinstance(site.link, Repeat):
        return site.link.n
    return bool(site.arms)


def every(sites: Sequence[Site]) -> Iterator[Site]:
    """The sites and those inside them, input to output."""
    for site in sites:
        yield site
        for arm in site.arms.values():
            yield from every(arm)


def scaled_roles(sites: Sequence[Site]) -> Iterator[tuple[Site, str]]:
    """Site and role of all that has a scale; a Block is one, with the role ""."""
    for site in every(sites):
        if site.params and site.link.owns_subtree:
            yield site, ""
        else:
            yield from ((site, role) for role in site.params)


def scale(site: Site, role: str) -> Positive:
    """What multiplies the gradient of a parameter: `1 / (m * m_W)`, LH (22).

    The curvatures of a parameter that is used more than once add up (see `Tied`).
    """
    curvatures = [
        use.n * use.link.m_W(use, role) / use.moments_out.q
        for use in site.uses or [site]
    ]
    return 1.0 / functools.reduce(operator.add, curvatures)


def log_scales(
    places: Sequence[tuple[Site, str]], dtype: jnp.dtype
) -> tuple[jax.Array, list[jax.Array]]:
    """The logs of scales: those of single layers, and those of stacked parameters.

    Args:
      places: sites and roles.
      dtype: that of the logs.

    Returns:
      A vector, and an array for each parameter inside a `Repeat`; each in order.
    """
    single = [scale(site, role) for site, role in places if not site.stacked]
    stacked = [site.log_scales[role] for site, role in places if site.stacked]
    logs = log_vector(single, dtype, floored=True)
    return logs, [array.astype(dtype) for array in stacked]


# --- The layers of a Repeat ----------------------------------------------------------

# The carry of both loops holds a few scalars: what one layer tells the next. Inside a
# layer numbers are symbolic powers, as everywhere. In the carry each is one atom.


class _Form(NamedTuple):
    """What is known of the moments between two layers, whatever their values."""

    spread: bool
    offset: bool
    are_norms: bool  # so that their sums are, and have a floor
    activated: bool

    @classmethod
    def of(cls, moments: Moments) -> _Form:
        parts = (moments.variance, moments.spread, moments.offset)
        atoms = [atom for part in parts if part is not None for atom in part.powers]
        return cls(
            moments.spread is not None,
            moments.offset is not None,
            all(atom.floor is not None for atom in atoms),
            moments.activated is not None,
        )

    def joined(self, other: _Form) -> _Form:
        return _Form(
            self.spread or other.spread,
            self.offset or other.offset,
            self.are_norms and other.are_norms,
            self.activated or other.activated,
        )


class _Elsewhere(Activated):
    """The activation that the layer before ended with, which no loop can carry."""

    def __iter__(self) -> Iterator[Any]:
        raise ValueError(
            "spec.Repeat: a pooling, or a residual without kernels, needs to know the "
            "activation that the layer before ended with. Put it behind the activation "
            "at the end of the layer, or declare all layers one by one."
        )

    name = property(__iter__)  # pyright: ignore


class _Carry(NamedTuple):
    """The moments between two layers: the second one, and what share each part has."""

    q: Packed
    shares: Sequence[Packed]


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


def _up_layers(site: Site) -> Moments:
    """The moments behind the layers of a Repeat."""
    layers, floor, form = _stacked(site), site.norm_floor, _Form.of(site.moments)
    logs = [atom.pair[0] for atom in site.moments.q.powers]
    leaves = jax.tree.leaves(layers.params)
    dtype = jnp.result_type(wide(*(leaf.dtype for leaf in leaves)), *logs)
    found: list[_Form] = []

    def up(form: _Form, carry: _Carry, layer: _Layer) -> tuple[_Carry, _Carry]:
        moments, _ = _unpacked_moments(carry, form, floor)
        after = forward(_one_layer(site, layer), moments)
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


def _down_layers(site: Site) -> Positive:
    """Carries `n` through the layers of a Repeat, and notes the scales of each.

    A loop walks layers of one kind: whether their cotangents are centred, and which
    power of its second moment `n` holds. The last layer may be of another kind.
    """
    climbed: _Climbed = site.climbed
    chain, dtype, floor = site.arms["chain"], climbed.dtype, site.norm_floor
    found: list[tuple[float, float | None]] = []

    def down(kind: tuple[bool, float], n: Packed, at: Any) -> tuple[Packed, Any]:
        layer, entry = at
        sites = _one_layer(site, layer)
        moments, unit = _unpacked_moments(entry, climbed.form, floor)
        mark_centred(sites, kind[0])
        after = forward(sites, moments)
        top = _with_factor(n, after.q, kind[1])
        below = backward(sites, top)
        (atom,) = unit.powers
        share = below / top
        static = None if share.powers else share.log_constant
        found.append((below.powers.get(atom, 0), static))
        return packed(below, dtype), log_scales([*scaled_roles(sites)], dtype)

    (out,) = climbed.out.powers
    kind = site.centred, site.n.powers.get(out, 0)
    count = stop = _times(site)
    n, runs = packed(site.n, dtype), []
    kept: float | None = 0.0  # log of the share of `n` that is left, where it is static
    while stop:
        layers = climbed.layers, climbed.entries
        jax.eval_shape(functools.partial(down, kind), n, _shapes_of_one(layers))
        power, share = found.pop()
        below = mark_centred(chain, kind[0]), power
        start = 0 if below == kind else stop - 1
        if stop - start < count:
            layers = jax.tree.map(lambda leaf: leaf[start:stop], layers)  # noqa: B023
        n, logs = jax.lax.scan(functools.partial(down, kind), n, layers, reverse=True)
        runs.insert(0, logs)
        if kept is not None:
            kept = None if share is None else kept + share * (stop - start)
        kind, stop = below, start
    _note_scales(site, *jax.tree.map(lambda *logs: jnp.concatenate(logs), *runs))
    if kind[1]:
        return _with_factor(n, site.q, kind[1])
    # Where only constants come in, what `n` is made of may cancel further down.
    return unpacked(n) if kept is None else site.n * Positive(kept)


def _with_factor(n: Packed, factor: Positive, power: float) -> Positive:
    """`n`, with a power of something that it holds as a factor of its own.

    So the norm of a kernel cancels from its own scale, and its floor plays no part.
    """
    if not power:
        return unpacked(n)
    known = factor**power
    held = packed(known, n.pair[0].dtype)
    return unpacked(jax.tree.map(operator.sub, n, held)) * known


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
    parts = []
    if form.spread or form.offset:
        parts = [moments.variance]
        parts += [moments.spread] * form.spread + [moments.offset] * form.offset
    q = packed(moments.q, dtype)
    shares = [
        jax.tree.map(operator.sub, packed(ABSENT if part is None else part, dtype), q)
        for part in parts
    ]
    return _Carry(q, tuple(shares))


def _unpacked_moments(
    carry: _Carry, form: _Form, floor: jax.typing.ArrayLike
) -> tuple[Moments, Positive]:
    """The moments, and the second one as an atom."""
    unit, *shares = [
        unpacked(arrays, floor=floor if form.are_norms else None)
        for arrays in (carry.q, *carry.shares)
    ]
    variance, *means = [unit * share for share in shares] or [unit]
    spread = means.pop(0) if form.spread else None
    offset = means.pop(0) if form.offset else None
    moments = Moments(variance, spread, offset)
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
