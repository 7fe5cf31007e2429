"""The Linen and NNX layers: Flax's own forward pass, the functions' backward pass."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exact_cases import IMAGES, X
from flax import nnx

from backmatch_optax import exact
from backmatch_optax.exact import linen as exact_linen
from backmatch_optax.exact import nnx as exact_nnx


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


@pytest.mark.parametrize("kind", ["Dense", "Conv"])
def test_a_bfloat16_layer_gives_float32_parameters_float32_directions(kind):
    window, x = ((), X) if kind == "Dense" else (((3, 3),), IMAGES)
    layer = getattr(exact_linen, kind)(2, *window, dtype=jnp.bfloat16, decay=0.9)
    for inputs in (x, x.astype(jnp.bfloat16)):
        variables = jax.eval_shape(layer.init, jax.random.key(0), inputs)
        assert jax.eval_shape(layer.apply, variables, inputs).dtype == jnp.bfloat16

        def loss(variables, inputs=inputs):
            outputs = jnp.asarray(layer.apply(variables, inputs))
            return jnp.mean(outputs, dtype=jnp.float32)

        directions = jax.eval_shape(jax.grad(loss), variables)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(directions)} == {"float32"}


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


class Subclass(exact_linen.Dense):
    pass


def average(x, kernel):
    return x


MADE_WRONGLY = {
    "Linen Dense": (lambda r, **o: exact_linen.Dense(2, **o), "dot_general"),
    "Linen subclass": (lambda r, **o: Subclass(2, **o), "dot_general_cls"),
    "Linen Conv": (lambda r, **o: exact_linen.Conv(2, (1, 1), **o), "mask"),
    "NNX Linear": (lambda r, **o: exact_nnx.Linear(3, 2, rngs=r, **o), "dot_general"),
    "NNX Conv": (lambda r, **o: exact_nnx.Conv(3, 2, (1,), rngs=r, **o), "mask"),
}


@pytest.mark.parametrize(("make", "argument"), MADE_WRONGLY.values(), ids=MADE_WRONGLY)
def test_linear_layers_refuse_when_they_are_made(make, argument):
    for option, value in {
        argument: average,
        "promote_dtype": average,
        "damping": -0.1,
        "decay": 1.0,
    }.items():
        with pytest.raises(ValueError, match=rf"^exact\..*: {option} \(="):
            make(nnx.Rngs(0), **{option: value})


@pytest.mark.parametrize(
    "options", [{"axis_name": "batch"}, {"axis": 0}, {"epsilon": -1e-5}]
)
@pytest.mark.parametrize(
    "make",
    [
        exact_linen.BatchNorm,
        functools.partial(exact_nnx.BatchNorm, 3, rngs=nnx.Rngs(0)),
    ],
    ids=["Linen", "NNX"],
)
def test_batch_norms_refuse_when_they_are_made(make, options):
    with pytest.raises(ValueError, match=rf"BatchNorm: {next(iter(options))} \(="):
        make(**options)


def test_calls_refuse_what_they_would_ignore():
    layer = exact_nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="out_sharding is not supported"):
        layer(X, out_sharding=jax.sharding.PartitionSpec())
    mask = jnp.ones(X.shape)
    with pytest.raises(ValueError, match="mask is not supported"):
        exact_nnx.BatchNorm(3, rngs=nnx.Rngs(0))(X, mask=mask)
    with pytest.raises(ValueError, match="mask is not supported"):
        exact_linen.BatchNorm(False).init(jax.random.key(0), X, mask=mask)


def test_batch_norm_takes_parameters_in_boxes():
    boxed = nn.with_partitioning(nn.initializers.constant(2.0), ("features",))
    layer = exact_linen.BatchNorm(False, scale_init=boxed)
    y, variables = layer.init_with_output(jax.random.key(0), IMAGES + X[:, None, None])
    assert isinstance(variables["params"]["scale"], nn.Partitioned)
    np.testing.assert_array_equal(y, 0)  # of a constant input
