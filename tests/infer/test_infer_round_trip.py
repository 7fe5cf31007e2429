"""A random chain, built as a Flax model of either kind, is inferred again."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo_linen import array
from zoo_nnx import abstract

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.spec.link import Link, Shape

BATCH = 3
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "elu", "leaky_relu", "softplus")


@dataclasses.dataclass
class Layer:
    """A link, what it is called with, and what it makes of a shape."""

    link: Any
    before: Shape
    after: Shape
    inner: "tuple[Layer, ...]" = ()


@st.composite
def layers(draw: Any, shape: Shape, prefix: str, inside: bool = False) -> list[Layer]:
    """Some links that fit one another, in the form that inference gives them."""
    found: list[Layer] = []
    for index in range(draw(st.integers(1, 3 if inside else 6))):
        path, rank = f"{prefix}{index}", len(shape) - 1
        options = [
            "Dense",
            "Activation",
            "LayerNorm",
            "RMSNorm",
            "BatchNorm",
            "Dropout",
        ]
        if found and not isinstance(found[-1].link, spec.Scale):
            options.append("Scale")
        if rank:
            options += ["Conv", "GroupNorm"]
        if rank and not inside:
            options += ["Flatten", "GlobalAvgPool", "Pool", "Pool", "ConvTranspose"]
        if not inside:
            options.append("Residual")
        kind = draw(st.sampled_from(options))
        after, inner = shape, ()
        features = shape[-1] if inside else draw(st.sampled_from((4, 6)))
        link: Link
        match kind:
            case "Dense":
                link, after = spec.Dense(path), (*shape[:-1], features)
            case "Conv":
                strides = 1 if inside else draw(st.sampled_from((1, 2)))
                paddings = ["SAME", "CIRCULAR"]
                if not inside and min(shape[:-1]) > 2:
                    paddings.append("VALID")
                if strides == 2 or min(shape[:-1]) < 3:
                    paddings.remove("CIRCULAR")
                padding = draw(st.sampled_from(paddings))
                link = spec.Conv(path, strides=strides, padding=padding)
                kernel = {"kernel": (*(3,) * rank, shape[-1], features)}
                after = link.shape_after(shape, kernel)
            case "ConvTranspose":
                link = spec.ConvTranspose(path, strides=2)
                after = (*(2 * size for size in shape[:-1]), features)
            case "Activation":
                link = spec.Activation(draw(st.sampled_from(ACTIVATIONS)))
            case "BatchNorm" | "LayerNorm":
                link = getattr(spec, kind)(draw(st.sampled_from((path, None))))
            case "RMSNorm":
                link = spec.RMSNorm(path)
            case "GroupNorm":
                link = spec.GroupNorm(path, num_groups=2)
            case "Dropout":
                link = spec.Dropout(draw(st.sampled_from((0.1, 0.3, 0.5))))
            case "Scale":
                link = spec.Scale(draw(st.sampled_from((-1.0, 0.5, 0.1, 3.0))))
            case "Flatten":
                link, after = spec.Flatten(), (math.prod(shape),)
            case "GlobalAvgPool":
                link, after = spec.GlobalAvgPool(), shape[-1:]
            case "Pool":
                if min(shape[:-1]) < 2:
                    continue
                pool = draw(st.sampled_from((spec.MaxPool, spec.AvgPool)))
                strides = draw(st.sampled_from((None, 2)))
                link = pool((2,) * rank, strides=strides)
                after = link.shape_after(shape, {})
            case _:
                last = spec.Dense(f"{path}_last")
                inner = (
                    *draw(layers(shape, f"{path}_", True)),
                    Layer(last, shape, shape),
                )
                link = spec.Residual([layer.link for layer in inner])
        found.append(Layer(link, shape, after, inner))
        shape = after
    return found


class Linen(nn.Module):
    """The chain, with Linen's layers."""

    chain: tuple[Layer, ...]
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.through(self.chain, x)

    def through(self, chain: tuple[Layer, ...], x: jax.Array) -> jax.Array:
        for layer in chain:
            link, path = layer.link, getattr(layer.link, "path", None)
            kind, rank = type(link).__name__, len(layer.before) - 1
            options: Any = {"name": path}
            if kind in ("BatchNorm", "LayerNorm") and path is None:
                options = {"use_scale": False, "use_bias": False}
            match kind:
                case "Dense":
                    x = nn.Dense(layer.after[-1], name=path)(x)
                case "Conv" | "ConvTranspose":
                    options |= {"strides": (link.strides,) * rank}
                    window = (3,) * rank
                    make = getattr(nn, kind)
                    x = make(layer.after[-1], window, padding=link.padding, **options)(
                        x
                    )
                case "BatchNorm":
                    x = nn.BatchNorm(use_running_average=not self.train, **options)(x)
                case "GroupNorm":
                    x = nn.GroupNorm(link.num_groups, name=path)(x)
                case "LayerNorm" | "RMSNorm":
                    x = getattr(nn, kind)(**options)(x)
                case "Dropout":
                    x = nn.Dropout(link.rate, deterministic=False)(x)
                case "Residual":
                    x = x + self.through(layer.inner, x)
                case _:
                    x = without_parameters(link, x)
        return x


