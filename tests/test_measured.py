"""Measured scales, declared ones held against them, and training with them."""

import functools
import itertools
import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backmatch_optax as bmo
from backmatch_optax import activations as _activations
from backmatch_optax import moments as _moments
from backmatch_optax import spec
from backmatch_optax.powers import evaluate, number
from backmatch_optax.scales import walk

KEY = jax.random.key(0)


def mlp(params, x):
    for name in sorted(params)[:-1]:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name].get("bias", 0))
    return x @ params[sorted(params)[-1]]["kernel"]


def mlp_params(sizes, key=KEY, dtype=jnp.float32):
    keys = jax.random.split(key, len(sizes))
    return {
        f"fc{i}": {"kernel": jax.random.normal(k, shape, dtype) / shape[0] ** 0.5}
        for i, (k, shape) in enumerate(
            zip(keys[1:], itertools.pairwise(sizes), strict=True)
        )
    }


def brute_force(params, x):
    """1 / the mean Gauss-Newton diagonal of every kernel, from explicit Jacobians."""
    jacobian = jax.jacobian(mlp)(params, x)
    scales = {}
    for name, layer in jacobian.items():
        per_output = np.square(np.asarray(layer["kernel"], np.float64))
        diagonal = per_output.sum((0, 1)) / len(x)
        scales[name] = 1 / diagonal.mean()
    return scales


def test_measured_scales_are_those_of_the_explicit_gauss_newton_diagonal():
    params = mlp_params((6, 5, 4, 3))
    x = jax.random.normal(jax.random.key(1), (8, 6))
    measured = bmo.measure_layer_scales(mlp, params, x, key=KEY, num_probes=400)
    for name, scale in brute_force(params, x).items():
        error = measured.standard_errors[name]
        assert error < 0.1 * scale
        assert abs(measured.layer_scales[name] - scale) < 4 * error


def test_the_curvature_estimate_is_unbiased():
    # All 2^6 sign patterns of 2 outputs for 3 examples, by hand: their mean is exact.
    params = mlp_params((4, 3, 2))
    x = jax.random.normal(jax.random.key(2), (3, 4))
    _, pull_back = jax.vjp(lambda p: mlp(p, x), params)
    total = jax.tree.map(lambda leaf: 0.0, params)
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        (gradient,) = pull_back(jnp.reshape(jnp.array(signs), (3, 2)))
        total = jax.tree.map(lambda t, g: t + jnp.mean(g**2), total, gradient)
    for name, scale in brute_force(params, x).items():
        curvature = total[name]["kernel"] / 64 / len(x)
        np.testing.assert_allclose(1 / curvature, scale, rtol=1e-4)


def test_measuring_works_in_bfloat16_and_under_jit():
    x = jax.random.normal(jax.random.key(1), (64, 16))
    params = mlp_params((16, 16, 4))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    @jax.jit
    def measure(params, x):
        return bmo.measure_layer_scales(mlp, params, x, key=KEY)

    eager = bmo.measure_layer_scales(mlp, params, x, key=KEY).layer_scales
    jitted = measure(params, x).layer_scales
    half = measure(low, x.astype(jnp.bfloat16)).layer_scales
    for name, scale in eager.items():
        np.testing.assert_allclose(jitted[name], scale, rtol=1e-4)
        np.testing.assert_allclose(half[name], scale, rtol=0.05)
        assert half[name].dtype == jnp.float32


def test_a_layer_is_what_layer_of_says():
    params = mlp_params((4, 4, 2))
    params["fc0"]["bias"] = jnp.zeros(4)
    x = jnp.ones((2, 4))

    def names(**kwargs):
        return list(bmo.measure_layer_scales(mlp, params, x, key=KEY, **kwargs)[0])

    assert names() == ["fc0", "fc1"]
    everything = ["fc0/bias", "fc0/kernel", "fc1/kernel"]
    assert names(layer_of=lambda path: path) == everything
    assert names(layer_of=lambda path: "net") == ["net"]


def stacked_mlp(params, x):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    x, _ = jax.lax.scan(layer, x, params["layers"]["kernel"])
    return x @ params["head"]["kernel"]


