"""Pooling against the Jacobians of Flax's."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from jacobians import assert_close, curvatures, distinct, measured

from backmatch_optax import spec

POOLS = {
    "2x2": ((4, 6, 3), (2, 2), {"strides": (2, 2)}),
    "overlapping": ((5, 4, 2), (3, 2), {"strides": (2, 1)}),
    "stride one": ((5, 4, 2), (3, 2), {}),
    "remainder dropped": ((5, 5, 2), (2, 2), {"strides": (2, 2)}),
    "1d": ((7, 3), (3,), {"strides": (2,)}),
    "3d": ((4, 4, 2, 2), (2, 2, 2), {"strides": (2, 2, 2)}),
}


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize(
    ("link", "pool"), [(spec.MaxPool, nn.max_pool), (spec.AvgPool, nn.avg_pool)]
)
def test_pooling(link, pool, case):
    input_shape, window, options = POOLS[case]
    found = measured(
        lambda _, x: pool(x, window, **options), {}, distinct(1, *input_shape)
    )
    assert_close(curvatures(link(window, **options), {}, input_shape), found)


def test_max_pooling_never_selects_a_padded_position():
    options: Any = {"strides": (2, 2), "padding": "SAME"}
    found = measured(
        lambda _, x: nn.max_pool(x, (3, 3), **options), {}, distinct(1, 5, 6, 2)
    )
    assert_close(curvatures(spec.MaxPool((3, 3), **options), {}, (5, 6, 2)), found)


def test_average_pooling_counts_padded_positions_like_others():
    options: Any = {"strides": (2, 2), "padding": ((1, 1), (0, 1))}
    x = distinct(1, 5, 6, 2)
    share = float(nn.avg_pool(jnp.ones_like(x), (3, 3), **options).mean())
    assert 0.3 < share < 1
    found = measured(lambda _, x: nn.avg_pool(x, (3, 3), **options), {}, x)
    rule = curvatures(spec.AvgPool((3, 3), **options), {}, (5, 6, 2))
    assert_close({"input": rule["input"] * share}, found)


@pytest.mark.parametrize("input_shape", [(6, 3), (4, 5, 3), (2, 3, 4, 2)])
def test_global_average_pooling(input_shape):
    axes = tuple(range(1, len(input_shape)))
    found = measured(lambda _, x: x.mean(axis=axes), {}, distinct(1, *input_shape))
    assert_close(curvatures(spec.GlobalAvgPool(), {}, input_shape), found)


def test_flatten():
    found = measured(lambda _, x: x.reshape((len(x), -1)), {}, distinct(1, 3, 4, 2))
    assert_close(curvatures(spec.Flatten(), {}, (3, 4, 2)), found)
