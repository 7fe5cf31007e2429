"""The declared layer chain: which layers a network has, from its input to its output.

Every kind of layer is one class that states, for a link between its input and output,

* `shape_after`: the shape of its output, without the batch dimension;
* `moments_after`: the moments of its output, given those of its input;
* `m_W` and `m_z`: its two local Hessians, each reduced to a scalar, the mean diagonal
  of `J^T J`, where `J` is the Jacobian of the output with respect to one of its
  parameters, or to its input.

That is all the recursion needs, so a new kind of layer is one new class. Spellings and
defaults are Flax's own, kernels are in Flax layout: Dense `(in, out)`, Conv
`(*window, in / groups, out)`. Links are frozen, hashable and comparable, and their
`repr` is the code that rebuilds them (functions of a `Block` by their names).

Equation numbers: BM is Zhang, Chen and Liu, arXiv 1802.09750; LH is Zhang, Chen and
Liu, "On the Local Hessian in Back-propagation", NeurIPS 2018.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from backmatch_optax import _recursion
from backmatch_optax._moments import Moments, after_activation, after_max_pool
from backmatch_optax._positive import Positive, measured, number, wide
from backmatch_optax._site import Shape, Site
from backmatch_optax._windows import (
    SIZE_KEEPING,
    Padding,
    PerDimension,
    canonical_counts,
    canonical_padding,
    canonical_window,
    output_sizes,
    per_dimension,
    taps_inside,
    transposed_padding,
    transposed_sizes,
)

__all__ = [
    "Activation",
    "AvgPool",
    "BatchNorm",
    "Block",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "GroupNorm",
    "LayerChain",
    "LayerNorm",
    "Link",
    "MaxPool",
    "RMSNorm",
    "Residual",
    "Scale",
]

ACTIVATIONS = (
    "celu",
    "elu",
    "gelu",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softplus",
    "swish",
    "tanh",
)

_LARGEST = sys.float_info.max

# A Block's curvature: a number, or a function of the block's parameters.
Curvature = float | Callable[[Mapping[str, Any]], jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True, repr=False)
class Link:
    """Base of all links; as it stands, a link without parameters that changes nothing.

    Subclass it, as a frozen dataclass with `repr=False`, to add a kind of layer. Each
    rule gets a `Site` with `input_shape`, `output_shape`, `params`, `q`, and counts and
    norms in the papers' terms.

    Examples:
      >>> import dataclasses
      >>> import jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> @dataclasses.dataclass(frozen=True, repr=False)
      ... class LayerScale(spec.Link):  # multiplies every feature by a learned gamma
      ...     path: str
      ...     roles = required_roles = ("gamma",)
      ...
      ...     def moments_after(self, here):
      ...         return here.moments * here.squared_row_norm("gamma")
      ...
      ...     def m_W(self, here, role):
      ...         return here.q * here.positions_out  # an entry meets every position
      ...
      ...     def m_z(self, here):
      ...         return here.squared_row_norm("gamma")
      >>> links = [LayerScale("scale"), spec.Dense("fc")]
      >>> chain = spec.LayerChain(links, input_shape=(4,))
      >>> gamma, kernel = jnp.full(4, 2.0), jnp.ones((4, 8))
      >>> params = {"scale": {"gamma": gamma}, "fc": {"kernel": kernel}}
      >>> for path, scale in bmo.layer_scales(params, chain).items():
      ...     print(path, scale.round(4))
      scale 0.125
      fc 0.25
    """

    # The parameters it owns, by the names Flax gives them: the first decides the
    # layer's own scale. Those in `required_roles` must be there.
    roles: ClassVar[tuple[str, ...]] = ()
    required_roles: ClassVar[tuple[str, ...]] = ()
    owns_subtree: ClassVar[bool] = False  # every parameter below its path instead

    def __post_init__(self):
        try:
            self.validate()
        except ValueError as error:
            name = repr(self)
            name = name if len(name) <= 80 else f"{name[:80]}..."
            raise ValueError(f"{name}: {error}") from None

    def validate(self) -> None:
        """Checks, and may normalise, the arguments; raises `ValueError`."""

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        """The chains that the link itself consists of, side by side, by name."""
        return {}

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """Shape of the output; raises `ValueError` where something does not fit."""
        del param_shapes
        return input_shape

    def moments_after(self, here: Site) -> Moments:
        """Moments of the output, means over all its coordinates."""
        return here.moments

    def m_W(self, here: Site, role: str) -> Positive:
        """Weight curvature: the mean diagonal of `J^T J` for one of its parameters."""
        raise NotImplementedError(f"{type(self).__name__} has no parameter {role!r}")

    def m_z(self, here: Site) -> Positive:
        """Input curvature: the mean diagonal of `J^T J` for its input."""
        del here
        return number(1.0)

    def backward_factor(self, here: Site) -> Positive:
        """The factor handed on to the link below: `m * m_z`."""
        return here.m * self.m_z(here)

    def centres(self, centred: bool) -> bool:
        """Whether what it hands back has mean zero over the batch, for every unit.

        True of a BatchNorm; a linear link keeps what it gets, which is the default.
        """
        return centred

    def __repr__(self) -> str:
        arguments = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is type(field.default) and value == field.default:
                continue
            text = getattr(value, "__qualname__", None) or repr(value)
            arguments.append(f"{field.name}={text}" if field.kw_only else text)
        name = type(self).__name__
        module = "spec." if type(self).__module__ == __name__ else ""
        return f"{module}{name}({', '.join(arguments)})"

    def _canonical(self, **fields: Any) -> None:
        """Writes normalised arguments into the frozen dataclass."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)


