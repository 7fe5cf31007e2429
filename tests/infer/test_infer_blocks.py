"""What no link describes: an error, whose way out works when it is pasted."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from zoo_linen import IMAGES, Call, array, infer
from zoo_nnx import abstract

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.infer import infer_spec

RELU = spec.Activation("relu")


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
    with pytest.raises(ValueError, match=r"Block\('both'.* would hold 'Dense_0/bias'"):
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

    # It grows until it has one output, which is the sum.
    block = spec.Block("two", weight_curvature=1.0, input_curvature=0.5)
    assert infer(function, blocks=[block]) == [block]


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
    gate = spec.Gate([], [spec.Dense("layers/0/dense"), spec.Activation("sigmoid")])
    declared = (gate, spec.Activation("relu"), spec.Activation("tanh"))
    assert infer_spec(model, array(2, 6)).layers == declared


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


def zero_padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def param(module: nn.Module, name: str, *shape: int) -> jax.Array:
    return module.param(name, nn.initializers.ones, shape)


def wavy(_: nn.Module, x: jax.Array) -> jax.Array:
    """A gate of waves, which no link describes."""
    gate = nn.Dense(6, name="gate")(x.mean((1, 2), keepdims=True))
    return x * jnp.cos(gate) * jnp.cos(x)


@jax.custom_vjp
def reversed_gradient(x: jax.Array) -> jax.Array:
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_jvp
def smaller_gradient(x: jax.Array) -> jax.Array:
    return x


smaller_gradient.defjvp(lambda primals, tangents: (primals[0], 0.1 * tangents[0]))


UNKNOWN: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "scores": (
        lambda _, x: jnp.einsum("bif,bjf->bij", x, x),
        (2, 5, 6),
        "multiplies two signals, which is attention only where one of them is a softm",
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
        lambda _, x: lax.cond(x.sum() > 0, jnp.tanh, jnp.cos, x),
        IMAGES,
        "cond is a branch on data",
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
        "in module 'c': the kernel of conv_general_dilated is an array",
    ),
    "parameter along the positions": (
        lambda module, x: nn.tanh(x) + param(module, "bias", 6)[:, None],
        (2, 6, 6),
        "add",
    ),
    "logarithm": (
        lambda _, x: jnp.log(x),
        IMAGES,
        "log ends an elementwise function that is neither",
    ),
    "unknown activation": (
        lambda _, x: jnp.cos(x),
        IMAGES,
        "cos ends an elementwise function that is neither",
    ),
    "shift": (
        lambda _, x: nn.relu(x) + 1.0,
        IMAGES,
        "add ends an elementwise function that is neither",
    ),
    "gate of its own input": (
        lambda _, x: nn.tanh(x) * nn.sigmoid(1.7 * x),
        IMAGES,
        "two sides of mul come from one signal .* Gate takes them as unrelated",
    ),
    "softmax over positions": (
        lambda _, x: nn.softmax(x, axis=1),
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
    "noise with a mean": (
        lambda module, x: x + jax.random.uniform(module.make_rng("noise"), x.shape),
        IMAGES,
        "add combines the signal with random numbers",
    ),
    "mask of the input, beside the input": (
        lambda _, x: x + x * jnp.arange(6.0),
        IMAGES,
        "the two sides of add come from one signal",
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
    "upsampling by splines": (
        lambda _, x: jax.image.resize(x, (2, 16, 16, 6), "cubic"),
        IMAGES,
        "the kernel of dot_general is an array",
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
    "sum over features": (lambda _, x: x.sum(-1), IMAGES, "sum over features or batch"),
    "no output": (lambda _, x: jnp.ones(3), IMAGES, "has 0 outputs"),
}


NO_WAY_OUT = ("stopped gradient", "no output")


def pasted(error: pytest.ExceptionInfo[ValueError]) -> list[spec.Block]:
    """The blocks that an error message says to pass."""
    (text,) = re.findall(r"Pass blocks=(\[.*?\]) to ", str(error.value))
    return eval(text)


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_an_error(case):
    function, shape, message = UNKNOWN[case]
    with pytest.raises(ValueError, match=message) as error:
        infer(function, *shape)
    assert str(error.value).startswith("infer_spec: ")
    if case in NO_WAY_OUT:
        assert "spec.Block" not in str(error.value)
        return
    assert "measured scales" in str(error.value)
    blocks = pasted(error)
    numbers = {"weight_curvature": 1.0, "input_curvature": 1.0}
    given = [dataclasses.replace(block, **numbers) for block in blocks]
    assert any(
        isinstance(link, spec.Block) for link in infer(function, *shape, blocks=given)
    )


def check(function: Callable[..., Any], x: jax.Array) -> spec.LayerChain:
    """Pastes what the error says; the chain covers all parameters and gives scales."""
    model = Call(function)
    with pytest.raises(ValueError, match="infer_spec: ") as error:
        infer_spec(model, x)
    chain = infer_spec(model, x, blocks=pasted(error))
    params: Any = model.init(jax.random.key(0), x).get("params", {})
    assert eval(repr(chain)) == chain
    bmo.check_spec(chain, params)
    assert all(0 < scale < math.inf for scale in scales(chain, params).values())
    return chain


def scales(chain: spec.LayerChain, params: Any) -> dict[str, jax.Array]:
    return bmo.layer_scales(chain, params, normalize=False)


class Mixing(nn.Module):
    """Weights over positions that are no softmax, between two kernels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(6, name="d")(x)
        return nn.Dense(6, name="e")(jnp.tanh(y @ y.swapaxes(1, 2)) @ y)


