"""Kernels that keep their norm train the same function, and never leave float32."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backmatch_optax as bmo
from backmatch_optax import spec

BATCH_NORM = functools.partial(
    nn.BatchNorm, use_running_average=False, use_scale=False, use_bias=False
)


def network(norm: Callable[..., nn.Module] = BATCH_NORM, use_bias=False):
    """Two hidden layers with normalisation, whose epsilon is next to nothing."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            for name in ("fc1", "fc2"):
                x = nn.Dense(8, use_bias=use_bias, name=name)(x)
                x = norm(epsilon=1e-12)(x)  # pyright: ignore[reportCallIssue]
                x = nn.relu(x)
            return nn.Dense(3, use_bias=False, name="fc3")(x)

    return Net()


def chain(norm: Callable[..., spec.Link] = spec.BatchNorm, name="") -> spec.LayerChain:
    """Its declared chain."""
    links: list[spec.Link] = []
    for number, dense in enumerate(("fc1", "fc2")):
        normed = norm(f"{name}_{number}") if name else norm()
        links += [spec.Dense(dense), normed, spec.Activation("relu")]
    return spec.LayerChain([*links, spec.Dense("fc3")], input_shape=(5,))


def train(tx, steps, dtype) -> tuple[Any, Any, Any]:
    """Logits after every step, and the last and the first parameters."""
    model: Any = network()
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (32, 5), dtype)
    variables = model.init(keys[2], x)
    params = jax.tree.map(lambda p: p.astype(dtype), variables["params"])

    def logits_of(params):
        return model.apply({"params": params}, x, mutable=["batch_stats"])[0]

    def loss_fn(params, step):
        # Labels of each step's own: nothing to be learned, so gradients do not vanish.
        y = jax.random.randint(jax.random.fold_in(keys[1], step), (32,), 0, 3)
        logits = logits_of(params)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def run(params, opt_state):
        def body(carry, step):
            params, opt_state = carry
            gradient = jax.grad(loss_fn)(params, step)
            updates, opt_state = tx.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), logits_of(params)

        return jax.lax.scan(body, (params, opt_state), jnp.arange(steps))

    (trained, _), logits = run(params, tx.init(params))
    return logits, trained, params


def backmatch(spec_, **options):
    return bmo.backmatch_sgd(0.1, spec_, normalize=False, **options)


def decay_after(spec_):
    return optax.chain(
        bmo.scale_by_backmatch(spec_, normalize=False),
        optax.add_decayed_weights(0.01),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        backmatch,
        lambda c: backmatch(c, nesterov=False),
        lambda c: backmatch(c, momentum=None),
        decay_after,
        lambda c: optax.contrib.mechanize(backmatch(c), weight_decay=0.0, s_init=0.01),
        lambda c: optax.contrib.schedule_free(backmatch(c), 0.1),
    ],
    ids=[
        "nesterov",
        "heavy ball",
        "no momentum",
        "decay after the scale",
        "mechanize",
        "schedule-free",
    ],
)
def test_the_same_function_is_trained_at_every_step(optimizer):
    with jax.enable_x64(True):
        free, grown, start = train(optimizer(chain()), 25, jnp.float64)
        kept_tx = bmo.keep_norms(optimizer(chain()), chain())
        kept, held, _ = train(kept_tx, 25, jnp.float64)
    np.testing.assert_allclose(kept, free, rtol=1e-6, atol=1e-7)
    for layer in ("fc1", "fc2"):
        before = np.linalg.norm(start[layer]["kernel"])
        np.testing.assert_allclose(np.linalg.norm(held[layer]["kernel"]), before)
        assert np.linalg.norm(grown[layer]["kernel"]) > 1.005 * before
    # The head is no kernel below a normalisation: it is as long as it would be.
    np.testing.assert_allclose(held["fc3"]["kernel"], grown["fc3"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda c: backmatch(c, weight_decay=0.1),
        lambda c: optax.contrib.mechanize(backmatch(c), weight_decay=1.0, s_init=0.1),
    ],
    ids=["decay", "decay of mechanize"],
)
def test_with_decay_before_the_scale_it_is_another_method(optimizer):
    with jax.enable_x64(True):
        free, *_ = train(optimizer(chain()), 25, jnp.float64)
        kept_tx = bmo.keep_norms(optimizer(chain()), chain())
        kept, *_ = train(kept_tx, 25, jnp.float64)
    assert np.abs(kept - free).max() > 1e-3