class _Windowed(Link):
    """What links with a window share: arguments that may have an entry a dimension."""

    _in_full: Mapping[str, Sequence[Any]]

    def _canonical_entries(self, **arguments: Any) -> None:
        """As `_canonical`; remembers how many entries the user wrote.

        Equal entries become one, and how many dimensions there are is not known yet.
        """
        written = {name: getattr(self, name) for name in arguments}
        in_full = {
            name: tuple(value)
            for name, value in written.items()
            if isinstance(value, Sequence) and not isinstance(value, str)
        }
        self._canonical(**arguments, _in_full=in_full)

    def _check_entries(self, input_shape: Shape) -> None:
        for name, value in self._in_full.items():
            per_dimension(name, value, len(input_shape) - 1)


class _Linear(Link):
    """What all linear layers share: kernel and bias, applied at every position."""

    roles = ("kernel", "bias")
    required_roles = ("kernel",)

    def uses(self, here: Site) -> float:
        """How often a kernel entry is used: once for every position of the output."""
        return here.positions_out

    def seen(self, here: Site) -> Moments:
        """The moments of the input as the kernel meets it."""
        return here.moments

    def moments_after(self, here: Site) -> Moments:
        # A sum of independent terms: fan_in times the taps that reach it.
        gain = here.squared_row_norm("kernel") * self.uses(here) / here.positions_out
        after = self.seen(here).mixed(gain)
        if here.mean_field and "bias" in here.params:
            after = after.with_spread(here.squared_row_norm("bias"))
        return after

    def m_W(self, here: Site, role: str) -> Positive:
        # BM (32) and (33): a weight meets an input of moment q each time it is used; a
        # bias a constant one. BM's sharing factor `s` is `uses` times what the pooling
        # above has left in `m`. With the papers' gains all of q is variance.
        if role != "kernel":
            return number(here.positions_out)
        seen = self.seen(here)
        return self.uses(here) * (seen.variance if here.centred else seen.q)

    def m_z(self, here: Site) -> Positive:
        # BM (34) and (35): ||W_col||^2_{2,mu}, the norm of the kernel's rows counted by
        # input features, over BM's c = positions_in / uses.
        column = here.squared_row_norm("kernel") * here.fan_out / here.fan_in
        return column * self.uses(here) / here.positions_in


@dataclasses.dataclass(frozen=True, repr=False)
class Dense(_Linear):
    """A fully connected layer, `flax.linen.Dense` or `flax.nnx.Linear`.

    Acts on the last axis; all axes before it are positions that share the kernel.

    Args:
      path: where the layer's `kernel` and optional `bias` lie in the parameters, such
        as `"Dense_0"` or `"Head_0/Dense_1"`; `""` for the top of the tree.

    Raises:
      ValueError: where `path` is not a string of names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Dense("fc1")
      spec.Dense('fc1')
    """

    path: str

    def validate(self) -> None:
        _check_path(self.path)

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, with the kernel's output features."""
        kernel = param_shapes["kernel"]
        if len(kernel) != 2:
            raise ValueError(
                f"expects a kernel of shape (in, out), but it has shape {kernel}"
            )
        _check_features("kernel", kernel, kernel[0], input_shape)
        _check_vector("bias", param_shapes, kernel[-1])
        return (*input_shape[:-1], kernel[-1])


