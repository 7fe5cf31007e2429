"""What Optax asks of every optimizer, and what its wrappers must find."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

import backmatch_optax as bmo
from backmatch_optax import spec


def outputs(params: Any) -> jax.Array:
    """A model of any parameters: two examples, one output."""
    total = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
    return jnp.tile(jnp.asarray(total), (2, 1))


# A key of the old kind, since NumPy compares no typed ones.
MEASURED: dict[str, Any] = {"key": jax.random.PRNGKey(0), "outputs_fn": outputs}
EMPTY_CHAIN = spec.LayerChain([], input_shape=(8, 8, 3))
EVERY = {
    "empty chain": bmo.scale_by_backmatch(
        EMPTY_CHAIN, unlisted="identity", normalize=False
    ),
    "conv net": bmo.scale_by_backmatch(models.CONV_NET, normalize=False),
    "mean field": bmo.scale_by_backmatch(
        models.CONV_NET, gains="mean_field", normalize=False
    ),
    "sgd": bmo.backmatch_sgd(0.1, models.CONV_NET, weight_decay=1e-2, normalize=False),
    "lsalr": bmo.scale_by_lsalr(),
    "once": bmo.scale_by_backmatch(models.CONV_NET, refresh=False),
    "steps": bmo.scale_steps_by_backmatch(models.CONV_NET),
    "steps, followed": bmo.scale_steps_by_backmatch(models.CONV_NET, refresh=True),
    "measured": bmo.scale_by_measured_backmatch(refresh_every=2, **MEASURED),
    "measured once": bmo.scale_by_measured_backmatch(refresh_every=None, **MEASURED),
}
every = pytest.mark.parametrize("tx", EVERY.values(), ids=EVERY)


@pytest.fixture(scope="module")
def params() -> Any:
    shapes = jax.eval_shape(
        lambda: models.init_params(models.ConvNet(), models.CONV_NET)
    )
    return models.random_like(shapes, seed=0)


@pytest.fixture(scope="module")
def grads(params) -> Any:
    return models.random_like(params, seed=1)


def step_of(tx: optax.GradientTransformation) -> Any:
    """A training step, not yet jitted."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


# --- Calls ---------------------------------------------------------------------------


@every
def test_jit_and_eager_agree(tx, params, grads):
    state = tx.init(params)
    jitted = jax.jit(tx.update)(grads, state, params)
    assert_trees_all_close(jitted, tx.update(grads, state, params), rtol=1e-5)


@every
def test_unknown_extra_args_are_accepted(tx, params, grads):
    state = tx.init(params)
    plain = tx.update(grads, state, params)
    assert_trees_all_equal(tx.update(grads, state, params, value=1.0), plain)


@every
def test_second_step_compiles_nothing(tx, params, grads, caplog):
    step = jax.jit(step_of(tx))
    state = tx.init(params)
    caplog.set_level(logging.DEBUG, logger="jax")
    params, state = step(params, state, grads)
    assert caplog.records  # the first step does compile, and is logged
    caplog.clear()
    step(params, state, grads)
    assert not caplog.records


@every
def test_update_works_inside_a_scan(tx, params, grads):
    step = step_of(tx)
    state = tx.init(params)
    looped = (params, state)
    for _ in range(3):
        looped = jax.jit(step)(*looped, grads)

    def body(carry, _):
        return step(*carry, grads), None

    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, length=3))(
        (params, state)
    )
    assert_trees_all_close(scanned, looped, rtol=1e-5)


@every
@pytest.mark.parametrize("skip", [False, True])
def test_update_may_be_skipped_by_cond(tx, params, grads, skip):
    @jax.jit
    def maybe_update(skip, state):
        return jax.lax.cond(
            skip,
            lambda: (grads, state),
            lambda: tx.update(grads, state, params),
        )

    state = tx.init(params)
    expected = (grads, state) if skip else tx.update(grads, state, params)
    assert_trees_all_close(maybe_update(skip, state), expected, rtol=1e-5)


@every
def test_params_and_state_may_be_donated(tx, params, grads):
    step = step_of(tx)
    plain = jax.jit(step)
    donating = jax.jit(step, donate_argnums=(0, 1))
    expected = plain(*plain(params, tx.init(params), grads), grads)
    given = jax.tree.map(jnp.copy, params)
    result = donating(*donating(given, tx.init(given), grads), grads)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert_trees_all_equal(result, expected)


# --- Types and trees -----------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_of_updates_and_state_are_kept(tx, params, dtype):
    with jax.enable_x64(dtype == "float64"):
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
        state = jax.eval_shape(tx.init, shapes)
        result = jax.eval_shape(tx.update, shapes, state, shapes)
    assert result == (shapes, state)


