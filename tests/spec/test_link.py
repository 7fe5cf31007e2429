"""The declared chain as a value: built, compared, printed, and laid out like Flax."""

import dataclasses
import functools
import pickle
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.moments import Moments  # the types that rules are about
from backmatch_optax.powers import Positive
from backmatch_optax.spec.link import Site


def squared_norm(params: Mapping[str, Any]) -> jax.Array:
    return jnp.sum(params["kernel"] ** 2)


BLOCK = spec.Block(
    "mixer",
    weight_curvature=2,
    input_curvature=squared_norm,
    forward_gain=1.5,
    output_shape=[4, 4, 3],
)

# One of every link at least, with the arguments that are not defaults.
LINKS = [
    spec.Dense("Dense_0"),
    spec.Dense(""),
    spec.Conv("Conv_0"),
    spec.Conv(
        "Block_0/Conv_1",
        strides=(1, 2),
        padding=[(1, 2), (0, 1)],
        kernel_dilation=(2, 1),
        feature_group_count=2,
    ),
    spec.ConvTranspose("ConvTranspose_0"),
    spec.ConvTranspose("up", strides=(1, 2), padding="VALID", kernel_dilation=2),
    spec.BatchNorm(),
    spec.BatchNorm("BatchNorm_0"),
    spec.LayerNorm("LayerNorm_0"),
    spec.GroupNorm("GroupNorm_0"),
    spec.GroupNorm(num_groups=4),
    spec.RMSNorm("RMSNorm_0", epsilon=0.0),
    spec.Scale(0.5),
    spec.Activation("relu"),
    spec.MaxPool((2, 2)),
    spec.MaxPool((3, 2), strides=(2, 1), padding="SAME"),
    spec.AvgPool((2, 2)),
    spec.AvgPool((2,), strides=2, padding=((0, 1),)),
    spec.GlobalAvgPool(),
    spec.Flatten(),
    spec.Dropout(),
    spec.Block("plain", weight_curvature=1.0, input_curvature=0.5),
    BLOCK,
    spec.Residual([spec.Dense("a"), spec.BatchNorm()]),
    spec.Residual(
        [spec.Conv("b"), spec.Residual([BLOCK], [spec.Dropout()])],
        [spec.Conv("c", strides=2)],
    ),
]
EVERYTHING = spec.LayerChain(
    [
        spec.Conv("stem", strides=(1, 2), padding=[(1, 2), (0, 1)]),
        spec.BatchNorm("norm"),
        spec.Activation("relu"),
        spec.MaxPool((2, 2), strides=2, padding="SAME"),
        spec.AvgPool((2, 2)),
        spec.Residual([spec.Conv("b"), spec.Residual([BLOCK])], [spec.Conv("c")]),
        spec.Dropout(),
        spec.Flatten(),
        spec.Dense("head"),
    ],
    input_shape=[16, 16, 3],
)
VALUES = [*LINKS, EVERYTHING]
names_of = [repr(link) for link in LINKS] + ["everything"]


@pytest.mark.parametrize("value", VALUES, ids=names_of)
class TestValue:
    def test_repr_is_code_that_rebuilds_it(self, value):
        assert eval(repr(value)) == value

    def test_equal_values_have_equal_hashes(self, value):
        again = eval(repr(value))
        assert again is not value
        assert hash(again) == hash(value)

    def test_differs_from_all_others(self, value):
        assert sum(value == other for other in VALUES) == 1

    def test_is_frozen(self, value):
        for field in [*dataclasses.fields(value), None]:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name if field else "anything", None)

    def test_is_not_callable(self, value):
        # Optax calls what is callable among the arguments that it injects.
        assert not callable(value)

    def test_is_one_leaf_and_no_node_of_a_tree(self, value):
        assert jax.tree.leaves(value) == [value]

    def test_survives_pickling(self, value):
        assert pickle.loads(pickle.dumps(value)) == value


def test_repr_of_a_chain_without_layers_rebuilds_it():
    chain = spec.LayerChain([], input_shape=(3,))
    assert eval(repr(chain)) == chain