@dataclasses.dataclass(frozen=True, repr=False)
class Conv(_Windowed, _Linear):
    """A convolution over 1, 2 or 3 dimensions, `flax.linen.Conv` or `flax.nnx.Conv`.

    Its kernel's shape is read from the parameters. Padded positions count like others,
    as in the papers; without padding (or with circular padding) every rule is exact for
    kernels of independent entries.

    Args:
      path: where the layer's `kernel` and optional `bias` lie in the parameters.
      strides: an int for all dimensions, or one for each.
      padding: `"SAME"`, `"SAME_LOWER"`, `"VALID"`, `"CIRCULAR"`, `"REFLECT"`,
        `"CAUSAL"`, an int, or an int or a (low, high) pair for each dimension.
      kernel_dilation: an int for all dimensions, or one for each.
      feature_group_count: the number of groups the input features are split into.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Conv("Conv_0", strides=(2, 2), padding=[(1, 1), (1, 1)])
      spec.Conv('Conv_0', strides=2, padding=1)
    """

    path: str
    strides: PerDimension = dataclasses.field(default=1, kw_only=True)
    padding: Padding = dataclasses.field(default="SAME", kw_only=True)
    kernel_dilation: PerDimension = dataclasses.field(default=1, kw_only=True)
    feature_group_count: int = dataclasses.field(default=1, kw_only=True)

    def validate(self) -> None:
        _check_path(self.path)
        groups = canonical_counts("feature_group_count", self.feature_group_count)
        if not isinstance(self.feature_group_count, int):
            raise ValueError(
                f"feature_group_count (={groups!r}) must be a positive int"
            )
        self._canonical(feature_group_count=groups)
        self._canonical_entries(
            strides=canonical_counts("strides", self.strides),
            padding=canonical_padding(self.padding, ("VALID", *SIZE_KEEPING)),
            kernel_dilation=canonical_counts("kernel_dilation", self.kernel_dilation),
        )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """Positions by Flax's padding rules, the kernel's output features."""
        kernel = param_shapes["kernel"]
        _check_conv_kernel(kernel, input_shape)
        self._check_entries(input_shape)
        groups = self.feature_group_count
        _check_features("kernel", kernel, kernel[-2] * groups, input_shape)
        if kernel[-1] % groups:
            raise ValueError(
                f"feature_group_count (={groups}) must divide the {kernel[-1]} output "
                f"features of its kernel of shape {kernel}"
            )
        _check_vector("bias", param_shapes, kernel[-1])
        if self.padding == "CAUSAL" and len(kernel) != 3:
            raise ValueError("padding 'CAUSAL' is for one spatial dimension alone")
        sizes = output_sizes(
            input_shape[:-1],
            kernel[:-2],
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
        )
        return (*sizes, kernel[-1])

    def uses(self, here: Site) -> float:
        # In the papers a tap on the padding counts like any other.
        return self._inside(here)[0] if here.mean_field else here.positions_out

    def seen(self, here: Site) -> Moments:
        """Near the border fewer taps see the input's mean, so that it varies."""
        if not here.mean_field:
            return here.moments
        return here.moments.with_mean_kept(self._inside(here)[1])

    def _inside(self, here: Site) -> tuple[float, float]:
        if self.padding in ("CIRCULAR", "REFLECT"):  # these pad with the input itself
            return here.positions_out, 1.0
        return taps_inside(
            here.input_shape[:-1],
            here.params["kernel"].shape[:-2],
            here.output_shape[:-1],
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class ConvTranspose(_Windowed, _Linear):
    """A transposed convolution, `flax.linen.ConvTranspose` or `flax.nnx.ConvTranspose`.

    Args:
      path: where the layer's `kernel`, of shape `(*window, in, out)`, and optional
        `bias` lie in the parameters.
      strides: an int for all dimensions, or one for each; None is 1, as in Flax.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"`, an int, or an int or a (low, high)
        pair for each dimension.
      kernel_dilation: an int for all dimensions, or one for each.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.ConvTranspose("ConvTranspose_0", strides=(2, 2))
      spec.ConvTranspose('ConvTranspose_0', strides=2)
    """

    path: str
    strides: PerDimension | None = dataclasses.field(default=None, kw_only=True)
    padding: Padding = dataclasses.field(default="SAME", kw_only=True)
    kernel_dilation: PerDimension = dataclasses.field(default=1, kw_only=True)

    def validate(self) -> None:
        _check_path(self.path)
        strides = self.strides
        self._canonical_entries(
            strides=None if strides is None else canonical_counts("strides", strides),
            padding=canonical_padding(self.padding, ("VALID", "SAME", "CIRCULAR")),
            kernel_dilation=canonical_counts("kernel_dilation", self.kernel_dilation),
        )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """Positions by Flax's padding rules, the kernel's output features."""
        kernel = param_shapes["kernel"]
        _check_conv_kernel(kernel, input_shape)
        self._check_entries(input_shape)
        _check_features("kernel", kernel, kernel[-2], input_shape)
        _check_vector("bias", param_shapes, kernel[-1])
        sizes = transposed_sizes(
            input_shape[:-1],
            kernel[:-2],
            strides=1 if self.strides is None else self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
        )
        return (*sizes, kernel[-1])

    def uses(self, here: Site) -> float:
        """Once for every position of the input, which it spreads over the output."""
        if isinstance(self.padding, str):
            return here.positions_in
        window, dilation = here.params["kernel"].shape[:-2], self.kernel_dilation
        # Little padding cuts the output off, and with it what some inputs spread.
        uses, _ = taps_inside(
            here.output_shape[:-1],
            window,
            here.input_shape[:-1],
            strides=1 if self.strides is None else self.strides,
            padding=transposed_padding(window, self.padding, dilation),
            dilation=dilation,
        )
        return uses


class _Normalisation(Link):
    """What all normalisations share: unit moment, then a scale and a bias."""

    path: str | None

    roles = ("scale", "bias")

    def validate(self) -> None:
        if self.path is not None:
            _check_path(self.path)

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's."""
        for role in self.roles:
            _check_vector(role, param_shapes, input_shape[-1])
        return input_shape

    def remaining(self, here: Site) -> Moments:
        """The signal's moments without the means that it takes away."""
        return here.moments.without_offset()

    def centres(self, centred: bool) -> bool:
        del centred
        return False  # it multiplies every example by a number of its own

    def moments_after(self, here: Site) -> Moments:
        remaining = self.remaining(here)
        moments = remaining * (self._squared_scale(here) / remaining.q)
        if "bias" not in here.params:
            return moments
        bias = here.squared_row_norm("bias")
        if here.mean_field:
            return moments.with_spread(bias)
        return Moments(moments.variance + bias)

    def m_W(self, here: Site, role: str) -> Positive:
        # Each entry acts at every position: the scale on a signal of moment 1, the bias
        # on a constant one.
        del role
        return number(here.positions_out)

    def m_z(self, here: Site) -> Positive:
        return self._squared_scale(here) / self.remaining(here).q

    def _squared_scale(self, here: Site) -> Positive:
        return here.squared_row_norm("scale") if "scale" in here.params else number(1.0)


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorm(_Normalisation):
    """Batch normalisation over the last axis, `flax.linen.BatchNorm` or nnx's.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a BatchNorm without either (`use_scale=False, use_bias=False`), as in the
        papers.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.BatchNorm(), spec.BatchNorm("BatchNorm_0")
      (spec.BatchNorm(), spec.BatchNorm('BatchNorm_0'))
    """

    path: str | None = None

    def remaining(self, here: Site) -> Moments:
        # BM (36), LH (24): a unit's variance over the batch. With the papers' gains
        # that is the whole incoming moment.
        return Moments(here.moments.variance)

    def centres(self, centred: bool) -> bool:
        del centred
        return True


@dataclasses.dataclass(frozen=True, repr=False)
class LayerNorm(_Normalisation):
    """Normalisation over the features, `flax.linen.LayerNorm` or `flax.nnx.LayerNorm`.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a LayerNorm without either.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.LayerNorm("LayerNorm_0")
      spec.LayerNorm('LayerNorm_0')
    """

    path: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class GroupNorm(_Normalisation):
    """Normalisation over groups of features and all positions, `flax.linen.GroupNorm`.

    Args:
      path: where its `scale` and `bias` lie in the parameters, either or both; None
        for a GroupNorm without either.
      num_groups: the number of groups, Flax's 32 by default. As many as there are
        features is `flax.linen.InstanceNorm`.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes, where
        `num_groups` is no positive int, or (at `init`) where it does not divide the
        number of features.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.GroupNorm("GroupNorm_0"), spec.GroupNorm("GroupNorm_1", num_groups=8)
      (spec.GroupNorm('GroupNorm_0'), spec.GroupNorm('GroupNorm_1', num_groups=8))
    """

    path: str | None = None
    num_groups: int = dataclasses.field(default=32, kw_only=True)

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise ValueError(
                f"num_groups (={self.num_groups!r}) must be a positive int"
            )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        if input_shape[-1] % self.num_groups:
            raise ValueError(
                f"num_groups (={self.num_groups}) must divide the {input_shape[-1]} "
                "features of its input"
            )
        return super().shape_after(input_shape, param_shapes)

    def remaining(self, here: Site) -> Moments:
        # The mean of g units with means of either sign has a g-th of their square.
        units = here.fan_in // self.num_groups
        spread = here.moments.spread
        if spread is None or units == 1:
            return Moments(here.moments.variance)
        return Moments(here.moments.variance, spread * (1.0 - 1.0 / units))


@dataclasses.dataclass(frozen=True, repr=False)
class RMSNorm(_Normalisation):
    """Division by the features' root mean square, `flax.linen.RMSNorm` or nnx's.

    Args:
      path: where its `scale` lies in the parameters; None for one without.

    Raises:
      ValueError: where `path` is neither None nor names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.RMSNorm("RMSNorm_0")
      spec.RMSNorm('RMSNorm_0')
    """

    path: str | None = None

    roles = ("scale",)

    def remaining(self, here: Site) -> Moments:
        return here.moments


@dataclasses.dataclass(frozen=True, repr=False)
class Activation(Link):
    """An elementwise nonlinearity.

    With the papers' gains it counts as 1 both ways, as in BM (31); with mean-field
    gains as what it does to a Gaussian signal.

    Args:
      name: the name of the function in `flax.linen`, such as `"relu"` or `"tanh"`.

    Raises:
      ValueError: where the name is not known, with the nearest that are.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Activation("relu")
      spec.Activation('relu')
    """

    name: str

    def validate(self) -> None:
        if self.name not in ACTIVATIONS:
            near = difflib.get_close_matches(str(self.name), ACTIVATIONS, n=3)
            hint = f"Nearest: {', '.join(map(repr, near))}. " if near else ""
            raise ValueError(
                f"name (={self.name!r}) is not known. {hint}"
                f"Known: {', '.join(map(repr, ACTIVATIONS))}."
            )

    def centres(self, centred: bool) -> bool:
        return centred and self.name == "identity"

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return after_activation(self.name, here.moments)[0]

    def m_z(self, here: Site) -> Positive:
        if not here.mean_field:
            return number(1.0)
        return after_activation(self.name, here.moments)[1]


class _Pool(_Windowed):
    """What MaxPool and AvgPool share: a window that slides over the positions."""

    window_shape: Sequence[int]
    strides: PerDimension | None
    padding: Padding

    def validate(self) -> None:
        strides = self.strides
        self._canonical_entries(
            window_shape=canonical_window("window_shape", self.window_shape),
            strides=None if strides is None else canonical_counts("strides", strides),
            padding=canonical_padding(self.padding, ("VALID", "SAME", "SAME_LOWER")),
        )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """Positions of the window, the input's features."""
        del param_shapes
        if len(self.window_shape) != len(input_shape) - 1:
            raise ValueError(
                f"window_shape (={self.window_shape}) has {len(self.window_shape)} "
                f"dimensions, but its input has {len(input_shape) - 1} spatial ones"
            )
        self._check_entries(input_shape)
        sizes = output_sizes(
            input_shape[:-1],
            self.window_shape,
            strides=1 if self.strides is None else self.strides,
            padding=self.padding,
        )
        return (*sizes, input_shape[-1])


@dataclasses.dataclass(frozen=True, repr=False)
class MaxPool(_Pool):
    """Max pooling, `flax.linen.max_pool`.

    Args:
      window_shape: the window, one int for each spatial dimension.
      strides: an int for all dimensions, or one for each; None is a stride of 1, as in
        Flax (so the usual pooling is `MaxPool((2, 2), strides=(2, 2))`).
      padding: `"VALID"`, `"SAME"`, `"SAME_LOWER"`, an int, or an int or a (low, high)
        pair for each dimension.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.MaxPool((2, 2), strides=(2, 2))
      spec.MaxPool((2, 2), strides=2)
    """

    window_shape: Sequence[int]
    strides: PerDimension | None = dataclasses.field(default=None, kw_only=True)
    padding: Padding = dataclasses.field(default="VALID", kw_only=True)

    def m_z(self, here: Site) -> Positive:
        # Each output hands its value to one input: BM's pooled `s` and `c` (BM 3.3).
        handed = number(here.size_out / here.size_in)
        if not here.mean_field:
            return handed
        return handed * after_max_pool(here.moments, math.prod(self.window_shape))[1]

    def centres(self, centred: bool) -> bool:
        del centred
        return False  # which of the window is the largest depends on the example

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return after_max_pool(here.moments, math.prod(self.window_shape))[0]


@dataclasses.dataclass(frozen=True, repr=False)
class AvgPool(_Pool):
    """Average pooling, `flax.linen.avg_pool`.

    Args:
      window_shape: the window, one int for each spatial dimension.
      strides: an int for all dimensions, or one for each; None is a stride of 1, as in
        Flax.
      padding: `"VALID"`, `"SAME"`, `"SAME_LOWER"`, an int, or an int or a (low, high)
        pair for each dimension.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.AvgPool((2, 2), strides=(2, 2), padding="SAME")
      spec.AvgPool((2, 2), strides=2, padding='SAME')
    """

    window_shape: Sequence[int]
    strides: PerDimension | None = dataclasses.field(default=None, kw_only=True)
    padding: Padding = dataclasses.field(default="VALID", kw_only=True)

    def m_z(self, here: Site) -> Positive:
        # Each output hands 1 / k of its value to k inputs: least squares, BM (11).
        return number(here.size_out / here.size_in / math.prod(self.window_shape))

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return here.moments.averaged(math.prod(self.window_shape))


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalAvgPool(Link):
    """The mean over all positions, `x.mean(axis=(1, 2))` for images.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.GlobalAvgPool()
      spec.GlobalAvgPool()
    """

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The features alone."""
        del param_shapes
        return input_shape[-1:]

    def m_z(self, here: Site) -> Positive:
        # One window of all positions: 1 / k of a value to k inputs.
        return number(1.0 / here.positions_in**2)

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field:
            return here.moments
        return here.moments.averaged(here.positions_in)


@dataclasses.dataclass(frozen=True, repr=False)
class Flatten(Link):
    """All axes but the batch made one, `x.reshape((x.shape[0], -1))`.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Flatten()
      spec.Flatten()
    """

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """One axis."""
        del param_shapes
        return (math.prod(input_shape),)


@dataclasses.dataclass(frozen=True, repr=False)
class Dropout(Link):
    """Dropout, which keeps the mean of signal and gradient: the identity here.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Dropout()
      spec.Dropout()
    """


@dataclasses.dataclass(frozen=True, repr=False)
class Scale(Link):
    """Multiplication by a constant, such as `0.5 * x` or a division by `sqrt(2)`.

    Only the square of the constant counts. With mean-field gains the difference of two
    signals, a `Residual` with `Scale(-1)`, is therefore taken for their sum: where both
    have a mean in common, as after ReLUs, its second moment comes out too large, by up
    to a factor of about 2.

    Args:
      factor: the constant, not zero.

    Raises:
      ValueError: where it is not a finite number other than zero.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Scale(0.5)
      spec.Scale(0.5)
    """

    factor: float

    def validate(self) -> None:
        factor = self.factor
        if not isinstance(factor, numbers.Real) or not 0.0 < abs(factor) < math.inf:
            raise ValueError(
                f"factor (={factor!r}) must be a finite number other than zero"
            )
        self._canonical(factor=float(factor))

    def moments_after(self, here: Site) -> Moments:
        return here.moments * self.factor**2

    def m_z(self, here: Site) -> Positive:
        del here
        return number(self.factor**2)


@dataclasses.dataclass(frozen=True, repr=False)
class Block(Link):
    """A block of any kind, with the two scalars of LH Algorithm 2 given by the user.

    Every parameter below `path` is scaled by `1 / (m * weight_curvature)`, and the
    backward factor `m` is multiplied by `input_curvature`, LH (22) and (23).

    Args:
      path: where the block's parameters lie.
      weight_curvature: `m_W`, the mean diagonal of `J^T J` with respect to the block's
        parameters: a positive number, or a function of the block's parameters (nested
        dicts of arrays) that returns a positive scalar.
      input_curvature: `m_z`, the same with respect to the block's input.
      forward_gain: by how much the block multiplies the second moment of its signal;
        a number or a function. 1 is right for a block that ends in a normalisation.
      output_shape: shape of the block's output without the batch dimension; None if it
        is the input's.

    Raises:
      ValueError: where a curvature is neither a positive number nor a function, or (at
        `init`) a function returns something that is not a real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import spec
      >>> def squared_norm(params):
      ...     return jnp.sum(params["kernel"] ** 2)
      >>> spec.Block("mixer", weight_curvature=2.0, input_curvature=squared_norm)
      spec.Block('mixer', weight_curvature=2.0, input_curvature=squared_norm)
    """

    path: str
    weight_curvature: Curvature = dataclasses.field(kw_only=True)
    input_curvature: Curvature = dataclasses.field(kw_only=True)
    forward_gain: Curvature = dataclasses.field(default=1.0, kw_only=True)
    output_shape: Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    owns_subtree = True

    def validate(self) -> None:
        _check_path(self.path)
        for name in ("weight_curvature", "input_curvature", "forward_gain"):
            value = getattr(self, name)
            if callable(value):
                continue
            if not isinstance(value, numbers.Real):
                raise ValueError(
                    f"{name} (={value!r}) must be a positive number or a function of "
                    "the block's parameters"
                )
            if not 0 < value <= _LARGEST:  # pyright: ignore
                raise ValueError(f"{name} (={value!r}) must be positive and finite")
            self._canonical(**{name: float(value)})
        if self.output_shape is not None:
            self._canonical(
                output_shape=_checked_shape("output_shape", self.output_shape)
            )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """As declared."""
        del param_shapes
        return input_shape if self.output_shape is None else tuple(self.output_shape)

    def moments_after(self, here: Site) -> Moments:
        return here.moments * self._value(here, "forward_gain")

    def centres(self, centred: bool) -> bool:
        del centred
        return False

    def m_W(self, here: Site, role: str) -> Positive:
        del role  # one number for all the block's parameters
        return self._value(here, "weight_curvature")

    def m_z(self, here: Site) -> Positive:
        return self._value(here, "input_curvature")

    def _value(self, here: Site, name: str) -> Positive:
        declared = getattr(self, name)
        if not callable(declared):
            return number(declared)
        value = declared(here.params)
        if isinstance(value, float):
            value = jnp.float32(value)
        dtype: Any = getattr(value, "dtype", None)
        shape = getattr(value, "shape", None)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            found = kind_of(value) if dtype is None else f"shape {shape} of {dtype}"
            raise ValueError(
                f"spec layer {here.label}: {name} must return a real scalar, but it "
                f"returned {found}"
            )
        return measured(jnp.asarray(value, wide(dtype)))


@dataclasses.dataclass(frozen=True, repr=False)
class Residual(Link):
    """Two chains side by side whose outputs are added: `branch(x) + shortcut(x)`.

    Second moments add, and so do backward factors: the Gauss-Newton part of
    `(I + J)^T (I + J)`, LH (13), with the cross terms left out.

    Args:
      branch: the links of the branch, from input to output.
      shortcut: the links of the shortcut; empty for the identity.

    Raises:
      ValueError: where an entry is not a link, or (at `init`) the two outputs differ in
        shape.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Residual([spec.Dense("Dense_0"), spec.BatchNorm()])
      spec.Residual((spec.Dense('Dense_0'), spec.BatchNorm()))
    """

    branch: Sequence[Link]
    shortcut: Sequence[Link] = ()

    def validate(self) -> None:
        self._canonical(
            branch=_checked_links("branch", self.branch),
            shortcut=_checked_links("shortcut", self.shortcut),
        )

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"branch": self.branch, "shortcut": self.shortcut}

    def moments_after(self, here: Site) -> Moments:
        arms = here.arms.values()
        branch, shortcut = (_recursion.forward(arm, here.moments) for arm in arms)
        return branch + shortcut

    def backward_factor(self, here: Site) -> Positive:
        branch, shortcut = (
            _recursion.backward(arm, here.m) for arm in here.arms.values()
        )
        return branch + shortcut


@dataclasses.dataclass(frozen=True, repr=False)
class LayerChain:
    """The chain of links a network consists of, from its input to its output.

    Everything the transformation needs to know beside the parameters. Not callable and
    not a pytree: a plain value, to be passed around, compared, hashed, printed and
    pasted.

    Args:
      layers: the links, input to output.
      input_shape: shape of one input without the batch dimension, channels last, such
        as `(32, 32, 3)`.

    Raises:
      ValueError: where an entry of `layers` is not a link, two links own the same path,
        or `input_shape` is not a sequence of positive ints.

    Examples:
      >>> from backmatch_optax import spec
      >>> mlp = spec.LayerChain(
      ...     [spec.Dense("fc1"), spec.Activation("relu"), spec.Dense("fc2")],
      ...     input_shape=(64,),
      ... )
      >>> mlp
      spec.LayerChain(
          [
              spec.Dense('fc1'),
              spec.Activation('relu'),
              spec.Dense('fc2'),
          ],
          input_shape=(64,),
      )
      >>> eval(repr(mlp)) == mlp
      True
    """

    layers: Sequence[Link]
    input_shape: Sequence[int] = dataclasses.field(kw_only=True)

    def __post_init__(self):
        layers = _checked_links("layers", self.layers)
        object.__setattr__(self, "layers", layers)
        input_shape = _checked_shape("input_shape", self.input_shape)
        object.__setattr__(self, "input_shape", input_shape)
        owners: dict[str, Any] = {}
        for link in _with_paths(layers):
            if link.path in owners:
                raise ValueError(
                    f"LayerChain: two layers declare the path {link.path!r}: "
                    f"{owners[link.path]} and {link}. A module used twice has no scale "
                    "of its own; declare each path once."
                )
            owners[link.path] = link
        for path, link in owners.items():
            for block in owners.values():
                inside = path.startswith(f"{block.path}/") or block.path == ""
                if isinstance(block, Block) and block is not link and inside:
                    raise ValueError(
                        f"LayerChain: {link} lies inside {block}, which owns every "
                        "parameter below its path"
                    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all declared layers with parameters, input to output."""
        return tuple(link.path for link in _with_paths(self.layers))

    def __repr__(self) -> str:
        layers = "".join(f"        {link!r},\n" for link in self.layers)
        listed = f"[\n{layers}    ]" if layers else "[]"
        return (
            f"spec.LayerChain(\n    {listed},\n    input_shape={self.input_shape},\n)"
        )