def test_three_thousand_steps_stay_as_they_began_where_kernels_grew_out_of_range():
    tx = bmo.backmatch_sgd(1.0, chain(), normalize=False)
    _, grown, _ = train(tx, 3000, jnp.float32)
    largest = max(np.abs(grown[name]["kernel"]).max() for name in ("fc1", "fc2"))
    assert not largest < 1e15  # or not a number: its square is near float32's end
    _, held, start = train(bmo.keep_norms(tx, chain()), 3000, jnp.float32)
    chex.assert_tree_all_finite(held)
    np.testing.assert_allclose(
        np.linalg.norm(held["fc1"]["kernel"]),
        np.linalg.norm(start["fc1"]["kernel"]),
        rtol=1e-3,
    )


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_layer_norm_frees_the_norm_of_a_kernel_without_a_bias_only(use_bias):
    declared = chain(spec.LayerNorm, "LayerNorm")
    model = network(nn.LayerNorm, use_bias=use_bias)
    params = model.init(jax.random.key(0), jnp.ones((2, 5)))["params"]
    tx = bmo.keep_norms(bmo.backmatch_sgd(0.1, declared, normalize=False), declared)
    if use_bias:
        with pytest.raises(ValueError, match="no kernel right before a normalisation"):
            tx.init(params)
        return
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    moved: Any = optax.apply_updates(params, updates)
    for layer in ("fc1", "fc2"):
        np.testing.assert_allclose(
            np.linalg.norm(moved[layer]["kernel"]),
            np.linalg.norm(np.asarray(params[layer]["kernel"])),
            rtol=1e-6,
        )


def test_kernels_inside_residual_branches_keep_their_norm_too():
    branch = [spec.Dense("a"), spec.BatchNorm(), spec.Dense("b")]
    declared = spec.LayerChain(
        [spec.Residual(branch), spec.Dense("head")], input_shape=(4,)
    )
    params = {
        name: {"kernel": jax.random.normal(jax.random.key(i), (4, 4))}
        for i, name in enumerate(("a", "b", "head"))
    }
    tx = bmo.keep_norms(bmo.backmatch_sgd(0.1, declared, normalize=False), declared)
    updates, _ = tx.update(params, tx.init(params), params)
    moved: Any = optax.apply_updates(params, updates)
    ratio = {
        name: float(jnp.linalg.norm(moved[name]["kernel"] / params[name]["kernel"]))
        for name in params
    }
    assert ratio["a"] == pytest.approx(4, rel=1e-5)  # the norm of sixteen ones
    assert ratio["b"] != pytest.approx(4, rel=1e-2)


def test_a_kernel_of_another_name_keeps_its_norm():
    links = [spec.Dense("w"), spec.BatchNorm(), spec.Dense("head")]
    tx = bmo.keep_norms(
        bmo.backmatch_sgd(0.1, spec.LayerChain(links, input_shape=(8,))),
        spec.LayerChain(links, input_shape=(8,)),
    )
    params = {"w": 3 * jnp.eye(8), "head": {"kernel": jnp.eye(8)}}
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    norm = jnp.linalg.norm
    np.testing.assert_allclose(norm(after["w"]), norm(params["w"]), rtol=1e-6)
    assert norm(after["head"]["kernel"]) != norm(params["head"]["kernel"])


