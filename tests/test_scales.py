"""The scales of whole chains, against an independent reference in float64."""

import itertools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
import reference

import backmatch_optax as bmo
from backmatch_optax import spec

Params = dict[str, Any]


def scales_of(
    chain: spec.LayerChain, params: Params, norm_floor: float = 0.0
) -> dict[str, float]:
    """What the update of each parameter is multiplied by, by the parameter's path.

    Updates of ones come back as the scales, which is all that a user ever sees. Without
    a floor for small norms, which the papers do not have.
    """
    transformation = bmo.scale_by_backmatch(
        chain, norm_floor=norm_floor, normalize=False
    )
    updates, _ = transformation.update(
        jax.tree.map(ones_for, params), transformation.init(params), params
    )
    scales = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        first, *others = np.unique(np.asarray(leaf))
        assert not others, "one number for all entries of a parameter"
        scales[jax.tree_util.keystr(path, simple=True, separator="/")] = float(first)
    return scales


def ones_for(leaf: jax.Array) -> jax.Array:
    wide = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    return jnp.ones(leaf.shape, wide)


def assert_close(actual: dict[str, float], desired: dict[str, float], rtol: float):
    assert set(actual) == set(desired)
    for path, scale in desired.items():
        np.testing.assert_allclose(actual[path], scale, rtol=rtol, err_msg=path)


def as_float64(params: Params) -> Params:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def dense_chain(names: str, *, normalized: bool = False, width: int = 4) -> Any:
    """Dense layers of equal width, with or without a BatchNorm between them."""
    between = [spec.BatchNorm()] if normalized else []
    links = [link for n in names.split() for link in (spec.Dense(n), *between)]
    return spec.LayerChain(links[: len(links) - len(between)], input_shape=(width,))


def dense_params(names: str, dtype: Any = jnp.float32, *, width: int = 4) -> Params:
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=(width, width)), dtype)}
        for name in names.split()
    }


# The papers' own numbers.


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(jnp.float32, 1e-5), (jnp.float64, 1e-12)],
    ids=["float32", "float64"],
)
def test_lenet_has_the_scales_that_the_supplement_prints(dtype, rtol):
    params = models.init_params(models.LeNet(), models.LENET)
    # At initialisation the norms of a layer are nearly the same over rows and columns
    # and for every layer; of different sizes they can no longer stand for each other.
    for factor, name in enumerate(sorted(params), start=1):
        params[name]["kernel"] *= factor
    printed = reference.lenet_supplement(params)
    with jax.enable_x64(dtype == jnp.float64):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        scales = scales_of(models.LENET, params)
        summary = bmo.layer_scales(models.LENET, params, normalize=False)
    assert_close(scales, {f"{n}/kernel": s for n, s in printed.items()}, rtol)
    assert_close({name: float(scale) for name, scale in summary.items()}, printed, rtol)
    assert all(scale.dtype == dtype for scale in summary.values())


def test_lenet_scales_are_squared_norms_over_that_of_the_last_layer():
    # All of BM's sharing factors, fan-ins and fan-outs cancel in this one network.
    params = models.init_params(models.LeNet(), models.LENET)
    norms = {n: float(jnp.sum(layer["kernel"] ** 2)) for n, layer in params.items()}
    scales = bmo.layer_scales(models.LENET, params, normalize=False)
    assert list(scales) == ["cv1", "cv2", "fc1", "fc2", "fc3"]
    expected = {name: norm / norms["fc3"] for name, norm in norms.items()}
    assert_close({n: float(s) for n, s in scales.items()}, expected, 1e-5)


# Random chains of all links, against the reference with explicit loops.


class Case(NamedTuple):
    chain: spec.LayerChain
    layers: list[reference.Layer]  # the same, as the reference wants it
    params: Params  # float64


def total_square(params: Any) -> Any:
    return 0.5 + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


