"""Exact back-matching propagation against least squares solved by NumPy."""

import dataclasses
import functools
import math
import re
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import backmatch_optax as bmo
from backmatch_optax import exact, spec
from backmatch_optax.exact import linen as exact_linen
from backmatch_optax.exact import nnx as exact_nnx


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0):
    """NumPy's, since every shape would be a program of its own to JAX."""
    return np.random.default_rng([seed, *shape]).normal(size=shape)


@dataclasses.dataclass
class Case:
    """A linear layer of some kind, its shapes and its ordinary counterpart."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def exact(self, x, kernel, bias=None, **options):
        layer = exact.dense if len(self.kernel) == 2 else exact.conv
        return layer(x, kernel, bias, **self.options, **options)

    def ordinary(self, x, kernel) -> Any:
        """Flax's own layer, without bias."""
        features, window = self.kernel[-1], self.kernel[:-2]
        if not window:
            module = nn.Dense(features, use_bias=False)
        else:
            module = nn.Conv(features, window, use_bias=False, **self.options)
        return module.apply({"params": {"kernel": kernel}}, x)

    @functools.cached_property
    def arrays(self):
        """Input, kernel, bias, and a wanted change of the output."""
        x, kernel = normal(*self.x), normal(*self.kernel, seed=1)
        shape = jax.eval_shape(self.ordinary, jnp.asarray(x), jnp.asarray(kernel)).shape
        return x, kernel, normal(self.kernel[-1], seed=2), normal(*shape, seed=3)

    @functools.cached_property
    def compiled(self):
        """`fn(damping)`: output and directions of input, kernel and bias."""
        x, kernel, bias, wanted = self.arrays

        @jax.jit
        def run(damping, x, kernel, bias, wanted):
            layer = functools.partial(self.exact, damping=damping)
            y, pull_back = jax.vjp(layer, x, kernel, bias)
            return y, *pull_back(wanted / len(wanted))

        return lambda damping: list(
            map(np.asarray, run(damping, x, kernel, bias, wanted))
        )

    @functools.cached_property
    def system(self):
        """What every weight does to every output: (outputs, weights and bias)."""
        x, kernel, bias, wanted = self.arrays
        basis = np.eye(kernel.size).reshape(-1, *kernel.shape)
        weights = jax.jit(jax.vmap(self.ordinary, (None, 0)))(x, basis)
        ones = np.broadcast_to(np.eye(len(bias)), (*wanted.shape, len(bias)))
        return np.concatenate(
            [
                np.asarray(weights).reshape(kernel.size, -1).T,
                ones.reshape(-1, len(bias)),
            ],
            axis=1,
        )

    @functools.cached_property
    def columns(self):
        """What every unit of one example does to every output: (units, outputs)."""
        basis = np.eye(math.prod(self.x[1:])).reshape(-1, *self.x[1:])
        return np.asarray(jax.jit(self.ordinary)(basis, self.arrays[1])).reshape(
            len(basis), -1
        )


