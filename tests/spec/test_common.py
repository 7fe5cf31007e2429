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


def gated(x: jax.Array) -> jax.Array:
    x = nn.Dense(24, name="a")(x)
    x = nn.silu(nn.Dense(48, name="b")(x)) * nn.Dense(48, name="c")(x)
    return nn.Dense(32, name="d")(x)


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


class Overlapping(nn.Module):
    """A pooling over images, then a kernel, a mean over positions and a head."""

    pool: Any
    strides: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (3, 3), padding="CIRCULAR", name="a")(x))
        x = self.pool(x, (3, 3), (self.strides, self.strides), "SAME")
        x = nn.relu(nn.Conv(16, (1, 1), name="b")(x))
        return nn.Dense(8, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(
    ("pool", "link"), [(nn.avg_pool, spec.AvgPool), (nn.max_pool, spec.MaxPool)]
)
def test_what_overlapping_windows_hand_to_a_position_adds_up(pool, link, strides):
    first = spec.Conv("a", padding="CIRCULAR")
    pooled = link((3, 3), strides=strides, padding="SAME")
    links = [first, RELU, pooled, spec.Conv("b"), RELU, POOL, spec.Dense("head")]
    ratios = agreement(Overlapping(pool, strides), links, normal(8, 8, 6), draws=40)
    # As if cotangents were unrelated, the first kernel would be at 0.15 to 0.5.
    for layer in "ab":
        assert 0.7 < ratios[f"{layer}/kernel"] < 1.5, ratios


class OneWindow(nn.Module):
    """A maximum along one axis of an image, and a mean along the other."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (3, 3), padding="CIRCULAR", name="a")(x))
        return nn.Dense(8, name="head")(nn.max_pool(x, (8, 1)).mean((1, 2)))


def test_a_single_window_overlaps_with_no_other():
    links = [spec.Conv("a", padding="CIRCULAR"), RELU, spec.MaxPool((8, 1))]
    links += [POOL, spec.Dense("head")]
    ratios = agreement(OneWindow(), links, normal(8, 8, 6), draws=40)
    assert 0.7 < ratios["a/kernel"] < 1.5, ratios


class Grouped(nn.Module):
    """Normalisations over groups and positions, a mean over positions and a head."""

    groups: int

    @nn.compact
    def __call__(self, x):
        for name in "ab":
            x = nn.Conv(24, (3, 3), padding="CIRCULAR", name=name)(x)
            x = nn.relu(nn.GroupNorm(self.groups, name=f"n{name}")(x))
        return nn.Dense(8, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("groups", [24, 12, 2])
def test_a_group_norm_takes_away_what_positions_have_in_common(groups):
    links: list[spec.Link] = []
    for name in "ab":
        norm = spec.GroupNorm(f"n{name}", num_groups=groups)
        links += [spec.Conv(name, padding="CIRCULAR"), norm, RELU]
    links += [POOL, spec.Dense("head")]
    ratios = agreement(Grouped(groups), links, normal(8, 8, 6), draws=20)
    # As if nothing were taken away, the second kernel of 24 groups would be at 80.
    for layer in ("a", "b", "head"):
        assert 0.8 < ratios[f"{layer}/kernel"] < 1.6, ratios


def test_two_kernels_that_see_one_signal_are_not_unrelated():
    gate = spec.Gate([spec.Dense("b"), spec.Activation("silu")], [spec.Dense("c")])
    links = [spec.Dense("a"), gate, spec.Dense("d"), POOL, spec.Dense("head")]
    # With unrelated terms they would be at 0.24.
    ratios = agreement(Pooled(gated), links, normal(64, 32), draws=30)
    for layer in ("b", "c", "d", "head"):
        assert 0.55 < ratios[f"{layer}/kernel"] < 1.5, ratios


@pytest.mark.parametrize("positions", [1, 2, 100])
def test_behind_a_relu_cotangents_go_with_the_signal(positions):
    # The derivative of `mean(relu(g x))` by `g` is the mean of `x` where it is
    # positive: `E x^2 = 1 / 2` and `(E x)^2 = 1 / (2 pi)`.
    links = [spec.LayerScale("g"), RELU, POOL]
    chain = spec.LayerChain(links, input_shape=(positions, 4))
    params = {"g": jnp.ones(4)}
    scales = bmo.layer_scales(chain, params, gains="mean_field", normalize=False)
    square = (1 / 2 + (positions - 1) / (2 * np.pi)) / positions
    np.testing.assert_allclose(scales["g"], 1 / square, rtol=1e-3)


class Modulated(nn.Module):
    """A signal multiplied and shifted by what a label says, then a ReLU."""

    @nn.compact
    def __call__(self, label, x):
        known = nn.Embed(8, 24, name="embed")(label)
        shift = nn.Dense(32, name="shift")(known)[:, None]
        x = nn.Dense(32, name="dense")(x) * nn.Dense(32, name="gate")(known)[:, None]
        return nn.Dense(8, name="head")(nn.relu(x + shift).mean(1))


def test_a_gate_for_all_positions_gets_what_adds_up():
    links = [
        spec.Embed("embed"),
        spec.Memory(
            [
                spec.Input((60, 16)),
                spec.Dense("dense"),
                spec.Gate([], [spec.Recall((24,)), spec.Dense("gate")]),
                spec.Residual(
                    [],
                    [
                        spec.Recall((24,)),
                        spec.Dense("shift"),
                        spec.Reshape((1, 32)),
                        spec.Resize((60,)),
                    ],
                ),
                RELU,
                POOL,
                spec.Dense("head"),
            ]
        ),
    ]

    def draw(key: jax.Array) -> Any:
        return jax.random.randint(key, (), 0, 8), jax.random.normal(key, (60, 16))

    for path, ratio in agreement(Modulated(), links, draw, draws=60).items():
        assert 0.6 < ratio < 1.6, (path, ratio)


class Normed(nn.Module):
    """Three convolutions, each with a normalisation and a ReLU, then a mean."""

    norm: str

    @nn.compact
    def __call__(self, x):
        norm: Any = {
            "batch": nn.BatchNorm(False),
            "group": nn.GroupNorm(4),
            "layer": nn.LayerNorm(),
        }[self.norm]
        for features in (16, 32, 32):
            x = nn.relu(norm.copy()(nn.Conv(features, (3, 3))(x)))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_the_scales_of_normalisations_below_a_mean_are_as_measured(norm):
    model, x = Normed(norm), jax.random.normal(jax.random.key(1), (32, 12, 12, 3))
    variables: Any = model.init(jax.random.key(0), x)
    params, others = variables["params"], {**variables}
    del others["params"]

    def fn(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params, **others}, x, mutable=[*others])[0]

    chain = bmo.infer_spec(model, x)
    found = bmo.compare_scales(chain, params, fn, x, key=jax.random.key(2))
    for path, ratio in found.ratios.items():
        assert 0.4 < ratio < 2.6, (path, ratio)


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
