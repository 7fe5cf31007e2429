"""The whole theory: one walk up, one walk down (LH Algorithm 2, BM Algorithm 1)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive
from backmatch_optax.spec.link import Site


def forward(sites: Sequence[Site], moments: Moments) -> Moments:
    """Carries the moments of the signal from the input to the output."""
    for site in sites:
        site.moments = moments
        site.arm_moments = [forward(arm, moments) for arm in site.arms.values()]
        moments = site.link.moments_after(site)
    return moments


def backward(sites: Sequence[Site], m: Positive) -> Positive:
    """Carries the backward factor `m` from the output to the input: `m <- m * m_z`.

    BM (37), LH (23). At each site `m` is then the mean diagonal of `J^T J` of all links
    above it with respect to the site's output.
    """
    for site in reversed(sites):
        site.m = m
        if site.arms:
            m = functools.reduce(
                operator.add, (backward(arm, m) for arm in site.arms.values())
            )
        else:
            m = m * site.link.m_z(site)
    return m


def mark_centred(sites: Sequence[Site], centred: bool = False) -> bool:
    """Marks the sites whose cotangents sum to zero over the batch, for every unit.

    A BatchNorm takes the mean away from what passes back as it does forward, and linear
    links keep it away. To a kernel there, the constant part of its input is nothing.
    Returns whether those below the sites do; below arms, where all of them do.
    """
    for site in reversed(sites):
        site.centred = centred
        arms = [mark_centred(arm, centred) for arm in site.arms.values()]
        centred = all(arms) if arms else site.link.centres(centred)
    return centred


def scale(site: Site, role: str) -> Positive:
    """What multiplies the gradient of a parameter: `1 / (m * m_W)`, LH (22)."""
    return 1.0 / (site.m * site.link.m_W(site, role))