class Sketch:
    """Draws links for the shape that it has reached, twice: as spec and as dict."""

    def __init__(self, draw: st.DrawFn):
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.params: Params = {}

    def chain(
        self, shape: tuple[int, ...], size: int, depth: int, keep: bool
    ) -> tuple[list[spec.Link], list[Any], tuple[int, ...]]:
        """Links that can follow each other, and the shape of their output.

        With `keep`, only links that keep all axes but the features, so that the two
        arms of a residual can be made to fit.
        """
        links, layers = [], []
        for _ in range(size):
            kinds = ["dense", "batch_norm", "activation", "dropout", "block"]
            if depth:
                kinds += ["residual"] * 2
            if len(shape) > 1:
                kinds += ["conv"] * 3
            if len(shape) > 1 and not keep:
                kinds += ["max_pool", "avg_pool", "global_avg_pool", "flatten"]
            kind = self.draw(st.sampled_from(kinds))
            link, layer, shape = getattr(self, kind)(shape, depth, keep)
            links.append(link)
            layers.append({"kind": kind, **layer})
        return links, layers, shape

    def array(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape) * 10 ** self.rng.uniform(-1, 1)

    def own(self, roles: dict[str, Any]) -> str:
        """A new path with parameters of these shapes."""
        path = f"module_{len(self.params)}"
        self.params[path] = {r: self.array(*shape) for r, shape in roles.items()}
        return path

    def linear(self, kernel_shape: tuple[int, ...]) -> str:
        roles: dict[str, tuple[int, ...]] = {"kernel": kernel_shape}
        if self.draw(st.booleans()):
            roles["bias"] = kernel_shape[-1:]
        return self.own(roles)

    def dense(self, shape, depth, keep, features=None):
        features = features or self.draw(st.integers(1, 4))
        path = self.linear((shape[-1], features))
        return spec.Dense(path), {"path": path}, (*shape[:-1], features)

    def conv(self, shape, depth, keep, features=None, **fixed):
        rank = len(shape) - 1
        groups = 1
        if features is None:
            groups = self.draw(
                st.sampled_from([n for n in (1, 2, 3) if shape[-1] % n == 0])
            )
            features = groups * self.draw(st.integers(1, 2))
        window = tuple(self.draw(st.integers(1, 3)) for _ in range(rank))
        options = {
            "strides": 1 if keep else self.per_dimension(rank),
            "kernel_dilation": self.per_dimension(rank),
            "padding": self.draw(st.sampled_from(["SAME", "CIRCULAR"])),
            "feature_group_count": groups,
            **fixed,
        }
        if not keep:
            paddings = ["SAME", "CIRCULAR", 2, ((2, 3),) * rank]
            reach = max(window) * 2 - 1
            if reach <= min(shape[:-1]):
                paddings += ["VALID", "VALID"]
            options["padding"] = self.draw(st.sampled_from(paddings))
        path = self.linear((*window, shape[-1] // groups, features))
        link = spec.Conv(path, **options)
        after = link.shape_after(
            shape, {"kernel": self.params[path]["kernel"].shape}
        )  # held against Flax's in test_spec.py, and against the reference's here
        return link, {"path": path, **options}, after

    def per_dimension(self, rank: int) -> Any:
        value = self.draw(st.integers(1, 2))
        if self.draw(st.booleans()):
            return value
        return (value, *[self.draw(st.integers(1, 2)) for _ in range(rank - 1)])

    def pool(self, kind, shape):
        rank = len(shape) - 1
        window = tuple(self.draw(st.integers(1, min(3, size))) for size in shape[:-1])
        options = {
            "window_shape": window,
            "strides": self.draw(st.sampled_from([None, 2])),
            "padding": self.draw(st.sampled_from(["VALID", "SAME", ((0, 1),) * rank])),
        }
        link = kind(**options)
        return link, options, link.shape_after(shape, {})

    def max_pool(self, shape, depth, keep):
        return self.pool(spec.MaxPool, shape)

    def avg_pool(self, shape, depth, keep):
        return self.pool(spec.AvgPool, shape)

    def global_avg_pool(self, shape, depth, keep):
        return spec.GlobalAvgPool(), {}, shape[-1:]

    def flatten(self, shape, depth, keep):
        return spec.Flatten(), {}, (math.prod(shape),)

    def activation(self, shape, depth, keep):
        return spec.Activation("relu"), {}, shape

    def dropout(self, shape, depth, keep):
        return spec.Dropout(), {}, shape

    def batch_norm(self, shape, depth, keep):
        roles = self.draw(st.sampled_from(["", "scale", "bias", "scale bias"])).split()
        path = self.own(dict.fromkeys(roles, shape[-1:])) if roles else None
        return spec.BatchNorm(path), {"path": path}, shape

    def block(self, shape, depth, keep):
        path = self.own({"kernel": (2, 3), "bias": (3,)})
        numbers = {
            name: self.draw(st.floats(0.1, 10.0))
            for name in ("weight_curvature", "input_curvature", "forward_gain")
        }
        declared: dict[str, Any] = dict(numbers)
        if self.draw(st.booleans()):
            name = self.draw(st.sampled_from(sorted(numbers)))
            declared[name] = total_square
            numbers[name] = 0.5 + sum(
                float((leaf**2).sum()) for leaf in self.params[path].values()
            )
        return spec.Block(path, **declared), {"path": path, **numbers}, shape

    def residual(self, shape, depth, keep):
        strides = 1
        links, layers, after = [], [], shape
        if len(shape) > 1 and not keep and self.draw(st.booleans()):
            strides = 2
            link, layer, after = self.conv(
                shape, depth, keep=True, strides=strides, padding="SAME"
            )
            links, layers = [link], [{"kind": "conv", **layer}]
        size = self.draw(st.integers(1, 3))
        more_links, more_layers, after = self.chain(after, size, depth - 1, keep=True)
        links, layers = links + more_links, layers + more_layers
        arm: tuple[list[Any], list[Any]] = ([], [])
        if after != shape or self.draw(st.booleans()):
            if strides == 2:
                link, layer, _ = self.conv(
                    shape,
                    depth,
                    keep=True,
                    features=after[-1],
                    strides=strides,
                    padding="SAME",
                )
                kind = "conv"
            else:
                link, layer, _ = self.dense(shape, depth, keep, features=after[-1])
                kind = "dense"
            arm = ([link], [{"kind": kind, **layer}])
        return (
            spec.Residual(links, arm[0]),
            {"branch": layers, "shortcut": arm[1]},
            after,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sketch = Sketch(draw)
    rank = draw(st.integers(0, 3))
    sizes = st.integers(3, 6) if rank < 3 else st.just(4)
    input_shape = (*[draw(sizes) for _ in range(rank)], draw(st.integers(1, 4)))
    links, layers, _ = sketch.chain(
        input_shape, draw(st.integers(1, 8)), depth=2, keep=False
    )
    chain = spec.LayerChain(links, input_shape=input_shape)
    return Case(chain, layers, sketch.params)


def assert_agrees_with_the_reference(case: Case, dtype: Any, rtol: float):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), case.params)
    expected = reference.layer_scales(
        case.layers, as_float64(params), case.chain.input_shape
    )
    assert_close(scales_of(case.chain, params), expected, rtol)


@hypothesis.settings(max_examples=15)
@hypothesis.given(case=cases())
def test_random_chains_agree_with_the_reference_in_float32(case):
    assert_agrees_with_the_reference(case, jnp.float32, 1e-5)


@hypothesis.settings(max_examples=30)
@hypothesis.given(case=cases())
def test_random_chains_agree_with_the_reference_in_float64(case):
    with jax.enable_x64(True):
        assert_agrees_with_the_reference(case, jnp.float64, 1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_have_the_scales_of_their_exact_values(dtype):
    # 100 squared times the number of entries is beyond float16: norms need float32.
    params = models.init_params(models.ConvNet(), models.CONV_NET)
    params = jax.tree.map(lambda leaf: (leaf * 100).astype(dtype), params)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_close(
        scales_of(models.CONV_NET, params), scales_of(models.CONV_NET, exact), 1e-6
    )


# Depth.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_norms_cancel_exactly_in_a_thousand_normalized_layers(dtype):
    # Norms from 1e-2 to 1e4: any product of more than ten of them leaves float32.
    rng = np.random.default_rng(0)
    names = " ".join(f"layer{i}" for i in range(1000))
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=(4, 4)) * size, dtype)}
        for name, size in zip(
            names.split(), 10 ** rng.uniform(-1, 2, 1000), strict=True
        )
    }
    norms = {n: float((x["kernel"] ** 2).sum()) for n, x in as_float64(params).items()}
    scales = bmo.layer_scales(
        dense_chain(names, normalized=True), params, normalize=False
    )
    expected = {name: norm / norms["layer999"] for name, norm in norms.items()}
    expected["layer999"] = 1.0
    assert_close({n: float(s) for n, s in scales.items()}, expected, 2e-6)


