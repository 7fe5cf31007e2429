"""The transformations do what their formulas say, step by step."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
import reference
from chex import assert_trees_all_close, assert_trees_all_equal

import backmatch_optax as bmo
from backmatch_optax import spec

# Small enough for the recursion to be done on paper. `F` is a kernel's squared norm.
PAPER_NET = spec.LayerChain(
    [spec.Dense("fc1"), spec.BatchNorm("norm"), spec.Dense("fc2")], input_shape=(4,)
)
PAPER_PARAMS = {
    "fc1": {"kernel": jnp.full((4, 8), 0.5), "bias": jnp.ones(8)},  # F = 8
    "norm": {"scale": jnp.full(8, 2.0), "bias": jnp.ones(8)},
    "fc2": {"kernel": jnp.full((8, 2), 0.5), "bias": jnp.ones(2)},  # F = 4
}
PAPER_SCALES = {
    # Below the norm: m = 0.5 * 2**2 / q, where q = F / out = 1 enters the norm.
    "fc1": {"kernel": 1 / 2.0, "bias": 1 / 2.0},
    # Below fc2: m = F / in = 0.5.
    "norm": {"scale": 1 / 0.5, "bias": 1 / 0.5},
    # m = 1; the kernel meets a signal of moment 2**2 + 1, the bias the constant one.
    "fc2": {"kernel": 1 / 5.0, "bias": 1.0},
}
PAPER_LAYER_SCALES = {"fc1": 1 / 2.0, "norm": 1 / 0.5, "fc2": 1 / 5.0}


def one_step(tx: optax.GradientTransformation, grads: Any, params: Any) -> Any:
    """The updates and the state of the first step."""
    return tx.update(grads, tx.init(params), params)


def test_update_is_gradient_times_scale():
    grads = models.random_like(PAPER_PARAMS)
    updates, _ = one_step(
        bmo.scale_by_backmatch(PAPER_NET, normalize=False), grads, PAPER_PARAMS
    )
    expected = jax.tree.map(jnp.multiply, grads, PAPER_SCALES)
    assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
def test_layers_out_of_balance_train_as_those_in_balance(gains):
    # A ReLU network is the same function when one layer is multiplied by what another
    # is divided by. Its gradients are not, and SGD goes another way; with the scales
    # every layer moves in proportion to its size.
    net = spec.LayerChain(
        [
            spec.Dense("fc1"),
            spec.Activation("relu"),
            spec.Dense("fc2"),
            spec.Activation("relu"),
            spec.Dense("fc3"),
        ],
        input_shape=(4,),
    )
    x, y = jax.random.normal(jax.random.key(0), (2, 32, 4))
    shapes = {
        name: {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
        for name in ("fc1", "fc2", "fc3")
    }
    params = models.random_like(shapes)
    # A bias is multiplied by what its layer and all below it are.
    factors = {"fc1": (8.0, 8.0), "fc2": (0.5, 4.0), "fc3": (0.25, 1.0)}
    unbalanced = {
        name: {"kernel": kernel * leaf["kernel"], "bias": bias * leaf["bias"]}
        for (name, leaf), (kernel, bias) in zip(
            params.items(), factors.values(), strict=True
        )
    }

    def apply(params):
        h = x
        for name in params:
            h = h @ params[name]["kernel"] + params[name]["bias"]
            h = h if name == "fc3" else jax.nn.relu(h)
        return h

    def trained(params, *transformations):
        tx = optax.chain(*transformations, optax.sgd(0.02, 0.9, nesterov=True))
        state, losses = tx.init(params), []
        loss_fn = jax.value_and_grad(lambda p: jnp.mean((apply(p) - y) ** 2))
        for _ in range(20):
            loss, gradient = loss_fn(params)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        return losses

    scale = bmo.scale_by_backmatch(net, gains=gains, norm_floor=0, normalize=False)
    balanced = trained(params, scale)
    np.testing.assert_allclose(trained(unbalanced, scale), balanced, rtol=1e-3)
    assert balanced[-1] < 0.9 * balanced[0]
    assert abs(trained(unbalanced)[-1] / trained(params)[-1] - 1) > 0.05


def test_each_parameter_of_a_conv_net_gets_the_scale_of_the_reference():
    # Random biases and norms too: zeros and ones would hide a rule.
    shapes = jax.eval_shape(
        lambda: models.init_params(models.ConvNet(), models.CONV_NET)
    )
    params = models.random_like(shapes)
    layers = [
        {"kind": "conv", "path": "conv1"},
        {"kind": "batch_norm", "path": "norm1"},
        {"kind": "avg_pool", "window_shape": (2, 2), "strides": 2},
        {"kind": "conv", "path": "conv2", "strides": 2},
        {"kind": "batch_norm", "path": "norm2"},
        {"kind": "global_avg_pool"},
        {"kind": "dense", "path": "head"},
    ]
    expected = reference.layer_scales(
        layers, jax.tree.map(np.asarray, params), models.CONV_NET.input_shape
    )
    tx = bmo.scale_by_backmatch(models.CONV_NET, normalize=False)
    ones = optax.tree.ones_like(params)
    updates, _ = jax.jit(tx.update)(ones, tx.init(params), params)
    for layer, roles in updates.items():
        for role, update in roles.items():
            np.testing.assert_allclose(update, expected[f"{layer}/{role}"], rtol=1e-5)


def test_empty_chain_is_the_identity():
    empty = spec.LayerChain([], input_shape=(4,))
    grads = models.random_like(PAPER_PARAMS)
    updates, _ = one_step(
        bmo.scale_by_backmatch(empty, unlisted="identity", normalize=False),
        grads,
        PAPER_PARAMS,
    )
    assert_trees_all_equal(updates, grads)


def test_unlisted_parameter_passes_through_bitwise():
    tx = bmo.scale_by_backmatch(PAPER_NET, unlisted="identity", normalize=False)
    params = PAPER_PARAMS | {"temperature": jnp.ones(3)}
    grads = models.random_like(params)
    updates, _ = one_step(tx, grads, params)
    assert_trees_all_equal(updates["temperature"], grads["temperature"])


def test_missing_params_raise():
    tx = bmo.scale_by_backmatch(PAPER_NET, normalize=False)
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        tx.update(PAPER_PARAMS, tx.init(PAPER_PARAMS))


def test_block_gives_all_its_parameters_one_scale():
    def gate_moment(block: Any) -> Any:
        return jnp.mean(block["inner"]["gate"] ** 2)

    chain = spec.LayerChain(
        [
            spec.Dense("fc1"),
            spec.Block("mixer", weight_curvature=8.0, input_curvature=gate_moment),
            spec.Dense("fc2"),
        ],
        input_shape=(4,),
    )
    params = {
        "fc1": {"kernel": jnp.ones((4, 8))},
        "mixer": {"w": jnp.ones((3, 3)), "inner": {"gate": jnp.full(5, 4.0)}},
        "fc2": {"kernel": jnp.full((8, 2), 0.5)},
    }
    ones = optax.tree.ones_like(params)
    updates, _ = one_step(bmo.scale_by_backmatch(chain, normalize=False), ones, params)
    # fc2 hands on m = F / in = 4 / 8.
    expected = optax.tree.full_like(params["mixer"], 1 / (0.5 * 8.0))
    assert_trees_all_close(updates["mixer"], expected, rtol=1e-6)
    expected = optax.tree.full_like(params["fc1"], 1 / (0.5 * 4.0**2))
    assert_trees_all_close(updates["fc1"], expected, rtol=1e-6)


def test_float64_gradients_are_scaled_in_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64) + 0.1, PAPER_PARAMS
        )
        gradient = optax.tree.full_like(params, 1 / 3)
        updates, _ = one_step(
            bmo.scale_by_backmatch(PAPER_NET, normalize=False), gradient, params
        )
        scale = bmo.layer_scales(PAPER_NET, params, normalize=False)["fc1"]
        expected = np.full((4, 8), float(scale) / 3)
    np.testing.assert_allclose(updates["fc1"]["kernel"], expected, rtol=1e-14)


def test_float16_gradients_meet_scales_beyond_float16():
    params = {
        "fc1": {"kernel": jnp.full((4, 8), 0.5, jnp.float16)},
        "fc2": {"kernel": jnp.full((8, 2), 2.0**-10, jnp.float16)},
    }
    chain = spec.LayerChain([spec.Dense("fc1"), spec.Dense("fc2")], input_shape=(4,))
    gradient = optax.tree.full_like(params, 2.0**-10)
    tx = bmo.scale_by_backmatch(chain, norm_floor=0.0, normalize=False)
    updates, _ = one_step(tx, gradient, params)
    # m = F / in = 2**-19
    np.testing.assert_allclose(updates["fc1"]["kernel"], 2.0**9, rtol=1e-3)


# --- The state -----------------------------------------------------------------------


def test_state_starts_as_ones_by_path():
    state = bmo.scale_by_backmatch(PAPER_NET, normalize=False).init(PAPER_PARAMS)
    scales = optax.tree.get(state, "layer_scales")
    assert scales == {"fc1": 1.0, "norm": 1.0, "fc2": 1.0}


def test_state_holds_the_scale_of_each_layers_kernel():
    tx = bmo.scale_by_backmatch(PAPER_NET, normalize=False)
    _, state = one_step(tx, PAPER_PARAMS, PAPER_PARAMS)
    assert isinstance(state, bmo.ScaleByBackmatchState)
    assert_trees_all_close(state.layer_scales, PAPER_LAYER_SCALES, rtol=1e-6)


def test_state_is_float32_scalars_before_and_after_a_step():
    tx = bmo.scale_by_backmatch(PAPER_NET, normalize=False)
    before = tx.init(PAPER_PARAMS)
    _, after = tx.update(PAPER_PARAMS, before, PAPER_PARAMS)
    for leaf in jax.tree.leaves((before, after)):
        assert jax.typeof(leaf) == jax.typeof(jnp.float32(1))


SGD = bmo.backmatch_sgd(0.1, PAPER_NET, normalize=False)
WRAPPED = {
    "nested chains": optax.chain(
        optax.identity(),
        optax.chain(
            optax.scale(2.0), bmo.scale_by_backmatch(PAPER_NET, normalize=False)
        ),
    ),
    "inject_hyperparams": optax.inject_hyperparams(bmo.backmatch_sgd)(
        0.1, PAPER_NET, normalize=False
    ),
    "MultiSteps": optax.MultiSteps(SGD, every_k_schedule=1).gradient_transformation(),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
def test_scales_are_read_from_inside_wrappers(tx):
    _, state = one_step(tx, PAPER_PARAMS, PAPER_PARAMS)
    scales = optax.tree.get(state, "layer_scales")
    assert_trees_all_close(scales, PAPER_LAYER_SCALES, rtol=1e-6)


# --- Its place in the chain ----------------------------------------------------------


def test_weight_decay_before_the_scale_is_scaled_too():
    tx = bmo.backmatch_sgd(
        1.0, PAPER_NET, momentum=None, weight_decay=0.1, normalize=False
    )
    grads = models.random_like(PAPER_PARAMS)
    updates, _ = one_step(tx, grads, PAPER_PARAMS)
    expected = jax.tree.map(
        lambda g, p, s: -(g + 0.1 * p) * s, grads, PAPER_PARAMS, PAPER_SCALES
    )
    assert_trees_all_close(updates, expected, rtol=1e-5)


def test_momentum_accumulates_scaled_gradients():
    tx = bmo.backmatch_sgd(
        1.0, PAPER_NET, momentum=0.5, nesterov=False, normalize=False
    )
    # Two steps at different parameters, hence with different scales.
    steps = [(models.random_like(PAPER_PARAMS, seed), PAPER_PARAMS) for seed in (1, 2)]
    steps[1] = (steps[1][0], models.random_like(PAPER_PARAMS, 3))
    state = tx.init(PAPER_PARAMS)
    updates = None
    for grads, params in steps:
        updates, state = tx.update(grads, state, params)
    scaled = [
        one_step(bmo.scale_by_backmatch(PAPER_NET, normalize=False), *step)[0]
        for step in steps
    ]
    expected = jax.tree.map(lambda old, new: -(0.5 * old + new), *scaled)
    assert_trees_all_close(updates, expected, rtol=1e-5)


def test_backmatch_sgd_is_the_chain_in_its_docstring():
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, PAPER_PARAMS)
    alias = bmo.backmatch_sgd(
        0.02, PAPER_NET, weight_decay=5e-4, weight_decay_mask=mask, normalize=False
    )
    chain = optax.chain(
        optax.add_decayed_weights(5e-4, mask),
        bmo.scale_by_backmatch(PAPER_NET, normalize=False),
        optax.sgd(0.02, momentum=0.9, nesterov=True),
    )
    results = []
    for tx in (alias, chain):
        params, state = PAPER_PARAMS, tx.init(PAPER_PARAMS)
        for seed in range(4):
            updates, state = tx.update(models.random_like(params, seed), state, params)
            params = optax.apply_updates(params, updates)
        results.append((params, state))
    assert_trees_all_equal(*results)


def test_learning_rate_may_be_a_schedule():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.25})
    tx = bmo.backmatch_sgd(schedule, PAPER_NET, momentum=None, normalize=False)
    first, state = one_step(tx, PAPER_PARAMS, PAPER_PARAMS)
    second, _ = tx.update(PAPER_PARAMS, state, PAPER_PARAMS)
    assert_trees_all_close(second, optax.tree.scale(0.25, first), rtol=1e-6)


def test_loss_goes_down_on_a_regression():
    # A full-batch regression of a perceptron onto another one.
    model = models.Mlp()
    inputs = jax.random.normal(jax.random.key(1), (64, *models.MLP.input_shape))
    teacher = models.init_params(model, models.MLP, seed=2)
    targets: Any = model.apply({"params": teacher}, inputs)
    tx = bmo.backmatch_sgd(0.02, models.MLP, normalize=False)

    def loss_of(params: Any) -> jax.Array:
        outputs: Any = model.apply({"params": params}, inputs)
        return jnp.mean((outputs - targets) ** 2)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = models.init_params(model, models.MLP)
    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=100))
    _, losses = train((params, tx.init(params)))
    assert losses[-1] < 0.1 * losses[0]


# --- Scales of the first step, kept --------------------------------------------------

ONCE = bmo.scale_by_backmatch(PAPER_NET, refresh=False, normalize=False)


def test_without_refresh_the_scales_are_those_of_the_first_step():
    grads, later = models.random_like(PAPER_PARAMS), models.random_like(PAPER_PARAMS, 1)
    updates, state = one_step(ONCE, grads, PAPER_PARAMS)
    # Biases have scales of their own, which are kept too.
    expected = jax.tree.map(jnp.multiply, grads, PAPER_SCALES)
    assert_trees_all_close(updates, expected, rtol=1e-6)
    after: Any
    again, after = ONCE.update(grads, state, later)
    assert_trees_all_equal(again, updates)
    assert_trees_all_equal(after, state)
    assert_trees_all_close(after.layer_scales, PAPER_LAYER_SCALES, rtol=1e-6)
    followed = bmo.layer_scales(PAPER_NET, later, normalize=False)
    assert not np.allclose(followed["fc2"], after.layer_scales["fc2"])


def test_without_refresh_later_steps_read_no_parameter():
    grads = models.random_like(PAPER_PARAMS)
    updates, state = one_step(ONCE, grads, PAPER_PARAMS)
    unreadable = optax.tree.full_like(PAPER_PARAMS, jnp.nan)
    again, _ = jax.jit(ONCE.update)(grads, state, unreadable)
    assert_trees_all_close(again, updates, rtol=1e-6)
    jaxpr = jax.make_jaxpr(ONCE.update)(grads, state, PAPER_PARAMS)
    outside = [equation.primitive.name for equation in jaxpr.eqns]
    assert "cond" in outside
    assert not any("reduce" in name for name in outside)


def test_without_refresh_init_may_see_shapes_alone():
    shapes = jax.eval_shape(lambda: PAPER_PARAMS)
    grads = models.random_like(PAPER_PARAMS)
    updates, _ = ONCE.update(grads, ONCE.init(shapes), PAPER_PARAMS)
    expected, _ = one_step(ONCE, grads, PAPER_PARAMS)
    assert_trees_all_equal(updates, expected)


def test_without_refresh_a_block_keeps_its_scale():
    link = spec.Block("mixer", weight_curvature=8.0, input_curvature=1.0)
    chain = spec.LayerChain([link], input_shape=(4,))
    params = {"mixer": {"w": jnp.ones((3, 3)), "inner": {"gate": jnp.ones(5)}}}
    tx = bmo.scale_by_backmatch(chain, refresh=False, normalize=False)
    for _ in range(2):
        updates, _ = one_step(tx, params, params)
        assert_trees_all_close(updates, optax.tree.scale(1 / 8, params), rtol=1e-6)


def test_swapped_arguments_are_told():
    swapped: Any = (PAPER_NET, 0.1)
    with pytest.raises(ValueError, match=r"spec must be a .*LayerChain, but it is 0.1"):
        bmo.backmatch_sgd(*swapped)


def test_backmatch_sgd_passes_refresh_on():
    tx = bmo.backmatch_sgd(0.1, PAPER_NET, refresh=False)
    _, state = one_step(tx, PAPER_PARAMS, PAPER_PARAMS)
    assert optax.tree.get(state, "computed")


def test_refresh_is_true_or_false():
    with pytest.raises(ValueError, match=r"refresh \(='once'\) must be True or False"):
        bmo.scale_by_backmatch(PAPER_NET, refresh="once")  # pyright: ignore


# --- Steps of one size ---------------------------------------------------------------


class Wide(nn.Module):
    """Dense layers of several widths, with biases."""

    @nn.compact
    def __call__(self, x):
        for number, width in enumerate((64, 256, 128)):
            x = nn.relu(nn.Dense(width, name=f"fc{number}")(x))
        return nn.Dense(5, name="head")(x)


def test_a_step_of_unit_entries_changes_the_output_by_one():
    model, x = Wide(), jax.random.normal(jax.random.key(0), (32, 48))
    params = model.init(jax.random.key(1), x)["params"]
    tx = bmo.scale_steps_by_backmatch(bmo.infer_spec(model, x))

    def change(key: jax.Array, path: str) -> jax.Array:
        signs = optax.tree.random_like(key, params, jax.random.rademacher)
        steps, _ = tx.update(signs, tx.init(params), params)
        alone = jax.tree_util.tree_map_with_path(
            lambda at, step: step * (jax.tree_util.keystr(at) == path), steps
        )
        forward = lambda params: model.apply({"params": params}, x)  # noqa: E731
        return jnp.mean(jax.jvp(forward, (params,), (alone,))[1] ** 2)

    keys = jax.random.split(jax.random.key(2), 30)
    for at, _ in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(at)
        squared = jax.vmap(functools.partial(change, path=path))(keys).mean()
        np.testing.assert_allclose(jnp.sqrt(squared), 1, atol=0.2, err_msg=path)


def test_steps_keep_the_multipliers_of_the_first_parameters():
    tx = bmo.scale_steps_by_backmatch(PAPER_NET)
    steps, state = tx.update(PAPER_PARAMS, tx.init(PAPER_PARAMS), PAPER_PARAMS)
    larger = jax.tree.map(lambda leaf: 3 * leaf, PAPER_PARAMS)
    again, _ = tx.update(PAPER_PARAMS, state, larger)
    assert_trees_all_close(again, steps)


def test_decay_after_the_steps_is_not_scaled():
    tx = optax.chain(
        bmo.scale_steps_by_backmatch(PAPER_NET), optax.add_decayed_weights(0.5)
    )
    zeros = optax.tree.zeros_like(PAPER_PARAMS)
    updates, _ = tx.update(zeros, tx.init(PAPER_PARAMS), PAPER_PARAMS)
    assert_trees_all_close(updates, optax.tree.scale(0.5, PAPER_PARAMS))


# --- What is refused -----------------------------------------------------------------

EVERY = {
    "follows": bmo.scale_by_backmatch(PAPER_NET),
    "kept": bmo.scale_by_backmatch(PAPER_NET, refresh=False),
    "steps": bmo.scale_steps_by_backmatch(PAPER_NET),
    "measured": bmo.scale_by_measured_backmatch(
        key=jax.random.key(0),
        outputs_fn=lambda params: jnp.stack([optax.tree.sum(params)]),
    ),
}
every = pytest.mark.parametrize("tx", EVERY.values(), ids=EVERY)


@every
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_state_of_other_layers_is_refused(tx, jit):
    other_net = spec.LayerChain([spec.Dense("head")], input_shape=(4,))
    params = {"head": {"kernel": jnp.ones((4, 2))}}
    other = {
        "follows": bmo.scale_by_backmatch(other_net),
        "kept": bmo.scale_by_backmatch(other_net, refresh=False),
        "steps": bmo.scale_steps_by_backmatch(other_net),
        "measured": EVERY["measured"],
    }[next(name for name, value in EVERY.items() if value is tx)]
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError, match=r"'fc1'.* but the state .* those of 'head'"):
        update(PAPER_PARAMS, other.init(params), PAPER_PARAMS)


@every
def test_a_state_of_another_transformation_is_refused(tx):
    for state in (optax.EmptyState(), optax.trace(0.9).init(PAPER_PARAMS)):
        message = f"but the state is a {type(state).__name__} that has none"
        with pytest.raises(ValueError, match=message):
            tx.update(PAPER_PARAMS, state, PAPER_PARAMS)


def test_a_state_that_follows_is_no_state_that_is_kept():
    follows, kept = EVERY["follows"], EVERY["kept"]
    for tx, other in ((follows, kept), (kept, follows)):
        with pytest.raises(ValueError, match="init of the same transformation"):
            tx.update(PAPER_PARAMS, other.init(PAPER_PARAMS), PAPER_PARAMS)


@every
def test_an_update_that_no_parameter_has_asked_for_is_refused(tx):
    state = tx.init(PAPER_PARAMS)
    more = PAPER_PARAMS | {"fc3": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="updates have 'fc3/kernel', but the param"):
        tx.update(more, state, PAPER_PARAMS)
    with pytest.raises(ValueError, match="updates have 'loss', but the parameters do"):
        tx.update({"loss": jnp.ones(())}, state, PAPER_PARAMS)


@pytest.mark.parametrize("unlisted", ["error", "identity"])
def test_an_update_below_a_parameter_is_refused(unlisted):
    tx = bmo.scale_by_backmatch(PAPER_NET, unlisted=unlisted)
    updates = PAPER_PARAMS | {"fc2": {"kernel": {"low_rank": jnp.ones(2)}}}
    with pytest.raises(ValueError, match="updates have 'fc2/kernel/low_rank'"):
        tx.update(updates, tx.init(PAPER_PARAMS), PAPER_PARAMS)


@pytest.mark.parametrize(
    ("gradient", "found"),
    [
        (jnp.ones((8, 2), int), "of int32"),
        (np.ones((8, 2), bool), "of bool"),
        (1.0, "a float"),
        (1, "a int"),
    ],
    ids=["integers", "booleans", "float", "int"],
)
@pytest.mark.parametrize("tx", [*EVERY.values(), bmo.scale_by_lsalr()])
def test_a_gradient_that_is_no_array_of_floats_is_refused(tx, gradient, found):
    updates = PAPER_PARAMS | {"fc2": PAPER_PARAMS["fc2"] | {"kernel": gradient}}
    message = f"gradient of 'fc2/kernel' must be .* but it is {found}"
    with pytest.raises(ValueError, match=message):
        tx.update(updates, tx.init(PAPER_PARAMS), PAPER_PARAMS)


@pytest.mark.parametrize("tx", EVERY.values(), ids=EVERY)
def test_a_gradient_of_numpys_64_bits_is_what_jax_makes_of_it(tx):
    updates = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PAPER_PARAMS)
    scaled, _ = one_step(tx, updates, PAPER_PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(scaled)} == {jnp.dtype(jnp.float32)}


def test_a_gradient_that_is_not_scaled_may_be_anything():
    tx = bmo.scale_by_backmatch(PAPER_NET, unlisted="identity")
    params = PAPER_PARAMS | {"count": jnp.zeros((), int), "temperature": jnp.ones(())}
    no_gradient = np.zeros((), jax.dtypes.float0)
    grads: Any = PAPER_PARAMS | {"count": no_gradient, "temperature": 1.0}
    updates, _ = one_step(tx, grads, params)
    assert updates["count"] is no_gradient
    assert updates["temperature"] == 1.0


# --- JAX's own checks ----------------------------------------------------------------


@pytest.fixture
def debug() -> Iterator[None]:
    """Raises where any operation makes a NaN or an infinity."""
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@pytest.mark.usefixtures("debug")
def test_the_debugging_checks_are_on():
    with pytest.raises(FloatingPointError):
        jnp.log(jnp.zeros(()))


DEBUGGED: list[dict[str, Any]] = [
    {"gains": "paper"},
    {"gains": "mean_field"},
    {"normalize": False},
    {"refresh": False},
]


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "tx",
    [
        *(
            bmo.backmatch_sgd(0.1, models.MLP, norm_floor=floor, **options)
            for floor in (0.0, 0.1)
            for options in DEBUGGED
        ),
        bmo.scale_by_lsalr(),
        EVERY["measured"],
    ],
)
def test_zeros_make_no_nan_and_no_infinity_on_the_way(tx, jit):
    params = models.init_params(models.Mlp(), models.MLP)
    zeros = optax.tree.zeros_like(params)
    update = jax.jit(tx.update) if jit else tx.update
    for at in (zeros, params | {"fc3": zeros["fc3"]}):
        updates, _ = update(zeros, tx.init(at), at)
        assert_trees_all_equal(updates, zeros)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kernels", [0.0, 0.5])
def test_the_derivative_by_the_norm_floor_is_finite_at_zero(normalize, kernels):
    params = optax.tree.full_like(PAPER_PARAMS, kernels)

    def total(floor: jax.Array) -> Any:
        scales = bmo.layer_scales(
            PAPER_NET, params, norm_floor=floor, normalize=normalize, limit=None
        )
        return sum(scales.values())

    assert jnp.isfinite(jax.grad(total)(0.0))
    assert jnp.isfinite(jax.grad(total)(0.1))


# --- LSALR ---------------------------------------------------------------------------


def lsalr(gradient: Any) -> Any:
    return one_step(bmo.scale_by_lsalr(), gradient, None)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_lsalr_follows_its_formula(dtype):
    gradient = jnp.asarray([[3e-3, -4e-3], [0.0, 1.2e-2]], dtype)
    exact = np.asarray(gradient, np.float64)
    expected = exact * (1 + np.log(1 + 1 / np.linalg.norm(exact)))
    result = np.asarray(lsalr(gradient), np.float64)
    np.testing.assert_allclose(result, expected, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_lsalr_follows_its_formula_for_tiny_and_huge_gradients(size):
    # The norm is a float32, its square is not.
    gradient = jnp.full(4, size, jnp.float32)
    expected = size * (1 + np.log1p(1 / (2 * size)))
    np.testing.assert_allclose(lsalr(gradient), np.full(4, expected), rtol=1e-6)


def test_lsalr_norm_of_float16_does_not_overflow():
    gradient = jnp.full(4, 300.0, jnp.float16)
    expected = 300 * (1 + np.log1p(1 / 600))
    np.testing.assert_allclose(lsalr(gradient), np.full(4, expected), rtol=1e-3)


def test_lsalr_leaves_a_gradient_of_zeros():
    assert_trees_all_equal(lsalr(jnp.zeros((2, 2))), jnp.zeros((2, 2)))


def test_lsalr_takes_the_norm_of_each_array_alone():
    pair = {"a": jnp.full(4, 0.5), "b": jnp.full(4, 50.0)}
    expected = {name: lsalr(gradient) for name, gradient in pair.items()}
    assert_trees_all_equal(lsalr(pair), expected)


def test_lsalr_keeps_complex_gradients():
    gradient = jnp.array([1 + 2j, 3 - 1j])
    scale = 1 + np.log(1 + 1 / np.linalg.norm(gradient))
    np.testing.assert_allclose(lsalr(gradient), scale * gradient, rtol=1e-6)
