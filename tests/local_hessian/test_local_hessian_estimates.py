"""Means of diagonals and spectral densities, and what all estimates cost."""

import functools
import math
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hessian_blocks import KEY, average_pool, conv, dense, mlp, normal, pooled, rotation
from hypothesis import given, settings
from hypothesis import strategies as st

import backmatch_optax as bmo
from backmatch_optax import local_hessian as lh
from backmatch_optax import spec

# Each link after a convolution whose 6*6*4 outputs it takes; its own kernel; the gains.
LINKS = {
    "Conv": (spec.Conv("b", padding="VALID"), conv, (3, 3, 4, 5), "paper"),
    "strided Conv": (
        spec.Conv("b", padding="VALID", strides=2),
        functools.partial(conv, stride=2),
        (2, 2, 4, 5),
        "paper",
    ),
    "MaxPool": (
        spec.MaxPool((2, 2), strides=2),
        pooled(jax.lax.max, -jnp.inf, 2),
        None,
        "paper",
    ),
    "AvgPool": (spec.AvgPool((2, 2), strides=2), average_pool, None, "paper"),
    "ReLU": (spec.Activation("relu"), lambda _, z: nn.relu(z), None, "mean_field"),
    "BatchNorm": (
        spec.BatchNorm(),
        lambda _, z: (z - z.mean((0, 1, 2))) / jnp.std(z, (0, 1, 2)),
        None,
        "paper",
    ),
    "Residual": (
        spec.Residual([spec.Conv("b")]),
        lambda kernel, z: z + conv(kernel, z, padding="SAME"),
        (3, 3, 4, 4),
        "mean_field",
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_mean_diagonal_of_the_input_hessian_is_m_z(name):
    link, block, shape, gains = LINKS[name]
    below = normal(3, 3, 2, 4, size=1 / 18**0.5)
    params: dict[str, Any] = {"a": {"kernel": below}}
    without = spec.LayerChain([spec.Conv("a", padding="VALID")], input_shape=(8, 8, 2))
    chain = spec.LayerChain([*without.layers, link], input_shape=(8, 8, 2))
    declared = bmo.layer_scales(without, params, gains=gains, normalize=False)["a"]
    kernel = {} if shape is None else normal(*shape, seed=1, size=0.3)
    if shape is not None:
        params["b"] = {"kernel": kernel}
    # scale = 1 / (m_z m_W): the link's own factor is in the scale of what is below it.
    m_z = declared / bmo.layer_scales(chain, params, gains=gains, normalize=False)["a"]
    z = conv(below, normal(32, 8, 8, 2, seed=2))
    mean = lh.mean_diagonal(lh.input_hessian(block, kernel, z), key=KEY)
    # Layers are exact up to chance; a residual leaves out a cross term, a BatchNorm
    # takes the mean of variances for each unit's own.
    tolerance = 0.15 if name in ("Residual", "BatchNorm") else 0.04
    np.testing.assert_allclose(mean.mean, m_z, rtol=tolerance)


@pytest.mark.parametrize(
    ("link", "block", "shape", "input_shape"),
    [
        (spec.Dense("a"), dense, (12, 5), (12,)),
        (spec.Conv("a", padding="VALID"), conv, (3, 3, 2, 4), (8, 8, 2)),
    ],
    ids=["Dense", "Conv"],
)
def test_mean_diagonal_of_the_weight_hessian_is_m_w(link, block, shape, input_shape):
    kernel = normal(*shape)
    chain = spec.LayerChain([link], input_shape=input_shape)
    scale = bmo.layer_scales(chain, {"a": {"kernel": kernel}}, normalize=False)[
        "a"
    ]  # 1 / m_W
    z = normal(400, *input_shape, seed=1)
    hessian = lh.weight_hessian(block, kernel, z)
    mean = lh.mean_diagonal(hessian, key=KEY, num_probes=64)
    np.testing.assert_allclose(mean.mean * scale, 1, rtol=0.08)


def test_mean_diagonal_agrees_with_measured_scales():
    params, z = {"up": normal(6, 9), "down": normal(9, 6)}, normal(64, 6, seed=2)
    measured = bmo.measure_layer_scales(
        mlp, params, z, key=KEY, num_probes=100, layer_of=lambda path: "all"
    )
    mean = lh.mean_diagonal(lh.weight_hessian(mlp, params, z), key=KEY, num_probes=100)
    np.testing.assert_allclose(mean.mean, 1 / measured.layer_scales["all"], rtol=0.15)


def test_standard_error_of_the_mean_covers_it():
    hessian = lh.input_hessian(dense, normal(20, 20), jnp.ones((1, 20)))
    exact = lh.eigenvalues(hessian).mean()
    mean = lh.mean_diagonal(hessian, key=KEY, num_probes=100)
    assert 0 < mean.standard_error < 0.1 * exact
    assert abs(mean.mean - exact) < 4 * mean.standard_error
    assert math.isnan(lh.mean_diagonal(hessian, key=KEY, num_probes=1).standard_error)


@given(rank=st.integers(0, 8), seed=st.integers(0, 9))
@settings(max_examples=20)
def test_lanczos_of_full_length_is_exact(rank, seed):
    # Also past the end of its Krylov space, for repeated eigenvalues and none.
    values = jnp.asarray(np.random.default_rng(seed).integers(1, 4, 8) * 1.0)
    kernel = rotation(8, seed) * jnp.where(jnp.arange(8) < rank, values, 0)
    hessian = lh.input_hessian(dense, kernel, jnp.ones((3, 8)))
    spectrum = lh.spectrum(hessian, key=KEY, num_matvecs=24, num_probes=2)
    x = np.array([-0.1, 0.1, 0.9, 1.1, 3.9, 4.1, 8.9, 9.1])
    exact = (lh.eigenvalues(hessian) <= x[:, None]).mean(1)
    # A share of random signs lies in each eigenspace: right on average.
    np.testing.assert_allclose(spectrum.cdf(x), exact, atol=0.35)
    assert set(np.abs(spectrum.nodes).round(2)) <= {*(values.tolist()), 0.0, 1, 4, 9}
    np.testing.assert_allclose(spectrum.weights.sum(), 1, rtol=1e-6)


def test_float32_blocks_where_float64_is_enabled():
    with jax.enable_x64(True):
        z = jnp.ones((2, 4), jnp.float32)
        kernel = jnp.diag(jnp.arange(1.0, 5.0, dtype=jnp.float32))
        hessian = lh.input_hessian(dense, kernel, z)
        found = lh.condition(hessian, key=KEY, num_matvecs=4)
        np.testing.assert_allclose(found.number, 16, rtol=1e-4)
        assert lh.spectrum(hessian, key=KEY).nodes.max() < 16.1


def test_no_jacobian_is_formed():
    # It would have 2^18 x 2^18 entries, 256 GiB.
    def block(weights, z):
        return weights * z + jnp.roll(z, 1)

    weights, z = jnp.full(2**17, 3.0), jnp.zeros((2, 2**17))
    for hessian in (
        lh.input_hessian(block, weights, z),
        lh.input_hessian(block, weights, z, target=z),
    ):
        with pytest.raises(ValueError, match="262144 x 262144 is too large"):
            lh.eigenvalues(hessian)
        mean = lh.mean_diagonal(hessian, key=KEY, num_probes=2)
        np.testing.assert_allclose(mean.mean, 3**2 + 1, rtol=0.05)
        estimate = lh.spectrum(hessian, key=KEY, num_matvecs=3, num_probes=1)
        np.testing.assert_allclose(estimate.mean, 3**2 + 1, rtol=0.05)
        found = lh.condition(hessian, key=KEY, num_matvecs=3)
        assert 1 < found.number <= (4 / 2) ** 2
        assert found.largest <= 4**2 * 1.001


def test_the_same_function_is_compiled_once():
    traces = []

    def block(kernel, z):
        traces.append(None)
        return z @ kernel

    counts = []
    for seed in range(3):
        traces.clear()
        hessian = lh.input_hessian(block, normal(3, 3, seed=seed), jnp.ones((2, 3)))
        checked = len(traces)  # the abstract evaluation of its shape
        lh.spectrum(hessian, key=KEY)
        lh.condition(hessian, key=KEY, num_matvecs=2)
        counts.append(len(traces) - checked)
    assert counts[0] > counts[1] == counts[2] == 0


@pytest.mark.parametrize("count", [0, -1, 1.5, "8", None])
def test_counts_below_1_are_refused(count):
    hessian = lh.input_hessian(dense, jnp.eye(3, 2), jnp.ones((2, 3)))
    message = "must be an int of at least 1"
    for function in (lh.mean_diagonal, lh.spectrum):
        with pytest.raises(ValueError, match=message):
            function(hessian, key=KEY, num_probes=count)
    with pytest.raises(ValueError, match=message):
        lh.report({}, key=KEY, num_probes=count)
    if count is not None:
        for function in (lh.spectrum, lh.condition):
            with pytest.raises(ValueError, match=message):
                function(hessian, key=KEY, num_matvecs=count)


def test_a_width_that_is_not_positive_is_refused():
    hessian = lh.input_hessian(dense, jnp.eye(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"width .* must be positive"):
        lh.spectrum(hessian, key=KEY).density(1.0, width=0.0)


def test_without_matfree_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree", None)
    hessian = lh.input_hessian(dense, jnp.eye(3), jnp.ones((5, 3)))
    for function in (lh.spectrum, functools.partial(lh.condition, num_matvecs=2)):
        with pytest.raises(ImportError, match=r"matfree.*local-hessian"):
            function(hessian, key=KEY)
    # Means, and small blocks, need none.
    assert lh.mean_diagonal(hessian, key=KEY).mean == 1
    assert lh.condition(hessian, key=KEY).number == 1