def test_a_block_with_a_function_that_has_no_name_can_be_printed():
    unnamed = functools.partial(squared_norm)
    link = spec.Block("mixer", weight_curvature=unnamed, input_curvature=1.0)
    assert "squared_norm" in repr(link)


@pytest.mark.parametrize(
    ("link", "text"),
    [
        (
            spec.Conv("c", strides=[2, 2], padding="same"),
            "spec.Conv('c', strides=(2, 2))",
        ),
        (spec.MaxPool([2, 2], strides=2), "spec.MaxPool((2, 2), strides=2)"),
        (spec.BatchNorm("n"), "spec.BatchNorm('n')"),
        (spec.BatchNorm(epsilon=np.float64(0.5)), "spec.BatchNorm(epsilon=0.5)"),
        (spec.Scale(np.float64(0.5)), "spec.Scale(0.5)"),
        (spec.Dropout(np.float64(0.5)), "spec.Dropout(0.5)"),
        (
            spec.Residual([spec.Dense("d")]),
            "spec.Residual((spec.Dense('d'),))",
        ),
    ],
    ids=["conv", "pool", "norm", "epsilon", "scale", "dropout", "residual"],
)
def test_repr_leaves_defaults_out(link, text):
    assert repr(link) == text


def test_a_spec_is_a_static_argument_of_jit_and_traces_once():
    traces = []

    @jax.jit(static_argnums=0)
    def scales(chain, params):
        traces.append(chain)
        return bmo.layer_scales(chain, params, normalize=False)

    params = models.init_params(models.Mlp(), models.MLP)
    for _ in range(2):
        chain = spec.LayerChain(models.MLP.layers, input_shape=models.MLP.input_shape)
        scales(chain, params)
    assert len(traces) == 1


# Two spellings.


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (spec.Conv("c", strides=[1, 2]), spec.Conv("c", strides=(1, 2))),
        (
            spec.Conv("c", strides=cast(Any, np.array([1, 2]))),
            spec.Conv("c", strides=(1, 2)),
        ),
        (spec.Conv("c", strides=cast(int, np.int64(2))), spec.Conv("c", strides=2)),
        (spec.Conv("c", padding="same"), spec.Conv("c", padding="SAME")),
        (spec.Conv("c", padding=[1, [1, 2]]), spec.Conv("c", padding=(1, (1, 2)))),
        (spec.AvgPool((2, 2), padding="valid"), spec.AvgPool((2, 2))),
        (
            spec.Block("b", weight_curvature=1, input_curvature=float(np.float32(2))),
            spec.Block("b", weight_curvature=1.0, input_curvature=2.0),
        ),
        (
            spec.Residual([spec.Dense("a")], []),
            spec.Residual((spec.Dense("a"),), ()),
        ),
        (
            spec.LayerChain([spec.Flatten()], input_shape=[2, 3]),
            spec.LayerChain((spec.Flatten(),), input_shape=(2, 3)),
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, spec.Link) else None,
)
def test_lists_and_numbers_of_numpy_are_hashable_as_tuples_and_ints_are(
    written, canonical
):
    assert written == canonical
    assert hash(written) == hash(canonical)
    assert repr(written) == repr(canonical)


@pytest.mark.parametrize(
    ("written", "other"),
    [
        (spec.Conv("c", strides=(2, 2)), spec.Conv("c", strides=2)),
        (spec.Conv("c", padding=1), spec.Conv("c", padding=((1, 1), (1, 1)))),
        (spec.MaxPool((2, 2)), spec.MaxPool((2, 2), strides=1)),
    ],
)
def test_links_are_compared_as_they_are_written(written, other):
    # How many dimensions an int stands for is not known before the input is.
    assert written != other
    assert repr(written) != repr(other)


def test_block_has_the_output_shape_that_it_declares():
    shapes = {"kernel": (3, 3)}
    assert BLOCK.shape_after((9, 9, 2), shapes) == (4, 4, 3)
    same = spec.Block("b", weight_curvature=1.0, input_curvature=1.0)
    assert same.shape_after((9, 9, 2), shapes) == (9, 9, 2)


# A kind of link that the package does not have is one class.