def test_it_is_an_ordinary_transformation():
    params = {
        "fc1": {"kernel": jnp.ones((5, 8))},
        "fc2": {"kernel": jnp.ones((8, 8))},
        "fc3": {"kernel": jnp.ones((8, 3))},
    }
    inner = bmo.backmatch_sgd(0.1, chain(), normalize=False)
    tx = bmo.keep_norms(inner, chain())
    state = tx.init(params)
    chex.assert_trees_all_equal(state, inner.init(params))  # no state of its own
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    _, state = update(params, state, params)
    updates, state = update(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    updates, _ = tx.update(halves, tx.init(halves), halves)
    chex.assert_trees_all_equal_dtypes(updates, halves)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(params, tx.init(zeros), zeros)
    chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_tiny_and_huge_kernels_keep_their_norm(size):
    kernels = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)
    params = {f"fc{i}": {"kernel": size * kernels[i - 1]} for i in (1, 2)}
    normed = spec.LayerChain(
        [spec.Dense("fc1"), spec.BatchNorm(), spec.Dense("fc2")], input_shape=(4,)
    )
    tx = bmo.keep_norms(optax.sgd(1.0), normed)
    updates: Any = tx.update(params, tx.init(params), params)[0]
    # Nothing is left of a kernel that the step takes to zero; else it keeps its norm.
    np.testing.assert_allclose(updates["fc1"]["kernel"], -params["fc1"]["kernel"])
    half = jax.tree.map(lambda p: np.float32(0.5) * np.flip(p), params)
    updates = tx.update(half, tx.init(params), params)[0]
    after = params["fc1"]["kernel"] + updates["fc1"]["kernel"]
    assert not np.allclose(after, params["fc1"]["kernel"], atol=0)
    norms = [np.linalg.norm(np.float64(k)) for k in (after, params["fc1"]["kernel"])]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


NORMED = spec.LayerChain(
    [spec.Dense("fc1"), spec.BatchNorm(), spec.Dense("fc2")], input_shape=(4,)
)
SQUARE = {f"fc{i}": {"kernel": jnp.ones((4, 4))} for i in (1, 2)}


def test_what_cannot_work_is_refused():
    plain = spec.LayerChain([spec.Dense("fc1"), spec.Dense("fc2")], input_shape=(4,))
    with pytest.raises(ValueError, match="no kernel right before a normalisation"):
        bmo.keep_norms(bmo.backmatch_sgd(0.1, plain, normalize=False), plain).init(
            SQUARE
        )
    tx = bmo.keep_norms(bmo.backmatch_sgd(0.1, NORMED, normalize=False), NORMED)
    with pytest.raises(ValueError, match="params is None"):
        tx.update(SQUARE, tx.init(SQUARE))
    with pytest.raises(ValueError, match=r"spec must be a .*LayerChain.* a list"):
        bmo.keep_norms(tx, [spec.Dense("fc1")])  # pyright: ignore
    with pytest.raises(ValueError, match=r"inner must be an .* but it is .*LayerChain"):
        bmo.keep_norms(NORMED, NORMED)  # pyright: ignore


def test_trees_without_leaves_and_gradients_of_none_go_through():
    tx = bmo.keep_norms(bmo.backmatch_sgd(0.1, NORMED, normalize=False), NORMED)
    updates: Any = tx.update({}, tx.init({}), {})[0]
    assert updates == {}
    some = {"fc1": {"kernel": None}, "fc2": SQUARE["fc2"]}
    updates = tx.update(some, tx.init(SQUARE), SQUARE)[0]
    assert updates["fc1"]["kernel"] is None
    assert jnp.all(updates["fc2"]["kernel"] != 0)


OTHERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.chain(
        bmo.scale_by_backmatch(NORMED, normalize=False), optax.adam(0.1)
    ),
    "adadelta": lambda: optax.adadelta(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "adan": lambda: optax.adan(0.1),
    "cocob": lambda: optax.contrib.cocob(),
    "dog": lambda: optax.contrib.dog(),
    "fromage": lambda: optax.fromage(0.1),
    "lbfgs": lambda: optax.lbfgs(0.1),
    "lion": lambda: optax.lion(0.1),
    "lsalr": lambda: optax.chain(bmo.scale_by_lsalr(), optax.sgd(0.1)),
    "mechanized adam": lambda: optax.contrib.mechanize(optax.adam(0.1)),
    "momo": lambda: optax.contrib.momo(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "polyak": lambda: optax.polyak_sgd(),
    "prodigy": lambda: optax.contrib.prodigy(0.1),
    "radam": lambda: optax.radam(0.1),
    "rprop": lambda: optax.rprop(0.1),
    "sign": lambda: optax.sign_sgd(0.1),
    "adam in steps": lambda: optax.MultiSteps(  # pyright: ignore
        optax.adam(0.1), 3
    ).gradient_transformation(),
    "adam in many steps": lambda: optax.MultiSteps(  # pyright: ignore
        optax.adam(0.1), 20
    ).gradient_transformation(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_whose_steps_are_not_in_proportion_are_refused(name):
    tx = bmo.keep_norms(OTHERS[name](), NORMED)
    with pytest.raises(ValueError, match=r"optimizer is more than momentum: ") as info:
        tx.init(SQUARE)
    if name != "lbfgs":  # whose line search wants the function itself
        assert "not in proportion to the gradient" in str(info.value)


MOMENTUM: dict[str, Callable[..., optax.GradientTransformation]] = {
    "backmatch": lambda: bmo.backmatch_sgd(
        0.1, NORMED, weight_decay=0.01, normalize=False
    ),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), bmo.backmatch_sgd(0.1, NORMED, normalize=False)
    ),
    "measured": lambda: optax.chain(
        bmo.scale_by_measured_backmatch(key=jax.random.key(0)), optax.sgd(0.1)
    ),
    "warmed up": lambda: optax.sgd(optax.linear_schedule(0.0, 0.1, 100), momentum=0.9),
    "in steps": lambda: optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation(),
    "in many steps": lambda: optax.MultiSteps(  # pyright: ignore
        optax.sgd(0.1), 100
    ).gradient_transformation(),
    "mechanized": lambda: optax.contrib.mechanize(  # whose first steps are tiny
        bmo.backmatch_sgd(0.1, NORMED, normalize=False)
    ),
    "partitioned": lambda: optax.partition(
        {"train": optax.sgd(0.1, momentum=0.9), "freeze": optax.set_to_zero()},
        {"fc1": "train", "fc2": "freeze"},
    ),
    "on a plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau()
    ),
}


@pytest.mark.parametrize("name", MOMENTUM)
def test_optimizers_with_momentum_alone_are_taken(name):
    inner = MOMENTUM[name]()
    state = bmo.keep_norms(inner, NORMED).init(SQUARE)
    chex.assert_trees_all_equal(state, inner.init(SQUARE))


def test_learning_rates_may_be_traced():
    def step(learning_rate):
        tx = bmo.keep_norms(
            bmo.backmatch_sgd(learning_rate, NORMED, normalize=False), NORMED
        )
        gradient = jax.tree.map(lambda p: p.at[0].set(0), SQUARE)
        return tx.update(gradient, tx.init(SQUARE), SQUARE)[0]

    rates = jnp.array([0.1, 0.2])
    both = jax.vmap(step)(rates)
    for index, rate in enumerate(rates):
        alone = jax.tree.map(lambda leaf, i=index: leaf[i], both)
        chex.assert_trees_all_close(alone, step(rate), rtol=1e-5)


def test_each_layer_of_a_stack_keeps_its_own_norm():
    links = [spec.Dense("layers"), spec.BatchNorm(), spec.Activation("relu")]
    net = spec.LayerChain([spec.Repeat(links, 3), spec.Dense("fc")], input_shape=(4,))
    key = jax.random.key(0)
    stack = (
        jax.random.normal(key, (3, 4, 4)) * jnp.array([1.0, 2.0, 3.0])[:, None, None]
    )
    params: Any = {"layers": {"kernel": stack}, "fc": {"kernel": jnp.eye(4)}}
    tx = bmo.keep_norms(bmo.backmatch_sgd(0.1, net, normalize=False), net)
    state, norms = tx.init(params), jnp.linalg.norm(stack, axis=(1, 2))
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    kept = jnp.linalg.norm(params["layers"]["kernel"], axis=(1, 2))
    np.testing.assert_allclose(kept, norms, 1e-6)
    assert not np.allclose(params["layers"]["kernel"], stack, 1e-2)
