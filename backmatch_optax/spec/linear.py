"""Linear layers: dense layers and convolutions (BM (32) to (35))."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from backmatch_optax.moments import Moments
from backmatch_optax.numerics import checked_count
from backmatch_optax.powers import Positive
from backmatch_optax.spec.link import Link, Shape, Site, check_path, check_vector
from backmatch_optax.spec.windows import (
    Padding,
    PerDimension,
    Window,
    Windowed,
    checked_counts,
    extents,
    per_dimension,
)


@dataclasses.dataclass(frozen=True, repr=False)
class _Linear(Link):
    """What all linear layers share: kernel and bias, applied at every position."""

    path: str

    roles = ("kernel", "bias")
    required_roles = ("kernel",)

    def validate(self) -> None:
        check_path(self.path)

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
            return here.added(here.positions_out)
        return here.met(self.seen(here), self.uses(here), here.unit_inputs)

    def aligned_below(self, here: Site) -> Positive | None:
        # What goes with an output is a part of what each of its inputs is handed.
        return here.aligned and here.aligned * (1.0 / here.unit_inputs)

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
        as `"Dense_0"` or `"Head_0/Dense_1"`; `""` for the top of the tree. Or the path
        of the kernel itself, whatever its name; see `Bias` for one with another name.

    Raises:
      ValueError: where `path` is not a string of names joined by single slashes.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Dense("fc1")
      spec.Dense('fc1')
    """

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """The input's, with the kernel's output features."""
        kernel = param_shapes["kernel"]
        if len(kernel) != 2:
            raise ValueError(
                f"expects a kernel of shape (in, out), but it has shape {kernel}"
            )
        _check_features(param_shapes, input_shape)
        return (*input_shape[:-1], kernel[-1])


@dataclasses.dataclass(frozen=True, repr=False)
class _Convolution(Windowed, _Linear):
    """What convolutions share: a kernel `(*window, in / groups, out)`."""

    padding: Padding = dataclasses.field(default="SAME", kw_only=True)
    kernel_dilation: PerDimension = dataclasses.field(default=1, kw_only=True)

    def validate(self) -> None:
        _Linear.validate(self)
        Windowed.validate(self)
        dilation = checked_counts("kernel_dilation", self.kernel_dilation)
        self._canonical(kernel_dilation=dilation)

    @property
    def groups(self) -> int:
        """How many groups the input features are split into."""
        return 1

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """Positions by Flax's padding rules, the kernel's output features."""
        kernel, sizes = param_shapes["kernel"], input_shape[:-1]
        if not len(kernel) == len(sizes) + 2 >= 3:
            raise ValueError(
                "expects a kernel of shape (*window, in / groups, out) and an input "
                f"of as many spatial dimensions, but the kernel has shape {kernel}"
            )
        _check_features(param_shapes, input_shape, self.groups)
        window = self.window(sizes, kernel[:-2], self.kernel_dilation)
        return (*window.output_sizes(), kernel[-1])


@dataclasses.dataclass(frozen=True, repr=False)
class Conv(_Convolution):
    """A convolution over 1, 2 or 3 dimensions, `flax.linen.Conv` or `flax.nnx.Conv`.

    Its kernel's shape is read from the parameters. Padded positions count like others,
    as in the papers; without padding (or with circular padding) every rule is exact for
    kernels of independent entries.

    Args:
      path: where the layer's `kernel` and optional `bias` lie in the parameters, or
        the path of the kernel itself.
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
      spec.Conv('Conv_0', strides=(2, 2), padding=((1, 1), (1, 1)))
    """

    strides: PerDimension = dataclasses.field(default=1, kw_only=True)
    feature_group_count: int = dataclasses.field(default=1, kw_only=True)

    paddings = ("VALID", "SAME", "SAME_LOWER", "CIRCULAR", "REFLECT", "CAUSAL")

    def validate(self) -> None:
        super().validate()
        groups = checked_count("feature_group_count", self.feature_group_count)
        self._canonical(feature_group_count=groups)

    @property
    def groups(self) -> int:
        return self.feature_group_count

    def common_below(self, here: Site) -> Positive | None:
        # With strides, positions next to one another meet different taps.
        if here.common is None or here.positions_out >= here.positions_in:
            return here.common
        return here.common * (here.positions_out / here.positions_in)

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
        taps = here.params["kernel"].shape[:-2]
        window = self.window(here.input_shape[:-1], taps, self.kernel_dilation)
        return window.inside(here.output_shape[:-1])