@dataclasses.dataclass(frozen=True, repr=False)
class PerFeatureScale(spec.Link):
    """Multiplies every feature by a learned weight, after doubling the signal."""

    path: str
    doublings: int = dataclasses.field(default=1, kw_only=True)

    roles = ("weight",)
    required_roles = ("weight",)

    def shape_after(
        self, input_shape: tuple[int, ...], param_shapes: Mapping[str, Any]
    ) -> tuple[int, ...]:
        if param_shapes["weight"] != input_shape[-1:]:
            raise ValueError(f"its weight has shape {param_shapes['weight']}")
        return input_shape

    def moments_after(self, here: Site) -> Moments:
        return here.moments * (4**self.doublings * here.squared_row_norm("weight"))

    def m_W(self, here: Site, role: str) -> Positive:
        return here.q * 4**self.doublings * here.positions_out

    def m_z(self, here: Site) -> Positive:
        return 4**self.doublings * here.squared_row_norm("weight")


class TestNewLink:
    chain = spec.LayerChain(
        [spec.Dense("a"), PerFeatureScale("b", doublings=2), spec.Dense("c")],
        input_shape=(5, 4),
    )

    def params(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return {
            "a": {"kernel": jnp.asarray(rng.normal(size=(4, 3)))},
            "b": {"weight": jnp.asarray(rng.normal(size=3))},
            "c": {"kernel": jnp.asarray(rng.normal(size=(3, 2)))},
        }

    def test_its_rules_enter_the_scales_of_all(self):
        params = self.params()
        a, c = (float(jnp.sum(params[name]["kernel"] ** 2)) for name in "ac")
        b = float(jnp.mean(params["b"]["weight"] ** 2))
        scales = bmo.layer_scales(self.chain, params, normalize=False)
        np.testing.assert_allclose(scales["a"], 1 / (5 * 16 * b * c / 3), rtol=1e-5)
        np.testing.assert_allclose(scales["b"], 1 / (5 * 16 * a / 3 * c / 3), rtol=1e-5)
        np.testing.assert_allclose(scales["c"], 1 / (5 * 16 * a / 3 * b), rtol=1e-5)

    def test_it_can_be_scaled_and_described(self):
        params = self.params()
        transformation = bmo.scale_by_backmatch(self.chain, normalize=False)
        updates: Any = transformation.update(
            params, transformation.init(params), params
        )[0]
        scale = bmo.layer_scales(self.chain, params, normalize=False)["b"]
        np.testing.assert_allclose(
            updates["b"]["weight"], scale * params["b"]["weight"], rtol=1e-6
        )
        assert "PerFeatureScale  b" in bmo.describe(self.chain, params, normalize=False)

    def test_its_errors_name_it(self):
        params = self.params() | {"b": {"weight": jnp.ones(7)}}
        with pytest.raises(ValueError, match=r"'b' \(layers\[1\]\): its weight has"):
            bmo.check_spec(self.chain, params)

    def test_its_repr_is_code_that_rebuilds_it_where_it_is_defined(self):
        link = PerFeatureScale("b", doublings=2)
        assert eval(repr(link)) == link

    def test_it_is_compared_by_value(self):
        assert PerFeatureScale("b") == PerFeatureScale("b")
        assert PerFeatureScale("b") != PerFeatureScale("b", doublings=2)


def test_a_link_without_rules_of_its_own_changes_nothing():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Noise(spec.Link):
        pass

    params = models.init_params(models.Mlp(), models.MLP)
    noisy = spec.LayerChain(
        [link for layer in models.MLP.layers for link in (Noise(), layer)],
        input_shape=models.MLP.input_shape,
    )
    with_noise, without = (
        bmo.layer_scales(chain, params, normalize=False)
        for chain in (noisy, models.MLP)
    )
    assert with_noise == without


# What Optax asks of a hyperparameter.


def test_a_spec_is_no_hyperparameter_to_inject():
    params = models.init_params(models.Mlp(), models.MLP)
    optimizer = optax.inject_hyperparams(bmo.backmatch_sgd)(0.1, models.MLP)
    state: Any = optimizer.init(params)
    numbers = {"learning_rate", "limit", "momentum", "norm_floor", "weight_decay"}
    assert set(state.hyperparams) == numbers
