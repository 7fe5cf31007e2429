"""Scales measured from the model itself: any architecture, no declaration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from backmatch_optax.numerics import check_number, checked_count
from backmatch_optax.parameters import (
    ParamPaths,
    is_masked,
    listed,
    masked_text,
    refuse_parts,
    text,
)
from backmatch_optax.scales import (
    LIMIT,
    check_options,
    check_state,
    scaled_updates,
    within,
)
from backmatch_optax.spec.link import Shape, kind_of

LayerOf = Callable[[str], str]


class MeasuredLayerScales(NamedTuple):
    """What `measure_layer_scales` returns; both keyed by layer."""

    layer_scales: dict[str, jax.Array]  # shape=(), or of a stack; dtype=jnp.float32
    standard_errors: dict[str, jax.Array]  # of the scales; NaN from a single probe


def module_of(path: str) -> str:
    """The layer a parameter belongs to by default: its path without its own name.

    A parameter at the top of the tree is a layer by itself.
    """
    return path.rpartition("/")[0] or path


def measure_layer_scales(
    fn: Callable[..., Any],
    params: optax.Params,
    *inputs: Any,
    key: jax.Array,
    num_probes: int = 8,
    layer_of: LayerOf = module_of,
    stacked: Sequence[str] = (),
) -> MeasuredLayerScales:
    r"""Measures the scale of every layer of any differentiable model.

    A declared scale is the reciprocal of the mean diagonal of the layer's Gauss-Newton
    matrix under a squared loss on the network's output, with everything above the layer
    included. That can be measured: pull signs :math:`v`, independent for every entry of
    the output, back to the parameters; then

    .. math::
      \mathrm{scale}(W)^{-1} \approx
      \frac{1}{\mathrm{batch}} \, \mathrm{mean}\big((J_W^T v)^2\big)

    is unbiased, and one vector-Jacobian product serves all layers at once. Use it to
    check a declared chain (`compare_scales`), or where no chain can be declared
    (attention, recurrence), to train with (`scale_by_measured_backmatch`).

    Args:
      fn: `fn(params, *inputs)`, the model's outputs before the loss: an array, or a
        tree of them, of real floating dtype with the batch as first axis. Give the same
        function object again to reuse what was compiled.
      params: the model's parameters, a tree of arrays of real floating dtype.
      *inputs: what else `fn` takes, such as a batch of images.
      key: key of the random signs.
      num_probes: the number of vector-Jacobian products, at least 1. The relative
        standard error falls with its square root; a batch of some hundred examples
        needs few.
      layer_of: maps the path of a parameter, `"Block_0/Conv_1/kernel"`, to the name of
        its layer; all parameters of a layer are measured together, by default all of a
        module. `lambda path: path` measures every array by itself, and so does the
        default at the top of the tree.
      stacked: paths of modules, or of parameters, that hold several layers along the
        first axis, as `nn.scan` makes them. Each layer is measured by itself. A stack
        inside another is named too.

    Returns:
      For each layer, in the order of the tree, the scale and its standard error, as
      float32 scalars; of a stack, vectors with an entry for each layer. The scale of a
      layer that does not reach the output is infinite.

    Raises:
      ValueError: where `key` is no key, `num_probes` is below 1, there is nothing at a
        path in `stacked`, or the parameters of a layer there have different first axes,
        a parameter or an output has no real floating dtype, or the outputs have no
        common batch axis; or inside `jax.shard_map`, where a parameter is not the same
        on all devices, so that it may be a part of one.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> def model(params, x):
      ...     return x @ params["fc1"]["kernel"] @ params["fc2"]["kernel"]
      >>> kernel = jnp.eye(4)
      >>> params = {"fc1": {"kernel": kernel}, "fc2": {"kernel": 2 * kernel}}
      >>> x = jnp.array([[1.0, -1.0, 1.0, -1.0]])
      >>> measured = bmo.measure_layer_scales(model, params, x, key=jax.random.key(0))
      >>> {path: float(scale) for path, scale in measured.layer_scales.items()}
      {'fc1': 0.25, 'fc2': 1.0}
    """
    _check_key(key)
    probes = checked_count("num_probes", num_probes)
    layers = _layers(params, layer_of, tuple(stacked))
    if not layers:
        raise ValueError("params holds no array, so there is no layer to measure")
    samples = jnp.stack(
        [
            _jitted_probe(fn, layer_of, tuple(stacked), params, inputs, probe_key)
            for probe_key in jax.random.split(key, probes)
        ]
    )
    curvature = samples.mean(0)
    reached = curvature != 0
    scales = 1 / curvature
    # The error of 1 / c is that of c over c^2, and unknown where no gradient arrives.
    spread = jnp.std(samples, axis=0, ddof=1) if probes > 1 else jnp.nan * curvature
    errors = spread / probes**0.5 / jnp.square(jnp.where(reached, curvature, 1))
    errors = jnp.where(reached, errors, jnp.inf)
    return MeasuredLayerScales(_by_layer(scales, layers), _by_layer(errors, layers))


class _Layer(NamedTuple):
    """The parameters that are measured together."""

    stack: Shape  # how many layers there are along the first axes
    size: int  # coordinates of one of them


def _layers(
    params: optax.Params, layer_of: LayerOf, stacked: Sequence[str]
) -> dict[str, _Layer]:
    """The layers in the order of the tree."""
    refuse_parts(params)
    paths = ParamPaths(params)
    for path in stacked:
        if paths.leaves and not paths.below(path):
            raise ValueError(f"stacked: {paths.missing(path)}")
    layers: dict[str, _Layer] = {}
    for path, leaf in paths.leaves.items():
        if is_masked(leaf):
            raise ValueError(masked_text(path))
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"parameter {path!r} must be an array of a real floating dtype, but it "
                f"is of {dtype}"
            )
        shape, depth = jnp.shape(leaf), _depth(path, stacked)
        name, stack = layer_of(path), shape[:depth]
        before = layers.get(name, _Layer(stack, 0))
        if len(stack) < depth or stack != before.stack:
            raise ValueError(
                f"{path!r} of shape {shape} must have an axis for each stack that "
                f"it is in, of the same length as all of {name!r}"
            )
        size = math.prod(shape) // max(math.prod(stack), 1)
        layers[name] = _Layer(stack, before.size + size)
    return layers


def _depth(path: str, stacked: Sequence[str]) -> int:
    """How many stacks a parameter is in."""
    return sum(f"{path}/".startswith(f"{stack}/" if stack else "") for stack in stacked)


def _by_layer(entries: jax.Array, layers: Mapping[str, _Layer]) -> dict[str, jax.Array]:
    """A vector with an entry for each layer, by their names."""
    found, place = {}, 0
    for name, layer in layers.items():
        count = math.prod(layer.stack)
        found[name] = entries[place : place + count].reshape(layer.stack)
        place += count
    return found


def _entry_sizes(layers: Mapping[str, _Layer]) -> list[int]:
    """The sizes that go with the entries of such a vector."""
    return [
        layer.size for layer in layers.values() for _ in range(math.prod(layer.stack))
    ]


def _check_key(key: Any) -> None:
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(
            "key must be a random key such as jax.random.key(0), but it is "
            f"{kind_of(key)}"
        )


def _probe(
    fn: Callable[..., Any],
    layer_of: LayerOf,
    stacked: tuple[str, ...],
    params: optax.Params,
    inputs: Sequence[Any],
    key: jax.Array,
) -> jax.Array:
    """One unbiased sample of the mean Gauss-Newton diagonal of every layer."""
    outputs, pull_back = jax.vjp(lambda p: fn(p, *inputs), params)
    batch = _batch_size(outputs)
    leaves, treedef = jax.tree.flatten(outputs)
    keys = jax.random.split(key, len(leaves))
    signs = [
        jax.random.rademacher(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    (gradient,) = pull_back(treedef.unflatten(signs))
    totals: dict[str, jax.Array] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        path = text(key_path)
        layer, depth = layer_of(path), _depth(path, stacked)
        squares = jnp.square(leaf.astype(jnp.float32))
        total = jnp.sum(squares, axis=tuple(range(depth, leaf.ndim)))
        totals[layer] = total + totals.get(layer, 0.0)
    layers = _layers(params, layer_of, stacked)
    means = (totals[name] / max(of.size * batch, 1) for name, of in layers.items())
    return jnp.concatenate([*map(jnp.ravel, means)])


_jitted_probe = jax.jit(_probe, static_argnames=("fn", "layer_of", "stacked"))


def _batch_size(outputs: Any) -> int:
    leaves = jax.tree.leaves(outputs)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        raise ValueError(
            "fn must return arrays of a real floating dtype, but it returned "
            + listed(map(str, dtypes))
        )
    batches = {shape[0] if shape else None for shape in shapes}
    if len(batches) != 1 or None in batches:
        raise ValueError(
            "fn must return arrays with the batch as first axis, but it returned "
            "shapes " + listed(map(str, shapes))
        )
    return shapes[0][0]


def _reciprocal(curvature: jax.Array) -> jax.Array:
    """Finite scales; where there is no curvature, there is no gradient to scale."""
    reaches = curvature >= jnp.finfo(jnp.float32).tiny
    safe = jnp.where(jnp.isnan(curvature) | reaches, curvature, 1)
    return 1 / jnp.minimum(safe, jnp.finfo(jnp.float32).max)


class ScaleByMeasuredBackmatchState(NamedTuple):
    """State of `scale_by_measured_backmatch`."""

    steps: jax.Array  # taken so far; shape=(), dtype=jnp.int32
    key: jax.Array  # of the next probe; a typed key, shape=()
    curvatures: jax.Array  # running sums, by layer; shape=(layers,), dtype=jnp.float32
    # Those applied last; dtype=jnp.float32, shape=(), or (n,) of a stack.
    layer_scales: dict[str, jax.Array]


def scale_by_measured_backmatch(
    *,
    key: jax.Array,
    outputs_fn: Callable[[optax.Params], Any] | None = None,
    refresh_every: int | None = 20,
    decay: jax.typing.ArrayLike = 0.9,
    normalize: bool = True,
    limit: jax.typing.ArrayLike | None = LIMIT,
    layer_of: LayerOf = module_of,
    stacked: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each layer's gradient by a scale measured on the model itself.

    For models whose layers no chain describes. Every `refresh_every` steps, the first
    included, one vector-Jacobian product measures all layers (`measure_layer_scales`);
    the curvatures are averaged over refreshes. The model on a batch comes with each
    update, as an extra argument::

      def outputs(params):
          return model.apply({"params": params}, images)

      updates, state = tx.update(gradient, state, params, outputs_fn=outputs)

    Where the caller of `update` passes no extra arguments, as Flax's `TrainState`, give
    `outputs_fn` here instead. It then measures on the one batch that it closes over.

    Put a weight decay after it. Before it, the decay is multiplied by the scales, which
    grow by orders of magnitude where units of the layers above fall silent: there even
    5e-4 undid the training of LeNet on CIFAR-10.

    Args:
      key: key of the random signs, `jax.random.key(...)`.
      outputs_fn: maps parameters to the model's outputs before the loss, with the batch
        as first axis. It is used where an update brings none of its own.
      refresh_every: the number of steps between measurements, at least 1. None measures
        at the first step alone and keeps those scales.
      decay: how much of the running average each refresh keeps, in [0, 1).
      normalize: divides the scales by their mean, so that SGD's learning rate carries
        over; see `layer_scales`.
      limit: how far a normalized scale may be from 1; see `layer_scales`.
      layer_of: maps the path of a parameter to the name of its layer; all parameters of
        a layer share one scale. By default a module is a layer.
      stacked: paths of what holds several layers along the first axis, each with a
        scale of its own; see `measure_layer_scales`.

    Under `optax.inject_hyperparams`, name `key`, `outputs_fn`, `refresh_every`,
    `normalize`, `layer_of` and `stacked` in its `static_args`.

    Returns:
      A gradient transformation with state `ScaleByMeasuredBackmatchState`, whose
      `layer_scales` have the names that `measure_layer_scales` gives them.
      Its `update` needs `params`, and `outputs_fn` where none was given here.

    Raises:
      ValueError: where `key` is no key, `outputs_fn` no function, `refresh_every` below
        1 or `decay` not in [0, 1); in `init`, where a parameter has no real floating
        dtype; in `update`, where `params` or `outputs_fn` is missing, the state or an
        update belongs to other parameters, or a gradient is not of a floating dtype;
        inside `jax.shard_map`, where a parameter is not the same on all devices.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import backmatch_optax as bmo
      >>> tx = optax.chain(
      ...     bmo.scale_by_measured_backmatch(key=jax.random.key(0)),
      ...     optax.sgd(0.1, momentum=0.9),
      ... )
      >>> params = {"fc": {"kernel": 2 * jnp.eye(4)}}
      >>> x = jnp.array([[2.0, -2.0, 2.0, -2.0]])
      >>> updates, state = tx.update(
      ...     params,
      ...     tx.init(params),
      ...     params,
      ...     outputs_fn=lambda p: x @ p["fc"]["kernel"],
      ... )
      >>> print(optax.tree.get(state, "layer_scales"))
      {'fc': Array(1., dtype=float32)}
    """
    _check_key(key)
    if outputs_fn is not None and not callable(outputs_fn):
        raise ValueError(
            "outputs_fn must be a function of the parameters, but it is "
            f"{kind_of(outputs_fn)}"
        )
    default_outputs_fn, stacked = outputs_fn, tuple(stacked)
    check_number("decay", decay, least=0, below=1)
    check_options("paper", 0, normalize, limit, "error")
    if refresh_every is not None:
        checked_count("refresh_every", refresh_every)

    def init_fn(params: optax.Params) -> ScaleByMeasuredBackmatchState:
        layers = _layers(params, layer_of, stacked)
        scales = {name: jnp.ones(of.stack, jnp.float32) for name, of in layers.items()}
        one: Any = jnp.ones((), jnp.float32)
        return ScaleByMeasuredBackmatchState(
            steps=jnp.zeros((), jnp.int32),
            key=jax.random.fold_in(key, 0),  # a new array: the state may be donated
            curvatures=jnp.zeros((len(_entry_sizes(layers)),), jnp.float32),
            # optax.tree.map_params passes a tree without leaves. One leaf then stands
            # for the dict, whose keys nobody can know.
            layer_scales=scales or one,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        outputs_fn: Callable[[optax.Params], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        measured_fn = default_outputs_fn if outputs_fn is None else outputs_fn
        if params is None or measured_fn is None:
            missing = "params" if params is None else "outputs_fn"
            raise ValueError(
                "scale_by_measured_backmatch measures the model at the parameters: "
                "call update(updates, state, params, outputs_fn=lambda params: "
                f"outputs), or give outputs_fn at construction, but {missing} is None"
            )
        layers = _layers(params, layer_of, stacked)
        if not layers:
            return updates, state
        sizes = _entry_sizes(layers)
        expected = {name: np.zeros(layer.stack) for name, layer in layers.items()}
        parts = (0, np.zeros(jnp.shape(key)), np.zeros(len(sizes)), expected)
        check_state(state, ScaleByMeasuredBackmatchState._make(parts))

        def refresh(state: ScaleByMeasuredBackmatchState):
            next_key, probe_key = jax.random.split(state.key)
            sample = _probe(measured_fn, layer_of, stacked, params, (), probe_key)
            kept = jnp.asarray(decay, jnp.float32)  # also with 64-bit JAX
            curvatures = kept * state.curvatures + (1 - kept) * sample
            refreshes = 1 + (state.steps // refresh_every if refresh_every else 0)
            average = curvatures / (1 - jnp.power(kept, jnp.float32(refreshes)))
            if normalize:
                weights = jnp.asarray(sizes, jnp.float32)
                mean = jnp.average(average, weights=weights)
                average = average / jnp.where(mean == 0, 1, mean)
            scales = _reciprocal(average)
            if normalize:
                scales = within(limit, scales)
            return state._replace(
                key=next_key,
                curvatures=curvatures,
                layer_scales=_by_layer(scales, layers),
            )

        since = state.steps % refresh_every if refresh_every else state.steps
        state = jax.lax.cond(since == 0, refresh, lambda state: state, state)
        return (
            scaled_updates(
                updates, params, lambda path: state.layer_scales[layer_of(path)]
            ),
            state._replace(steps=optax.safe_increment(state.steps)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
