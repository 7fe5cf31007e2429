"""Scales that keep SGD's learning rate: their mean, and how far they may be from it."""

from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backmatch_optax as bmo
from backmatch_optax import spec
from examples import models


def lenet():
    model, chain = models.MODELS["lenet"](10, (32, 32, 3))
    image = jnp.zeros((1, 32, 32, 3))
    return chain, model.init(jax.random.key(0), image, train=False)["params"]


def plain(depth, width=4):
    links = []
    for number in range(depth):
        links += [spec.Dense(f"fc{number}"), spec.Activation("relu")]
    return spec.LayerChain(links, input_shape=(width,))


def sizes(params):
    return {layer: leaves["kernel"].size for layer, leaves in params.items()}


def test_the_predicted_mean_curvature_of_all_entries_is_that_of_sgd():
    chain, params = lenet()
    papers = bmo.layer_scales(chain, params, normalize=False)
    scales = bmo.layer_scales(chain, params, limit=None)
    count = sizes(params)
    # A scale is one over a layer's predicted mean diagonal of the Gauss-Newton matrix.
    sgds = sum(n / papers[layer] for layer, n in count.items())
    scaled = sum(n * scales[layer] / papers[layer] for layer, n in count.items())
    np.testing.assert_allclose(scaled, sgds, rtol=1e-5)
    np.testing.assert_allclose(
        sum(n / scales[layer] for layer, n in count.items()), sum(count.values()), 1e-5
    )


def test_the_ratios_of_the_scales_stay():
    chain, params = lenet()
    papers = bmo.layer_scales(chain, params, normalize=False)
    scales = bmo.layer_scales(chain, params, limit=None)
    ratios = [float(scales[layer] / papers[layer]) for layer in chain.paths]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
    assert ratios[0] != pytest.approx(1, rel=0.1)


def test_one_layer_alone_is_sgd():
    params = {"fc": {"kernel": jnp.full((3, 2), 7.0)}}
    chain = spec.LayerChain([spec.Dense("fc"), spec.Scale(5.0)], input_shape=(3,))
    tx = bmo.backmatch_sgd(0.1, chain, limit=None)
    sgd = optax.sgd(0.1, momentum=0.9, nesterov=True)
    ours, _ = tx.update(params, tx.init(params), params)
    theirs, _ = sgd.update(params, sgd.init(params), params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_biases_and_norms_count_with_their_entries():
    chain = spec.LayerChain(
        [spec.Dense("a"), spec.LayerNorm("n"), spec.Dense("b")], input_shape=(2,)
    )
    params = {
        "a": {"kernel": jnp.full((2, 4), 0.3), "bias": jnp.zeros(4)},
        "n": {"scale": jnp.full(4, 2.0), "bias": jnp.zeros(4)},
        "b": {"kernel": jnp.full((4, 3), 0.7)},
    }
    ones = jax.tree.map(jnp.ones_like, params)
    tx = bmo.scale_by_backmatch(chain, limit=None)
    scaled, _ = tx.update(ones, tx.init(params), params)
    entries = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(scaled)])
    np.testing.assert_allclose(np.mean(1 / entries), 1, rtol=1e-5)


@hypothesis.given(st.lists(st.floats(-18, 18), min_size=1, max_size=6))
@hypothesis.settings(deadline=None, max_examples=15)
def test_scales_are_positive_and_finite_however_large_the_kernels(powers):
    chain = plain(len(powers))
    params = {
        f"fc{number}": {"kernel": jnp.full((4, 4), 10.0**power, jnp.float32)}
        for number, power in enumerate(powers)
    }
    for scale in bmo.layer_scales(chain, params, limit=None).values():
        assert np.isfinite(scale) and scale > 0


def test_a_thousand_layers_stay_finite_and_their_mean_is_one():
    links: list[spec.Link] = []
    for number in range(1000):
        links += [spec.Dense(f"fc{number}"), spec.BatchNorm()]
    chain = spec.LayerChain(links, input_shape=(4,))
    keys = jax.random.split(jax.random.key(0), 1000)
    params = {
        f"fc{i}": {"kernel": jax.random.normal(key, (4, 4)) / 2}
        for i, key in enumerate(keys)
    }
    scales = jax.jit(lambda p: bmo.layer_scales(chain, p, limit=None))(params)
    values = np.array(list(scales.values()), np.float64)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(np.mean(1 / values), 1, rtol=1e-3)


