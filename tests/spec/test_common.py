"""Below a mean over positions: what they have in common, against real Jacobians."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreements import agreement, normal

import backmatch_optax as bmo
from backmatch_optax import spec

RELU, GELU, POOL = (
    spec.Activation("relu"),
    spec.Activation("gelu"),
    spec.GlobalAvgPool(),
)


class Pooled(nn.Module):
    """Links over positions, then their mean and a head."""

    body: Any

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(self.body(x).mean(1))


def mlp(x: jax.Array) -> jax.Array:
    x = nn.gelu(nn.Dense(64, name="a")(x))
    return nn.Dense(32, name="b")(nn.relu(nn.Dense(48, name="c")(x)))


def attended(x: jax.Array) -> jax.Array:
    x = x + nn.MultiHeadDotProductAttention(2, name="a")(x, x)
    return x + nn.MultiHeadDotProductAttention(2, name="b")(x, x)


CASES: dict[str, tuple[Any, list[spec.Link]]] = {
    "kernels behind activations": (
        mlp,
        [spec.Dense("a"), GELU, spec.Dense("c"), RELU, spec.Dense("b")],
    ),
    "attention": (
        attended,
        [spec.Residual([spec.Attention("a")]), spec.Residual([spec.Attention("b")])],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_terms_add_up_where_all_positions_get_the_same(name):
    body, links = CASES[name]
    links = [*links, POOL, spec.Dense("head")]
    ratios = agreement(Pooled(body), links, normal(12, 32), draws=30)
    for path, ratio in ratios.items():
        if "key/bias" not in path:  # without a gradient
            assert 0.65 < ratio < 1.5, (path, ratio)
    # As if terms were unrelated, the largest would be off by the number of positions.
    without = agreement(Pooled(body), links, normal(12, 32), draws=5, gains="paper")
    assert (
        max(1 / ratio for path, ratio in without.items() if "key/bias" not in path) > 4
    )


class Dense(nn.Module):
    """Branches of different sizes, side by side below a BatchNorm."""

    @nn.compact
    def __call__(self, x):
        y = jnp.concatenate([0.2 * nn.Dense(16, name="a")(x), x], axis=-1)
        y = nn.BatchNorm(False, use_bias=False, use_scale=False)(y)
        return nn.Dense(8, name="head")(y)


@pytest.mark.parametrize(
    "between",
    [
        [],
        [spec.Scale(2.0)],
        [spec.Dropout(), spec.Flatten()],
        [spec.Bias("zero"), spec.LayerScale("one")],
        [spec.Slice((0, 32), axis=-1)],
        "repeat",
    ],
    ids=["nothing", "scale", "flatten", "learned", "slice", "repeat"],
)
def test_a_batch_norm_divides_each_branch_by_its_own_size(between):
    joined = spec.Concatenate([[spec.Dense("a"), spec.Scale(0.2)], []])
    links = [joined, *between]
    if between == "repeat":
        links = [spec.Repeat([joined, spec.Slice((0, 16), axis=-1)], 1)]
    links += [spec.BatchNorm(), spec.Dense("head")]
    chain = spec.LayerChain(links, input_shape=(16,))
    x = jax.random.normal(jax.random.key(0), (256, 16))
    variables = Dense().init(jax.random.key(1), x)

    def fn(params, x):
        given = {**variables, "params": {**variables["params"], **params}}
        return Dense().apply(given, x, mutable=["batch_stats"])[0]

    params = {**variables["params"]}
    if between == "repeat":  # only what the head reads: the first branch
        params["a"] = jax.tree.map(lambda leaf: leaf[None], params["a"])
        params["head"] = jax.tree.map(lambda leaf: leaf[:16], params["head"])
        scales = bmo.layer_scales(chain, params, gains="mean_field")
        plain = spec.LayerChain(
            [joined, spec.Slice((0, 16), axis=-1), *links[1:]], input_shape=(16,)
        )
        params["a"] = variables["params"]["a"]
        alone = bmo.layer_scales(plain, params, gains="mean_field")
        np.testing.assert_allclose(scales["a"][0], alone["a"], rtol=1e-5)
        return
    learned = {"zero": jnp.zeros(32), "one": jnp.ones(32)}
    declared = params | (learned if "zero" in chain.paths else {})
    compared = bmo.compare_scales(chain, declared, fn, x, key=jax.random.key(2))
    assert 0.8 < compared.ratios["a"] < 1.25
