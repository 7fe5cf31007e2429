"""BatchNorm, and what back-propagates as back-matching does."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_cases import X, as_list, directions, normal

from backmatch_optax import exact


def test_batch_norm_returns_the_change_that_it_scales_to_the_wanted_one(x64):
    """BM (26): each input by itself, with mean and variance as they are."""
    x, wanted = 3 * normal(6, 2, 4) + 1, normal(6, 2, 4, seed=1)
    (change,) = directions(functools.partial(exact.batch_norm, epsilon=0.0), wanted, x)
    std = np.asarray(x).std((0, 1))
    np.testing.assert_allclose(6 * change, wanted * std, rtol=1e-10)


def test_batch_norm_is_back_propagation_times_the_variance(x64):
    """BM (27), without approximation where the terms it drops are zero."""
    x, wanted = 3 * normal(64, 4) + 1, normal(64, 4, seed=1)
    x_hat = (x - x.mean(0)) / x.std(0)
    wanted = wanted - wanted.mean(0)
    wanted = wanted - x_hat * (x_hat * wanted).mean(0)

    def ordinary(x):
        return (x - x.mean(0)) / jnp.sqrt(x.var(0))

    (expected,) = directions(ordinary, wanted, x)
    (found,) = directions(functools.partial(exact.batch_norm, epsilon=0.0), wanted, x)
    np.testing.assert_allclose(found, expected * np.asarray(x).var(0), rtol=1e-9)


def test_batch_norm_scale_and_bias_are_the_least_squares_solution(x64):
    x, wanted = normal(5, 3, 2) + 1, normal(5, 3, 2, seed=1)
    scale, bias = normal(2, 2)
    found = directions(exact.batch_norm, wanted, x, scale, bias)
    x_hat = np.asarray(exact.batch_norm(jnp.asarray(x)))
    for k in range(2):
        system = np.stack([x_hat[..., k].ravel(), np.ones(15)], 1)
        expected, *_ = np.linalg.lstsq(system, np.asarray(wanted)[..., k].ravel())
        np.testing.assert_allclose([found[1][k], found[2][k]], expected, rtol=1e-10)
    std = np.sqrt(np.asarray(x).var((0, 1)) + 1e-5)
    np.testing.assert_allclose(5 * found[0], wanted * std / scale, rtol=1e-10)


def test_a_zero_scale_hands_nothing_back():
    x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    layer = functools.partial(exact.batch_norm, scale=jnp.array([0.0, 1.0]))
    (change,) = directions(layer, jnp.ones((2, 2)), x)
    assert (change[:, 0] == 0).all()
    assert (change[:, 1] > 0).all()


def dropped(x):
    return jnp.where(jnp.arange(8).reshape(x.shape) % 3 == 0, 0, x / 0.6)


@pytest.mark.parametrize(
    ("layer", "same"),
    [
        (jax.nn.relu, True),  # BM (30), (31)
        (lambda x: x.reshape(2, 4)[:, ::-1], True),
        (lambda x: nn.max_pool(x[..., None], (2,), strides=(2,)), True),
        (dropped, False),
        (lambda x: nn.avg_pool(x[..., None], (2,), strides=(2,)), False),
        (jnp.tanh, False),
    ],
    ids=["relu", "reshape", "max_pool", "dropout", "avg_pool", "tanh"],
)
def test_what_back_propagates_as_back_matching_does(x64, layer, same):
    """BM (11): each unit by itself; where it does nothing, it is not asked to."""
    x = jnp.asarray(normal(2, 4))
    y, pull_back = jax.vjp(layer, x)
    wanted = normal(*y.shape, seed=1)
    columns = np.asarray(jax.jacobian(layer)(x)).reshape(y.size, x.size)
    solution = [np.linalg.lstsq(c[:, None], wanted.ravel())[0][0] for c in columns.T]
    found = np.asarray(pull_back(jnp.asarray(wanted))[0]).ravel()
    assert np.allclose(found, solution) == same


# --- Arguments -----------------------------------------------------------------------


def test_lists_are_arrays():
    x, scale, bias = normal(5, 2), normal(2, seed=1), normal(2, seed=2)
    np.testing.assert_array_equal(
        exact.batch_norm(x.tolist(), scale.tolist(), bias.tolist()),
        exact.batch_norm(x, scale, bias),
    )
    for found, expected in zip(
        exact.batch_statistics(x.tolist()), exact.batch_statistics(x), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_epsilon_may_be_traced():
    x = jnp.asarray(normal(5, 2))
    found = jax.jit(lambda x, epsilon: exact.batch_norm(x, epsilon=epsilon))(x, 0.5)
    np.testing.assert_allclose(found, exact.batch_norm(x, epsilon=0.5), rtol=1e-5)


@pytest.mark.parametrize("epsilon", [-1e-5, np.nan, np.inf, "0", None, jnp.ones(2)])
def test_epsilon_is_a_number_of_at_least_0(epsilon):
    with pytest.raises(ValueError, match=r"^bn1: epsilon \(=.* at least 0"):
        exact.batch_norm(X, epsilon=epsilon, name="bn1")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact.batch_norm(X[0]), r"\(batch, \*positions, features\).*\(3,\)"),
        (lambda: exact.batch_norm(X[:0]), r"x of shape \(0, 3\) has no entries"),
        (lambda: exact.batch_norm(X.astype(int)), "x must be .* but it is of int"),
        (lambda: exact.batch_norm(X, jnp.ones(2)), r"scale of shape \(3,\).*\(2,\)"),
        (
            lambda: exact.batch_norm(X, as_list([1, 1, 1])),
            "scale must be .* but it is of int",
        ),
        (lambda: exact.batch_norm(X, mean=jnp.ones(3)), "both mean and var"),
        (lambda: exact.batch_norm(X, dtype=int), "dtype .* must be a real floating"),
        (lambda: exact.batch_statistics(X.astype(int)), "real floating dtype"),
        (lambda: exact.batch_statistics(X[:0]), r"x of shape \(0, 3\) has no entries"),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
