"""Float64 NumPy reference for the layer-wise scales, written to be read and checked.

Two independent answers to the same question. `layer_scales` walks a declared chain of
links with explicit loops, in the linear domain and without cancelling anything, so it
is slow and it overflows on very deep chains. `lenet_supplement` is the closed form that
the supplement of BM prints for one network.

The equation numbers in the comments refer to two papers:

* BM: Zhang, Chen and Liu, "Train Feedforward Neural Network with Layer-wise Adaptive
  Rate via Approximating Back-matching Propagation", arXiv:1802.09750.
* LH: Zhang, Chen and Liu, "On the Local Hessian in Back-propagation", NeurIPS 2018.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Layer = Mapping[str, Any]
Shape = tuple[int, ...]


class Link(NamedTuple):
    """What the backward pass must know of one link.

    Attributes:
        layer: The declaration of the link.
        shape_in: Shape of its input, without the batch.
        shape_out: Shape of its output, without the batch.
        q: Second moment of the signal that enters it.
        arms: The links of a residual's branch and of its shortcut.
    """

    layer: Layer
    shape_in: Shape
    shape_out: Shape
    q: float
    arms: tuple[list["Link"], ...] = ()


def layer_scales(
    layers: Sequence[Layer], params: Mapping[str, Any], input_shape: Sequence[int]
) -> dict[str, float]:
    """Scale of every declared parameter, `1 / (m * m_W)` (BM Algorithm 1).

    Args:
        layers: The links from input to output, as dicts with the key "kind".
        params: Nested dict of arrays in Flax layout.
        input_shape: Shape of one example.

    Returns:
        The scales, keyed by the full path of the parameter, "fc1/kernel".
    """
    # The input of the network is taken as white: its second moment is one.
    links, _, _ = _forward(layers, params, tuple(input_shape), 1.0)
    scales: dict[str, float] = {}
    # "We set the initial factor of the output layer is m_out = 1" (BM 3.2).
    _backward(links, params, 1.0, scales)
    return scales


def _forward(
    layers: Sequence[Layer], params: Mapping[str, Any], shape: Shape, q: float
) -> tuple[list[Link], Shape, float]:
    """Walks a chain upwards; returns its links, output shape and second moment."""
    links: list[Link] = []
    for layer in layers:
        shape_out, q_out = shape, q
        arms: tuple[list[Link], ...] = ()
        match layer["kind"]:
            case "dense":
                kernel = _lookup(params, layer["path"])["kernel"]
                shape_out = (*shape[:-1], kernel.shape[-1])
                # BM (36): Var[b_k] = ||W||^2 for a white input, so q ||W||^2 here.
                q_out = q * _row_norm(kernel)
            case "conv":
                kernel = _lookup(params, layer["path"])["kernel"]
                spatial = _windowed(
                    shape,
                    kernel.shape[:-2],
                    layer.get("strides", 1),
                    layer.get("padding", "SAME"),
                    layer.get("kernel_dilation", 1),
                )
                shape_out = (*spatial, kernel.shape[-1])
                # BM (36), with W_row as in the supplement.
                q_out = q * _row_norm(kernel)
            case "batch_norm":
                # BM (24): unit variance, then the affine transformation if any.
                leaves = _affine(layer, params)
                q_out = _mean_square(leaves.get("scale", [1.0]))
                q_out += _mean_square(leaves.get("bias", [0.0]))
            case "max_pool" | "avg_pool":
                spatial = _windowed(
                    shape,
                    tuple(layer["window_shape"]),
                    layer.get("strides"),
                    layer.get("padding", "VALID"),
                    1,
                )
                shape_out = (*spatial, shape[-1])
            case "global_avg_pool":
                shape_out = (shape[-1],)
            case "flatten":
                shape_out = (math.prod(shape),)
            case "activation" | "dropout":
                pass  # BM (31): a ReLU is passed through as it is.
            case "block":
                q_out = q * layer.get("forward_gain", 1.0)
            case "residual":
                branch, shape_out, q_branch = _forward(
                    layer["branch"], params, shape, q
                )
                shortcut, shape_shortcut, q_shortcut = _forward(
                    layer["shortcut"], params, shape, q
                )
                if shape_out != shape_shortcut:
                    raise ValueError(f"arms end in {shape_out} and {shape_shortcut}")
                # LH (12): the arms are added; taken as uncorrelated, so are the q.
                q_out = q_branch + q_shortcut
                arms = (branch, shortcut)
            case kind:
                raise ValueError(f"unknown kind {kind!r}")
        links.append(Link(layer, shape, shape_out, q, arms))
        shape, q = shape_out, q_out
    return links, shape, q


def _backward(
    links: Sequence[Link], params: Mapping[str, Any], m: float, scales: dict[str, float]
) -> float:
    """Walks a chain downwards, fills in the scales, returns m at the chain's input.

    `m` is the mean over all coordinates of a tensor. A max pool therefore hands on less
    than it received, where BM 3.3 keeps `m` and counts the sharing factor after it.
    """
    for layer, shape_in, shape_out, q, arms in reversed(links):
        positions_in = math.prod(shape_in[:-1])
        positions_out = math.prod(shape_out[:-1])
        match layer["kind"]:
            case "dense":
                leaves = _lookup(params, layer["path"])
                # BM (32), where E[a a^T] = q I; shared over the leading positions.
                _record(scales, f"{layer['path']}/kernel", m * (positions_out * q))
                if "bias" in leaves:
                    _record(scales, f"{layer['path']}/bias", m * positions_out)
                # BM (34), LH (24): ||W^T||^2.
                m = m * _column_norm(leaves["kernel"], 1)
            case "conv":
                leaves = _lookup(params, layer["path"])
                # BM (33): the sharing factor s is the number of output positions.
                _record(scales, f"{layer['path']}/kernel", m * (positions_out * q))
                if "bias" in leaves:
                    _record(scales, f"{layer['path']}/bias", m * positions_out)
                # BM (35): ||W_col||^2 / c.
                groups = layer.get("feature_group_count", 1)
                c = positions_in / positions_out
                m = m * (_column_norm(leaves["kernel"], groups) / c)
            case "batch_norm":
                # What scale and bias multiply has second moment one, m is the output's.
                leaves = _affine(layer, params)
                for name in leaves:
                    _record(scales, f"{layer['path']}/{name}", m * positions_out)
                # BM (27) and (36): 1 / Var[a_k], and Var[a_k] is the incoming q.
                m = m * (_mean_square(leaves.get("scale", [1.0])) / q)
            case "max_pool":
                # BM (11): an output hands its value to the one input that it selected.
                m = m * (math.prod(shape_out) / math.prod(shape_in))
            case "avg_pool" | "global_avg_pool":
                window = layer.get("window_shape", shape_in[:-1])
                k = math.prod(window)
                # BM (11): an output hands 1 / k to each of its k inputs, which makes
                # k (1 / k)^2 = 1 / k for every output, spread over all the inputs.
                m = m * ((math.prod(shape_out) / k) / math.prod(shape_in))
            case "block":
                # LH (22), then LH (23).
                for key in _leaf_keys(_lookup(params, layer["path"]), layer["path"]):
                    _record(scales, key, m * layer["weight_curvature"])
                m = m * layer["input_curvature"]
            case "residual":
                # LH (13), Gauss-Newton part; the cross terms of the arms left out.
                branch, shortcut = arms
                m_branch = _backward(branch, params, m, scales)
                m_shortcut = _backward(shortcut, params, m, scales)
                m = m_branch + m_shortcut
            case _:
                pass  # BM (31): activation, flatten and dropout hand on m.
    return m


def _record(scales: dict[str, float], key: str, curvature: float) -> None:
    """Enters the scale of one parameter, once."""
    if key in scales:
        raise ValueError(f"{key!r} is declared twice")
    scales[key] = 1.0 / curvature


def _lookup(params: Mapping[str, Any], path: str) -> Any:
    """What lies under a path with slashes."""
    node: Any = params
    for name in path.split("/"):
        node = node[name]
    return node


def _leaf_keys(node: Any, path: str) -> list[str]:
    """The full path of every array at or under a node."""
    if not isinstance(node, Mapping):
        return [path]
    keys: list[str] = []
    for name, child in node.items():
        keys += _leaf_keys(child, f"{path}/{name}")
    return keys


def _affine(layer: Layer, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of a batch normalization, none where it has none."""
    try:
        return _lookup(params, layer["path"]) if layer.get("path") else {}
    except KeyError:
        return {}


