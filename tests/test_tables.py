"""What `describe` says beside its numbers."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import backmatch_optax as bmo
from backmatch_optax import spec


class Pooled(nn.Module):
    """Attention, then the mean over positions or the last position alone."""

    mean: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(2, name="attend")(nn.LayerNorm()(x))
        return nn.Dense(3)(x.mean(1) if self.mean else x)


@pytest.mark.parametrize("mean", [True, False])
def test_attention_below_a_mean_over_positions_is_said_to_be_approximate(mean):
    model, x = Pooled(mean), jnp.ones((2, 5, 8))
    params: Any = model.init(jax.random.key(0), x)["params"]
    table = bmo.describe(bmo.infer_spec(model, x), params)
    assert ("approximate: " in table) == mean
    assert ("same signal back from the mean" in table) == mean
    exact = bmo.describe(bmo.infer_spec(model, x), params, gains="mean_field")
    assert "approximate" not in exact


def test_links_that_are_approximate_everywhere_say_so():
    links = [spec.ClassToken("cls"), spec.Dense("head")]
    chain = spec.LayerChain(links, input_shape=(4, 8))
    params = {"cls": jnp.ones((1, 1, 8)), "head": {"kernel": jnp.ones((8, 3))}}
    *_, last = bmo.describe(chain, params).splitlines()
    assert last.startswith("approximate: 'cls': its rule takes the mean over all")
    block = spec.Block("head", weight_curvature=1.0, input_curvature=1.0)
    chain = spec.LayerChain([block], input_shape=(4, 8))
    *_, last = bmo.describe(chain, {"head": params["head"]}).splitlines()
    assert last.startswith("approximate: 'head': a block's numbers do not follow")
    chain = spec.LayerChain([links[1]], input_shape=(4, 8))
    table = bmo.describe(chain, {"head": params["head"]})
    assert "approximate" not in table


@pytest.mark.parametrize("stacked", [False, True])
def test_many_layers_of_attention_are_said_to_be_approximate(stacked):
    def last(layers: int) -> str:
        def kernels(path: str, shape: tuple[int, ...]) -> dict[str, dict]:
            return {path: {"kernel": jnp.ones((layers, *shape) if stacked else shape)}}

        params, names = {}, ["a"] if stacked else [f"a{i}" for i in range(layers)]
        for name in names:
            for role in ("query", "key", "value"):
                params |= kernels(f"{name}/{role}", (4, 2, 2))
            params |= kernels(f"{name}/out", (2, 2, 4))
        links = [spec.Residual([spec.Attention(name)]) for name in names]
        repeated = [spec.Repeat(links, layers)] if stacked else links
        chain = spec.LayerChain(repeated, input_shape=(6, 4))
        return bmo.describe(chain, params, gains="mean_field").splitlines()[-1]

    assert "approximate" not in last(3)
    assert last(5).startswith("approximate: layers[")
    assert ("and 2 more: many layers" in last(5)) != stacked


@pytest.mark.parametrize("strides", [1, 3])
def test_averages_over_windows_that_overlap_are_said_to_be_approximate(strides):
    pool = spec.AvgPool((3, 3), strides=strides)
    chain = spec.LayerChain([spec.Conv("conv"), pool], input_shape=(9, 9, 3))
    params = {"conv": {"kernel": jnp.ones((3, 3, 3, 4))}}
    assert ("neighbours alike" in bmo.describe(chain, params)) == (strides == 1)
