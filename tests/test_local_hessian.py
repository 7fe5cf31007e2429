"""Local Hessians: products, spectra, and what the local-Hessian paper (LH) claims."""

import functools
import math
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import backmatch_optax as bmo
from backmatch_optax import local_hessian as lh
from backmatch_optax import spec
from backmatch_optax.local_hessian import estimates, extremes
from examples.studies import local_hessian_cost

KEY = jax.random.key(0)


def normal(*shape, seed=0, size=1.0):
    """Independent normal numbers of standard deviation `size`, without compiling."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * size)


def dense(kernel, z):
    return z @ kernel


def conv(kernel, z, stride=1, padding="VALID"):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        z, kernel, strides, padding, dimension_numbers=layout
    )


def batch_norm(y):
    """As in training, with the batch's own statistics."""
    return (y - y.mean(0)) / jnp.sqrt(y.var(0))


def normalised_dense(kernel, z):
    return batch_norm(z @ kernel)


def whitened_dense(kernel, z):
    """Dense and batch normalisation, with the statistics of whitened input: LH (17)."""
    return z @ kernel / jnp.linalg.norm(kernel, axis=0)


def with_statistics_of(kernel, z):
    """Dense and batch normalisation with the statistics of one batch: LH (17), (18)."""
    std = jnp.std(z @ kernel, axis=0)
    return lambda w, z: z @ w / std


def mlp(params, z):
    return z + jnp.tanh(z @ params["up"]) @ params["down"]


def kolmogorov_distance(eigenvalues, law):
    """The largest distance of the two distribution functions."""
    count = len(eigenvalues)
    nonzero = np.flatnonzero(eigenvalues)
    expected = law.cdf(eigenvalues[nonzero])
    steps = np.abs([nonzero / count - expected, (nonzero + 1) / count - expected])
    at_zero = abs(np.mean(eigenvalues == 0) - law.cdf(0.0))
    return max(steps.max(), at_zero)


def condition_number(fn, params, z):
    return lh.condition(lh.input_hessian(fn, params, z), key=KEY).number


# --- Products are those of the Hessian -----------------------------------------------


BLOCKS = {
    "dense": (dense, lambda n, m: normal(n, m)),
    "batch normalisation": (normalised_dense, lambda n, m: normal(n, m)),
    "residual": (
        mlp,
        lambda n, m: {"up": normal(n, m), "down": normal(m, n, seed=1)},
    ),
}


def explicit_hessian(hessian):
    """By nested differentiation of the back-matching loss, LH (5) and (6)."""
    flat, unravel = ravel_pytree(hessian.point)
    target = hessian.target
    if target is None:
        target = hessian.fn(hessian.params, hessian.z)
    of_weights = hessian.wrt == "weights"

    def loss(x):
        point = unravel(x)
        args = (point, hessian.z) if of_weights else (hessian.params, point)
        squares = jnp.sum(jnp.square(hessian.fn(*args) - target)) / 2
        return squares / len(hessian.z) if of_weights else squares

    return np.asarray(jax.jit(jax.hessian(loss))(flat))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("make", [lh.input_hessian, lh.weight_hessian])