def _mean_square(vector: Any) -> float:
    """Mean of the squares of a vector."""
    total = 0.0
    for value in vector:
        total += float(value) * float(value)
    return total / len(vector)


def _row_norm(kernel: Any) -> float:
    """`||W||^2_{2,mu}` of W, or of W_row: mean squared norm over output features."""
    total = 0.0
    for k in range(kernel.shape[-1]):
        row = 0.0
        for index in np.ndindex(kernel.shape[:-1]):
            weight = float(kernel[(*index, k)])
            row += weight * weight
        total += row
    return total / kernel.shape[-1]


def _column_norm(kernel: Any, groups: int) -> float:
    """`||W^T||^2_{2,mu}`, or that of W_col: mean squared norm over input features."""
    members, features_out = kernel.shape[-2:]
    group_out = features_out // groups
    total = 0.0
    for j in range(members * groups):
        group, member = divmod(j, members)
        column = 0.0
        for k in range(group * group_out, (group + 1) * group_out):
            for taps in np.ndindex(kernel.shape[:-2]):
                weight = float(kernel[(*taps, member, k)])
                column += weight * weight
        total += column
    return total / (members * groups)


def _windowed(
    shape: Shape, window: Shape, strides: Any, padding: Any, dilation: Any
) -> Shape:
    """All axes but the last of the output of a sliding window.

    Axes in front of those that the window covers are passed through as they are.
    """
    rank = len(window)
    leading = shape[: len(shape) - 1 - rank]
    spatial = shape[len(leading) : -1]
    strides = _per_axis(1 if strides is None else strides, rank)
    dilation = _per_axis(1 if dilation is None else dilation, rank)
    counts: list[int] = []
    for axis in range(rank):
        size, stride = spatial[axis], strides[axis]
        reach = (window[axis] - 1) * dilation[axis] + 1
        if padding == "VALID":
            padded = size
        elif padding == "SAME":
            wanted = math.ceil(size / stride)
            padded = size + max((wanted - 1) * stride + reach - size, 0)
        elif padding == "CIRCULAR":
            padded = size + reach - 1
        else:
            pair = _per_axis(padding, rank)[axis]
            low, high = (pair, pair) if isinstance(pair, int) else pair
            padded = low + size + high
        count = 0
        start = 0
        while start + reach <= padded:
            count += 1
            start += stride
        counts.append(count)
    return (*leading, *counts)


