"""Sums of several terms, and layers that arms of a sum have in common."""

import random
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from held_against import ratios, worst
from zoo_linen import array

from backmatch_optax import infer_spec, spec


class Parallel(nn.Module):
    """Blocks whose attention and MLP read the same normalised signal."""

    order: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="stem")(x)
        for index in range(2):
            h = nn.LayerNorm(name=f"norm{index}")(x)
            a = nn.MultiHeadDotProductAttention(2, name=f"attention{index}")(h)
            b = nn.gelu(nn.Dense(64, name=f"up{index}")(h))
            b = nn.Dense(16, name=f"down{index}")(b)
            x = eval(self.order, {"x": x, "a": a, "b": b})
        return nn.Dense(4, name="head")(x.mean(1))


@pytest.mark.parametrize(
    "order", ["x + a + b", "x + (a + b)", "a + x + b", "b + (x + a)"]
)
def test_attention_and_mlp_side_by_side_in_any_order(order):
    model, x = Parallel(order), array(2, 6, 12)
    chain = infer_spec(model, x)
    for index, block in enumerate(chain.layers[1:3]):
        mlp = [spec.Dense(f"up{index}"), spec.Activation("gelu")]
        mlp.append(spec.Dense(f"down{index}"))
        both = spec.Residual([spec.Attention(f"attention{index}")], mlp)
        assert block == spec.Residual([spec.LayerNorm(f"norm{index}"), both])
    assert worst(ratios(model, chain, x)) < 2


@pytest.mark.parametrize("kernels", [1, 2])
@pytest.mark.parametrize("encoded", [False, True])
def test_a_signal_that_is_added_beside_each_layer(encoded, kernels):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, signal):
            x = nn.Dense(16)(x)
            if encoded:
                signal = nn.relu(nn.Dense(16)(signal))
            for _ in range(4):
                h = nn.relu(nn.Dense(16)(nn.LayerNorm()(x)))
                for _ in range(kernels):
                    x = x + nn.Dense(16)(signal)
                x = x + nn.Dense(16)(h)
            return nn.Dense(3)(x)

    model, inputs = Model(), [array(2, 8), array(2, 8)]
    chain = infer_spec(model, *inputs)
    assert "Tied" not in repr(chain)  # each layer is read once
    assert repr(chain).count("spec.Recall" if encoded else "spec.Input") == 4
    assert worst(ratios(model, chain, *inputs, batch=256)) < 2


class WaveNet(nn.Module):
    """What a layer puts out goes on to the next, and by another kernel to the end."""

    @nn.compact
    def __call__(self, x):
        x, ends = nn.Conv(16, (1,))(x), []
        for index in range(3):
            f, g = (
                nn.Conv(16, (2,), kernel_dilation=2**index, padding="CAUSAL")(x)
                for _ in range(2)
            )
            h = nn.tanh(f) * nn.sigmoid(g)
            ends.append(nn.Conv(16, (1,))(h))
            if index < 2:
                x = x + nn.Conv(16, (1,))(h)
        return nn.Conv(8, (1,))(nn.relu(sum(ends[1:], ends[0])))


def test_a_wavenet():
    model, x = WaveNet(), array(2, 12, 5)
    chain = infer_spec(model, x)
    # Both kernels of each gate but the last are read by two others.
    assert repr(chain).count("spec.Tied") == 4
    assert worst(ratios(model, chain, x)) < 1.5


def test_layers_that_each_reach_the_end_by_a_kernel():
    class Model(nn.Module):
        joined: bool

        @nn.compact
        def __call__(self, x):
            ends = []
            for _ in range(3):
                x = nn.tanh(nn.Dense(32)(x))
                ends.append(x if self.joined else nn.Dense(32)(x))
            x = jnp.concatenate(ends, -1) if self.joined else sum(ends[1:], ends[0])
            return nn.Dense(4)(nn.relu(x))

    for joined in (False, True):
        model, x = Model(joined), array(2, 32)
        assert worst(ratios(model, infer_spec(model, x), x, batch=256)) < 1.5


@pytest.mark.parametrize("kernel", [False, True])
def test_arms_with_the_same_signal_need_a_kernel_behind_it(kernel):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            z = nn.Dense(32)(x)
            y = nn.LayerNorm()(x + z)
            return nn.Dense(4)(nn.relu(z) + (nn.Dense(32)(y) if kernel else y))

    model, x = Model(), array(2, 32)
    if kernel:
        assert worst(ratios(model, infer_spec(model, x), x, batch=256)) < 1.5
    else:
        with pytest.raises(ValueError, match="how they correlate is not known"):
            infer_spec(model, x)


class Graph(nn.Module):
    """A network drawn at random, whose signals go several ways and meet again."""

    seed: int

    @nn.compact
    def __call__(self, x):
        draw = random.Random(self.seed)
        values, unread = [nn.Dense(16)(x)], {0}

        def read() -> Any:
            place = draw.randrange(max(0, len(values) - 3), len(values))
            unread.discard(place)
            return values[place]

        for _ in range(draw.randint(4, 8)):
            match draw.choice(["dense", "mlp", "sum", "sums", "norm", "concatenate"]):
                case "dense":
                    made = nn.Dense(16)(read())
                case "mlp":
                    made = nn.Dense(16)(nn.gelu(nn.Dense(32)(read())))
                case "sum":
                    made = read() + read()
                case "sums":
                    made = read() + (read() + read())
                case "norm":
                    made = nn.LayerNorm()(read())
                case _:
                    made = nn.Dense(16)(jnp.concatenate([read(), read()], -1))
            unread.add(len(values))
            values.append(made)
        ends = [values[place] for place in sorted(unread)]
        return nn.Dense(4)(sum(ends[1:], ends[0]))


@pytest.mark.parametrize("seed", [4, 6, 7, 8, 9, 12, 13, 14])
def test_random_graphs(seed):
    model, x = Graph(seed), array(2, 12)
    assert worst(ratios(model, infer_spec(model, x), x, batch=256)) < 2