@pytest.mark.parametrize("with_target", [False, True])
def test_products_and_eigenvalues_are_those_of_the_explicit_hessian(
    kind, make, with_target
):
    with jax.enable_x64(True):
        fn, init = BLOCKS[kind]
        params, z = init(3, 2), normal(4, 3, seed=2)
        target = normal(*fn(params, z).shape, seed=3) if with_target else None
        hessian = make(fn, params, z, target=target)
        expected = explicit_hessian(hessian)
        flat, unravel = ravel_pytree(hessian.point)
        v = normal(flat.size, seed=4)
        product = jax.jit(lh.LocalHessian.product)(hessian, unravel(v))
        np.testing.assert_allclose(
            ravel_pytree(product)[0], expected @ v, rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(
            lh.eigenvalues(hessian), np.linalg.eigvalsh(expected), atol=1e-11
        )


def test_dense_layer_has_the_hessians_of_the_paper():
    # LH (8) for every example, and (9), as a mean, for every row of W.
    kernel, z = normal(4, 3), normal(5, 4, seed=1)
    of_input = lh.eigenvalues(lh.input_hessian(dense, kernel, z))
    once = np.linalg.eigvalsh(kernel @ kernel.T)
    np.testing.assert_allclose(of_input, np.repeat(once, 5), atol=1e-5)
    of_weights = lh.eigenvalues(lh.weight_hessian(dense, kernel, z))
    second_moment = np.linalg.eigvalsh(z.T @ z / 5)
    np.testing.assert_allclose(of_weights, np.repeat(second_moment, 3), atol=1e-5)


def test_a_target_that_is_met_leaves_the_gauss_newton_part():
    params, z = {"up": normal(3, 4), "down": normal(4, 3)}, normal(2, 3)
    gauss_newton = lh.input_hessian(mlp, params, z)
    met = lh.input_hessian(mlp, params, z, target=mlp(params, z))
    missed = lh.input_hessian(mlp, params, z, target=mlp(params, z) + 1)
    np.testing.assert_allclose(met.product(z), gauss_newton.product(z), rtol=1e-5)
    assert not np.allclose(missed.product(z), gauss_newton.product(z), rtol=1e-2)


# --- Kernels of independent entries follow Marchenko and Pastur ----------------------


@pytest.mark.parametrize(("inputs", "outputs"), [(2000, 1000), (1000, 2000)])
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


# --- What the designs do to the spectrum ---------------------------------------------


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


def rotation(size, seed):
    return jnp.asarray(np.linalg.qr(normal(size, size, seed=seed))[0])


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


# --- The scalars of the recursion ----------------------------------------------------


def pooled(reducer, initial, window):
    window = (1, window, window, 1)
    return lambda _, z: jax.lax.reduce_window(
        z, initial, reducer, window, window, "VALID"
    )


def average_pool(_, z):
    return pooled(jax.lax.add, 0.0, 2)(_, z) / 4


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
    declared = bmo.layer_scales(without, params, gains=gains)["a"]
    kernel = {} if shape is None else normal(*shape, seed=1, size=0.3)
    if shape is not None:
        params["b"] = {"kernel": kernel}
    # scale = 1 / (m_z m_W): the link's own factor is in the scale of what is below it.
    m_z = declared / bmo.layer_scales(chain, params, gains=gains)["a"]
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
    scale = bmo.layer_scales(chain, {"a": {"kernel": kernel}})["a"]  # 1 / m_W
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


# --- Density and extremes ------------------------------------------------------------


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


@pytest.mark.parametrize("wrt", [lh.input_hessian, lh.weight_hessian])
@given(
    num_matvecs=st.sampled_from([2, 8, 24]),
    rank=st.integers(1, 24),
    seed=st.integers(0, 9),
    decay=st.sampled_from([1.0, 1e-2, 1e-4]),
)
@settings(max_examples=15)
def test_lanczos_bounds_the_condition_number_from_below(
    wrt, num_matvecs, rank, seed, decay
):
    sizes = jnp.where(jnp.arange(24) < rank, jnp.geomspace(1, decay, 24), 0)
    kernel = rotation(24, seed) * sizes @ rotation(24, seed + 1)
    z = normal(24, 24, seed=seed) @ kernel
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
    branch = [normal(3, 3, 8, 8, seed=i, size=1 / 72**0.5) for i in range(2)]

    def block(kernels, z):
        for kernel in kernels:
            z = nn.relu(conv(kernel, z, padding="SAME"))
        return z

    hessian = lh.input_hessian(block, branch, normal(2, 9, 9, 8, seed=3))
    assert hessian.size == 1296
    conditioned = lh.condition(hessian, key=KEY, num_matvecs=16)
    assert not conditioned.converged and not conditioned.exact
    assert str(conditioned).startswith(">= ")
    longer = lh.condition(hessian, key=KEY)
    assert longer.number > conditioned.number
    exact = lh.eigenvalues(hessian)
    np.testing.assert_allclose(longer.largest, exact[-1], rtol=1e-4)
    assert longer.smallest >= exact[exact > 0][0]


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
        for matvecs in (None, 4):
            found = lh.condition(hessian, key=KEY, num_matvecs=matvecs)
            np.testing.assert_allclose(found.number, 16, rtol=1e-2)
        spectrum = lh.spectrum(hessian, key=KEY, num_probes=8)
        np.testing.assert_allclose(spectrum.mean, 21 / 4, rtol=0.3)


def test_float32_blocks_where_float64_is_enabled():
    with jax.enable_x64(True):
        z = jnp.ones((2, 4), jnp.float32)
        kernel = jnp.diag(jnp.arange(1.0, 5.0, dtype=jnp.float32))
        hessian = lh.input_hessian(dense, kernel, z)
        found = lh.condition(hessian, key=KEY, num_matvecs=4)
        np.testing.assert_allclose(found.number, 16, rtol=1e-4)
        assert lh.spectrum(hessian, key=KEY).nodes.max() < 16.1


# --- Cost ----------------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
def test_no_jacobian_is_formed():
    # A block of a ResNet on 4 images: the Jacobian would have 65536^2 entries.
    kernels = [normal(3, 3, 16, 16, seed=i) for i in range(2)]

    def block(kernels, z):
        return z + conv(kernels[1], nn.relu(conv(kernels[0], z, 1, "SAME")), 1, "SAME")

    hessian = lh.input_hessian(block, kernels, jnp.zeros((4, 32, 32, 16)))
    with pytest.raises(ValueError, match="65536 x 65536 is too large"):
        lh.eigenvalues(hessian)
    vectors = 4 * hessian.size
    for program, arguments, most in (
        (estimates._trace, (hessian, KEY), 20),
        (estimates._lanczos, (hessian, jax.random.split(KEY, 2), 8), 40),
        (extremes._bidiagonal, (hessian, KEY, 8), 60),
    ):
        memory = program.lower(*arguments).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < most * vectors


def test_the_same_function_is_compiled_once():
    traces = []

    def block(kernel, z):
        traces.append(None)
        return z @ kernel

    counts = []
    for seed in range(3):
        hessian = lh.input_hessian(block, normal(3, 3, seed=seed), jnp.ones((2, 3)))
        lh.spectrum(hessian, key=KEY)
        lh.condition(hessian, key=KEY, num_matvecs=2)
        counts.append(len(traces))
    # What is left is the abstract evaluation that checks the shapes.
    assert counts[2] - counts[1] < counts[0]


def test_the_cost_table_has_a_row_for_each_program(capsys):
    local_hessian_cost.main(["--features", "2", "--batch", "1", "--rounds", "1"])
    printed = capsys.readouterr().out
    for program in ("gradient", "mean diagonal", "spectrum", "condition number"):
        assert f"| 2 | 2,048 | {program}" in printed


# --- The report ----------------------------------------------------------------------


def test_report_shows_what_batch_normalisation_and_a_skip_do():
    kernel = normal(32, 32, size=0.02) * jnp.geomspace(0.01, 1, 32)

    def small_residual(kernel, z):
        return z + 0.1 * normalised_dense(kernel, z)

    z = normal(24, 32, seed=1)
    report = lh.report(
        {
            "plain": (dense, kernel, z),
            "with BatchNorm": (normalised_dense, kernel, z),
            "with skip": (small_residual, kernel, z),
        },
        key=KEY,
    )
    plain, normalised, residual = report.blocks.values()
    assert normalised.input_condition.number < plain.input_condition.number / 10
    assert residual.input_condition.number < 10
    np.testing.assert_allclose(plain.m_z.mean, jnp.sum(kernel**2) / 32, rtol=0.3)
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == list(report.blocks)
    assert lines[0].split() == (
        ["block", "m_z", "cond", "H_z", "zeros", "m_W", "cond", "H_W", "zeros"]
    )


def test_report_takes_the_first_example_also_where_a_batch_couples_them():
    kernel, z = normal(4, 4), normal(9, 4, seed=1)

    def of_first(kernel, first):
        return normalised_dense(kernel, jnp.concatenate([first, z[1:]]))

    jacobian = jax.jacobian(of_first, 1)(kernel, z[:1]).reshape(36, 4)
    values = np.linalg.eigvalsh(jacobian.T @ jacobian)
    blocks = {"coupled": (normalised_dense, kernel, z), "alone": (dense, kernel, z)}
    coupled, alone = lh.report(blocks, key=KEY).blocks.values()
    np.testing.assert_allclose(coupled.input_condition.largest, values[-1], rtol=1e-4)
    np.testing.assert_allclose(coupled.input_condition.smallest, values[0], rtol=1e-3)
    np.testing.assert_allclose(
        alone.input_condition.number, condition_number(dense, kernel, z[:1]), rtol=1e-4
    )


def test_report_of_a_block_without_parameters_has_no_weights():
    block = lh.report({"relu": (lambda _, z: nn.relu(z), {}, normal(2, 4))}, key=KEY)
    assert block.blocks["relu"].m_W is None
    assert str(block.blocks["relu"].input_condition) == "1"
    assert len(str(block).splitlines()[1].split()) == 4


def test_report_of_an_nnx_module():
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 4, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model, nnx.Param)

    def block(params, z):
        return nnx.merge(graph, params)(z)

    scored = lh.report({"mlp": (block, params, normal(8, 4))}, key=KEY).blocks["mlp"]
    assert scored.input_condition.exact
    assert scored.m_W is not None and scored.m_W.mean > 0


