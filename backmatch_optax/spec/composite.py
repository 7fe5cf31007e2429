"""Links made of others, and blocks of any kind."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from backmatch_optax.activations import straight
from backmatch_optax.moments import Moments, beside
from backmatch_optax.numerics import wide
from backmatch_optax.powers import Positive, measured, number
from backmatch_optax.spec import crossterms
from backmatch_optax.spec.elementwise import Activation
from backmatch_optax.spec.link import (
    Elementwise,
    Link,
    Shape,
    Site,
    check_path,
    checked_links,
    kind_of,
)
from backmatch_optax.spec.windows import checked_shape

_LARGEST = sys.float_info.max

# A Block's curvature: a number, or a function of the block's parameters.
Curvature = float | Callable[[Mapping[str, Any]], jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True, repr=False)
class Block(Link):
    """A block of any kind, with the two scalars of LH Algorithm 2 given by the user.

    Every parameter below `path` is scaled by `1 / (m * weight_curvature)`, and the
    backward factor `m` is multiplied by `input_curvature`, LH (22) and (23).

    Args:
      path: where the block's parameters lie; None for a block without any.
      weight_curvature: `m_W`, the mean diagonal of `J^T J` with respect to the block's
        parameters: a positive number, or a function of the block's parameters (nested
        dicts of arrays) that returns a positive scalar. None leaves it to `infer_spec`,
        which measures it.
      input_curvature: `m_z`, the same with respect to the block's input.
      forward_gain: by how much the block multiplies the second moment of its signal;
        a number or a function. 1 is right for a block that ends in a normalisation.
      output_shape: shape of the block's output without the batch dimension; None if it
        is the input's.

    Raises:
      ValueError: where a curvature is neither a positive number nor a function; where
        scales are computed, if a function returns something that is not a real scalar,
        or a negative one. Under `jax.jit` a negative number makes scales of NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from backmatch_optax import spec
      >>> def squared_norm(params):
      ...     return jnp.sum(params["kernel"] ** 2)
      >>> spec.Block("mixer", weight_curvature=2.0, input_curvature=squared_norm)
      spec.Block('mixer', weight_curvature=2.0, input_curvature=squared_norm)
    """

    path: str | None
    weight_curvature: Curvature | None = dataclasses.field(default=None, kw_only=True)
    input_curvature: Curvature | None = dataclasses.field(default=None, kw_only=True)
    forward_gain: Curvature = dataclasses.field(default=1.0, kw_only=True)
    output_shape: Sequence[int] | None = dataclasses.field(default=None, kw_only=True)

    approximate = (
        "a block's numbers do not follow the size of its signal; those that infer_spec "
        "measures are for size 1"
    )
    owns_subtree = True

    def validate(self) -> None:
        if self.path is not None:
            check_path(self.path)
        for name in ("weight_curvature", "input_curvature", "forward_gain"):
            value = getattr(self, name)
            if callable(value) or (value is None and name != "forward_gain"):
                continue
            wanted = "a positive, finite number or a function of the block's parameters"
            self._canonical_number(name, wanted, lambda v: 0 < v <= _LARGEST)
        if self.output_shape is not None:
            self._canonical(
                output_shape=checked_shape("output_shape", self.output_shape)
            )

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """As declared."""
        del param_shapes
        for name in ("weight_curvature", "input_curvature")[self.path is None :]:
            if getattr(self, name) is None:
                raise ValueError(
                    f"needs {name}, a positive number; infer_spec measures it for a "
                    "block among its blocks"
                )
        return input_shape if self.output_shape is None else tuple(self.output_shape)

    def moments_after(self, here: Site) -> Moments:
        return here.moments * self._value(here, "forward_gain")

    def centres(self, here: Site) -> bool:
        del here
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
        value = jnp.asarray(value, wide(dtype))
        if not isinstance(value, Tracer) and value < 0:
            raise ValueError(
                f"spec layer {here.label}: {name} must return a positive number, but "
                f"it returned {value}"
            )
        return measured(value)  # traced, below 0 it is NaN


@dataclasses.dataclass(frozen=True, repr=False)
class Residual(Link):
    """Two chains side by side whose outputs are added: `branch(x) + shortcut(x)`.

    Second moments add, and so do backward factors: the Gauss-Newton part of
    `(I + J)^T (I + J)`, LH (12) and (13), with the cross terms left out. With
    mean-field gains they count where both arms are elementwise functions of the same
    input, as in `x + relu(x)`.

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
            branch=checked_links("branch", self.branch),
            shortcut=checked_links("shortcut", self.shortcut),
        )

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"branch": self.branch, "shortcut": self.shortcut}

    adds_arms = featurewise = True

    def elementwise(self, here: Site) -> Elementwise | None:
        return crossterms.elementwise_sum(here)

    def moments_after(self, here: Site) -> Moments:
        together = crossterms.together(here)
        if together:
            here.m_z_of_arms = together.m_z
            return together.moments
        branch, shortcut = here.arm_moments
        return branch + shortcut

    def arm_aligned(self, here: Site, arm: int) -> Positive | None:
        # Of what a sum does, each arm does its share.
        share = here.arm_moments[arm].varying
        if here.aligned is None or share is None:
            return None
        parts = (moments.varying for moments in here.arm_moments)
        whole = functools.reduce(operator.add, (part for part in parts if part))
        return here.aligned * share / whole


