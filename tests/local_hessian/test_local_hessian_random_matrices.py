"""Kernels of independent entries follow Marchenko and Pastur."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hessian_blocks import KEY, dense, normal, whitened_dense, with_statistics_of
from hypothesis import given
from hypothesis import strategies as st

from backmatch_optax import local_hessian as lh


def kolmogorov_distance(eigenvalues, law):
    """The largest distance of the two distribution functions."""
    count = len(eigenvalues)
    nonzero = np.flatnonzero(eigenvalues)
    expected = law.cdf(eigenvalues[nonzero])
    steps = np.abs([nonzero / count - expected, (nonzero + 1) / count - expected])
    at_zero = abs(np.mean(eigenvalues == 0) - law.cdf(0.0))
    return max(steps.max(), at_zero)


@pytest.mark.parametrize(("inputs", "outputs"), [(1000, 500), (500, 1000)])
@pytest.mark.parametrize("block", [dense, whitened_dense])
def test_gaussian_kernels_follow_marchenko_pastur(inputs, outputs, block):
    kernel = normal(inputs, outputs, size=3 / math.sqrt(outputs))
    hessian = lh.input_hessian(block, kernel, jnp.ones((1, inputs)))
    ratio = outputs / inputs
    # LH (11) for entries of variance 9 / outputs; with BatchNorm LH (19), without 9.
    law = lh.marchenko_pastur(ratio, mean=9.0 if block is dense else ratio)
    eigenvalues = lh.eigenvalues(hessian)
    assert kolmogorov_distance(eigenvalues, law) < 0.02
    assert np.mean(eigenvalues == 0) == law.zeros
    np.testing.assert_allclose(
        [eigenvalues[eigenvalues > 0][0], eigenvalues[-1]], law.support, rtol=0.1
    )


def test_the_law_holds_with_the_statistics_of_a_batch():
    kernel, z = normal(200, 100, size=7.0), normal(2000, 200, seed=1)
    hessian = lh.input_hessian(with_statistics_of(kernel, z), kernel, z[:1])
    law = lh.marchenko_pastur(0.5, mean=0.5)
    assert kolmogorov_distance(lh.eigenvalues(hessian), law) < 0.02


def test_lanczos_finds_the_density_of_a_wide_layer():
    hessian = lh.input_hessian(dense, normal(400, 800, size=0.05), jnp.ones((1, 400)))
    law = lh.marchenko_pastur(2.0, mean=800 * 0.05**2)
    spectrum = lh.spectrum(hessian, key=KEY, num_matvecs=32, num_probes=4)
    x = np.linspace(0, 6, 50)
    assert np.abs(spectrum.cdf(x) - law.cdf(x)).max() < 0.04
    inner = np.linspace(0.5, 4.5, 9)
    np.testing.assert_allclose(
        spectrum.density(inner, width=0.2), law.density(inner), atol=0.05
    )


@given(
    ratio=st.floats(0.05, 20.0),
    mean=st.floats(0.01, 100.0),
    part=st.floats(0.0, 1.0),
)
def test_the_laws_density_integrates_to_its_distribution(ratio, mean, part):
    law = lh.marchenko_pastur(ratio, mean=mean)
    lower, upper = law.support
    # Points crowd at both ends, where the density has infinite slopes.
    angles = np.linspace(0, np.pi, 4001)
    grid = lower + (upper - lower) * part * (1 - np.cos(angles)) / 2
    density = law.density(grid)
    at_end = law.cdf(grid[-1])
    np.testing.assert_allclose(
        law.zeros + np.trapezoid(density, grid), at_end, atol=2e-3
    )
    if part == 1:
        np.testing.assert_allclose(np.trapezoid(density * grid, grid), mean, rtol=1e-3)
    assert law.cdf(-1e-9) == 0
    np.testing.assert_allclose(law.cdf([0.0, 1.001 * upper]), [law.zeros, 1], atol=1e-9)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_laws_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match=r"ratio .* must be positive and finite"):
        lh.marchenko_pastur(value)
    with pytest.raises(ValueError, match=r"mean .* must be positive and finite"):
        lh.marchenko_pastur(1.0, mean=value)
