"""Learned arrays and elementwise links, against the models that have them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from agreements import agreement, normal

import backmatch_optax as bmo
from backmatch_optax import spec

DENSE = (spec.Dense("below"), spec.Dense("above"))


class Between(nn.Module):
    """A layer between two Dense layers; positions in front of the features."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="above")(
            self.layer(self, nn.Dense(32, name="below")(x))
        )


def array(name: str, *shape: int, mean: float = 0.5) -> Any:
    return lambda module: module.param(
        name, lambda key: mean + 0.5 * jax.random.normal(key, shape)
    )


def scaled(module: Any, x: jax.Array) -> jax.Array:
    return x * array("gamma", 32)(module)


def scaled_by_one(module: Any, x: jax.Array) -> jax.Array:
    return x * array("alpha")(module)


def positions(module: Any, x: jax.Array) -> jax.Array:
    return x + array("positions", 1, 4, 32)(module)


def biased(module: Any, x: jax.Array) -> jax.Array:
    return x + array("bias", 32)(module)


def token(module: Any, x: jax.Array) -> jax.Array:
    cls = array("cls", 1, 2, 32)(module)
    return jnp.concatenate([jnp.broadcast_to(cls, (len(x), 2, 32)), x], axis=1)


CASES: dict[str, tuple[Any, spec.Link]] = {
    "layer scale": (scaled, spec.LayerScale("gamma")),
    "one scale for all": (scaled_by_one, spec.LayerScale("alpha")),
    "learned positions": (positions, spec.Bias("positions")),
    "bias": (biased, spec.Bias("bias")),
    "class token": (token, spec.ClassToken("cls")),
}


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
@pytest.mark.parametrize("name", CASES)
def test_learned_arrays_are_scaled_as_their_curvature_says(name, gains):
    layer, link = CASES[name]
    links = [DENSE[0], link, DENSE[1]]
    ratios = agreement(Between(layer), links, normal(4, 16), gains=gains)
    for path, ratio in ratios.items():
        assert 0.85 < ratio < 1.15, (path, ratio)


ACTIVATIONS: dict[str, tuple[Any, spec.Link]] = {
    name: (lambda module, x, name=name: getattr(jax.nn, name)(x), spec.Activation(name))
    for name in ("hard_sigmoid", "hard_swish", "mish")
}
ACTIVATIONS["prelu"] = (
    lambda module, x: nn.PReLU(negative_slope_init=0.4, name="slope")(x),
    spec.PReLU("slope"),
)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mean_field_gains_of_activations_are_those_of_the_model(name):
    layer, link = ACTIVATIONS[name]
    links = [DENSE[0], link, DENSE[1]]
    for path, ratio in agreement(Between(layer), links, normal(4, 16)).items():
        assert 0.85 < ratio < 1.15, (path, ratio)


def test_a_slope_that_is_learned_counts_as_one_that_is_fixed():
    # With a slope of 0 or 1 it is the ReLU, or the identity.
    def scales(link: spec.Link, slope: float) -> dict[str, float]:
        links = [spec.Dense("a"), spec.Activation("relu"), spec.Dense("b"), link]
        links += [spec.LayerNorm(), spec.Dense("c")]
        chain = spec.LayerChain(links, input_shape=(4,))
        params: Any = {name: {"kernel": jnp.eye(4)} for name in "abc"}
        if isinstance(link, spec.PReLU):
            params["slope"] = {"negative_slope": jnp.asarray(slope)}
        found = bmo.layer_scales(chain, params, gains="mean_field", normalize=False)
        return {path: float(s) for path, s in found.items() if path != "slope"}

    leaky = (
        (slope, spec.Activation("leaky_relu", negative_slope=slope))
        for slope in (0.01, 0.2, -0.5)
    )
    fixed = ((0.0, spec.Activation("relu")), (1.0, spec.Activation("identity")))
    for slope, activation in (*fixed, *leaky):
        exact = scales(activation, slope)
        assert scales(spec.PReLU("slope"), slope) == pytest.approx(exact, rel=1e-3)


def test_dropout_of_examples_is_stochastic_depth():
    links = [
        spec.Residual(
            [spec.Dense("branch"), spec.Activation("relu"), spec.Dropout(0.75)]
        ),
        DENSE[1],
    ]

    class Drawn(nn.Module):
        @nn.compact
        def __call__(self, x, kept):
            branch = nn.relu(nn.Dense(32, name="branch")(x))
            return nn.Dense(16, name="above")(x + branch * kept / 0.25)

    def draw(key: jax.Array) -> Any:
        signal, drop = jax.random.split(key)
        kept = jax.random.bernoulli(drop, 0.25, (1,))
        return jax.random.normal(signal, (32,)), kept.astype(jnp.float32)

    for path, ratio in agreement(Drawn(), links, draw, draws=1000).items():
        assert 0.8 < ratio < 1.25, (path, ratio)


@pytest.mark.parametrize(
    ("link", "shape", "message"),
    [
        (
            spec.LayerScale("array"),
            (3,),
            r"'array' .*: its array of shape \(3,\) cannot be repeated to the shape of "
            r"its input \(5, 4\)",
        ),
        (spec.Bias("array"), (2, 5, 4), r"its array of shape \(2, 5, 4\) cannot"),
        (
            spec.ClassToken("array"),
            (1, 1, 3),
            r"its array of shape \(1, 1, 3\) must have the features of an input of",
        ),
        (
            spec.Bias("module"),
            (4,),
            r"path \(='module'\) must be the array's own, 'module/inner'",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(link, shape, message):
    params = {"array": jnp.ones(shape), "module": {"inner": jnp.ones(shape)}}
    chain = spec.LayerChain([link], input_shape=(5, 4))
    with pytest.raises(ValueError, match=message):
        bmo.check_spec(chain, params, unlisted="identity")


def test_prelu_has_one_slope():
    params = {"prelu": {"negative_slope": jnp.ones(4)}}
    chain = spec.LayerChain([spec.PReLU("prelu")], input_shape=(4,))
    with pytest.raises(ValueError, match=r"expects one negative_slope.* \(4,\)"):
        bmo.check_spec(chain, params)
