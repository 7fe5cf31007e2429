"""A signal that several arms read, against Jacobians and chains unrolled."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from agreements import agreement, normal

import backmatch_optax as bmo
from backmatch_optax import spec

RECALL = spec.Recall((5, 16))


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    own, other = jax.random.split(key)
    return jax.random.normal(own, (5, 8)), jax.random.normal(other, (5, 12))


class Sums(nn.Module):
    """What an encoder puts out is added twice, through a kernel each time."""

    @nn.compact
    def __call__(self, x, y):
        kept = nn.Dense(16, name="encoder")(x)
        y = nn.Dense(16, name="decoder")(y)
        y = y + nn.Dense(16, name="a")(kept)
        return nn.Dense(3, name="head")(nn.relu(y)) + nn.Dense(3, name="b")(kept)


SUMS = [
    spec.Input((5, 12)),
    spec.Dense("decoder"),
    spec.Residual([RECALL, spec.Dense("a")]),
    spec.Residual(
        [spec.Activation("relu"), spec.Dense("head")], [RECALL, spec.Dense("b")]
    ),
]


def test_curvatures_of_all_that_read_a_memory_add_up():
    links = [spec.Dense("encoder"), spec.Memory(SUMS)]
    ratios = agreement(Sums(), links, draw)
    assert len(ratios) == 10
    for path, ratio in ratios.items():
        assert 0.9 < ratio < 1.1, (path, ratio)


@pytest.mark.parametrize("gains", ["paper", "mean_field"])
def test_a_memory_is_what_a_chain_with_the_encoder_twice_declares(gains):
    again = [spec.Input((5, 8)), spec.Tied([spec.Dense("encoder")])]
    first = spec.Residual([spec.Dense("encoder"), spec.Dense("a")], SUMS[:2])
    last = spec.Residual(SUMS[3].branch, [*again, spec.Dense("b")])
    kept = spec.LayerChain(
        [spec.Dense("encoder"), spec.Memory(SUMS)], input_shape=(5, 8)
    )
    unrolled = spec.LayerChain([first, last], input_shape=(5, 8))
    inputs = (jnp.ones((1, 5, 8)), jnp.ones((1, 5, 12)))
    params = Sums().init(jax.random.key(0), *inputs)["params"]
    one, other = (
        jax.tree.map(
            float, bmo.layer_scales(chain, params, gains=gains, normalize=False)
        )
        for chain in (kept, unrolled)
    )
    assert one == pytest.approx(other, rel=1e-5)


class Two(nn.Module):
    """Two signals are kept, and each is read twice."""

    @nn.compact
    def __call__(self, x, y, z):
        x, y = nn.Dense(16, name="x")(x), nn.Dense(16, name="y")(y)
        y = y + nn.Dense(16, name="xy")(x)
        z = nn.Dense(16, name="z")(z)
        z = z + nn.Dense(16, name="xz")(x) + nn.Dense(16, name="yz")(y)
        return nn.Dense(3, name="head")(z) + nn.Dense(3, name="last")(y)


def test_memories_have_names():
    x, y = spec.Recall((5, 16), "x"), spec.Recall((5, 16))
    inner = [
        spec.Input((5, 12)),
        spec.Dense("z"),
        spec.Residual([x, spec.Dense("xz")]),
        spec.Residual([y, spec.Dense("yz")]),
        spec.Residual([spec.Dense("head")], [y, spec.Dense("last")]),
    ]
    outer = [
        spec.Input((5, 4)),
        spec.Dense("y"),
        spec.Residual([x, spec.Dense("xy")]),
        spec.Memory(inner),
    ]
    links = [spec.Dense("x"), spec.Memory(outer, "x")]

    def drawn(key: jax.Array) -> tuple[jax.Array, ...]:
        last, key = jax.random.split(key)
        one, two = draw(key)
        return one, jax.random.normal(last, (5, 4)), two

    for path, ratio in agreement(Two(), links, drawn).items():
        assert 0.85 < ratio < 1.15, (path, ratio)
    assert eval(repr(links[1])) == links[1]


class Across(nn.Module):
    """Two layers that attend to one encoder's output."""

    @nn.compact
    def __call__(self, x, y):
        kept = nn.LayerNorm(name="norm")(nn.Dense(16, name="encoder")(x))
        y = nn.Dense(16, name="decoder")(y)
        for name in "ab":
            normed = nn.LayerNorm(name=f"norm_{name}")(y)
            y = y + nn.MultiHeadDotProductAttention(2, name=name)(normed, kept)
        return y


