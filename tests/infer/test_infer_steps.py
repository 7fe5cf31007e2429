"""Whole networks: the chain is the one that a person would declare."""

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import models
import pytest
import zoo_linen
import zoo_nnx
from flax import nnx
from zoo_linen import Call, array, infer
from zoo_nnx import abstract

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.infer import infer_spec
from examples.models import MODELS, vgg_spec

RELU = spec.Activation("relu")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_papers_networks(name, train):
    model, declared = MODELS[name](10, (32, 32, 3))
    assert infer_spec(model, array(4, 32, 32, 3), train=train) == declared


@pytest.mark.parametrize("depth", zoo_nnx.VGG_STAGES)
def test_the_papers_vggs_in_nnx(depth):
    model = abstract(functools.partial(zoo_nnx.Vgg, depth))
    assert infer_spec(model, array(4, 32, 32, 3)) == vgg_spec(depth)


@pytest.mark.parametrize(
    ("model", "declared"),
    [
        (models.LeNet(), models.LENET),
        (models.ConvNet(), models.CONV_NET),
        (models.Mlp(), models.MLP),
        (abstract(models.NnxLeNet), models.LENET),
        (abstract(models.NnxConvNet), models.CONV_NET),
        (abstract(models.NnxMlp), models.MLP),
    ],
)
def test_small_networks(model, declared):
    assert infer_spec(model, array(4, *declared.input_shape)) == declared


Names = Callable[[int, str], str]


def linen_names(block: str) -> Names:
    """How Linen names the layers of the n-th block; `conv2` is its second `Conv`."""

    def name(index: int, layer: str) -> str:
        kind, number = layer[:-1], layer[-1]
        if number.isdigit():
            kinds = {"conv": "Conv", "norm": "BatchNorm"}
            layer = f"{kinds[kind]}_{int(number) - 1}"
        return f"{block}_{index}/{layer}"

    return name


def nnx_names(index: int, layer: str) -> str:
    return f"blocks/{index}/{layer}"


def residual_net(
    stages: Sequence[int], block: Callable[..., Any], names: Names, bottleneck: bool
) -> spec.LayerChain:
    """The declared chain of the residual networks in the zoo."""
    links = [
        spec.Conv("stem", strides=2, padding=3),
        spec.BatchNorm("stem_norm"),
        RELU,
        spec.MaxPool((3, 3), strides=2, padding="SAME"),
    ]
    index = 0
    for stage, count in enumerate(stages):
        for position in range(count):
            first = position == 0
            strides = 2 if stage and first else 1
            at = functools.partial(names, index)
            shortcut = []
            if first and (stage or bottleneck):
                shortcut = [
                    spec.Conv(at("proj"), strides=strides),
                    spec.BatchNorm(at("proj_norm")),
                ]
            links += [spec.Residual(block(at, strides), shortcut), RELU]
            index += 1
    links += [spec.GlobalAvgPool(), spec.Dense("head")]
    return spec.LayerChain(links, input_shape=(64, 64, 3))


def basic_block(at: Callable[[str], str], strides: int) -> list[spec.Link]:
    return [
        spec.Conv(at("conv1"), strides=strides),
        spec.BatchNorm(at("norm1")),
        RELU,
        spec.Conv(at("conv2")),
        spec.BatchNorm(at("norm2")),
    ]


def bottleneck_block(at: Callable[[str], str], strides: int) -> list[spec.Link]:
    return [
        spec.Conv(at("conv1")),
        spec.BatchNorm(at("norm1")),
        RELU,
        spec.Conv(at("conv2"), strides=strides),
        spec.BatchNorm(at("norm2")),
        RELU,
        spec.Conv(at("conv3")),
        spec.BatchNorm(at("norm3")),
    ]


