"""Normalisations against the Jacobians of Flax's."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import (
    RTOL,
    curvatures,
    distinct,
    layer_and_params,
    measured,
    signs,
)

import backmatch_optax as bmo
from backmatch_optax import spec

# Batch normalisation.


@pytest.mark.parametrize("roles", ["scale bias", "scale", "bias"])
@pytest.mark.parametrize("input_shape", [(4,), (5, 4)])
def test_scale_and_bias_of_batch_norm_act_at_every_position(input_shape, roles):
    layer = nn.BatchNorm(
        use_running_average=False,
        use_scale="scale" in roles,
        use_bias="bias" in roles,
        epsilon=0.0,
    )
    x = 3 * distinct(16, *input_shape) + 1
    _, params = layer_and_params(layer, x)

    def apply(params, x):
        return layer.apply({"params": params}, x, mutable=["batch_stats"])[0]

    found = measured(apply, params, x)
    rule = curvatures(spec.BatchNorm("layer"), params, input_shape)
    for role in roles.split():
        np.testing.assert_allclose(rule[role], found[role], rtol=1e-4)


@pytest.mark.parametrize("roles", ["scale bias", "scale", "bias", ""])
@pytest.mark.parametrize("input_shape", [(4,), (5, 4)])
def test_batch_norm_divides_its_input_by_a_constant_deviation(input_shape, roles):
    # The paper holds the statistics of the batch constant (BM (36)), as Flax does when
    # it evaluates; the variance is the moment that enters.
    variance = 2.5
    layer = nn.BatchNorm(
        use_running_average=True,
        use_scale="scale" in roles,
        use_bias="bias" in roles,
        epsilon=0.0,
    )
    x = distinct(1, *input_shape)
    _, params = layer_and_params(layer, x)
    stats = {"mean": jnp.zeros(4), "var": jnp.full(4, variance)}

    def apply(params, x):
        return layer.apply({"params": params, "batch_stats": stats}, x)

    link = spec.BatchNorm("layer" if roles else None)
    rule = curvatures(link, params, input_shape, moment=variance)
    found = measured(apply, params, x)
    np.testing.assert_allclose(rule["input"], found["input"], rtol=RTOL)


@pytest.mark.parametrize("roles", ["scale bias", "scale", "bias", ""])
def test_batch_norm_hands_on_the_second_moment_that_it_really_has(roles):
    layer = nn.BatchNorm(
        use_running_average=False,
        use_scale="scale" in roles,
        use_bias="bias" in roles,
        epsilon=0.0,
    )
    x = 3 * distinct(64, 4) + 1
    _, params = layer_and_params(layer, x)
    output, _ = layer.apply({"params": params}, x, mutable=["batch_stats"])
    link = spec.BatchNorm("norm" if roles else None)
    chain = spec.LayerChain([link, spec.Dense("above")], input_shape=(4,))
    tree = {"norm": params, "above": {"kernel": jnp.ones((4, 1))}}
    scales = bmo.layer_scales(
        chain, tree if roles else {"above": tree["above"]}, normalize=False
    )
    moment = float(jnp.mean(jnp.square(output)))
    np.testing.assert_allclose(1 / float(scales["above"]), moment, rtol=1e-4)


# The other normalisations, each over the 64 features of one example.

NORMALISATIONS: dict[str, Any] = {
    "layer": (spec.LayerNorm, nn.LayerNorm(epsilon=0.0)),
    "group": (
        functools.partial(spec.GroupNorm, num_groups=2),
        nn.GroupNorm(num_groups=2, epsilon=0.0),
    ),
    "rms": (spec.RMSNorm, nn.RMSNorm(epsilon=0.0)),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations_over_features_divide_by_the_size_of_the_signal(name):
    # The statistics of an example move with its 64 entries, the rule holds them
    # constant: a difference of a few times 1 / 64.
    link, layer = NORMALISATIONS[name]
    x = np.sqrt(2.5) * signs(1, 3, 64)
    apply, params = layer_and_params(layer, x)
    rule = curvatures(link("layer"), params, (3, 64), moment=2.5)
    found = measured(apply, params, x)
    assert set(rule) == set(found)
    for role, value in found.items():
        np.testing.assert_allclose(rule[role], value, rtol=0.1, err_msg=role)


def test_small_groups_take_the_means_of_units_away_as_a_batch_norm_does():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)) / 8**0.5)
    params = {name: {"kernel": kernel} for name in ("a", "b", "c")}

    def scale(norm: spec.Link) -> float:
        links = [spec.Dense("a"), spec.Activation("relu"), spec.Dense("b")]
        chain = spec.LayerChain([*links, norm, spec.Dense("c")], input_shape=(4, 8))
        return float(
            bmo.layer_scales(chain, params, gains="mean_field", normalize=False)["a"]
        )

    # A group of one unit leaves no mean, one of g units all but a g-th of its square.
    batch, whole = (scale(n(epsilon=0)) for n in (spec.BatchNorm, spec.LayerNorm))
    groups = {n: scale(spec.GroupNorm(num_groups=n, epsilon=0)) for n in (8, 4, 2, 1)}
    np.testing.assert_allclose(groups[8], batch, rtol=1e-6)
    assert batch < whole
    for number, found in groups.items():
        kept = 1 - number / 8
        np.testing.assert_allclose(found - batch, kept * (whole - batch), rtol=1e-5)


# Epsilons. They are added to the variance, of which little is left after small kernels.

SMALL = {"far above": 3e-2, "as large": 1e-3, "far below": 1e-6}
EPSILON = 1e-3


def epsilon_case(name: str, moment: float) -> tuple[spec.Link, Any, Any, jax.Array]:
    """A link with an epsilon, the layer as a function, parameters and an input."""
    if name == "batch":
        layer: Any = nn.BatchNorm(use_running_average=True, epsilon=EPSILON)
        x = distinct(1, 3, 64)
        stats = {"mean": jnp.zeros(64), "var": jnp.full(64, moment)}
        params = layer_and_params(layer, x)[1]
        variables = {"batch_stats": stats}
        link: spec.Link = spec.BatchNorm("layer", epsilon=EPSILON)
    else:
        make, layer = NORMALISATIONS[name]
        layer = layer.clone(epsilon=EPSILON)
        x = np.sqrt(moment) * signs(1, 3, 64)
        params = layer_and_params(layer, x)[1]
        variables = {}
        link = make("layer", epsilon=EPSILON)
    return link, lambda p, x: layer.apply({"params": p, **variables}, x), params, x


@pytest.mark.parametrize("moment", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("name", ["batch", *NORMALISATIONS])
def test_epsilon_counts_with_mean_field_gains(name, moment):
    link, apply, params, x = epsilon_case(name, moment)
    rule = curvatures(link, params, x.shape[1:], moment=moment, gains="mean_field")
    found = measured(apply, params, x)
    tolerance = 1e-4 if name == "batch" else 0.1  # whose statistics are constant
    assert rule["input"] == pytest.approx(found["input"], rel=tolerance)
    if name != "batch":  # where x has another moment than the running one
        assert rule["scale"] == pytest.approx(found["scale"], rel=tolerance)
    # What it hands on is what a layer above meets.
    chain = spec.LayerChain(
        [
            spec.Scale(moment**0.5),
            dataclasses.replace(link, path=None),
            spec.Dense("above"),
        ],
        input_shape=x.shape[1:],
    )
    kernel = {"above": {"kernel": jnp.ones((64, 1))}}
    scales = bmo.layer_scales(
        chain, kernel, gains="mean_field", norm_floor=0.0, normalize=False
    )
    met = 1 / float(scales["above"]) / 3  # positions
    assert met == pytest.approx(moment / (moment + EPSILON), rel=1e-4)


AFFINE = {"scale": jnp.full(4, 2.0), "bias": jnp.ones(4)}


@pytest.mark.parametrize("moment", SMALL.values(), ids=SMALL)
def test_epsilon_does_not_count_in_the_papers(moment):
    rules = [
        curvatures(spec.BatchNorm("layer", epsilon=e), AFFINE, (3, 4), moment=moment)
        for e in (0.0, 1e-3)
    ]
    assert rules[0] == rules[1]


def rotations(size: float) -> Any:
    """Kernels that are a rotation times a number: a white signal stays white."""
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(3)]
    return {name: jnp.asarray(size * q) for name, q in zip("abc", turns, strict=True)}


def two_norms(epsilon: float, kernels: Any, gains: Any) -> dict[str, float]:
    norm = spec.BatchNorm(epsilon=epsilon)
    links = [spec.Dense("a"), norm, spec.Dense("b"), norm, spec.Dense("c")]
    chain = spec.LayerChain(links, input_shape=(8,))
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    scales = bmo.layer_scales(
        chain, params, gains=gains, norm_floor=0.0, normalize=False
    )
    return {name: float(scale) for name, scale in scales.items()}


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_where_the_signal_is_ordinary_the_epsilon_changes_next_to_nothing(epsilon):
    kernels = rotations(1.0)
    mean_field = two_norms(epsilon, kernels, "mean_field")
    for path, scale in two_norms(epsilon, kernels, "paper").items():
        assert mean_field[path] == pytest.approx(scale, rel=2 * epsilon)


@pytest.mark.parametrize("size", [1.0, 0.05, 0.01])
def test_scales_of_a_net_with_epsilons_are_those_of_its_gauss_newton_matrix(size):
    kernels = rotations(size)

    def net(kernels, x):
        for name in "ab":
            x = x @ kernels[name]
            variance = jax.lax.stop_gradient(jnp.mean(x**2, axis=0))
            x = x / jnp.sqrt(variance + 1e-3)
        return x @ kernels["c"]

    x = 8**0.5 * jnp.eye(8)  # whose second moments are one, without a correlation
    diagonals = measured(net, kernels, x)
    scales = two_norms(1e-3, kernels, "mean_field")
    for name, scale in scales.items():
        assert 1 / scale == pytest.approx(diagonals[name], rel=1e-4)


def test_programs_with_epsilons_grow_with_the_depth_and_not_with_its_square(optimized):
    def lines(depth: int) -> int:
        links: list[spec.Link] = []
        for i in range(depth):
            links += [spec.Dense(f"d{i}"), spec.BatchNorm(), spec.Activation("relu")]
        chain = spec.LayerChain(links, input_shape=(4,))
        params = {path: {"kernel": jnp.eye(4)} for path in chain.paths}
        scales = functools.partial(bmo.layer_scales, chain, gains="mean_field")
        program = jax.jit(scales).lower(params).compile().as_text()
        assert program is not None
        return program.count("\n")

    assert lines(24) < 2.3 * lines(12)


@pytest.mark.parametrize(("dtype", "entry"), [("float16", 300.0), ("bfloat16", 0.01)])
def test_one_plus_a_scale_in_half_precision(dtype, entry):
    links = [spec.Dense("fc"), spec.RMSNorm("norm", one_plus=True)]
    chain = spec.LayerChain(links, input_shape=(4,))
    kernel = jnp.eye(4)

    def scale_of(entries: Any) -> Any:
        params = {"fc": {"kernel": kernel}, "norm": {"scale": entries}}
        return bmo.layer_scales(chain, params, normalize=False)["fc"]

    entries = jnp.full(4, entry, dtype)
    exact = scale_of(entries.astype("float32"))
    np.testing.assert_allclose(scale_of(entries), exact, rtol=1e-6)
