"""Pictures of scales over layers and steps, and a coordinate check over widths.

Needs matplotlib: `pip install "backmatch-optax[plots]"`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from backmatch_optax.numerics import checked_count
from backmatch_optax.parameters import listed, text
from backmatch_optax.text import by_entry

if TYPE_CHECKING:
    import matplotlib.figure

__all__ = ["coordinate_check", "plot_coordinates", "plot_scales"]


def plot_scales(
    scales: Sequence[Mapping[str, Any]],
    *,
    steps: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
) -> matplotlib.figure.Figure:
    """Draws scales over the steps of training, and over the layers.

    The left panel has a line for each layer, from dark (input) to bright (output). The
    right panel names the layers, in the same colours, and has the first and the last
    scale of each.

    Args:
      scales: what `optax.tree.get(opt_state, "layer_scales")` gave, step after step.
        Each layer of a `spec.Repeat` has a line of its own.
      steps: the step of each of them; by default they are counted from 1.
      layers: the layers to draw, input to output, such as `chain.paths`. By default all
        of them, with `Dense_2` before `Dense_10`.

    Returns:
      The figure.

    Raises:
      ValueError: where `scales` is empty, a layer has no scale in one of them, or
        `steps` has another length.

    Examples:
      >>> from backmatch_optax import plots
      >>> log = [{"fc1": 0.9, "fc2": 1.1}, {"fc1": 0.8, "fc2": 1.3}]
      >>> figure = plots.plot_scales(log)
      >>> [axes.get_xlabel() for axes in figure.axes]
      ['step', 'scale']
    """
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    if not scales:
        raise ValueError("scales must hold at least one dict of scales by layer")
    if steps is None:
        steps = range(1, len(scales) + 1)
    if layers is not None:
        stacks = {layer: scales[0].get(layer, 0.0) for layer in layers}
        layers = [name for layer in layers for name in by_entry(layer, stacks[layer])]
    scales = [_flat(by_layer) for by_layer in scales]
    if len(steps) != len(scales):
        raise ValueError(
            f"steps has {len(steps)} entries, but scales has {len(scales)}"
        )
    layers = sorted(scales[0], key=_natural) if layers is None else layers
    for step, by_layer in zip(steps, scales, strict=True):
        if missing := [layer for layer in layers if layer not in by_layer]:
            raise ValueError(
                f"step {step} has no scale of {listed(missing)}, but of "
                + listed(by_layer)
            )
    table = np.array([[s[layer] for layer in layers] for s in scales])
    height = max(3.0, 1.2 + 0.22 * len(layers))
    figure, (over_steps, over_layers) = plt.subplots(
        1, 2, figsize=(9, height), layout="constrained"
    )
    colors = _colors(len(layers))
    for place, (line, color) in enumerate(zip(table.T, colors, strict=True)):
        marker = "o" if len(steps) == 1 else None
        over_steps.plot(steps, line, color=color, lw=1.2, marker=marker)
        over_layers.plot(line[[0, -1]], [place, place], color="0.8", lw=1)
        over_layers.plot(line[0], place, "o", color=color, mfc="white")
        over_layers.plot(line[-1], place, "o", color=color)
    over_steps.set(xlabel="step", ylabel="scale", yscale="log")
    over_layers.set(xlabel="scale", xscale="log")
    over_layers.set_yticks(np.arange(len(layers)), layers)
    over_layers.invert_yaxis()  # the input on top
    over_layers.set_title(f"hollow: step {steps[0]}, full: step {steps[-1]}", size=9)
    # Within three decades, powers of ten would be too few marks.
    subs = (1, 2, 5) if np.nanmax(table) < 1e3 * np.nanmin(table) else (1,)
    for axis in (over_steps.yaxis, over_layers.xaxis):
        axis.set_major_locator(ticker.LogLocator(subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def coordinate_check(
    run: Callable[[int], Iterable[Any]],
    widths: Sequence[int],
    *,
    num_steps: int = 4,
    change: bool = True,
) -> dict[str, dict[int, list[float]]]:
    """Records how large the outputs of layers are in the first steps, over widths.

    A learning rate carries over from a narrow network to a wide one where the change of
    each layer's output does not depend on the width. The check was introduced for
    maximal-update parametrization (mup).

    Args:
      run: `run(width)` yields the outputs of all layers on the same batch: before the
        first step, and then after each. Each is a dict, or a tree, of arrays. What
        `capture_intermediates=True` returns in Linen is one.
      widths: the widths to train.
      num_steps: how many steps are recorded.
      change: True records the root mean square of the change since before the first
        step; False that of the output itself.

    Returns:
      By layer and by width, one number for each step. `plot_coordinates` draws it.

    Raises:
      ValueError: where `num_steps` is below 1, or `run` yields too few outputs or those
        of other layers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import plots
      >>> def run(width):
      ...     kernel = jnp.zeros(width)
      ...     while True:
      ...         yield {"fc": kernel}
      ...         kernel += width
      >>> check = plots.coordinate_check(run, [8, 16], num_steps=2)
      >>> check
      {'fc': {8: [8.0, 16.0], 16: [16.0, 32.0]}}
    """
    checked_count("num_steps", num_steps)
    found: dict[str, dict[int, list[float]]] = {}
    for width in widths:
        outputs = [_named(o) for o in itertools.islice(run(width), num_steps + 1)]
        if len(outputs) != num_steps + 1:
            raise ValueError(
                f"run({width}) must yield outputs before the first of {num_steps} "
                f"steps and after each, but it yielded {len(outputs)}"
            )
        first = outputs[0]
        if first.keys() != (found or first).keys():
            raise ValueError(
                f"run({width}) yields the layers {listed(first)}, but a run before "
                f"yielded {listed(found)}"
            )
        for layer, before in first.items():
            start = before if change else 0.0
            found.setdefault(layer, {})[width] = [
                float(np.sqrt(np.mean(np.square(after[layer] - start))))
                for after in outputs[1:]
            ]
    return found


def plot_coordinates(
    coordinates: Mapping[str, Mapping[int, Sequence[float]]],
) -> matplotlib.figure.Figure:
    """Draws what `coordinate_check` found: one panel for each step.

    A line that is level does not depend on the width. The legend has the power of the
    width that each layer follows in the last panel.

    Args:
      coordinates: by layer and by width, one number for each step.

    Returns:
      The figure.

    Raises:
      ValueError: where `coordinates` holds no layer.

    Examples:
      >>> from backmatch_optax import plots
      >>> figure = plots.plot_coordinates({"fc": {8: [1.0, 2.0], 16: [2.0, 4.0]}})
      >>> [axes.get_title() for axes in figure.axes]
      ['step 1', 'step 2']
      >>> figure.legends[0].get_texts()[0].get_text()
      'fc: width^1.00'
    """
    import matplotlib.pyplot as plt

    if not coordinates:
        raise ValueError("coordinates must hold at least one layer")
    widths = np.array([*next(iter(coordinates.values()))])
    num_steps = len(next(iter(coordinates.values()))[widths[0]])
    figure, grid = plt.subplots(
        1,
        num_steps,
        figsize=(2 + 2.2 * num_steps, 3.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    colors = _colors(len(coordinates))
    for step, axes in enumerate(grid[0]):
        for (layer, by_width), color in zip(coordinates.items(), colors, strict=True):
            sizes = np.array([*by_width.values()])
            label = f"{layer}{_power(widths, sizes[:, -1])}"
            axes.loglog(widths, sizes[:, step], "o-", ms=3, color=color, label=label)
        axes.set(title=f"step {step + 1}", xlabel="width")
        axes.set_xticks(widths, map(str, widths))
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("root mean square")
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", frameon=False)
    return figure


def _flat(scales: Mapping[str, Any]) -> dict[str, float]:
    """Scales by layer, those of a stack one by one."""
    named = (by_entry(layer, values) for layer, values in scales.items())
    return {name: scale for entries in named for name, scale in entries.items()}


def _named(outputs: Any) -> dict[str, np.ndarray]:
    """Arrays by path, without the call that Linen adds to it.

    Linen also has the output of the whole model, which is left out.
    """
    named = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        path = re.sub(r"(/|^)__call__/0$", "", text(key_path))
        if path:
            named[path] = np.asarray(leaf, np.float64)
    return named


def _power(widths: np.ndarray, sizes: np.ndarray) -> str:
    """The power of the width that sizes follow, for the legend."""
    usable = len(widths) > 1 and np.isfinite(sizes).all() and (sizes > 0).all()
    if not usable:
        return ""
    return f": width^{np.polyfit(np.log(widths), np.log(sizes), 1)[0]:.2f}"


def _natural(name: str) -> list[Any]:
    """A key that sorts numbers in names by their value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _colors(count: int) -> np.ndarray:
    """Colours from dark to bright, input to output."""
    import matplotlib

    return matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))
