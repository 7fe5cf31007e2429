"""Models with several inputs, in any order and of any kind."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from held_against import ratios, worst
from zoo_linen import Call, array

import backmatch_optax as bmo
from backmatch_optax import spec
from backmatch_optax.infer import infer_spec

IMAGE, STATE = array(4, 8, 8, 3, dtype=jnp.uint8), array(4, 16)
MEAN, STD = np.arange(3.0), np.arange(1.0, 4.0)
PREPARED = {
    "pixels": lambda image: image.astype(jnp.float32) / 255,
    "standardised": lambda image: (image.astype(jnp.float32) - MEAN) / STD,
}


@pytest.mark.parametrize("case", PREPARED)
def test_what_prepares_an_input_does_not_count_in_either_order(case):
    def first(_: nn.Module, image: Any, state: Any) -> Any:
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(PREPARED[case](image)))
        x = nn.relu(nn.Dense(32, name="embed")(x.reshape(len(x), -1)))
        state = nn.relu(nn.Dense(32, name="state")(state))
        return nn.Dense(5, name="head")(jnp.concatenate([x, state], -1))

    model = Call(first)
    swapped = Call(lambda module, state, image: first(module, image, state))
    params = model.init(jax.random.key(0), jnp.ones(IMAGE.shape), jnp.ones(STATE.shape))
    one, other = (
        bmo.layer_scales(chain, params["params"])
        for chain in (
            infer_spec(model, IMAGE, STATE),
            infer_spec(swapped, STATE, IMAGE),
        )
    )
    assert one.keys() == other.keys()
    for path, scale in one.items():
        np.testing.assert_allclose(scale, other[path], rtol=1e-5)


def test_the_first_of_several_inputs_may_be_reshaped():
    def function(_: nn.Module, x: Any, state: Any) -> Any:
        x = nn.Conv(4, (3, 3), name="conv")(x.reshape(-1, 8, 8, 3))
        x = nn.Dense(8, name="a")(x.reshape(len(x), -1))
        return jnp.concatenate([x, nn.Dense(8, name="b")(state)], -1)

    (link,) = infer_spec(Call(function), array(4, 192), STATE).layers
    conv, dense = spec.Conv("conv"), spec.Dense("a")
    assert link == spec.Concatenate(
        [
            [spec.Reshape((8, 8, 3)), conv, spec.Flatten(), dense],
            [spec.Input((16,)), spec.Dense("b")],
        ]
    )


LABELS, TIMES = array(64, dtype=jnp.int32), array(64)


@pytest.mark.parametrize("joins", ["sum", "gate", "concatenate"])
def test_a_label_for_each_example(joins):
    def function(_: nn.Module, x: Any, label: Any) -> Any:
        x, label = nn.Dense(64, name="x")(x), nn.Embed(10, 64, name="y")(label)
        both = {
            "sum": lambda: x + label,
            "gate": lambda: x * label,
            "concatenate": lambda: jnp.concatenate([x, label], -1),
        }[joins]()
        return nn.Dense(5, name="head")(nn.relu(both))

    model = Call(function)
    chain = infer_spec(model, array(64, 32), LABELS)
    assert "spec.Input(())" in repr(chain)
    assert worst(ratios(model, chain, array(64, 32), LABELS, batch=256)) < 1.3


def test_a_number_for_each_example():
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        x = nn.Dense(64, name="x")(x) + nn.Dense(64, name="t")(time[:, None])
        return nn.Dense(5, name="head")(nn.relu(x))

    model = Call(function)
    chain = infer_spec(model, array(64, 32), TIMES)
    assert "spec.Input((1,))" in repr(chain)
    assert worst(ratios(model, chain, array(64, 32), TIMES, batch=1024)) < 1.6


@pytest.mark.parametrize("batch", [1, 4])
def test_an_index_that_is_the_same_for_all_examples(batch):
    def function(_: nn.Module, tokens: Any) -> Any:
        kinds = nn.Embed(2, 16, name="kind")(jnp.zeros_like(tokens))
        places = jnp.broadcast_to(jnp.arange(6), tokens.shape)
        x = nn.Embed(10, 16, name="token")(tokens) + kinds
        return x + nn.Embed(6, 16, name="place")(places)

    found = infer_spec(Call(function), array(batch, 6, dtype=jnp.int32))
    assert found.layers == (
        spec.Embed("token"),
        spec.Residual([], [spec.Input((6,)), spec.Embed("kind")]),
        spec.Bias("place/embedding"),
    )


@pytest.mark.parametrize("length", [400, 300])
def test_positions_of_a_long_text_as_a_row(length):
    """Both more positions than are looked at elsewhere, and a table that is longer."""

    def function(_: nn.Module, tokens: Any) -> Any:
        places = nn.Embed(400, 16, name="place")(jnp.arange(length)[None])
        return nn.Embed(10, 16, name="token")(tokens) + places

    _, added = infer_spec(Call(function), array(4, length, dtype=jnp.int32)).layers
    some = spec.Residual([], [spec.Input((length,)), spec.Embed("place")])
    assert added == (spec.Bias("place/embedding") if length == 400 else some)


def test_constants_at_each_position_of_a_long_text():
    """Their mean is over all positions."""
    halves = np.where(np.arange(1000) < 500, 1.0, -1.0)[None, :, None]

    def function(_: nn.Module, x: Any) -> Any:
        return nn.Dense(8, name="d")(x) + jnp.asarray(halves * np.ones(8))

    _, added = infer_spec(Call(function), array(4, 1000, 8)).layers
    constants = [spec.Input((1000, 8), common=0.0), spec.Scale(1.0)]
    assert added == spec.Residual([], constants)


def _sines(at: Any) -> Any:
    angles = at[:, None] / 100.0 ** (jnp.arange(8) / 8)
    waves = jnp.zeros((8, 16)).at[:, 0::2].set(jnp.sin(angles))
    return waves.at[:, 1::2].set(jnp.cos(angles))


def _attends(mask: Any, x: Any) -> Any:
    return nn.MultiHeadDotProductAttention(2, name="a")(x, x, mask=mask)


def _looks_up(rows: Any, x: Any) -> Any:
    return x + nn.Embed(8, 16, name="place")(rows)


CONSTANTS = {
    "sines": (_sines, lambda waves, x: x + waves),
    "waves of sums": (
        lambda at: jnp.sin(jnp.outer(jnp.cumsum(at), jnp.arange(16))),
        lambda waves, x: x + waves,
    ),
    "quotients": (lambda at: at // 3, _looks_up),
    "remainders": (lambda at: -at % 3, _looks_up),
    "bits": (lambda at: at & 5, _looks_up),
    "segments": (lambda at: at[:, None] // 4 == at // 4, _attends),
    "every other": (lambda at: (at[:, None] - at) % 2 == 0, _attends),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_a_constant_may_be_computed_in_the_model(case):
    make, use = CONSTANTS[case]
    before = np.asarray(make(jnp.arange(8)))

    def inferred(constant: Any) -> spec.LayerChain:
        def function(_: nn.Module, x: Any) -> Any:
            return use(constant(), nn.Dense(16, name="d")(x))

        return infer_spec(Call(function), array(4, 8, 16))

    def there() -> Any:
        return make(jnp.arange(8))

    found: list[spec.LayerChain] = []
    jax.eval_shape(lambda: found.append(inferred(there)))
    assert inferred(there) == found[0] == inferred(lambda: before)


def test_two_views_in_one_batch_are_refused():
    def function(_: nn.Module, a: Any, b: Any) -> Any:
        both = nn.Dense(8, name="d")(jnp.concatenate([a, b], 0))
        return jnp.concatenate(jnp.split(both, 2), -1)

    with pytest.raises(ValueError, match="concatenate joins examples of the batch"):
        infer_spec(Call(function), array(4, 8), array(4, 8))


def test_integers_that_are_only_compared():
    def function(_: nn.Module, tokens: Any) -> Any:
        return nn.Dense(8, name="d")(jax.nn.one_hot(tokens, 10))

    with pytest.raises(ValueError, match=r"jax\.nn\.one_hot, belongs before the model"):
        infer_spec(Call(function), array(4, 6, dtype=jnp.int32))


def test_positions_that_are_rolled():
    def function(_: nn.Module, x: Any) -> Any:
        return nn.Dense(5, name="b")(jnp.roll(nn.Dense(16, name="a")(x), 1, axis=1))

    model = Call(function)
    chain = infer_spec(model, array(4, 6, 8))
    assert worst(ratios(model, chain, array(4, 6, 8))) < 1.3


class TimeBlock(nn.Module):
    """A block of a diffusion model: a time that is added at all positions."""

    @nn.compact
    def __call__(self, x: Any, time: Any) -> Any:
        h = nn.Conv(32, (3, 3), name="first")(nn.swish(x))
        h = h + nn.Dense(32, name="time")(nn.swish(time))[:, None, None]
        return x + nn.Conv(32, (3, 3), name="second")(nn.swish(nn.LayerNorm()(h)))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_signal_that_is_the_same_at_all_positions_is_added(pooled):
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        time = nn.Dense(64, name="embed")(time)
        x = nn.Conv(32, (3, 3), name="stem")(x)
        for index in range(2):
            x = TimeBlock(name=f"block{index}")(x, time)
        return nn.Dense(5, name="head")(x.mean((1, 2)) if pooled else x)

    model, examples = Call(function), (array(2, 8, 8, 3), array(2, 16))
    chain = infer_spec(model, *examples)
    added = [spec.Recall((64,)), spec.Activation("silu"), spec.Dense("block0/time")]
    added += [spec.Reshape((1, 1, 32)), spec.Resize((8, 8))]
    assert repr(spec.Residual(added)) in repr(chain)
    assert worst(ratios(model, chain, *examples, batch=128)) < 2


def test_features_are_not_repeated():
    def dueling(_: nn.Module, x: Any) -> Any:
        return nn.Dense(1, name="value")(x) + nn.Dense(4, name="advantage")(x)

    with pytest.raises(ValueError, match="add follows on a signal repeated along an"):
        infer_spec(Call(dueling), array(2, 6))


@pytest.mark.parametrize("order", ["label first", "label last"])
def test_a_label_that_several_layers_read(order):
    def function(_: nn.Module, x: Any, label: Any) -> Any:
        label = nn.Embed(10, 64, name="embed")(label)
        x = nn.Dense(64, name="x")(x)
        x = x * nn.Dense(64, name="scale")(label) + nn.Dense(64, name="shift")(label)
        return nn.Dense(5, name="head")(nn.relu(x))

    examples: Any = (array(64, 32), LABELS)
    model = Call(function)
    if order == "label first":
        model = Call(lambda module, label, x: function(module, x, label))
        examples = examples[::-1]
    chain = infer_spec(model, *examples)
    assert chain.input_shape == ()
    assert chain.layers[0] == spec.Embed("embed")
    assert worst(ratios(model, chain, *examples, batch=256)) < 1.3


def test_a_label_alone():
    def function(_: nn.Module, label: Any) -> Any:
        x = nn.relu(nn.Dense(64, name="fc")(nn.Embed(10, 64, name="embed")(label)))
        return nn.Dense(5, name="head")(x)

    model = Call(function)
    chain = infer_spec(model, LABELS)
    links = [spec.Embed("embed"), spec.Dense("fc"), spec.Activation("relu")]
    assert chain == spec.LayerChain([*links, spec.Dense("head")], input_shape=())
    assert worst(ratios(model, chain, LABELS, batch=512)) < 1.3


LABELS_OF_FOUR = array(4, dtype=jnp.int32)
RATES = 1e-4 ** (np.arange(32) / 32)
SINES = spec.Scale(0.71)  # the mean of their squares is 1/2


def sines(time: Any) -> Any:
    """Sines and cosines of a number for each example, as diffusion models have them."""
    angles = time.astype(jnp.float32)[:, None] * RATES
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
@pytest.mark.parametrize("order", ["time first", "time last"])
def test_features_made_of_a_time_count_as_the_input(order, dtype):
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        h = nn.relu(nn.Dense(64, name="embed")(sines(time)))
        h = nn.Dense(64, name="time")(h) + nn.Dense(64, name="x")(x)
        return nn.Dense(5, name="head")(nn.relu(h))

    examples, model = (array(4, 32), array(4, dtype=dtype)), Call(function)
    if order == "time first":
        model = Call(lambda module, time, x: function(module, x, time))
        examples = examples[::-1]
    chain = infer_spec(model, *examples)
    links = [spec.Input((64,)), SINES, spec.Dense("embed"), spec.Activation("relu")]
    assert chain.input_shape == (32,)
    assert repr(links)[1:-1] in repr(chain)


def test_features_made_of_a_time_alone():
    def function(_: nn.Module, time: Any) -> Any:
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(8, name="a")(sines(time))))

    links = [SINES, spec.Dense("a"), spec.Activation("relu"), spec.Dense("head")]
    chain = spec.LayerChain(links, input_shape=(64,))
    assert infer_spec(Call(function), array(4)) == chain
    bare = Call(lambda _, time: nn.Dense(8, name="a")(time[:, None]))
    expected = spec.LayerChain([spec.Dense("a")], input_shape=(1,))
    assert infer_spec(bare, array(4)) == expected
    with pytest.raises(ValueError, match=r"of shape \(4,\) has no batch dimension"):
        infer_spec(Call(lambda _, time: nn.Dense(8, name="a")(time)), array(4))


@pytest.mark.parametrize(
    ("features", "links"),
    [
        (lambda t: 2**0.5 * jnp.cos(t[:, None] * RATES), []),  # small for large times
        (lambda t: jnp.stack([t, t**2], -1), []),
        (lambda t: jnp.where(t[:, None] > 9, sines(t), 0.5), []),
        (lambda t: sines(t) * 4, [spec.Scale(2.8)]),
        (lambda t: sines(t) * 2**0.5, []),
    ],
)
def test_features_of_a_time_have_a_size_where_it_is_always_the_same(features, links):
    model = Call(lambda _, time: nn.Dense(8, name="a")(features(time)))
    assert infer_spec(model, array(4)).layers == (*links, spec.Dense("a"))


def test_two_labels():
    def function(_: nn.Module, user: Any, item: Any) -> Any:
        user, item = nn.Embed(9, 64, name="user")(user), nn.Embed(7, 64, name="i")(item)
        return nn.Dense(5, name="head")(user * item)

    model = Call(function)
    chain = infer_spec(model, LABELS, LABELS)
    assert chain.input_shape == ()
    gate = spec.Gate([spec.Embed("user")], [spec.Input(()), spec.Embed("i")])
    assert chain.layers[0] == gate


def test_what_several_layers_read_may_be_made_of_two_inputs():
    def function(_: nn.Module, x: Any, time: Any, label: Any) -> Any:
        known = nn.Dense(64, name="time")(sines(time)) + nn.Embed(9, 64, name="y")(
            label
        )
        x = nn.Dense(64, name="x")(x) + nn.Dense(64, name="first")(known)
        x = nn.relu(x) + nn.Dense(64, name="second")(nn.relu(known))
        return nn.Dense(5, name="head")(x)

    model = Call(function)
    chain = infer_spec(model, array(4, 32), array(4), array(4, dtype=jnp.int32))
    known, memory = chain.layers
    time = [spec.Input((64,)), SINES, spec.Dense("time")]
    assert known == spec.Residual(time, [spec.Embed("y")])
    assert repr(memory).count("spec.Recall((64,))") == 2
    params = model.init(
        jax.random.key(0), jnp.ones((4, 32)), jnp.ones(4), jnp.ones(4, int)
    )["params"]
    assert all(scale > 0 for scale in bmo.layer_scales(chain, params).values())


@pytest.mark.parametrize("order", ["x + h", "h + x", "time + h"])
def test_a_sum_may_be_written_in_any_order(order):
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        time = nn.relu(nn.Dense(64, name="embed")(time))
        x = nn.Conv(32, (3, 3), name="stem")(x)
        for index in range(2):
            h = nn.Conv(32, (3, 3), name=f"a{index}")(x)
            added = nn.Dense(32, name=f"time{index}")(time)[:, None, None]
            h = nn.relu(added + h if order == "time + h" else h + added)
            h = nn.Conv(32, (3, 3), name=f"b{index}")(h)
            x = h + x if order == "h + x" else x + h
        return nn.Dense(5, name="head")(x)

    model, examples = Call(function), (array(4, 8, 8, 3), array(4, 16))
    chain = infer_spec(model, *examples)
    assert chain.layers[0] == spec.Dense("embed")
    assert worst(ratios(model, chain, *examples)) < 1.6


def test_a_mean_of_rows_and_one_of_columns_are_added():
    def function(_: nn.Module, x: Any) -> Any:
        x = nn.relu(nn.Conv(32, (3, 3), name="a")(x))
        rows = nn.Dense(32, name="rows")(x.mean(1, keepdims=True))
        columns = nn.Dense(32, name="columns")(x.mean(2, keepdims=True))
        return nn.Dense(5, name="head")(nn.relu(rows + columns).mean((1, 2)))

    model = Call(function)
    chain = infer_spec(model, array(4, 8, 8, 3))
    assert worst(ratios(model, chain, array(4, 8, 8, 3), batch=128)) < 3


def test_what_all_positions_have_in_common_is_taken_away():
    def function(_: nn.Module, x: Any) -> Any:
        mean = nn.Dense(64, name="mean")(x.mean(1, keepdims=True))
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(64, name="x")(x) - mean))

    model = Call(function)
    chain = infer_spec(model, array(4, 8, 16))
    assert worst(ratios(model, chain, array(4, 8, 16))) < 1.5

    def same(_: nn.Module, x: Any) -> Any:
        layer = nn.Dense(8, name="a")
        return nn.relu(layer(x) - layer(x).mean(1, keepdims=True))

    with pytest.raises(ValueError, match="or with the same one"):
        infer_spec(Call(same), array(4, 8, 16))


def test_heads_of_what_several_inputs_are_made_into():
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        time, x = nn.relu(nn.Dense(64, name="t")(time)), nn.Dense(64, name="x")(x)
        return [
            nn.Dense(5, name=f"head{index}")(
                nn.relu(x + nn.Dense(64, name=f"t{index}")(time))
            )
            for index in range(2)
        ]

    model, examples = Call(function), (array(4, 16), array(4, 8))
    chain = infer_spec(model, *examples)
    assert "spec.Outputs" in repr(chain)
    assert worst(ratios(model, chain, *examples)) < 1.5


def test_the_sines_of_a_time_may_be_written_out():
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        sine, cosine = jnp.sin(time[:, None] * RATES), jnp.cos(time[:, None] * RATES)
        time = nn.Dense(64, name="t")(jnp.concatenate([sine, cosine], -1))
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(64, name="x")(x) + time))

    chain = infer_spec(Call(function), array(4, 16), array(4))
    arms = [spec.Input((64,)), SINES, spec.Dense("t")], [spec.Dense("x")]
    assert chain.layers[0] == spec.Residual(*arms)


def test_one_plus_what_a_label_says():
    def film(_: nn.Module, x: Any, label: Any) -> Any:
        label = nn.Embed(10, 64, name="embed")(label)
        x = nn.Dense(64, name="x")(x) * (1 + nn.Dense(64, name="scale")(label))
        x = nn.relu(x + nn.Dense(64, name="shift")(label))
        return nn.Dense(5, name="head")(x)

    model, examples = Call(film), (array(4, 16), LABELS_OF_FOUR)
    chain = infer_spec(model, *examples)
    gate = [spec.Recall((64,)), spec.Dense("scale"), spec.Shift(1.0)]
    assert repr(spec.Gate([], gate)) in repr(chain)
    assert worst(ratios(model, chain, *examples, batch=256)) < 1.4


@pytest.mark.parametrize("pooled", [False, True])
def test_a_transformer_that_a_time_modulates(pooled):
    def function(_: nn.Module, x: Any, time: Any) -> Any:
        time = nn.swish(nn.Dense(64, name="embed")(time))
        x = nn.Dense(64, name="in")(x)
        for index in range(2):
            scale, shift, gate = (
                nn.Dense(64, name=f"{name}{index}")(time)[:, None]
                for name in ("scale", "shift", "gate")
            )
            norm = nn.LayerNorm(use_scale=False, use_bias=False)
            h = nn.gelu(nn.Dense(128, name=f"up{index}")(norm(x) * (1 + scale) + shift))
            x = x + nn.Dense(64, name=f"down{index}")(h) * gate
        return nn.Dense(5, name="head")(x.mean(1) if pooled else x)

    model, examples = Call(function), (array(4, 8, 16), array(4, 16))
    chain = infer_spec(model, *examples)
    assert worst(ratios(model, chain, *examples, batch=128)) < 2


@pytest.mark.parametrize("before", [nn.relu, lambda x: 1 - nn.sigmoid(x)])
def test_a_constant_is_not_added_to_a_mean(before):
    def gated(_: nn.Module, x: Any) -> Any:
        gate = before(nn.Dense(6, name="a")(x)) + 1.0
        return nn.Dense(6, name="b")(x) * gate

    with pytest.raises(ValueError, match="a constant to what may have a mean"):
        infer_spec(Call(gated), array(4, 6))


@pytest.mark.parametrize("shift", [1.0, -1.0, -3.0])
def test_a_constant_is_added_in_a_product_alone(shift):
    def gated(_: nn.Module, x: Any) -> Any:
        gate = nn.Dense(64, name="a")(x) + shift
        return nn.Dense(5, name="head")(nn.Dense(64, name="b")(x) * gate)

    model = Call(gated)
    chain = infer_spec(model, array(4, 32))
    assert worst(ratios(model, chain, array(4, 32), batch=256)) < 1.5
    bare = Call(lambda _, x: nn.relu(nn.Dense(6, name="a")(x) + shift))
    with pytest.raises(ValueError, match="neither a Scale nor one of"):
        infer_spec(bare, array(4, 6))


@pytest.mark.parametrize("name", ["hard_sigmoid", "sigmoid"])
def test_an_activation_with_a_constant_inside_is_one_link(name):
    functions = {
        "hard_sigmoid": nn.hard_sigmoid,
        "sigmoid": lambda x: 0.5 * (1 + jnp.tanh(0.5 * x)),
    }

    def model(_: nn.Module, x: Any) -> Any:
        x = x + nn.Dense(8, name="a")(x)
        return nn.Dense(8, name="b")(functions[name](x))

    assert infer_spec(Call(model), array(4, 8)).layers[1] == spec.Activation(name)


@pytest.mark.parametrize("dense", [False, True])
def test_a_table_for_each_column_of_integers(dense):
    class Recommender(nn.Module):
        @nn.compact
        def __call__(self, columns, *features):
            found = [nn.Embed(10, 8, name=f"e{at}")(columns[:, at]) for at in range(2)]
            found += [nn.relu(nn.Dense(8, name="d")(x)) for x in features]
            return nn.Dense(4, name="head")(jnp.concatenate(found, -1))

    inputs = array(16, 2, dtype=jnp.int32), *([array(16, 6)] * dense)
    chain = infer_spec(Recommender(), *inputs)
    (joined, head) = chain.layers
    assert isinstance(joined, spec.Concatenate) and head == spec.Dense("head")
    for at, branch in enumerate(joined.branches[:2]):
        taken = spec.Slice((at, at + 1), axis=-1)
        assert branch == (taken, spec.Embed(f"e{at}"), spec.Flatten())
    found = ratios(Recommender(), chain, *inputs, batch=256)
    assert set(found) == {"e0", "e1", "head", *["d"] * dense}
    assert worst(found) < 1.5
