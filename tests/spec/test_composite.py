"""Links made of others: concatenation and gates."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from agreements import agreement, normal

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.activations import after_activation
from backmatch_optax.moments import beside
from backmatch_optax.powers import number

RELU = spec.Activation("relu")


class Dense(nn.Module):
    """Any model of named Dense layers, written as a function of them."""

    function: Any

    @nn.compact
    def __call__(self, x):
        return self.function(
            lambda name, features, x: nn.Dense(features, name=name)(x), x
        )


def concatenated(dense: Any, x: jax.Array) -> jax.Array:
    x = dense("below", 24, x)
    arms = [x, nn.relu(dense("a", 40, x)), dense("b2", 8, nn.relu(dense("b1", 16, x)))]
    return dense("above", 12, jnp.concatenate(arms, axis=-1))


CONCATENATED = [
    spec.Dense("below"),
    spec.Concatenate(
        [
            [],
            [spec.Dense("a"), RELU],
            [spec.Dense("b1"), RELU, spec.Dense("b2")],
        ]
    ),
    spec.Dense("above"),
]


def positions(dense: Any, x: jax.Array) -> jax.Array:
    x = dense("below", 16, x)
    x = jnp.concatenate([nn.relu(dense("a", 20, x)), dense("b", 20, x)], axis=-2)
    return dense("above", 12, x)


POSITIONS = [
    spec.Dense("below"),
    spec.Concatenate([[spec.Dense("a"), RELU], [spec.Dense("b")]], axis=-2),
    spec.Dense("above"),
]


def swiglu(dense: Any, x: jax.Array) -> jax.Array:
    x = dense("below", 32, x)
    return dense("down", 16, dense("up", 48, x) * nn.silu(dense("gate", 48, x)))


SWIGLU = [
    spec.Dense("below"),
    spec.Gate([spec.Dense("up")], [spec.Dense("gate"), spec.Activation("silu")]),
    spec.Dense("down"),
]


def squeeze_excite(dense: Any, x: jax.Array) -> jax.Array:
    x = dense("below", 32, x)
    gate = nn.relu(dense("reduce", 24, x.mean(axis=(-3, -2))))
    gate = nn.sigmoid(dense("expand", 32, gate))
    return dense("above", 8, x * gate[..., None, None, :])


SQUEEZE_EXCITE = [
    spec.Dense("below"),
    spec.Gate(
        [],
        [
            spec.GlobalAvgPool(),
            spec.Dense("reduce"),
            RELU,
            spec.Dense("expand"),
            spec.Activation("sigmoid"),
        ],
    ),
    spec.Dense("above"),
]


@pytest.mark.parametrize(
    ("function", "links", "input_shape"),
    [
        (concatenated, CONCATENATED, (32,)),
        (positions, POSITIONS, (4, 16)),
        (swiglu, SWIGLU, (32,)),
        (squeeze_excite, SQUEEZE_EXCITE, (2, 2, 16)),
    ],
)
def test_scales_of_arms_are_those_of_the_model(function, links, input_shape):
    for path, ratio in agreement(Dense(function), links, normal(*input_shape)).items():
        assert 0.8 < ratio < 1.25, (path, ratio)


def test_norms_inside_a_concatenation_cancel_as_in_a_chain():
    # With a normalisation above every kernel of an arm, a kernel that is 1e15 times as
    # large changes its own scale alone, exactly.
    def scales(size: float) -> dict[str, float]:
        arms = [[], [spec.Dense("a"), spec.BatchNorm()]]
        links = [spec.Dense("below"), spec.Concatenate(arms), spec.BatchNorm()]
        chain = spec.LayerChain([*links, spec.Dense("above")], input_shape=(4,))
        shapes = {"below": (4, 4), "a": (4, 8), "above": (12, 2)}
        params: Any = {name: {"kernel": jnp.ones(s)} for name, s in shapes.items()}
        params["a"]["kernel"] *= size
        return {
            p: float(s)
            for p, s in bmo.layer_scales(chain, params, normalize=False).items()
        }

    small, large = scales(1.0), scales(1e15)
    assert large["below"] == small["below"]
    assert large["above"] == small["above"]
    assert large["a"] == pytest.approx(small["a"] * 1e30, rel=1e-4)


@pytest.mark.parametrize("units", [True, False])
def test_moments_side_by_side_add_up_and_keep_their_activation(units):
    whitened = spec.Moments(number(1.0))
    relu, _ = after_activation("relu", whitened)
    joined = beside([relu, relu], [0.5, 0.5], units)
    assert math.exp(joined.q.log_constant) == pytest.approx(0.5)
    assert joined.offset is not None and relu.offset is not None
    assert joined.offset.log_constant == pytest.approx(relu.offset.log_constant)
    assert joined.activated is not None and joined.activated.name == "relu"
    # Half of the units have a mean, so that of all is half as large.
    half = beside([relu, whitened], [0.5, 0.5], units)
    assert math.exp(half.q.log_constant) == pytest.approx(0.75)
    assert half.offset is not None and half.activated is None
    assert half.offset.log_constant == pytest.approx(
        relu.offset.log_constant - math.log(4)
    )
    # The rest sets units apart, or positions of one unit.
    assert (half.spread is None) != units


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: spec.Concatenate([]), r"branches must be a sequence of chains"),
        (
            lambda: spec.Concatenate([spec.Dense("a")]),  # pyright: ignore
            r"branches\[0\] must be a sequence of links",
        ),
        (lambda: spec.Concatenate([[]], axis=1), r"axis \(=1\) must be a negative int"),
        (lambda: spec.Gate([], 3), r"gate must be a sequence"),  # pyright: ignore
    ],
)
def test_construction_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (
            spec.Concatenate([[], [spec.Flatten()]]),
            r"may differ along axis -1 alone, but: branches\[0\] \(2, 4\), "
            r"branches\[1\] \(8,\)",
        ),
        (
            spec.Concatenate([[spec.Flatten()], [spec.Flatten()]], axis=-2),
            r"its branches have no axis -2: branches\[0\] \(8,\)",
        ),
        (
            spec.Gate([], [spec.Flatten()]),
            r"its gate of shape \(8,\) cannot be repeated to its branch's \(2, 4\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(link, message):
    with pytest.raises(ValueError, match=message):
        bmo.check_spec(spec.LayerChain([link], input_shape=(2, 4)), {})