class Nnx(nnx.Module):
    """The chain, with NNX's layers."""

    def __init__(self, chain: tuple[Layer, ...], rngs: nnx.Rngs):
        self.chain = nnx.static(chain)
        self.drops = nnx.Dict()
        self.plain = nnx.Dict()
        self.build(chain, rngs)

    def build(self, chain: tuple[Layer, ...], rngs: nnx.Rngs) -> None:
        for layer in chain:
            link, path = layer.link, getattr(layer.link, "path", None)
            kind, rank = type(link).__name__, len(layer.before) - 1
            features, options = layer.before[-1], dict[str, Any]()
            if path is None:
                options = {"use_scale": False, "use_bias": False}
            match kind:
                case "Dense":
                    new = nnx.Linear(features, layer.after[-1], rngs=rngs)
                case "Conv" | "ConvTranspose":
                    new = getattr(nnx, kind)(
                        features,
                        layer.after[-1],
                        (3,) * rank,
                        strides=(link.strides,) * rank,
                        padding=link.padding,
                        rngs=rngs,
                    )
                case "GroupNorm":
                    new = nnx.GroupNorm(features, link.num_groups, rngs=rngs)
                case "BatchNorm" | "LayerNorm" | "RMSNorm":
                    new = getattr(nnx, kind)(features, rngs=rngs, **options)
                case "Dropout":
                    self.drops[str(id(layer))] = nnx.Dropout(link.rate, rngs=rngs)
                    continue
                case "Residual":
                    self.build(layer.inner, rngs)
                    continue
                case _:
                    continue
            if path is None:
                self.plain[str(id(layer))] = new
            else:
                setattr(self, path, new)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.through(self.chain, x)

    def through(self, chain: tuple[Layer, ...], x: jax.Array) -> jax.Array:
        for layer in chain:
            path = getattr(layer.link, "path", None)
            if path is not None:
                x = getattr(self, path)(x)
            elif layer.inner:
                x = x + self.through(layer.inner, x)
            elif (own := str(id(layer))) in self.drops:
                x = self.drops[own](x)
            elif own in self.plain:
                x = self.plain[own](x)
            else:
                x = without_parameters(layer.link, x)
        return x


def without_parameters(link: Any, x: jax.Array) -> jax.Array:
    match link:
        case spec.Activation():
            return getattr(jax.nn, link.name)(x)
        case spec.Scale():
            return link.factor * x
        case spec.Flatten():
            return x.reshape((x.shape[0], -1))
        case spec.GlobalAvgPool():
            return x.mean(tuple(range(1, x.ndim - 1)))
    pool = nn.max_pool if isinstance(link, spec.MaxPool) else nn.avg_pool
    strides = None if link.strides is None else (link.strides,) * len(link.window_shape)
    return pool(x, link.window_shape, strides)


@pytest.mark.parametrize("library", ["Linen", "NNX"])
@pytest.mark.parametrize("shape", [(6, 6, 4), (7, 4), (4,)], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_a_random_chain_comes_back(library, shape, data):
    chain = tuple(data.draw(layers(shape, "l")))
    declared = spec.LayerChain([layer.link for layer in chain], input_shape=shape)
    train = data.draw(st.booleans())
    if library == "Linen":
        model: Any = Linen(chain, train)
    else:
        model = abstract(lambda rngs: Nnx(chain, rngs))
        (model.train if train else model.eval)()
        for drop in model.drops.values():
            drop.deterministic = False
    x = array(BATCH, *shape)
    inferred = bmo.infer_spec(model, x)
    assert inferred == declared
    assert eval(repr(inferred)) == declared
