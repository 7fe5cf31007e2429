"""Every rule against the Jacobian of the real Flax layer that it is about.

A rule states the mean diagonal of `J^T J`, for one example and summed over everything
the layer puts out, with respect to a parameter (`m_W`) or to the input (`m_z`).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backmatch_optax as bmo
from backmatch_optax import spec

RTOL = 1e-5


def curvatures(
    link: spec.Link,
    params: Any,
    input_shape: tuple[int, ...],
    *,
    moment: float = 1.0,
    gains: Any = "paper",
) -> dict[str, float]:
    """What the package takes for `m_W` of each parameter of a link, and for `m_z`.

    A block of unit curvature in front of the link gives its signal the second moment
    wanted, and the scale of the block tells the factor that it receives from the link.
    """
    chain = spec.LayerChain(
        [
            spec.Block(
                "below",
                weight_curvature=1.0,
                input_curvature=1.0,
                forward_gain=moment,
            ),
            link,
        ],
        input_shape=input_shape,
    )
    tree: Any = {"below": {"kernel": jnp.ones(1)}}
    if params:
        tree["layer"] = params
    transformation = bmo.scale_by_backmatch(chain, gains=gains, normalize=False)
    updates: Any = transformation.update(
        jax.tree.map(jnp.ones_like, tree), transformation.init(tree), tree
    )[0]
    scales = {role: jnp.mean(leaf) for role, leaf in updates.pop("layer", {}).items()}
    scales["input"] = updates["below"]["kernel"][0]
    return {name: 1 / float(scale) for name, scale in scales.items()}


def measured(apply: Any, params: Any, x: jax.Array) -> dict[str, float]:
    """The same from the Jacobian of `apply(params, x)`; the mean over the batch `x`."""
    jacobian = jax.jit(jax.jacrev(apply, argnums=(0, 1)))(params, x)
    of_params, of_input = jacobian
    # The examples of a batch do not meet, so the Jacobian of the batch by the input has
    # a block for each of them: its sum over the blocks is that of all the examples.
    totals = {role: np.sum(np.square(j)) for role, j in of_params.items()}
    means = {role: t / len(x) / params[role].size for role, t in totals.items()}
    return means | {"input": np.sum(np.square(of_input)) / x.size}


def layer_and_params(layer: nn.Module, x: jax.Array, seed: int = 0) -> tuple[Any, Any]:
    """The layer as a function, and random values for all of its parameters."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x).get("params", {})
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)
    return lambda p, x: layer.apply({"params": p}, x), params


def signs(*shape: int, seed: int = 1) -> jax.Array:
    """Random entries of +1 and -1: a white signal whose squares are all one."""
    return jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], size=shape))


def assert_close(actual: dict[str, float], desired: dict[str, float]):
    assert set(actual) == set(desired)
    for name, value in desired.items():
        np.testing.assert_allclose(actual[name], value, rtol=RTOL, err_msg=name)


# Dense and Conv. An input of entries +-1 makes the mean of squares that a kernel meets
# exactly one, so nothing is left to chance.


@pytest.mark.parametrize("input_shape", [(5,), (4, 5), (3, 2, 5)])
def test_dense(input_shape):
    x = signs(2, *input_shape)
    apply, params = layer_and_params(nn.Dense(3), x)
    assert_close(
        curvatures(spec.Dense("layer"), params, input_shape), measured(apply, params, x)
    )


