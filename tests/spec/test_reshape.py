"""Links that put coordinates elsewhere, against Jacobians and whole models."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreements import agreement, normal

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.powers import number


def m_z(link: spec.Link, input_shape: tuple[int, ...]) -> float:
    """What the chain takes for the input curvature of a link."""
    below = spec.Block("below", weight_curvature=1.0, input_curvature=1.0)
    chain = spec.LayerChain([below, link], input_shape=input_shape)
    params = {"below": {"kernel": jnp.ones(1)}}
    scales = bmo.layer_scales(chain, params, normalize=False)
    return 1 / float(scales["below"])


LINKS: dict[str, tuple[spec.Link, Any, tuple[int, ...]]] = {
    "reshape": (
        spec.Reshape((-1, 4)),
        lambda x: x.reshape((1, 6, 4)),
        (3, 8),
    ),
    "transpose": (
        spec.Transpose((2, 0, 1)),
        lambda x: x.transpose((0, 3, 1, 2)),
        (3, 4, 5),
    ),
    "index": (spec.Slice(0), lambda x: x[:, 0], (5, 3)),
    "index from the end": (spec.Slice(-1, axis=-3), lambda x: x[:, -1], (5, 2, 3)),
    "features": (
        spec.Slice((2, None), axis=-1),
        lambda x: x[..., 2:],
        (4, 6),
    ),
    "strides": (spec.Slice((None, None, 2)), lambda x: x[:, ::2], (5, 3)),
    "nearest": (
        spec.Resize((6, 8)),
        lambda x: jax.image.resize(x, (1, 6, 8, 2), "nearest"),
        (3, 4, 2),
    ),
    "nearest, not a multiple": (
        spec.Resize((7,)),
        lambda x: jax.image.resize(x, (1, 7, 2), "nearest"),
        (3, 2),
    ),
    "bilinear": (
        spec.Resize((6, 8), method="bilinear"),
        lambda x: jax.image.resize(x, (1, 6, 8, 2), "bilinear"),
        (3, 4, 2),
    ),
    "linear, not a multiple": (
        spec.Resize((7,), method="linear"),
        lambda x: jax.image.resize(x, (1, 7, 2), "linear"),
        (3, 2),
    ),
    "linear, downsampling": (
        spec.Resize((3, 2), method="linear"),
        lambda x: jax.image.resize(x, (1, 3, 2, 2), "linear"),
        (7, 8, 2),
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_input_curvatures_and_shapes_are_exact(name):
    link, function, input_shape = LINKS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, *input_shape)))
    jacobian = jax.jacrev(function)(x)
    assert m_z(link, input_shape) == pytest.approx(
        float(jnp.sum(jacobian**2)) / x.size, rel=1e-5
    )
    assert link.shape_after(input_shape, {}) == function(x).shape[1:]
    assert eval(repr(link)) == link


class Mixer(nn.Module):
    """Patches of an image, mixed along tokens and features, then upsampled."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape((len(x), 2, 2, 2, 2, 3)).transpose((0, 1, 3, 2, 4, 5))
        x = nn.Dense(16, name="patches")(x.reshape((len(x), 4, 12)))
        y = nn.relu(nn.Dense(24, name="a")(x.transpose((0, 2, 1))))
        x = x + nn.Dense(4, name="b")(y).transpose((0, 2, 1))
        x = x + nn.Dense(16, name="d")(nn.relu(nn.Dense(32, name="c")(x)))
        x = x.reshape((len(x), 2, 2, 16))
        x = jax.image.resize(x, (len(x), 3, 4, 16), "nearest")
        # Pixel shuffle.
        x = nn.relu(nn.Dense(16, name="e")(x)).reshape((len(x), 3, 4, 2, 2, 4))
        x = x.transpose((0, 1, 3, 2, 4, 5)).reshape((len(x), 6, 8, 4))
        return nn.Dense(6, name="head")(x[:, 1:, 3])


