"""Dense and convolutional layers against least squares solved by NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_cases import (
    CASES,
    IMAGES,
    KERNEL,
    WINDOW,
    Case,
    X,
    as_list,
    directions,
    every_case,
    normal,
)

import backmatch_optax as bmo
from backmatch_optax import exact, spec


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
    # The weights of one output have the mean diagonal of their own group.
    outputs = len(bias)
    owners = np.append(np.arange(kernel.size) % outputs, np.arange(outputs))
    matrix = case.system.T @ case.system / batch
    means = np.bincount(owners, np.diag(matrix)) / np.bincount(owners)
    ridge = np.diag(damping * means[owners])
    solution = np.linalg.solve(matrix + ridge, case.system.T @ target / batch)
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
    scales = bmo.layer_scales(chain, params, normalize=False)
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
    scales = bmo.layer_scales(chain, params, normalize=False)
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

    direction = jax.jit(jax.grad(loss))(window)
    assert jnp.isfinite(direction).all()
    np.testing.assert_array_equal(direction[..., 1], 0)
    assert (jnp.abs(direction[..., [0, 2]]).max((0, 1, 2)) > 0).all()


def test_a_singular_system_that_shapes_do_not_show_is_not_silently_solved():
    x = X.at[:, 0].set(0)
    (change,) = directions(functools.partial(exact.dense, x), jnp.ones((8, 2)), KERNEL)
    assert np.isnan(change).any()


# --- Arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("moment", [None, jnp.eye(4)[None]], ids=["own", "given"])
def test_lists_are_arrays(moment):
    arrays = [jnp.asarray(normal(*shape)) for shape in ((8, 3), (3, 2), (2,))]
    results = []
    for convert in (jnp.asarray, as_list):
        given = None if moment is None else convert(moment)
        layer = functools.partial(exact.dense, second_moment=given)
        y, pull_back = jax.vjp(layer, *map(convert, arrays))
        results.append([y, *map(jnp.asarray, pull_back(y))])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_convolution_takes_lists():
    np.testing.assert_array_equal(
        exact.conv(as_list(IMAGES), as_list(WINDOW), strides=[2, 1]),
        exact.conv(IMAGES, WINDOW, strides=(2, 1)),
    )
    np.testing.assert_array_equal(
        exact.second_moment(as_list(X), as_list(KERNEL)),
        exact.second_moment(X, KERNEL),
    )


@pytest.mark.parametrize("damping", [-0.1, np.nan, np.inf, jnp.float32(-1), "1", [0.1]])
@pytest.mark.parametrize("layer", [exact.dense, exact.conv])
def test_damping_is_a_number_of_at_least_0(layer, damping):
    arguments = (X, KERNEL) if layer is exact.dense else (IMAGES, WINDOW)
    with pytest.raises(ValueError, match=r"^exact.*: damping \(=.*at least 0"):
        layer(*arguments, damping=damping)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact.dense(X, jnp.ones((4, 2))), r"\(8, 3\).*\(4, 2\) do not fit"),
        (lambda: exact.dense(X[0], KERNEL), r"shape \(3,\).*\(batch, \*positions, in"),
        (lambda: exact.dense(X, WINDOW), "with 0 spatial dimensions"),
        (lambda: exact.dense(X[:0], KERNEL), r"x of shape \(0, 3\) has no entries"),
        (lambda: exact.dense(X, KERNEL[:, :0]), r"kernel of shape \(3, 0\) has no"),
        (lambda: exact.dense(X.astype(int), KERNEL), "x must be .* but it is of int"),
        (
            lambda: exact.dense(as_list([[1, 2, 3]]), KERNEL),
            "x must be .* but it is of int",
        ),
        (lambda: exact.dense(X, KERNEL.astype(complex)), "kernel must.* complex"),
        (
            lambda: exact.dense([[1.0], [2.0, 3.0]], KERNEL),  # pyright: ignore
            "x must be an array, .* list",
        ),
        (lambda: exact.dense(X, KERNEL, jnp.ones(3)), r"bias of shape \(2,\).*\(3,\)"),
        (
            lambda: exact.dense(X, KERNEL, as_list([0, 0])),
            "bias must be .* but it is of int",
        ),
        (lambda: exact.dense(X, KERNEL, name="fc1", damping=-1), "^fc1: damping"),
        (lambda: exact.dense(X, KERNEL, dtype=int), "^exact.dense: dtype .*floating"),
        (
            lambda: exact.dense(X, KERNEL, second_moment=jnp.eye(3)),
            r"second_moment of shape \(1, 3, 3\).*\(3, 3\)",
        ),
        (
            lambda: exact.dense(X, KERNEL, second_moment=jnp.eye(3, dtype=int)[None]),
            "second_moment must be .* but it is of int",
        ),
        (lambda: exact.conv(IMAGES[0], WINDOW), "1 or 2 or 3 spatial dimensions"),
        (lambda: exact.conv(IMAGES[:0], WINDOW), r"x of shape \(0, 4, 4, 3\) has no"),
        (lambda: exact.conv(IMAGES.astype(int), WINDOW), "x must be .* it is of int"),
        (lambda: exact.conv(IMAGES, WINDOW[:, :, :2]), r"\(3, 3, 2, 2\) do not fit"),
        (lambda: exact.conv(IMAGES, WINDOW, strides=0), r"strides \(=0\)"),
        (lambda: exact.conv(IMAGES, WINDOW, strides=(1, 0)), r"strides \(=0\)"),
        (lambda: exact.conv(IMAGES, WINDOW, strides=(1, 1, 1)), "strides must have an"),
        (lambda: exact.conv(IMAGES, WINDOW, kernel_dilation=-1), r"dilation \(=-1\)"),
        (lambda: exact.conv(IMAGES, WINDOW, feature_group_count=0), r"count \(=0\)"),
        (lambda: exact.conv(IMAGES, WINDOW, feature_group_count=2), "must divide"),
        (lambda: exact.conv(IMAGES, WINDOW, padding="REFLECT"), "padding='REFLECT'"),
        (lambda: exact.conv(IMAGES, WINDOW, padding="CAUSAL"), "padding='CAUSAL'"),
        (lambda: exact.conv(IMAGES, WINDOW, padding=[1]), r"padding=\[1\]"),
        (lambda: exact.conv(IMAGES, WINDOW, padding=(1, (0,))), r"\(1, \(0,\)\)"),
        (
            lambda: exact.conv(IMAGES[:, :2], WINDOW, padding="VALID"),
            r"x of shape \(8, 2, 4, 3\).*the window is larger than its input",
        ),
        (
            lambda: exact.conv(IMAGES[:, :2], WINDOW, padding="CIRCULAR"),
            "a circular window is larger than its input",
        ),
        (lambda: exact.second_moment(X[:0], KERNEL), "x of shape .* has no entries"),
        (lambda: exact.second_moment(X.astype(int), KERNEL), "x must be .* of int"),
        (lambda: exact.second_moment(X, KERNEL, strides=2), "no strides"),
        (lambda: exact.second_moment(IMAGES, WINDOW, strides=0), r"strides \(=0\)"),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