def test_layers_that_attend_to_one_encoder():
    layers = [
        spec.Residual(
            [spec.LayerNorm(f"norm_{name}"), spec.Attention(name, memory=RECALL)]
        )
        for name in "ab"
    ]
    memory = spec.Memory([spec.Input((5, 12)), spec.Dense("decoder"), *layers])
    links = [spec.Dense("encoder"), spec.LayerNorm("norm"), memory]
    ratios = agreement(Across(), links, draw, draws=60)
    for path in (
        "encoder",
        "decoder",
        *(f"{a}/{b}" for a in "ab" for b in ("query", "key", "value", "out")),
    ):
        assert 0.6 < ratios[f"{path}/kernel"] < 1.6, (path, ratios[f"{path}/kernel"])


@pytest.mark.parametrize(
    ("links", "message"),
    [
        (
            lambda: [spec.Memory([spec.Dense("d")])],
            "none of its links is a spec.Recall",
        ),
        (
            lambda: [spec.Memory([spec.Residual([RECALL])], "text")],
            "none of its links is a spec.Recall of 'text'",
        ),
        (
            lambda: [spec.Residual([spec.Recall((5, 8), "text"), spec.Dense("d")])],
            r"Recall\(\(5, 8\), 'text'\) is inside no spec.Memory of 'text'",
        ),
        (
            lambda: [spec.Residual([RECALL, spec.Dense("d")])],
            r"Recall\(\(5, 16\)\) is inside no spec.Memory",
        ),
        (
            lambda: [spec.Memory([spec.Dense("d"), RECALL])],
            "must be the first link of an arm",
        ),
        (
            lambda: [spec.Memory([spec.Repeat([spec.Residual([RECALL])], 2)])],
            r"Recall.* is inside: a layer of a Repeat has one signal",
        ),
        (
            lambda: [spec.Memory([spec.Concatenate([[], [RECALL]])])],
            r"keeps a signal of shape \(5, 8\), but spec.Recall\(\(5, 16\)\) is inside",
        ),
    ],
)
def test_a_recall_has_its_place_and_shape(links, message):
    with pytest.raises(ValueError, match=message):
        chain = spec.LayerChain(links(), input_shape=(5, 8))
        bmo.check_spec(chain, {"d": {"kernel": jnp.ones((8, 8))}})


class Asked(nn.Module):
    """A learned array attends to what an encoder puts out."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="encoder")(x)
        asked = self.param("asked", nn.initializers.normal(2.0), (3, 16))
        asked = nn.Dense(16, name="decoder")(asked[None].repeat(len(x), axis=0))
        return asked + nn.MultiHeadDotProductAttention(2, name="a")(asked, x)


def test_queries():
    attention = spec.Attention("a", memory=spec.Recall((9, 16)))
    inside = [spec.Queries((3, 16), "asked"), spec.Dense("decoder")]
    memory = spec.Memory([*inside, spec.Residual([attention])])
    links = [spec.Dense("encoder"), memory]
    ratios = agreement(Asked(), links, normal(9, 16))
    assert len(ratios) == 13
    for path, ratio in ratios.items():
        if not path.endswith("/bias"):  # see DotProductAttention
            assert 0.7 < ratio < 1.4, (path, ratio)


@pytest.mark.parametrize("shape", [(2, 16), (3, 1, 16), (16,)])
def test_queries_of_another_shape_are_named(shape):
    links = [spec.Residual([spec.Queries((3, 16), "asked")])]
    chain = spec.LayerChain(links, input_shape=(3, 16))
    with pytest.raises(ValueError, match=r"asked.* its array has shape .*\(3, 16\)"):
        bmo.check_spec(chain, {"asked": jnp.ones(shape)})
