"""Blocks whose local Hessians are known, and what their tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from backmatch_optax import local_hessian as lh

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


def rotation(size, seed):
    return jnp.asarray(np.linalg.qr(normal(size, size, seed=seed))[0])


def pooled(reducer, initial, window):
    window = (1, window, window, 1)
    return lambda _, z: jax.lax.reduce_window(
        z, initial, reducer, window, window, "VALID"
    )


def average_pool(_, z):
    return pooled(jax.lax.add, 0.0, 2)(_, z) / 4


def condition_number(fn, params, z):
    return lh.condition(lh.input_hessian(fn, params, z), key=KEY).number