RELU = spec.Activation("relu")
MIXER = [
    spec.Reshape((2, 2, 2, 2, 3)),
    spec.Transpose((0, 2, 1, 3, 4)),
    spec.Reshape((4, 12)),
    spec.Dense("patches"),
    spec.Residual(
        [
            spec.Transpose((1, 0)),
            spec.Dense("a"),
            RELU,
            spec.Dense("b"),
            spec.Transpose((1, 0)),
        ]
    ),
    spec.Residual([spec.Dense("c"), RELU, spec.Dense("d")]),
    spec.Reshape((2, 2, 16)),
    spec.Resize((3, 4)),
    spec.Dense("e"),
    RELU,
    spec.Reshape((3, 4, 2, 2, 4)),
    spec.Transpose((0, 2, 1, 3, 4)),
    spec.Reshape((6, 8, 4)),
    spec.Slice((1, None), axis=-3),
    spec.Slice(3),
    spec.Dense("head"),
]


class Interpolated(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="below", use_bias=False)(x)
        x = jax.image.resize(x, (len(x), 7, 16), "linear")
        return nn.Dense(8, name="above", use_bias=False)(x)


INTERPOLATED = [
    spec.Dense("below"),
    spec.Resize((7,), method="linear"),
    spec.Dense("above"),
]


@pytest.mark.parametrize(
    ("model", "links", "input_shape"),
    [(Mixer(), MIXER, (4, 4, 3)), (Interpolated(), INTERPOLATED, (3, 16))],
)
def test_models_are_scaled_as_their_jacobians_say(model, links, input_shape):
    ratios = agreement(model, links, normal(*input_shape), draws=300)
    for path, ratio in ratios.items():
        assert 0.75 < ratio < 1.3, (path, ratio)


def test_means_of_units_become_variance_where_units_are_mixed():
    # Each of 6 units has a mean of its own. Two new ones are made of three old ones.
    def spread(link: spec.Link, input_shape: tuple[int, ...]) -> float:
        site = spec.Site(
            link, "", input_shape, link.shape_after(input_shape, {}), {}, {}
        )
        site.moments = spec.Moments(number(1.0), spread=number(1.0))
        after = link.moments_after(site)
        assert math.exp(after.q.log_constant) == pytest.approx(2.0)
        assert after.spread is not None
        return math.exp(after.spread.log_constant)

    means = np.random.default_rng(0).normal(size=(20000, 6))
    for shape in ((8, 3), (4, 6), (2, 12), (6, 4)):
        # The same at all four positions, and the mean over the new positions.
        mixed = np.tile(means, (1, 4)).reshape((-1, *shape)).mean(axis=1)
        expected = np.mean(mixed**2)
        assert spread(spec.Reshape(shape), (4, 6)) == pytest.approx(expected, rel=0.05)
    assert spread(spec.Transpose((1, 0)), (4, 6)) == pytest.approx(1 / 6)
    assert spread(spec.Transpose((1, 0, 2)), (4, 3, 6)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: spec.Reshape((-1, -1)), r"shape \(=\(-1, -1\)\) must be a sequence"),
        (lambda: spec.Reshape(7), r"shape \(=7\) must be a sequence"),  # pyright: ignore
        (lambda: spec.Transpose((1, 2)), r"axes \(=\(1, 2\)\) must be a permutation"),
        (lambda: spec.Slice("a"), r"index \(='a'\) must be an int"),  # pyright: ignore
        (lambda: spec.Slice((0, 1, 0)), r"index \(=\(0, 1, 0\)\) must be an int"),
        (lambda: spec.Slice(0, axis=1), r"axis \(=1\) must be a negative int"),
        (
            lambda: spec.Slice(2, axis=-1),
            r"axis -1 holds the features; \(2, 3\) keeps it",
        ),
        (
            lambda: spec.Resize((4,), method="cubic"),
            r"method \(='cubic'\) must be one of 'nearest', 'linear', 'bilinear'",
        ),
    ],
)
def test_construction_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (
            spec.Reshape((3, -1)),
            r"shape \(=\(3, -1\)\) does not have the 20",
        ),
        (spec.Transpose((0, 2, 1)), r"are 3, but its input has 2"),
        (spec.Slice(5), r"index \(=5\) is outside of axis -2 of its input of shape"),
        (spec.Slice((5, 9)), r"index \(=\(5, 9\)\) leaves nothing of axis -2"),
        (spec.Slice(0, axis=-3), r"axis \(=-3\) does not exist in its input"),
        (spec.Resize((4, 4)), r"has 2 axes of positions, but its input has 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(link, message):
    with pytest.raises(ValueError, match=message):
        bmo.check_spec(spec.LayerChain([link], input_shape=(5, 4)), {})
