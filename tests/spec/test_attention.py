"""Attention against the Jacobians of the Flax layers and models that have it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreements import agreement, normal
from flax import nnx

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.softmax_weights import softmax_weights
from examples.studies import families

ORTHOGONAL = nn.initializers.orthogonal()


def kernels(ratios: dict[str, float]) -> dict[str, float]:
    """Without the biases: that of the keys has no gradient at all."""
    return {path: r for path, r in ratios.items() if not path.endswith("/bias")}


class SelfAttention(nn.Module):
    causal: bool
    size: float  # of the kernels, and so of the logits

    @nn.compact
    def __call__(self, x):
        # It keeps the input white.
        x = nn.Dense(x.shape[-1], name="below", kernel_init=ORTHOGONAL)(x)
        init = nn.initializers.variance_scaling(self.size**2, "fan_in", "normal")
        attention = nn.MultiHeadDotProductAttention(2, kernel_init=init, name="a")
        return attention(
            x, mask=nn.make_causal_mask(x[..., 0]) if self.causal else None
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("size", "factor"), [(0.3, 1.2), (1.0, 1.25), (1.4, 1.3), (2.0, 1.4), (3.0, 1.4)]
)
def test_self_attention(causal, size, factor):
    # With logits of variance 0.01 to 81: from uniform weights to a single one.
    links = [spec.Dense("below"), spec.Attention("a", causal=causal)]
    ratios = agreement(SelfAttention(causal, size), links, normal(10, 12), draws=60)
    assert len(kernels(ratios)) == 5
    for path, ratio in kernels(ratios).items():
        assert 1 / factor < ratio < factor, (path, ratio)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", [2, 30])
@pytest.mark.parametrize("variance", [0.0, 0.3, 10.0, 100.0, 1000.0])
def test_weights_are_the_mean_over_many_draws(causal, positions, variance):
    lengths = np.arange(1, positions + 1) if causal else [positions]
    rng, drawn = np.random.default_rng(0), []
    for length in lengths:
        logits = rng.normal(0.0, np.sqrt(variance), (20_000, length))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        squares = (weights**2).sum(axis=1)
        spread = squares + squares**2 - 2 * (weights**3).sum(axis=1)
        drawn.append((squares.mean(), (1 - squares.mean()) ** 2, spread.mean()))
    found = softmax_weights(positions, causal)(jnp.float32(variance))
    assert found == pytest.approx(np.mean(drawn, axis=0), rel=0.06, abs=1e-6)


def test_both_gains_have_the_same_rule():
    links = [spec.Dense("below"), spec.Attention("a")]
    model = SelfAttention(False, 0.5)
    draw = normal(6, 8)
    paper, mean_field = (
        agreement(model, links, draw, draws=20, gains=gains)
        for gains in ("paper", "mean_field")
    )
    assert kernels(paper) == pytest.approx(kernels(mean_field), rel=1e-3)


class Placed(nn.Module):
    """Positions that differ little: the same is added at all of them."""

    pooled: bool

    @nn.compact
    def __call__(self, x):
        x = x + 2 * jnp.cos(jnp.arange(16.0) ** 2)
        if self.pooled:
            return nn.Dense(8, name="a")(x).mean(1)
        small = nn.initializers.variance_scaling(0.1, "fan_in", "normal")
        attention = nn.MultiHeadDotProductAttention(
            2, use_bias=False, kernel_init=small, name="a"
        )
        return attention(x)


@pytest.mark.parametrize("pooled", [False, True])
def test_what_positions_have_in_common_adds_up_over_them(pooled):
    size = float(2 * jnp.sqrt(jnp.mean(jnp.cos(jnp.arange(16.0) ** 2) ** 2)))
    behind = (
        [spec.Dense("a"), spec.GlobalAvgPool()] if pooled else [spec.Attention("a")]
    )
    path = "a/kernel" if pooled else "a/value/kernel"

    def ratio(common: float) -> float:
        constants = [spec.Input((12, 16), common=common), spec.Scale(size)]
        links = [spec.Residual([], constants), *behind]
        return agreement(Placed(pooled), links, normal(12, 16), draws=60)[path]

    assert 0.8 < ratio(0.999) < 1.25
    assert ratio(0.0) < 0.4  # of the curvature


def test_attention_with_fewer_features_than_its_input():
    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, qkv_features=8, name="a")(x)

    ratios = kernels(agreement(Narrow(), [spec.Attention("a")], normal(40, 32)))
    assert len(ratios) == 4
    for path, ratio in ratios.items():
        assert 0.8 < ratio < 1.25, (path, ratio)


class Biased(nn.Module):
    size: float  # of what is added to the logits
    shape: tuple[int, ...]  # of heads, queries and keys
    causal: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(x.shape[-1], name="below", kernel_init=ORTHOGONAL)(x)
        bias = self.param("b", nn.initializers.normal(self.size), self.shape)
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        return families.biased(2, bias, name="a")(x, mask=mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_numbers_that_are_added_to_the_logits(size, heads, causal):
    bias = [spec.Queries((heads, 10, 10), "b"), spec.Transpose((1, 2, 0))]
    links = [
        spec.Dense("below"),
        spec.DotProductAttention(
            *([spec.DenseGeneral(f"a/{name}")] for name in ("query", "key", "value")),
            causal=causal,
            bias=bias,
        ),
        spec.DenseGeneral("a/out"),
    ]
    model = Biased(size, (heads, 10, 10), causal)
    ratios = agreement(model, links, normal(10, 12), draws=60)
    assert len(kernels(ratios)) == 6
    for path, ratio in kernels(ratios).items():
        assert 1 / 1.4 < ratio < 1.4, (path, ratio)


def test_a_table_with_other_columns_than_heads_is_named():
    link = spec.DotProductAttention(
        [], [], [], bias=[spec.Input((6, 6)), spec.Embed("table")]
    )
    params = {"table": {"embedding": jnp.ones((11, 2))}}
    chain = spec.LayerChain([link], input_shape=(6, 8))
    bmo.check_spec(chain, params)
    params["table"]["embedding"] = jnp.ones((11, 3))
    with pytest.raises(ValueError, match=r"its bias of shape \(6, 6, 3\) must have sh"):
        bmo.check_spec(chain, params)


class Cross(nn.Module):
    @nn.compact
    def __call__(self, x, memory):
        x = nn.Dense(16, name="below", kernel_init=ORTHOGONAL)(x)
        return x + nn.MultiHeadDotProductAttention(4, name="a")(x, memory)


def test_cross_attention_to_another_input():
    def draw(key: jax.Array) -> Any:
        own, other = jax.random.split(key)
        return jax.random.normal(own, (5, 16)), jax.random.normal(other, (9, 16))

    attention = spec.Attention("a", memory=(9, 16))
    links = [spec.Dense("below"), spec.Residual([attention])]
    for path, ratio in kernels(agreement(Cross(), links, draw)).items():
        assert 0.75 < ratio < 1.3, (path, ratio)


class Grouped(nn.Module):
    """Four heads of queries that share two of keys and values, from one kernel."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="qkv")(x)
        q, k, v = jnp.split(x, [8, 12], axis=-1)
        q, k, v = (a.reshape((*a.shape[:-1], -1, 2)) for a in (q, k, v))
        k, v = (jnp.repeat(a, 2, axis=-2) for a in (k, v))
        mask = nn.make_causal_mask(x[..., 0])
        x = nn.dot_product_attention(q, k, v, mask=mask)
        return nn.Dense(8, name="out")(x.reshape((*x.shape[:-2], 8)))


