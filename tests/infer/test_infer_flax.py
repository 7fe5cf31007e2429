"""Models of either kind, however they are wrapped and called."""

import re
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from flax import nnx
from zoo_linen import Call, array, infer
from zoo_nnx import abstract

from backmatch_optax import spec
from backmatch_optax.infer import infer_spec

RELU = spec.Activation("relu")


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
    assert chain.layers == (spec.Dense("d"), spec.Dropout(0.5))


def test_random_streams_and_collections():
    def function(module: nn.Module, x: jax.Array) -> jax.Array:
        assert module.has_rng("noise")
        module.sow("intermediates", "x", x)
        return nn.Dropout(0.5, rng_collection="noise", deterministic=False)(x)

    options = {"rngs": {"noise": jax.random.key(0)}, "mutable": ["intermediates"]}
    assert infer(function, **options) == [spec.Dropout(0.5)]


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
    assert infer_spec(model, array(2, 8, 8, 3)).layers == (*links, spec.Dropout(0.5))
    model.eval()
    assert infer_spec(model, array(2, 8, 8, 3)).layers == links


def test_errors_tell_the_line_of_code():
    with pytest.raises(ValueError, match=r"test_infer_flax\.py:\d+"):
        infer(lambda _, x: jnp.cos(nn.Dense(6)(x)))


def test_several_inputs():
    def towers(_: nn.Module, x: jax.Array, text: jax.Array) -> jax.Array:
        text = nn.Embed(5, 4, name="embed")(text).mean(1)
        return nn.Dense(4, name="image")(x) * nn.Dense(4, name="text")(text)

    chain = infer_spec(Call(towers), array(2, 6), array(2, 7, dtype=jnp.int32))
    other = [spec.Input((7,)), spec.Embed("embed"), spec.GlobalAvgPool()]
    gate = spec.Gate([spec.Dense("image")], [*other, spec.Dense("text")])
    assert chain == spec.LayerChain([gate], input_shape=(6,))
    added = infer_spec(Call(lambda _, x, y: nn.relu(x + y)), array(2, 6), array(2, 6))
    assert added.layers == (spec.Residual([spec.Input((6,))]), RELU)


def test_an_input_without_batch():
    with pytest.raises(ValueError, match=r"of shape \(6,\) has no batch") as error:
        infer(lambda _, x: nn.relu(x), 6)
    assert "jax.ShapeDtypeStruct((1, 6), jnp.float32)" in str(error.value)


@pytest.mark.parametrize("library", ["Linen", "NNX"])
def test_an_image_without_batch(library):
    model: Any = models.ConvNet()
    if library == "NNX":
        model = abstract(models.NnxConvNet)
    image = array(*models.CONV_NET.input_shape)
    with pytest.raises(ValueError, match="seems to lack the batch dimension") as error:
        infer_spec(model, image)
    (pasted,) = re.findall(r"pass (jax.*?, jnp.\w+\))", str(error.value))
    assert infer_spec(model, eval(pasted)) == models.CONV_NET


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"params": {}}, array(2, 8)), "but it is a dict, the variables perhaps"),
        ((models.Mlp, array(2, 8)), "the class Mlp. Pass an instance of it"),
        ((models.Mlp().apply, array(2, 8)), "Pass the Mlp that it is a method of"),
        ((models.Mlp(),), "the model's inputs are missing"),
        ((models.Mlp(), (2, 8)), r"inputs\[0\] \(=\(2, 8\)\) is a shape"),
        ((models.Mlp(), [2, 8]), r"ShapeDtypeStruct\(\(2, 8\), jnp.float32\)"),
        ((models.Mlp(), {"params": {}}, array(2, 8)), "are the model's variables"),
    ],
)
def test_arguments_that_are_something_else(arguments, message):
    with pytest.raises(ValueError, match=message):
        infer_spec(*arguments)


class Heads(nn.Module):
    """A policy and a value, as in actor-critic networks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, Any]:
        x = nn.relu(nn.Dense(5, name="body")(x))
        value = nn.Dense(1, name="value")(x).squeeze(-1)
        return {"policy": nn.Dense(3, name="policy")(x), "other": (value, x.shape)}


def test_several_outputs():
    ends = spec.Outputs([[spec.Dense("value")], [spec.Dense("policy")]])
    declared = (spec.Dense("body"), RELU, ends)
    assert infer_spec(Heads(), array(2, 6)).layers == declared
    one = infer_spec(Heads(), array(2, 6), method=lambda model, x: model(x)["policy"])
    assert one.layers == (*declared[:2], spec.Dense("policy"))


def test_flax_is_needed_and_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax.linen", None)
    with pytest.raises(ImportError, match="needs Flax: pip install flax"):
        infer_spec(models.Mlp(), array(2, 8))


def test_numpys_own_dtypes_are_taken_as_jaxs():
    def embedded(_: nn.Module, tokens: Any, x: Any) -> jax.Array:
        return nn.Dense(4)(nn.Embed(5, 6)(tokens).mean(1) + x)

    numpys = np.zeros((2, 7), np.int64), np.zeros((2, 6), np.float64)
    jaxs = array(2, 7, dtype=jnp.int32), array(2, 6)
    assert infer_spec(Call(embedded), *numpys) == infer_spec(Call(embedded), *jaxs)
