"""Layers with stacked parameters, against the chain that has them one by one."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backmatch_optax as bmo
from backmatch_optax import recursion, spec

WIDTH, POSITIONS = 8, 6
GELU, RELU, TANH = map(spec.Activation, ("gelu", "relu", "tanh"))
FIRST, HEAD = spec.Dense("first"), spec.Dense("head")
ATTENTION = [
    spec.Residual([spec.LayerNorm("ln1"), spec.Attention("attend", causal=True)]),
    spec.Residual([spec.LayerNorm("ln2"), spec.Dense("up"), GELU, spec.Dense("down")]),
]
GATED = [
    spec.Residual(
        [
            spec.RMSNorm("ln1"),
            spec.Gate(
                [spec.Dense("up")], [spec.Dense("gate"), spec.Activation("silu")]
            ),
            spec.Dense("down"),
        ]
    )
]
LAYERS: dict[str, Sequence[spec.Link]] = {
    "linear": [spec.Dense("down")],
    "mlp": [spec.Dense("down"), GELU],
    "branch": [spec.Residual([spec.Dense("up"), RELU, spec.Dense("down")])],
    "batch_norm": [spec.Dense("square"), spec.BatchNorm("ln1"), TANH],
    "batch_norm_first": [spec.BatchNorm("ln1"), TANH, spec.Dense("square")],
    "norm_last": [GELU, spec.Dense("square"), spec.LayerNorm("ln1")],
    "layer_norm": [spec.LayerNorm("ln1"), spec.Dense("square")],
    "gated": GATED,
    "transformer": ATTENTION,
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    **{name: {"scale": (WIDTH,), "bias": (WIDTH,)} for name in ("ln1", "ln2")},
    "square": {"kernel": (WIDTH, WIDTH)},
    "gate": {"kernel": (WIDTH, 2 * WIDTH)},
    "up": {"kernel": (WIDTH, 2 * WIDTH), "bias": (2 * WIDTH,)},
    "attend/out": {"kernel": (2, WIDTH // 2, WIDTH), "bias": (WIDTH,)},
    **{
        f"attend/{name}": {"kernel": (WIDTH, 2, WIDTH // 2), "bias": (2, WIDTH // 2)}
        for name in ("query", "key", "value")
    },
}


def shapes_of(path: str, link: Any, layer: Sequence[spec.Link]) -> Any:
    """The shapes of one layer's parameters at a path."""
    if path == "down":  # from what is above it
        wide = any(inner.path == "up" for inner in owners(layer))
        features = 2 * WIDTH if wide else WIDTH
        return {"kernel": (features, WIDTH), "bias": (WIDTH,)}
    return {role: s for role, s in SHAPES[path].items() if role in link.roles}


def owners(layer: Sequence[spec.Link]) -> list[Any]:
    chain = spec.LayerChain(layer, input_shape=(POSITIONS, WIDTH))
    found: list[Any] = []

    def visit(links: Sequence[spec.Link]) -> None:
        for link in links:
            if not link.arms and getattr(link, "path", None) in chain.paths:
                found.append(link)
            for arm in link.arms.values():
                visit(arm)

    visit(layer)
    return found


def stacked_params(layer: Sequence[spec.Link], *stack: int, size: float = 1.0) -> Any:
    """Random parameters of layers whose norms differ, by path and role."""
    rng = np.random.default_rng(0)
    params: dict[str, Any] = {}
    for link in owners(layer):
        params[link.path] = {}
        for role, shape in shapes_of(link.path, link, layer).items():
            leaf = rng.normal(size=(*stack, *shape)) * size / shape[0] ** 0.5
            each = np.exp(0.3 * rng.normal(size=stack))
            leaf *= each.reshape(*stack, *[1] * len(shape))
            leaf += role == "scale"
            params[link.path][role] = jnp.asarray(leaf, jnp.float32)
    return params


def around(*names: str) -> Any:
    rng = np.random.default_rng(1)
    kernels = {name: rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5 for name in names}
    return {
        name: {"kernel": jnp.asarray(k, jnp.float32)} for name, k in kernels.items()
    }


def params_of(layer: Sequence[spec.Link], *stack: int, size: float = 1.0) -> Any:
    """Those of the layers, and of a kernel before and behind them."""
    return stacked_params(layer, *stack, size=size) | around("first", "head")


