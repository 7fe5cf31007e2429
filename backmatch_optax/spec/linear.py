"""Linear layers: dense layers and convolutions (BM (32) to (35))."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive, number
from backmatch_optax.spec.link import Link, Shape, Site, check_path, check_vector
from backmatch_optax.spec.windows import (
    SIZE_KEEPING,
    Padding,
    PerDimension,
    Windowed,
    canonical_counts,
    canonical_padding,
    output_sizes,
    taps_inside,
    transposed_padding,
    transposed_sizes,
)


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
        check_path(self.path)

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
        check_vector("bias", param_shapes, kernel[-1])
        return (*input_shape[:-1], kernel[-1])


@dataclasses.dataclass(frozen=True, repr=False)
class Conv(Windowed, _Linear):
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
        check_path(self.path)
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
        check_vector("bias", param_shapes, kernel[-1])
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
class ConvTranspose(Windowed, _Linear):
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
        check_path(self.path)
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
        check_vector("bias", param_shapes, kernel[-1])
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