@dataclasses.dataclass(frozen=True, repr=False)
class Concatenate(Link):
    """Chains side by side whose outputs are joined along one axis.

    Every coordinate of the output belongs to one branch. So a branch receives the
    backward factor `m` as it is, and the second moment of the whole is the mean over
    all coordinates:

        m_branch = m,    q = sum_i q_i * size_i / sum_i size_i

    Where a BatchNorm follows, as in a DenseNet, it divides every feature by its own
    variance and not by their mean: `m_branch = m * q / q_branch`.

    At the common input the backward factors of the branches add up, as those of a
    `Residual` do.

    Args:
      branches: the chains, each a sequence of links from input to output; an empty one
        passes the input on, as in a DenseNet or in the skip of a U-Net.
      axis: along which, counted from the end: -1 for the features, -2 for the last
        axis of positions.

    Raises:
      ValueError: where there is no branch, an entry is not a link, `axis` is not a
        negative int, or (at `init`) the outputs differ along another axis.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Concatenate([[], [spec.Conv("Conv_0"), spec.Activation("relu")]])
      spec.Concatenate(((), (spec.Conv('Conv_0'), spec.Activation('relu'))))
    """

    branches: Sequence[Sequence[Link]]
    axis: int = dataclasses.field(default=-1, kw_only=True)

    adds_arms = featurewise = True

    def validate(self) -> None:
        self._canonical(branches=checked_chains("branches", self.branches))
        if not isinstance(self.axis, int) or self.axis >= 0:
            raise ValueError(
                f"axis (={self.axis!r}) must be a negative int: -1 for the features, "
                "-2 for the last axis of positions"
            )

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return numbered("branches", self.branches)

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The branches' shape, with their lengths along the axis added up."""
        axis, listed = self.axis, ", ".join(f"{arm} {s}" for arm, s in shapes.items())
        if -axis > min(map(len, shapes.values())):
            raise ValueError(f"its branches have no axis {axis}: {listed}")
        others = {(shape[:axis], shape[axis:][1:]) for shape in shapes.values()}
        if len(others) > 1:
            raise ValueError(
                f"its branches may differ along axis {axis} alone, but: {listed}"
            )
        before, after = others.pop()
        return (*before, sum(shape[axis] for shape in shapes.values()), *after)

    def moments_after(self, here: Site) -> Moments:
        shares = [math.prod(shape) / here.size_out for shape in here.arm_shapes]
        return beside(here.arm_moments, shares, units=self.axis == -1)

    def m_arm(self, here: Site, arm: int) -> Positive:
        if not here.divided or self.axis != -1:
            return number(1.0)
        return here.moments_out.variance / here.arm_moments[arm].variance

    def centres(self, here: Site) -> bool:
        return here.centred and self.axis == -1  # or positions have means of their own