def renamed(link: Any, suffix: str) -> Any:
    """A link whose parameters have other paths."""

    def change(value: Any, name: str = "") -> Any:
        if isinstance(value, spec.Link):
            return renamed(value, suffix)
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return f"{value}{suffix}" if name == "path" and value is not None else value

    names = [field.name for field in dataclasses.fields(link)]
    return dataclasses.replace(
        link, **{name: change(getattr(link, name), name) for name in names}
    )


def suffixes(stack: Sequence[int]) -> dict[tuple[int, ...], str]:
    indices = itertools.product(*map(range, stack))
    return {index: "_" + "_".join(map(str, index)) for index in indices}


def written_out(layer: Sequence[spec.Link], stack: Sequence[int]) -> list[spec.Link]:
    """All layers one after the other."""
    every = suffixes(stack).values()
    return [renamed(link, suffix) for suffix in every for link in layer]


def one_by_one(tree: Any, stack: Sequence[int]) -> Any:
    """Stacked parameters by the paths of `written_out`; others as they are."""
    found: dict[str, Any] = {}
    for path, leaves in tree.items():
        if path in ("first", "head"):
            found[path] = leaves
            continue
        for index, suffix in suffixes(stack).items():
            whole, _, role = path.partition("/")
            name = f"{whole}{suffix}/{role}" if role else f"{whole}{suffix}"
            found[name] = {role: leaf[index] for role, leaf in leaves.items()}
    return found


def agree(found: Any, expected: Any, atol: float = 0.0) -> None:
    """That all entries of two trees by path and role are the same but for rounding."""
    assert found.keys() == expected.keys()
    for path, leaves in found.items():
        for role, leaf in leaves.items():
            name = f"{path}/{role}"
            np.testing.assert_allclose(
                leaf, expected[path][role], 1e-5, atol, True, name
            )


def multiplied(chain: spec.LayerChain, *trees: Any, **options: Any) -> list[Any]:
    """Updates of ones, that is, the scales of all parameters of some trees."""
    tx = bmo.scale_by_backmatch(chain, **options)
    update = jax.jit(lambda ones, params: tx.update(ones, tx.init(params), params)[0])
    return [update(jax.tree.map(jnp.ones_like, params), params) for params in trees]


def agrees(
    layer: Sequence[spec.Link],
    *trees: Any,
    stack: Sequence[int] = (3,),
    ends: Sequence[spec.Link] = (),
    **options: Any,
) -> None:
    """That stacked layers are scaled as layers written out are."""
    (inner, *outer) = reversed(stack)
    repeated = spec.Repeat(layer, inner)
    for count in outer:
        repeated = spec.Repeat([repeated], count)
    whole = spec.LayerChain([FIRST, repeated, *ends], input_shape=(POSITIONS, WIDTH))
    assert eval(repr(whole)) == whole
    links = [FIRST, *written_out(layer, stack), *ends]
    flat = spec.LayerChain(links, input_shape=(POSITIONS, WIDTH))
    separate = [one_by_one(params, stack) for params in trees]
    pairs = zip(
        multiplied(whole, *trees, **options),
        multiplied(flat, *separate, **options),
        strict=True,
    )
    for found, expected in pairs:
        agree(one_by_one(found, stack), expected)


PAPER: dict[str, Any] = {"gains": "paper", "normalize": False}
MEAN_FIELD: dict[str, Any] = {"gains": "mean_field", "normalize": False}
BOTH = pytest.mark.parametrize("options", [PAPER, MEAN_FIELD], ids=["paper", "field"])


@BOTH
@pytest.mark.parametrize("name", LAYERS)
def test_scales_are_those_of_the_layers_written_out(name, options):
    layer = LAYERS[name]
    agrees(layer, params_of(layer, 3), ends=[HEAD], **options)


@pytest.mark.parametrize("options", [{"limit": None}, {"limit": 2.0}], ids=str)
@pytest.mark.parametrize("gains", ["paper", "mean_field"])
def test_each_layer_counts_in_the_mean_with_its_own_entries(gains, options):
    layer = LAYERS["branch"]
    agrees(layer, params_of(layer, 3), ends=[HEAD], gains=gains, **options)


