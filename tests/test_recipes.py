"""What `docs/recipes.md` claims of each recipe."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal
from flax import nnx
from flax.training.train_state import TrainState

import backmatch_optax as bmo

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (32, 8))
Y = jax.random.normal(jax.random.key(2), (32, 4))
PARAMS = models.init_params(models.Mlp(), models.MLP)


def outputs(params: Any) -> Any:
    return models.Mlp().apply({"params": params}, X)


def loss_fn(params: Any) -> jax.Array:
    return jnp.mean((outputs(params) - Y) ** 2)


def trained(tx: optax.GradientTransformation, steps: int = 5, **extra: Any) -> Any:
    """Parameters and state after some steps."""
    update = optax.with_extra_args_support(tx).update

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = update(jax.grad(loss_fn)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# --- Frozen layers -------------------------------------------------------------------

SCALE = bmo.scale_by_backmatch(models.MLP)
SGD = optax.sgd(0.1, momentum=0.9)
LABELS = {"fc1": "frozen", "fc2": "trained", "fc3": "trained"}
MASK = {layer: label == "frozen" for layer, label in LABELS.items()}
FREEZING = {
    "partition": optax.chain(
        optax.add_decayed_weights(5e-4),
        SCALE,
        optax.partition({"trained": SGD, "frozen": optax.set_to_zero()}, LABELS),
    ),
    "masked": optax.chain(
        optax.add_decayed_weights(5e-4),
        SCALE,
        SGD,
        optax.masked(optax.set_to_zero(), MASK),
    ),
}


@pytest.mark.parametrize("tx", FREEZING.values(), ids=FREEZING)
def test_frozen_layers_do_not_move_and_the_others_do(tx):
    params, state = trained(tx)
    assert_trees_all_equal(params["fc1"], PARAMS["fc1"])
    for layer in ("fc2", "fc3"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, PARAMS)[layer]
        assert all(moved.values())
    assert loss_fn(params) < 0.9 * loss_fn(PARAMS)
    # The scales are those of the whole network.
    assert set(optax.tree.get(state, "layer_scales")) == set(PARAMS)


def test_a_frozen_layer_of_a_partition_has_no_momentum():
    _, state = trained(FREEZING["partition"])
    trace: Any = optax.tree.get(state, "trace")
    assert jax.tree.leaves(trace["fc2"])
    assert not jax.tree.leaves(trace["fc1"])


def test_masking_the_optimizer_lets_frozen_layers_climb():
    mask = jax.tree.map(lambda frozen: not frozen, MASK)
    params, _ = trained(optax.chain(SCALE, optax.masked(optax.sgd(0.1), mask)), steps=1)
    climbed = loss_fn(PARAMS | {"fc1": params["fc1"]})
    assert climbed > loss_fn(PARAMS)


# --- Adam, Lion and Muon -------------------------------------------------------------

ADAPTIVE = {
    "adam": optax.adam(1e-3, eps=1e-30),
    "lion": optax.lion(1e-3),
    "muon": optax.contrib.muon(1e-2, eps=1e-30, adam_eps_root=0.0),
}


def one_update(tx: optax.GradientTransformation) -> Any:
    gradient = jax.grad(loss_fn)(PARAMS)
    return tx.update(gradient, tx.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("inner", ADAPTIVE.values(), ids=ADAPTIVE)
def test_a_scale_before_adam_lion_or_muon_does_nothing(inner):
    scaled = one_update(optax.chain(SCALE, inner))
    assert_trees_all_close(scaled, one_update(inner), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("inner", ADAPTIVE.values(), ids=ADAPTIVE)
def test_a_scale_after_adam_lion_or_muon_acts(inner):
    scaled = one_update(optax.chain(inner, SCALE))
    plain = one_update(inner)
    scales = bmo.layer_scales(models.MLP, PARAMS)
    for layer, scale in scales.items():
        expected = scale * plain[layer]["kernel"]
        np.testing.assert_allclose(scaled[layer]["kernel"], expected, rtol=1e-5)
    # Far from one another, so that this is not a scale that does nothing.
    assert max(scales.values()) / min(scales.values()) > 1.5


# --- Scales of the first step, kept --------------------------------------------------


@pytest.mark.parametrize(
    "scale",
    [
        bmo.scale_by_backmatch(models.MLP, refresh=False),
        bmo.scale_by_measured_backmatch(key=KEY, refresh_every=None),
    ],
    ids=["declared", "measured"],
)
def test_kept_scales_train_as_constant_ones(scale):
    state: Any
    params, state = trained(optax.chain(scale, SGD), outputs_fn=outputs)
    scales: Any = optax.tree.get(state, "layer_scales")
    first: Any = trained(scale, steps=1, outputs_fn=outputs)[1].layer_scales
    assert_trees_all_close(scales, first, rtol=1e-6)
    ones = optax.tree.ones_like(PARAMS)
    constant, _ = scale.update(ones, state[0], PARAMS, outputs_fn=outputs)
    multiplied = optax.stateless(lambda g, _: jax.tree.map(jnp.multiply, g, constant))
    expected, _ = trained(optax.chain(multiplied, SGD))
    assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)


# --- Gradient accumulation -----------------------------------------------------------


def test_accumulated_gradients_are_scaled_once_by_the_scale_of_their_step():
    tx = bmo.backmatch_sgd(0.1, models.MLP)
    multi = optax.MultiSteps(tx, every_k_schedule=4)
    # Four equal gradients are one step.
    accumulated, state = trained(multi.gradient_transformation(), steps=8)
    params, plain = trained(tx, steps=2)
    assert_trees_all_close(accumulated, params, rtol=1e-4, atol=1e-6)
    scales, expected = (optax.tree.get(s, "layer_scales") for s in (state, plain))
    assert_trees_all_close(scales, expected, rtol=1e-4)


def test_accumulation_with_measured_scales():
    def measured(**options: Any) -> optax.GradientTransformationExtraArgs:
        scale = bmo.scale_by_measured_backmatch(key=KEY, **options)
        return optax.chain(scale, optax.sgd(0.1))

    expected, _ = trained(measured(), steps=2, outputs_fn=outputs)
    multi = optax.MultiSteps(measured(), every_k_schedule=4)
    params, state = PARAMS, multi.init(PARAMS)
    for _ in range(8):
        gradient = jax.grad(loss_fn)(params)
        updates, state = multi.update(gradient, state, params, outputs_fn=outputs)
        params = optax.apply_updates(params, updates)
    assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)
    assert optax.tree.get(state, "steps") == 2
    # `gradient_transformation()` takes no extra arguments.
    multi = optax.MultiSteps(measured(outputs_fn=outputs), every_k_schedule=4)
    params, _ = trained(multi.gradient_transformation(), steps=8)
    assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)


# --- Mixed precision -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scales_of_half_precision_are_those_of_single(dtype):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    updates, state = SCALE.update(half, SCALE.init(half), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    scales: Any = optax.tree.get(state, "layer_scales")
    expected = bmo.layer_scales(models.MLP, PARAMS)
    assert_trees_all_close(scales, expected, rtol=2e-3)
    assert all(scale.dtype == jnp.float32 for scale in scales.values())


def test_a_loss_scale_may_be_divided_out_before_or_after():
    before = one_update(optax.chain(optax.scale(1024), optax.scale(1 / 1024), SCALE))
    after = one_update(optax.chain(optax.scale(1024), SCALE, optax.scale(1 / 1024)))
    assert_trees_all_equal(before, after)


# --- Logging -------------------------------------------------------------------------


def test_all_scales_are_logged_in_one_call():
    _, state = trained(bmo.backmatch_sgd(0.1, models.MLP))
    scales = jax.tree.map(float, optax.tree.get(state, "layer_scales"))
    assert json.loads(json.dumps({"step": 5, **scales})) == {"step": 5, **scales}
    assert sorted(scales) == ["fc1", "fc2", "fc3"]


# --- Measured scales in Flax's own training objects ----------------------------------


def test_train_state_trains_with_measured_scales():
    def measured(**options: Any) -> optax.GradientTransformationExtraArgs:
        scale = bmo.scale_by_measured_backmatch(key=KEY, refresh_every=2, **options)
        return optax.chain(scale, optax.sgd(0.1, momentum=0.9))

    state = TrainState.create(
        apply_fn=models.Mlp().apply, params=PARAMS, tx=measured(outputs_fn=outputs)
    )
    step = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss_fn)(s.params)))
    for _ in range(5):
        state = step(state)
    expected = trained(measured(), outputs_fn=outputs)
    scales, others = (
        optax.tree.get(s, "layer_scales") for s in (state.opt_state, expected[1])
    )
    assert_trees_all_close((state.params, scales), (expected[0], others), rtol=1e-5)
    assert max(scales.values()) / min(scales.values()) > 1.5


def test_an_update_brings_the_model_in_place_of_the_one_at_construction():
    def doubled(params: Any) -> Any:
        return 2 * outputs(params)

    options: Any = {"key": KEY, "normalize": False}
    tx = bmo.scale_by_measured_backmatch(outputs_fn=outputs, **options)
    gradient = jax.grad(loss_fn)(PARAMS)
    plain: Any
    other: Any
    state = tx.init(PARAMS)
    _, plain = tx.update(gradient, state, PARAMS)
    _, other = tx.update(gradient, state, PARAMS, outputs_fn=doubled)
    expected = optax.tree.scale(0.25, plain.layer_scales)
    assert_trees_all_close(other.layer_scales, expected, rtol=1e-5)


def test_train_state_measures_a_batch_norm_in_training_mode():
    # The recipe's first statistics are those that no step has touched.
    model = models.ConvNet()
    images = jax.random.normal(KEY, (16, *models.CONV_NET.input_shape))
    variables: Any = models.init_variables(model, models.CONV_NET)

    def outputs(params: Any, factor: float = 1.0) -> Any:
        stats = optax.tree.scale(factor, variables["batch_stats"])
        return model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )[0]

    params = variables["params"]
    tx = bmo.scale_by_measured_backmatch(key=KEY, outputs_fn=outputs)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = jax.jit(lambda s: s.apply_gradients(grads=params))(state)
    scales: Any = optax.tree.get(state.opt_state, "layer_scales")
    assert set(scales) == set(models.CONV_NET.paths)
    # Statistics of the batch are used, so the stored ones make no difference.
    assert_trees_all_equal(outputs(params), outputs(params, factor=3.0))


class Classifier(nnx.Module):
    """A BatchNorm, whose statistics change, and a Dropout, whose random numbers do."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.drop(nnx.relu(self.norm(self.hidden(x)))))