def test_a_thousand_layers_without_normalization_add_up_in_the_log_domain():
    # The product wanders over some ten orders of magnitude; float32 carries its log to
    # about 1e-5, which is the relative error of the scales.
    rng = np.random.default_rng(0)
    names = [f"layer{i}" for i in range(1000)]
    params = {n: {"kernel": rng.normal(size=(4, 4)).astype(np.float32)} for n in names}
    logs = rng.normal(size=1000) * 0.5
    for name, log in zip(names, logs, strict=True):
        params[name]["kernel"] *= (
            2 * math.exp(log / 2) / np.linalg.norm(params[name]["kernel"])
        )
    scales = bmo.layer_scales(dense_chain(" ".join(names)), params, normalize=False)
    actual = [math.log(scale) for scale in scales.values()]
    # The moment from below and the factor from above: all gains but the layer's own.
    np.testing.assert_allclose(actual, logs - logs.sum(), atol=1e-4)


@pytest.mark.parametrize("gain", [1e-3, 1e3])
def test_scales_beyond_float32_stay_finite_and_positive(gain):
    names = " ".join(f"layer{i}" for i in range(60))
    params = jax.tree.map(lambda leaf: leaf * gain, dense_params(names))
    scales = scales_of(dense_chain(names), params)
    limits = np.finfo(np.float32)
    assert all(limits.tiny <= scale <= limits.max for scale in scales.values())


