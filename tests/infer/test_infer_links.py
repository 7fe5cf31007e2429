"""Each kind of layer is recognised, however it is written."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from zoo_linen import IMAGES, Call, array, infer

from backmatch_optax import spec
from backmatch_optax.activations import activation
from backmatch_optax.infer import graph, infer_spec
from backmatch_optax.spec.elementwise import ACTIVATIONS

RELU = spec.Activation("relu")


@pytest.mark.parametrize(
    "name",
    # The last is read as its parts, a relu6 and a constant.
    sorted({*ACTIVATIONS} - {"exp", "identity", "swish", "celu", "hard_sigmoid"}),
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activations(name, dtype):
    def function(_: Any, x: jax.Array) -> jax.Array:
        return activation(name)(x.astype(dtype)).astype(jnp.float32)

    assert infer(function) == [spec.Activation(name)]


@pytest.mark.parametrize("slope", [0.2, 0.3, 2.0])
def test_leaky_relus_of_another_slope(slope):
    leaky = spec.Activation("leaky_relu", negative_slope=slope)
    assert infer(lambda _, x: jax.nn.leaky_relu(x, slope)) == [leaky]
    assert eval(repr(leaky)) == leaky


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


SOFTMAX, LOG_SOFTMAX = spec.Softmax(), spec.LogSoftmax()

PROBABILITIES: dict[str, tuple[list[spec.Link], Callable[[jax.Array], jax.Array]]] = {
    "softmax": ([SOFTMAX], nn.softmax),
    "of cooler logits": ([spec.Scale(0.5), SOFTMAX], lambda x: nn.softmax(x / 2)),
    "by hand": ([SOFTMAX], lambda x: (y := jnp.exp(x)) / y.sum(-1, keepdims=True)),
    "log-softmax": ([LOG_SOFTMAX], nn.log_softmax),
    "logsumexp": (
        [LOG_SOFTMAX],
        lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True),
    ),
    "logsumexp, another axis": (
        [LOG_SOFTMAX],
        lambda x: x - jax.nn.logsumexp(x, -1)[..., None],
    ),
    "logarithm by hand": (
        [LOG_SOFTMAX],
        lambda x: x - jnp.log(jnp.exp(x).sum(-1, keepdims=True)),
    ),
}


@pytest.mark.parametrize("case", PROBABILITIES)
@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5)])
def test_probabilities(case, shape):
    links, function = PROBABILITIES[case]
    found = infer(lambda _, x: function(nn.Dense(6, name="d")(x)), *shape)
    assert found == [spec.Dense("d"), *links]


NO_PROBABILITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "of the wrong features": lambda x: (y := jnp.exp(x)) / y.sum(-1)[:, None, :],
    "logarithms of the wrong features": lambda x: (
        x - jnp.log(jnp.exp(x).sum(-1))[:, None, :]
    ),
    "of other logits": lambda x: x - jnp.log(jnp.exp(2 * x).sum(-1, keepdims=True)),
    "shifted": lambda x: (
        x - (jnp.log(jnp.exp(x - (m := x.max(-1, keepdims=True))).sum()) + 2 * m)
    ),
    "absolute logarithms": lambda x: (
        x - jnp.abs(jnp.log(jnp.exp(x).sum(-1, keepdims=True)))
    ),
    "without a logarithm": lambda x: x - jnp.exp(x).sum(-1, keepdims=True),
    "over all": lambda x: (y := jnp.exp(x)) / y.sum((1, 2), keepdims=True),
}


@pytest.mark.parametrize("case", NO_PROBABILITIES)
def test_what_only_looks_like_probabilities(case):
    function = NO_PROBABILITIES[case]
    with pytest.raises(ValueError, match="infer_spec: "):
        infer(lambda _, x: function(nn.Dense(6, name="d")(x)), 6, 6)


class Policy(nnx.Module):
    """An actor-critic, whose policy ends in a log-softmax."""

    def __init__(self, rngs: nnx.Rngs):
        self.trunk = nnx.Linear(5, 8, rngs=rngs)
        self.logits = nnx.Linear(8, 6, rngs=rngs)
        self.value = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nnx.relu(self.trunk(x))
        return nnx.log_softmax(self.logits(x)), self.value(x)


def test_an_actor_critic():
    model = nnx.eval_shape(lambda: Policy(nnx.Rngs(0)))
    heads = [[spec.Dense("logits"), LOG_SOFTMAX], [spec.Dense("value")]]
    links = (spec.Dense("trunk"), RELU, spec.Outputs(heads))
    assert infer_spec(model, array(2, 5)).layers == links


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
    if "epsilon" in options:
        declared = dataclasses.replace(declared, epsilon=1e-3)  # pyright: ignore
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
    assert norm == spec.RMSNorm(epsilon=0.0)
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
    options["strides"] = 2 if strides == (2, 2) else strides  # the shorter form
    assert layers == [spec.ConvTranspose("c", **options)]


def zero_padded(x: jax.Array, size: int = 1) -> jax.Array:
    return jnp.pad(x, ((0, 0), (size, size), (size, size), (0, 0)))


def patches(x: jax.Array) -> list[jax.Array]:
    return [x[:, i::2, j::2] for j in range(2) for i in range(2)]


@pytest.mark.parametrize(
    ("parts", "moves"),
    [
        (patches, True),
        (lambda x: [x[:, i::2, j::3] for i in range(2) for j in range(3)], True),
        (lambda x: [x[:, :, i::3] for i in range(3)], True),
        (lambda x: [x[:, i::2, i::2] for i in range(2)], False),
        (lambda x: [x[:, 1::2], x[:, ::2]], False),
        (lambda x: [x[:, ::2, 1:], x[:, 1::2, :-1]], False),
    ],
)
def test_patches_beside_one_another_are_moves_of_the_whole(parts, moves):
    """Where all of it is there, and in order."""
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)

    def merged(x: Any) -> jax.Array:
        return jnp.concatenate(parts(x), -1)

    given = graph.leaf("input", "x", x.shape, x.dtype)
    (output,) = graph.read(jax.make_jaxpr(merged)(x), [given])
    assert ("concatenate" not in {node.op for node in graph.above(output)}) == moves
    assert np.array_equal(graph.run([output], {given: x})[0], merged(x))


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
        [spec.Dropout(0.3)],
        IMAGES,
    ),
    "no dropout": (lambda _, x: nn.Dropout(0.3, deterministic=True)(x), [], IMAGES),
    "stochastic depth": (
        lambda _, x: (
            x
            + nn.Dropout(0.3, (1, 2, 3), deterministic=False)(nn.Dense(6, name="d")(x))
        ),
        [spec.Residual([spec.Dense("d"), spec.Dropout(0.3)])],
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
        lambda _, x: x + nn.Dense(6, name="d")(x) + nn.Dense(6, name="e")(nn.relu(x)),
        [spec.Residual([spec.Residual([spec.Dense("d")])], [RELU, spec.Dense("e")])],
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


EINSUMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[spec.Link]]] = {
    "BTD,DH->BTH": ((6, 3), (5, 6), [spec.Dense("e")]),
    "BTD,HD->BTH": ((3, 6), (5, 6), [spec.DenseGeneral("e", in_axis=1)]),
    "BTD,NDH->BTNH": ((4, 6, 3), (5, 6), [spec.DenseGeneral("e", in_axis=1)]),
    "BTD,CNDH->CBTNH": ((2, 4, 6, 3), (5, 6), [spec.DenseGeneral("e", in_axis=2)]),
    "BTNH,NHD->BTD": ((2, 3, 4), (5, 2, 3), [spec.DenseGeneral("e")]),
    "BTNH,HDN->BDT": ((3, 4, 2), (5, 2, 3), [spec.DenseGeneral("e", in_axis=(0, 2))]),
    "BTNH,NHG->BTNG": (
        (2, 3, 4),
        (5, 2, 3),
        [spec.DenseGeneral("e", in_axis=1, batch_axis=0)],
    ),
    "BTD,TS->BSD": ((5, 7), (5, 6), [spec.Transpose((1, 0)), spec.Dense("e")]),
    # A kernel for each position is one of all positions and features, in blocks.
    "BTD,TDH->BTH": (
        (5, 6, 3),
        (5, 6),
        [spec.Flatten(), spec.DenseGeneral("e", in_axis=1, batch_axis=0)],
    ),
}


@pytest.mark.parametrize("library", ["Linen", "NNX"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("equation", EINSUMS)
def test_einsums_in_any_order(equation, bias, library):
    shape, size, links = EINSUMS[equation]

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(math.prod(size[1:]), name="d")(x).reshape((-1, *size))
            return nn.Einsum(shape, equation, use_bias=bias, name="e")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.d = nnx.Linear(4, math.prod(size[1:]), rngs=rngs)
            kernel, out = equation.partition(",")[2].split("->")
            sizes = dict(zip(kernel, shape, strict=True))
            added = tuple(sizes[axis] for axis in out if axis in sizes)
            biases = added if bias else None
            self.e = nnx.Einsum(equation, shape, biases, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.e(self.d(x).reshape((-1, *size)))

    model = Linen() if library == "Linen" else nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
    chain = infer_spec(model, array(2, 5, 4))
    assert chain.layers == (spec.Dense("d"), *links)


def param(module: nn.Module, name: str, *shape: int) -> jax.Array:
    return module.param(name, nn.initializers.ones, shape)


def twice(_: nn.Module, x: jax.Array) -> jax.Array:
    dense = nn.Dense(6, name="d")
    return dense(nn.relu(dense(x)))


def twice_side_by_side(_: nn.Module, x: jax.Array) -> jax.Array:
    dense = nn.Dense(6, name="d")
    return dense(x) + nn.relu(dense(nn.tanh(x)))


def squeeze_excite(_: nn.Module, x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(nn.Dense(6, name="d")(x.mean((1, 2), keepdims=True)))


def squeeze_excite_of_convolutions(_: nn.Module, x: jax.Array) -> jax.Array:
    gate = nn.Conv(6, (1, 1), name="c")(x.mean((1, 2), keepdims=True))
    return nn.tanh(x) * nn.sigmoid(gate)


def densely(_: nn.Module, x: jax.Array) -> jax.Array:
    """Each layer takes all that was before, kept in a list."""
    found = [x]
    for name in "ab":
        found.append(nn.Dense(2, name=name)(jnp.concatenate(found, -1)))
    return jnp.concatenate(found, -1)


def per_head(_: nn.Module, x: jax.Array) -> jax.Array:
    heads = nn.DenseGeneral((2, 3), name="d")(x)
    return nn.DenseGeneral(4, axis=(-2, -1), name="e")(heads)


SIGMOID = spec.Activation("sigmoid")
CONSTRUCTS |= {
    "layer used twice": (
        twice,
        [spec.Dense("d"), RELU, spec.Tied([spec.Dense("d")])],
        (2, 6),
    ),
    "layer used twice, side by side": (
        twice_side_by_side,
        [
            spec.Residual(
                [spec.Activation("tanh"), spec.Tied([spec.Dense("d")]), RELU],
                [spec.Dense("d")],
            )
        ],
        (2, 6),
    ),
    "several features": (
        per_head,
        [spec.DenseGeneral("d"), spec.DenseGeneral("e")],
        (2, 5, 6),
    ),
    "concatenation": (
        lambda _, x: jnp.concatenate([x, nn.Dense(3, name="d")(x)], -1),
        [spec.Concatenate([[], [spec.Dense("d")]])],
        IMAGES,
    ),
    "concatenation of positions": (
        lambda _, x: jnp.concatenate([x, nn.Dense(6, name="d")(x)], 1),
        [spec.Concatenate([[], [spec.Dense("d")]], axis=-2)],
        (2, 5, 6),
    ),
    "concatenations of a list": (
        densely,
        [
            spec.Concatenate([[], [spec.Dense("a")]]),
            spec.Concatenate([[], [spec.Dense("b")]]),
        ],
        (2, 5, 6),
    ),
    "squeeze and excite": (
        squeeze_excite,
        [spec.Gate([], [spec.GlobalAvgPool(), spec.Dense("d"), SIGMOID])],
        IMAGES,
    ),
    "squeeze and excite of convolutions": (
        squeeze_excite_of_convolutions,
        [
            spec.Gate(
                [spec.Activation("tanh")],
                [spec.AvgPool((8, 8)), spec.Conv("c"), SIGMOID],
            )
        ],
        IMAGES,
    ),
    "gated linear unit": (
        lambda _, x: nn.glu(nn.Dense(6, name="d")(x)),
        [
            spec.Dense("d"),
            spec.Gate(
                [spec.Slice((0, 3), axis=-1)], [spec.Slice((3, 6), axis=-1), SIGMOID]
            ),
        ],
        IMAGES,
    ),
    "class token": (
        lambda _, x: nn.Dense(3, name="d")(nn.tanh(x)[:, 0]),
        [spec.Activation("tanh"), spec.Slice(0), spec.Dense("d")],
        (2, 5, 6),
    ),
    "learned positions": (
        lambda module, x: nn.tanh(x) + param(module, "positions", 5, 6),
        [spec.Activation("tanh"), spec.Bias("positions")],
        (2, 5, 6),
    ),
    "layer scale": (
        lambda module, x: nn.tanh(x) * param(module, "gamma", 6),
        [spec.Activation("tanh"), spec.LayerScale("gamma")],
        IMAGES,
    ),
    "layer scale called scale": (
        lambda module, x: nn.tanh(x) * param(module, "scale", 6),
        [spec.Activation("tanh"), spec.LayerScale("scale")],
        IMAGES,
    ),
    "learned slope": (
        lambda _, x: nn.PReLU(name="p")(x),
        [spec.PReLU("p")],
        IMAGES,
    ),
    "a bias after a root mean square": (
        lambda module, x: (
            nn.RMSNorm(name="n", use_scale=False)(x) + param(module, "bias", 6)
        ),
        [spec.RMSNorm(), spec.Bias("bias")],
        IMAGES,
    ),
    "fixed positions": (
        lambda _, x: nn.tanh(x) + jnp.sin(jnp.arange(30.0).reshape(5, 6)),
        [
            spec.Activation("tanh"),
            spec.Residual([], [spec.Input((5, 6), common=0.84), spec.Scale(0.6967)]),
        ],
        (2, 5, 6),
    ),
    "repeats": (
        lambda _, x: nn.Dense(3, name="d")(jnp.repeat(nn.tanh(x), 2, axis=1)),
        [spec.Activation("tanh"), spec.Resize((16, 8)), spec.Dense("d")],
        IMAGES,
    ),
    "repeats at the end": (
        lambda _, x: jnp.repeat(jnp.repeat(nn.tanh(x), 2, axis=1), 2, axis=2),
        [spec.Activation("tanh"), spec.Resize((16, 16))],
        IMAGES,
    ),
    "upsampling": (
        lambda _, x: jax.image.resize(nn.tanh(x), (2, 16, 12, 6), "nearest"),
        [spec.Activation("tanh"), spec.Resize((16, 12))],
        IMAGES,
    ),
    "bilinear upsampling": (
        lambda _, x: jax.image.resize(nn.tanh(x), (2, 16, 12, 6), "bilinear"),
        [spec.Activation("tanh"), spec.Resize((16, 12), method="bilinear")],
        IMAGES,
    ),
    "mixing of tokens": (
        lambda _, x: (
            x + jnp.swapaxes(nn.Dense(5, name="d")(jnp.swapaxes(x, 1, 2)), 1, 2)
        ),
        [
            spec.Residual(
                [spec.Transpose((1, 0)), spec.Dense("d"), spec.Transpose((1, 0))]
            )
        ],
        (2, 5, 6),
    ),
    "space to depth": (
        lambda _, x: nn.Conv(3, (3, 3), name="c")(nn.tanh(x).reshape((2, 8, 4, 12))),
        [spec.Activation("tanh"), spec.Reshape((8, 4, 12)), spec.Conv("c")],
        IMAGES,
    ),
    "patches that are merged": (
        lambda _, x: nn.Conv(3, (3, 3), name="c")(
            jnp.concatenate(patches(nn.tanh(x)), -1)
        ),
        [
            spec.Activation("tanh"),
            spec.Reshape((4, 2, 8, 6)),
            spec.Transpose((0, 2, 1, 3)),
            spec.Reshape((4, 4, 24)),
            spec.Conv("c"),
        ],
        IMAGES,
    ),
    "pixel shuffle": (
        lambda _, x: nn.Conv(3, (3, 3), name="c")(
            nn.tanh(x)
            .reshape((2, 8, 8, 2, 3, 1))
            .transpose((0, 1, 3, 2, 4, 5))
            .reshape((2, 16, 24, 1))
        ),
        [
            spec.Activation("tanh"),
            spec.Reshape((8, 8, 2, 3)),
            spec.Transpose((0, 2, 1, 3)),
            spec.Reshape((16, 24, 1)),
            spec.Conv("c"),
        ],
        IMAGES,
    ),
    "un-flatten": (
        lambda _, x: nn.Conv(3, (3, 3), name="c")(
            nn.Dense(96, name="d")(x).reshape((2, 4, 4, 6))
        ),
        [spec.Dense("d"), spec.Reshape((4, 4, 6)), spec.Conv("c")],
        (2, 5),
    ),
    "folded batch": (
        lambda _, x: nn.Dense(3, name="d")(nn.tanh(x).reshape((10, 6))),
        [spec.Activation("tanh"), spec.Dense("d")],
        (2, 5, 6),
    ),
    "stack": (
        lambda _, x: nn.Dense(3, name="d")(
            jnp.stack([nn.Dense(4, name=name)(x) for name in "abc"], axis=1)
        ),
        [
            spec.Concatenate(
                [[spec.Dense(name), spec.Reshape((1, 4))] for name in "abc"], axis=-2
            ),
            spec.Dense("d"),
        ],
        (2, 5),
    ),
    "a block of positions": (
        lambda _, x: nn.tanh(x)[:, 2:5],
        [spec.Activation("tanh"), spec.Slice((2, 5), axis=-3)],
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


MASKS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "bernoulli": lambda x, key: x * jax.random.bernoulli(key, 0.7, x.shape) / 0.7,
    "what is dropped": lambda x, key: jnp.where(
        jax.random.bernoulli(key, 0.3, x.shape), 0.0, x / 0.7
    ),
    "uniform": lambda x, key: x * (jax.random.uniform(key, x.shape) > 0.3) / 0.7,
    "not": lambda x, key: x * ~(jax.random.uniform(key, x.shape) < 0.3) / 0.7,
    "bfloat16": lambda x, key: (
        x * (jax.random.uniform(key, x.shape, jnp.bfloat16) >= 0.3) / 0.7
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_dropout_written_out(case):
    def function(module: nn.Module, x: jax.Array) -> jax.Array:
        return MASKS[case](x, module.make_rng("noise"))

    (link,) = infer(function)
    assert isinstance(link, spec.Dropout)
    assert link.rate == pytest.approx(0.3, rel=0.01 if case == "bfloat16" else 1e-6)


NOT_DROPOUT: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "another factor": lambda x, key: x * jax.random.bernoulli(key, 0.5, x.shape) * 100,
    "no factor": lambda x, key: x * jax.random.bernoulli(key, 0.5, x.shape),
    "another distribution": lambda x, key: (
        2 * x * (jax.random.normal(key, x.shape) < 0.5)
    ),
    "another range": lambda x, key: (
        2 * x * (jax.random.uniform(key, x.shape, minval=-1.0) < 0.5)
    ),
    "two masks": lambda x, key: (
        x
        * jax.random.bernoulli(key, 0.5, x.shape)
        * jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, x.shape)
        * 2
    ),
}


@pytest.mark.parametrize("case", NOT_DROPOUT)
def test_a_random_mask_that_is_no_dropout(case):
    def function(module: nn.Module, x: jax.Array) -> jax.Array:
        return NOT_DROPOUT[case](nn.tanh(x), module.make_rng("noise"))

    with pytest.raises(ValueError, match="a random mask, but a Dropout divides"):
        infer(function)


CORRELATED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": lambda x: x + nn.relu(x),
    "norm": lambda x: nn.BatchNorm(False, name="n")(x) - x,
    "silu": lambda x: nn.silu(x) - x / 2,
    "pooling": lambda x: x + nn.avg_pool(x, (3, 3), padding="SAME"),
    "both with a common part": lambda x: x + nn.Dense(6, name="d")(x) + nn.relu(x),
}


@pytest.mark.parametrize("case", CORRELATED)
def test_arms_that_correlate(case):
    with pytest.raises(
        ValueError, match="one signal with no kernel in between"
    ) as error:
        infer(lambda _, x: CORRELATED[case](nn.Dense(6, name="a")(x)))
    assert "Pass blocks=[spec.Block(" in str(error.value)


def test_what_mixes_on_every_way_does_not_correlate():
    def function(_: nn.Module, x: jax.Array) -> jax.Array:
        mixed = nn.Dense(6, name="a")(x) + nn.Dense(6, name="b")(x)
        return nn.relu(x) + mixed

    declared = spec.Residual([spec.Dense("a")], [spec.Dense("b")])
    assert infer(function) == [spec.Residual([declared], [RELU])]
