"""Elementwise links."""

import jax.numpy as jnp
import pytest
from jacobians import assert_close, curvatures, distinct, measured

import backmatch_optax as bmo
from backmatch_optax import spec


def test_multiplication_by_a_constant():
    found = measured(lambda _, x: -0.3 * x, {}, distinct(1, 3, 4))
    assert_close(curvatures(spec.Scale(-0.3), {}, (3, 4)), found)


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
def test_a_constant_adds_its_square(gains):
    found = measured(lambda _, x: x + 3, {}, distinct(1, 3, 4))
    assert_close(curvatures(spec.Shift(3.0), {}, (3, 4)), found)
    links = [spec.Dense("a"), spec.Shift(3.0), spec.Dense("b")]
    chain = spec.LayerChain(links, input_shape=(3,))
    params = {name: {"kernel": jnp.eye(3)} for name in "ab"}
    scales = bmo.layer_scales(chain, params, gains=gains, normalize=False)
    assert float(scales["a"]) == pytest.approx(1)
    assert float(scales["b"]) == pytest.approx(1 / (1 + 9))


@pytest.mark.parametrize("link", [spec.Activation("relu"), spec.Dropout()])
def test_activation_and_dropout_count_as_the_identity(link):
    # A statement of the papers (BM (31)), not of a Jacobian.
    assert_close(curvatures(link, {}, (3, 4)), {"input": 1.0})


def test_factors_whose_square_no_float_holds():
    links = [spec.Dense("a"), spec.Scale(1e-200), spec.Scale(1e200), spec.Dense("b")]
    chain = spec.LayerChain(links, input_shape=(3,))
    params = {name: {"kernel": jnp.eye(3)} for name in "ab"}
    for scale in bmo.layer_scales(chain, params, normalize=False).values():
        assert float(scale) == pytest.approx(1)


def test_dropout_keeps_the_mean_and_adds_variance():
    links = [spec.Dense("a"), spec.Dropout(0.75), spec.Dense("b")]
    chain = spec.LayerChain(links, input_shape=(3,))
    params = {name: {"kernel": jnp.eye(3)} for name in "ab"}
    paper, mean_field = (
        bmo.layer_scales(spec=chain, params=params, gains=gains, normalize=False)
        for gains in ("paper", "mean_field")
    )
    assert {path: float(scale) for path, scale in paper.items()} == {"a": 1, "b": 1}
    # A quarter of the entries is kept, four times as large.
    for path in "ab":
        assert float(mean_field[path]) == pytest.approx(1 / 4)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, float("nan"), "0.5", None])
def test_the_rate_of_dropout(rate):
    with pytest.raises(ValueError, match=r"rate \(=.*\) must be a number in \[0, 1\)"):
        spec.Dropout(rate)