# Zeros, infinities and NaN.


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    "zeros", [z for n in (1, 2, 3) for z in itertools.combinations("abc", n)], ids=str
)
def test_a_kernel_of_zeros_counts_as_one_that_keeps_the_signals_size(zeros, normalized):
    # Whichever layers are zero, a head or the kernel in front of a BatchNorm.
    chain = dense_chain("a b c", normalized=normalized)
    params = dense_params("a b c")
    of_gain_one = params | {name: {"kernel": jnp.full((4, 4), 0.5)} for name in zeros}
    params |= {name: {"kernel": jnp.zeros((4, 4))} for name in zeros}
    assert_close(scales_of(chain, params), scales_of(chain, of_gain_one), 1e-6)


def test_a_batch_norm_of_zeros_has_finite_scales_around_it():
    chain = spec.LayerChain(
        [spec.Dense("a"), spec.BatchNorm("norm"), spec.Dense("b")], input_shape=(4,)
    )
    zeros = {"scale": jnp.zeros(4), "bias": jnp.zeros(4)}
    scales = scales_of(chain, dense_params("a b") | {"norm": zeros})
    assert all(0 < scale < math.inf for scale in scales.values())


RESIDUAL = spec.LayerChain(
    [
        spec.Dense("stem"),
        spec.BatchNorm(),
        spec.Activation("relu"),
        spec.Residual(
            [
                spec.Dense("branch1"),
                spec.BatchNorm(),
                spec.Activation("relu"),
                spec.Dense("branch2"),
                spec.BatchNorm("last_norm"),
            ]
        ),
        spec.Dense("head"),
    ],
    input_shape=(8,),
)


def residual_params(scale: float) -> Params:
    params = dense_params("stem branch1 branch2 head", width=8)
    params["last_norm"] = {"scale": jnp.full(8, scale), "bias": jnp.zeros(8)}
    return params


def test_layers_outside_a_branch_of_zeros_have_the_scales_without_it():
    params = residual_params(0.0)
    without = spec.LayerChain(
        [spec.Dense("stem"), spec.BatchNorm(), spec.Dense("head")], input_shape=(8,)
    )
    outside = {name: params[name] for name in ("stem", "head")}
    scales = scales_of(RESIDUAL, params)
    for path, expected in scales_of(without, outside).items():
        np.testing.assert_allclose(scales[path], expected, rtol=1e-6)


