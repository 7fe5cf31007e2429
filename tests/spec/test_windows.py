"""Arguments, defaults and output shapes of links are Flax's."""

import dataclasses
import inspect
import math
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.activations import activation
from backmatch_optax.spec.elementwise import ACTIVATIONS

# Spellings and defaults of Flax.


@pytest.mark.parametrize(
    ("link", "module"),
    [
        (spec.Conv, nn.Conv),
        (spec.Conv, nnx.Conv.__init__),
        (spec.ConvTranspose, nn.ConvTranspose),
        (spec.ConvTranspose, nnx.ConvTranspose.__init__),
    ],
    ids=["linen conv", "nnx conv", "linen transposed", "nnx transposed"],
)
def test_convolutions_have_flaxs_defaults(link, module):
    parameters = inspect.signature(module).parameters
    for field in dataclasses.fields(link):
        if field.name != "path":
            # Where Flax says None, for its strides and dilation, it means 1.
            expected = parameters[field.name].default or 1
            assert (field.default or 1) == expected, field.name


@pytest.mark.parametrize("library", [nn, nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm"])
def test_normalisations_have_flaxs_defaults(name, library):
    module = getattr(library, name)
    parameters = inspect.signature(module if library is nn else module.__init__)
    for field in dataclasses.fields(getattr(spec, name)):
        if field.name not in ("path", "one_plus"):  # the second is Gemma's own
            assert field.default == parameters.parameters[field.name].default


@pytest.mark.parametrize(
    ("link", "function"),
    [(spec.MaxPool, nn.max_pool), (spec.AvgPool, nn.avg_pool)],
    ids=["max", "avg"],
)
def test_pools_have_flaxs_defaults(link, function):
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(link):
        expected = parameters[field.name].default
        if expected is inspect.Parameter.empty:
            expected = dataclasses.MISSING
        assert field.default == expected, field.name


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_functions_of_flax_or_jax(name):
    assert name == "identity" or callable(activation(name))


# Output shapes, against those that Flax really makes.


def flax_shape(function: Any, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return jax.eval_shape(function, x).shape[1:]


def assert_same_shape(link: spec.Link, kernel: Any, function: Any, input_shape: Any):
    """The link has the output of a function, and refuses where that is empty."""
    expected = flax_shape(function, input_shape)
    shapes = {"kernel": kernel} if kernel else {}
    if math.prod(expected) == 0:
        with pytest.raises(ValueError, match="larger than its input"):
            link.shape_after(input_shape, shapes)
    else:
        assert link.shape_after(input_shape, shapes) == expected


@st.composite
def windows(draw: st.DrawFn, paddings: list[str]) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    pads = st.integers(0, 3)

    def per_axis(low: int, high: int) -> Any:
        one = st.integers(low, high)
        return draw(one | st.lists(one, min_size=rank, max_size=rank).map(tuple))

    return {
        "input_shape": (*[draw(st.integers(1, 8)) for _ in range(rank)], 2),
        "window": tuple(draw(st.integers(1, 4)) for _ in range(rank)),
        "strides": per_axis(1, 3),
        "dilation": per_axis(1, 3),
        "padding": draw(
            st.sampled_from(paddings)
            | st.lists(st.tuples(pads, pads), min_size=rank, max_size=rank)
        ),
    }


@hypothesis.settings(max_examples=150)
@hypothesis.given(case=windows(["VALID", "SAME", "SAME_LOWER", "CIRCULAR", "REFLECT"]))
def test_conv_has_flaxs_output_shape(case):
    options = {
        "strides": case["strides"],
        "padding": case["padding"],
        "kernel_dilation": case["dilation"],
    }
    module = nn.Conv(3, case["window"], **options)

    def apply(x: jax.Array) -> Any:
        return module.init_with_output(jax.random.key(0), x)[0]

    link = spec.Conv("layer", **options)
    assert_same_shape(link, (*case["window"], 2, 3), apply, case["input_shape"])


@hypothesis.settings(max_examples=100)
@hypothesis.given(case=windows(["VALID", "SAME", "CIRCULAR"]))
def test_transposed_conv_has_flaxs_output_shape(case):
    options = {"padding": case["padding"], "kernel_dilation": case["dilation"]}
    strides = case["strides"]
    if isinstance(strides, int):  # which Flax broadcasts in its Conv only
        strides = (strides,) * len(case["window"])
    module = nn.ConvTranspose(3, case["window"], strides=strides, **options)

    def apply(x: jax.Array) -> Any:
        return module.init_with_output(jax.random.key(0), x)[0]

    link = spec.ConvTranspose("layer", strides=case["strides"], **options)
    assert_same_shape(link, (*case["window"], 2, 3), apply, case["input_shape"])


@pytest.mark.parametrize("padding", [0, 2, [1], [1, 2], "CAUSAL", "valid", "same"])
def test_conv_takes_flaxs_other_spellings_of_padding(padding):
    rank = 1 if padding in ("CAUSAL", [1]) else 2
    input_shape, window = (*(7, 6)[:rank], 2), (3, 2)[:rank]
    if isinstance(padding, str) and padding.islower():
        module = nn.Conv(3, window, padding=padding.upper())
    else:
        module = nn.Conv(3, window, padding=padding)

    def apply(x: jax.Array) -> Any:
        return module.init_with_output(jax.random.key(0), x)[0]

    link = spec.Conv("layer", padding=padding)
    assert_same_shape(link, (*window, 2, 3), apply, input_shape)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_with_groups_has_flaxs_kernel_and_output(groups):
    module = nn.Conv(8, (3, 3), feature_group_count=groups, name="conv")
    x = jnp.zeros((1, 5, 5, 4))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    chain = spec.LayerChain(
        [spec.Conv("conv", feature_group_count=groups)], input_shape=(5, 5, 4)
    )
    bmo.check_spec(chain, {"conv": shapes})


@pytest.mark.parametrize(
    ("link", "function"),
    [(spec.MaxPool, nn.max_pool), (spec.AvgPool, nn.avg_pool)],
    ids=["max", "avg"],
)
@hypothesis.settings(max_examples=75)
@hypothesis.given(case=windows(["VALID", "SAME", "SAME_LOWER"]))
def test_pools_have_flaxs_output_shape(link, function, case):
    strides = case["strides"]
    if isinstance(strides, int):  # which Flax's pools do not take
        strides = (strides,) * len(case["window"])

    def apply(x: jax.Array) -> jax.Array:
        return function(x, case["window"], strides=strides, padding=case["padding"])

    options = {"strides": case["strides"], "padding": case["padding"]}
    pool = link(case["window"], **options)
    assert_same_shape(pool, None, apply, case["input_shape"])


@pytest.mark.parametrize("input_shape", [(4,), (5, 4), (3, 5, 4)])
def test_dense_acts_on_the_last_axis_like_flax(input_shape):
    def apply(x: jax.Array) -> Any:
        return nn.Dense(7).init_with_output(jax.random.key(0), x)[0]

    assert_same_shape(spec.Dense("layer"), (4, 7), apply, input_shape)