@every
def test_each_leaf_keeps_its_dtype_in_a_mixed_tree(tx, params):
    dtypes = {"kernel": "bfloat16", "bias": "float32", "scale": "float64"}
    with jax.enable_x64(True):
        mixed = {
            layer: {
                role: jax.ShapeDtypeStruct(leaf.shape, dtypes[role])
                for role, leaf in roles.items()
            }
            for layer, roles in params.items()
        }
        state = jax.eval_shape(tx.init, mixed)
        result = jax.eval_shape(tx.update, mixed, state, mixed)
    assert result == (mixed, state)


@every
def test_init_needs_only_shapes(tx, params):
    shapes = jax.eval_shape(lambda: params)
    assert_trees_all_equal(tx.init(shapes), tx.init(params))
    assert_trees_all_equal(
        jax.tree.map(jax.typeof, jax.eval_shape(tx.init, shapes)),
        jax.tree.map(jax.typeof, tx.init(params)),
    )


@every
@pytest.mark.parametrize("empty", [{}, ()], ids=["dict", "tuple"])
def test_empty_trees_are_accepted(tx, empty):
    state = tx.init(empty)
    updates, new_state = tx.update(empty, state, empty)
    assert updates == empty
    assert_trees_all_equal(new_state, state)


@every
def test_none_leaves_are_kept_and_count_as_absent(tx, params, grads):
    def conv1_bias_as(tree, **bias):
        return tree | {"conv1": {"kernel": tree["conv1"]["kernel"]} | bias}

    def updates_for(**bias):
        these = conv1_bias_as(params, **bias)
        return tx.update(conv1_bias_as(grads, **bias), tx.init(these), these)[0]

    updates = updates_for(bias=None)
    assert updates["conv1"].pop("bias") is None
    assert_trees_all_equal(updates, updates_for())


@every
def test_a_gradient_of_none_leaves_the_others_as_they_are(tx, params, grads):
    state = tx.init(params)
    expected, _ = tx.update(grads, state, params)
    updates, _ = tx.update(grads | {"norm1": None}, state, params)
    assert_trees_all_equal(updates, expected | {"norm1": None})


@pytest.mark.parametrize("tx", [tx for name, tx in EVERY.items() if name != "lsalr"])
def test_map_params_leaves_the_scales_alone(tx, params):
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert_trees_all_equal(
        optax.tree.get(mapped, "layer_scales"), optax.tree.get(state, "layer_scales")
    )


def test_map_params_reaches_the_momentum(params):
    tx = EVERY["sgd"]
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    assert_trees_all_equal(
        optax.tree.get(mapped, "trace"), optax.tree.ones_like(params)
    )


# --- Optax's wrappers ----------------------------------------------------------------


@every
def test_multi_steps_are_one_step_with_the_mean_gradient(tx, params):
    micro = [models.random_like(params, seed) for seed in (1, 2, 3)]
    multi = optax.MultiSteps(tx, every_k_schedule=3)
    state = multi.init(params)
    update = jax.jit(multi.update)
    for grads in micro[:-1]:
        updates, state = update(grads, state, params)
        assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    updates, state = update(micro[-1], state, params)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *micro)
    expected = tx.update(mean, tx.init(params), params)
    assert_trees_all_close(
        (updates, state.inner_opt_state), expected, rtol=1e-4, atol=1e-6
    )


def test_injected_hyperparams_give_the_plain_updates(params, grads):
    plain = bmo.backmatch_sgd(0.1, models.CONV_NET, weight_decay=1e-2, normalize=False)
    injected = optax.inject_hyperparams(bmo.backmatch_sgd)(
        0.1, models.CONV_NET, weight_decay=1e-2, normalize=False
    )
    results = []
    for tx in (plain, injected):
        step = jax.jit(step_of(tx))
        first = step(params, jax.jit(tx.init)(params), grads)
        results.append(step(*first, grads))
    (expected, expected_state), (result, state) = results
    assert_trees_all_close(result, expected, rtol=1e-5)
    assert_trees_all_close(state.inner_state, expected_state, rtol=1e-5)
    assert {"learning_rate", "weight_decay"} <= state.hyperparams.keys()


def test_injected_weight_decay_may_change_between_steps(params, grads):
    tx = optax.inject_hyperparams(bmo.backmatch_sgd)(
        0.1, models.CONV_NET, momentum=None, weight_decay=0.0, normalize=False
    )
    update = jax.jit(tx.update)
    state = optax.tree.set(tx.init(params), weight_decay=jnp.float32(0.5))
    updates, _ = update(grads, state, params)
    plain = bmo.backmatch_sgd(
        0.1, models.CONV_NET, momentum=None, weight_decay=0.5, normalize=False
    )
    expected, _ = plain.update(grads, plain.init(params), params)
    assert_trees_all_close(updates, expected, rtol=1e-5)


