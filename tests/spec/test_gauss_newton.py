"""Residuals and whole networks against their Gauss-Newton matrices."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jacobians import RTOL

import backmatch_optax as bmo
from backmatch_optax import spec

# Residual: the arms are added, and what they share is left out.


def residual_case(shortcut: bool) -> tuple[spec.Link, Any, Any]:
    rng = np.random.default_rng(3)
    params = {"branch": jnp.asarray(rng.normal(size=(4, 4)))}
    if shortcut:
        params["shortcut"] = jnp.asarray(rng.normal(size=(4, 4)))

    def apply(params, x, sign):
        past = x @ params["shortcut"] if shortcut else x
        return past + sign * (x @ params["branch"])

    arm = [spec.Dense("shortcut")] if shortcut else []
    return spec.Residual([spec.Dense("branch")], arm), params, apply


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_arms_of_a_residual_add_on_the_average_over_their_sign(shortcut):
    link, params, apply = residual_case(shortcut)
    x = jnp.zeros((1, 4))
    jacobians = [
        jax.jacrev(lambda x, s=s: apply(params, x, s))(x)[0, :, 0] for s in (1, -1)
    ]
    tree = {name: {"kernel": kernel} for name, kernel in params.items()}
    below = spec.Block("below", weight_curvature=1.0, input_curvature=1.0)
    above = spec.Dense("above")
    chain = spec.LayerChain([below, link, above], input_shape=(4,))
    # An identity above hands on a factor of one, and meets what the sum puts out.
    tree |= {"below": {"kernel": jnp.ones(1)}, "above": {"kernel": jnp.eye(4)}}
    scales = {
        path: float(s)
        for path, s in bmo.layer_scales(chain, tree, normalize=False).items()
    }
    mean_square = np.mean([np.square(j) for j in jacobians]) * 4
    np.testing.assert_allclose(1 / scales["below"], mean_square, rtol=RTOL)
    np.testing.assert_allclose(1 / scales["above"], mean_square, rtol=RTOL)
    # Each arm has the sum's output for its own.
    np.testing.assert_allclose(scales["branch"], 1.0, rtol=RTOL)


# Whole networks. With linear activations and independent Gaussian kernels the product
# of the rules is the mean diagonal of the Gauss-Newton matrix in expectation, and so
# is the mean over draws: 400 of them know it to between 1 and 4 %.


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def conv(x: jax.Array, kernel: jax.Array, strides: int = 1) -> Any:
    layer = nn.Conv(
        kernel.shape[-1],
        kernel.shape[:-2],
        strides=strides,
        padding="CIRCULAR",
        use_bias=False,
    )
    return layer.apply({"params": {"kernel": kernel}}, x)


def normalize(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # By the variance that a white input has behind the kernel, a constant.
    return x / jax.lax.stop_gradient(jnp.sqrt(jnp.sum(kernel**2) / kernel.shape[-1]))


def dense_net(p: Any, x: jax.Array) -> jax.Array:
    return linear(linear(linear(x, p["a"]), p["b"]), p["c"])


def normalized_net(p: Any, x: jax.Array) -> jax.Array:
    x = normalize(linear(x, p["a"]), p["a"])
    return linear(normalize(linear(x, p["b"]), p["b"]), p["c"])


def conv_net(p: Any, x: jax.Array) -> jax.Array:
    x = conv(conv(x, p["a"]), p["b"], strides=2)
    return linear(x.reshape((len(x), -1)), p["c"])


def pooled_net(p: Any, x: jax.Array) -> jax.Array:
    x = nn.avg_pool(conv(x, p["a"]), (2, 2), strides=(2, 2))
    return linear(x.mean(axis=(1, 2)), p["c"])


def residual_net(p: Any, x: jax.Array) -> jax.Array:
    x = linear(x, p["a"])
    return linear(x + linear(x, p["b"]), p["c"])


DENSES = [spec.Dense("a"), spec.Dense("b"), spec.Dense("c")]
NETS: dict[str, Any] = {
    "dense": (dense_net, DENSES, (16,), {"a": (16, 24), "b": (24, 16), "c": (16, 8)}),
    "normalized": (
        normalized_net,
        [DENSES[0], spec.BatchNorm(), DENSES[1], spec.BatchNorm(), DENSES[2]],
        (16,),
        {"a": (16, 24), "b": (24, 16), "c": (16, 8)},
    ),
    "conv": (
        conv_net,
        [
            spec.Conv("a", padding="CIRCULAR"),
            spec.Conv("b", padding="CIRCULAR", strides=2),
            spec.Flatten(),
            DENSES[2],
        ],
        (4, 4, 3),
        {"a": (3, 3, 3, 8), "b": (2, 2, 8, 6), "c": (24, 5)},
    ),
    "pooled": (
        pooled_net,
        [
            spec.Conv("a", padding="CIRCULAR"),
            spec.AvgPool((2, 2), strides=2),
            spec.GlobalAvgPool(),
            DENSES[2],
        ],
        (4, 4, 3),
        {"a": (3, 3, 3, 8), "c": (8, 5)},
    ),
    "residual": (
        residual_net,
        [DENSES[0], spec.Residual([DENSES[1]]), DENSES[2]],
        (16,),
        {"a": (16, 24), "b": (24, 24), "c": (24, 8)},
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_scales_are_the_inverse_mean_diagonal_of_the_gauss_newton_matrix(name):
    apply, links, input_shape, shapes = NETS[name]
    chain = spec.LayerChain(links, input_shape=input_shape)
    # The papers count a pooled signal as large as it was before.
    gains = "mean_field" if name == "pooled" else "paper"

    def scale_times_diagonal(key: jax.Array) -> Any:
        names = ["x", *shapes]
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        params = {n: jax.random.normal(keys[n], shape) for n, shape in shapes.items()}
        x = jax.random.normal(keys["x"], (1, *input_shape))
        jacobian = jax.jacrev(apply)(params, x)
        tree = {n: {"kernel": k} for n, k in params.items()}
        scales = bmo.layer_scales(chain, tree, gains=gains, normalize=False)
        return {
            n: scales[n] * jnp.sum(jacobian[n] ** 2) / params[n].size for n in params
        }

    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.jit(lambda keys: jax.lax.map(scale_times_diagonal, keys))(keys)
    for path, ratios in draws.items():
        np.testing.assert_allclose(np.mean(ratios), 1.0, atol=0.1, err_msg=path)