def _per_axis(value: Any, rank: int) -> tuple[Any, ...]:
    """One entry for every axis of a window."""
    entries = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(entries) != rank:
        raise ValueError(f"{value!r} does not fit a window of rank {rank}")
    return entries


def lenet_supplement(params: Mapping[str, Any]) -> dict[str, float]:
    """Scales of BM's LeNet with batch normalization, as its supplement prints them.

    Args:
        params: The kernels in Flax layout, `params["cv1"]["kernel"]` and so on.

    Returns:
        The factor of each layer's gradient, keyed "cv1", "cv2", "fc1", "fc2", "fc3".
    """

    def mu(w: np.ndarray) -> float:
        # The definition between BM (33) and (34): the mean of w_i^T w_i over the rows.
        return float(sum(w_i @ w_i for w_i in w) / len(w))

    kernels = {n: np.asarray(p["kernel"], np.float64) for n, p in params.items()}
    # BM (5): W of a fully connected layer is (outputs, inputs), a Flax kernel W^T.
    fc1, fc2 = (mu(kernels[name].T) for name in ("fc1", "fc2"))
    fc1_t, fc2_t, fc3_t = (mu(kernels[name]) for name in ("fc1", "fc2", "fc3"))
    # BM 2.2: W is (n, m, w, h), W_row is n x (mwh) and W_col is m x (nwh).
    cv1, cv2 = (kernels[name].transpose(3, 2, 1, 0) for name in ("cv1", "cv2"))
    cv1_row, cv2_row = (mu(w.reshape(w.shape[0], -1)) for w in (cv1, cv2))
    cv2_col = mu(cv2.swapaxes(0, 1).reshape(cv2.shape[1], -1))
    return {
        "fc3": 1.0,
        "fc2": fc2 / fc3_t,
        "fc1": (fc2 * fc1) / (fc3_t * fc2_t),
        "cv2": (fc2 * fc1 * cv2_row) / (25 * (fc3_t * fc2_t * fc1_t)),
        # Printed first with 196 and (196 / 25), then as here.
        "cv1": (fc2 * fc1 * cv2_row * cv1_row)
        / (25 * (fc3_t * fc2_t * fc1_t * cv2_col)),
    }
