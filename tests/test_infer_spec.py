"""The chain of a Flax model is the one that a person would declare, or an error."""

import dataclasses
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import pytest
import zoo_linen
import zoo_nnx
from flax import nnx
from jax import lax
from zoo_linen import Call

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.infer import infer_spec
from backmatch_optax.spec.elementwise import ACTIVATIONS
from examples.models import MODELS, vgg_spec

IMAGES = (2, 8, 8, 6)
RELU = spec.Activation("relu")


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def infer(function: Callable[..., Any], *shape: int, **options: Any) -> Any:
    """The links of what a function does within a Linen module."""
    return list(infer_spec(Call(function), array(*(shape or IMAGES)), **options).layers)


def abstract(make: Callable[[nnx.Rngs], Any]) -> Any:
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


# --- Networks, inferred and declared -------------------------------------------------


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


# --- Constructs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name for name in ACTIVATIONS if name not in ("identity", "swish", "celu")],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activations(name, dtype):
    def function(_: Any, x: jax.Array) -> jax.Array:
        return getattr(nn, name)(x.astype(dtype)).astype(jnp.float32)

    assert infer(function) == [spec.Activation(name)]


WRITTEN_OUT: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
    "maximum": ("relu", lambda x: jnp.maximum(x, 0)),
    "where": ("relu", lambda x: jnp.where(x > 0, x, 0)),
    "product": ("relu", lambda x: x * (x > 0)),
    "clip": ("relu6", lambda x: jnp.clip(x, 0, 6)),
    "leaky": ("leaky_relu", lambda x: jnp.maximum(x, 0.01 * x)),
    "exact gelu": ("gelu", lambda x: nn.gelu(x, approximate=False)),
    "gelu by erf": ("gelu", lambda x: 0.5 * (x * (1 + lax.erf(x / 2**0.5)))),
    "silu by exp": ("silu", lambda x: x / (1 + jnp.exp(-x))),
    "swish": ("silu", nn.swish),
    "celu": ("elu", nn.celu),
    "tanh by exp": ("tanh", lambda x: 2 / (1 + jnp.exp(-2 * x)) - 1),
}


@pytest.mark.parametrize("case", WRITTEN_OUT)
def test_activations_written_out(case):
    name, function = WRITTEN_OUT[case]
    assert infer(lambda _, x: function(x)) == [spec.Activation(name)]


def groups(number: int) -> spec.Link:
    return spec.GroupNorm("n", num_groups=number)


NORMALISATIONS: dict[str, tuple[Callable[..., Any], spec.Link]] = {
    "LayerNorm": (nn.LayerNorm, spec.LayerNorm("n")),
    "RMSNorm": (nn.RMSNorm, spec.RMSNorm("n")),
    "GroupNorm": (functools.partial(nn.GroupNorm, 3), groups(3)),
    "GroupNorm, one group": (functools.partial(nn.GroupNorm, 1), groups(1)),
    "InstanceNorm": (nn.InstanceNorm, groups(6)),
    "BatchNorm, train": (
        functools.partial(nn.BatchNorm, use_running_average=False),
        spec.BatchNorm("n"),
    ),
    "BatchNorm, eval": (
        functools.partial(nn.BatchNorm, use_running_average=True),
        spec.BatchNorm("n"),
    ),
}
AFFINE = [
    {},
    {"use_scale": False},
    {"use_bias": False},
    {"use_scale": False, "use_bias": False},
    {"dtype": jnp.bfloat16},
    {"epsilon": 1e-3},
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", AFFINE, ids=str)
@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations(name, options, batch):
    norm, declared = NORMALISATIONS[name]
    if name == "RMSNorm":
        options = {key: options[key] for key in options if key != "use_bias"}
    has_bias = options.get("use_bias", True) and name != "RMSNorm"
    if not (options.get("use_scale", True) or has_bias):
        declared = dataclasses.replace(declared, path=None)  # pyright: ignore
    layers = infer(lambda _, x: norm(name="n", **options)(x), batch, 8, 8, 6)
    assert layers == [declared]


@pytest.mark.parametrize("norm", ["LayerNorm", "BatchNorm"])
def test_normalisations_of_vectors(norm):
    options = {"use_running_average": False} if norm == "BatchNorm" else {}
    layers = infer(lambda _, x: getattr(nn, norm)(name="n", **options)(x), 5, 6)
    assert layers == [getattr(spec, norm)("n")]


def test_normalisations_written_out():
    def standardised(_: Any, x: jax.Array) -> jax.Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-6)

    assert infer(standardised) == [spec.LayerNorm()]
    lengths = functools.partial(jnp.linalg.norm, axis=-1, keepdims=True)
    # A vector of length 1 has a mean square of 1 / features.
    (norm, scale) = infer(lambda _, x: x / lengths(x), 2, 4)
    assert norm == spec.RMSNorm()
    assert scale == spec.Scale(0.5)


