"""Pictures are drawn from real runs, and show the numbers that they were given."""

from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("agg")
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import models
import numpy as np
import optax
import pytest

import backmatch_optax as bmo
from backmatch_optax import plots

X = jax.random.normal(jax.random.key(0), (32, 8))
Y = jax.random.normal(jax.random.key(1), (32, 4))


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def log() -> list[dict[str, Any]]:
    """The scales of eight steps."""
    params = models.init_params(models.Mlp(), models.MLP)
    tx = bmo.backmatch_sgd(0.1, models.MLP)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            outputs: Any = models.Mlp().apply({"params": params}, X)
            return jnp.mean((outputs - Y) ** 2)

        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, found = tx.init(params), []
    for _ in range(8):
        params, state = step(params, state)
        found.append(optax.tree.get(state, "layer_scales"))
    return found


# --- Scales --------------------------------------------------------------------------


def test_scales_of_a_run_are_drawn_over_steps_and_layers(log, tmp_path):
    layers = models.MLP.paths
    figure = plots.plot_scales(log, layers=layers)
    over_steps, over_layers = figure.axes
    for layer, line in zip(layers, over_steps.lines, strict=True):
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_array_equal(x, np.arange(1, 9))
        np.testing.assert_allclose(y, [float(scales[layer]) for scales in log])
    names = [label.get_text() for label in over_layers.get_yticklabels()]
    assert names == list(layers)
    assert over_layers.get_ylim()[0] > over_layers.get_ylim()[1]  # the input on top
    ends = [line.get_xdata() for line in over_layers.lines]
    for layer, (_, first, last) in zip(
        layers, zip(*3 * [iter(ends)], strict=True), strict=True
    ):
        np.testing.assert_allclose(first, float(log[0][layer]))
        np.testing.assert_allclose(last, float(log[-1][layer]))
    figure.savefig(tmp_path / "scales.png")
    picture = plt.imread(tmp_path / "scales.png")
    assert picture[..., :3].std() > 0.05


def test_layers_are_ordered_by_their_numbers_and_steps_may_be_given():
    log = [{f"Dense_{i}": 1.0 + i for i in (0, 10, 2)}] * 2
    over_steps, over_layers = plots.plot_scales(log, steps=[100, 200]).axes
    names = [label.get_text() for label in over_layers.get_yticklabels()]
    assert names == ["Dense_0", "Dense_2", "Dense_10"]
    assert np.array_equal(over_steps.lines[0].get_xdata(), [100, 200])


def test_each_layer_of_a_stack_has_a_line():
    log = [{"layers": np.array([1.0, 2.0]), "head": 3.0}] * 2
    for layers in (None, ["layers", "head"]):
        over_steps, over_layers = plots.plot_scales(log, layers=layers).axes
        names = [label.get_text() for label in over_layers.get_yticklabels()]
        assert sorted(names) == ["head", "layers[0]", "layers[1]"]
        assert len(over_steps.lines) == 3
    assert names == ["layers[0]", "layers[1]", "head"]


def test_scales_over_many_orders_of_magnitude_have_few_marks():
    figure = plots.plot_scales([{"a": 1e-6, "b": 1e6}])
    figure.draw_without_rendering()
    low, high = figure.axes[1].get_xlim()
    marks = [mark for mark in figure.axes[1].get_xticks() if low <= mark <= high]
    assert 3 <= len(marks) <= 15