@dataclasses.dataclass(frozen=True, repr=False)
class ConvTranspose(_Convolution):
    """A transposed convolution, `flax.linen.ConvTranspose` or `flax.nnx.ConvTranspose`.

    Args:
      path: where the layer's `kernel`, of shape `(*window, in, out)`, and optional
        `bias` lie in the parameters, or the path of the kernel itself.
      strides: an int for all dimensions, or one for each; None is 1, as in Flax.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"`, an int, or an int or a (low, high)
        pair for each dimension.
      kernel_dilation: an int for all dimensions, or one for each.

    Raises:
      ValueError: where an argument is none of these.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.ConvTranspose("ConvTranspose_0", strides=(2, 2))
      spec.ConvTranspose('ConvTranspose_0', strides=(2, 2))
    """

    paddings = ("VALID", "SAME", "CIRCULAR")

    def window(self, sizes: Shape, taps: Shape, dilation: PerDimension = 1) -> Window:
        """That of a convolution of the input with zeros between its positions."""
        rank = len(sizes)
        strides = per_dimension("strides", self.strides or 1, rank)
        steps = per_dimension("kernel_dilation", dilation, rank)
        pads = []
        for extent, stride in zip(extents(taps, steps), strides, strict=True):
            # As `jax.lax.conv_transpose` pads; CIRCULAR puts out what SAME does.
            total, low = extent + stride - 2, extent - 1
            if self.padding == "VALID":
                total += max(extent - stride, 0)
            elif stride < extent:
                low = -(-total // 2)
            pads.append((low, total - low))
        if not isinstance(self.padding, str):
            pads = self.pairs(rank)
        spread = [
            (n - 1) * stride + 1 for n, stride in zip(sizes, strides, strict=True)
        ]
        return Window(tuple(spread), taps, (1,) * rank, steps, pads)

    def uses(self, here: Site) -> float:
        """Once for every position of the input, which it spreads over the output."""
        if isinstance(self.padding, str):
            return here.positions_in
        # Little padding cuts the output off, and with it what some inputs spread: the
        # taps of the convolution that this one is the transpose of fall outside.
        inputs, outputs = here.input_shape[:-1], here.output_shape[:-1]
        taps, rank = here.params["kernel"].shape[:-2], len(inputs)
        steps = per_dimension("kernel_dilation", self.kernel_dilation, rank)
        cut = zip(extents(taps, steps), self.pairs(rank), strict=True)
        pads = [(extent - 1 - low, 0) for extent, (low, _) in cut]
        strides = per_dimension("strides", self.strides or 1, rank)
        return Window(outputs, taps, strides, steps, pads).inside(inputs)[0]


def _check_features(
    param_shapes: Mapping[str, Shape], input_shape: Shape, groups: int = 1
) -> None:
    """Raises `ValueError` where a kernel fits neither its input nor its bias."""
    kernel = param_shapes["kernel"]
    if input_shape[-1] != kernel[-2] * groups:
        raise ValueError(
            f"its kernel of shape {kernel} takes {kernel[-2] * groups} input features, "
            f"but its input has {input_shape[-1]}"
        )
    if kernel[-1] % groups:
        raise ValueError(
            f"feature_group_count (={groups}) must divide the {kernel[-1]} output "
            f"features of its kernel of shape {kernel}"
        )
    check_vector("bias", param_shapes, kernel[-1])