CONVOLUTIONS = [
    {"strides": strides, "padding": padding, "kernel_dilation": dilation}
    for strides in (1, 2, (1, 2))
    for padding in ("SAME", "VALID", "CIRCULAR", "REFLECT", ((1, 2), (0, 1)), 3)
    for dilation in (1, 2)
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions(options):
    layers = infer(lambda _, x: nn.Conv(4, (3, 3), name="c", **options)(x))
    assert layers == [spec.Conv("c", **options)]


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1)), 1])
@pytest.mark.parametrize("strides", [(2, 2), (3, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_transposed_convolutions(padding, strides, dilation):
    options: Any = {"strides": strides, "padding": padding, "kernel_dilation": dilation}
    layers = infer(lambda _, x: nn.ConvTranspose(4, (3, 3), name="c", **options)(x))
    assert layers == [spec.ConvTranspose("c", **options)]


def zero_padded(x: jax.Array, size: int = 1) -> jax.Array:
    return jnp.pad(x, ((0, 0), (size, size), (size, size), (0, 0)))


def norm_of_sum(_: nn.Module, x: jax.Array) -> jax.Array:
    return nn.LayerNorm(name="n")(x + nn.relu(nn.Dense(6, name="d")(x)))


def twice_nested(_: nn.Module, x: jax.Array) -> jax.Array:
    inner = x + nn.Dense(6, name="a")(x)
    return x + 0.1 * nn.Dense(6, name="b")(nn.relu(inner))


def kept_positions(_: nn.Module, x: jax.Array) -> jax.Array:
    x = nn.relu(x.mean((1, 2), keepdims=True))
    return nn.Conv(3, (1, 1), name="c")(x).reshape((x.shape[0], -1))


def mapped_over_batch(module: nn.Module, x: jax.Array) -> jax.Array:
    def one(_: nn.Module, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="d")(nn.Conv(4, (3, 3), name="c")(x).ravel())

    shared: Any = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
    return nn.vmap(one, **shared)(module, x)


CONSTRUCTS: dict[str, tuple[Callable[..., Any], list[spec.Link], tuple[int, ...]]] = {
    "max_pool": (
        lambda _, x: nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME"),
        [spec.MaxPool((3, 3), strides=2, padding="SAME")],
        IMAGES,
    ),
    "max_pool of stride 1": (
        lambda _, x: nn.max_pool(x, (3, 3)),
        [spec.MaxPool((3, 3))],
        IMAGES,
    ),
    "avg_pool": (
        lambda _, x: nn.avg_pool(x, (2, 3), strides=(2, 1)),
        [spec.AvgPool((2, 3), strides=(2, 1))],
        IMAGES,
    ),
    "reduce_window": (
        lambda _, x: lax.reduce_window(
            x,
            -jnp.inf,
            lax.max,
            (1, 2, 2, 1),
            (1, 2, 2, 1),
            ((0, 0), (1, 0), (0, 1), (0, 0)),
        ),
        [spec.MaxPool((2, 2), strides=2, padding=((1, 0), (0, 1)))],
        IMAGES,
    ),
    "a sum in place of a mean": (
        lambda _, x: x.sum((1, 2)),
        [spec.GlobalAvgPool(), spec.Scale(64.0)],
        IMAGES,
    ),
    "global mean": (lambda _, x: x.mean((1, 2)), [spec.GlobalAvgPool()], IMAGES),
    "global mean, axes kept": (
        lambda _, x: x.mean((1, 2), keepdims=True),
        [spec.GlobalAvgPool()],
        IMAGES,
    ),
    "convolution of a global mean": (
        kept_positions,
        [spec.AvgPool((8, 8)), RELU, spec.Conv("c"), spec.Flatten()],
        IMAGES,
    ),
    "global maximum": (
        lambda _, x: x.max((1, 2)),
        [spec.MaxPool((8, 8)), spec.Flatten()],
        IMAGES,
    ),
    "mean over one axis": (
        lambda _, x: nn.Dense(3, name="d")(x.mean(1)),
        [spec.AvgPool((8, 1)), spec.Dense("d")],
        IMAGES,
    ),
    "every second position": (
        lambda _, x: x[:, ::2, ::2],
        [spec.AvgPool((1, 1), strides=2)],
        IMAGES,
    ),
    "zeros around": (
        lambda _, x: nn.Conv(4, (3, 3), 2, "VALID", name="c")(zero_padded(x)),
        [spec.Conv("c", strides=2, padding=1)],
        IMAGES,
    ),
    "zeros around a maximum of positive values": (
        lambda _, x: nn.max_pool(zero_padded(nn.relu(x)), (3, 3), strides=(2, 2)),
        [RELU, spec.MaxPool((3, 3), strides=2, padding=1)],
        IMAGES,
    ),
    "causal": (
        lambda _, x: nn.Conv(4, (3,), padding="CAUSAL", name="c")(x),
        [spec.Conv("c", padding="CAUSAL")],
        (2, 8, 6),
    ),
    "three dimensions": (
        lambda _, x: nn.Conv(4, (3, 3, 3), name="c")(x),
        [spec.Conv("c")],
        (2, 4, 4, 4, 6),
    ),
    "groups": (
        lambda _, x: nn.Conv(12, (3, 3), feature_group_count=6, name="c")(x),
        [spec.Conv("c", feature_group_count=6)],
        IMAGES,
    ),
    "flatten": (
        lambda _, x: nn.Dense(3, name="d")(x.reshape((2, -1)).reshape((2, -1))),
        [spec.Flatten(), spec.Dense("d")],
        IMAGES,
    ),
    "ravel each": (
        lambda _, x: nn.Dense(3, name="d")(jax.vmap(jnp.ravel)(x)),
        [spec.Flatten(), spec.Dense("d")],
        IMAGES,
    ),
    "a batch of 1": (
        lambda _, x: nn.Dense(3, name="d")(nn.relu(x).reshape((1, -1))),
        [RELU, spec.Flatten(), spec.Dense("d")],
        (1, 8, 8, 6),
    ),
    "a model for one example": (
        mapped_over_batch,
        [spec.Conv("c"), spec.Flatten(), spec.Dense("d")],
        IMAGES,
    ),
    "tokens": (
        lambda _, x: nn.Dense(3, name="d")(x.reshape((2, 64, 6))).mean(1),
        [spec.Dense("d"), spec.GlobalAvgPool()],
        IMAGES,
    ),
    "tokens and back": (
        lambda _, x: nn.Conv(3, (3, 3), name="c")(
            nn.LayerNorm(name="n")(x.reshape((2, 64, 6))).reshape((2, 8, 8, 6))
        ),
        [spec.LayerNorm("n"), spec.Conv("c")],
        IMAGES,
    ),
    "axes moved and back": (
        lambda _, x: nn.relu(nn.tanh(x).transpose((0, 3, 1, 2))).transpose(
            (0, 2, 3, 1)
        ),
        [spec.Activation("tanh"), RELU],
        IMAGES,
    ),
    "axes moved and flattened": (
        lambda _, x: nn.tanh(x).transpose((0, 3, 1, 2)).reshape((2, -1)),
        [spec.Activation("tanh"), spec.Flatten()],
        IMAGES,
    ),
    "axes of size 1": (
        lambda _, x: nn.relu(nn.tanh(x)[:, None])[:, 0],
        [spec.Activation("tanh"), RELU],
        (2, 6),
    ),
    "positions": (
        lambda _, x: nn.Dense(4, name="d")(x),
        [spec.Dense("d")],
        (2, 5, 3, 6),
    ),
    "scales": (lambda _, x: -nn.relu(x) * 3 / 8, [RELU, spec.Scale(-0.375)], IMAGES),
    "a scale of 1": (lambda _, x: nn.relu(x) * 2 / 2 + 0.0, [RELU], IMAGES),
    "sum of itself": (
        lambda _, x: (y := nn.relu(x)) + y,
        [RELU, spec.Scale(2.0)],
        IMAGES,
    ),
    "one output": (
        lambda _, x: nn.Dense(1, name="d")(nn.relu(x)),
        [RELU, spec.Dense("d")],
        (4, 6),
    ),
    "one number for each example": (
        lambda _, x: jax.nn.sigmoid(nn.Dense(1, name="d")(x).squeeze(-1)),
        [spec.Dense("d"), spec.Activation("sigmoid")],
        (4, 6),
    ),
    "the first of one output": (
        lambda _, x: nn.Dense(1, name="d")(x)[..., 0],
        [spec.Dense("d")],
        (4, 6),
    ),
    "one channel": (
        lambda _, x: nn.BatchNorm(False, name="n")(nn.Conv(1, (3, 3), name="c")(x)),
        [spec.Conv("c"), spec.BatchNorm("n")],
        IMAGES,
    ),
    "grey image": (
        lambda _, x: nn.ConvTranspose(1, (3, 3), strides=(2, 2), name="c")(x),
        [spec.ConvTranspose("c", strides=2)],
        IMAGES,
    ),
    "scaled input": (lambda _, x: nn.relu(x / 255), [RELU], IMAGES),
    "centred and scaled input": (
        lambda _, x: nn.relu((x - 127.5) / 127.5),
        [RELU],
        IMAGES,
    ),
    "scaled and centred input": (
        lambda _, x: nn.relu(x / 255 - jnp.arange(6) / 10),
        [RELU],
        IMAGES,
    ),
    "dropout": (
        lambda _, x: nn.Dropout(0.3, deterministic=False)(x),
        [spec.Dropout()],
        IMAGES,
    ),
    "no dropout": (lambda _, x: nn.Dropout(0.3, deterministic=True)(x), [], IMAGES),
    "stochastic depth": (
        lambda _, x: (
            x
            + nn.Dropout(0.3, (1, 2, 3), deterministic=False)(nn.Dense(6, name="d")(x))
        ),
        [spec.Residual([spec.Dense("d"), spec.Dropout()])],
        IMAGES,
    ),
    "norm of a sum": (
        norm_of_sum,
        [spec.Residual([spec.Dense("d"), RELU]), spec.LayerNorm("n")],
        IMAGES,
    ),
    "nested": (
        twice_nested,
        [
            spec.Residual(
                [
                    spec.Residual([spec.Dense("a")]),
                    RELU,
                    spec.Dense("b"),
                    spec.Scale(0.1),
                ]
            )
        ],
        IMAGES,
    ),
    "difference": (
        lambda _, x: x - nn.Dense(6, name="d")(x),
        [spec.Residual([spec.Dense("d"), spec.Scale(-1.0)])],
        IMAGES,
    ),
    "three arms": (
        lambda _, x: x + nn.Dense(6, name="d")(x) + nn.relu(x),
        [spec.Residual([spec.Residual([spec.Dense("d")])], [RELU])],
        IMAGES,
    ),
    "einsum": (
        lambda _, x: nn.Einsum((6, 5), "...i,io->...o", name="e")(x),
        [spec.Dense("e")],
        IMAGES,
    ),
    "bfloat16": (
        lambda _, x: nn.avg_pool(
            nn.relu(nn.Conv(4, (3, 3), dtype=jnp.bfloat16, name="c")(x)), (3, 3)
        ).astype(jnp.float32),
        [spec.Conv("c"), RELU, spec.AvgPool((3, 3))],
        IMAGES,
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTS)
def test_constructs(case):
    function, declared, shape = CONSTRUCTS[case]
    assert infer(function, *shape) == declared


PREPARED: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "axes moved": (lambda x: x.transpose((0, 2, 3, 1)), (2, 3, 8, 9), (8, 9, 3)),
    "channel added": (lambda x: x[..., None], (2, 8, 9), (8, 9, 1)),
    "image of a vector": (lambda x: x.reshape((-1, 8, 9, 1)), (2, 72), (8, 9, 1)),
    "standardised": (
        lambda x: (x / 255 - jnp.arange(3.0)) / jnp.array([1.0, 2.0, 3.0]),
        (2, 8, 9, 3),
        (8, 9, 3),
    ),
}


@pytest.mark.parametrize("case", PREPARED)
def test_the_chain_begins_behind_what_prepares_the_input(case):
    prepare, shape, input_shape = PREPARED[case]
    model = Call(lambda _, x: nn.Conv(4, (3, 3), name="c")(prepare(x)))
    expected = spec.LayerChain([spec.Conv("c")], input_shape=input_shape)
    assert infer_spec(model, array(*shape)) == expected


# --- However a model is wrapped ------------------------------------------------------


def mlp(_: nn.Module, x: jax.Array) -> jax.Array:
    return nn.Dense(3, name="b")(nn.relu(nn.Dense(5, name="a")(x)))


MLP = [spec.Dense("a"), RELU, spec.Dense("b")]
WRAPPERS: dict[str, Callable[..., Any]] = {
    "nn.jit": lambda module, x: nn.jit(mlp)(module, x),
    "nn.remat": lambda module, x: nn.remat(mlp)(module, x),
    "nn.remat of nn.jit": lambda module, x: nn.remat(nn.jit(mlp))(module, x),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_transformed_modules(wrapper):
    assert infer(WRAPPERS[wrapper], 2, 4) == MLP


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_transformed_functions(wrap):
    def function(_: nn.Module, x: jax.Array) -> jax.Array:
        return wrap(lambda x: nn.relu(jax.jit(jnp.tanh)(x)))(nn.Dense(3, name="a")(x))

    assert infer(function) == [spec.Dense("a"), spec.Activation("tanh"), RELU]


def test_a_model_that_was_compiled_before_and_is_afterwards():
    # What is cached of either trace must not show in the other.
    inner = models.Mlp()
    apply = jax.jit(inner.apply)
    x = jnp.ones((2, 8))
    params = inner.init(jax.random.key(0), x)["params"]
    before = apply({"params": params}, x)

    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            shapes = jax.tree.map(jnp.shape, params)
            own = {
                layer: {
                    role: self.param(f"{layer}/{role}", nn.initializers.ones, shape)
                    for role, shape in roles.items()
                }
                for layer, roles in shapes.items()
            }
            return apply({"params": own}, x)

    assert infer_spec(Wrapped(), x) == models.MLP
    assert (apply({"params": params}, x) == before).all()


@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat])
def test_transformed_nnx_modules(wrap):
    class Inner(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.a = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(self.a(x))

    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layers = nnx.List([Inner(rngs), nnx.Linear(5, 3, rngs=rngs)])

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layers[1](wrap(lambda m, x: m(x))(self.layers[0], x))

    model = Outer(nnx.Rngs(0))
    declared = [spec.Dense("layers/0/a"), RELU, spec.Dense("layers/1")]
    assert infer_spec(model, array(2, 4)).layers == tuple(declared)
    assert type(model) is Outer
    assert type(model.layers[0]) is Inner


def test_modules_in_an_nnx_dict():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            one, two = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
            self.layers = nnx.Dict({"one": one, "two": two})

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers.values():
                x = layer(x)
            return x

    declared = (spec.Dense("layers/one"), spec.Dense("layers/two"))
    assert infer_spec(Net(nnx.Rngs(0)), array(2, 6)).layers == declared


def test_a_linen_module_in_an_nnx_one():
    x = jnp.ones((2, 6))
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(nn.Dense(3), nnx.Rngs(0)), x)
    assert infer_spec(model, x).layers == (spec.Dense(""),)


class Shared(nn.Module):
    """Set up in one order, called in another; names that sort in a third."""

    def setup(self):
        self.last = nn.Dense(3)
        self.blocks = [nn.Sequential([nn.Dense(6), nn.relu]) for _ in range(11)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in reversed(self.blocks):
            x = block(x)
        return self.last(x)

    def features(self, x: jax.Array, scale: float) -> jax.Array:
        return self.blocks[0](x) * scale


def test_order_is_that_of_the_data():
    links: list[spec.Link] = []
    for index in reversed(range(11)):
        links += [spec.Dense(f"blocks_{index}/layers_0"), RELU]
    expected = spec.LayerChain([*links, spec.Dense("last")], input_shape=(6,))
    assert infer_spec(Shared(), array(2, 6)) == expected


@pytest.mark.parametrize("method", ["features", Shared.features])
def test_another_method(method):
    chain = infer_spec(Shared(), array(2, 6), method=method, scale=0.5)
    assert chain.layers == (spec.Dense("blocks_0/layers_0"), RELU, spec.Scale(0.5))


def test_another_method_of_an_nnx_module():
    model = abstract(models.NnxMlp)
    chain = infer_spec(model, array(2, 8), method=lambda model, x: model.fc1(x))
    assert chain.layers == (spec.Dense("fc1"),)


def test_one_of_several_outputs():
    model = Call(lambda _, x: (nn.Dense(3, name="a")(x), nn.Dense(4, name="b")(x)))
    chain = infer_spec(model, array(2, 6), method=lambda model, x: model(x)[1])
    assert chain.layers == (spec.Dense("b"),)


def test_inputs_that_do_not_matter():
    def function(_: nn.Module, x: jax.Array, key: jax.Array, labels: jax.Array) -> Any:
        del labels
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(3, name="d")(x), rng=key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    chain = infer_spec(Call(function), array(2, 6), key, array(2, dtype=jnp.int32))
    assert chain.layers == (spec.Dense("d"), spec.Dropout())


def test_random_streams_and_collections():
    def function(module: nn.Module, x: jax.Array) -> jax.Array:
        assert module.has_rng("noise")
        module.sow("intermediates", "x", x)
        return nn.Dropout(0.5, rng_collection="noise", deterministic=False)(x)

    options = {"rngs": {"noise": jax.random.key(0)}, "mutable": ["intermediates"]}
    assert infer(function, **options) == [spec.Dropout()]


def test_averages_over_devices():
    def function(_: nn.Module, x: jax.Array) -> jax.Array:
        norm = nn.BatchNorm(use_running_average=False, axis_name="batch", name="n")
        return norm(x)

    assert infer(function, axis_names=["batch"]) == [spec.BatchNorm("n")]
    with pytest.raises(ValueError, match=r'name the axes.*axis_names=\["batch"\]'):
        infer(function)


def test_dropout_is_all_that_training_adds_in_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.norm(self.conv(x)))

    model = Net(nnx.Rngs(0))
    links = (spec.Conv("conv"), spec.BatchNorm("norm"))
    assert infer_spec(model, array(2, 8, 8, 3)).layers == (*links, spec.Dropout())
    model.eval()
    assert infer_spec(model, array(2, 8, 8, 3)).layers == links


# --- What comes out ------------------------------------------------------------------


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


def test_blocks_stand_for_modules():
    class Gate(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.relu(x * nn.sigmoid(nn.Dense(6)(x)))

    def gated(_: nn.Module, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="d")(Gate(name="gate")(nn.tanh(x)))

    block = spec.Block("gate", weight_curvature=1.0, input_curvature=0.5)
    declared = [spec.Activation("tanh"), block, spec.Dense("d")]
    assert infer(gated, blocks=[block]) == declared
    with pytest.raises(
        ValueError, match=r"blocks: .* not depend on a module at 'gates'"
    ):
        infer(
            gated,
            blocks=[block, spec.Block("gates", weight_curvature=1, input_curvature=1)],
        )
    whole = spec.Block(
        "", weight_curvature=1.0, input_curvature=0.5, output_shape=(8, 8, 3)
    )
    assert infer(gated, blocks=[whole]) == [whole]
    wrong = spec.Block("gate", weight_curvature=1, input_curvature=1, output_shape=(3,))
    with pytest.raises(ValueError, match=r"must have output_shape=\(8, 8, 6\)"):
        infer(gated, blocks=[wrong])


def test_a_block_of_two_inputs():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
            return nn.Dense(6)(x) * y

    def function(_: nn.Module, x: jax.Array) -> jax.Array:
        return nn.relu(Both(name="both")(nn.tanh(x), nn.Dense(6)(x)))

    block = spec.Block("both", weight_curvature=1.0, input_curvature=0.5)
    with pytest.raises(ValueError, match=r"Block\('both'.* has 2 signals as its input"):
        infer(function, blocks=[block])


def test_a_block_of_two_outputs():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = nn.Dense(6)(x)
            return nn.relu(x), nn.tanh(x)

    def function(_: nn.Module, x: jax.Array) -> jax.Array:
        first, second = Two(name="two")(x)
        return first + second

    block = spec.Block("two", weight_curvature=1.0, input_curvature=0.5)
    with pytest.raises(ValueError, match="has several signals as its output"):
        infer(function, blocks=[block])


def test_blocks_stand_for_nnx_modules():
    class Gate(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(x * nnx.sigmoid(self.dense(x)))

    model = abstract(lambda rngs: nnx.Sequential(Gate(rngs), nnx.tanh))
    block = spec.Block("layers/0", weight_curvature=1.0, input_curvature=0.5)
    declared = (block, spec.Activation("tanh"))
    assert infer_spec(model, array(2, 6), blocks=[block]).layers == declared
    with pytest.raises(ValueError, match="in module 'layers/0': mul multiplies two"):
        infer_spec(model, array(2, 6))


def test_blocks_stand_for_nnx_modules_whatever_method_is_called():
    class Gate(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(6, 6, rngs=rngs)

        def gated(self, x: jax.Array) -> jax.Array:
            return x * nnx.sigmoid(self.dense(x))

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.gate, self.head = Gate(rngs), nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(self.gate.gated(x))

    block = spec.Block("gate", weight_curvature=1.0, input_curvature=0.5)
    chain = infer_spec(abstract(Net), array(2, 6), blocks=[block])
    assert chain.layers == (block, spec.Dense("head"))


# --- What is not known ---------------------------------------------------------------


def param(module: nn.Module, name: str, *shape: int) -> jax.Array:
    return module.param(name, nn.initializers.ones, shape)


def twice(_: nn.Module, x: jax.Array) -> jax.Array:
    dense = nn.Dense(6, name="d")
    return dense(nn.relu(dense(x)))


def twice_side_by_side(_: nn.Module, x: jax.Array) -> jax.Array:
    dense = nn.Dense(6, name="d")
    return dense(x) + nn.relu(dense(nn.tanh(x)))


def tied(module: nn.Module, x: jax.Array) -> jax.Array:
    kernel = param(module, "kernel", 6, 5)
    return (x @ kernel) @ kernel.T


def squeeze_excite(_: nn.Module, x: jax.Array) -> jax.Array:
    gate = nn.sigmoid(nn.Dense(6, name="gate")(x.mean((1, 2), keepdims=True)))
    return x * gate


@jax.custom_vjp
def reversed_gradient(x: jax.Array) -> jax.Array:
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_jvp
def smaller_gradient(x: jax.Array) -> jax.Array:
    return x


smaller_gradient.defjvp(lambda primals, tangents: (primals[0], 0.1 * tangents[0]))


UNKNOWN: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "attention": (
        lambda _, x: nn.MultiHeadDotProductAttention(2, name="attend")(x, x),
        (2, 5, 6),
        "in module 'attend/out': dot_general .* not over the last axis",
    ),
    "scores": (
        lambda _, x: jnp.einsum("bif,bjf->bij", x, x),
        (2, 5, 6),
        "dot_general multiplies two signals, as attention does",
    ),
    "recurrence": (
        lambda _, x: nn.RNN(nn.LSTMCell(4), name="rnn")(x),
        (2, 5, 6),
        r"in module 'rnn': scan is a loop \(recurrence\)",
    ),
    "loop": (
        lambda _, x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x), x),
        IMAGES,
        r"scan is a loop|while is a loop",
    ),
    "condition": (
        lambda _, x: lax.cond(x.sum() > 0, jnp.tanh, jnp.sin, x),
        IMAGES,
        "cond is a branch on data",
    ),
    "layer used twice": (twice, (2, 6), "parameters of 'd' are used more than once"),
    "layer used twice, side by side": (
        twice_side_by_side,
        (2, 6),
        "parameters of 'd' are used more than once",
    ),
    "tied weights": (
        tied,
        (2, 6),
        "kernel of dot_general is .* computed from 'kernel'",
    ),
    "weight norm": (
        lambda _, x: nn.WeightNorm(nn.Dense(3, name="d"))(x),
        (2, 6),
        "the kernel of dot_general is what is computed from .*d/kernel",
    ),
    "masked convolution": (
        lambda _, x: nn.Conv(
            4, (3, 3), name="c", mask=jnp.ones((3, 3, 6, 4)).at[0].set(0)
        )(x),
        IMAGES,
        "the kernel of conv_general_dilated is what is computed from 'c/kernel'",
    ),
    "convolution of kernels the other way": (
        lambda _, x: nn.ConvTranspose(
            4, (3, 3), strides=(2, 2), transpose_kernel=True, name="c"
        )(x),
        IMAGES,
        "the kernel of conv_general_dilated is what is computed from 'c/kernel'",
    ),
    "local convolution": (
        lambda _, x: nn.ConvLocal(4, (3, 3), name="c")(x),
        IMAGES,
        "in module 'c': .*dot_general",
    ),
    "parameter of another name": (
        lambda module, x: x @ param(module, "w", 6, 3),
        (2, 6),
        "multiplies with 'w', but only a parameter called 'kernel'",
    ),
    "several features": (
        lambda _, x: nn.DenseGeneral((2, 3), name="d")(x),
        (2, 6),
        r"spec.Dense\('d'\): expects a kernel of shape \(in, out\)",
    ),
    "concatenation": (
        lambda _, x: jnp.concatenate([x, nn.Dense(3)(x)], -1),
        IMAGES,
        "concatenate is a concatenation",
    ),
    "squeeze and excite": (
        squeeze_excite,
        IMAGES,
        "mul multiplies two signals, as gating and attention do",
    ),
    "gated linear unit": (
        lambda _, x: nn.glu(nn.Dense(6)(x)),
        IMAGES,
        "mul multiplies two signals",
    ),
    "embedding": (
        lambda _, x: nn.Embed(5, 6, name="embed")(x.astype(int)),
        (2, 5),
        "in module 'embed': gather is indexing, or an embedding",
    ),
    "class token": (
        lambda _, x: nn.Dense(3)(nn.tanh(x)[:, 0]),
        (2, 5, 6),
        "slice is indexing",
    ),
    "position embedding": (
        lambda module, x: nn.tanh(x) + param(module, "positions", 5, 6),
        (2, 5, 6),
        "add combines the signal with 'positions' in a way no link does",
    ),
    "layer scale": (
        lambda module, x: x * param(module, "gamma", 6),
        IMAGES,
        "mul combines the signal with 'gamma' in a way no link does",
    ),
    "parameter along the positions": (
        lambda module, x: nn.tanh(x) + param(module, "bias", 6)[:, None],
        (2, 6, 6),
        "add",
    ),
    "learned slope": (
        lambda _, x: nn.PReLU(name="prelu")(x),
        IMAGES,
        "in module 'prelu': .*'prelu/negative_slope'",
    ),
    "another slope": (
        lambda _, x: nn.leaky_relu(x, 0.2),
        IMAGES,
        "neither a Scale nor one of Activation's",
    ),
    "unknown activation": (
        lambda _, x: jnp.sin(x),
        IMAGES,
        "sin ends an elementwise function that is neither",
    ),
    "shift": (
        lambda _, x: nn.relu(x) + 1.0,
        IMAGES,
        "add ends an elementwise function that is neither",
    ),
    "softmax": (
        lambda _, x: nn.softmax(x),
        IMAGES,
        "div uses statistics of the signal as no normalisation does",
    ),
    "another normalisation": (
        lambda _, x: x / jnp.abs(x).mean(-1, keepdims=True),
        IMAGES,
        "div uses statistics of the signal as no normalisation does",
    ),
    "normalisation over some positions": (
        lambda _, x: (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-6),
        IMAGES,
        "div uses statistics of the signal as no normalisation does",
    ),
    "statistics put in the wrong place": (
        lambda _, x: x - x.mean(2)[:, :, None] / x.mean(1)[:, :, None],
        (2, 6, 6),
        "infer_spec",
    ),
    "noise": (
        lambda module, x: x + jax.random.normal(module.make_rng("noise"), x.shape),
        IMAGES,
        "add combines the signal with random numbers",
    ),
    "mask of the input, beside the input": (
        lambda _, x: x + x * jnp.arange(6.0),
        IMAGES,
        "mul combines the input with an array",
    ),
    "a bias after a root mean square": (
        lambda module, x: (
            nn.RMSNorm(name="n", use_scale=False)(x) + param(module, "bias", 6)
        ),
        IMAGES,
        "add adds 'bias', but not to its own layer",
    ),
    "mask": (
        lambda _, x: nn.tanh(x) * jnp.arange(6.0),
        IMAGES,
        "mul combines the signal with an array",
    ),
    "average of what is inside": (
        lambda _, x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
        IMAGES,
        "div combines the signal with an array",
    ),
    "upsampling": (
        lambda _, x: jax.image.resize(x, (2, 16, 16, 6), "nearest"),
        IMAGES,
        "gather",
    ),
    "repeats": (
        lambda _, x: jnp.repeat(nn.tanh(x), 2, axis=1),
        IMAGES,
        "broadcast_in_dim repeats the signal along an axis",
    ),
    "sort": (lambda _, x: jnp.sort(x, -1), IMAGES, "sort is an order by value"),
    "custom derivative": (
        lambda _, x: reversed_gradient(nn.Dense(3)(x)),
        IMAGES,
        "custom_vjp_call is a function with a derivative of its own",
    ),
    "custom derivative, forward": (
        lambda _, x: smaller_gradient(nn.Dense(3)(x)),
        IMAGES,
        "custom_jvp_call is a function with a derivative of its own",
    ),
    "stopped gradient": (
        lambda _, x: lax.stop_gradient(nn.Dense(3)(x)),
        IMAGES,
        "stop_gradient is a stopped gradient",
    ),
    "maximum over zeros around": (
        lambda _, x: nn.max_pool(zero_padded(nn.tanh(x)), (3, 3)),
        IMAGES,
        "reduce_window_max follows on padding",
    ),
    "padding without a window": (
        lambda _, x: nn.relu(zero_padded(nn.tanh(x))),
        IMAGES,
        "padding is followed by no convolution",
    ),
    "mixing of tokens": (
        lambda _, x: jnp.swapaxes(nn.Dense(5)(jnp.swapaxes(nn.tanh(x), 1, 2)), 1, 2),
        (2, 5, 6),
        "dot_general acts on a signal whose axes are transposed",
    ),
    "space to depth": (
        lambda _, x: nn.tanh(x).reshape((2, 8, 4, 12)),
        IMAGES,
        "reshape from .* divides the features",
    ),
    "folded batch": (
        lambda _, x: nn.tanh(x).reshape((10, 6)),
        (2, 5, 6),
        "reshape changes the batch dimension",
    ),
    "sum over features": (lambda _, x: x.sum(-1), IMAGES, "sum over features or batch"),
    "two outputs": (lambda _, x: (x, nn.relu(x)), IMAGES, "has 2 outputs"),
    "no output": (lambda _, x: jnp.ones(3), IMAGES, "has 0 outputs"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_an_error(case):
    function, shape, message = UNKNOWN[case]
    with pytest.raises(ValueError, match=message) as error:
        infer(function, *shape)
    assert str(error.value).startswith("infer_spec: ")
    if "outputs" not in message:
        assert "spec.Block" in str(error.value)
        assert "measured scales" in str(error.value)


def test_errors_tell_the_line_of_code():
    with pytest.raises(ValueError, match=r"test_infer_spec\.py:\d+"):
        infer(squeeze_excite)


def test_several_inputs():
    model = Call(lambda _, x, y: nn.Dense(3)(x + y))
    with pytest.raises(ValueError, match="add combines several inputs of the model"):
        infer_spec(model, array(2, 6), array(2, 6))


def test_an_input_without_batch():
    with pytest.raises(ValueError, match=r"of shape \(6,\) has no batch dimension"):
        infer(lambda _, x: nn.relu(x), 6)


def test_other_models():
    with pytest.raises(
        ValueError, match=r"must be a flax\.linen\.Module or a flax\.nnx"
    ):
        infer_spec(lambda x: x, array(2, 6))
    bound = nn.Dense(3).bind({})
    with pytest.raises(ValueError, match=r"pass model\.unbind\(\)\[0\]"):
        infer_spec(bound, array(2, 6))
    with pytest.raises(ValueError, match="rngs and mutable are for Linen"):
        infer_spec(abstract(models.NnxMlp), array(2, 8), rngs={})


def test_flax_is_needed_and_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax.linen", None)
    with pytest.raises(ImportError, match="needs Flax: pip install flax"):
        infer_spec(models.Mlp(), array(2, 8))
