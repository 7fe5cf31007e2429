"""Products with a local Hessian, and what is refused as a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hessian_blocks import KEY, dense, mlp, normal, normalised_dense
from jax.flatten_util import ravel_pytree

from backmatch_optax import local_hessian as lh

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