# Where every output sees all the taps of its window, the rules are exact.
EXACT_CONVOLUTIONS = {
    "1d": ((7, 2), 3, {"padding": "VALID"}),
    "1d strides": ((8, 2), 3, {"padding": "VALID", "strides": 3}),
    "2d": ((5, 4, 3), (3, 2), {"padding": "VALID"}),
    "2d no padding": ((5, 4, 3), (3, 2), {"padding": 0}),
    "2d strides": ((7, 6, 2), (3, 2), {"padding": "VALID", "strides": (2, 3)}),
    "2d dilation": ((7, 6, 2), (3, 2), {"padding": "VALID", "kernel_dilation": (2, 3)}),
    "2d groups": ((4, 5, 6), (2, 2), {"padding": "VALID", "feature_group_count": 3}),
    "2d depthwise": ((4, 5, 6), (2, 2), {"padding": "VALID", "feature_group_count": 6}),
    "2d circular": ((5, 4, 3), (3, 2), {"padding": "CIRCULAR"}),
    "2d circular strides": ((5, 4, 3), (3, 2), {"padding": "CIRCULAR", "strides": 2}),
    "3d": ((4, 3, 4, 2), (2, 3, 2), {"padding": "VALID"}),
    "3d circular": ((4, 3, 3, 2), (2, 3, 2), {"padding": "CIRCULAR", "strides": 2}),
}


@pytest.mark.parametrize("case", EXACT_CONVOLUTIONS)
def test_conv(case):
    input_shape, window, options = EXACT_CONVOLUTIONS[case]
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.Conv(6, window, **options), x)
    assert_close(
        curvatures(spec.Conv("layer", **options), params, input_shape),
        measured(apply, params, x),
    )


EXACT_TRANSPOSED_CONVOLUTIONS = {
    "1d": ((5, 2), 3, {"padding": "VALID"}),
    "1d strides": ((5, 2), 2, {"padding": "VALID", "strides": 3}),
    "2d": ((3, 4, 2), (3, 2), {"padding": "VALID", "strides": (2, 3)}),
    "2d dilation": ((3, 4, 2), (3, 2), {"padding": "VALID", "kernel_dilation": 2}),
    "2d circular": ((3, 4, 2), (3, 2), {"padding": "CIRCULAR", "strides": (3, 2)}),
    "3d": ((2, 3, 2, 2), (2, 3, 2), {"padding": "VALID"}),
}


@pytest.mark.parametrize("case", EXACT_TRANSPOSED_CONVOLUTIONS)
def test_transposed_conv(case):
    input_shape, window, options = EXACT_TRANSPOSED_CONVOLUTIONS[case]
    if isinstance(options.get("strides"), int):
        flax_options = options | {"strides": (options["strides"],)}
    else:
        flax_options = options
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.ConvTranspose(4, window, **flax_options), x)
    link = spec.ConvTranspose("layer", **options)
    rule, found = curvatures(link, params, input_shape), measured(apply, params, x)
    assert_close(rule, found)


CUT_TRANSPOSED_CONVOLUTIONS = {
    "no padding": ((8, 2), 5, {"padding": 0}),
    "little": ((5, 4, 2), (4, 3), {"strides": (2, 1), "padding": [(1, 2), (0, 1)]}),
    "dilation": ((6, 5, 2), (3, 2), {"padding": 1, "kernel_dilation": 2}),
    "all of it": ((5, 2), 3, {"padding": 2}),
}


@pytest.mark.parametrize("case", CUT_TRANSPOSED_CONVOLUTIONS)
def test_transposed_conv_whose_padding_cuts_its_output(case):
    input_shape, window, options = CUT_TRANSPOSED_CONVOLUTIONS[case]
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.ConvTranspose(4, window, **options), x)
    # Taps of the same size: those at the ends of a window are used less often.
    params = jax.tree.map(jnp.sign, params)
    link = spec.ConvTranspose("layer", **options)
    assert_close(curvatures(link, params, input_shape), measured(apply, params, x))


PADDED_CONVOLUTIONS = {
    "same": ((5, 4, 3), (3, 2), {}),
    "same strides": ((6, 5, 3), (3, 3), {"strides": 2}),
    "same lower": ((6, 5, 3), (2, 2), {"padding": "SAME_LOWER", "strides": 2}),
    "ints": ((5, 4, 3), (3, 2), {"padding": (2, 1)}),
    "pairs": ((6, 3), 3, {"padding": [(2, 0)]}),
    "causal": ((6, 3), 3, {"padding": "CAUSAL"}),
    "same 3d": ((3, 3, 3, 2), (2, 3, 2), {"strides": (1, 2, 1)}),
}