def test_heads_that_share_keys_and_values_of_a_fused_kernel():
    attention = spec.DotProductAttention(
        [spec.Slice((0, 8), axis=-1)],
        [spec.Slice((8, 12), axis=-1)],
        [spec.Slice((12, 16), axis=-1)],
        causal=True,
    )
    links = [spec.Dense("qkv"), attention, spec.Dense("out")]
    ratios = kernels(agreement(Grouped(), links, normal(10, 8)))
    assert set(ratios) == {"qkv/kernel", "out/kernel"}
    for path, ratio in ratios.items():
        assert 0.75 < ratio < 1.3, (path, ratio)


class Transformer(nn.Module):
    """A small language model with pre-normalisation, SwiGLU and a tied head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(32, 24, name="embed")
        x = embed(tokens)
        x += self.param("positions", nn.initializers.normal(0.2), (1, 12, 24))
        mask = nn.make_causal_mask(tokens)
        for i in range(2):
            y = nn.LayerNorm(name=f"norm_{i}a")(x)
            x += nn.MultiHeadDotProductAttention(3, name=f"attention_{i}")(y, mask=mask)
            y = nn.LayerNorm(name=f"norm_{i}b")(x)
            gate = nn.silu(nn.Dense(48, name=f"gate_{i}")(y))
            y = gate * nn.Dense(48, name=f"up_{i}")(y)
            x += nn.Dense(24, name=f"down_{i}")(y)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def block(i: int) -> list[spec.Link]:
    gate = [spec.Dense(f"gate_{i}"), spec.Activation("silu")]
    return [
        spec.Residual(
            [
                spec.LayerNorm(f"norm_{i}a"),
                spec.Attention(f"attention_{i}", causal=True),
            ]
        ),
        spec.Residual(
            [
                spec.LayerNorm(f"norm_{i}b"),
                spec.Gate([spec.Dense(f"up_{i}")], gate),
                spec.Dense(f"down_{i}"),
            ]
        ),
    ]


TRANSFORMER = [
    spec.Embed("embed"),
    spec.Bias("positions"),
    *block(0),
    *block(1),
    spec.LayerNorm("norm"),
    spec.Tied([spec.Unembed("embed")]),
]


def test_a_transformer():
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (12,), 0, 32)

    ratios = kernels(agreement(Transformer(), TRANSFORMER, draw, draws=60))
    assert len(ratios) == 2 + 2 * 9 + 1
    for path, ratio in ratios.items():
        assert 0.6 < ratio < 1.6, (path, ratio)


def test_effective_numbers_of_positions_are_taken_as_told():
    # Equal weights on so many positions: the scale of the output's kernel says it.
    def scale(**options: Any) -> float:
        attention = spec.DotProductAttention([spec.Dense("q")], [], [], **options)
        chain = spec.LayerChain([attention, spec.Dense("out")], input_shape=(16, 4))
        # Queries near zero: nothing but equal weights.
        params = {"q": {"kernel": 1e-6 * jnp.eye(4)}, "out": {"kernel": jnp.eye(4)}}
        return float(bmo.layer_scales(chain, params, normalize=False)["out"])

    assert scale() == pytest.approx(1.0)  # 16 positions, each 1 / 16
    assert scale(attended=4) == pytest.approx(1 / 4)
    harmonic = float(np.mean(1 / np.arange(1, 17)))
    assert scale(causal=True) == pytest.approx(1 / 16 / harmonic, rel=1e-3)
    few = float(np.mean(1 / np.minimum(4, np.arange(1, 17))))
    assert scale(causal=True, attended=4) == pytest.approx(1 / 16 / few, rel=1e-3)


def test_nnx_has_the_same_layout():
    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    chain = spec.LayerChain([spec.Attention("")], input_shape=(5, 8))
    params = nnx.state(layer, nnx.Param)
    scales = bmo.layer_scales(chain, params)
    assert list(scales) == ["query", "key", "value", "out"]
    assert list(chain.paths) == list(scales)
    assert "DotProductAttention" in bmo.describe(chain, params)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: spec.Attention("a", attended=1),
            r"attended \(=1\) must be a number ab",
        ),
        (
            lambda: spec.Attention("a", memory=()),
            r"memory \(=\(\)\) must be a sequence",
        ),
        (
            lambda: spec.DotProductAttention([], [], 3),  # pyright: ignore
            r"value must be a sequence of links",
        ),
        (lambda: spec.Input(0), r"shape \(=0\) must be a sequence"),  # pyright: ignore
    ],
)
def test_construction_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


HALF = spec.Slice((0, 4), axis=-1)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (
            spec.DotProductAttention([], [], [HALF]),
            r"keys and values must have one shape",
        ),
        (
            spec.DotProductAttention([HALF], [], []),
            r"features of its keys or a multiple.* queries \(6, 4\), keys \(6, 8\)",
        ),
        (
            spec.DotProductAttention([spec.Slice((1, 4))], [], [], causal=True),
            r"causal attention needs as many keys as queries",
        ),
        (
            spec.DotProductAttention([], [spec.Slice((0, 1))], [spec.Slice((0, 1))]),
            r"attends to one position",
        ),
        (spec.DenseGeneral("d"), r"kernel of shape \(4, 3, 2\) do not make up the 8"),
        (
            spec.DotProductAttention([HALF, spec.DenseGeneral("d")], [], []),
            r"its bias has shape \(6,\), but expected \(3, 2\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(link, message):
    params = {"d": {"kernel": jnp.ones((4, 3, 2)), "bias": jnp.ones(6)}}
    chain = spec.LayerChain([link], input_shape=(6, 8))
    with pytest.raises(ValueError, match=message):
        bmo.check_spec(chain, params, unlisted="identity")