def test_spec_passes_through_inject_hyperparams():
    # A spec that were callable would be taken for a schedule, even where the user's
    # curvature is a function.
    def curvature(params):
        return jnp.sum(params["w"] ** 2)

    block = spec.Block("mixer", weight_curvature=curvature, input_curvature=1.0)
    chain = spec.LayerChain([block], input_shape=(4,))
    params = {"mixer": {"w": jnp.full(4, 0.5)}}
    tx = optax.inject_hyperparams(bmo.scale_by_backmatch)(chain, normalize=False)
    updates, state = tx.update(params, tx.init(params), params)
    assert set(optax.tree.get(state, "hyperparams")) == {"norm_floor", "limit"}
    assert_trees_all_close(updates, params, rtol=1e-6)  # the sum of squares is 1


HIDING = {
    "masked leaf": {"head": {"kernel": False}},
    "masked layer": {"head": False},
}


def hide(params: Any, hidden: Any) -> Any:
    """A mask that is true but for some leaves or layers."""
    mask = jax.tree.map(lambda _: True, params)
    for layer, roles in hidden.items():
        mask[layer] = mask[layer] | roles if roles else False
    return mask


@pytest.mark.parametrize("hidden", HIDING.values(), ids=HIDING)
def test_masked_outside_raises_with_the_advice(params, grads, hidden):
    mask = hide(params, hidden)
    tx = EVERY["conv net"]
    masked = optax.masked(tx, mask)
    with pytest.raises(ValueError, match=r"'head.* is masked.* scale outside"):
        masked.init(params)
    with pytest.raises(ValueError, match=r"'head.* is masked.* scale outside"):
        masked.update(grads, optax.MaskedState(tx.init(params)), params)


@pytest.mark.parametrize("hidden", HIDING.values(), ids=HIDING)
def test_partition_outside_raises_with_the_advice(params, hidden):
    labels = jax.tree.map(
        lambda trained: "train" if trained else "freeze", hide(params, hidden)
    )
    tx = optax.partition(
        {"train": EVERY["conv net"], "freeze": optax.set_to_zero()}, labels
    )
    with pytest.raises(ValueError, match=r"'head.* is masked.* scale outside"):
        tx.init(params)


def freezing_by_partition(layers: Any) -> optax.GradientTransformation:
    labels = {layer: "freeze" if layer == "head" else "train" for layer in layers}
    return optax.partition(
        {"train": optax.identity(), "freeze": optax.set_to_zero()}, labels
    )


def freezing_by_mask(layers: Any) -> optax.GradientTransformation:
    return optax.masked(
        optax.set_to_zero(), {layer: layer == "head" for layer in layers}
    )


@pytest.mark.parametrize("freezing", [freezing_by_partition, freezing_by_mask])
def test_scaling_outside_and_freezing_inside_works(params, grads, freezing):
    scale = EVERY["conv net"]
    tx = optax.chain(scale, freezing(params))
    updates, _ = tx.update(grads, tx.init(params), params)
    expected: Any = scale.update(grads, scale.init(params), params)[0]
    frozen = {"head": optax.tree.zeros_like(expected["head"])}
    assert_trees_all_equal(updates, expected | frozen)


def test_apply_if_finite_skips_a_bad_gradient(params, grads):
    tx = EVERY["sgd"]
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=5)
    state = guarded.init(params)
    bad = grads | {"head": optax.tree.full_like(grads["head"], jnp.nan)}
    updates, state = guarded.update(bad, state, params)
    assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    # The step after it is the first one.
    updates, _ = guarded.update(grads, state, params)
    expected, _ = tx.update(grads, tx.init(params), params)
    assert_trees_all_close(updates, expected, rtol=1e-5)


def test_clipping_before_clips_the_raw_gradient(params, grads):
    scale, clip = EVERY["conv net"], optax.clip_by_global_norm(0.5)
    tx = optax.chain(clip, scale)
    updates, _ = tx.update(grads, tx.init(params), params)
    clipped, _ = clip.update(grads, clip.init(params))
    expected, _ = scale.update(clipped, scale.init(params), params)
    assert_trees_all_equal(updates, expected)


def test_clipping_after_clips_the_step(params, grads):
    tx = optax.chain(EVERY["conv net"], optax.clip_by_global_norm(0.5))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


def test_ema_averages_scaled_gradients(params, grads):
    scale = EVERY["conv net"]
    tx = optax.chain(scale, optax.ema(0.9, debias=False))
    updates, _ = tx.update(grads, tx.init(params), params)
    scaled, _ = scale.update(grads, scale.init(params), params)
    assert_trees_all_close(updates, optax.tree.scale(0.1, scaled), rtol=1e-5)
