"""Embeddings and tied parameters, against the models that have them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from agreements import agreement, normal

import backmatch_optax as bmo
from backmatch_optax import spec

RELU = spec.Activation("relu")
TOKENS, POSITIONS, FEATURES = 24, 6, 16


class LanguageModel(nn.Module):
    """Embedding, positions and one feed-forward block; a head of its own or tied."""

    tied: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(TOKENS, FEATURES, name="embed")
        x = embed(tokens)
        x += self.param("positions", nn.initializers.normal(0.3), (POSITIONS, FEATURES))
        x += nn.Dense(FEATURES, name="down")(nn.relu(nn.Dense(32, name="up")(x)))
        if self.tied:
            return embed.attend(x)
        return nn.Dense(TOKENS, use_bias=False, name="head")(x)


def links(*head: spec.Link) -> list[spec.Link]:
    return [
        spec.Embed("embed"),
        spec.Bias("positions"),
        spec.Residual([spec.Dense("up"), RELU, spec.Dense("down")]),
        *head,
    ]


def frequent(key: jax.Array) -> jax.Array:
    """Tokens of which the first few make up the most, as in text."""
    logits = -jnp.log(jnp.arange(1.0, TOKENS + 1))
    return jax.random.categorical(key, logits, shape=(POSITIONS,))


@pytest.mark.parametrize(
    ("tied", "head"),
    [(False, spec.Dense("head")), (True, spec.Tied([spec.Unembed("embed")]))],
)
def test_embeddings_are_scaled_as_their_jacobian_says(tied, head):
    ratios = agreement(LanguageModel(tied), links(head), frequent)
    assert "embed/embedding" in ratios
    for path, ratio in ratios.items():
        assert 0.75 < ratio < 1.3, (path, ratio)


def test_an_embedding_alone_is_exact():
    embed = nn.Embed(TOKENS, FEATURES)
    tokens = jnp.asarray([[3, 1, 3, 0]])
    params: Any = embed.init(jax.random.key(0), tokens)["params"]
    jacobian: Any = jax.jacrev(lambda p: embed.apply({"params": p}, tokens))(params)
    chain = spec.LayerChain([spec.Embed("")], input_shape=(4,))
    table = params["embedding"]
    measured = jnp.sum(jacobian["embedding"] ** 2) / table.size
    scale = bmo.layer_scales(chain, params, normalize=False)[""]
    assert float(scale * measured) == pytest.approx(1.0)
    # What a link above meets is the mean square of the table.
    chain = spec.LayerChain([spec.Embed("a"), spec.Dense("b")], input_shape=(4,))
    tree = {"a": params, "b": {"kernel": jnp.eye(FEATURES)}}
    above = bmo.layer_scales(chain, tree, normalize=False)["b"]
    assert float(above) == pytest.approx(1 / float(4 * jnp.mean(table**2)))


def test_the_curvatures_of_two_uses_add_up():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Dense(16, name="shared")
            x = nn.relu(shared(x))
            x = nn.Dense(16, name="between")(x)
            return nn.Dense(8, name="head")(nn.relu(shared(x)))

    declared = [
        spec.Dense("shared"),
        RELU,
        spec.Dense("between"),
        spec.Tied([spec.Dense("shared"), RELU]),
        spec.Dense("head"),
    ]
    for path, ratio in agreement(Twice(), declared, normal(16), draws=400).items():
        assert 0.8 < ratio < 1.25, (path, ratio)


def test_every_use_counts_and_every_function_knows_it():
    eye: Any = {"kernel": jnp.eye(4)}
    shared = spec.Dense("shared")
    params = {"shared": eye, "head": eye}
    chain = spec.LayerChain(
        [shared, spec.Tied([shared]), spec.Tied([shared]), spec.Dense("head")],
        input_shape=(4,),
    )
    assert chain.paths == ("shared", "head")
    scales = bmo.layer_scales(chain, params, normalize=False)
    assert {path: float(s) for path, s in scales.items()} == pytest.approx(
        {"shared": 1 / 3, "head": 1.0}
    )
    table = bmo.describe(chain, params, normalize=False)
    rows = [row.split() for row in table.splitlines() if "shared" in row]
    assert [row[-1] for row in rows] == ["0.3333"] * 3

    def model(params: Any, x: jax.Array) -> jax.Array:
        kernel = params["shared"]["kernel"]
        return x @ kernel @ kernel @ kernel @ params["head"]["kernel"]

    x, key = jax.random.normal(jax.random.key(0), (64, 4)), jax.random.key(1)
    compared = bmo.compare_scales(chain, params, model, x, key=key)
    assert list(compared.ratios) == ["shared", "head"]


def test_kernels_that_are_used_elsewhere_do_not_keep_their_norm():
    shared = spec.Dense("shared")
    links = [shared, spec.BatchNorm(), spec.Dense("alone"), spec.BatchNorm()]
    chain = spec.LayerChain([*links, spec.Tied([shared])], input_shape=(4,))
    params = {name: {"kernel": jnp.eye(4)} for name in ("shared", "alone")}
    kept = bmo.keep_norms(optax.sgd(0.25), chain)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, _ = kept.update(gradient, kept.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    norms = {name: float(jnp.linalg.norm(after[name]["kernel"])) for name in params}
    assert norms["alone"] == pytest.approx(2.0)
    assert norms["shared"] != pytest.approx(2.0, rel=0.01)


def test_what_is_tied_must_be_declared():
    with pytest.raises(
        ValueError, match=r"spec.Unembed\('e'\) is Tied, but no other .* path 'e'"
    ):
        spec.LayerChain([spec.Tied([spec.Unembed("e")])], input_shape=(4,))
    with pytest.raises(
        ValueError, match=r"second use as spec.Tied\(\[spec.Dense\('a'\)\]\)"
    ):
        spec.LayerChain([spec.Dense("a"), spec.Dense("a")], input_shape=(4,))


@pytest.mark.parametrize(
    ("link", "shape", "message"),
    [
        (spec.Embed("e"), (4, 2, 3), r"expects an embedding of shape \(tokens, feat"),
        (spec.Unembed("e"), (8, 3), r"embedding of shape \(8, 3\) takes 3 .* has 4"),
    ],
)
def test_tables_that_do_not_fit_are_named(link, shape, message):
    params = {"e": {"embedding": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=message):
        bmo.check_spec(spec.LayerChain([link], input_shape=(4,)), params)