AVERAGED = [spec.GlobalAvgPool(), HEAD]


@pytest.mark.parametrize("name", ["mlp", "batch_norm", "norm_last", "transformer"])
def test_what_positions_have_in_common_is_handed_on(name):
    # Below a mean over positions each gets the same cotangent.
    layer = LAYERS[name]
    agrees(layer, params_of(layer, 3), ends=AVERAGED, **MEAN_FIELD)


def test_a_layer_with_a_mean_in_an_arm_hands_on_what_positions_have_in_common():
    squeezed = [spec.GlobalAvgPool(), spec.Dense("square"), spec.Activation("sigmoid")]
    layer = [spec.Dense("down"), spec.Gate([], squeezed)]
    agrees(layer, params_of(layer, 3), ends=[HEAD], **MEAN_FIELD)


NORMED = [spec.LayerNorm(), HEAD]


@BOTH
@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("linear", []),
        ("linear", [HEAD]),
        ("layer_norm", [HEAD]),
        ("transformer", NORMED),
    ],
)
def test_zeros_in_one_layer_count_as_they_do_written_out(name, ends, options):
    layer, trees = LAYERS[name], []
    last = owners(layer)[-1].path
    for at in (0, 1, 2):
        params = params_of(layer, 3)
        zeroed = {role: leaf.at[at].set(0.0) for role, leaf in params[last].items()}
        trees.append(params | {last: zeroed})
    if HEAD not in ends:
        trees = [{k: v for k, v in tree.items() if k != "head"} for tree in trees]
    agrees(layer, *trees, ends=ends, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", PAPER), ("linear", MEAN_FIELD), ("transformer", PAPER)],
)
def test_small_norms_meet_the_floor_as_they_do_written_out(name, options, monkeypatch):
    # What a long chain no longer keeps apart, its floor counts in other places.
    monkeypatch.setattr(recursion, "_MOST_POWERS", 1000)
    layer = LAYERS[name]
    agrees(layer, params_of(layer, 3, size=0.1), ends=[HEAD], **options)


@BOTH
def test_stacks_in_stacks_have_a_scale_for_each_layer(options):
    layer = LAYERS["gated"]
    agrees(layer, params_of(layer, 2, 3), stack=(2, 3), ends=[HEAD], **options)
    inner = spec.Repeat([spec.Repeat(layer, 3)], 2)
    chain = spec.LayerChain([inner], input_shape=(POSITIONS, WIDTH))
    scales = bmo.layer_scales(chain, stacked_params(layer, 2, 3), **options)
    assert {scale.shape for scale in scales.values()} == {(2, 3)}


@BOTH
def test_an_arm_may_repeat_a_layer(options):
    layer, ends = LAYERS["mlp"], [HEAD]
    params = params_of(layer, 3)
    (found,), (expected,) = (
        multiplied(
            spec.LayerChain(
                [FIRST, spec.Residual(branch), *ends], input_shape=(POSITIONS, WIDTH)
            ),
            tree,
            **options,
        )
        for branch, tree in (
            ([spec.Repeat(layer, 3)], params),
            (written_out(layer, [3]), one_by_one(params, [3])),
        )
    )
    agree(one_by_one(found, [3]), expected)


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
def test_blocks_have_the_numbers_of_their_layer(gains):
    def squared(params: Any) -> jax.Array:
        return jnp.sum(params["deep"]["kernel"] ** 2)

    block = spec.Block("mix", weight_curvature=2.0, input_curvature=squared)
    kernels = {"deep": {"kernel": 1.0 + jnp.arange(12.0).reshape(3, 2, 2)}}
    links = [spec.Repeat([block], 3), HEAD]
    chain = spec.LayerChain(links, input_shape=(WIDTH,))
    scales = bmo.layer_scales(
        chain, {"mix": kernels} | around("head"), gains=gains, normalize=False
    )
    above = float(scales["mix"][-1])
    squares = np.square(np.asarray(kernels["deep"]["kernel"])).sum(axis=(1, 2))
    expected = above / np.cumprod([1.0, *squares[:0:-1]])[::-1]
    np.testing.assert_allclose(scales["mix"], expected, 1e-5)


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
def test_a_thousand_layers_have_finite_scales(gains):
    for name in ("branch", "transformer"):
        layer = LAYERS[name]
        params = stacked_params(layer, 1000, size=1.5)
        chain = spec.LayerChain(
            [spec.Repeat(layer, 1000)], input_shape=(POSITIONS, WIDTH)
        )
        for normalize in (False, True):
            scales = bmo.layer_scales(chain, params, gains=gains, normalize=normalize)
            for scale in scales.values():
                assert scale.shape == (1000,)
                assert jnp.isfinite(scale).all()
                assert (scale > 0).all()


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
def test_the_program_is_as_long_for_more_layers(gains):
    def lines(count: int) -> int:
        chain = spec.LayerChain(
            [FIRST, spec.Repeat(ATTENTION, count), HEAD],
            input_shape=(POSITIONS, WIDTH),
        )
        tx = bmo.scale_by_backmatch(chain, gains=gains)
        params = stacked_params(ATTENTION, count) | around("first", "head")
        lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
        return len(lowered.as_text().splitlines())

    assert lines(4) == lines(64)


