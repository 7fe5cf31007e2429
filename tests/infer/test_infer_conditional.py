"""Diffusion models: what several blocks read, one signal or several of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from held_against import ratios, worst
from zoo_linen import Call, array

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.infer import infer_spec

IMAGES, TIMES, TEXTS = array(4, 8, 8, 4), array(4, 16), array(4, 7, 12)
LABELS = array(4, dtype=jnp.int32)


class TransformerBlock(nn.Module):
    """A block of a DiT: one kernel reads the time, its output has six parts."""

    table: bool = False  # that is added, as in PixArt

    @nn.compact
    def __call__(self, x: Any, time: Any) -> Any:
        modulation = nn.Dense(6 * 32, name="adaLN")(nn.silu(time))
        if self.table:
            normal = nn.initializers.normal(0.2)
            modulation += self.param("table", normal, (6 * 32,))
        parts = jnp.split(modulation[:, None], 6, axis=-1)
        norm = nn.LayerNorm(use_scale=False, use_bias=False)
        h = norm(x) * (1 + parts[0]) + parts[1]
        x = x + parts[2] * nn.MultiHeadDotProductAttention(2, name="attention")(h)
        h = norm(x) * (1 + parts[3]) + parts[4]
        h = nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(h)))
        return x + parts[5] * h


@pytest.mark.parametrize("table", [False, True])
def test_a_diffusion_transformer(table):
    def dit(_: nn.Module, x: Any, time: Any, label: Any) -> Any:
        known = nn.Dense(32, name="t")(time) + nn.Embed(10, 32, name="y")(label)
        x = nn.Conv(32, (2, 2), strides=2, name="patches")(x).reshape(len(x), -1, 32)
        for index in range(2):
            x = TransformerBlock(table, name=f"block{index}")(x, known)
        modulation = nn.Dense(64, name="last")(nn.silu(known))[:, None]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        x = nn.LayerNorm(use_scale=False, use_bias=False)(x) * (1 + scale) + shift
        return nn.Dense(16, name="head")(x)

    model, examples = Call(dit), (IMAGES, TIMES, LABELS)
    chain = infer_spec(model, *examples)
    adaln = spec.Dense("block0/adaLN")
    assert repr(chain).count(repr(adaln)) == 6
    assert repr(chain).count(repr(spec.Tied([adaln]))) == 5
    assert worst(ratios(model, chain, *examples, batch=128)) < 2


def test_a_kernel_whose_parts_are_read_apart_has_the_curvature_of_all_of_it():
    def function(parts: int) -> Any:
        def modulated(_: nn.Module, x: Any, time: Any) -> Any:
            known = nn.relu(nn.Dense(32, name="t")(time))
            names = ["a"] if parts == 1 else ["a", "b"]
            kernels = [nn.Dense(64 // len(names), name=name)(known) for name in names]
            first, second = jnp.split(kernels[0], 2, -1) if parts == 1 else kernels
            x = nn.Dense(32, name="in")(x) + nn.Dense(32, name="added")(known)
            x = nn.Dense(32, name="x")(x * first)
            return nn.Dense(5, name="head")(nn.relu(x * second))

        return modulated

    examples = array(4, 8), array(4, 16)
    whole, apart = (infer_spec(Call(function(n)), *examples) for n in (1, 2))
    x, time = (jnp.ones(example.shape) for example in examples)
    params = Call(function(2)).init(jax.random.key(0), x, time)["params"]
    params["b"] = jax.tree.map(lambda array: array[..., ::-1], params["a"])
    two = bmo.layer_scales(apart, params, normalize=False)
    params["a"] = jax.tree.map(
        lambda *arrays: jnp.concatenate(arrays, -1), params["a"], params.pop("b")
    )
    one = bmo.layer_scales(whole, params, normalize=False)
    # A mean diagonal over both parts is the mean of theirs.
    halves = 2 / (1 / two.pop("a") + 1 / two.pop("b"))
    assert float(one.pop("a")) == pytest.approx(float(halves), rel=1e-5)
    for path in ("t", "in", "added", "x", "head"):
        assert float(one[path]) == pytest.approx(float(two[path]), rel=1e-5)


def block(x: Any, name: str, *signals: Any) -> Any:
    h = nn.Conv(16, (3, 3), name=f"{name}a")(nn.silu(nn.GroupNorm(4)(x)))
    for index, signal in enumerate(signals):
        h += nn.Dense(16, name=f"{name}signal{index}")(nn.silu(signal))[:, None, None]
    return x + nn.Conv(16, (3, 3), name=f"{name}b")(nn.silu(nn.GroupNorm(4)(h)))


def test_a_time_and_a_class_that_every_block_reads_by_kernels_of_their_own():
    def unet(_: nn.Module, x: Any, time: Any, label: Any) -> Any:
        time = nn.Dense(32, name="t")(time)
        label = nn.Embed(10, 32, name="y")(label)
        x = nn.Conv(16, (3, 3), name="in")(x)
        for name in "pq":
            x = block(x, name, time, label)
        return nn.Conv(4, (3, 3), name="out")(x)

    model, examples = Call(unet), (IMAGES, TIMES, LABELS)
    chain = infer_spec(model, *examples)
    assert repr(chain).count("spec.Recall((32,))") == 2
    assert repr(chain).count("spec.Recall((32,), 't')") == 2
    assert worst(ratios(model, chain, *examples, batch=128)) < 2


def attend(x: Any, name: str, text: Any) -> Any:
    flat = x.reshape(len(x), -1, 16)
    attention = nn.MultiHeadDotProductAttention(2, name=f"{name}attention")
    return (flat + attention(nn.LayerNorm()(flat), text)).reshape(x.shape)


def text_to_image(known: bool = True) -> nn.Module:
    def unet(_: nn.Module, x: Any, time: Any, text: Any) -> Any:
        time = nn.Dense(32, name="t")(time)
        text = nn.LayerNorm()(nn.Dense(24, name="text")(text))
        x = nn.Conv(16, (3, 3), name="in")(x)
        x = attend(block(x, "p", time), "p", text)
        x = jax.image.resize(x, (len(x), 16, 16, 16), "nearest")
        x = attend(block(x, "q", time), "q", text)
        return nn.Conv(4, (3, 3), name="out")(x if known else jnp.sort(x, -1))

    return Call(unet)


def test_a_unet_with_a_time_and_a_text_that_it_attends_to():
    model, examples = text_to_image(), (IMAGES, TIMES, TEXTS)
    chain = infer_spec(model, *examples)
    recalls = {spec.Recall((7, 24)): 2, spec.Recall((32,), "t"): 2}
    assert {r: repr(chain).count(repr(r)) for r in recalls} == recalls
    assert worst(ratios(model, chain, *examples, batch=128)) < 2.5


@pytest.mark.parametrize("generator", ["kernel", "table"])
def test_one_layer_that_modulates_all_blocks(generator):
    def film(_: nn.Module, x: Any, label: Any) -> Any:
        label = nn.Embed(10, 4 * 32 if generator == "table" else 32, name="y")(label)
        if generator == "kernel":
            label = nn.Dense(4 * 32, name="all")(nn.relu(label))
        parts = jnp.split(label, 4, axis=-1)
        x = nn.Dense(32, name="in")(x)
        for index in range(2):
            x = nn.LayerNorm()(x) * (1 + parts[2 * index]) + parts[2 * index + 1]
            x = nn.Dense(32, name=f"layer{index}")(nn.relu(x))
        return nn.Dense(5, name="head")(x)

    model, examples = Call(film), (array(4, 16), LABELS)
    chain = infer_spec(model, *examples)
    assert repr(chain).count("spec.Recall((128,))") == 4
    assert worst(ratios(model, chain, *examples, batch=256)) < 2


def test_what_is_unknown_is_named_where_several_signals_are_kept():
    with pytest.raises(ValueError, match="sort is an order by value"):
        infer_spec(text_to_image(known=False), IMAGES, TIMES, TEXTS)


CANNOT_BE_KNOWN = {
    "multiplied": (lambda x, c: x * c * c, "takes them as unrelated"),
    "added": (lambda x, c: nn.relu(x + c) + c, "how they correlate is not known"),
    "a part": (
        lambda x, c: x * c[:, :16] + c[:, 8:24],
        "how they correlate is not known",
    ),
}


@pytest.mark.parametrize("case", CANNOT_BE_KNOWN)
def test_what_is_read_twice_without_a_kernel_between_is_refused(case):
    read, message = CANNOT_BE_KNOWN[case]

    def function(_: nn.Module, x: Any, signal: Any) -> Any:
        signal = nn.Dense(24 if case == "a part" else 16, name="c")(signal)
        x = read(nn.Dense(16, name="x")(x), signal)
        return nn.Dense(5, name="head")(x)

    with pytest.raises(ValueError, match=message):
        infer_spec(Call(function), array(4, 8), array(4, 8))


def test_what_is_read_again_behind_a_kernel():
    def function(_: nn.Module, x: Any, signal: Any) -> Any:
        signal = nn.Dense(32, name="c")(signal)
        for index in range(3):
            x = nn.relu(nn.Dense(32, name=f"x{index}")(x) + signal)
        return nn.Dense(5, name="head")(x)

    model, examples = Call(function), (array(4, 8), array(4, 8))
    chain = infer_spec(model, *examples)
    assert worst(ratios(model, chain, *examples, batch=128)) < 2


def with_two_signals_joined_first(join: Any) -> nn.Module:
    def function(_: nn.Module, x: Any, one: Any, two: Any) -> Any:
        one, two = nn.Dense(16, name="one")(one), nn.Dense(16, name="two")(two)
        for index in range(2):
            signals = nn.Dense(16, name=f"a{index}")(one) + nn.Dense(
                16, name=f"b{index}"
            )(two)
            x = nn.relu(join(nn.Dense(16, name=f"x{index}")(x), signals))
        return nn.Dense(5, name="head")(x)

    return Call(function)


def test_two_signals_that_are_joined_before_they_are_added():
    model, examples = with_two_signals_joined_first(jnp.add), [array(4, 8)] * 3
    chain = infer_spec(model, *examples)
    assert worst(ratios(model, chain, *examples)) < 1.5


def test_two_signals_that_are_joined_before_they_multiply_are_refused():
    model = with_two_signals_joined_first(jnp.multiply)
    with pytest.raises(ValueError, match="before either is joined to the others"):
        infer_spec(model, *[array(4, 8)] * 3)
