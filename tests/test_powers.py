"""Programs whose size grows with the depth of a chain, and not with its square."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import backmatch_optax as bmo
from backmatch_optax import spec

WIDTH = 4


def plain(i: int) -> list[spec.Link]:
    return [spec.Dense(f"d{i}"), spec.Activation("relu")]


def normalised(i: int) -> list[spec.Link]:
    return [spec.Dense(f"d{i}"), spec.BatchNorm(f"n{i}"), spec.Activation("relu")]


def residual(i: int) -> list[spec.Link]:
    branch = [*normalised(i), spec.Dense(f"e{i}"), spec.BatchNorm()]
    return [spec.Residual(branch), spec.Activation("relu")]


def nested(i: int) -> list[spec.Link]:
    inner = spec.Residual([spec.Dense(f"f{i}"), spec.Activation("tanh")])
    return [spec.Residual([spec.Dense(f"d{i}"), inner, spec.Dense(f"e{i}")])]


def attention(i: int) -> list[spec.Link]:
    dense = [spec.Dense(f"d{i}"), spec.Activation("gelu"), spec.Dense(f"e{i}")]
    return [
        spec.Residual([spec.LayerNorm(f"k{i}"), spec.Attention(f"a{i}", causal=True)]),
        spec.Residual([spec.LayerNorm(f"l{i}"), *dense]),
    ]


def parameters(chain: spec.LayerChain) -> dict:
    vectors = {"scale": jnp.ones(WIDTH), "bias": jnp.ones(WIDTH)}
    params: dict = {}
    for path in chain.paths:
        block, _, name = path.rpartition("/")
        if block:
            params.setdefault(block, {})[name] = {"kernel": jnp.eye(WIDTH)}
        else:
            params[name] = {"kernel": jnp.eye(WIDTH)} if name[0] in "def" else vectors
    return params


def program(kind, depth: int, gains) -> str:
    links = [link for i in range(depth) for link in kind(i)]
    chain = spec.LayerChain(links, input_shape=(8, WIDTH))
    scales = jax.jit(lambda p: bmo.layer_scales(chain, p, gains=gains))
    return scales.lower(parameters(chain)).as_text()


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
@pytest.mark.parametrize("kind", [plain, normalised, residual, nested, attention])
def test_programs_grow_with_the_depth_and_not_with_its_square(kind, gains):
    few, more, most = (program(kind, n, gains).count("\n") for n in (12, 24, 48))
    assert most - more < 2.2 * (more - few)


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
@pytest.mark.parametrize("kind", [residual, nested, attention])
def test_sums_and_integrals_are_in_a_program_once(kind, gains):
    """What a layer adds is its norms and its scales, whatever the rules compute."""
    few, more = (program(kind, n, gains) for n in (24, 48))
    for operation in ("while", "log_plus_one", "exponential", "dot_general"):
        found = f"stablehlo.{operation}"
        assert few.count(found) == more.count(found)
    assert more.count("stablehlo.while") == 1