@pytest.mark.parametrize("case", PADDED_CONVOLUTIONS)
def test_conv_counts_padded_positions_like_others(case):
    # As the papers do. What is measured is less by the share of (tap, position) pairs
    # that lie inside the input, here counted by a convolution of ones.
    input_shape, window, options = PADDED_CONVOLUTIONS[case]
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.Conv(6, window, **options), x)
    params["kernel"] = signs(*params["kernel"].shape, seed=2)
    ones = jnp.ones_like(params["kernel"])
    inside = apply({"kernel": ones, "bias": jnp.zeros(6)}, jnp.ones_like(x))
    share = float(inside.mean()) / (ones.size / ones.shape[-1])
    assert 0.3 < share < 1
    found = measured(apply, params, x)
    link = spec.Conv("layer", **options)
    rule = curvatures(link, params, input_shape)
    rule |= {"kernel": rule["kernel"] * share, "input": rule["input"] * share}
    assert_close(rule, found)
    # The other gains leave such pairs out.
    assert_close(curvatures(link, params, input_shape, gains="mean_field"), found)


def test_reflected_positions_are_inputs_like_others():
    # A kernel's own curvature is exact; an input that is reflected counts twice in one
    # output, so m_z holds on the average over the signs of the kernel only.
    input_shape = (6, 3)
    options: Any = {"padding": "REFLECT"}
    x = signs(1, *input_shape)
    apply, params = layer_and_params(nn.Conv(4, 3, **options), x)
    rule = curvatures(spec.Conv("layer", **options), params, input_shape)
    found = []
    for flips in np.ndindex(2, 2, 2):
        taps = 1 - 2 * jnp.asarray(flips)[:, None, None]
        flipped = params | {"kernel": params["kernel"] * taps}
        found.append(measured(apply, flipped, x))
    mean = {name: float(np.mean([f[name] for f in found])) for name in rule}
    assert_close(rule, mean)


@pytest.mark.parametrize(
    ("link", "layer", "input_shape"),
    [
        (spec.Dense("layer"), nn.Dense(3), (4, 5)),
        (spec.Conv("layer", padding="VALID"), nn.Conv(3, 2, padding="VALID"), (4, 5)),
    ],
    ids=["dense", "conv"],
)
def test_a_kernel_meets_the_size_of_its_input_and_a_bias_does_not(
    link, layer, input_shape
):
    x = 3 * signs(1, *input_shape)
    apply, params = layer_and_params(layer, x)
    assert_close(
        curvatures(link, params, input_shape, moment=9.0), measured(apply, params, x)
    )


@pytest.mark.parametrize(
    ("link", "layer", "input_shape"),
    [
        (spec.Dense("layer"), nn.Dense(3, use_bias=False), (5,)),
        (
            spec.Conv("layer", padding="VALID", strides=2, feature_group_count=2),
            nn.Conv(
                6, 3, padding="VALID", strides=2, feature_group_count=2, use_bias=False
            ),
            (9, 4),
        ),
        (
            spec.ConvTranspose("layer", padding="VALID", strides=2),
            nn.ConvTranspose(3, (3,), padding="VALID", strides=(2,), use_bias=False),
            (5, 4),
        ),
    ],
    ids=["dense", "conv", "transposed conv"],
)
def test_a_kernel_hands_on_its_squared_norm_times_the_moment(link, layer, input_shape):
    # The second moment that a layer above meets, for a white input: the mean over the
    # outputs of the squared norm of a row of the Jacobian.
    x = jnp.zeros((1, *input_shape))
    apply, params = layer_and_params(layer, x)
    jacobian = jax.jacrev(apply, argnums=1)(params, x)
    output = jax.eval_shape(apply, params, x)
    moment = float(jnp.sum(jacobian**2)) / output.size
    above = spec.LayerChain([link, spec.Dense("above")], input_shape=input_shape)
    tree = {"layer": params, "above": {"kernel": jnp.ones((output.shape[-1], 1))}}
    positions = output.size // output.shape[-1]
    scale = float(bmo.layer_scales(above, tree, normalize=False)["above"])
    np.testing.assert_allclose(1 / scale / positions, moment, rtol=RTOL)