@dataclasses.dataclass(frozen=True, repr=False)
class Gate(Link):
    """Two chains side by side whose outputs are multiplied: `branch(x) * gate(x)`.

    The derivative of `a * b` by `a` is `b`, so the branch's curvature is the second
    moment of the gate, and the other way round:

        m_a = m * q_b,    m_b = m * q_a,    q = q_a * q_b

    The two count as unrelated, as the outputs of two random kernels are. That does not
    hold for a function of one signal such as `x * sigmoid(x)`: it is an `Activation`.
    A gate with fewer axes, or with axes of length 1, is repeated as in NumPy; its
    curvature is the sum over all its uses. Below a mean over positions all uses get the
    same signal back, and what the branch has in common at all positions adds up.

    Args:
      branch: the links of what is multiplied, from input to output; empty for the
        input itself.
      gate: the links of what it is multiplied by, from input to output.

    Raises:
      ValueError: where an entry is not a link, or (at `init`) the gate's output cannot
        be repeated to the shape of the branch's.

    Examples:
      >>> from backmatch_optax import spec
      >>> squeeze_excite = spec.Gate(
      ...     [],
      ...     [
      ...         spec.GlobalAvgPool(),
      ...         spec.Dense("reduce"),
      ...         spec.Activation("relu"),
      ...         spec.Dense("expand"),
      ...         spec.Activation("sigmoid"),
      ...     ],
      ... )
      >>> spec.Gate([spec.Dense("up")], [spec.Dense("gate"), spec.Activation("silu")])
      spec.Gate((spec.Dense('up'),), (spec.Dense('gate'), spec.Activation('silu')))
    """

    branch: Sequence[Link]
    gate: Sequence[Link]

    def validate(self) -> None:
        self._canonical(
            branch=checked_links("branch", self.branch),
            gate=checked_links("gate", self.gate),
        )

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return {"branch": self.branch, "gate": self.gate}

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The branch's."""
        branch, gate = shapes["branch"], shapes["gate"]
        aligned = zip(reversed(gate), reversed(branch), strict=False)
        if len(gate) > len(branch) or any(g not in (1, b) for g, b in aligned):
            raise ValueError(
                f"its gate of shape {gate} cannot be repeated to its branch's {branch}"
            )
        return branch

    def moments_after(self, here: Site) -> Moments:
        branch, gate = here.arm_moments
        if math.prod(here.arm_shapes[1][:-1]) == 1:
            gate = dataclasses.replace(gate, along=gate.variance)
        product = branch.times(gate)
        inputs = self._seen_twice(here)
        if not here.mean_field or not inputs:
            return product
        return product.with_spread(straight(branch) * straight(gate) / inputs)

    def _seen_twice(self, here: Site) -> int:
        """How many inputs both kernels of a gated layer see; 0 where it is none.

        The two values of a unit are correlated, by the root of one over that number, so
        that their product has a mean, and each is a part of what the other is handed.
        """
        first, second = map(_one_kernel, here.arms.values())
        return first if first == second else 0

    def m_arm(self, here: Site, arm: int) -> Positive:
        shape = here.arm_shapes[arm]
        times = here.positions_out / math.prod(shape[:-1])
        other, uses = here.arm_moments[1 - arm], here.size_out / math.prod(shape)
        if times == 1:
            return other.q * uses
        # What a mean of the other hands on is centred as cotangents are. Kernels do not
        # see it where pooled signals are nearly the same for all inputs.
        return here.met(other, times, 1) * (uses / times)

    def arm_common(self, here: Site, arm: int) -> Positive | None:
        other = here.arm_moments[1 - arm]
        repeated = here.arm_shapes[1 - arm] != here.arm_shapes[arm]
        if here.common is None or repeated:
            return here.common
        return None if other.common is None else here.common * other.common / other.q

    def arm_aligned(self, here: Site, arm: int) -> Positive | None:
        # A factor that is the same at all positions changes no correlation.
        if math.prod(here.arm_shapes[1 - arm][:-1]) == 1:
            return here.aligned
        if here.common is None or not self._seen_twice(here):
            return None
        other = here.arm_moments[1 - arm]
        return here.common * straight(other) / other.q

    def centres(self, here: Site) -> bool:
        del here
        return False  # what an arm is handed was multiplied by the other