def both_chains(layer: Sequence[spec.Link]) -> list[tuple[spec.LayerChain, Any]]:
    """Three layers stacked and written out, each with its parameters."""
    params = params_of(layer, 3)
    pairs = [
        ([spec.Repeat(layer, 3)], params),
        (written_out(layer, [3]), one_by_one(params, [3])),
    ]
    return [
        (spec.LayerChain([FIRST, *layers, HEAD], input_shape=(POSITIONS, WIDTH)), tree)
        for layers, tree in pairs
    ]


@pytest.mark.parametrize("refresh", [False, True])
def test_training_is_that_of_the_layers_written_out(refresh):
    ends = []
    for chain, params in both_chains(LAYERS["gated"]):
        tx = bmo.backmatch_sgd(0.1, chain, weight_decay=1e-2, refresh=refresh)
        state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(3):
            updates, state = step(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    # Entries that are nearly zero are differences of larger ones.
    agree(one_by_one(ends[0], [3]), ends[1], atol=1e-6)


def test_steps_after_adam_are_those_of_the_layers_written_out():
    found = []
    for chain, params in both_chains(LAYERS["gated"]):
        tx = bmo.scale_steps_by_backmatch(chain)
        ones = jax.tree.map(jnp.ones_like, params)
        found.append(jax.jit(tx.update)(ones, tx.init(params), params)[0])
    agree(one_by_one(found[0], [3]), found[1])


def test_scales_are_float64_where_a_parameter_is():
    layer = LAYERS["branch"]
    chain = spec.LayerChain([spec.Repeat(layer, 3)], input_shape=(WIDTH,))
    single = stacked_params(layer, 3)
    expected = bmo.layer_scales(chain, single, gains="mean_field")
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), single)
        for params in (double, single | {"up": double["up"]}):
            scales = bmo.layer_scales(chain, params, gains="mean_field")
            for path, scale in scales.items():
                assert scale.dtype == jnp.float64
                np.testing.assert_allclose(scale, expected[path], 1e-5)


@pytest.mark.parametrize("refresh", [False, True])
def test_nothing_leaks_and_nothing_is_nan_on_the_way(refresh):
    params = stacked_params(ATTENTION, 2)
    params["down"] = optax.tree.zeros_like(params["down"])
    chain = spec.LayerChain([spec.Repeat(ATTENTION, 2)], input_shape=(POSITIONS, WIDTH))
    tx = bmo.scale_by_backmatch(chain, gains="mean_field", refresh=refresh)
    with jax.checking_leaks(), jax.debug_nans(True), jax.debug_infs(True):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert not jnp.any(updates["down"]["kernel"])