def test_report_bounds_large_blocks():
    pool = (average_pool, {}, normal(2, 32, 32, 8))
    scored = lh.report({"pool": pool}, key=KEY, num_matvecs=4).blocks["pool"]
    assert not scored.input_condition.exact
    np.testing.assert_allclose(scored.input_condition.number, 1, rtol=1e-4)


# --- What is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dense", 1.0, jnp.ones((2, 3))), "fn .* must be a function of params and z"),
        ((dense, jnp.eye(3), jnp.ones((2, 3), int)), "z must be of a real floating"),
        ((dense, jnp.eye(3), jnp.ones((2, 3), complex)), "z must be of a real float"),
        ((dense, jnp.eye(3), {"z": 1.0}), "z must be an array, but it is a dict"),
        ((dense, jnp.eye(3), jnp.float32(1)), "z must have the batch as first axis"),
        ((dense, jnp.eye(3), jnp.ones((0, 3))), r"no empty axis, .* \(0, 3\)"),
        ((lambda p, z: (z, z), {}, jnp.ones((2, 3))), "must return one array"),
        ((lambda p, z: {"y": z}, {}, jnp.ones((2, 3))), "must return one array.*'y'"),
        ((lambda p, z: z > 0, {}, jnp.ones((2, 3))), "output of fn .* it is bool"),
        ((lambda p, z: z.sum(), {}, jnp.ones((2, 3))), r"output of fn .* is \(\)"),
        ((lambda p, z: z.T, {}, jnp.ones((2, 3))), r"made \(3, 2\) of z's \(2, 3\)"),
    ],
)
def test_blocks_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lh.input_hessian(*arguments)
    with pytest.raises(ValueError, match=f"block 'first': .*{message}"):
        lh.report({"first": arguments}, key=KEY)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "params holds no array"),
        ({"a": {"kernel": jnp.eye(3, dtype=int)}}, "'a/kernel' .* it is int"),
        ({"a": 1.0}, "parameter 'a' must be an array, but it is a float"),
    ],
)
def test_parameters_without_a_hessian_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        lh.weight_hessian(lambda params, z: z, params, jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (jnp.ones((2, 4)), r"target .* shape \(2, 3\), but it has \(2, 4\)"),
        (jnp.ones((2, 3), int), "target must be of a real floating dtype"),
        (1.0, "target must be an array"),
    ],
)
def test_targets_that_do_not_fit_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        lh.input_hessian(dense, jnp.eye(3), jnp.ones((2, 3)), target=target)


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


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_laws_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match=r"ratio .* must be positive and finite"):
        lh.marchenko_pastur(value)
    with pytest.raises(ValueError, match=r"mean .* must be positive and finite"):
        lh.marchenko_pastur(1.0, mean=value)


def test_a_width_that_is_not_positive_is_refused():
    hessian = lh.input_hessian(dense, jnp.eye(3), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"width .* must be positive"):
        lh.spectrum(hessian, key=KEY).density(1.0, width=0.0)


def test_a_report_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"'first' must be \(fn, params, z\)"):
        lh.report({"first": dense}, key=KEY)  # pyright: ignore[reportArgumentType]


def test_without_matfree_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree", None)
    hessian = lh.input_hessian(dense, jnp.eye(3), jnp.ones((5, 3)))
    for function in (lh.mean_diagonal, lh.spectrum):
        with pytest.raises(ImportError, match=r"matfree.*local-hessian"):
            function(hessian, key=KEY)
    # Small blocks need none.
    assert lh.condition(hessian, key=KEY).number == 1