@dataclasses.dataclass(frozen=True, repr=False)
class Outputs(Link):
    """The end of a model with several outputs: a chain for each of them.

    The loss is the sum of `weight * loss` over the outputs. A weight multiplies its
    loss's second derivative, and so the backward factor that the recursion starts with:

        m_branch = weight

    An output in the middle, such as an auxiliary head, is one branch, and all that
    follows it is the other.

    Args:
      branches: the chains, each a sequence of links that ends in one output.
      weights: that of each output's loss; None for 1 each.

    Raises:
      ValueError: where there is no branch, an entry is not a link, or `weights` are not
        as many positive numbers; or (in `LayerChain`) a link follows.

    Examples:
      >>> from backmatch_optax import spec
      >>> spec.Outputs([[spec.Dense("pi")], [spec.Dense("v")]], weights=(1, 2))
      spec.Outputs(((spec.Dense('pi'),), (spec.Dense('v'),)), weights=(1.0, 2.0))
    """

    branches: Sequence[Sequence[Link]]
    weights: Sequence[float] | None = dataclasses.field(default=None, kw_only=True)

    def validate(self) -> None:
        self._canonical(branches=checked_chains("branches", self.branches))
        if self.weights is None:
            return
        try:
            weights = tuple(map(float, self.weights))
        except (TypeError, ValueError):
            weights = ()
        fits = len(weights) == len(self.branches)
        if not fits or not all(0.0 < weight <= _LARGEST for weight in weights):
            raise ValueError(
                f"weights (={self.weights!r}) must be {len(self.branches)} positive "
                "numbers, one for each branch"
            )
        self._canonical(weights=weights)

    @property
    def arms(self) -> Mapping[str, Sequence[Link]]:
        return numbered("branches", self.branches)

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """All outputs as one axis."""
        return (sum(map(math.prod, shapes.values())),)

    def moments_after(self, here: Site) -> Moments:
        shares = [math.prod(shape) / here.size_out for shape in here.arm_shapes]
        return beside(here.arm_moments, shares, units=True)

    def m_arm(self, here: Site, arm: int) -> Positive:
        return number(1.0 if self.weights is None else self.weights[arm])


def _one_kernel(arm: Sequence[Site]) -> int:
    """How many inputs a unit has, of an arm that is a kernel and maybe an activation.

    Of any other arm 0.
    """
    if not arm or "kernel" not in arm[0].params:
        return 0
    if not all(isinstance(site.link, Activation) for site in arm[1:]):
        return 0
    return arm[0].unit_inputs


@dataclasses.dataclass(frozen=True, repr=False)
class Beginning(Link):
    """The first link of an arm, with a signal of its own for what lies below."""

    shape: Sequence[int]

    begins = True

    def validate(self) -> None:
        if self.shape != ():
            self._canonical(shape=checked_shape("shape", self.shape))

    def shape_after(
        self, input_shape: Shape, param_shapes: Mapping[str, Shape]
    ) -> Shape:
        """As declared."""
        del input_shape, param_shapes
        return tuple(self.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Input(Beginning):
    """Another input of the model, in the place of what lies below.

    The first link of an arm: a second tower, or what a decoder attends to. The input
    counts as whitened, `q = 1`, and nothing is handed on.

    Args:
      shape: of one input without the batch dimension; `()` for a label, one integer for
        each example.
      common: the share of its second moment that is the same at all positions of all
        inputs. Sines and cosines for positions have one, as some hardly change. Only
        mean-field gains count it.

    Raises:
      ValueError: where `shape` is not a sequence of positive ints, or `common` is not
        at least 0 and below 1; or (in `LayerChain`) it is not the first link of an arm,
        or all arms beside it have an `Input` too.

    Examples:
      >>> from backmatch_optax import spec
      >>> two_towers = spec.Concatenate(
      ...     [[spec.Dense("image")], [spec.Input((16,)), spec.Dense("text")]]
      ... )
      >>> two_towers.branches[1][0]
      spec.Input((16,))
    """

    common: float = dataclasses.field(default=0.0, kw_only=True)

    def validate(self) -> None:
        super().validate()
        wanted = "a number of at least 0 and below 1"
        self._canonical_number("common", wanted, lambda n: 0.0 <= n < 1.0)

    def moments_after(self, here: Site) -> Moments:
        if not here.mean_field or not self.common:
            return Moments(number(1.0))
        return Moments(number(1.0 - self.common), number(self.common))


def checked_chains(name: str, chains: Any) -> tuple[tuple[Link, ...], ...]:
    """The links of several chains, or `ValueError`."""
    if not isinstance(chains, Sequence) or not chains:
        raise ValueError(f"{name} must be a sequence of chains, but it is {chains!r}")
    return tuple(
        checked_links(f"{name}[{index}]", chain) for index, chain in enumerate(chains)
    )


def numbered(name: str, chains: Sequence[Sequence[Link]]) -> dict[str, Sequence[Link]]:
    """Chains as arms, by their place."""
    return {f"{name}[{index}]": chain for index, chain in enumerate(chains)}