RESNETS = {
    "ResNet-18": ((2, 2, 2, 2), "BasicBlock", basic_block),
    "ResNet-50": ((3, 4, 6, 3), "Bottleneck", bottleneck_block),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", RESNETS)
def test_residual_networks_in_linen(name, train):
    stages, block, declared = RESNETS[name]
    model = zoo_linen.ResNet(stages, getattr(zoo_linen, block))
    chain = infer_spec(model, array(4, 64, 64, 3), train=train)
    bottleneck = block == "Bottleneck"
    assert chain == residual_net(stages, declared, linen_names(block), bottleneck)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", RESNETS)
def test_residual_networks_in_nnx(name, train):
    stages, block, declared = RESNETS[name]
    model = abstract(lambda rngs: zoo_nnx.ResNet(stages, getattr(zoo_nnx, block), rngs))
    (model.train if train else model.eval)()
    chain = infer_spec(model, array(4, 64, 64, 3))
    bottleneck = block == "Bottleneck"
    assert chain == residual_net(stages, declared, nnx_names, bottleneck)


@pytest.mark.parametrize(
    "model", [zoo_linen.PreActivationNet(), abstract(zoo_nnx.PreActivationNet)]
)
def test_pre_activation_network(model):
    def normalised(*path: str) -> list[spec.Link]:
        return [spec.BatchNorm("/".join(path)), RELU]

    assert infer_spec(model, array(4, 16, 16, 3)) == spec.LayerChain(
        [
            spec.Conv("stem"),
            spec.Residual(
                [
                    *normalised("block1", "norm1"),
                    spec.Conv("block1/conv1"),
                    *normalised("block1", "norm2"),
                    spec.Conv("block1/conv2"),
                ]
            ),
            *normalised("block2", "norm1"),
            spec.Residual(
                [
                    spec.Conv("block2/conv1", strides=2),
                    *normalised("block2", "norm2"),
                    spec.Conv("block2/conv2"),
                ],
                [spec.Conv("block2/proj", strides=2)],
            ),
            *normalised("norm"),
            spec.GlobalAvgPool(),
            spec.Dense("head"),
        ],
        input_shape=(16, 16, 3),
    )


@pytest.mark.parametrize("model", [zoo_linen.PreActivationNet(), models.LeNet()])
def test_the_chain_fits_the_parameters_and_is_code(model):
    x = array(4, 32, 32, 3)
    chain = infer_spec(model, x)
    assert eval(repr(chain)) == chain
    init = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    bmo.check_spec(chain, init["params"])


def test_the_chain_of_an_nnx_module_fits_its_state():
    model = zoo_nnx.PreActivationNet(nnx.Rngs(0))
    chain = infer_spec(model, array(4, 16, 16, 3))
    bmo.check_spec(chain, nnx.state(model, nnx.Param))


def test_nothing_is_computed():
    # Its parameters would take 4 TB.
    model = Call(lambda _, x: nn.Dense(10**6, name="d")(nn.LayerNorm(name="n")(x)))
    gc.collect()
    before = len(jax.live_arrays())
    chain = infer_spec(model, array(10**6, 10**6))
    assert chain.layers == (spec.LayerNorm("n"), spec.Dense("d"))
    assert len(jax.live_arrays()) == before


def test_hundreds_of_layers():
    def deep(_: nn.Module, x: jax.Array) -> jax.Array:
        for index in range(300):
            x = nn.relu(nn.Dense(4, name=f"d{index}")(x))
        return x

    assert len(infer(deep, 2, 4)) == 600


def test_a_layer_at_the_top_of_a_model_has_its_kernels_name():
    def function(module: nn.Module, x: jax.Array) -> jax.Array:
        kernel = module.param("kernel", nn.initializers.ones, (6, 5))
        return nn.Dense(3, name="d")(x @ kernel)

    assert infer(function, 2, 6) == [spec.Dense("kernel"), spec.Dense("d")]
    # That of a model that is one layer has none.
    assert infer_spec(nn.Dense(3), array(2, 6)).layers == (spec.Dense(""),)