CASES = {
    "dense": Case((7, 3), (3, 4)),
    "dense on an image": Case((2, 3, 3, 4), (4, 2)),
    "conv": Case((3, 5, 5, 2), (3, 3, 2, 3), {"padding": "VALID"}),
    "padded": Case((3, 4, 4, 2), (3, 3, 2, 3)),
    "strided": Case((3, 6, 5, 2), (3, 2, 2, 3), {"strides": 2, "padding": [1, (0, 2)]}),
    "dilated": Case((4, 9, 2), (3, 2, 3), {"kernel_dilation": 2, "padding": "CAUSAL"}),
    "circular": Case((3, 4, 5, 2), (3, 4, 2, 3), {"padding": "CIRCULAR"}),
    "grouped": Case((4, 4, 4, 4), (2, 2, 2, 6), {"feature_group_count": 2}),
    "3d": Case((3, 3, 4, 3, 1), (2, 2, 2, 1, 2)),
    "video": Case((2, 3, 5, 5, 2), (2, 2, 2, 3), {"strides": (2, 1)}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def directions(layer, wanted, *arguments):
    """Its cotangents for a wanted change of the output, under a mean over the batch."""

    @jax.jit
    def pulled_back(wanted, *arguments):
        return jax.vjp(layer, *arguments)[1](wanted / wanted.shape[0])

    return list(map(np.asarray, pulled_back(jnp.asarray(wanted), *arguments)))


# --- Linear layers -------------------------------------------------------------------


@every_case
def test_linear_layers_solve_their_least_squares(x64, case):
    """Written out and solved by NumPy, without damping and with."""
    x, kernel, bias, wanted = case.arrays
    batch, target = len(x), wanted.ravel()
    y, x_change, kernel_change, bias_change = case.compiled(0.0)
    np.testing.assert_allclose(
        y.ravel(), case.system @ np.concatenate([kernel.ravel(), bias]), atol=1e-10
    )
    # BM (10), (13), (23): all examples and positions are equations for the weights.
    solution, *_ = np.linalg.lstsq(case.system, target)
    found = np.concatenate([kernel_change.ravel(), bias_change])
    np.testing.assert_allclose(found, solution, rtol=1e-9, atol=1e-10)
    # BM (11), (12), (22): each unit of the input by itself.
    for example in range(batch):
        wanted_here = wanted[example].ravel()
        solution = [
            np.linalg.lstsq(c[:, None], wanted_here)[0][0] for c in case.columns
        ]
        # A vjp carries wanted / batch, for a mean over the batch.
        found = x_change[example].ravel() * batch
        np.testing.assert_allclose(found, solution, rtol=1e-10, atol=1e-12)

    damping = 0.3  # a ridge relative to the mean diagonals of both problems
    _, x_change, kernel_change, bias_change = case.compiled(damping)
    lengths = np.square(case.columns).sum(1)
    solution = wanted.reshape(batch, -1) @ case.columns.T / batch
    solution /= lengths + damping * lengths.mean()
    np.testing.assert_allclose(x_change.reshape(batch, -1), solution, rtol=1e-9)
    if "feature_group_count" in case.options:  # a group has a diagonal of its own
        return
    matrix = case.system.T @ case.system / batch
    ridge = damping * np.trace(matrix) / len(matrix)
    gradient = case.system.T @ target / batch
    solution = np.linalg.solve(matrix + ridge * np.eye(len(matrix)), gradient)
    found = np.concatenate([kernel_change.ravel(), bias_change])
    np.testing.assert_allclose(found, solution, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dense", "padded"])
def test_without_a_bias_the_kernel_is_solved_for_alone(x64, name):
    case = CASES[name]
    x, kernel, _, wanted = case.arrays
    (found,) = directions(functools.partial(case.exact, x), wanted, kernel)
    system = case.system[:, : kernel.size]
    solution, *_ = np.linalg.lstsq(system, wanted.ravel())
    np.testing.assert_allclose(found.ravel(), solution, rtol=1e-9, atol=1e-12)


def test_a_wanted_change_that_the_weights_can_make_is_made(x64):
    x, kernel, bias, _ = CASES["conv"].arrays
    step, shift = 3 * kernel**2, 2 * bias
    wanted = CASES["conv"].ordinary(x, step) + shift
    layer = functools.partial(CASES["conv"].exact, x)
    change, bias_change = directions(layer, wanted, kernel, bias)
    np.testing.assert_allclose(change, step, rtol=1e-9)
    np.testing.assert_allclose(bias_change, shift, rtol=1e-9)


def white(batch, features):
    """Inputs with mean zero and E[a a^T] = I, exactly."""
    inputs = normal(batch, features)
    return np.linalg.qr(inputs - inputs.mean(0))[0] * batch**0.5


def orthonormal(size, seed=0):
    return np.linalg.qr(normal(size, size, seed=seed))[0]


def test_it_is_back_propagation_for_white_inputs_and_unit_weights(x64):
    """BM (14), (15): the rescalings are by one."""
    x, kernel, bias, wanted = white(16, 5), orthonormal(5), np.ones(5), normal(16, 5)
    found = directions(exact.dense, wanted, x, kernel, bias)
    expected = directions(lambda x, w, b: x @ w + b, wanted, x, kernel, bias)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_the_scalar_rule_is_exact_where_its_approximations_hold(x64):
    """Scales are the ratios of the exact directions to BP's, layer by layer."""
    kernels = [c * orthonormal(6, seed=i) for i, c in enumerate((3.0, 0.5, 2.0))]
    params = {f"fc{i}": {"kernel": jnp.asarray(k)} for i, k in enumerate(kernels)}
    x, wanted = white(32, 6), normal(32, 6, seed=3)

    def directions_by(dense):
        def loss(params):
            z = x
            for layer in params.values():
                z = dense(z, layer["kernel"])
            return jnp.sum(wanted * z, -1).mean()

        return jax.jit(jax.grad(loss))(params)

    chain = spec.LayerChain([spec.Dense(path) for path in params], input_shape=(6,))
    scales = bmo.layer_scales(params, chain)
    ordinary, matched = directions_by(jnp.matmul), directions_by(exact.dense)
    for path, scale in scales.items():
        np.testing.assert_allclose(
            matched[path]["kernel"], scale * ordinary[path]["kernel"], atol=1e-10
        )


def test_the_scalar_rule_of_a_convolution_is_exact_where_its_approximations_hold(x64):
    """With the sharing factor: one 3x3 convolution of 25 positions, white patches."""
    kernel = normal(3, 3, 2, 4)
    # All rows of W_col alike, and as many taps at every position.
    kernel = kernel / np.sqrt(np.square(kernel).sum((0, 1, 3), keepdims=True))
    x, wanted = normal(6, 5, 5, 2), normal(6, 5, 5, 4)
    convolve = functools.partial(exact.conv, padding="CIRCULAR")
    moment = 25 * jnp.eye(18)[None]
    found = directions(
        functools.partial(convolve, second_moment=moment), wanted, x, kernel
    )
    case = Case(x.shape, kernel.shape, {"padding": "CIRCULAR"})
    expected = directions(case.ordinary, wanted, x, kernel)
    params = {"below": {"kernel": jnp.eye(2)}, "cv": {"kernel": jnp.asarray(kernel)}}
    chain = spec.LayerChain(
        [spec.Dense("below"), spec.Conv("cv", padding="CIRCULAR")],
        input_shape=(5, 5, 2),
    )
    scales = bmo.layer_scales(params, chain)
    np.testing.assert_allclose(found[1], scales["cv"] * expected[1], rtol=1e-9)
    below = 25 * scales["below"]  # which has 25 positions of its own
    np.testing.assert_allclose(found[0], below * expected[0], rtol=1e-9)


def test_with_much_damping_the_weights_follow_the_scalar_rule(x64):
    x, kernel, _, wanted = map(jnp.asarray, CASES["conv"].arrays)
    much = 1e9
    layer = functools.partial(CASES["conv"].exact, x, damping=much)
    (found,) = directions(layer, wanted, kernel)
    (gradient,) = directions(
        functools.partial(CASES["conv"].ordinary, x), wanted, kernel
    )
    mean_diagonal = np.trace(exact.second_moment(x, kernel, padding="VALID")[0]) / 18
    np.testing.assert_allclose(much * found, gradient / mean_diagonal, rtol=1e-6)


def test_a_unit_that_no_weight_leaves_is_not_asked_to_change():
    kernel = jnp.array([[0.0, 0.0], [1.0, 2.0]])
    x, wanted = jnp.ones((4, 2)), jnp.ones((4, 2))
    layer = functools.partial(exact.dense, kernel=kernel)
    (change,) = directions(layer, wanted, x)
    np.testing.assert_allclose(4 * change, [[0.0, 3 / 5]] * 4, rtol=1e-6)
    (change,) = directions(
        functools.partial(exact.dense, kernel=0 * kernel, damping=0.1), wanted, x
    )
    np.testing.assert_array_equal(change, 0)


def test_a_second_moment_of_ones_own_takes_the_place_of_the_batch_s(x64):
    x, kernel, bias, wanted = map(jnp.asarray, CASES["grouped"].arrays)
    options = CASES["grouped"].options
    moment = exact.second_moment(x, kernel, bias, **options)
    layer = functools.partial(CASES["grouped"].exact, x)
    own = directions(layer, wanted, kernel, bias)
    given = directions(
        functools.partial(layer, second_moment=4 * moment), wanted, kernel, bias
    )
    for one, other in zip(own, given, strict=True):
        np.testing.assert_allclose(one, 4 * other, rtol=1e-10)
    # It stands in for a batch that is too small.
    few = functools.partial(
        exact.dense, jnp.ones((1, 3)), second_moment=jnp.eye(3)[None]
    )
    assert np.isfinite(directions(few, jnp.ones((1, 2)), jnp.ones((3, 2)))[0]).all()


@jax.jit
def dense_directions(x, kernel, wanted):
    return jax.vjp(exact.dense, x, kernel)[1](wanted / len(wanted))


@hypothesis.given(
    factor=st.floats(0.01, 100),
    sizes=st.sampled_from([(2, 9, 1), (5, 3, 2)]),
    seed=st.integers(0, 9),
)
def test_directions_follow_the_units_of_inputs_and_weights(factor, sizes, seed):
    """Least squares has units: inputs times c make the weights' change that over c."""
    fan_in, fan_out, positions = sizes
    x, kernel = normal(9, positions, fan_in, seed=seed), normal(fan_in, fan_out)
    wanted = normal(9, positions, fan_out, seed=seed)
    with jax.enable_x64(True):
        one = dense_directions(x, kernel, wanted)
        other = dense_directions(factor * x, kernel, wanted)
        np.testing.assert_allclose(other[1], one[1] / factor, rtol=1e-6)
        other = dense_directions(x, factor * kernel, wanted)
        np.testing.assert_allclose(other[0], one[0] / factor, rtol=1e-9)


# --- BatchNorm and ReLU --------------------------------------------------------------


def test_batch_norm_returns_the_change_that_it_scales_to_the_wanted_one(x64):
    """BM (26): each input by itself, with mean and variance as they are."""
    x, wanted = 3 * normal(6, 2, 4) + 1, normal(6, 2, 4, seed=1)
    (change,) = directions(functools.partial(exact.batch_norm, epsilon=0.0), wanted, x)
    std = np.asarray(x).std((0, 1))
    np.testing.assert_allclose(6 * change, wanted * std, rtol=1e-10)


def test_batch_norm_is_back_propagation_times_the_variance(x64):
    """BM (27), without approximation where the terms it drops are zero."""
    x, wanted = 3 * normal(64, 4) + 1, normal(64, 4, seed=1)
    x_hat = (x - x.mean(0)) / x.std(0)
    wanted = wanted - wanted.mean(0)
    wanted = wanted - x_hat * (x_hat * wanted).mean(0)

    def ordinary(x):
        return (x - x.mean(0)) / jnp.sqrt(x.var(0))

    (expected,) = directions(ordinary, wanted, x)
    (found,) = directions(functools.partial(exact.batch_norm, epsilon=0.0), wanted, x)
    np.testing.assert_allclose(found, expected * np.asarray(x).var(0), rtol=1e-9)


def test_batch_norm_scale_and_bias_are_the_least_squares_solution(x64):
    x, wanted = normal(5, 3, 2) + 1, normal(5, 3, 2, seed=1)
    scale, bias = normal(2, 2)
    found = directions(exact.batch_norm, wanted, x, scale, bias)
    x_hat = np.asarray(exact.batch_norm(jnp.asarray(x)))
    for k in range(2):
        system = np.stack([x_hat[..., k].ravel(), np.ones(15)], 1)
        expected, *_ = np.linalg.lstsq(system, np.asarray(wanted)[..., k].ravel())
        np.testing.assert_allclose([found[1][k], found[2][k]], expected, rtol=1e-10)
    std = np.sqrt(np.asarray(x).var((0, 1)) + 1e-5)
    np.testing.assert_allclose(5 * found[0], wanted * std / scale, rtol=1e-10)


def test_a_zero_scale_hands_nothing_back():
    x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    layer = functools.partial(exact.batch_norm, scale=jnp.array([0.0, 1.0]))
    (change,) = directions(layer, jnp.ones((2, 2)), x)
    assert (change[:, 0] == 0).all()
    assert (change[:, 1] > 0).all()


def test_relu_passes_the_least_squares_solution():
    """BM (30): where the unit is off, nothing can be done, and so nothing is."""
    x, wanted = jnp.array([[-1.0, 2.0, 0.5]]), jnp.array([[3.0, 4.0, -5.0]])
    (change,) = directions(jax.nn.relu, wanted, x)
    np.testing.assert_array_equal(change, [[0.0, 4.0, -5.0]])


# --- Transformations -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense on an image", "padded"])
def test_of_an_ensemble_under_vmap_every_member_solves_its_own_system(name):
    case = CASES[name]
    x, kernel, bias, wanted = (a.astype(np.float32) for a in case.arrays)

    def directions_of(x, kernel, bias):
        def loss(*arguments):
            return jnp.sum(wanted * case.exact(*arguments, damping=0.1))

        return jax.grad(loss, argnums=(0, 1, 2))(x, kernel, bias)

    members = [(x, kernel, bias), (x[::-1] ** 2, 2 * kernel, bias)]
    stacked = map(np.stack, zip(*members, strict=True))
    ensemble = jax.jit(jax.vmap(directions_of))(*stacked)
    compiled = jax.jit(directions_of)
    for index, member in enumerate(members):
        for one, other in zip(compiled(*member), ensemble, strict=True):
            np.testing.assert_allclose(one, other[index], rtol=1e-3, atol=1e-4)


def test_without_jit_the_directions_are_the_same(x64):
    case = CASES["dense"]
    x, kernel, bias, wanted = map(jnp.asarray, case.arrays)
    _, pull_back = jax.vjp(case.exact, x, kernel, bias)
    for one, other in zip(pull_back(wanted / 7), case.compiled(0.0)[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_bfloat16_is_solved_in_float32():
    case = CASES["padded"]
    x, kernel, bias, wanted = (a.astype(jnp.bfloat16) for a in case.arrays)
    layer = case.exact
    assert layer(x, kernel, bias).dtype == jnp.bfloat16
    low = directions(layer, wanted, x, kernel, bias)
    high = directions(
        layer, *(a.astype(jnp.float32) for a in (wanted, x, kernel, bias))
    )
    for one, other in zip(low, high, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(np.float32), other, rtol=0.02, atol=0.02)


def test_a_bfloat16_layer_gives_float32_parameters_float32_directions():
    layer = exact_linen.Dense(2, dtype=jnp.bfloat16)
    params = layer.init(jax.random.key(0), X)
    assert jax.eval_shape(layer.apply, params, X).dtype == jnp.bfloat16

    def loss(params):
        return jnp.mean(jnp.asarray(layer.apply(params, X)), dtype=jnp.float32)

    dtypes = {
        leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(loss), params))
    }
    assert dtypes == {jnp.dtype(jnp.float32)}


# --- Flax ----------------------------------------------------------------------------


def linen_network(layers, **options):
    """The same network in Flax's layers or the exact ones."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = layers.Conv(4, (3, 3), strides=2, **options)(x)
            x = layers.BatchNorm(use_running_average=not train)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
            return layers.Dense(3, **options)(x.reshape(x.shape[0], -1))

    return Net()


def nnx_network(layers, **options):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = layers.Conv(2, 4, (3, 3), strides=2, **options, rngs=rngs)
            self.norm = layers.BatchNorm(4, rngs=rngs)
            self.head = layers.Linear(16, 3, **options, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x)))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            return self.head(x.reshape(x.shape[0], -1))

    return Net(nnx.Rngs(0))


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(5), (20, 8, 8, 2))


def test_linen_layers_compute_what_flax_own_do(images):
    ordinary, matched = linen_network(nn), linen_network(exact_linen)
    variables = jax.jit(ordinary.init)(jax.random.key(0), images)
    own = jax.eval_shape(matched.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, variables)
    for mode in (True, False):
        one, other = (
            jax.jit(functools.partial(net.apply, train=mode, mutable=["batch_stats"]))(
                variables, images
            )
            for net in (ordinary, matched)
        )
        for left, right in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5)


def test_nnx_layers_compute_what_flax_own_do(images):
    ordinary, matched = nnx_network(nnx), nnx_network(exact_nnx)
    nnx.update(matched, nnx.state(ordinary))
    for mode in ("train", "eval"):
        for model in (ordinary, matched):
            getattr(model, mode)()
        run = nnx.jit(lambda model: model(images))
        one, other = run(ordinary), run(matched)
        np.testing.assert_allclose(one, other, atol=1e-5)
    states = (jax.tree.leaves(nnx.state(model)) for model in (ordinary, matched))
    for one, other in zip(*states, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_linen_nnx_and_the_functions_agree(images):
    """Over two steps of a running average."""
    wanted = jax.random.normal(jax.random.key(6), (20, 3))
    options = {"damping": 0.1, "decay": 0.9}
    model = nnx_network(exact_nnx, **options)
    net = linen_network(exact_linen, **options)
    variables = jax.jit(net.init)(jax.random.key(0), images)
    params = {
        "Conv_0": {"kernel": model.conv.kernel[...], "bias": model.conv.bias[...]},
        "BatchNorm_0": {"scale": model.norm.scale[...], "bias": model.norm.bias[...]},
        "Dense_0": {"kernel": model.head.kernel[...], "bias": model.head.bias[...]},
    }
    state = {name: value for name, value in variables.items() if name != "params"}
    moments: dict[str, Any] = {}

    def by_hand(params, x):
        def layer(name, function, x, **options):
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            moment = exact.second_moment(x, kernel, bias, **options)
            moments.setdefault(name, []).append(moment)
            if len(moments[name]) > 1:  # unbiased: weights 0.09 and 0.1
                moment = (0.9 * moments[name][0] + moment) / 1.9
            options |= {"damping": 0.1, "second_moment": moment}
            return function(x, kernel, bias, **options)

        x = layer("Conv_0", exact.conv, x, strides=2)
        x = jax.nn.relu(exact.batch_norm(x, **params["BatchNorm_0"]))
        x = nn.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
        return layer("Dense_0", exact.dense, x)

    def mean_loss(outputs):
        return jnp.sum(wanted * outputs, -1).mean()

    @jax.jit
    def linen_step(params, state, x):
        def loss(params):
            y, new = net.apply({"params": params, **state}, x, mutable=list(state))
            return mean_loss(y), new

        return jax.grad(loss, has_aux=True)(params)

    @nnx.jit
    def nnx_step(model, x):
        return nnx.grad(lambda model: mean_loss(model(x)))(model)

    @jax.jit
    def hand_step(params):  # both steps, since it keeps the moments itself
        return [
            jax.grad(lambda p, x=x: mean_loss(by_hand(p, x)))(params) for x in batches
        ]

    batches = (images, images**2)
    for x, expected in zip(batches, hand_step(params), strict=True):
        by_linen, state = linen_step(params, state, x)
        by_nnx = nnx_step(model, x)
        for name, own in {
            "Conv_0": "conv",
            "BatchNorm_0": "norm",
            "Dense_0": "head",
        }.items():
            for role, direction in expected[name].items():
                for found in (by_linen[name][role], by_nnx[own][role][...]):
                    np.testing.assert_allclose(found, direction, rtol=1e-3, atol=1e-5)


def test_a_network_learns_by_subtracting_what_grad_returns(images):
    labels = jnp.arange(20) % 3
    net = linen_network(exact_linen, damping=0.1)
    variables = jax.jit(net.init)(jax.random.key(0), images)
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def step(params):
        def loss_fn(params):
            logits, _ = net.apply(
                {"params": params, "batch_stats": stats},
                images,
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        loss, direction = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, d: p - 0.3 * d, params, direction), loss

    losses = []
    for _ in range(20):
        params, loss = step(params)
        losses.append(loss)
    assert losses[-1] < losses[0] / 4


def test_the_average_is_kept_only_where_it_may_be():
    layer = exact_linen.Dense(2, decay=0.5)
    x = jnp.ones((4, 3))
    variables = layer.init(jax.random.key(0), x)
    assert variables["second_moments"]["weight"] == 0  # init is no step
    layer.apply(variables, x)  # evaluation needs nothing
    _, new = layer.apply(variables, x, mutable=["second_moments"])
    assert new["second_moments"]["weight"] == 0.5


# --- Procedure 1 ---------------------------------------------------------------------


def residual(kernel, z):
    y = jax.lax.conv_general_dilated(
        z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return z + jax.nn.relu(y)


def normalised(params, z):
    z = z.reshape(len(z), -1) @ params["kernel"]
    return params["scale"] * (z - z.mean(0)) / z.std(0)


def test_procedure_1_is_back_propagation(x64):
    """LH Proposition 1, for blocks of several layers, one of them residual."""
    blocks = [residual, normalised, lambda kernel, z: jnp.tanh(z) @ kernel]
    params: list[Any] = [
        normal(3, 3, 2, 2),
        {"kernel": normal(32, 7), "scale": normal(7)},
        normal(7, 5),
    ]
    x, labels = normal(6, 4, 4, 2), np.arange(6) % 5

    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def whole(params):
        z = x
        for block, weights in zip(blocks, params, strict=True):
            z = block(weights, z)
        return loss(z)

    found = jax.jit(
        lambda params, x: exact.procedure_1(blocks, params, x, loss, step_size=0.7)
    )(params, x)
    gradient = jax.jit(jax.grad(whole))(params)
    expected = jax.tree.map(lambda w, g: w - 0.7 * g, params, gradient)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


def test_an_input_that_is_always_zero_leaves_its_weights_alone():
    x = jnp.zeros((8, 4))
    direction = jax.grad(lambda w: exact.dense(x, w, damping=0.1).sum())(
        jnp.ones((4, 3))
    )
    np.testing.assert_array_equal(direction, 0)
    # A depthwise convolution behind a ReLU of which one unit is dead.
    images = jax.random.normal(jax.random.key(0), (8, 6, 6, 3)).at[..., 1].set(0)
    window = jax.random.normal(jax.random.key(1), (3, 3, 1, 3))

    def loss(window: jax.Array) -> jax.Array:
        y = exact.conv(images, window, feature_group_count=3, damping=0.1)
        return jnp.sum(jnp.square(y))

    direction = jax.grad(loss)(window)
    assert jnp.isfinite(direction).all()
    np.testing.assert_array_equal(direction[..., 1], 0)
    assert (jnp.abs(direction[..., [0, 2]]).max((0, 1, 2)) > 0).all()


@pytest.mark.parametrize("layer", ["Linear", "Conv"])
def test_running_averages_stay_as_they_are_in_evaluation(layer):
    window = ((3, 3),) if layer == "Conv" else ()
    make = getattr(exact_nnx, layer)
    model = nnx.Sequential(make(3, 2, *window, decay=0.9, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    model(images)
    kept = jax.tree.leaves(nnx.state(model, exact_nnx.SecondMoment))
    model.eval()
    model(10 * images)
    for before, after in zip(
        kept, jax.tree.leaves(nnx.state(model, exact_nnx.SecondMoment)), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    model.train()
    model(10 * images)
    (*_, weight) = jax.tree.leaves(nnx.state(model, exact_nnx.SecondMoment))
    np.testing.assert_allclose(weight, 0.19, rtol=1e-6)


# --- What is refused -----------------------------------------------------------------

X, KERNEL = jnp.ones((8, 3)), jnp.ones((3, 2))
IMAGES, WINDOW = jnp.ones((8, 4, 4, 3)), jnp.ones((3, 3, 3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact.dense(X, KERNEL, damping=-0.1), r"damping \(=-0.1\).* least 0"),
        (lambda: exact.dense(X, KERNEL, damping=np.nan), r"damping \(=nan\)"),
        (lambda: exact.dense(X, jnp.ones((4, 2))), r"shapes are \(8, 3\) and \(4, 2\)"),
        (lambda: exact.dense(X[0], KERNEL), r"\(batch, \*positions, in\).*\(3,\)"),
        (lambda: exact.dense(X.astype(int), KERNEL), "x must be .* but it is of int"),
        (lambda: exact.dense(X, KERNEL.astype(complex)), "kernel must.* complex"),
        (lambda: exact.dense(X, KERNEL, jnp.ones(3)), r"bias of shape \(2,\).*\(3,\)"),
        (lambda: exact.dense(X, KERNEL, name="fc1", damping=-1), "^fc1: damping"),
        (
            lambda: exact.dense(X, KERNEL, second_moment=jnp.eye(3)),
            r"second_moment of shape \(1, 3, 3\).*\(3, 3\)",
        ),
        (
            lambda: exact.conv(IMAGES[0], WINDOW),
            r"\(batch, \*spatial, in\).*\(4, 4, 3\)",
        ),
        (lambda: exact.conv(IMAGES, WINDOW[:, :, :2]), "takes 2 input features"),
        (lambda: exact.conv(IMAGES, WINDOW, padding="REFLECT"), "padding.*'REFLECT'"),
        (lambda: exact.conv(IMAGES, WINDOW, strides=0), r"strides \(=0\)"),
        (
            lambda: exact.conv(IMAGES[:, :2], WINDOW, padding="VALID"),
            r"window 3\*3 is larger than its input 2\*4",
        ),
        (
            lambda: exact.conv(IMAGES[:, :2], WINDOW, padding="CIRCULAR"),
            r"3\*3 wraps around its input 2\*4",
        ),
        (lambda: exact.batch_norm(X[0]), r"\(batch, \*positions, features\).*\(3,\)"),
        (lambda: exact.batch_norm(X, jnp.ones(2)), r"scale of shape \(3,\).*\(2,\)"),
        (lambda: exact.batch_norm(X, mean=jnp.ones(3)), "both mean and var"),
        (lambda: exact.batch_statistics(X.astype(int)), "real floating dtype"),
        (
            lambda: exact.procedure_1([jnp.dot], [], X, jnp.sum, step_size=1),
            "1 blocks and 0 params",
        ),
        (
            lambda: exact.procedure_1(
                [lambda w, z: (z, z)],  # pyright: ignore
                [KERNEL],
                X,
                jnp.sum,
                step_size=1,
            ),
            r"output of blocks\[0\] must be an array, but it is a tuple",
        ),
        (
            lambda: exact.procedure_1(
                [jnp.dot],
                [KERNEL],
                "x",  # pyright: ignore
                jnp.sum,
                step_size=1,
            ),
            r"input of blocks\[0\] must be an array, but it is a str",
        ),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_batch_too_small_for_its_weights_is_an_error(wrap):
    layer = nn.Sequential([exact_linen.Dense(2)])
    params = layer.init(jax.random.key(0), X[:2])  # no gradient, no error

    def loss(params):
        return jnp.sum(jnp.asarray(layer.apply(params, X[:2])))

    message = r"'layers_0': E\[a a\^T\] is singular: 4 unknowns .* 2 equations"
    with pytest.raises(ValueError, match=message):
        wrap(jax.grad(loss))(params)
    damped = exact_linen.Dense(2, damping=1e-3)
    params = damped.init(jax.random.key(0), X[:2])
    direction = jax.grad(lambda p: jnp.sum(jnp.asarray(damped.apply(p, X[:2]))))(params)
    for leaf in jax.tree.leaves(direction):
        assert np.isfinite(leaf).all()


def test_a_singular_system_that_shapes_do_not_show_is_not_silently_solved():
    x = X.at[:, 0].set(0)
    (change,) = directions(functools.partial(exact.dense, x), jnp.ones((8, 2)), KERNEL)
    assert np.isnan(change).any()


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: exact_linen.Dense(2, dot_general=jax.lax.dot_general), "dot_general"),
        (lambda: exact_linen.Conv(2, (1, 1), input_dilation=2), "input_dilation"),
        (lambda: exact_linen.BatchNorm(True, axis_name="batch"), "axis_name"),
        (lambda: exact_linen.Dense(2, decay=1.0), r"decay \(=1.0\)"),
    ],
)
def test_linen_layers_refuse_what_they_would_ignore(make, argument):
    with pytest.raises(ValueError, match=argument):
        make().init(jax.random.key(0), IMAGES)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda r: exact_nnx.Linear(3, 2, dot_general=jnp.dot, rngs=r), "dot_general"),
        (lambda r: exact_nnx.Conv(3, 2, (1, 1), input_dilation=2, rngs=r), "dilation"),
        (lambda r: exact_nnx.BatchNorm(3, axis_name="batch", rngs=r), "axis_name"),
        (lambda r: exact_nnx.Linear(3, 2, decay=-1.0, rngs=r), r"decay \(=-1.0\)"),
    ],
)
def test_nnx_layers_refuse_what_they_would_ignore(make, argument):
    with pytest.raises(ValueError, match=re.compile(argument)):
        make(nnx.Rngs(0))
