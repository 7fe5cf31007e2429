"""All eigenvalues, and condition numbers that are exact or lower bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hessian_blocks import KEY, conv, dense, mlp, normal, rotation
from hypothesis import given, settings
from hypothesis import strategies as st

from backmatch_optax import local_hessian as lh


def affine(params, z):
    """A dense layer or a convolution, by its kernel's shape, with or without a bias."""
    layer = dense if params["kernel"].ndim == 2 else same_conv
    return layer(params["kernel"], z) + params.get("bias", 0)


def tanh_of_affine(params, z):
    return jnp.tanh(affine(params, z))


def same_conv(kernel, z):
    return conv(kernel, z, padding="SAME")


# Kernel, bias, input. Six examples of a dense layer and one of a convolution leave the
# weights' Hessian ranks of 48 of 56 and of 48 of 57.
LAYERS = {
    "dense": ((7, 8), (), (6, 7)),
    "convolution with bias": ((3, 3, 2, 3), (3,), (1, 4, 4, 2)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("make", [lh.input_hessian, lh.weight_hessian])
@pytest.mark.parametrize(
    ("block", "dtype"),
    [(affine, "float32"), (affine, "float64"), (tanh_of_affine, "float32")],
)
def test_krylov_spaces_of_full_length_agree_with_all_eigenvalues(
    layer, make, block, dtype
):
    kernel, bias, inputs = LAYERS[layer]
    with jax.enable_x64(dtype == "float64"):
        params = {"kernel": normal(*kernel)}
        if bias:
            params["bias"] = normal(*bias, seed=1)
        z = normal(*inputs, seed=2)
        output = block(params, z)
        step = normal(*output.shape, seed=3)
        for target in (None, 0 * output, output + 0.1 * step, output + 3 * step):
            hessian = make(block, params, z, target=target)
            sizes = np.abs(lh.eigenvalues(hessian))
            sizes = sizes[sizes > 0]
            exact = sizes.max() / sizes.min()
            most = (
                hessian.size if target is not None else min(output.size, hessian.size)
            )
            found = lh.condition(hessian, key=KEY, num_matvecs=most)
            assert found.number <= 1.02 * exact  # a lower bound, whatever the rank
            if found.converged:
                np.testing.assert_allclose(found.number, exact, rtol=0.03)
            # Of the smallest singular values float32 leaves no two digits.
            resolved = exact < (1e6 if target is None else 1e3)
            assert found.converged or not resolved


@pytest.mark.parametrize("wrt", [lh.input_hessian, lh.weight_hessian])
@given(
    num_matvecs=st.sampled_from([2, 5, 12]),
    rank=st.integers(1, 12),
    seed=st.integers(0, 9),
    decay=st.sampled_from([1.0, 1e-2, 1e-4]),
)
@settings(max_examples=15)
def test_lanczos_bounds_the_condition_number_from_below(
    wrt, num_matvecs, rank, seed, decay
):
    sizes = jnp.where(jnp.arange(12) < rank, jnp.geomspace(1, decay, 12), 0)
    kernel = rotation(12, seed) * sizes @ rotation(12, seed + 1)
    z = normal(12, 12, seed=seed) @ kernel
    hessian = wrt(dense, kernel, z)
    exact = lh.condition(hessian, key=KEY)
    found = lh.condition(hessian, key=jax.random.key(seed), num_matvecs=num_matvecs)
    assert found.largest <= exact.largest * 1.001
    if exact.number < 1e9:  # else rounding errors of float32 are as large
        assert found.smallest >= exact.smallest * 0.99
        if found.converged:
            np.testing.assert_allclose(found.number, exact.number, rtol=0.03)


@pytest.mark.parametrize("rank", [3, 12, 24])
def test_krylov_spaces_that_end_give_the_exact_condition_number(rank):
    sizes = jnp.where(jnp.arange(24) < rank, jnp.linspace(1, 4, 24), 0)
    kernel = rotation(24, 0) * sizes @ rotation(24, 1)
    hessian = lh.input_hessian(dense, kernel, jnp.ones((1, 24)))
    found = lh.condition(hessian, key=KEY, num_matvecs=24)
    assert found.converged
    exact = lh.condition(hessian, key=KEY)
    np.testing.assert_allclose(found.number, exact.number, rtol=1e-3)
    np.testing.assert_allclose(exact.number, sizes[rank - 1] ** 2, rtol=1e-3)


def test_condition_of_a_larger_block_says_that_it_is_a_bound():
    factors = jnp.geomspace(1e-3, 1, 1100)
    hessian = lh.input_hessian(lambda w, z: w * z, factors, jnp.ones((1, 1100)))
    conditioned = lh.condition(hessian, key=KEY, num_matvecs=16)
    assert not conditioned.converged and not conditioned.exact
    assert str(conditioned).startswith(">= ")
    longer = lh.condition(hessian, key=KEY)
    assert not longer.converged
    assert 1e6 > longer.number > conditioned.number > 1
    np.testing.assert_allclose(longer.largest, 1, rtol=1e-4)


def test_condition_of_the_full_hessian_is_by_absolute_value():
    params, z = {"up": normal(3, 4), "down": normal(4, 3)}, normal(2, 3)
    hessian = lh.weight_hessian(mlp, params, z, target=mlp(params, z) + 3)
    values = lh.eigenvalues(hessian)
    assert values[0] < 0  # indefinite, as LH 4 says
    found = lh.condition(hessian, key=KEY)
    np.testing.assert_allclose(found.largest, np.abs(values).max(), rtol=1e-5)
    krylov = lh.condition(hessian, key=KEY, num_matvecs=hessian.size)
    np.testing.assert_allclose(krylov.number, found.number, rtol=0.02)


def test_a_block_that_propagates_nothing():
    hessian = lh.input_hessian(lambda _, z: 0 * z, {}, jnp.ones((2, 3)))
    for matvecs in (None, 2):
        conditioned = lh.condition(hessian, key=KEY, num_matvecs=matvecs)
        assert str(conditioned) == "all zero"
    assert lh.mean_diagonal(hessian, key=KEY).mean == 0
    assert lh.spectrum(hessian, key=KEY).cdf([-1e-9, 1e-9]).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        kernel = jnp.diag(jnp.array([0.0, 1.0, 2.0, 4.0], dtype))
        hessian = lh.input_hessian(dense, kernel, jnp.ones((2, 4), dtype))
        assert hessian.product(jnp.ones((2, 4), dtype)).dtype == dtype
        assert lh.condition(hessian, key=KEY).number == 16
        found = lh.condition(hessian, key=KEY, num_matvecs=4)
        # Rounding errors of bfloat16 loosen the bound, and it is said to be one.
        coarse = dtype == "bfloat16"
        assert found.converged == (not coarse)
        np.testing.assert_allclose(found.number, 16, rtol=0.1 if coarse else 1e-12)
        assert found.number < 16.001
        spectrum = lh.spectrum(hessian, key=KEY, num_probes=8)
        np.testing.assert_allclose(spectrum.mean, 21 / 4, rtol=0.3)


def test_more_products_than_dimensions_are_refused():
    hessian = lh.input_hessian(dense, jnp.eye(3, 2), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"num_matvecs \(=7\) .* dimension, 6"):
        lh.spectrum(hessian, key=KEY, num_matvecs=7)
    with pytest.raises(ValueError, match=r"num_matvecs \(=5\) .* dimension, 4"):
        lh.condition(hessian, key=KEY, num_matvecs=5)


def test_blocks_that_are_not_finite_are_refused():
    hessian = lh.input_hessian(dense, jnp.full((3, 3), jnp.nan), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="not finite"):
        lh.eigenvalues(hessian)
    with pytest.raises(ValueError, match="not finite"):
        lh.spectrum(hessian, key=KEY)
    with pytest.raises(ValueError, match="not finite"):
        lh.condition(hessian, key=KEY, num_matvecs=2)
