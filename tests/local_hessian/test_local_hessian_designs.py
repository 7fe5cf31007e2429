"""What LH says of normalisation, initialisation and skips, shown on their spectra."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hessian_blocks import (
    KEY,
    batch_norm,
    condition_number,
    dense,
    normal,
    normalised_dense,
    rotation,
    whitened_dense,
    with_statistics_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from backmatch_optax import local_hessian as lh


@given(factor=st.floats(1e-3, 1e3))
@settings(max_examples=10)
@pytest.mark.parametrize("block", [whitened_dense, normalised_dense])
def test_with_batch_normalisation_the_kernels_scale_does_not_matter(block, factor):
    # Remark 2, with the paper's Hessian (17) and with that of BatchNorm as it trains.
    kernel, z = normal(6, 8), normal(16, 6, seed=1)
    spectra = [
        lh.eigenvalues(lh.input_hessian(block, scale * kernel, z))
        for scale in (1.0, factor)
    ]
    np.testing.assert_allclose(spectra[1], spectra[0], atol=1e-5 * spectra[0][-1])


@given(factor=st.floats(1e-3, 1e3))
@settings(max_examples=10)
def test_without_batch_normalisation_the_spectrum_scales(factor):
    kernel, z = normal(6, 8), normal(16, 6, seed=1)
    before, after = (
        lh.eigenvalues(lh.input_hessian(dense, scale * kernel, z))
        for scale in (1.0, factor)
    )
    np.testing.assert_allclose(after, factor**2 * before, rtol=1e-4)


def test_what_the_paper_ignores_of_batch_normalisation_vanishes_with_the_batch():
    distances = []
    for batch in (16, 128):
        kernel, z = normal(6, 8), normal(batch, 6, seed=1)
        true = lh.eigenvalues(lh.input_hessian(normalised_dense, kernel, z))
        fixed = lh.input_hessian(with_statistics_of(kernel, z), kernel, z)
        distances.append(np.abs(true - lh.eigenvalues(fixed)).mean() / true.mean())
    assert distances[1] < distances[0] / 4
    assert distances[1] < 0.05


@pytest.mark.parametrize(("inputs", "outputs"), [(30, 20), (20, 30)])
def test_orthonormal_kernels_give_ones_and_zeros(inputs, outputs):
    orthonormal = jax.nn.initializers.orthogonal()(KEY, (inputs, outputs))
    hessian = lh.input_hessian(dense, orthonormal, jnp.ones((1, inputs)))
    zeros = max(0, inputs - outputs)
    expected = np.repeat([0.0, 1.0], [zeros, inputs - zeros])
    np.testing.assert_allclose(lh.eigenvalues(hessian), expected, atol=1e-5)
    conditioned = lh.condition(hessian, key=KEY)
    np.testing.assert_allclose(conditioned.number, 1, rtol=1e-4)
    np.testing.assert_allclose(conditioned.zeros, zeros / inputs)


def skip_variants(size, seed=1):
    """The shortcuts that Orhan and Pitkow compare, and none."""
    return {
        "none": jnp.zeros((size, size)),
        "identity": jnp.eye(size),
        "orthogonal": rotation(size, seed),
        "not orthogonal": normal(size, size, seed=seed, size=1 / math.sqrt(size)),
    }


@given(
    largest=st.floats(0.05, 0.95),
    spread=st.floats(1.5, 1e3),
    orthogonal=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_a_skip_around_a_small_branch_improves_the_condition(
    largest, spread, orthogonal, seed
):
    # Remark 1, for a branch of singular values up to s: C(skip + branch) is at most
    # (1 + s) / (1 - s), whichever orthogonal matrix the skip is.
    size = 6
    singular_values = jnp.geomspace(largest / spread, largest, size)
    branch = rotation(size, seed) * singular_values @ rotation(size, seed + 1)
    skip = rotation(size, seed + 2) if orthogonal else jnp.eye(size)
    z = jnp.ones((1, size))
    residual = math.sqrt(condition_number(dense, skip + branch, z))
    bound = (1 + largest) / (1 - largest)
    assert residual <= bound * 1.001
    if bound < spread:
        assert residual < math.sqrt(condition_number(dense, branch, z))


def test_remark_1_asks_for_a_smaller_branch_than_it_says():
    # It prints: singular values below 1 - s and C(branch) > (1 + s) / (1 - s) suffice.
    # Its proof needs them below s.
    s, branch, z = 0.1, jnp.diag(jnp.array([0.89, -0.7])), jnp.ones((1, 2))
    plain = math.sqrt(condition_number(dense, branch, z))
    assert plain > (1 + s) / (1 - s)
    assert math.sqrt(condition_number(dense, jnp.eye(2) + branch, z)) > plain


def test_linear_blocks_need_an_orthogonal_skip():
    branch, z = normal(64, 64, size=0.5 / 2 / 8), jnp.ones((1, 64))
    numbers = {
        name: condition_number(dense, skip + branch, z)
        for name, skip in skip_variants(64).items()
    }
    # The branch's largest singular value is close to 0.5.
    assert numbers["identity"] < (1.55 / 0.45) ** 2 < numbers["none"] / 100
    np.testing.assert_allclose(numbers["orthogonal"], numbers["identity"], rtol=0.4)
    assert numbers["not orthogonal"] > 100 * numbers["orthogonal"]


class Branch(nn.Module):
    """Conv, BatchNorm, ReLU, Conv, BatchNorm: the branch of a ResNet's block."""

    features: int
    normalise: bool = True

    @nn.compact
    def __call__(self, z, train=False):
        for last in (False, True):
            z = nn.Conv(self.features, (3, 3), use_bias=False)(z)
            if self.normalise:
                z = nn.BatchNorm(use_running_average=not train, momentum=0.0)(z)
            z = z if last else nn.relu(z)
        return z