def kind_of(value: Any) -> str:
    """What a wrong argument is, for an error message; short whatever it holds."""
    if value is None:
        return "None"
    if isinstance(value, str | int | float):
        return f"{value!r}, a {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"a {module}{kind.__qualname__}"


def _with_paths(links: Iterable[Link]) -> Iterator[Any]:
    """The links with parameters, those inside other links too, input to output."""
    for link in links:
        if getattr(link, "path", None) is not None:
            yield link
        for arm in link.arms.values():
            yield from _with_paths(arm)


def _checked_links(name: str, links: Any) -> tuple[Link, ...]:
    if isinstance(links, Link) or not isinstance(links, Iterable):
        raise ValueError(f"{name} must be a sequence of links, but it is {links!r}")
    links = tuple(links)
    for index, link in enumerate(links):
        if not isinstance(link, Link):
            raise ValueError(
                f"{name}[{index}] must be a link such as spec.Dense('Dense_0'), but it "
                f"is {kind_of(link)}"
            )
    return links


def _checked_shape(name: str, shape: Any) -> Shape:
    try:
        return canonical_window(name, shape)
    except ValueError:
        raise ValueError(
            f"{name} (={shape!r}) must be a sequence of positive ints without the "
            "batch dimension and with the features last, such as (32, 32, 3)"
        ) from None


