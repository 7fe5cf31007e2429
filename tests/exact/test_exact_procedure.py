"""LH Procedure 1 against back-propagation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_cases import KERNEL, X, as_list, normal

from backmatch_optax import exact


def residual(kernel, z):
    y = jax.lax.conv_general_dilated(
        z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return z + jax.nn.relu(y)


def normalised(params, z):
    z = z.reshape(len(z), -1) @ params["kernel"]
    return params["scale"] * (z - z.mean(0)) / z.std(0)


def test_procedure_1_is_back_propagation(x64):
    """LH Proposition 1, for blocks of several layers, one of them residual."""
    blocks = [residual, normalised, lambda kernel, z: jnp.tanh(z) @ kernel]
    params: list[Any] = [
        normal(3, 3, 2, 2),
        {"kernel": normal(32, 7), "scale": normal(7)},
        normal(7, 5),
    ]
    x, labels = normal(6, 4, 4, 2), np.arange(6) % 5

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def whole(params):
        z = x
        for block, weights in zip(blocks, params, strict=True):
            z = block(weights, z)
        return loss(z)

    found = jax.jit(
        lambda params, x: exact.procedure_1(blocks, params, x, loss, step_size=0.7)
    )(params, x)
    gradient = jax.jit(jax.grad(whole))(params)
    expected = jax.tree.map(lambda w, g: w - 0.7 * g, params, gradient)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_a_list_is_an_input():
    found, expected = (
        exact.procedure_1([lambda w, z: z @ w], [KERNEL], x, jnp.sum, step_size=1)[0]
        for x in (as_list(X), X)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("block", "params", "x", "message"),
    [
        (jnp.dot, [], X, "1 blocks and 0 params"),
        (lambda w, z: (z, z), [KERNEL], X, r"blocks\[0\] must be an array.* tuple"),
        (jnp.dot, [KERNEL], "x", "x must be an array, but it is a str"),
        (jnp.dot, [KERNEL], X[:0], r"x of shape \(0, 3\) has no entries"),
        (jnp.dot, [KERNEL], X.astype(int), "x must be .* but it is of int"),
        (lambda w, z: jnp.argmax(z), [KERNEL], X, r"output of blocks\[0\] .* of int"),
    ],
)
def test_bad_arguments_are_explained(block, params, x, message):
    with pytest.raises(ValueError, match=f"^procedure_1: .*{message}"):
        exact.procedure_1([block], params, x, jnp.sum, step_size=1)