def test_measured_scales_normalize_alike():
    params = {
        "a": {"kernel": jnp.full((4, 4), 0.5)},
        "b": {"kernel": jnp.full((4, 2), 3.0)},
    }
    x = jax.random.normal(jax.random.key(0), (64, 4))

    def outputs(params):
        return x @ params["a"]["kernel"] @ params["b"]["kernel"]

    found = {}
    for normalize in (False, True):
        tx = bmo.scale_by_measured_backmatch(
            key=jax.random.key(1), normalize=normalize, limit=None
        )
        _, state = tx.update(params, tx.init(params), params, outputs_fn=outputs)
        scales = optax.tree.get(state, "layer_scales")
        found[normalize] = np.array([scales["a"], scales["b"]])
    np.testing.assert_allclose(np.average(1 / found[True], weights=[16, 8]), 1, 1e-5)
    ratios = found[True] / found[False]
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


def test_without_any_curvature_measured_scales_are_one():
    params = {"a": {"kernel": jnp.ones((2, 2))}}
    tx = bmo.scale_by_measured_backmatch(key=jax.random.key(1), limit=None)
    _, state = tx.update(
        params, tx.init(params), params, outputs_fn=lambda p: jnp.ones((3, 1))
    )
    assert optax.tree.get(state, "layer_scales") == {"a": 1.0}


@hypothesis.given(
    st.lists(st.floats(-4, 4), min_size=2, max_size=5), st.sampled_from([1.0, 2.0, 8.0])
)
@hypothesis.settings(deadline=None, max_examples=15)
def test_no_scale_is_further_from_one_than_the_limit(powers, limit):
    chain = plain(len(powers))
    params = {
        f"fc{number}": {"kernel": jnp.full((4, 4), 10.0**power, jnp.float32)}
        for number, power in enumerate(powers)
    }
    free = bmo.layer_scales(chain, params, limit=None)
    for path, scale in bmo.layer_scales(chain, params, limit=limit).items():
        expected = np.clip(free[path], 1 / limit, limit)
        np.testing.assert_allclose(scale, expected, rtol=1e-6)


def test_by_default_no_parameter_leaves_sgds_rate_by_more_than_twice():
    chain, params = lenet()
    ones = jax.tree.map(jnp.ones_like, params)
    for tx in (
        bmo.scale_by_backmatch(chain),
        bmo.scale_by_measured_backmatch(key=jax.random.key(0)),
    ):
        x = jax.random.normal(jax.random.key(1), (8, 32 * 32 * 3))

        def outputs(params, x=x):
            return x @ jnp.resize(params["fc1"]["kernel"], (3072, 10))

        multiples, _ = tx.update(ones, tx.init(params), params, outputs_fn=outputs)
        for leaf in jax.tree.leaves(multiples):
            assert 0.5 <= float(leaf.min()) and float(leaf.max()) <= 2


def test_the_options_reach_every_way_in():
    chain, params = lenet()
    several: list[Any] = [{}, {"limit": None}, {"limit": 3.0}, {"normalize": False}]
    for options in several:
        wanted = bmo.layer_scales(chain, params, **options)
        for tx in (
            bmo.scale_by_backmatch(chain, **options),
            bmo.backmatch_sgd(0.1, chain, **options),
        ):
            _, state = tx.update(params, tx.init(params), params)
            chex.assert_trees_all_close(optax.tree.get(state, "layer_scales"), wanted)
        table = bmo.describe(chain, params, **options)
        for path, scale in wanted.items():
            assert f"{path} " in table and f"{float(scale):.4g}" in table


def test_the_limit_may_be_injected():
    chain, params = lenet()
    tx = optax.inject_hyperparams(bmo.scale_by_backmatch)(chain, limit=1.0)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_close(updates, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "no"}, r"normalize \(='no'\) must be True or False"),
        ({"normalize": 1}, r"normalize \(=1\) must be True or False"),
        ({"limit": 0.5}, r"limit \(=0.5\) must be a finite number of at least 1"),
        ({"limit": float("nan")}, "limit .* at least 1"),
        ({"norm_floor": jnp.ones(2)}, "norm_floor .* at least 0"),
        ({"norm_floor": jnp.float32(-1)}, "norm_floor .* at least 0"),
        ({"norm_floor": np.float32("nan")}, "norm_floor .* at least 0"),
        ({"norm_floor": True}, "norm_floor .* at least 0"),
        ({"gains": "none"}, "gains .* must be 'paper' or 'mean_field'"),
        ({"unlisted": "skip"}, "unlisted .* must be 'error' or 'identity'"),
    ],
)
def test_a_wrong_option_is_refused_at_construction(options, message):
    chain = plain(2)
    with pytest.raises(ValueError, match=message):
        bmo.scale_by_backmatch(chain, **options)
    with pytest.raises(ValueError, match=message):
        bmo.backmatch_sgd(0.1, chain, **options)


def test_what_is_no_chain_is_refused_at_construction():
    chain: Any = [1, 2]
    with pytest.raises(ValueError, match=r"must be .*LayerChain, but it is a list"):
        bmo.scale_by_backmatch(chain)
