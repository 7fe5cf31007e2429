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

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, log_vector
from backmatch_optax.repeated import Walks, down_layers, up_layers
from backmatch_optax.spec.link import Site
from backmatch_optax.spec.repeat import Repeat

_MOST_POWERS = 16  # of a running product, before it becomes one number


def forward(sites: Sequence[Site], moments: Moments) -> Moments:
    """Carries the moments of the signal from the input to the output."""
    for site in sites:
        site.moments = moments
        if isinstance(site.link, Repeat):
            site.moments_out = up_layers(site, _WALKS)
        else:
            site.arm_moments = [forward(arm, moments) for arm in site.arms.values()]
            site.moments_out = site.link.moments_after(site)
        moments = site.moments_out.collapsed(_MOST_POWERS)
    return moments


def backward(
    sites: Sequence[Site],
    n: Positive,
    common: Positive | None = None,
    aligned: Positive | None = None,
) -> Positive:
    """Carries `n = m * q` from the output to the input, where `m <- m * m_z`.

    BM (37), LH (23). At each site `m` is then the mean diagonal of `J^T J` of all links
    above it with respect to the site's output. Beside it goes what share of it all
    positions have in `common`: all of it below a mean over positions. And how far it is
    `aligned` with the signal: below an activation.
    """
    for site in reversed(sites):
        site.n, site.common, site.aligned = n, common, aligned
        site.common_below = site.link.common_below(site)
        site.aligned_below = site.link.aligned_below(site)
        if isinstance(site.link, Repeat):
            n = down_layers(site, _WALKS)
        elif site.arms:
            n = _through_arms(site)
        else:
            n = n * (site.link.m_z(site) * site.q / site.moments_out.q)
        n = n.collapsed(_MOST_POWERS)
        common, aligned = (
            share and share.collapsed(_MOST_POWERS)
            for share in (site.common_below, site.aligned_below)
        )
    return n


def _through_arms(site: Site) -> Positive:
    """Arms side by side: each is handed its own curvature, and what returns adds up.

    At the top of an arm `m` becomes `m * m_arm`. Where they meet again the Gauss-Newton
    part of `(J_1 + J_2)^T (J_1 + J_2)` is left, LH (13). Where the arms are related,
    what returns is known, cross terms included.
    """
    m, returned, shares, in_common, with_signal = site.m, [], [], [], []
    for index, (arm, moments) in enumerate(
        zip(site.arms.values(), site.arm_moments, strict=True)
    ):
        top = m * site.link.m_arm(site, index) * moments.q
        common = site.link.arm_common(site, index)
        aligned = site.link.arm_aligned(site, index)
        n = backward(arm, top, common, aligned)
        if arm and arm[0].link.begins:
            continue  # at another input of the model
        returned.append(n)
        in_common.append(arm[0].common_below if arm else common)
        with_signal.append(arm[0].aligned_below if arm else aligned)
        # Of `n` times the size of the signal: what becomes of it inside the arm.
        size = math.prod(site.arm_shapes[index]) / site.size_in
        shares.append(n / top / size)
    # What is used more than once: curvatures add up (see `Memory`).
    returned += [recall.n for recall in site.recalled]
    in_common += [recall.common for recall in site.recalled]
    with_signal += [recall.aligned for recall in site.recalled]
    site.common_below = _mean_share(returned, in_common)
    site.aligned_below = _mean_share(returned, with_signal)
    if site.m_z_of_arms is not None:
        return m * site.m_z_of_arms * site.q
    # Norms must cancel here. Where every arm changes `n * size` by the same known
    # factor, so does their sum. The sum itself would be an atom that cancels nothing.
    adds_up = (
        site.link.adds_arms
        and all(moments.mean_square is None for moments in site.arm_moments)
        and len(shares) == len(site.arms)
    )
    if adds_up and all(not share.powers for share in shares):
        if len({round(share.log_constant, 9) for share in shares}) == 1:
            return site.n * shares[0] * (site.size_out / site.size_in)
    return functools.reduce(operator.add, returned)


def _mean_share(
    parts: Sequence[Positive], shares: Sequence[Positive | None]
) -> Positive | None:
    """The mean of shares over parts of a whole; None is zero."""
    known = [share for share in shares if share is not None]
    if not known or (len(known) == len(shares) == 1):
        return known[0] if known else None
    alike = {share.log_constant for share in known if not share.powers}
    if len(known) == len(shares) and len(alike) == 1:
        if not any(share.powers for share in known):
            return known[0]
    terms = [p * s for p, s in zip(parts, shares, strict=True) if s is not None]
    return functools.reduce(operator.add, terms) / functools.reduce(operator.add, parts)


def mark_centred(
    sites: Sequence[Site], above: tuple[bool, bool] = (False, False)
) -> tuple[bool, bool]:
    """Marks the sites whose cotangents sum to zero over the batch, for every unit.

    A BatchNorm takes the mean away from what passes back as it does forward, and linear
    links keep it away: cotangents are `centred`, and a kernel gets no gradient from the
    mean of its input. Behind an activation the sum of what all positions have in common
    is still zero: they are `balanced`.

    Args:
      sites: from input to output.
      above: both of what the last of them is handed.

    Returns:
      Both below the sites; below arms, what holds for all of them.
    """
    centred, balanced = above
    for site in reversed(sites):
        site.centred, site.balanced = centred, balanced
        centred, balanced = site.link.centres(site), balanced or site.link.divides
        for _ in range(_times(site)):
            marks = (centred, balanced)
            arms = [mark_centred(arm, marks) for arm in site.arms.values()]
            centred, balanced = map(all, zip(*arms, strict=True))
        centred = centred and all(recall.centred for recall in site.recalled)
        balanced = balanced and all(recall.balanced for recall in site.recalled)
    return centred, balanced


def _times(site: Site) -> int:
    """How many times the arms are walked."""
    if isinstance(site.link, Repeat):
        return site.link.n
    return bool(site.arms)


def mark_divided(sites: Sequence[Site], divided: bool = False) -> bool:
    """Marks the sites whose features a BatchNorm divides, each by its own size.

    Returns whether those below the sites are; below arms, where all of them are.
    """
    for site in reversed(sites):
        site.divided = divided
        divided = site.link.divides or (divided and site.link.featurewise)
        if isinstance(site.link, Repeat):  # what holds for all layers
            divided = divided and mark_divided(site.arms["chain"], divided)
        if site.arms:
            divided = all([mark_divided(arm, divided) for arm in site.arms.values()])
        divided = divided and all(recall.divided for recall in site.recalled)
    return divided


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


_WALKS = Walks(forward, backward, mark_centred, log_scales)
