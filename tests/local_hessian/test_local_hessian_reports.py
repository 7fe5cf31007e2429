"""Blocks of a network scored side by side."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hessian_blocks import (
    KEY,
    average_pool,
    condition_number,
    dense,
    normal,
    normalised_dense,
)

from backmatch_optax import local_hessian as lh


def test_report_shows_what_batch_normalisation_and_a_skip_do():
    kernel = normal(12, 12, size=0.05) * jnp.geomspace(0.01, 1, 12)

    def small_residual(kernel, z):
        return z + 0.1 * normalised_dense(kernel, z)

    z = normal(16, 12, seed=1)
    report = lh.report(
        {
            "plain": (dense, kernel, z),
            "with BatchNorm": (normalised_dense, kernel, z),
            "with skip": (small_residual, kernel, z),
        },
        key=KEY,
        num_probes=100,
    )
    plain, normalised, residual = report.blocks.values()
    assert normalised.input_condition.number < plain.input_condition.number / 10
    assert residual.input_condition.number < 10
    np.testing.assert_allclose(plain.m_z.mean, jnp.sum(kernel**2) / 12, rtol=0.2)
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

    z = normal(8, 4)
    scored = lh.report({"mlp": (block, params, z)}, key=KEY).blocks["mlp"]
    values = lh.eigenvalues(lh.weight_hessian(block, params, z))
    assert scored.m_W is not None and scored.weight_condition is not None
    np.testing.assert_allclose(scored.m_W.mean, values.mean(), rtol=0.3)
    assert scored.weight_condition.largest == values[-1]
    assert scored.weight_condition.zeros == np.mean(values == 0)


def test_report_bounds_large_blocks():
    pool = (average_pool, {}, normal(2, 32, 32, 8))
    scored = lh.report({"pool": pool}, key=KEY, num_matvecs=4).blocks["pool"]
    assert not scored.input_condition.exact
    np.testing.assert_allclose(scored.input_condition.number, 1, rtol=1e-4)


def test_a_report_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"'first' must be \(fn, params, z\)"):
        lh.report({"first": dense}, key=KEY)  # pyright: ignore[reportArgumentType]