def _check_path(path: Any) -> None:
    if not isinstance(path, str):
        raise ValueError(
            f"path (={path!r}) must be a string such as 'Dense_0' or 'Block_0/Conv_1', "
            f"but it is a {type(path).__name__}"
        )
    if path and "" in path.split("/"):
        raise ValueError(
            f"path (={path!r}) must be names joined by single slashes, such as "
            "'Block_0/Conv_1', without one at either end"
        )


def _check_conv_kernel(kernel: Shape, input_shape: Shape) -> None:
    if len(kernel) < 3:
        raise ValueError(
            "expects a kernel of shape (*window, in / groups, out), but it has shape "
            f"{kernel}"
        )
    if len(kernel) != len(input_shape) + 1:
        raise ValueError(
            f"has a kernel of shape {kernel}, with {len(kernel) - 2} spatial "
            f"dimensions, but its input has {len(input_shape) - 1}"
        )


def _check_features(role: str, shape: Shape, expected: int, input_shape: Shape) -> None:
    if input_shape[-1] != expected:
        raise ValueError(
            f"its {role} of shape {shape} takes {expected} input features, but its "
            f"input has {input_shape[-1]}"
        )


def _check_vector(role: str, param_shapes: Mapping[str, Shape], features: int) -> None:
    shape = param_shapes.get(role)
    if shape is not None and shape != (features,):
        raise ValueError(f"its {role} has shape {shape}, but expected ({features},)")
