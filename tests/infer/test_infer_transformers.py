"""Transformers: the chain that a person would declare, and the scales it gives."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
import zoo_transformers as zoo
from flax import nnx
from held_against import ratios, worst
from zoo_linen import array
from zoo_nnx import abstract

from backmatch_optax import spec
from backmatch_optax.infer import infer_spec
from examples import language_model

TOKENS = array(3, zoo.LENGTH, dtype=jnp.int32)


def dense(*paths: str) -> list[spec.Link]:
    return [spec.Dense(path) for path in paths]


def written_out(path: str) -> list[spec.Link]:
    q, k, v, o = dense(*(f"{path}/{name}" for name in "qkvo"))
    return [spec.DotProductAttention([q], [k], [v], causal=True), o]


def fused(path: str) -> list[spec.Link]:
    parts = [[spec.Slice((at, at + 16), axis=-1)] for at in (0, 16, 32)]
    qkv, proj = dense(f"{path}/qkv", f"{path}/proj")
    return [qkv, spec.DotProductAttention(*parts, causal=True), proj]


def general(path: str) -> list[spec.Link]:
    parts = [
        [spec.DenseGeneral(f"{path}/{name}")] for name in ("query", "key", "value")
    ]
    return [spec.DotProductAttention(*parts, causal=True), *dense(f"{path}/proj")]


def library(path: str) -> list[spec.Link]:
    return [spec.Attention(f"{path}/inner", causal=True)]


def gelu(path: str) -> list[spec.Link]:
    up, down = dense(f"{path}/up", f"{path}/down")
    return [up, spec.Activation("gelu"), down]


def swiglu(path: str) -> list[spec.Link]:
    up, gate, down = dense(f"{path}/up", f"{path}/gate", f"{path}/down")
    return [spec.Gate([up], [gate, spec.Activation("silu")]), down]


GPTS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "written out": (written_out, spec.LayerNorm, gelu, {}),
    "fused": (
        fused,
        spec.LayerNorm,
        gelu,
        {"attention": functools.partial(zoo.Attention, True)},
    ),
    "tied, SwiGLU": (
        general,
        spec.RMSNorm,
        swiglu,
        {
            "attention": functools.partial(zoo.Attention, False),
            "norm": nnx.RMSNorm,
            "mlp": zoo.SwiGlu,
            "tied": True,
        },
    ),
    "the library's": (library, spec.LayerNorm, gelu, {"attention": zoo.MultiHead}),
}


@pytest.mark.parametrize("name", GPTS)
def test_decoders_in_nnx(name):
    attention, norm, mlp, options = GPTS[name]

    def block(path: str) -> list[spec.Link]:
        return [
            spec.Residual([norm(f"{path}/norm1"), *attention(f"{path}/attention")]),
            spec.Residual([norm(f"{path}/norm2"), *mlp(f"{path}/mlp")]),
        ]

    tied = options.get("tied", False)
    head = spec.Tied([spec.Unembed("embed")]) if tied else spec.Dense("head")
    ends = [norm("norm"), head]
    declared = [
        spec.Embed("embed"),
        spec.Bias("positions/embedding"),
        *block("blocks/0"),
    ]
    model = functools.partial(zoo.Gpt, depth=2, **options)
    chain = infer_spec(abstract(model), TOKENS)
    assert chain.layers == (*declared, *block("blocks/1"), *ends)
    shallow = functools.partial(zoo.Gpt, depth=1, **options)
    chain = infer_spec(abstract(shallow), TOKENS)
    assert chain.layers == (*declared, *ends)
    assert worst(ratios(shallow, chain, TOKENS)) < 2


@pytest.mark.parametrize("padding", [False, True])
def test_decoders_in_linen(padding):
    # A mask of padding counts as full.
    chain = infer_spec(zoo.LinenGpt(padding, depth=1), TOKENS)
    gate = spec.Gate(dense("Dense_1"), [*dense("Dense_0"), spec.Activation("silu")])
    attention = spec.Attention("MultiHeadDotProductAttention_0", causal=True)
    assert chain.layers == (
        spec.Embed("embed"),
        spec.Bias("positions"),
        spec.Residual([spec.LayerNorm("LayerNorm_0"), attention, spec.Dropout(0.1)]),
        spec.Residual([spec.LayerNorm("LayerNorm_1"), gate, *dense("Dense_2")]),
        spec.LayerNorm("LayerNorm_2"),
        spec.Tied([spec.Unembed("embed")]),
    )
    if not padding:
        assert worst(ratios(zoo.LinenGpt(depth=1), chain, TOKENS)) < 2


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vision_transformers(pool):
    chain = infer_spec(zoo.Vit(pool), array(3, 16, 16, 3))
    token = [spec.ClassToken("cls")] if pool == "token" else []
    links = [spec.Conv("patch", strides=4), spec.Reshape((16, 16)), *token]
    assert chain.layers[: len(links) + 1] == (*links, spec.Bias("positions"))
    pooled = spec.Slice(0) if pool == "token" else spec.GlobalAvgPool()
    assert chain.layers[-3:] == (spec.LayerNorm("LayerNorm_4"), pooled, *dense("head"))


def masked(mask: Any) -> spec.Link:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, name="a")(x, x, mask=mask)

    (link,) = infer_spec(Model(), array(2, 8, 4)).layers
    return link


def test_masks_say_how_many_positions_are_met():
    far = jnp.arange(8)[:, None] - jnp.arange(8)
    assert masked(None) == masked(far < 9) == spec.Attention("a")
    assert masked(far >= 0) == spec.Attention("a", causal=True)
    assert masked((far >= 0) & (far < 3)) == spec.Attention(
        "a", causal=True, attended=3
    )
    assert masked(jnp.arange(8) // 4 == jnp.arange(8)[:, None] // 4) == spec.Attention(
        "a", attended=4
    )


def test_heads_that_share_keys_and_values():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, x):
            q = nn.DenseGeneral((4, 3), name="q")(x)
            k, v = (nn.DenseGeneral((2, 3), name=name)(x) for name in "kv")
            k, v = (jnp.repeat(heads, 2, axis=-2) for heads in (k, v))
            x = nn.dot_product_attention(q, k, v)
            return nn.DenseGeneral(6, axis=(-2, -1), name="o")(x)

    q, k, v, o = map(spec.DenseGeneral, "qkvo")
    declared = (spec.DotProductAttention([q], [k], [v]), o)
    assert infer_spec(Grouped(), array(2, 5, 6)).layers == declared


class OneForBoth(nn.Module):
    """One kernel makes keys and values, of fewer heads than there are queries."""

    parts: bool = True

    @nn.compact
    def __call__(self, x):
        q = nn.Einsum((4, 6, 3), "BTD,NDH->BTNH", use_bias=False, name="q")(x)
        kv = nn.Einsum((2, 2, 6, 3), "BTD,CKDH->CBTKH", name="kv")(x)
        k, v = (kv[0], kv[1]) if self.parts else (kv[0], nn.relu(kv[0]))
        q = q.reshape((*q.shape[:2], 2, 2, 3))
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", q, k) / math.sqrt(3)
        y = jnp.einsum("BTKGS,BSKH->BTKGH", nn.softmax(logits), v)
        return nn.Einsum((2, 2, 3, 6), "BTKGH,KGHD->BTD", name="o")(y)


def test_one_kernel_for_keys_and_values_is_used_twice():
    chain = infer_spec(OneForBoth(), array(2, 5, 6))
    q, kv = (
        spec.DenseGeneral(name, in_axis=axis) for name, axis in (("q", 1), ("kv", 2))
    )
    k, v = spec.Slice((0, 6), axis=-1), spec.Slice((6, 12), axis=-1)
    attention = spec.DotProductAttention([q], [kv, k], [spec.Tied([kv]), v])
    assert chain.layers == (attention, spec.DenseGeneral("o"))
    assert worst(ratios(OneForBoth(), chain, array(2, 5, 6))) < 2


def test_keys_and_values_that_are_the_same_are_refused():
    with pytest.raises(ValueError, match="what 'kv' puts out goes several ways"):
        infer_spec(OneForBoth(parts=False), array(2, 5, 6))


def test_heads_that_are_normalised_stay_features():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
            q, k = nn.RMSNorm(name="nq")(q), nn.LayerNorm(name="nk")(k)
            return nn.dot_product_attention(q, k, v)

    norms = {"q": [spec.RMSNorm("nq")], "k": [spec.LayerNorm("nk")]}
    (attention,) = infer_spec(Normed(), array(2, 8, 6)).layers
    for name, norm in norms.items():
        apart, together = spec.Reshape((8, 2, 4)), spec.Reshape((8, 8))
        norms[name] = [spec.DenseGeneral(name), apart, *norm, together]
    declared = spec.DotProductAttention(
        norms["q"], norms["k"], [spec.DenseGeneral("v")]
    )
    assert attention == declared


def test_logits_of_another_size_are_told():
    class Unscaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.Dense(4, name=name)(x) for name in "qkv")
            weights = nn.softmax(q @ k.swapaxes(1, 2))
            return nn.Dense(4, name="o")(weights @ v)

    q, k, v, o = dense(*"qkvo")
    attention = spec.DotProductAttention([q, spec.Scale(2.0)], [k], [v])
    assert infer_spec(Unscaled(), array(2, 5, 6)).layers == (attention, o)


@pytest.mark.parametrize("form", ["turned", "halves", "pairs"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_rotary_positions_change_nothing(form, orthogonal):
    angles = jnp.arange(8)[:, None] * 100.0 ** (-jnp.arange(2) / 2)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    sin = sin if orthogonal else 2 * sin

    def rotated(x: Any) -> Any:
        if form == "pairs":
            a, b = x[..., ::2], x[..., 1::2]
            pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
            return pairs.reshape(x.shape)
        a, b = jnp.split(x, 2, axis=-1)
        if form == "halves":
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = jnp.concatenate([-b, a], axis=-1)
        sines, cosines = (jnp.concatenate([x, x], axis=-1) for x in (sin, cos))
        return x * cosines + turned * sines

    class Rotary(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
            return nn.dot_product_attention(rotated(q), rotated(k), v)

    arms = [[spec.DenseGeneral(name)] for name in "qkv"]
    if not orthogonal:
        with pytest.raises(ValueError, match="mul combines the signal with an array"):
            infer_spec(Rotary(), array(2, 8, 6))
        return
    chain = infer_spec(Rotary(), array(2, 8, 6))
    assert chain.layers == (spec.DotProductAttention(*arms),)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_the_language_model_of_the_examples(norm, mlp):
    size = language_model.Size(norm=norm, mlp=mlp)
    model = abstract(lambda rngs: language_model.GPT(size, rngs=rngs))
    chain = infer_spec(model, array(2, size.context, dtype=jnp.int32))
    assert chain == language_model.declared(size)
