"""A wrong argument of a link or a chain is refused where it is written."""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from messages import assert_is_a_message_of_the_package

from backmatch_optax import spec

FIT = [spec.Dense("fc1"), spec.Dense("fc2")]


def chain(*links: Any, input_shape: Any = (4,)) -> spec.LayerChain:
    return spec.LayerChain(links, input_shape=input_shape)


def image_chain(*links: Any) -> spec.LayerChain:
    return spec.LayerChain(links, input_shape=(8, 8, 3))


def block(path: str = "mixer", **changes: Any) -> spec.Block:
    arguments: dict[str, Any] = {"weight_curvature": 1.0, "input_curvature": 1.0}
    arguments |= changes
    return spec.Block(path, **arguments)


# What can be seen when a link or a chain is built.

CONSTRUCTION: dict[str, tuple[Callable[[], Any], str]] = {
    "negative strides": (
        lambda: spec.Conv("conv", strides=-1),
        r"Conv\('conv'.*strides \(=-1\) must be a positive int",
    ),
    "zero strides": (
        lambda: spec.Conv("conv", strides=(1, 0)),
        r"Conv\('conv'.*strides \(=\(1, 0\)\) must be a positive int",
    ),
    "float strides": (
        lambda: spec.Conv("conv", strides=2.0),  # pyright: ignore
        r"Conv\('conv'.*strides \(=2.0\) must be a positive int",
    ),
    "slope that is no number": (
        lambda: spec.Activation("leaky_relu", negative_slope=math.nan),
        r"Activation\('leaky_relu'.*negative_slope \(=nan\) must be a finite number",
    ),
    "slope of another function": (
        lambda: spec.Activation("relu", negative_slope=0.2),
        r"negative_slope \(=0.2\) is that of a leaky_relu, but name is 'relu'",
    ),
    "zero factor": (
        lambda: spec.Scale(0.0),
        r"Scale\(0.0\).*factor.* must be a finite number other than zero",
    ),
    "too large a factor": (
        lambda: spec.Scale(10**400),
        r"Scale\(1000.*factor \(=1000.*\) must be a finite number other than zero",
    ),
    "factor as text": (
        lambda: spec.Scale("half"),  # pyright: ignore
        r"'half'.*factor.* must be a finite number other than zero|"
        r"factor.*'half'.* must be a finite number other than zero",
    ),
    "strides of a transposed convolution": (
        lambda: spec.ConvTranspose("up", strides=(2, 0)),
        r"ConvTranspose\('up'.*strides \(=\(2, 0\)\) must be a positive int",
    ),
    "strides as text": (
        lambda: spec.Conv("conv", strides="2"),  # pyright: ignore
        r"strides \(='2'\) must be a positive int",
    ),
    "zero strides of a pool": (
        lambda: spec.MaxPool((2, 2), strides=0),
        r"MaxPool\(\(2, 2\).*strides \(=0\) must be a positive int",
    ),
    "zero dilation": (
        lambda: spec.Conv("conv", kernel_dilation=0),
        r"kernel_dilation \(=0\) must be a positive int",
    ),
    "zero groups of a norm": (
        lambda: spec.GroupNorm(num_groups=0),
        r"num_groups \(=0\) must be an int of at least 1",
    ),
    "negative epsilon": (
        lambda: spec.BatchNorm(epsilon=-1e-5),
        r"BatchNorm\(epsilon=-1e-05\): epsilon \(=-1e-05\) must be a finite number",
    ),
    "infinite epsilon": (
        lambda: spec.LayerNorm("norm", epsilon=math.inf),
        r"LayerNorm\('norm', epsilon=inf\).* must be a finite number of at least 0",
    ),
    "epsilon that is not a number": (
        lambda: spec.GroupNorm(epsilon=math.nan),
        r"epsilon \(=nan\) must be a finite number of at least 0",
    ),
    "epsilon as text": (
        lambda: spec.RMSNorm(epsilon="1e-6"),  # pyright: ignore
        r"epsilon \(='1e-6'\) must be a finite number of at least 0",
    ),
    "epsilon as truth value": (
        lambda: spec.RMSNorm(epsilon=True),
        r"epsilon \(=True\) must be a finite number of at least 0",
    ),
    "shift by nothing": (
        lambda: spec.Shift(0),
        r"Shift\(0\).*value \(=0\) must be a finite number above zero",
    ),
    "factor as truth value": (lambda: spec.Scale(True), r"factor \(=True\) must be a"),
    "zero groups": (
        lambda: spec.Conv("conv", feature_group_count=0),
        r"feature_group_count \(=0\) must be an int of at least 1",
    ),
    "groups for each dimension": (
        lambda: spec.Conv("conv", feature_group_count=(2, 3)),  # pyright: ignore
        r"feature_group_count \(=\(2, 3\)\) must be an int of at least 1",
    ),
    "unknown padding": (
        lambda: spec.Conv("conv", padding="SMAE"),
        r"padding \(='SMAE'\) must be one of 'VALID', 'SAME'",
    ),
    "a padding that pools do not have": (
        lambda: spec.AvgPool((2, 2), padding="CIRCULAR"),
        r"AvgPool.*padding \(='CIRCULAR'\) must be one of 'VALID', 'SAME'",
    ),
    "negative padding": (
        lambda: spec.Conv("conv", padding=[(0, -1), (0, 0)]),
        r"padding \(=\[\(0, -1\), \(0, 0\)\]\) must be .* none negative",
    ),
    "float padding": (
        lambda: spec.Conv("conv", padding=1.5),  # pyright: ignore
        r"padding \(=1.5\) must be .* an int",
    ),
    "padding of three": (
        lambda: spec.Conv("conv", padding=[(1, 1, 1)]),
        r"padding \(=\[\(1, 1, 1\)\]\) must be .* \(low, high\) pair",
    ),
    "window without dimensions": (
        lambda: spec.MaxPool(2),  # pyright: ignore
        r"window_shape \(=2\) must be a sequence of positive ints.*\(2, 2\)",
    ),
    "zero window": (
        lambda: spec.MaxPool((2, 0)),
        r"window_shape \(=\(2, 0\)\) must be a .*sequence of positive ints",
    ),
    "path that is no text": (
        lambda: spec.Dense(b"fc1"),  # pyright: ignore
        r"path \(=b'fc1'\) must be a string of names .*such as 'Dense_0'",
    ),
    "path that is None": (
        lambda: spec.Dense(None),  # pyright: ignore
        r"path \(=None\) must be a string of names .*such as 'Dense_0'",
    ),
    "path that ends in a slash": (
        lambda: spec.Dense("fc1/"),
        r"path \(='fc1/'\) must be a string of names joined by single slashes",
    ),
    "path of batch norm with two slashes": (
        lambda: spec.BatchNorm("a//b"),
        r"path \(='a//b'\) must be a string of names joined by single slashes",
    ),
    "unknown activation": (
        lambda: spec.Activation("rellu"),
        r"name \(='rellu'\) is not known.*'relu'.*Known: 'celu', .*'tanh'",
    ),
    "activation as a function": (
        lambda: spec.Activation(jnp.tanh),  # pyright: ignore
        r"name .*tanh.* is not known.*Known: 'celu', .*'tanh'",
    ),
    "block with zero curvature": (
        lambda: block(weight_curvature=0),
        r"Block\('mixer'.*weight_curvature \(=0\) must be a positive, finite number",
    ),
    "block with negative curvature": (
        lambda: block(input_curvature=-2.0),
        r"input_curvature \(=-2.0\) must be a positive, finite number",
    ),
    "block with infinite gain": (
        lambda: block(forward_gain=float("inf")),
        r"forward_gain \(=inf\) must be a positive, finite number",
    ),
    "block with NaN for a curvature": (
        lambda: block(weight_curvature=float("nan")),
        r"weight_curvature \(=nan\) must be a positive, finite number",
    ),
    "block with too large a curvature": (
        lambda: block(weight_curvature=10**400),
        r"weight_curvature \(=10+\.\.\.0+\) must be a positive, finite number",
    ),
    "block with text for a curvature": (
        lambda: block(weight_curvature="high"),
        r"weight_curvature \(='high'\) must be a positive, finite number or a function",
    ),
    "block with digits for a curvature": (
        lambda: block(weight_curvature="2"),
        r"weight_curvature \(='2'\) must be a positive, finite number or a function",
    ),
    "block with a vector for a curvature": (
        lambda: block(input_curvature=np.ones(2)),
        r"input_curvature \(=array.*\) must be a positive, finite number or a function",
    ),
    "block with an empty output": (
        lambda: block(output_shape=(0,)),
        r"output_shape \(=\(0,\)\) must be a sequence of positive ints",
    ),
    "chain with text for a link": (
        lambda: chain(spec.Dense("fc1"), "relu"),
        r"layers\[1\] must be a link such as spec.Dense.*'relu', a str",
    ),
    "chain with a Flax module": (
        lambda: chain(nn.Dense(3)),
        r"layers\[0\] must be a link such as spec.Dense.*flax",
    ),
    "chain with a class for a link": (
        lambda: chain(spec.Flatten),
        r"layers\[0\] must be a link such as spec.Dense.*class.*Flatten",
    ),
    "chain within a chain": (
        lambda: chain(chain(*FIT)),
        r"layers\[0\] must be a link such as spec.Dense.*LayerChain",
    ),
    "chain of None": (
        lambda: spec.LayerChain(None, input_shape=(4,)),  # pyright: ignore
        r"layers must be a sequence of links, but it is None",
    ),
    "chain of one bare link": (
        lambda: spec.LayerChain(spec.Dense("fc1"), input_shape=(4,)),  # pyright: ignore
        r"layers must be a sequence of links, but it is spec.Dense\('fc1'\)",
    ),
    "residual with a Flax module": (
        lambda: spec.Residual([spec.Dense("fc1"), nn.Dense(3)]),  # pyright: ignore
        r"branch\[1\] must be a link such as spec.Dense",
    ),
    "residual with None for a shortcut": (
        lambda: spec.Residual([spec.Dense("fc1")], None),  # pyright: ignore
        r"shortcut must be a sequence of links, but it is None",
    ),
    "input shape as one number": (
        lambda: chain(input_shape=5),
        r"input_shape \(=5\) must be a sequence of positive ints without the batch",
    ),
    "input shape with zero": (
        lambda: chain(input_shape=(0, 3)),
        r"input_shape \(=\(0, 3\)\) must be a sequence of positive ints",
    ),
    "input shape with an open batch": (
        lambda: chain(input_shape=(None, 3)),
        r"input_shape \(=\(None, 3\)\) must be .* without the batch dimension",
    ),
    "negative input shape": (
        lambda: chain(input_shape=(-1, 3)),
        r"input_shape \(=\(-1, 3\)\) must be a sequence of positive ints",
    ),
    "input shape of floats": (
        lambda: chain(input_shape=(8.0, 3)),
        r"input_shape \(=\(8.0, 3\)\) must be a sequence of positive ints",
    ),
    "empty input shape": (
        lambda: chain(input_shape=[]),
        r"input_shape \(=\[\]\) must be a sequence of positive ints",
    ),
    "path declared twice": (
        lambda: chain(spec.Dense("fc1"), spec.Flatten(), spec.Conv("fc1")),
        r"two layers declare the path 'fc1': spec.Dense\('fc1'\) and spec.Conv",
    ),
    "path declared twice by the same link": (
        lambda: chain(FIT[0], FIT[0]),
        r"two layers declare the path 'fc1'",
    ),
    "path declared again in a residual": (
        lambda: chain(spec.Dense("fc1"), spec.Residual([spec.Dense("fc1")])),
        r"two layers declare the path 'fc1'",
    ),
    "path inside a block": (
        lambda: chain(block("mixer"), spec.Dense("mixer/fc1")),
        r"Dense\('mixer/fc1'\) lies inside spec.Block\('mixer'.*owns every",
    ),
    "path inside a block of the whole tree": (
        lambda: chain(block(""), spec.Dense("fc1")),
        r"Dense\('fc1'\) lies inside spec.Block\(''.*owns every",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction_says_what_is_wrong(case):
    build, message = CONSTRUCTION[case]
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as info:
        build()
    assert_is_a_message_of_the_package(info)
