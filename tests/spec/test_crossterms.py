"""Arms that are functions of one signal, against that signal's own derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import curvatures

import backmatch_optax as bmo
from backmatch_optax import spec


def constant(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x)


def batch_norm(h: jax.Array) -> jax.Array:
    # Statistics count as constants (BM (36)).
    return (h - constant(h.mean())) / constant(jnp.sqrt(h.var() + 1e-3))


def rms_norm(h: jax.Array) -> jax.Array:
    return h / constant(jnp.sqrt(jnp.mean(h**2) + 1e-3))


RELU, SILU, MINUS = spec.Activation("relu"), spec.Activation("silu"), spec.Scale(-1)
BATCH, RMS = spec.BatchNorm(epsilon=1e-3), spec.RMSNorm(epsilon=1e-3)
ARMS: dict[str, tuple[list[spec.Link], Callable[[Any], Any]]] = {
    "h + h": ([spec.Residual([])], lambda h: 2 * h),
    "h + relu(h)": ([spec.Residual([RELU])], lambda h: h + jax.nn.relu(h)),
    "h + relu(h) twice": (
        [spec.Residual([RELU]), spec.Residual([RELU])],
        lambda h: h + 3 * jax.nn.relu(h),
    ),
    "relu(h) - h": (
        [spec.Residual([RELU], [MINUS])],
        lambda h: jax.nn.relu(h) - h,
    ),
    "silu(h) - h / 2": (
        [spec.Residual([SILU], [spec.Scale(-0.5)])],
        lambda h: jax.nn.silu(h) - h / 2,
    ),
    "silu(h) + relu(h) after relu": (
        [RELU, spec.Residual([SILU], [RELU])],
        lambda h: jax.nn.silu(jax.nn.relu(h)) + jax.nn.relu(h),
    ),
    "inside one another": (
        [spec.Residual([spec.Residual([spec.Activation("tanh")])], [spec.Scale(2)])],
        lambda h: 3 * h + jnp.tanh(h),
    ),
    "BN(h) - h": ([spec.Residual([BATCH], [MINUS])], lambda h: batch_norm(h) - h),
    "BN(relu(h)) - h": (
        [spec.Residual([RELU, BATCH], [MINUS])],
        lambda h: batch_norm(jax.nn.relu(h)) - h,
    ),
    "rms(relu(h)) - h": (
        [spec.Residual([RELU, RMS], [MINUS])],
        lambda h: rms_norm(jax.nn.relu(h)) - h,
    ),
}


@pytest.mark.parametrize("moment", [0.3, 4.0])
@pytest.mark.parametrize("name", ARMS)
def test_arms_without_kernels_are_one_function_of_their_input(name, moment):
    links, function = ARMS[name]
    # Equally likely values of a Gaussian, as many as float32 can add up.
    quantiles = (np.arange(40_000) + 0.5) / 40_000
    h = moment**0.5 * jax.scipy.special.ndtri(jnp.asarray(quantiles, jnp.float32))
    outputs, slopes = jax.jvp(function, (h,), (jnp.ones_like(h),))
    found = curvatures(links, {}, (8,), moment=moment, gains="mean_field")
    assert found["input"] == pytest.approx(float(jnp.mean(slopes**2)), rel=2e-2)
    met = spec.LayerChain(
        [spec.Scale(moment**0.5), *links, spec.Dense("above")], input_shape=(8,)
    )
    scale = bmo.layer_scales(
        met,
        {"above": {"kernel": jnp.ones((8, 1))}},
        gains="mean_field",
        norm_floor=0.0,
        normalize=False,
    )["above"]
    assert 1 / float(scale) == pytest.approx(float(jnp.mean(outputs**2)), rel=2e-2)


def test_arms_with_kernels_of_their_own_stay_unrelated():
    # And the papers' gains know of no relation at all.
    chain = spec.LayerChain([spec.Residual([RELU]), spec.Dense("c")], input_shape=(8,))
    params = {"c": {"kernel": jnp.ones((8, 1))}}
    options: Any = {"norm_floor": 0.0, "normalize": False}
    assert float(bmo.layer_scales(chain, params, **options)["c"]) == pytest.approx(0.5)
    branch = spec.Residual([spec.Dense("a")])
    chain = spec.LayerChain([branch, spec.Dense("c")], input_shape=(8,))
    params |= {"a": {"kernel": jnp.eye(8)}}
    scales = bmo.layer_scales(chain, params, gains="mean_field", **options)
    assert float(scales["c"]) == pytest.approx(0.5)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_scales_stay_finite_and_norms_cancel_below_a_batch_norm(size):
    links = [spec.Dense("a"), spec.Residual([RELU]), spec.BatchNorm(epsilon=0)]
    chain = spec.LayerChain([*links, spec.Dense("b")], input_shape=(8,))

    def scales(size: float) -> dict[str, jax.Array]:
        params = {name: {"kernel": jnp.eye(8)} for name in "ab"}
        params["a"] = {"kernel": size * jnp.eye(8)}
        return bmo.layer_scales(chain, params, gains="mean_field", normalize=False)

    found, ordinary = scales(size), scales(1.0)
    np.testing.assert_allclose(found["b"], ordinary["b"], rtol=1e-5)
    grown = size**2 if size else 1.0  # zeros count as an ordinary kernel
    np.testing.assert_allclose(found["a"], grown * ordinary["a"], rtol=1e-4)