def stacked_params(count):
    kernels = [*mlp_params((4,) * (count + 1)).values()]
    stack = jnp.stack([2.0 ** (k % 2) * of["kernel"] for k, of in enumerate(kernels)])
    return {"layers": {"kernel": stack}, "head": {"kernel": jnp.eye(4)}}


def test_each_layer_of_a_stack_is_measured_by_itself():
    params, x = stacked_params(3), jax.random.normal(KEY, (16, 4))
    options: Any = {"key": KEY, "num_probes": 8}
    found = bmo.measure_layer_scales(
        stacked_mlp, params, x, stacked=["layers"], **options
    )
    apart = {
        f"fc{k}": {"kernel": of} for k, of in enumerate(params["layers"]["kernel"])
    }
    apart["fc3"] = params["head"]
    expected = bmo.measure_layer_scales(mlp, apart, x, **options)
    for got, wanted in zip(found, expected, strict=True):
        *layers, head = wanted.values()
        chex.assert_trees_all_close(got, {"head": head, "layers": jnp.stack(layers)})


def test_training_measures_each_layer_of_a_stack_by_itself():
    params, x = stacked_params(3), jax.random.normal(KEY, (16, 4))
    apart = {
        f"fc{k}": {"kernel": of} for k, of in enumerate(params["layers"]["kernel"])
    }
    apart["fc3"] = params["head"]
    stack = bmo.scale_by_measured_backmatch(
        key=KEY, stacked=["layers"], refresh_every=2
    )
    single = bmo.scale_by_measured_backmatch(key=KEY, refresh_every=2)
    state: Any = stack.init(params)
    other = single.init(apart)
    updates: Any = None
    wanted: Any = None
    assert state.layer_scales["layers"].shape == (3,)
    shapes = jax.tree.map(jnp.shape, state)
    for _ in range(3):
        updates, state = stack.update(
            params, state, params, outputs_fn=lambda p: stacked_mlp(p, x)
        )
        wanted, other = single.update(
            apart, other, apart, outputs_fn=lambda p: mlp(p, x)
        )
    assert jax.tree.map(jnp.shape, state) == shapes
    kernels = [of["kernel"] for of in wanted.values()]
    chex.assert_trees_all_close(updates["layers"]["kernel"], jnp.stack(kernels[:-1]))
    chex.assert_trees_all_close(updates["head"]["kernel"], kernels[-1])


def test_stacks_in_stacks_are_measured_layer_by_layer():
    params = {"outer": {"inner": {"kernel": jnp.ones((3, 2, 4))}}}

    def fn(params, x):
        return x * params["outer"]["inner"]["kernel"].sum()

    stacked = ["outer", "outer/inner"]
    scales = bmo.measure_layer_scales(
        fn, params, jnp.ones((2, 1)), key=KEY, stacked=stacked
    ).layer_scales
    assert scales["outer/inner"].shape == (3, 2)
    assert jnp.ptp(scales["outer/inner"]) == 0


@pytest.mark.parametrize(
    ("stacked", "message"),
    [
        (["layer"], "stacked: no parameter at 'layer'. Available"),
        (
            ["layers", "layers", "layers", "layers"],
            r"'layers/kernel' of shape \(3, 4, 4\)",
        ),
        ([""], r"'layers/kernel' .* same length as all of 'net'"),
    ],
)
def test_a_stack_that_is_none_is_refused(stacked, message):
    with pytest.raises(ValueError, match=message):
        bmo.measure_layer_scales(
            stacked_mlp,
            stacked_params(3),
            jnp.ones((2, 4)),
            key=KEY,
            stacked=stacked,
            layer_of=lambda path: "net",
        )


def test_compared_scales_of_a_stack_are_named_by_layer():
    params, x = stacked_params(2), jax.random.normal(KEY, (256, 4))

    def wrong(params, x):
        x = x @ params["layers"]["kernel"][0]
        return 9 * x @ params["layers"]["kernel"][1] @ params["head"]["kernel"]

    links = [spec.Repeat([spec.Dense("layers")], 2), spec.Dense("head")]
    chain = spec.LayerChain(links, input_shape=(4,))
    compared = bmo.compare_scales(chain, params, wrong, x, key=KEY)
    assert [*compared.ratios] == ["layers[0]", "layers[1]", "head"]
    assert all(ratio > 9 for ratio in compared.ratios.values())
    assert "layers[1]" in str(compared)
    assert [*compared.suspects] == ["head"]