def branch_of_resnet(scale, seed, features=4, side=6):
    """A branch with its statistics fixed to a batch's; its last BatchNorm's scale."""
    model = Branch(features)
    z = nn.relu(normal(32, side, side, features, seed=seed))
    variables = jax.eval_shape(model.init, KEY, z)
    params = jax.tree.map(
        lambda leaf: (
            normal(*leaf.shape, seed=seed, size=(2 / 9 / features) ** 0.5)
            if leaf.ndim == 4
            else jnp.ones(leaf.shape)
        ),
        variables["params"],
    )
    params["BatchNorm_0"]["bias"] = jnp.zeros(features)
    params["BatchNorm_1"] = {
        "scale": jnp.full(features, scale),
        "bias": jnp.zeros(features),
    }
    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables["batch_stats"])
    _, mutated = model.apply(
        {"params": params, "batch_stats": stats}, z, train=True, mutable=["batch_stats"]
    )
    return lambda skip, z: z @ skip + model.apply({"params": params, **mutated}, z), z


@pytest.mark.parametrize("seed", [0, 1])
def test_conv_blocks_need_an_orthogonal_skip_around_a_small_branch(seed):
    block, z = branch_of_resnet(scale=0.1, seed=seed)
    conditions = {
        name: lh.condition(lh.input_hessian(block, skip, z[:1]), key=KEY)
        for name, skip in skip_variants(4).items()
    }
    numbers = {name: conditioned.number for name, conditioned in conditions.items()}
    assert numbers["identity"] < numbers["none"] / 10
    assert 1 / 3 < numbers["orthogonal"] / numbers["identity"] < 3
    assert numbers["not orthogonal"] > 3 * numbers["identity"]
    # And the ReLU's zeros, which the condition number leaves out, are gone.
    assert conditions["none"].zeros > 0.2
    assert conditions["identity"].zeros == 0


def test_around_a_branch_as_large_as_its_input_a_skip_does_not_help():
    # The empirical study that Remark 1 leaves open: BatchNorm with a scale of 1 gives
    # the branch singular values well above 1.
    block, z = branch_of_resnet(scale=1.0, seed=0)
    hessians = {
        name: lh.input_hessian(block, skip, z[:1])
        for name, skip in skip_variants(4).items()
    }
    conditions = {n: lh.condition(h, key=KEY) for n, h in hessians.items()}
    assert conditions["none"].largest > 4
    assert conditions["identity"].number > conditions["none"].number


def test_after_batch_normalisation_the_weights_hessian_has_a_flat_diagonal():
    # Remark 3: E diag(H_w) = I / norm(w)^2 for each row w of W.
    z = batch_norm(normal(4000, 12))
    kernel = normal(12, 3, seed=1) * jnp.array([0.1, 1.0, 10.0])
    hessian = lh.weight_hessian(with_statistics_of(kernel, z), kernel, z)
    matrix = jax.vmap(lambda v: hessian.product(v.reshape(12, 3)).ravel())(jnp.eye(36))
    diagonal = np.diagonal(matrix).reshape(12, 3)
    expected = 1 / np.square(np.linalg.norm(kernel, axis=0))
    np.testing.assert_allclose(diagonal, np.broadcast_to(expected, (12, 3)), rtol=0.15)
    np.testing.assert_allclose(diagonal.mean(0), expected, rtol=0.1)