def trained_classifier(measure: bool) -> tuple[Any, Any]:
    """The model and its scales after three steps of the recipe, or of plain SGD."""
    net = Classifier(nnx.Rngs(0))
    scale = bmo.scale_by_measured_backmatch(key=KEY, refresh_every=2, limit=1.0)
    tx = optax.chain(*([scale] if measure else []), optax.sgd(0.1))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x, y):
        gradient = nnx.grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
        graphdef, _, rest = nnx.split(net, nnx.Param, ...)

        def outputs(params):
            return nnx.merge(graphdef, params, rest, copy=True)(x)

        extra = {"outputs_fn": outputs} if measure else {}
        optimizer.update(net, gradient, **extra)

    for _ in range(3):
        step(net, optimizer, X, Y)
    return net, nnx.as_pure(optimizer.opt_state)


def test_nnx_measures_scales_and_leaves_the_rest_of_the_model_alone():
    # With a limit of 1 every scale is 1, so that training is SGD's.
    net, state = trained_classifier(measure=True)
    plain, _ = trained_classifier(measure=False)
    for kind in (nnx.Param, nnx.BatchStat, nnx.RngCount):
        ours, theirs = (nnx.to_pure_dict(nnx.state(m, kind)) for m in (net, plain))
        assert jax.tree.leaves(ours)
        assert_trees_all_close(ours, theirs, rtol=1e-6)
    assert set(optax.tree.get(state, "layer_scales")) == {"hidden", "norm", "head"}
    assert (np.asarray(optax.tree.get(state, "curvatures")) > 0).all()