def test_a_layer_that_no_gradient_reaches_has_an_infinite_scale():
    params = mlp_params((4, 4, 2))
    params["fc1"]["kernel"] *= 0
    measured = bmo.measure_layer_scales(mlp, params, jnp.ones((2, 4)), key=KEY)
    assert measured.layer_scales["fc0"] == jnp.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_probes": 0}, r"num_probes \(=0\) must be an int of at least 1"),
        ({"num_probes": 1.5}, r"num_probes \(=1.5\)"),
        ({"num_probes": True}, r"num_probes \(=True\)"),
        ({"key": 0}, "must be a random key such as jax.random.key.* 0, a int"),
        ({"params": {"fc0": {"kernel": jnp.ones((4, 2), int)}}}, "'fc0/kernel'.*int32"),
        ({"fn": lambda p, x: x.astype(int)}, "real floating dtype.*int32"),
        ({"fn": lambda p, x: x.sum()}, r"batch as first axis.*\(\)"),
        ({"fn": lambda p, x: (x, x[:1])}, r"batch as first axis.*\(2, 4\).*\(1, 4\)"),
    ],
)
def test_bad_input_is_explained(change, message):
    arguments: Any = {"fn": mlp, "params": mlp_params((4, 2)), "num_probes": 1}
    arguments |= {"key": KEY} | change
    fn, params = arguments.pop("fn"), arguments.pop("params")
    with pytest.raises(ValueError, match=message):
        bmo.measure_layer_scales(fn, params, jnp.ones((2, 4)), **arguments)