# Links without parameters.


def distinct(*shape: int) -> jax.Array:
    """An input without ties, so that a maximum is taken in one place."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


POOLS = {
    "2x2": ((4, 6, 3), (2, 2), {"strides": (2, 2)}),
    "overlapping": ((5, 4, 2), (3, 2), {"strides": (2, 1)}),
    "stride one": ((5, 4, 2), (3, 2), {}),
    "remainder dropped": ((5, 5, 2), (2, 2), {"strides": (2, 2)}),
    "1d": ((7, 3), (3,), {"strides": (2,)}),
    "3d": ((4, 4, 2, 2), (2, 2, 2), {"strides": (2, 2, 2)}),
}


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize(
    ("link", "pool"), [(spec.MaxPool, nn.max_pool), (spec.AvgPool, nn.avg_pool)]
)
def test_pooling(link, pool, case):
    input_shape, window, options = POOLS[case]
    found = measured(
        lambda _, x: pool(x, window, **options), {}, distinct(1, *input_shape)
    )
    assert_close(curvatures(link(window, **options), {}, input_shape), found)


def test_max_pooling_never_selects_a_padded_position():
    options: Any = {"strides": (2, 2), "padding": "SAME"}
    found = measured(
        lambda _, x: nn.max_pool(x, (3, 3), **options), {}, distinct(1, 5, 6, 2)
    )
    assert_close(curvatures(spec.MaxPool((3, 3), **options), {}, (5, 6, 2)), found)


def test_average_pooling_counts_padded_positions_like_others():
    options: Any = {"strides": (2, 2), "padding": ((1, 1), (0, 1))}
    x = distinct(1, 5, 6, 2)
    share = float(nn.avg_pool(jnp.ones_like(x), (3, 3), **options).mean())
    assert 0.3 < share < 1
    found = measured(lambda _, x: nn.avg_pool(x, (3, 3), **options), {}, x)
    rule = curvatures(spec.AvgPool((3, 3), **options), {}, (5, 6, 2))
    assert_close({"input": rule["input"] * share}, found)


@pytest.mark.parametrize("input_shape", [(6, 3), (4, 5, 3), (2, 3, 4, 2)])
def test_global_average_pooling(input_shape):
    axes = tuple(range(1, len(input_shape)))
    found = measured(lambda _, x: x.mean(axis=axes), {}, distinct(1, *input_shape))
    assert_close(curvatures(spec.GlobalAvgPool(), {}, input_shape), found)


def test_flatten():
    found = measured(lambda _, x: x.reshape((len(x), -1)), {}, distinct(1, 3, 4, 2))
    assert_close(curvatures(spec.Flatten(), {}, (3, 4, 2)), found)


def test_multiplication_by_a_constant():
    found = measured(lambda _, x: -0.3 * x, {}, distinct(1, 3, 4))
    assert_close(curvatures(spec.Scale(-0.3), {}, (3, 4)), found)


@pytest.mark.parametrize("link", [spec.Activation("relu"), spec.Dropout()])
def test_activation_and_dropout_count_as_the_identity(link):
    # A statement of the papers (BM (31)), not of a Jacobian.
    assert_close(curvatures(link, {}, (3, 4)), {"input": 1.0})


# Batch normalisation.


@pytest.mark.parametrize("roles", ["scale bias", "scale", "bias"])
@pytest.mark.parametrize("input_shape", [(4,), (5, 4)])
def test_scale_and_bias_of_batch_norm_act_at_every_position(input_shape, roles):
    layer = nn.BatchNorm(
        use_running_average=False,
        use_scale="scale" in roles,
        use_bias="bias" in roles,
        epsilon=0.0,
    )
    x = 3 * distinct(16, *input_shape) + 1
    _, params = layer_and_params(layer, x)

    def apply(params, x):
        return layer.apply({"params": params}, x, mutable=["batch_stats"])[0]

    found = measured(apply, params, x)
    rule = curvatures(spec.BatchNorm("layer"), params, input_shape)
    for role in roles.split():
        np.testing.assert_allclose(rule[role], found[role], rtol=1e-4)


@pytest.mark.parametrize("roles", ["scale bias", "scale", "bias", ""])
@pytest.mark.parametrize("input_shape", [(4,), (5, 4)])
def test_batch_norm_divides_its_input_by_a_constant_deviation(input_shape, roles):
    # The paper holds the statistics of the batch constant (BM (36)), as Flax does when
    # it evaluates; the variance is the moment that enters.
    variance = 2.5
    layer = nn.BatchNorm(
        use_running_average=True,
        use_scale="scale" in roles,
        use_bias="bias" in roles,
        epsilon=0.0,
    )
    x = distinct(1, *input_shape)
    _, params = layer_and_params(layer, x)
    stats = {"mean": jnp.zeros(4), "var": jnp.full(4, variance)}

    def apply(params, x):
        return layer.apply({"params": params, "batch_stats": stats}, x)

    link = spec.BatchNorm("layer" if roles else None)
    rule = curvatures(link, params, input_shape, moment=variance)
    found = measured(apply, params, x)
    np.testing.assert_allclose(rule["input"], found["input"], rtol=RTOL)


@pytest.mark.parametrize("roles", ["scale bias", "scale", "bias", ""])
def test_batch_norm_hands_on_the_second_moment_that_it_really_has(roles):
    layer = nn.BatchNorm(
        use_running_average=False,
        use_scale="scale" in roles,
        use_bias="bias" in roles,
        epsilon=0.0,
    )
    x = 3 * distinct(64, 4) + 1
    _, params = layer_and_params(layer, x)
    output, _ = layer.apply({"params": params}, x, mutable=["batch_stats"])
    link = spec.BatchNorm("norm" if roles else None)
    chain = spec.LayerChain([link, spec.Dense("above")], input_shape=(4,))
    tree = {"norm": params, "above": {"kernel": jnp.ones((4, 1))}}
    scales = bmo.layer_scales(
        chain, tree if roles else {"above": tree["above"]}, normalize=False
    )
    moment = float(jnp.mean(jnp.square(output)))
    np.testing.assert_allclose(1 / float(scales["above"]), moment, rtol=1e-4)


# The other normalisations, each over the 64 features of one example.

NORMALISATIONS: dict[str, Any] = {
    "layer": (spec.LayerNorm, nn.LayerNorm(epsilon=0.0)),
    "group": (
        functools.partial(spec.GroupNorm, num_groups=2),
        nn.GroupNorm(num_groups=2, epsilon=0.0),
    ),
    "rms": (spec.RMSNorm, nn.RMSNorm(epsilon=0.0)),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations_over_features_divide_by_the_size_of_the_signal(name):
    # The statistics of an example move with its 64 entries, the rule holds them
    # constant: a difference of a few times 1 / 64.
    link, layer = NORMALISATIONS[name]
    x = np.sqrt(2.5) * signs(1, 3, 64)
    apply, params = layer_and_params(layer, x)
    rule = curvatures(link("layer"), params, (3, 64), moment=2.5)
    found = measured(apply, params, x)
    assert set(rule) == set(found)
    for role, value in found.items():
        np.testing.assert_allclose(rule[role], value, rtol=0.1, err_msg=role)


def test_small_groups_take_the_means_of_units_away_as_a_batch_norm_does():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)) / 8**0.5)
    params = {name: {"kernel": kernel} for name in ("a", "b", "c")}

    def scale(norm: spec.Link) -> float:
        links = [spec.Dense("a"), spec.Activation("relu"), spec.Dense("b")]
        chain = spec.LayerChain([*links, norm, spec.Dense("c")], input_shape=(4, 8))
        return float(
            bmo.layer_scales(chain, params, gains="mean_field", normalize=False)["a"]
        )

    # A group of one unit leaves no mean, one of g units all but a g-th of its square.
    batch, whole = scale(spec.BatchNorm()), scale(spec.LayerNorm())
    groups = {n: scale(spec.GroupNorm(num_groups=n)) for n in (8, 4, 2, 1)}
    np.testing.assert_allclose(groups[8], batch, rtol=1e-6)
    assert batch < whole
    for number, found in groups.items():
        kept = 1 - number / 8
        np.testing.assert_allclose(found - batch, kept * (whole - batch), rtol=1e-5)


# Residual: the arms are added, and what they share is left out.


def residual_case(shortcut: bool) -> tuple[spec.Link, Any, Any]:
    rng = np.random.default_rng(3)
    params = {"branch": jnp.asarray(rng.normal(size=(4, 4)))}
    if shortcut:
        params["shortcut"] = jnp.asarray(rng.normal(size=(4, 4)))

    def apply(params, x, sign):
        past = x @ params["shortcut"] if shortcut else x
        return past + sign * (x @ params["branch"])

    arm = [spec.Dense("shortcut")] if shortcut else []
    return spec.Residual([spec.Dense("branch")], arm), params, apply


@pytest.mark.parametrize("shortcut", [False, True])
def test_the_arms_of_a_residual_add_on_the_average_over_their_sign(shortcut):
    link, params, apply = residual_case(shortcut)
    x = jnp.zeros((1, 4))
    jacobians = [
        jax.jacrev(lambda x, s=s: apply(params, x, s))(x)[0, :, 0] for s in (1, -1)
    ]
    tree = {name: {"kernel": kernel} for name, kernel in params.items()}
    below = spec.Block("below", weight_curvature=1.0, input_curvature=1.0)
    above = spec.Dense("above")
    chain = spec.LayerChain([below, link, above], input_shape=(4,))
    # An identity above hands on a factor of one, and meets what the sum puts out.
    tree |= {"below": {"kernel": jnp.ones(1)}, "above": {"kernel": jnp.eye(4)}}
    scales = {
        path: float(s)
        for path, s in bmo.layer_scales(chain, tree, normalize=False).items()
    }
    mean_square = np.mean([np.square(j) for j in jacobians]) * 4
    np.testing.assert_allclose(1 / scales["below"], mean_square, rtol=RTOL)
    np.testing.assert_allclose(1 / scales["above"], mean_square, rtol=RTOL)
    # Each arm has the sum's output for its own.
    np.testing.assert_allclose(scales["branch"], 1.0, rtol=RTOL)


# Whole networks. With linear activations and independent Gaussian kernels the product
# of the rules is the mean diagonal of the Gauss-Newton matrix in expectation, and so
# is the mean over draws: 400 of them know it to between 1 and 4 %.


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def conv(x: jax.Array, kernel: jax.Array, strides: int = 1) -> Any:
    layer = nn.Conv(
        kernel.shape[-1],
        kernel.shape[:-2],
        strides=strides,
        padding="CIRCULAR",
        use_bias=False,
    )
    return layer.apply({"params": {"kernel": kernel}}, x)


def normalize(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # By the variance that a white input has behind the kernel, a constant.
    return x / jax.lax.stop_gradient(jnp.sqrt(jnp.sum(kernel**2) / kernel.shape[-1]))


def dense_net(p: Any, x: jax.Array) -> jax.Array:
    return linear(linear(linear(x, p["a"]), p["b"]), p["c"])


def normalized_net(p: Any, x: jax.Array) -> jax.Array:
    x = normalize(linear(x, p["a"]), p["a"])
    return linear(normalize(linear(x, p["b"]), p["b"]), p["c"])


def conv_net(p: Any, x: jax.Array) -> jax.Array:
    x = conv(conv(x, p["a"]), p["b"], strides=2)
    return linear(x.reshape((len(x), -1)), p["c"])


def pooled_net(p: Any, x: jax.Array) -> jax.Array:
    x = nn.avg_pool(conv(x, p["a"]), (2, 2), strides=(2, 2))
    return linear(x.mean(axis=(1, 2)), p["c"])


def residual_net(p: Any, x: jax.Array) -> jax.Array:
    x = linear(x, p["a"])
    return linear(x + linear(x, p["b"]), p["c"])


DENSES = [spec.Dense("a"), spec.Dense("b"), spec.Dense("c")]
NETS: dict[str, Any] = {
    "dense": (dense_net, DENSES, (16,), {"a": (16, 24), "b": (24, 16), "c": (16, 8)}),
    "normalized": (
        normalized_net,
        [DENSES[0], spec.BatchNorm(), DENSES[1], spec.BatchNorm(), DENSES[2]],
        (16,),
        {"a": (16, 24), "b": (24, 16), "c": (16, 8)},
    ),
    "conv": (
        conv_net,
        [
            spec.Conv("a", padding="CIRCULAR"),
            spec.Conv("b", padding="CIRCULAR", strides=2),
            spec.Flatten(),
            DENSES[2],
        ],
        (4, 4, 3),
        {"a": (3, 3, 3, 8), "b": (2, 2, 8, 6), "c": (24, 5)},
    ),
    "pooled": (
        pooled_net,
        [
            spec.Conv("a", padding="CIRCULAR"),
            spec.AvgPool((2, 2), strides=2),
            spec.GlobalAvgPool(),
            DENSES[2],
        ],
        (4, 4, 3),
        {"a": (3, 3, 3, 8), "c": (8, 5)},
    ),
    "residual": (
        residual_net,
        [DENSES[0], spec.Residual([DENSES[1]]), DENSES[2]],
        (16,),
        {"a": (16, 24), "b": (24, 24), "c": (24, 8)},
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_scales_are_the_inverse_mean_diagonal_of_the_gauss_newton_matrix(name):
    apply, links, input_shape, shapes = NETS[name]
    chain = spec.LayerChain(links, input_shape=input_shape)

    def scale_times_diagonal(key: jax.Array) -> Any:
        names = ["x", *shapes]
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        params = {n: jax.random.normal(keys[n], shape) for n, shape in shapes.items()}
        x = jax.random.normal(keys["x"], (1, *input_shape))
        jacobian = jax.jacrev(apply)(params, x)
        scales = bmo.layer_scales(
            chain, {n: {"kernel": k} for n, k in params.items()}, normalize=False
        )
        return {
            n: scales[n] * jnp.sum(jacobian[n] ** 2) / params[n].size for n in params
        }

    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.jit(lambda keys: jax.lax.map(scale_times_diagonal, keys))(keys)
    for path, ratios in draws.items():
        if name == "pooled" and path == "c":
            continue  # an average is smaller than what it is taken of; the rule says no
        np.testing.assert_allclose(np.mean(ratios), 1.0, atol=0.1, err_msg=path)


def test_dropout_keeps_the_mean_and_adds_variance():
    links = [spec.Dense("a"), spec.Dropout(0.75), spec.Dense("b")]
    chain = spec.LayerChain(links, input_shape=(3,))
    params = {name: {"kernel": jnp.eye(3)} for name in "ab"}
    paper, mean_field = (
        bmo.layer_scales(spec=chain, params=params, gains=gains, normalize=False)
        for gains in ("paper", "mean_field")
    )
    assert {path: float(scale) for path, scale in paper.items()} == {"a": 1, "b": 1}
    # A quarter of the entries is kept, four times as large.
    for path in "ab":
        assert float(mean_field[path]) == pytest.approx(1 / 4)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.0, float("nan"), "0.5", None])
def test_the_rate_of_dropout(rate):
    with pytest.raises(ValueError, match=r"rate \(=.*\) must be a number in \[0, 1\)"):
        spec.Dropout(rate)
