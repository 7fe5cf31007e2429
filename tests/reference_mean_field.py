"""Float64 NumPy reference for mean-field gains, by sums over fine grids.

The signal of a wide network at random weights is Gaussian behind every kernel. The
mean of a unit over inputs and positions is drawn from `N(c, s)`, and its values have
variance `v` about that mean. A nonlinearity makes `f(x)` of it, and max-pooling the
largest `f(x)` of `k` positions. `Signal` keeps the Gaussian together with `f` and `k`.
So links without a kernel between them count as one function.

`m` is the mean diagonal of `J^T J` above a point, as in `docs/theory.md`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

Layer = Mapping[str, Any]
Function = Callable[[np.ndarray], np.ndarray]

ACTIVATIONS: dict[str, Function] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "softplus": lambda x: np.logaddexp(x, 0),
    "soft_sign": lambda x: x / (1 + abs(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "silu": lambda x: x * special.expit(x),
    "exp": np.exp,
    "sin": np.sin,
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    # JAX takes the approximation by a tanh unless told otherwise.
    "gelu": lambda x: x * special.expit(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}


class Signal(NamedTuple):
    """A signal in front of a link; white at the input of a network."""

    c: float = 0.0  # mean over everything of the Gaussian
    s: float = 0.0  # variance over units of their means
    v: float = 1.0  # variance of a unit's values
    f: Function = ACTIVATIONS["identity"]
    order: Function = ACTIVATIONS["identity"]  # what max-pooling compares
    k: int = 1


class Moments(NamedTuple):
    """What a link has to know of a signal."""

    c: float
    s: float
    v: float
    slope: float  # mean square of the slope of `f`


def cells(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles of equal cells from -8 to 8, and their share of a standard Gaussian."""
    edges = np.linspace(-8, 8, count + 1)
    return (edges[1:] + edges[:-1]) / 2, np.diff(special.ndtr(edges))


def moments(signal: Signal) -> Moments:
    """Moments of `f(x)` over units (rows) and over the values of each (columns)."""
    c, s, v, f, order, k = signal
    if f is order is ACTIVATIONS["identity"] and k == 1:
        return Moments(c, s, v, slope=1.0)
    (units, of_unit), (values, of_value) = cells(200), cells(1600)
    x = (c + math.sqrt(s) * units)[:, None] + math.sqrt(v) * values
    weights = np.broadcast_to(of_value, x.shape)
    if k > 1:  # the k-th power of a distribution is that of the largest of k
        ranked = np.argsort(order(x), axis=1)
        below = np.cumsum(np.take_along_axis(weights, ranked, 1), axis=1)
        weights = np.empty_like(x)
        np.put_along_axis(weights, ranked, np.diff(below**k, axis=1, prepend=0), 1)
    outputs = f(x)
    means = (weights * outputs).sum(1)
    slopes = (f(x + 1e-5) - f(x - 1e-5)) / 2e-5
    mean = float(of_unit @ means)
    mean_square = float(of_unit @ means**2)
    return Moments(
        c=mean,
        s=max(mean_square - mean**2, 0.0),
        v=float(of_unit @ (weights * outputs**2).sum(1)) - mean_square,
        slope=float(of_unit @ (weights * slopes**2).sum(1)),
    )


class Link(NamedTuple):
    """What the way down must know of a link."""

    layer: Layer
    size_in: int
    size_out: int
    positions: int  # of its output
    before: Moments
    after: Moments
    arms: tuple[list["Link"], ...] = ()


def layer_scales(
    layers: Sequence[Layer], params: Mapping[str, Any], input_shape: Sequence[int]
) -> dict[str, float]:
    """Scale `1 / (m * m_W)` of every kernel, and of every normalisation's parameters.

    Args:
        layers: The links from input to output, as dicts with the key "kind".
        params: Arrays in Flax layout, keyed by the path of their layer.
        input_shape: Shape of one example.

    Returns:
        The scales, keyed by the path of the layer.
    """
    links, _, _ = _forward(layers, params, tuple(input_shape), Signal())
    scales: dict[str, float] = {}
    _backward(links, params, 1.0, 1.0, scales)
    return scales