class ConvNet(nn.Module):
    """Small, and every declared mistake below fits its shapes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), padding="CIRCULAR", use_bias=False)(x)
        x = nn.BatchNorm(False, use_scale=False, use_bias=False)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.Conv(16, (3, 3), padding="CIRCULAR", use_bias=False)(x)
        x = nn.BatchNorm(False, use_scale=False, use_bias=False)(x)
        x = nn.relu(x)
        x = nn.Conv(16, (3, 3), padding="CIRCULAR", use_bias=False)(x)
        x = nn.BatchNorm(False, use_scale=False, use_bias=False)(x)
        return nn.Dense(10, use_bias=False)(nn.relu(x).mean((1, 2)))


RELU, POOL = spec.Activation("relu"), spec.MaxPool((2, 2), strides=2)
CONVS = [spec.Conv(f"Conv_{i}", padding="CIRCULAR") for i in range(3)]
LINKS = [
    *(CONVS[0], spec.BatchNorm(), RELU, POOL),
    *(CONVS[1], spec.BatchNorm(), RELU),
    *(CONVS[2], spec.BatchNorm(), RELU),
    *(spec.GlobalAvgPool(), spec.Dense("Dense_0")),
]


@pytest.fixture(scope="module")
def conv_net():
    x = jax.random.normal(jax.random.key(1), (64, 8, 8, 8))
    variables = ConvNet().init(jax.random.key(2), x)

    def fn(params, x):
        variables_now = {**variables, "params": params}
        return ConvNet().apply(variables_now, x, mutable=["batch_stats"])[0]

    return fn, variables["params"], x


def compare(conv_net, links, input_shape=(8, 8, 8)):
    fn, params, x = conv_net
    chain = spec.LayerChain(links, input_shape=input_shape)
    return bmo.compare_scales(chain, params, fn, x, key=KEY, num_probes=4)


def test_a_right_declaration_agrees_at_every_layer(conv_net):
    compared = compare(conv_net, LINKS)
    assert not compared.suspects
    ratios = list(compared.ratios.values())
    assert max(ratios) / min(ratios) < 1.5, str(compared)
    assert "Conv_1" in str(compared)


@pytest.mark.parametrize(
    ("mistake", "links", "where", "named"),
    [
        # All positions above it are then wrong, first of all those of the global mean.
        ("a forgotten pooling", [*LINKS[:3], *LINKS[4:]], "Conv_2", "GlobalAvgPool"),
        ("a forgotten BatchNorm", [*LINKS[:8], *LINKS[9:]], "Dense_0", "Conv_2"),
        (
            "a constant that is not there",
            [*LINKS[:11], spec.Scale(3.0), *LINKS[11:]],
            "Dense_0",
            "Scale",
        ),
    ],
)
def test_a_wrong_declaration_is_found_where_it_is(
    conv_net, mistake, links, where, named
):
    # The kernel of Conv_2 is made larger, else its BatchNorm would have little to do.
    fn, params, x = conv_net
    params = params | {"Conv_2": {"kernel": 4 * params["Conv_2"]["kernel"]}}
    suspects = compare((fn, params, x), links).suspects
    assert where in suspects, mistake
    assert named in suspects[where]


def test_a_wrong_sharing_factor_shows():
    # Declared on 4 positions instead of 64: shapes cannot tell.
    params = {"fc0": {"kernel": jax.random.normal(KEY, (8, 8)) / 8**0.5}}
    x = jax.random.normal(jax.random.key(3), (32, 64, 8))

    def fn(params, x):
        return x @ params["fc0"]["kernel"]

    def suspects(positions):
        chain = spec.LayerChain([spec.Dense("fc0")], input_shape=(positions, 8))
        return bmo.compare_scales(chain, params, fn, x, key=KEY).suspects

    assert "fc0" in suspects(4)
    assert not suspects(64)


def test_compare_rejects_a_tolerance_of_one(conv_net):
    fn, params, x = conv_net
    chain = spec.LayerChain(LINKS, input_shape=(8, 8, 8))
    with pytest.raises(ValueError, match=r"tolerance \(=1.0\) must be above 1"):
        bmo.compare_scales(chain, params, fn, x, key=KEY, tolerance=1.0)


def residual_net():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(128, use_bias=False)(x)
            y = nn.relu(nn.BatchNorm(False)(y))
            y = nn.BatchNorm(False)(nn.Dense(128, use_bias=False)(y))
            return nn.relu(x + y)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(3):
                x = Block()(x)
            return nn.Dense(10)(x)

    links = []
    for i in range(3):
        at = f"Block_{i}"
        branch = [
            *(spec.Dense(f"{at}/Dense_0"), spec.BatchNorm(f"{at}/BatchNorm_0"), RELU),
            *(spec.Dense(f"{at}/Dense_1"), spec.BatchNorm(f"{at}/BatchNorm_1")),
        ]
        links += [spec.Residual(branch), RELU]
    return Net(), [*links, spec.Dense("Dense_0")]


def plain_net(depth, norm):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(depth):
                init = nn.initializers.he_normal()
                x = nn.Dense(128, use_bias=False, kernel_init=init)(x)
                x = nn.BatchNorm(False)(x) if norm else x
                x = nn.relu(x)
            return nn.Dense(10)(x)

    links = []
    for i in range(depth):
        norms = [spec.BatchNorm(f"BatchNorm_{i}")] if norm else []
        links += [spec.Dense(f"Dense_{i}"), *norms, RELU]
    return Net(), [*links, spec.Dense(f"Dense_{depth}")]


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("residual", residual_net()),
        ("BN-MLP of 8 layers", plain_net(8, norm=True)),
        ("plain MLP of 4 layers", plain_net(4, norm=False)),
    ],
)
def test_mean_field_gains_predict_what_is_measured(name, net):
    model, links = net
    x = jax.random.normal(jax.random.key(1), (256, 128))
    variables = model.init(jax.random.key(2), x)
    stats = {k: v for k, v in variables.items() if k != "params"}

    def fn(params, x):
        return model.apply({"params": params} | stats, x, mutable=["batch_stats"])[0]

    chain = spec.LayerChain(links, input_shape=(128,))
    compared = bmo.compare_scales(chain, variables["params"], fn, x, key=KEY)
    kernels = [ratio for path, ratio in compared.ratios.items() if "Dense" in path]
    assert max(kernels) / min(kernels) < 1.5, f"{name}\n{compared}"


def test_the_backward_factor_of_deep_normalised_relu_nets_grows_by_pi_over_pi_less_1():
    _, links = plain_net(20, norm=True)
    kernel = jnp.full((64, 64), 0.125)
    params = {f"Dense_{i}": {"kernel": kernel} for i in range(20)}
    params |= {f"Dense_{20}": {"kernel": jnp.full((64, 10), 0.125)}}
    links = [spec.BatchNorm() if "BatchNorm" in repr(link) else link for link in links]
    chain = spec.LayerChain(links, input_shape=(64,))
    scales = bmo.layer_scales(chain, params, gains="mean_field", normalize=False)
    growth = float(scales["Dense_5"] / scales["Dense_15"]) ** (1 / 10)
    assert growth == pytest.approx(1 - 1 / math.pi, rel=1e-4)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "tanh", "gelu", "silu", "elu"])
@pytest.mark.parametrize("mean_square", [0.0, 0.7])
@pytest.mark.parametrize("window", [1, 4])
def test_moments_after_an_activation_are_those_of_samples(name, mean_square, window):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2000, 1, 1))
    means = math.sqrt(mean_square) * (means - means.mean()) / means.std()
    values = means + math.sqrt(1.3) * rng.normal(size=(2000, 500, window))
    phi = _activations.activation(name)
    largest = values.max(-1).astype(np.float32)
    outputs, slopes = map(
        np.asarray, jax.jvp(phi, (largest,), (jnp.ones_like(largest),))
    )
    before = _moments.Moments(number(1.3), number(mean_square) if mean_square else None)
    before, gain = _activations.after_activation(name, before)
    if window > 1:
        alone = gain
        before, more = _activations.after_max_pool(before, window)
        gain = more * alone
    q, variance, gain = (
        float(v) for v in evaluate([before.q, before.variance, gain], jnp.dtype("f4"))
    )
    assert q == pytest.approx(np.square(outputs).mean(), rel=0.02)
    assert variance == pytest.approx(outputs.var(1).mean(), rel=0.02)
    assert gain == pytest.approx(np.square(slopes).mean(), rel=0.02)


@pytest.mark.parametrize(
    ("links", "centred"),
    [
        ([spec.Transpose((1, 0, 2))], True),
        ([spec.Transpose((2, 0, 1))], False),
        ([spec.Flatten()], True),
        ([spec.Reshape((2, 4, 2))], False),
        ([spec.Concatenate([[], []])], True),
        ([spec.Concatenate([[], []], axis=-2)], False),
    ],
    ids=repr,
)
def test_a_batch_norm_centres_what_stays_a_feature(links, centred):
    links = [spec.Dense("a"), *links, spec.BatchNorm()]
    chain = spec.LayerChain(links, input_shape=(2, 2, 4))
    params = {"a": {"kernel": jnp.eye(4)}}
    sites = walk(chain, params, gains="mean_field", norm_floor=0.0, unlisted="error")
    assert sites[0].centred == centred


@pytest.mark.parametrize(("branch", "centred"), [([RELU], False), ([], True)])
def test_a_branch_with_an_activation_ends_what_a_batch_norm_centres(branch, centred):
    # As in a pre-activation network, where a BatchNorm follows the residual.
    links = [RELU, spec.Dense("a"), spec.Residual(branch), spec.BatchNorm()]
    chain = spec.LayerChain([*links, spec.Dense("b")], input_shape=(8,))
    params = {name: {"kernel": jnp.full((8, 8), 8**-0.5)} for name in "ab"}
    sites = walk(chain, params, gains="mean_field", norm_floor=0.0, unlisted="error")
    assert sites[1].centred == centred


def test_a_shortcut_keeps_the_sign_of_a_mean():
    # relu(x) + y for unrelated x and y: positive on the whole, so mostly passed on.
    x, y = np.random.default_rng(0).normal(size=(2, 10**6))
    relu, _ = _activations.after_activation("relu", _moments.Moments(number(1.0)))
    after, gain = _activations.after_activation(
        "relu", relu + _moments.Moments(number(1))
    )
    total = np.maximum(x, 0) + y
    figures = [after.q, gain, after.offset]
    figures = [float(value) for value in evaluate(figures, jnp.dtype("f4"))]
    expected = [np.maximum(total, 0).var() + np.maximum(total, 0).mean() ** 2]
    expected += [(total > 0).mean(), np.maximum(total, 0).mean() ** 2]
    np.testing.assert_allclose(figures, expected, rtol=0.03)


def step(tx, params: Any, x, y, state: Any = None) -> tuple[Any, Any, Any, Any]:
    def loss(params):
        return jnp.mean((mlp(params, x) - y) ** 2)

    state = tx.init(params) if state is None else state
    gradient = jax.grad(loss)(params)
    updates, state = tx.update(
        gradient, state, params, outputs_fn=lambda params: mlp(params, x)
    )
    return optax.apply_updates(params, updates), state, updates, gradient


def test_training_with_measured_scales_multiplies_by_them():
    params = mlp_params((8, 8, 4))
    x = jax.random.normal(jax.random.key(1), (16, 8))
    tx = bmo.scale_by_measured_backmatch(key=KEY, normalize=False)
    _, state, updates, gradient = step(tx, params, x, jnp.ones((16, 4)))
    scales: Any = optax.tree.get(state, "layer_scales")
    for name in params:
        expected = gradient[name]["kernel"] * scales[name]
        np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-5)


def test_scales_are_refreshed_every_so_often_and_averaged():
    params = mlp_params((8, 8, 4))
    x = jax.random.normal(jax.random.key(1), (512, 8))
    tx = bmo.scale_by_measured_backmatch(
        key=KEY, refresh_every=3, decay=0.5, normalize=False
    )
    state, seen = None, []
    for _ in range(7):
        _, state, _, _ = step(tx, params, x, jnp.ones((512, 4)), state)
        seen.append(np.array([*state.layer_scales.values()]))
    same = [bool((a == b).all()) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False, True, True, False]
    # At fixed parameters the average tends to the scale itself.
    exact = list(brute_force(params, x).values())
    np.testing.assert_allclose(seen[-1], exact, rtol=0.3)


def test_scales_may_be_measured_at_the_first_step_alone():
    params = mlp_params((8, 8, 4))
    x = jax.random.normal(jax.random.key(1), (16, 8))
    tx = bmo.scale_by_measured_backmatch(key=KEY, refresh_every=None, limit=None)
    other = bmo.scale_by_measured_backmatch(key=KEY, refresh_every=1000, limit=None)
    params, state, updates, _ = step(tx, params, x, jnp.ones((16, 4)))
    expected = step(other, mlp_params((8, 8, 4)), x, jnp.ones((16, 4)))
    chex.assert_trees_all_equal(updates, expected[2])
    # Later steps do not run the model: here it would give NaN.
    later: Any = state
    for _ in range(3):
        _, later, _, _ = step(tx, params, jnp.nan * x, jnp.ones((16, 4)), later)
    chex.assert_trees_all_equal(later.layer_scales, state.layer_scales)
    assert len({float(scale) for scale in later.layer_scales.values()}) == 2
    assert later.steps == 4


def test_a_parameter_at_the_top_of_the_tree_is_a_layer_by_itself():
    params = {"positions": jnp.ones((4, 2)), "fc": {"kernel": jnp.ones((4, 2))}}

    def fn(params, x):
        return x @ params["fc"]["kernel"] + x @ params["positions"]

    measured = bmo.measure_layer_scales(fn, params, jnp.ones((2, 4)), key=KEY)
    assert list(measured.layer_scales) == ["fc", "positions"]


def test_measured_training_is_jittable_donatable_and_learns():
    params = mlp_params((8, 32, 4))
    x = jax.random.normal(jax.random.key(1), (64, 8))
    y = mlp(mlp_params((8, 32, 4), jax.random.key(5)), x)
    tx = optax.chain(
        bmo.scale_by_measured_backmatch(key=KEY, normalize=False),
        optax.sgd(0.02, momentum=0.9),
    )
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, x, y):
        params, state, *_ = step(tx, params, x, y, state)
        return params, state, jnp.mean((mlp(params, x) - y) ** 2)

    losses = []
    for _ in range(100):
        params, state, loss = train_step(params, state, x, y)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert optax.tree.get(tx.init(params), "steps") == 0  # the key was not donated


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ({"params": None, "outputs_fn": lambda p: p}, "params is None"),
        ({"params": {"fc0": {"kernel": jnp.ones((2, 2))}}}, "outputs_fn is None"),
    ],
)
def test_what_measured_training_needs_is_asked_for(arguments, missing):
    tx = bmo.scale_by_measured_backmatch(key=KEY, normalize=False)
    params = {"fc0": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=missing):
        tx.update(params, tx.init(params), **arguments)


def test_refresh_every_and_decay_must_be_in_range():
    with pytest.raises(ValueError, match=r"refresh_every \(=0\)"):
        bmo.scale_by_measured_backmatch(key=KEY, refresh_every=0, normalize=False)
    with pytest.raises(ValueError, match=r"decay \(=1\.0\) must be a number below 1"):
        bmo.scale_by_measured_backmatch(key=KEY, decay=1.0, normalize=False)


@pytest.mark.parametrize("wrong", [{"key": 0}, {"outputs_fn": 3}])
def test_a_key_and_a_function_are_asked_for_at_construction(wrong):
    with pytest.raises(ValueError, match=r"key|outputs_fn"):
        arguments: Any = {"key": KEY} | wrong
        bmo.scale_by_measured_backmatch(**arguments)


def test_a_parameter_may_be_a_number():
    state: Any = bmo.scale_by_measured_backmatch(key=KEY).init({"a": 1.0})
    assert [*state.layer_scales] == ["a"]


@pytest.mark.parametrize("decay", [jnp.float32(1), np.float64(1), -0.1, "half"])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay \(=.*must be a number below 1"):
        bmo.scale_by_measured_backmatch(key=KEY, decay=decay)


def test_a_decay_may_be_an_array():
    params, x = mlp_params((4, 2)), jnp.ones((2, 4))
    states = []
    for decay in (0.5, jnp.float32(0.5)):
        tx = bmo.scale_by_measured_backmatch(key=KEY, decay=decay)
        states.append(step(tx, params, x, jnp.ones((2, 2)))[1])
    chex.assert_trees_all_equal(states[0].curvatures, states[1].curvatures)


def test_measuring_zeros_makes_no_nan():
    with jax.debug_nans(True):
        params = optax.tree.zeros_like(mlp_params((4, 4, 2)))
        measured = bmo.measure_layer_scales(mlp, params, jnp.ones((2, 4)), key=KEY)
    assert measured.standard_errors["fc0"] == jnp.inf


@pytest.mark.parametrize("factor", [math.nan, 1e30])
def test_compare_says_where_nothing_finite_is_measured(factor):
    params = mlp_params((4, 4))
    chain = spec.LayerChain([spec.Dense("fc0")], input_shape=(4,))
    with pytest.raises(ValueError, match=r"not finite numbers.* 'fc0'"):
        bmo.compare_scales(chain, params, mlp, jnp.full((2, 4), factor), key=KEY)


@pytest.mark.parametrize("normalize", [False, True])
def test_measured_scales_with_64_bit_jax(normalize):
    with jax.enable_x64(True):
        params = {"fc": {"kernel": 2 * jnp.eye(4, dtype=jnp.float32)}}
        x = jnp.array([[2.0, -2.0, 2.0, -2.0]], jnp.float32)
        tx = bmo.scale_by_measured_backmatch(key=KEY, decay=0.5, normalize=normalize)
        update = jax.jit(
            lambda g, s, p: tx.update(
                g, s, p, outputs_fn=lambda p: x @ p["fc"]["kernel"]
            )
        )
        state: Any = tx.init(params)
        updates: Any = params
        for _ in range(2):
            updates, state = update(params, state, params)
        assert updates["fc"]["kernel"].dtype == jnp.float32
        wanted = 1.0 if normalize else 0.25
        chex.assert_trees_all_close(state.layer_scales, {"fc": wanted}, rtol=1e-6)


def test_a_parameter_without_entries_does_not_count():
    params = {"fc": {"kernel": 2 * jnp.eye(4)}, "none": {"w": jnp.zeros((0,))}}
    x = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    tx = bmo.scale_by_measured_backmatch(key=KEY, normalize=True)
    state: Any
    _, state = tx.update(
        params, tx.init(params), params, outputs_fn=lambda p: x @ p["fc"]["kernel"]
    )
    chex.assert_trees_all_close(state.layer_scales, {"fc": 1.0, "none": 1.0}, rtol=1e-6)
    with pytest.raises(ValueError, match="params holds no array"):
        bmo.measure_layer_scales(lambda p, x: x, {}, x, key=KEY)