class Waves(nn.Module):
    """A layer whose activation no link describes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.cos(nn.Dense(6)(x))


def called_twice(_: nn.Module, x: jax.Array) -> jax.Array:
    waves = Waves(name="waves")
    return nn.Dense(2, name="head")(waves(waves(x)))


def mixing(_: nn.Module, x: jax.Array) -> jax.Array:
    x = x + Mixing(name="mix")(nn.LayerNorm()(x))
    return nn.Dense(2, name="head")(x)


def test_blocks_that_errors_name():
    tokens, images = jnp.ones((2, 5, 6)), jnp.ones(IMAGES)
    assert check(mixing, tokens).paths[1:] == ("mix/d", "mix/e", "head")
    assert check(UNKNOWN["recurrence"][0], tokens).paths == ("LSTMCell_0",)
    assert check(called_twice, tokens).paths == ("waves/Dense_0", "head")
    (link,) = check(lambda _, x: jnp.cos(x), images).layers
    assert isinstance(link, spec.Block)
    assert link.path is None
    assert link.weight_curvature is None


def test_a_link_of_ones_own_is_offered_where_one_rule_is_missing():
    def of(function: Callable[..., Any], *shape: int) -> str:
        with pytest.raises(ValueError, match="infer_spec: ") as error:
            infer(function, *shape)
        return str(error.value)

    assert "put a spec.Link of yours in its place" in of(lambda _, x: jnp.cos(x))
    assert "spec.Link" not in of(UNKNOWN["recurrence"][0], 2, 5, 6)


def test_blocks_before_and_after_one_another():
    def function(module: nn.Module, x: jax.Array) -> jax.Array:
        x = nn.Dense(6, name="a")(jnp.cos(x) * (1 + param(module, "gamma", 6)))
        return jnp.cos(nn.Dense(4, name="b")(wavy(module, x)).mean((1, 2)))

    chain = check(function, jnp.ones(IMAGES))
    assert chain.paths == ("gamma", "a", "gate", "b")
    assert [type(link).__name__ for link in chain.layers] == [
        "Block", "Block", "Dense", "Block", "Dense", "GlobalAvgPool", "Block"
    ]  # fmt: skip


def test_an_unknown_function_beside_its_own_input():
    def function(_: nn.Module, x: jax.Array) -> jax.Array:
        x = nn.Dense(6, name="d")(x)
        return x + jnp.cos(x + 1)

    _, block = check(function, jnp.ones((64, 6))).layers
    assert isinstance(block, spec.Block)
    # E (1 - sin(x + 1))^2 for a normal x, with the cross term.
    cross = 2 * math.sin(1) / math.e**0.5
    expected = 1 - cross + (1 - math.cos(2) * math.e**-2) / 2
    assert block.input_curvature == pytest.approx(expected, rel=0.03)


def test_a_parameter_beside_modules_is_a_block_by_itself():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x + nn.Dense(6, name="d")(x) * (1 + param(self, "gamma", 6))

    chain = check(lambda _, x: Mixed(name="mixed")(x), jnp.ones((2, 6)))
    assert chain.paths == ("mixed/d", "mixed/gamma")


def jacobian_numbers(function: Any, params: Any, x: jax.Array) -> tuple[Any, Any]:
    """The mean diagonals of `J^T J` for the parameters and the input of one example."""
    of_params, of_x = jax.jacobian(function, argnums=(0, 1))(params, x)
    outputs = jax.eval_shape(function, params, x).ndim

    def diagonals(tree: Any) -> jax.Array:
        leaves = jax.tree.leaves(tree)
        squares = [
            jnp.square(leaf).sum(tuple(range(outputs))).ravel() for leaf in leaves
        ]
        return jnp.concatenate(squares).mean()

    return diagonals(of_params), diagonals(of_x)


def test_measured_numbers_are_those_of_the_jacobian():
    class Gate(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * nn.sigmoid(nn.Dense(6)(x))

    model, batch = Call(lambda _, x: Gate(name="gate")(x)), 1024
    x = jax.random.normal(jax.random.key(1), (batch, 6))
    variables = model.init(jax.random.key(0), x)
    (block,) = infer_spec(model, x, blocks=[spec.Block("gate")]).layers
    assert isinstance(block, spec.Block)
    params = variables["params"]

    def one(params: Any, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x[None])[0]  # pyright: ignore

    exact = jnp.array(jax.vmap(lambda x: jacobian_numbers(one, params, x))(x)).mean(1)
    numbers = [block.weight_curvature, block.input_curvature]
    assert numbers == pytest.approx([*map(float, exact)], rel=0.1)
    outputs: Any = model.apply(variables, x)
    gain = jnp.mean(outputs**2) / jnp.mean(x**2)
    assert block.forward_gain == pytest.approx(float(gain), rel=0.1)


def test_numbers_that_are_given_are_kept():
    block = spec.Block("gate", input_curvature=0.5)
    (found, _) = infer(
        lambda _, x: nn.tanh(nn.Dense(6, name="gate")(x)), blocks=[block]
    )
    assert found.input_curvature == 0.5
    assert found.weight_curvature == pytest.approx(64, rel=0.05)  # positions
    with pytest.raises(ValueError, match=r"its input_curvature was .* 0"):
        infer(lambda _, x: lax.stop_gradient(nn.Dense(6)(x)), blocks=[spec.Block(None)])


@pytest.mark.parametrize("concrete", [False, True])
def test_measured_numbers_of_an_nnx_model(concrete):
    class Twice(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(32, 32, rngs=rngs)
            self.norm = nnx.BatchNorm(32, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.norm(self.dense(self.dense(x))))

    model = Twice(nnx.Rngs(0)) if concrete else abstract(Twice)
    chain = infer_spec(model, array(32, 32), blocks=[spec.Block("dense")])
    block, *rest = chain.layers
    assert rest == [spec.BatchNorm("norm"), spec.Dropout(0.5)]
    assert isinstance(block, spec.Block)
    # A random kernel of unit gain, used twice: each use adds 1 to its curvature.
    assert block.input_curvature == pytest.approx(1, rel=0.25)
    assert block.weight_curvature == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (spec.Block("d"), r"must be a list such as .* but it is a .*Block"),
        ("d", r"must be a list such as \[spec.Block\('attend'\)\], but it is 'd'"),
        ([spec.Dense("d")], r"blocks\[0\] must be a spec.Block .* a .*Dense"),
        ([spec.Block("d"), "e"], r"blocks\[1\] must be a spec.Block .* 'e', a str"),
        ([spec.Block(None)], r"Block\(None\) is not needed: links describe all"),
        ([spec.Block("e")], "does not depend on a module at 'e'"),
    ],
)
def test_blocks_are_checked(blocks, message):
    with pytest.raises(ValueError, match=message):
        infer(lambda _, x: nn.Dense(3, name="d")(x), blocks=blocks)


def test_a_block_needs_numbers_elsewhere():
    chain = spec.LayerChain([spec.Block("d")], input_shape=(6,))
    with pytest.raises(
        ValueError, match=r"needs weight_curvature.* infer_spec measures"
    ):
        bmo.check_spec(chain, {"d": {"kernel": jnp.ones((6, 6))}})


def test_a_block_of_an_nnx_model_that_reads_a_mask():
    class Masked(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(32, 8, rngs=rngs)
            self.head = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.head(self.embed(tokens) * (tokens != 0)[..., None])

    tokens = array(16, 6, dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"blocks=\[spec.Block\(None\)\]"):
        infer_spec(Masked(nnx.Rngs(0)), tokens)
    chain = infer_spec(Masked(nnx.Rngs(0)), tokens, blocks=[spec.Block(None)])
    block: Any = chain.layers[1]
    assert block.input_curvature == 1.0  # no token is padding


def test_what_was_rounded_is_not_looked_up():
    def binned(_: nn.Module, x: jax.Array) -> jax.Array:
        places = (nn.sigmoid(nn.Dense(6, name="a")(x)) * 16).astype(jnp.int32)
        return nn.Embed(16, 8, name="codes")(places)

    with pytest.raises(ValueError, match="looks up what was rounded to integers"):
        infer(binned)


@pytest.mark.parametrize(
    "ends",
    [
        lambda x: jnp.cos(nn.Dense(1, name="a")(x)[..., 0]),
        lambda x: nn.Dense(4, name="a")(x).sum(-1),
        lambda x: jnp.square(nn.Dense(4, name="a")(x)).sum(-1),
    ],
    ids=["cos", "sum", "squares"],
)
def test_a_number_for_each_example_is_refused_with_what_follows(ends):
    with pytest.raises(ValueError, match=r"infer_spec: .*they need no chain"):
        infer_spec(Call(lambda _, x: ends(x)), array(4, 6))