def test_the_state_has_a_vector_from_the_start():
    layer = LAYERS["mlp"]
    chain = spec.LayerChain([spec.Repeat(layer, 3), HEAD], input_shape=(WIDTH,))
    params = stacked_params(layer, 3) | around("head")
    for refresh in (False, True):
        tx = bmo.scale_by_backmatch(chain, refresh=refresh)
        state: Any = tx.init(params)
        shapes = jax.tree.map(jnp.shape, state)
        assert state.layer_scales["down"].tolist() == [1.0] * 3
        assert shapes == jax.tree.map(jnp.shape, tx.update(params, state, params)[1])
        abstract: Any = jax.eval_shape(tx.init, params)
        assert abstract.layer_scales["down"].shape == (3,)
        longer = spec.LayerChain([spec.Repeat(layer, 4), HEAD], input_shape=(WIDTH,))
        other = stacked_params(layer, 4) | around("head")
        tx = bmo.scale_by_backmatch(longer, refresh=refresh)
        with pytest.raises(ValueError, match="that init of the same transformation"):
            tx.update(other, state, other)


def test_the_table_has_the_least_and_the_largest_scale():
    kernels = jnp.stack([jnp.eye(WIDTH), 2 * jnp.eye(WIDTH)])
    params = {"layers": {"kernel": kernels}}
    chain = spec.LayerChain(
        [spec.Repeat([spec.Dense("layers")], 2)], input_shape=(WIDTH,)
    )
    rows = bmo.describe(chain, params, normalize=False).splitlines()
    assert rows[1].split()[:3] == ["Repeat", "2", "layers"]
    assert rows[3].split() == "Dense layers 2*8*8 8 1 0.25 to 1".split()


POOLED = [spec.MaxPool((2,), padding="SAME"), spec.Dense("down"), RELU]
DENSE = spec.Dense("down")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec.Repeat([DENSE], 0), r"n \(=0\) must be an int of at least 1"),
        (lambda: spec.Repeat([DENSE], cast(Any, 2.5)), "must be an int"),
        (lambda: spec.Repeat(cast(Any, ["down"]), 2), r"chain\[0\] must be a link"),
        (
            lambda: spec.Repeat([DENSE, spec.Tied([DENSE])], 2),
            "Tied, but a layer of a Repeat may use no parameter twice",
        ),
        (
            lambda: spec.LayerChain(
                [spec.Repeat([DENSE], 2), spec.Tied([DENSE])], input_shape=(WIDTH,)
            ),
            "Tied, but the parameters at 'down' are those of several layers",
        ),
        (
            lambda: spec.LayerChain(
                [spec.Repeat([DENSE], 2), DENSE], input_shape=(WIDTH,)
            ),
            "two layers declare the path 'down'",
        ),
        (
            lambda: spec.LayerChain(
                [spec.Repeat([spec.Input((WIDTH,)), DENSE], 2)], input_shape=(WIDTH,)
            ),
            "begin with an input of their own",
        ),
    ],
)
def test_what_cannot_be_repeated_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (
            [DENSE],
            (3, WIDTH, WIDTH),
            r"'down' \(layers\[0\]\.chain\[0\]\): its kernel has shape \(3, 8, 8\), "
            r"but expected \(4, \.\.\.\): an entry for each layer of a Repeat",
        ),
        ([DENSE], (WIDTH, WIDTH), r"has shape \(8, 8\), but expected \(4, \.\.\.\)"),
        (
            [DENSE],
            (4, WIDTH, 5),
            r"its chain puts out shape \(6, 5\), but each of its 4 layers takes what",
        ),
        (
            [spec.Block("down", weight_curvature=1.0, input_curvature=1.0)],
            (3, WIDTH),
            r"its kernel has shape \(3, 8\), but expected \(4, \.\.\.\)",
        ),
    ],
)
def test_parameters_that_are_not_stacked_are_refused(layer, shape, message):
    chain = spec.LayerChain([spec.Repeat(layer, 4)], input_shape=(POSITIONS, WIDTH))
    leaf: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        bmo.check_spec(chain, {"down": {"kernel": leaf}})


def test_a_pooling_that_needs_the_layer_before_is_refused():
    chain = spec.LayerChain([spec.Repeat(POOLED, 2)], input_shape=(POSITIONS, WIDTH))
    params = stacked_params(POOLED, 2)
    bmo.layer_scales(chain, params)
    with pytest.raises(ValueError, match="activation that the layer before ended with"):
        bmo.layer_scales(chain, params, gains="mean_field")
    # At the end of the layer it is known.
    moved = [*POOLED[1:], POOLED[0]]
    agrees(moved, params | around("first"), stack=(2,), **MEAN_FIELD)