def test_layers_inside_a_branch_of_zeros_have_the_scales_of_one_that_is_not():
    scales = scales_of(RESIDUAL, residual_params(0.0))
    expected = scales_of(RESIDUAL, residual_params(1.0))
    for name in ("branch1/kernel", "branch2/kernel", "last_norm/scale"):
        np.testing.assert_allclose(scales[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-20, 0.03])
def test_a_small_head_counts_as_the_floor_to_the_layers_below(size):
    chain = dense_chain("a b c", normalized=False)
    params = dense_params("a b c")

    def with_head(squared_row_norm, floor):
        head = {"kernel": jnp.full((4, 4), (squared_row_norm / 4) ** 0.5)}
        return scales_of(chain, params | {"c": head}, floor)

    assert_close(with_head(size, 0.1), with_head(0.1, 0.0), 1e-5)
    assert_close(with_head(0.2, 0.1), with_head(0.2, 0.0), 1e-6)


def test_a_small_kernel_below_a_batch_norm_knows_no_floor():
    chain = dense_chain("a b c", normalized=True)
    params = dense_params("a b c")
    small = params | {"a": {"kernel": 1e-4 * params["a"]["kernel"]}}
    with_floor, without = (scales_of(chain, small, floor) for floor in (0.1, 0.0))
    assert_close(with_floor, without, 1e-6)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("value", [1e30, math.inf, -math.inf, 1e-30, 1e-42])
def test_a_kernel_that_leaves_float32_gives_finite_positive_scales(value, normalized):
    # In any one layer, or in all: then a scale is a ratio of such norms.
    chain = dense_chain("a b c", normalized=normalized)
    for names in ("a", "b", "c", "abc"):
        params = dense_params("a b c")
        params |= {name: {"kernel": jnp.full((4, 4), value)} for name in names}
        scales = scales_of(chain, params)
        assert all(0 < scale < math.inf for scale in scales.values())


@pytest.mark.parametrize("name", ["stem", "branch1", "branch2", "last_norm", "head"])
def test_nan_in_a_parameter_shows_in_the_scales_that_depend_on_it_and_no_others(name):
    params = residual_params(0.5)
    before = scales_of(RESIDUAL, params)
    params[name] = jax.tree.map(lambda leaf: leaf + 1, params[name])
    dependent = {n for n, s in scales_of(RESIDUAL, params).items() if s != before[n]}
    params[name] = jax.tree.map(lambda leaf: leaf * math.nan, params[name])
    after = scales_of(RESIDUAL, params)
    assert {path for path, scale in after.items() if math.isnan(scale)} == dependent
    assert dependent


# Training from zeros. What lies behind a zero has no gradient at first, and behind the
# tiny number that it is at the next step a tiny one: neither may end the training.


class Run(NamedTuple):
    params: Any
    losses: jax.Array  # one for each step
    accuracy: float  # at the end