@pytest.mark.parametrize(
    ("scales", "options", "message"),
    [
        ([], {}, "at least one dict"),
        ([{"a": 1.0}], {"steps": [1, 2]}, "steps has 2 entries, but scales has 1"),
        ([{"a": 1.0}, {"b": 1.0}], {}, "step 2 has no scale of 'a', but of 'b'"),
        ([{"a": 1.0}], {"layers": ["c"]}, "step 1 has no scale of 'c', but of 'a'"),
    ],
)
def test_what_cannot_be_drawn_is_explained(scales, options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_scales(scales, **options)


# --- Coordinates ---------------------------------------------------------------------


class Net(nn.Module):
    width: int
    head: float  # the size of the entries of the head's kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width, use_bias=False, name="fc1")(x))
        x = nn.relu(nn.Dense(self.width, use_bias=False, name="fc2")(x))
        init = nn.initializers.normal(self.head)
        return nn.Dense(4, use_bias=False, kernel_init=init, name="head")(x)


def run(width: int, mup: bool) -> Iterator[Any]:
    """SGD, with the usual sizes and rates or those of maximal-update parametrization.

    The mean of some seeds, as one batch.
    """
    model = Net(width, head=1 / width if mup else width**-0.5)
    wider = width / 64 if mup else 1.0
    rates = {"fc1": 0.02 * wider, "fc2": 0.02, "head": 0.02 / wider}

    def step(params: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            outputs, aside = model.apply(
                {"params": params},
                X,
                capture_intermediates=True,
                mutable=["intermediates"],
            )
            return jnp.mean((outputs - Y) ** 2), aside["intermediates"]

        gradient, outputs = jax.grad(loss_fn, has_aux=True)(params)
        after = {
            layer: jax.tree.map(
                lambda p, g, r=rates[layer]: p - r * g, params[layer], leaves
            )
            for layer, leaves in gradient.items()
        }
        return after, outputs

    keys = jax.random.split(jax.random.key(2), 8)
    params = jax.vmap(lambda key: model.init(key, X)["params"])(keys)
    steps = jax.jit(jax.vmap(step))
    while True:
        params, outputs = steps(params)
        yield outputs


def powers_of(mup: bool) -> tuple[Any, dict[str, float]]:
    """What was recorded, and the power of the width in the change of each layer."""
    check = plots.coordinate_check(
        lambda width: run(width, mup), [32, 128, 512], num_steps=2
    )
    powers = {
        layer: np.polyfit(
            np.log([*by_width]), [np.log(sizes[0]) for sizes in by_width.values()], 1
        )[0]
        for layer, by_width in check.items()
    }
    return check, powers


def test_the_check_finds_the_powers_that_theory_gives_for_sgd():
    # The gradient that arrives at a hidden layer has entries in proportion to the
    # head's, width^-1/2, and each step adds up `width` of them: -1/2 for fc1, whose
    # input has a fixed width, 1/2 for fc2, and 1 for the head.
    check, powers = powers_of(mup=False)
    assert list(check) == ["fc1", "fc2", "head"]
    for layer, power in {"fc1": -0.5, "fc2": 0.5, "head": 1.0}.items():
        assert abs(powers[layer] - power) < 0.2, powers


def test_the_check_is_level_for_maximal_updates(tmp_path):
    check, powers = powers_of(mup=True)
    assert all(abs(power) < 0.2 for power in powers.values()), powers
    figure = plots.plot_coordinates(check)
    assert [axes.get_title() for axes in figure.axes] == ["step 1", "step 2"]
    for step, axes in enumerate(figure.axes):
        for (layer, by_width), line in zip(check.items(), axes.lines, strict=True):
            assert str(line.get_label()).startswith(f"{layer}: width^")
            assert np.array_equal(line.get_xdata(), [32, 128, 512])
            expected = [sizes[step] for sizes in by_width.values()]
            np.testing.assert_array_equal(line.get_ydata(), expected)
    figure.savefig(tmp_path / "coordinates.png")
    assert plt.imread(tmp_path / "coordinates.png")[..., :3].std() > 0.05


def test_the_outputs_themselves_may_be_recorded():
    def constant(width: int) -> Iterator[Any]:
        while True:
            yield {"fc": jnp.full((3, width), 2.0, jnp.bfloat16)}

    sizes = plots.coordinate_check(constant, [4], num_steps=2, change=False)
    np.testing.assert_array_equal(sizes["fc"][4], [2.0, 2.0])
    changes = plots.coordinate_check(constant, [4], num_steps=2)
    np.testing.assert_array_equal(changes["fc"][4], [0.0, 0.0])
    # One width has no power to name.
    (text,) = plots.plot_coordinates(sizes).legends[0].get_texts()
    assert text.get_text() == "fc"


def test_a_run_that_cannot_be_recorded_is_explained():
    def layers_of(width: int) -> list[Any]:
        return 3 * [{f"fc{width}": jnp.ones(2)}]

    with pytest.raises(ValueError, match=r"num_steps \(=0\)"):
        plots.coordinate_check(layers_of, [1], num_steps=0)
    with pytest.raises(ValueError, match=r"run\(1\) must yield.* but it yielded 3"):
        plots.coordinate_check(layers_of, [1], num_steps=3)
    with pytest.raises(ValueError, match=r"run\(2\) yields the layers 'fc2'.*'fc1'"):
        plots.coordinate_check(layers_of, [1, 2], num_steps=2)
    with pytest.raises(ValueError, match="at least one layer"):
        plots.plot_coordinates({})