def _forward(
    layers: Sequence[Layer],
    params: Mapping[str, Any],
    shape: tuple[int, ...],
    signal: Signal,
) -> tuple[list[Link], tuple[int, ...], Signal]:
    """Walks a chain upwards; returns its links, output shape and signal."""
    links: list[Link] = []
    before = moments(signal)
    for layer in layers:
        arms: tuple[list[Link], ...] = ()
        after, shape_out = signal, shape
        c, s, v, _ = before
        of = {
            role: np.mean(array**2) * (array.shape[0] if array.ndim > 1 else 1)
            for role, array in params.get(layer.get("path") or "", {}).items()
        }
        gamma, beta = of.get("scale", 1.0), of.get("bias", 0.0)
        match layer["kind"]:
            case "dense":
                # A sum of many with random signs: its mean over units is zero.
                gain = of["kernel"]
                after = Signal(0.0, gain * (c**2 + s) + beta, gain * v)
                shape_out = (*shape[:-1], params[layer["path"]]["kernel"].shape[-1])
            case "batch_norm":
                after = Signal(0.0, beta, gamma * v / (v + layer["epsilon"]))
            case "layer_norm":
                # The mean over features is c, their variance s + v.
                gain = gamma / (s + v + layer["epsilon"])
                after = Signal(0.0, gain * s + beta, gain * v)
            case "rms_norm":
                gain = gamma / (c**2 + s + v + layer["epsilon"])
                after = Signal(math.sqrt(gain) * c, gain * s, gain * v)
            case "activation":
                f = ACTIVATIONS[layer["name"]]
                after = signal._replace(f=lambda x, f=f, g=signal.f: f(g(x)))
            case "max_pool":
                after = signal._replace(order=signal.f, k=signal.k * layer["window"])
                shape_out = (shape[0] // layer["window"], *shape[1:])
            case "avg_pool":
                # Positions differ independently about the mean of their unit.
                after = Signal(c, s, v / layer["window"])
                shape_out = (shape[0] // layer["window"], *shape[1:])
            case "residual":
                branch, shape_out, one = _forward(
                    layer["branch"], params, shape, signal
                )
                shortcut, _, other = _forward(layer["shortcut"], params, shape, signal)
                if all(
                    a["kind"] == "activation"
                    for a in (*layer["branch"], *layer["shortcut"])
                ):
                    after = signal._replace(f=lambda x, f=one.f, g=other.f: f(x) + g(x))
                else:  # a kernel with random signs makes the arms unrelated
                    arms = (branch, shortcut)
                    one, other = moments(one), moments(other)
                    after = Signal(one.c + other.c, one.s + other.s, one.v + other.v)
            case kind:
                raise ValueError(f"unknown kind {kind!r}")
        size_in, size_out = math.prod(shape), math.prod(shape_out)
        positions = math.prod(shape_out[:-1])
        found = moments(after)
        links.append(Link(layer, size_in, size_out, positions, before, found, arms))
        shape, signal, before = shape_out, after, found
    return links, shape, signal


def _backward(
    links: Sequence[Link],
    params: Mapping[str, Any],
    m: float,
    m_constant: float,
    scales: dict[str, float],
) -> tuple[float, float]:
    """Walks a chain downwards, fills in the scales, returns both m at its input.

    `m_constant` is for changes that are the same for all inputs and positions of a
    unit. A BatchNorm takes them away, until a nonlinearity makes others of them.
    """
    for layer, size_in, size_out, positions, before, after, arms in reversed(links):
        c, s, v, slope = before
        path = layer.get("path") or ""
        leaves = params.get(path, {})
        gamma = np.mean(leaves.get("scale", np.ones(1)) ** 2)
        match layer["kind"]:
            case "dense":
                scales[path] = 1 / (positions * (m * v + m_constant * (c**2 + s)))
                gain = (leaves["kernel"] ** 2).sum() / len(leaves["kernel"])
                m, m_constant = m * gain, m_constant * gain
            case "batch_norm":
                gain = 1 / (v + layer["epsilon"])
                if leaves:
                    scales[path] = 1 / (positions * m * v * gain)
                m, m_constant = m * gamma * gain, 0.0
            case "layer_norm" | "rms_norm":
                total = s + v + (c**2 if layer["kind"] == "rms_norm" else 0.0)
                gain = 1 / (total + layer["epsilon"])
                if leaves:
                    scales[path] = 1 / (positions * m * total * gain)
                m = m * gamma * gain
                m_constant = m
            case "max_pool":
                # An output hands its value to the one input that it selected.
                gain = size_out / size_in * after.slope / slope
                m, m_constant = m * gain, m_constant * gain
            case "avg_pool":
                gain = size_out / size_in / layer["window"]
                m, m_constant = m * gain, m_constant * gain
            case "residual" if arms:
                one, other = (
                    _backward(arm, params, m, m_constant, scales) for arm in arms
                )
                m, m_constant = one[0] + other[0], one[1] + other[1]
            case _:  # a function of each coordinate
                m = m * after.slope / slope
                m_constant = m
    return m, m_constant
