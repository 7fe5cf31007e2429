"""Every way to get a declaration wrong has its own message.

The messages are for people who have their own model in mind and not this package, so
each has to say which layer it is about, what was found and what was expected.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import optax
import pytest
from messages import assert_is_a_message_of_the_package

import backmatch_optax as bmo
from backmatch_optax import spec


def array(*shape: int, dtype: Any = jnp.float32) -> Any:
    # No values are needed to see what is wrong.
    return jax.ShapeDtypeStruct(shape, dtype)


def chain(*links: Any, input_shape: Any = (4,)) -> spec.LayerChain:
    return spec.LayerChain(links, input_shape=input_shape)


def image_chain(*links: Any) -> spec.LayerChain:
    return spec.LayerChain(links, input_shape=(8, 8, 3))


def block(path: str = "mixer", **changes: Any) -> spec.Block:
    arguments: dict[str, Any] = {"weight_curvature": 1.0, "input_curvature": 1.0}
    arguments |= changes
    return spec.Block(path, **arguments)


# Two dense layers that fit, and a convolution that fits an image.
FIT = chain(spec.Dense("fc1"), spec.Dense("fc2"))
PARAMS = {"fc1": {"kernel": array(4, 8)}, "fc2": {"kernel": array(8, 2)}}
CONV = {"conv": {"kernel": array(3, 3, 3, 6)}}


def concrete(params: Any = PARAMS) -> Any:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params)


# What can be seen when the chain is laid over parameters, by shapes and dtypes.

Declared = tuple[spec.LayerChain, Any, str]
PLACEMENT: dict[str, Callable[[], Declared]] = {
    "unknown path": lambda: (
        chain(spec.Dense("fc1"), spec.Dense("fcc2")),
        PARAMS,
        r"'fcc2' \(layers\[1\]\): no parameter at 'fcc2/kernel'. Did you mean "
        r"'fc2/kernel'.*Available: 'fc1/kernel', 'fc2/kernel'",
    ),
    "dots for slashes": lambda: (
        chain(spec.Dense("fc1.kernel")),
        PARAMS,
        r"no parameter at 'fc1.kernel/kernel'. Did you mean 'fc1/kernel'",
    ),
    "path of an array": lambda: (
        chain(spec.Dense("fc1/kernel"), spec.Dense("fc2")),
        {**PARAMS, "fc1": {"kernel": array(4, 8), "bias": array(8)}},
        r"spec: no declared layer covers 'fc1/bias'. Declared: 'fc1/kernel', 'fc2'",
    ),
    "variables for params": lambda: (
        FIT,
        {"params": PARAMS, "batch_stats": {}},
        r"no parameter at 'fc1/kernel'. Pass variables\['params'\], not all variables",
    ),
    "params=None": lambda: (
        FIT,
        None,
        r"no parameter at 'fc1/kernel'.*Available: none",
    ),
    "no parameters": lambda: (
        FIT,
        {},
        r"no parameter at 'fc1/kernel'.*Available: none",
    ),
    "dense with a convolution's kernel": lambda: (
        image_chain(spec.Dense("conv")),
        CONV,
        r"'conv' \(layers\[0\]\).* kernel of shape \(in, out\), but it has shape "
        r"\(3, 3, 3, 6\)",
    ),
    "dense with a scalar for a kernel": lambda: (
        chain(spec.Dense("fc1")),
        {"fc1": {"kernel": array()}},
        r"'fc1'.* kernel of shape \(in, out\), but it has shape \(\)",
    ),
    "dense with a kernel for no input": lambda: (
        chain(spec.Dense("fc1")),
        {"fc1": {"kernel": array(0, 3)}},
        r"'fc1'.* kernel of shape \(0, 3\)",
    ),
    "dense with a kernel for no output": lambda: (
        chain(spec.Dense("fc1")),
        {"fc1": {"kernel": array(4, 0)}},
        r"'fc1'.* kernel .*shape \(4, 0\)",
    ),
    "convolution with an empty window": lambda: (
        image_chain(spec.Conv("conv")),
        {"conv": {"kernel": array(0, 3, 3, 6)}},
        r"'conv'.* kernel .*shape \(0, 3, 3, 6\)",
    ),
    "convolution with a dense kernel": lambda: (
        image_chain(spec.Conv("fc1")),
        {"fc1": {"kernel": array(3, 8)}},
        r"'fc1'.* kernel of shape \(\*window, in / groups, out\).* shape \(3, 8\)",
    ),
    "1-D convolution of an image": lambda: (
        image_chain(spec.Conv("conv")),
        {"conv": {"kernel": array(3, 3, 6)}},
        r"'conv'.* as many spatial dimensions, but the kernel has shape \(3, 3, 6\); "
        r"the input of the chain has shape \(8, 8, 3\)",
    ),
    "input shape with the batch": lambda: (
        spec.LayerChain([spec.Conv("conv")], input_shape=(128, 8, 8, 3)),
        CONV,
        r"'conv'.* as many spatial dimensions, but .*; .* shape \(128, 8, 8, 3\)",
    ),
    "features of neighbours": lambda: (
        FIT,
        {"fc1": {"kernel": array(4, 8)}, "fc2": {"kernel": array(9, 2)}},
        r"'fc2' \(layers\[1\]\).* \(9, 2\) takes 9 input features, but its input has "
        r"8; the output of 'fc1' \(layers\[0\]\) has shape \(8,\)",
    ),
    "features of the input": lambda: (
        FIT,
        {"fc1": {"kernel": array(5, 8)}, "fc2": {"kernel": array(8, 2)}},
        r"'fc1'.* takes 5 input features, but its input has 4; the input of the chain",
    ),
    "features of a flattened image": lambda: (
        image_chain(spec.Conv("conv"), spec.Flatten(), spec.Dense("fc")),
        CONV | {"fc": {"kernel": array(100, 2)}},
        r"'fc' \(layers\[2\]\).* takes 100 input features, but its input has 384; the "
        r"output of layers\[1\], spec.Flatten\(\)",
    ),
    "Flatten forgotten": lambda: (
        image_chain(spec.Conv("conv"), spec.Dense("fc")),
        CONV | {"fc": {"kernel": array(384, 2)}},
        r"'fc'.* takes 384 input features, but its input has 6; .* \(8, 8, 6\)",
    ),
    "feature_group_count forgotten": lambda: (
        image_chain(spec.Conv("conv")),
        {"conv": {"kernel": array(3, 3, 1, 6)}},
        r"'conv'.* \(3, 3, 1, 6\) takes 1 input features, but its input has 3",
    ),
    "feature_group_count that does not divide the output": lambda: (
        image_chain(spec.Conv("conv", feature_group_count=3)),
        {"conv": {"kernel": array(3, 3, 1, 4)}},
        r"'conv'.* feature_group_count \(=3\) must divide the 4 output features",
    ),
    "num_groups that does not divide the features": lambda: (
        image_chain(spec.GroupNorm(num_groups=2)),
        {},
        r"spec.GroupNorm.* num_groups \(=2\) must divide the 3 features",
    ),
    "too many strides": lambda: (
        image_chain(spec.Conv("conv", strides=(1, 2, 1))),
        CONV,
        r"'conv'.* strides \(=\(1, 2, 1\)\) has 3 entries, but there are 2 spatial",
    ),
    "too few strides of a pool": lambda: (
        image_chain(spec.MaxPool((2, 2), strides=(1, 2, 1))),
        {},
        r"layers\[0\], spec.MaxPool.* strides .* has 3 entries, but there are 2",
    ),
    "too many paddings": lambda: (
        image_chain(spec.Conv("conv", padding=[(1, 1), (0, 1), (1, 1)])),
        CONV,
        r"'conv'.* padding .* has 3 entries, but there are 2 spatial dimensions",
    ),
    "equal strides of too many dimensions": lambda: (
        image_chain(spec.Conv("conv", strides=(2, 2, 2))),
        CONV,
        r"'conv'.* strides \(=\(2, 2, 2\)\) has 3 entries, but there are 2 spatial",
    ),
    "equal paddings of too many dimensions": lambda: (
        image_chain(spec.Conv("conv", padding=[(1, 1), (1, 1), (1, 1)])),
        CONV,
        r"'conv'.* padding .* has 3 entries, but there are 2 spatial dimensions",
    ),
    "one dilation for two dimensions": lambda: (
        image_chain(spec.ConvTranspose("conv", kernel_dilation=(2,))),
        CONV,
        r"'conv'.* kernel_dilation \(=\(2,\)\) has 1 entries, but there are 2 spatial",
    ),
    "equal strides of too many dimensions, pooled": lambda: (
        image_chain(spec.AvgPool((2, 2), strides=(2, 2, 2))),
        {},
        r"layers\[0\], spec.AvgPool.* strides .* has 3 entries, but there are 2",
    ),
    "causal padding of an image": lambda: (
        image_chain(spec.Conv("conv", padding="CAUSAL")),
        CONV,
        r"'conv'.*CAUSAL",
    ),
    "convolution larger than the input": lambda: (
        spec.LayerChain([spec.Conv("conv", padding="VALID")], input_shape=(2, 8, 3)),
        CONV,
        r"'conv'.* window 3\*3 is larger than its input 2\*8",
    ),
    "dilated convolution larger than the input": lambda: (
        image_chain(spec.Conv("conv", padding="VALID", kernel_dilation=4)),
        CONV,
        r"'conv'.* window 9\*9 is larger than its input 8\*8 \(dilation",
    ),
    "pool larger than the input": lambda: (
        image_chain(spec.AvgPool((9, 2))),
        {},
        r"layers\[0\], spec.AvgPool.* window 9\*2 is larger than its input 8\*8",
    ),
    "1-D pool of an image": lambda: (
        image_chain(spec.MaxPool((2,))),
        {},
        r"layers\[0\], spec.MaxPool.* window_shape .* has 1 entries, but there are 2 ",
    ),
    "no layers": lambda: (
        chain(),
        PARAMS,
        r"no declared layer covers 'fc1/kernel', 'fc2/kernel'. Declared: none.*"
        r"unlisted='identity'",
    ),
    "uncovered layer": lambda: (
        chain(spec.Dense("fc1")),
        PARAMS,
        r"no declared layer covers 'fc2/kernel'. Declared: 'fc1'.*unlisted='identity'",
    ),
    "uncovered parameter of a declared layer": lambda: (
        chain(spec.Dense("fc1")),
        {"fc1": {"kernel": array(4, 8), "mask": array(4, 8)}},
        r"no declared layer covers 'fc1/mask'",
    ),
    "leaf that is no array": lambda: (
        FIT,
        PARAMS | {"step": 3},
        r"no declared layer covers 'step'. Declared: 'fc1', 'fc2'",
    ),
    "dense at the top with another input": lambda: (
        chain(spec.Dense("")),
        {"kernel": array(5, 8)},
        r"spec layer layers\[0\], spec.Dense\(''\): its kernel .* 5 input features",
    ),
    "complex parameters": lambda: (
        FIT,
        {"fc1": {"kernel": array(4, 8, dtype=jnp.complex64)}},
        r"'fc1'.* real floating dtype, but it is of complex64",
    ),
    "integer parameters": lambda: (
        FIT,
        {"fc1": {"kernel": array(4, 8, dtype=jnp.int32)}},
        r"'fc1'.* real floating dtype, but it is of int32",
    ),
    "boolean bias": lambda: (
        FIT,
        {"fc1": {"kernel": array(4, 8), "bias": array(8, dtype=jnp.bool_)}},
        r"'fc1/bias' must be .* real floating dtype, but it is of bool",
    ),
    "integer parameter of a block": lambda: (
        chain(block()),
        {"mixer": {"table": array(4, dtype=jnp.int8)}},
        r"'mixer/table' must be .* real floating dtype, but it is of int8",
    ),
    "number for a kernel": lambda: (
        FIT,
        {"fc1": {"kernel": 1.0}},
        r"'fc1/kernel' must be an array.*but it is a float",
    ),
    "text for a kernel": lambda: (
        FIT,
        {"fc1": {"kernel": "glorot"}},
        r"'fc1/kernel' must be an array.*but it is a str",
    ),
    "several arrays for a kernel": lambda: (
        FIT,
        {"fc1": {"kernel": {"a": array(4, 8), "b": array(4, 8)}}},
        r"'fc1'.* one array at 'fc1/kernel', but found 'fc1/kernel/a', 'fc1/kernel/b'",
    ),
    "shape of a bias": lambda: (
        FIT,
        {"fc1": {"kernel": array(4, 8), "bias": array(4)}},
        r"'fc1'.* bias has shape \(4,\), but expected \(8,\)",
    ),
    "bias for every position": lambda: (
        image_chain(spec.Conv("conv")),
        {"conv": {"kernel": array(3, 3, 3, 6), "bias": array(8, 8, 6)}},
        r"'conv'.* bias has shape \(8, 8, 6\), but expected \(6,\)",
    ),
    "features of a batch norm": lambda: (
        chain(spec.Dense("fc1"), spec.BatchNorm("norm")),
        {"fc1": {"kernel": array(4, 8)}, "norm": {"scale": array(6)}},
        r"'norm'.* scale has shape \(6,\), but expected \(8,\)",
    ),
    "kernel that is declared twice": lambda: (
        chain(spec.Dense("fc1"), spec.Dense("fc1/kernel")),
        {"fc1": {"kernel": array(4, 4)}},
        r"'fc1' \(layers\[0\]\): its kernel 'fc1/kernel' is declared by itself as well",
    ),
    "shape of a kernel at its own path": lambda: (
        chain(spec.Dense("w1"), spec.Dense("w2")),
        {"w1": array(4, 8), "w2": array(4, 2)},
        r"'w2' \(layers\[1\]\): its kernel of shape \(4, 2\) takes 4 input features",
    ),
    "batch norm without parameters": lambda: (
        chain(spec.Dense("fc1"), spec.BatchNorm("norm")),
        {"fc1": {"kernel": array(4, 8)}},
        r"'norm' \(layers\[1\]\): no parameter at 'norm/scale'.*spec.BatchNorm\(\)",
    ),
    "path of a dense layer for a batch norm": lambda: (
        chain(spec.Dense("fc1"), spec.BatchNorm("fc2")),
        PARAMS,
        r"'fc2'.* no parameter at 'fc2/scale'.*'fc2/kernel'",
    ),
    "block without parameters": lambda: (
        chain(block()),
        PARAMS,
        r"'mixer' \(layers\[0\]\): no parameter at 'mixer'.*Available: 'fc1/kernel'",
    ),
    "arms of different shape": lambda: (
        chain(spec.Residual([spec.Dense("fc1")])),
        {"fc1": {"kernel": array(4, 8)}},
        r"layers\[0\], spec.Residual.* one shape, but: branch \(8,\), shortcut \(4,\)",
    ),
    "layer inside a residual": lambda: (
        chain(spec.Residual([spec.Dropout(), spec.Dense("fc1")])),
        {"fc1": {"kernel": array(5, 4)}},
        r"'fc1' \(layers\[0\].branch\[1\]\).* takes 5 input features, but .* has 4",
    ),
}


@pytest.mark.parametrize("case", PLACEMENT)
def test_check_spec_says_what_is_wrong(case):
    declared, params, message = PLACEMENT[case]()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as info:
        bmo.check_spec(declared, params)
    assert_is_a_message_of_the_package(info)


@pytest.mark.parametrize(
    "call",
    [
        lambda declared, params: bmo.scale_by_backmatch(declared, normalize=False).init(
            params
        ),
        lambda declared, params: bmo.backmatch_sgd(0.1, declared, normalize=False).init(
            params
        ),
        lambda declared, params: bmo.layer_scales(declared, params, normalize=False),
        lambda declared, params: bmo.describe(declared, params, normalize=False),
    ],
    ids=["init", "alias", "layer_scales", "describe"],
)
@pytest.mark.parametrize(
    "case", ["unknown path", "features of neighbours", "uncovered layer"]
)
def test_every_entry_says_what_check_spec_says(call, case):
    declared, params, message = PLACEMENT[case]()
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as info:
        call(declared, concrete(params))
    assert_is_a_message_of_the_package(info)


# What the transformation is given.


@pytest.mark.parametrize(
    "mask",
    [
        {"fc1": True, "fc2": False},
        {"fc1": {"kernel": True}, "fc2": {"kernel": False}},
    ],
    ids=["module", "array"],
)
def test_a_masked_layer_is_named_with_the_way_out(mask):
    masked = optax.masked(bmo.scale_by_backmatch(FIT, normalize=False), mask)
    with pytest.raises(
        ValueError, match=r"'fc2' .*masked.*scale outside and mask or freeze inside"
    ) as info:
        masked.init(concrete())
    assert_is_a_message_of_the_package(info)


@pytest.mark.parametrize(
    "labels",
    [
        {"fc1": "train", "fc2": "freeze"},
        {"fc1": {"kernel": "train"}, "fc2": {"kernel": "freeze"}},
    ],
    ids=["module", "array"],
)
def test_a_partitioned_layer_is_named_with_the_way_out(labels):
    partition = optax.partition(
        {
            "train": bmo.scale_by_backmatch(FIT, normalize=False),
            "freeze": optax.set_to_zero(),
        },
        labels,
    )
    with pytest.raises(
        ValueError, match=r"'fc2' .*masked.*scale outside and mask or freeze inside"
    ) as info:
        partition.init(concrete())
    assert_is_a_message_of_the_package(info)


def test_an_undeclared_masked_layer_counts_as_uncovered():
    # It might be a frozen head: without it all scales below would silently be others.
    declared = chain(spec.Dense("fc1"))
    masked = optax.masked(
        bmo.scale_by_backmatch(declared, normalize=False), {"fc1": True, "fc2": False}
    )
    with pytest.raises(ValueError, match=r"no declared layer covers 'fc2") as info:
        masked.init(concrete())
    assert_is_a_message_of_the_package(info)


def test_two_networks_in_one_tree_can_have_a_chain_each():
    one = chain(spec.Dense("fc1"))
    other = chain(spec.Dense("fc2"), input_shape=(8,))
    partition = optax.partition(
        {
            "one": bmo.scale_by_backmatch(one, unlisted="identity", normalize=False),
            "other": bmo.scale_by_backmatch(
                other, unlisted="identity", normalize=False
            ),
        },
        {"fc1": "one", "fc2": "other"},
    )
    params = concrete()
    updates, _ = partition.update(params, partition.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_update_without_params_says_that_it_needs_them():
    transformation = bmo.scale_by_backmatch(FIT, normalize=False)
    state = transformation.init(concrete())
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)") as info:
        transformation.update(concrete(), state)
    assert_is_a_message_of_the_package(info)


def test_update_with_params_that_do_not_fit_says_what_is_wrong():
    transformation = bmo.scale_by_backmatch(FIT, normalize=False)
    state = transformation.init(concrete())
    wrong = {"fc1": {"kernel": jnp.ones((4, 8))}, "fc2": {"kernel": jnp.ones((9, 2))}}
    with pytest.raises(ValueError, match=r"'fc2'.* takes 9 input features") as info:
        transformation.update(wrong, state, wrong)
    assert_is_a_message_of_the_package(info)


def test_update_does_not_pass_gradients_on_where_params_are_empty():
    # Updates that come back as they were would train at SGD's rates, and nobody sees.
    transformation = bmo.scale_by_backmatch(FIT, normalize=False)
    state = transformation.init(concrete())
    with pytest.raises(ValueError, match="no parameter at 'fc1/kernel'") as info:
        transformation.update(concrete(), state, {})
    assert_is_a_message_of_the_package(info)


@pytest.mark.parametrize(
    "call",
    [
        lambda value: bmo.check_spec(FIT, PARAMS, unlisted=value),
        lambda value: bmo.layer_scales(
            FIT, concrete(), unlisted=value, normalize=False
        ),
        lambda value: bmo.describe(FIT, concrete(), unlisted=value, normalize=False),
        lambda value: bmo.scale_by_backmatch(FIT, unlisted=value, normalize=False).init(
            concrete()
        ),
    ],
    ids=["check_spec", "layer_scales", "describe", "init"],
)
@pytest.mark.parametrize("value", ["ignore", None, ["error"]], ids=str)
def test_unlisted_has_two_values(call, value):
    expected = re.escape(f"unlisted (={value!r}) must be 'error' or 'identity'")
    with pytest.raises(ValueError, match=expected) as info:
        call(value)
    assert_is_a_message_of_the_package(info)


@pytest.mark.parametrize(
    "call",
    [
        lambda **option: bmo.layer_scales(FIT, concrete(), **option),
        lambda **option: bmo.describe(FIT, concrete(), **option),
        lambda **option: bmo.scale_by_backmatch(FIT, **option).init(concrete()),
        lambda **option: bmo.backmatch_sgd(0.1, FIT, **option).init(concrete()),
    ],
    ids=["layer_scales", "describe", "init", "alias"],
)
@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        *(("gains", v, "'paper' or 'mean_field'") for v in ("exact", None, ["paper"])),
        *(
            ("norm_floor", v, "a finite number of at least 0")
            for v in (-0.1, math.nan, math.inf, "0.1", None)
        ),
    ],
    ids=str,
)
def test_options_have_the_values_they_may_have(call, option, value, wanted):
    expected = re.escape(f"{option} (={value!r}) must be {wanted}")
    with pytest.raises(ValueError, match=expected) as info:
        call(**{option: value})
    assert_is_a_message_of_the_package(info)


@pytest.mark.parametrize(
    "call",
    [
        lambda wrong: bmo.check_spec(wrong, concrete()),
        lambda wrong: bmo.layer_scales(wrong, concrete(), normalize=False),
        lambda wrong: bmo.describe(wrong, concrete(), normalize=False),
        lambda wrong: bmo.scale_by_backmatch(wrong, normalize=False).init(concrete()),
        lambda wrong: bmo.backmatch_sgd(0.1, wrong, normalize=False).init(concrete()),
    ],
    ids=["check_spec", "layer_scales", "describe", "init", "alias"],
)
@pytest.mark.parametrize(
    "wrong",
    [FIT.layers, None, models.init_params(models.Mlp(), models.MLP), nn.Dense(3)],
    ids=["links", "None", "params", "module"],
)
def test_a_spec_is_a_layer_chain(call, wrong):
    with pytest.raises(ValueError, match=r"must be a .*LayerChain") as info:
        call(wrong)
    assert_is_a_message_of_the_package(info)


# What a block's functions return.


@pytest.mark.parametrize(
    "returned",
    [jnp.ones(2), 1, jnp.int32(1), 1j, None, "high", {}],
    ids=["vector", "int", "int32", "complex", "None", "text", "dict"],
)
@pytest.mark.parametrize(
    "name", ["weight_curvature", "input_curvature", "forward_gain"]
)
def test_a_blocks_function_returns_a_real_scalar(name, returned):
    changes: dict[str, Any] = {name: lambda params: returned}
    declared = chain(block(**changes), spec.Dense("fc1"))
    params = {"mixer": {"kernel": jnp.ones(3)}, "fc1": {"kernel": jnp.ones((4, 8))}}
    with pytest.raises(
        ValueError, match=rf"'mixer'.*{name} must return a real scalar"
    ) as info:
        bmo.layer_scales(declared, params, normalize=False)
    assert_is_a_message_of_the_package(info)


@pytest.mark.parametrize("put", [lambda a, b: {0: a, 1: b}, lambda a, b: [a, b, None]])
def test_keys_may_be_numbers_and_leaves_none(put):
    dense, mixer = {"kernel": jnp.full((4, 8), 0.5)}, {5: jnp.ones(3)}
    numbered = chain(spec.Dense("0"), block("1"), spec.Scale(2.0))
    named = chain(spec.Dense("a"), block("b"), spec.Scale(2.0))
    scales = bmo.layer_scales(numbered, put(dense, mixer), normalize=False)
    expected = bmo.layer_scales(named, {"a": dense, "b": mixer}, normalize=False)
    assert [*scales] == ["0", "1"]
    assert [*scales.values()] == [*expected.values()]


def test_a_blocks_function_gets_the_keys_of_the_parameters():
    def curvature(params):
        return jnp.sum(params[0]["w"] ** 2) + jnp.sum(params[1]["w"] ** 2)

    declared = chain(block("mixer/layers", weight_curvature=curvature))
    kernels = [{"w": jnp.full(2, 2.0)}, {"w": jnp.full(3, 1.0)}]
    for params in (
        {"mixer": {"layers": kernels}},
        {"mixer": {"layers": dict(enumerate(kernels))}},
    ):
        scales = bmo.layer_scales(declared, params, normalize=False)
        assert float(scales["mixer/layers"]) == pytest.approx(1 / 11)


def test_a_blocks_function_gets_nested_dicts_where_names_have_slashes():
    declared = chain(block("mixer", weight_curvature=lambda params: params["a"]["w"]))
    params = {"mixer/a": {"w": jnp.float32(4.0)}}
    scales = bmo.layer_scales(declared, params, normalize=False)
    assert float(scales["mixer"]) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    "name", ["weight_curvature", "input_curvature", "forward_gain"]
)
def test_a_blocks_function_returns_no_negative_number(name):
    changes: dict[str, Any] = {name: lambda params: jnp.sum(params["kernel"]) - 7}
    declared = chain(spec.Dense("fc1"), block(**changes), spec.Dense("fc2"))
    params = {f"fc{i}": {"kernel": jnp.ones((4, 4))} for i in (1, 2)}
    params |= {"mixer": {"kernel": jnp.ones(3)}}
    with pytest.raises(
        ValueError, match=rf"'mixer'.*{name} must return a positive .* returned -4.0"
    ) as info:
        bmo.layer_scales(declared, params, normalize=False)
    assert_is_a_message_of_the_package(info)
    # A traced number cannot be looked at: no scale that it enters looks like one.
    scales = jax.jit(lambda p: bmo.layer_scales(declared, p, normalize=False))(params)
    assert any(jnp.isnan(scale) for scale in scales.values())


@pytest.mark.parametrize(
    "build", [bmo.scale_by_backmatch, lambda wrong: bmo.backmatch_sgd(0.1, wrong)]
)
def test_what_is_no_chain_is_refused_where_it_is_passed(build):
    with pytest.raises(ValueError, match="LayerChain, but it is a list") as info:
        build([1, 2])
    assert_is_a_message_of_the_package(info)


def test_an_error_in_a_blocks_function_is_the_users_own():
    def curvature(params):
        return params["kernal"].sum()

    declared = chain(block(weight_curvature=curvature))
    with pytest.raises(KeyError, match="kernal"):
        bmo.layer_scales(declared, {"mixer": {"kernel": jnp.ones(3)}}, normalize=False)


# Scales are numbers: what has no values has none.


@pytest.mark.parametrize("function", [bmo.layer_scales, bmo.describe])
def test_scales_of_shapes_are_refused(function):
    with pytest.raises(ValueError, match=r"'fc1.*(concrete|ShapeDtypeStruct)") as info:
        function(FIT, PARAMS)
    assert_is_a_message_of_the_package(info)


def test_describe_under_jit_says_that_it_needs_numbers():
    with pytest.raises(ValueError, match=r"concrete") as info:
        jax.jit(lambda params: print(bmo.describe(FIT, params, normalize=False)))(
            concrete()
        )
    assert_is_a_message_of_the_package(info)


def test_messages_of_large_models_list_some_paths_and_count_the_rest():
    params: Any = {f"layer{i}": {"kernel": array(4, 4)} for i in range(200)}
    with pytest.raises(ValueError, match=r"'layer0/kernel'.* and 188 more") as info:
        bmo.check_spec(models.MLP, params)
    assert_is_a_message_of_the_package(info)
