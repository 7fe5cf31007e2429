"""Softmax and its logarithm, against Jacobians."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreements import agreement, normal
from jacobians import assert_close, curvatures, measured

import backmatch_optax as bmo
from backmatch_optax import spec

CASES: dict[str, Any] = {
    "softmax": (spec.Softmax(), nn.softmax),
    "log-softmax": (spec.LogSoftmax(), nn.log_softmax),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gains", ["paper", "mean_field"])
@pytest.mark.parametrize("shape", [(2,), (7,), (3, 5)])
def test_where_all_classes_are_equally_likely(name, gains, shape):
    link, function = CASES[name]
    found = measured(lambda _, x: function(x), {}, jnp.full((1, *shape), 0.3))
    assert_close(curvatures(link, {}, shape, gains=gains), found)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_log_softmax_is_off_by_a_factor_of_two_at_most(size):
    logits = size * jax.random.normal(jax.random.key(0), (50, 10))
    found = measured(lambda _, x: nn.log_softmax(x), {}, logits)["input"]
    p = nn.softmax(logits)
    formula = 1 - 2 / 10 + jnp.mean(jnp.sum(p**2, -1))
    np.testing.assert_allclose(found, formula, rtol=1e-4)
    declared = curvatures(spec.LogSoftmax(), {}, (10,))["input"]
    assert 1 / 2 < declared / found < 1


def test_the_curvature_of_softmax_in_closed_form():
    logits = jax.random.normal(jax.random.key(0), (50, 10))
    found = measured(lambda _, x: nn.softmax(x), {}, logits)["input"]
    p = nn.softmax(logits)
    squares = jnp.sum(p**2, -1)
    formula = jnp.mean(squares - 2 * jnp.sum(p**3, -1) + squares**2) / 10
    np.testing.assert_allclose(found, formula, rtol=1e-4)


class Classifier(nn.Module):
    """Small logits, and probabilities or their logarithms; or layers above those."""

    function: Any
    above: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="a", use_bias=False)(x)
        x = self.function(nn.Dense(8, name="b", use_bias=False)(x) / 10)
        return nn.Dense(4, name="c", use_bias=False)(x) if self.above else x


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("above", [False, True])
def test_scales_around_it(name, above):
    link, function = CASES[name]
    links: list[spec.Link] = [spec.Dense("a"), spec.Dense("b"), spec.Scale(0.1), link]
    links += [spec.Dense("c")] * above
    for gains in ("paper", "mean_field"):
        model = Classifier(function, above)
        found = agreement(model, links, normal(12), gains=gains)
        assert found == pytest.approx(dict.fromkeys(found, 1), rel=0.15)


@pytest.mark.parametrize("name", CASES)
def test_a_single_class_has_no_gradient(name):
    chain = spec.LayerChain([spec.Dense("a"), CASES[name][0]], input_shape=(3,))
    params = {"a": {"kernel": jnp.ones((3, 1))}}
    with pytest.raises(ValueError, match=r"at least 2 features.* shape \(1,\)"):
        bmo.check_spec(chain, params)


def test_describe_says_what_softmax_takes_for_granted():
    params = {"a": {"kernel": jnp.ones((3, 4))}}
    for link, said in ((spec.Softmax(), True), (spec.LogSoftmax(), False)):
        chain = spec.LayerChain([spec.Dense("a"), link], input_shape=(3,))
        assert ("nearly uniform" in bmo.describe(chain, params)) == said