def train(apply: Any, params: Any, chain: spec.LayerChain, learning_rate: float) -> Run:
    """150 steps of the whole optimizer on a separable problem."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(128, 8)), jnp.float32)
    labels = jnp.argmax(inputs @ rng.normal(size=(8, 3)), axis=-1)
    optimizer = bmo.backmatch_sgd(
        learning_rate, chain, weight_decay=5e-4, normalize=False
    )

    def loss(params):
        logits = apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run(params):
        start = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(step, start, length=150)
        return params, losses, jnp.mean(apply(params, inputs).argmax(-1) == labels)

    params, losses, accuracy = run(params)
    return Run(params, losses, float(accuracy))


class ZeroHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="fc1")(x))
        x = nn.relu(nn.Dense(12, name="fc2")(x))
        return nn.Dense(3, kernel_init=nn.initializers.zeros, name="fc3")(x)


@pytest.mark.parametrize("learning_rate", [0.002, 0.1])
def test_training_from_a_head_of_zeros_learns(learning_rate):
    net = ZeroHead()
    start: Any = net.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    assert not start["fc3"]["kernel"].any()
    run = train(
        lambda p, x: net.apply({"params": p}, x), start, models.MLP, learning_rate
    )
    # No step may throw the network far off, least of all with a small learning rate.
    assert run.losses.max() < 2 * run.losses[0]
    assert run.accuracy > 0.85


class ZeroBranch(nn.Module):
    """What `RESIDUAL` declares."""

    @nn.compact
    def __call__(self, x):
        def norm(x):
            layer = nn.BatchNorm(
                use_running_average=False, use_bias=False, use_scale=False
            )
            return layer(x)

        def dense(features, name):
            return nn.Dense(features, use_bias=False, name=name)

        x = nn.relu(norm(dense(8, "stem")(x)))
        branch = dense(8, "branch2")(nn.relu(norm(dense(8, "branch1")(x))))
        branch = nn.BatchNorm(
            use_running_average=False,
            scale_init=nn.initializers.zeros,
            name="last_norm",
        )(branch)
        return dense(3, "head")(x + branch)


@pytest.mark.parametrize("learning_rate", [0.002, 0.02])
def test_training_from_a_branch_of_zeros_moves_the_branch(learning_rate):
    net = ZeroBranch()
    variables: Any = net.init(jax.random.key(0), jnp.ones((2, 8)))
    stats, start = variables["batch_stats"], variables["params"]
    assert not start["last_norm"]["scale"].any()

    def apply(params, x):
        both = {"params": params, "batch_stats": stats}
        return net.apply(both, x, mutable=["batch_stats"])[0]

    run = train(apply, start, RESIDUAL, learning_rate)
    assert run.losses.max() < 2 * run.losses[0]
    assert run.losses[-1] < 0.8 * run.losses[0]
    for name in ("branch1", "branch2"):
        # Weight decay alone would shorten a kernel and not turn it.
        before, after = (jnp.ravel(p[name]["kernel"]) for p in (start, run.params))
        cosine = before @ after / jnp.linalg.norm(before) / jnp.linalg.norm(after)
        assert cosine < 0.999
    assert jnp.abs(run.params["last_norm"]["scale"]).max() > 0.01


# Invariances.


@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_scaling_a_normalized_kernel_by_c_scales_its_layer_by_c_squared_alone(name):
    params = models.init_params(models.ConvNet(), models.CONV_NET)
    before = scales_of(models.CONV_NET, params)
    params[name]["kernel"] *= 3
    after = scales_of(models.CONV_NET, params)
    # The bias of the layer is divided by the same batch variance as its kernel.
    factors = {path: 9 if path.startswith(f"{name}/") else 1 for path in before}
    assert_close(after, {path: before[path] * f for path, f in factors.items()}, 1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_the_names_of_the_layers_change_nothing(normalized):
    # JAX sorts the keys of dicts, so with other names a tree has another order. Twelve
    # layers are enough to take the path for long chains.
    old = list("abcdefghijkl")
    new = [f"layer_{i}" for i in range(12)]  # layer_10 comes before layer_2
    params = dense_params(" ".join(old))
    renamed = {n: params[o] for o, n in zip(old, new, strict=True)}
    reordered = dict(reversed(renamed.items()))
    scales, other = (
        bmo.layer_scales(
            dense_chain(" ".join(names), normalized=normalized), p, normalize=False
        )
        for names, p in ((old, params), (new, reordered))
    )
    assert list(other) == new
    assert [float(s) for s in scales.values()] == [float(s) for s in other.values()]


LONG = dense_chain("a b c d e f g h i j k l")


@pytest.mark.parametrize(
    ("chain", "params"),
    [
        (RESIDUAL, residual_params(0.5)),
        (LONG, dense_params("a b c d e f g h i j k l")),
    ],
    ids=["residual", "long"],
)
class TestTransformations:
    def test_jit_gives_the_eager_scales(self, chain, params):
        eager = bmo.layer_scales(chain, params, normalize=False)
        jitted = jax.jit(lambda p: bmo.layer_scales(chain, p, normalize=False))(params)
        for path, scale in eager.items():
            np.testing.assert_allclose(jitted[path], scale, rtol=1e-6)

    def test_vmap_gives_each_of_stacked_networks_its_own_scales(self, chain, params):
        networks = [jax.tree.map(lambda leaf, c=c: leaf * c, params) for c in (1, 2, 3)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
        batched = jax.vmap(lambda p: bmo.layer_scales(chain, p, normalize=False))(
            stacked
        )
        for i, network in enumerate(networks):
            for path, scale in bmo.layer_scales(
                chain, network, normalize=False
            ).items():
                np.testing.assert_allclose(batched[path][i], scale, rtol=2e-5)

    def test_nothing_relies_on_implicit_promotion(self, chain, params):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            scales_of(chain, params)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_does_not_rely_on_it_either(self, chain, params, dtype):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            scales_of(chain, params)


# What `layer_scales` and `describe` tell.


def test_layer_scales_are_those_of_the_kernels():
    params = models.init_params(models.ConvNet(), models.CONV_NET)
    of_params = scales_of(models.CONV_NET, params)
    main = {"conv1": "kernel", "norm1": "scale", "conv2": "kernel", "norm2": "scale"}
    main["head"] = "kernel"
    scales = bmo.layer_scales(models.CONV_NET, params, normalize=False)
    assert list(scales) == list(main)
    for path, role in main.items():
        np.testing.assert_allclose(scales[path], of_params[f"{path}/{role}"], rtol=1e-6)


def test_describe_shows_the_kernels_shape_and_scale_for_a_layer_with_a_bias():
    chain = spec.LayerChain([spec.Dense("fc")], input_shape=(4,))
    params = {"fc": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
    header, row = bmo.describe(chain, params, normalize=False).splitlines()
    cells = dict(zip(header.split(), row.split(), strict=True))
    assert cells["kernel"] == "4*2"
    assert cells["scale"] == "1"


def test_the_floor_is_for_norms_alone():
    params = {
        "block": {"w": jnp.ones(3)},
        "head": {"kernel": jnp.full((4, 2), 0.5)},  # a norm above the floor
    }

    def of_block(curvature: Any) -> np.ndarray:
        block = spec.Block("block", weight_curvature=curvature, input_curvature=1.0)
        chain = spec.LayerChain([block, spec.Dense("head")], input_shape=(4,))
        return np.asarray(bmo.layer_scales(chain, params, normalize=False)["block"])

    np.testing.assert_allclose(
        of_block(lambda _: jnp.float32(1e-3)), of_block(1e-3), rtol=1e-6
    )
    # A sigmoid's gain is about 0.05.
    links = [spec.Block("block", weight_curvature=1.0, input_curvature=1.0)]
    links += [spec.Activation("sigmoid"), spec.Dense("head")]
    chain = spec.LayerChain(links, input_shape=(4,))
    default, none = (
        bmo.layer_scales(
            chain, params, gains="mean_field", norm_floor=floor, normalize=False
        )
        for floor in (0.1, 0.0)
    )
    assert default["block"] > 10
    np.testing.assert_array_equal(default["block"], none["block"])


@pytest.mark.parametrize(
    ("name", "integral"),  # of the squared slope over all inputs
    [("hard_tanh", 2.0), ("relu6", 6.0), ("sigmoid", 1 / 6), ("tanh", 4 / 3)],
)
@pytest.mark.parametrize("size", [20.0, 300.0, 1e10])
def test_mean_field_gains_of_units_that_saturate(name, integral, size):
    params = {"a": {"kernel": size * jnp.eye(4)}, "b": {"kernel": jnp.eye(4)}}
    links = [spec.Dense("a"), spec.Activation(name), spec.Dense("b")]
    chain = spec.LayerChain(links, input_shape=(4,))
    scale = bmo.layer_scales(chain, params, gains="mean_field", normalize=False)["a"]
    # A Gaussian so wide has the density of its middle wherever the slope is not zero.
    wanted = size * math.sqrt(2 * math.pi) / integral
    np.testing.assert_allclose(scale, wanted, rtol=0.04)
