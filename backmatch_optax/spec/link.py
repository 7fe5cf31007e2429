"""A link of the chain, and the place where its rules are asked: `Link`, `Site`."""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from backmatch_optax.moments import Moments
from backmatch_optax.numerics import wide
from backmatch_optax.powers import Positive, measured, number

Shape = tuple[int, ...]
_Known = TypeVar("_Known")

# Of values of shape (units, values of a unit), which it changes one by one.
Elementwise = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(eq=False)
class Site:
    """A link between its input and its output, with the parameters it owns.

    Shapes carry no batch dimension; the last axis holds the features, all others are
    positions. The recursion's two passes write `moments` of the incoming
    signal, `moments_out` of the outgoing one, and `n = m * q` at the output.
    """

    link: Link
    label: str  # how error messages and tables call it
    input_shape: Shape
    output_shape: Shape
    params: Mapping[str, Any]  # by role, "kernel"; a Block's are nested dicts
    arms: Mapping[str, list[Site]]  # of a link that holds chains itself
    stacked: Shape = ()  # axes before the parameters' own, one for each Repeat around
    is_array: bool = False  # whether the link's path is that of its one parameter
    mean_field: bool = False  # exact Gaussian gains instead of the papers'
    norm_floor: jax.typing.ArrayLike = 0.0  # the least a norm counts as below a line
    centred: bool = False  # whether cotangents at the output have mean zero
    balanced: bool = False  # whether what positions have in common of them has
    divided: bool = False  # whether all that follows divides each feature by its size
    moments: Moments = dataclasses.field(default_factory=lambda: Moments(number(1.0)))
    arm_moments: Sequence[Moments] = ()  # at the outputs of the arms
    m_z_of_arms: Positive | None = None  # of related arms, cross terms included
    moments_out: Moments = dataclasses.field(
        default_factory=lambda: Moments(number(1.0))
    )
    n: Positive = dataclasses.field(default_factory=lambda: number(1.0))
    # The share of `m` that all positions have in common, at output and input: the same
    # cotangent everywhere, as below a mean over positions. None is zero.
    common: Positive | None = None
    common_below: Positive | None = None
    # The squared correlation of cotangent and signal at the output, over the positions
    # of one input: what an activation hands down is largest where the signal is
    # positive. None is zero.
    aligned: Positive | None = None
    aligned_below: Positive | None = None
    # All uses, of parameters that are used more than once.
    uses: list[Site] = dataclasses.field(default_factory=list)
    # By role: sums of squares that are known from elsewhere.
    squares: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    # By role, of stacked parameters: the logs of the scales of all layers.
    log_scales: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    memory: Site | None = None  # of a Recall: what it recalls
    recalled: list[Site] = dataclasses.field(default_factory=list)  # of a Memory: where
    climbed: Any = None  # of a Repeat: what the walk up leaves for the walk down
    _known: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def q(self) -> Positive:
        """The second moment of the incoming signal."""
        return self.moments.q

    @property
    def m(self) -> Positive:
        """The backward factor at the output."""
        return self.n / self.moments_out.q

    def met(self, moments: Moments, times: float, units: int) -> Positive:
        """The mean square of `sum_p g_p x_p` for cotangents `g` of mean square 1.

        Terms are unrelated, but for what all positions have in common in both, and what
        goes with the signal: it adds up, so that its square is `times` as large. Where
        cotangents have mean zero over the batch, they meet nothing of what inputs have
        in common.

        Args:
          moments: those of `x`.
          times: the number of terms.
          units: how many of `x` a unit of the output is made of. Each has so small a
            share of what goes with it.
        """
        if self.centred:
            met = self._added_up(moments.variance, moments.along, times)
        else:
            met = self._added_up(moments.q, moments.common, times)
        if self.aligned is None or times <= 1:
            return met
        return met + self.aligned * moments.variance * (times * (times - 1.0) / units)

    def added(self, times: float) -> Positive:
        """The mean square of `sum_p g_p`, as in `met`."""
        return self._added_up(number(1.0), number(1.0), times)

    def _added_up(
        self, seen: Positive, together: Positive | None, times: float
    ) -> Positive:
        if self.common is None or together is None or times <= 1:
            return times * seen
        return times * (seen + self.common * together * (times - 1.0))

    @property
    def fan_in(self) -> int:
        """Features of the input; kernel taps do not count (BM: rows of W_col)."""
        return self.input_shape[-1]

    @property
    def fan_out(self) -> int:
        """Features of the output (BM: rows of W_row)."""
        return self.output_shape[-1]

    @property
    def unit_inputs(self) -> int:
        """Inputs that a unit of a kernel's output is made of, kernel taps included."""
        return self.params["kernel"].size // self.fan_out

    @property
    def positions_in(self) -> int:
        """Positions of the input."""
        return math.prod(self.input_shape[:-1])

    @property
    def positions_out(self) -> int:
        """Positions of the output."""
        return math.prod(self.output_shape[:-1])

    @property
    def size_in(self) -> int:
        """Coordinates of the input."""
        return math.prod(self.input_shape)

    @property
    def size_out(self) -> int:
        """Coordinates of the output."""
        return math.prod(self.output_shape)

    @property
    def arm_shapes(self) -> list[Shape]:
        """Shapes of what the arms put out."""
        arms = self.arms.values()
        return [arm[-1].output_shape if arm else self.input_shape for arm in arms]

    def squared_row_norm(self, role: str) -> Positive:
        """BM's `||W||^2_{2,mu}`: the mean over output features of `||w||^2`.

        Flax keeps the output features on the last axis of every parameter, so for a
        BatchNorm's scale or bias this is its mean square.
        """
        leaf, floor = self.params[role], self.norm_floor
        count = leaf.shape[-1] if leaf.ndim else 1
        return self.once(
            role, lambda: measured(self._squares(role), count=count, floor=floor)
        )

    def _squares(self, role: str) -> jax.Array:
        known = self.squares.get(role)
        return _sum_of_squares(self.params[role]) if known is None else known

    def once(self, name: str, compute: Callable[[], _Known]) -> _Known:
        """Measured numbers of this site, the same atoms every time: they can cancel.

        Args:
          name: what they are called, other than the site's parameters.
          compute: makes them, at the first call.
        """
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]


def every(sites: Sequence[Site]) -> Iterator[Site]:
    """The sites and those inside them, input to output."""
    for site in sites:
        yield site
        for arm in site.arms.values():
            yield from every(arm)


def scaled_roles(sites: Sequence[Site]) -> Iterator[tuple[Site, str]]:
    """Site and role of all that has a scale; a Block is one, with the role ""."""
    for site in every(sites):
        if site.params and site.link.owns_subtree:
            yield site, ""
        else:
            yield from ((site, role) for role in site.params)


@jax.jit  # traced once for every shape
def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    # At least float32: squares overflow float16 from 256 on. One plain reduction over
    # all axes: a reshape would gather, or refuse, a sharded kernel.
    return jnp.sum(jnp.square(leaf.astype(wide(leaf.dtype))))


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
      ... class Gamma(spec.Link):  # multiplies every feature by a learned number
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
      >>> links = [Gamma("scale"), spec.Dense("fc")]
      >>> chain = spec.LayerChain(links, input_shape=(4,))
      >>> gamma, kernel = jnp.full(4, 2.0), jnp.ones((4, 8))
      >>> params = {"scale": {"gamma": gamma}, "fc": {"kernel": kernel}}
      >>> scales = bmo.layer_scales(chain, params, normalize=False)
      >>> for path, scale in scales.items():
      ...     print(path, scale.round(4))
      scale 0.125
      fc 0.25
    """

    # The parameters it owns, by the names Flax gives them: the first decides the
    # layer's own scale. Those in `required_roles` must be there. Where the link's path
    # is that of an array, this is the first of them, whatever its name.
    roles: ClassVar[tuple[str, ...]] = ()
    required_roles: ClassVar[tuple[str, ...]] = ()
    owns_subtree: ClassVar[bool] = False  # every parameter below its path instead
    # Of a link with arms: whether its output is all that they put out, added or side by
    # side, so that size times second moment is the sum of theirs.
    adds_arms: ClassVar[bool] = False
    declares_arms: ClassVar[bool] = True  # or others declare what they own
    begins: ClassVar[bool] = False  # takes an input of its own, not what lies below
    featurewise: ClassVar[bool] = False  # acts on every feature by itself
    # Whether it divides every feature by its own size, as a BatchNorm does. What lies
    # below is then divided too, as far down as links are `featurewise`.
    divides: ClassVar[bool] = False
    # Why scales may be far off, for `describe`; the second with the papers' gains,
    # where a mean over positions comes later.
    approximate: ClassVar[str] = ""
    approximate_below_a_mean: ClassVar[str] = ""
    approximate_in_depth: ClassVar[str] = ""  # where more than three follow each other

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

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the output, from those of the arms; for a link that has arms."""
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{arm} {shape}" for arm, shape in shapes.items())
            raise ValueError(f"its arms must end in one shape, but: {listed}")
        return next(iter(shapes.values()))

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

    def m_arm(self, here: Site, arm: int) -> Positive:
        """Arm curvature: the mean diagonal of `J^T J` for what an arm puts out."""
        del here, arm
        return number(1.0)

    def common_below(self, here: Site) -> Positive | None:
        """The share of `m` at its input that all positions have in common.

        What it is at the output, `here.common`, where the link does the same to all
        positions. Not asked of a link with arms.
        """
        return here.common

    def arm_common(self, here: Site, arm: int) -> Positive | None:
        """The same at the output of an arm."""
        del arm
        return here.common

    def aligned_below(self, here: Site) -> Positive | None:
        """The squared correlation of cotangent and signal at its input.

        Over the positions of one input. None is zero, as where units are mixed;
        `here.aligned` where each is shifted or multiplied.
        """
        del here
        return None

    def arm_aligned(self, here: Site, arm: int) -> Positive | None:
        """The same at the output of an arm."""
        del here, arm
        return None

    def centres(self, here: Site) -> bool:
        """Whether what it hands back has mean zero over the batch, for every unit.

        True of a BatchNorm; a linear link keeps what it gets, `here.centred`, which is
        the default.
        """
        return here.centred

    def takes_away_norm(self, has_bias: bool) -> bool:
        """Whether its output does not depend on the norm of the kernel right before it.

        True of normalisations (`epsilon` left aside); `has_bias` says whether a bias is
        added to what that kernel puts out.
        """
        del has_bias
        return False

    def why_approximate(self, here: Site) -> str:
        """Why scales may be far off at this place, for `describe`; empty if not."""
        del here
        return self.approximate

    def elementwise(self, here: Site) -> Elementwise | None:
        """The link as a function of each value; None for what mixes coordinates.

        It tells what arms without kernels have in common (see `crossterms`).
        """
        del here
        return None

    def __repr__(self) -> str:
        arguments = []
        for field in sorted(dataclasses.fields(self), key=lambda f: bool(f.kw_only)):
            value = getattr(self, field.name)
            if type(value) is type(field.default) and value == field.default:
                continue
            text = getattr(value, "__qualname__", None) or repr(value)
            arguments.append(f"{field.name}={text}" if field.kw_only else text)
        name = type(self).__name__
        ours = type(self).__module__.startswith("backmatch_optax.spec.")
        module = "spec." if ours else ""
        return f"{module}{name}({', '.join(arguments)})"

    def _canonical_number(
        self, name: str, wanted: str, fits: Callable[[float], bool]
    ) -> None:
        """Checks an argument that is a number, and keeps it as a float."""
        number = checked_number(name, getattr(self, name), wanted, fits)
        self._canonical(**{name: number})

    def _canonical(self, **fields: Any) -> None:
        """Writes normalised arguments into the frozen dataclass."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)


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


def with_paths(links: Iterable[Link], declared: bool = True) -> Iterator[Any]:
    """The links with parameters, those inside other links too, input to output.

    Those that declare them, or else those that use what another declares.
    """
    for link in links:
        if declared and own_path(link) is not None:
            yield link
        for arm in link.arms.values():
            if link.declares_arms:
                yield from with_paths(arm, declared)
            elif not declared:
                yield from with_paths(arm)


def inside(links: Iterable[Link]) -> Iterator[Link]:
    """The links and those inside them, input to output."""
    for link in links:
        yield link
        for arm in link.arms.values():
            yield from inside(arm)


def own_path(link: Link) -> str | None:
    """Where a link's parameters lie; those of a link with arms are its arms' own."""
    return None if link.arms else getattr(link, "path", None)


def checked_links(name: str, links: Any) -> tuple[Link, ...]:
    """The links of a sequence as a tuple, or `ValueError`."""
    if isinstance(links, Link) or not isinstance(links, Iterable):
        raise ValueError(f"{name} must be a sequence of links, but it is {links!r}")
    for index, link in enumerate(links := tuple(links)):
        if not isinstance(link, Link):
            raise ValueError(
                f"{name}[{index}] must be a link such as spec.Dense('Dense_0'), but it "
                f"is {kind_of(link)}"
            )
    return links


def check_path(path: Any) -> None:
    """Raises `ValueError` where a path is not names joined by single slashes."""
    if not isinstance(path, str) or (path and "" in path.split("/")):
        raise ValueError(
            f"path (={path!r}) must be a string of names joined by single slashes, "
            "such as 'Dense_0' or 'Block_0/Conv_1'"
        )


def checked_number(
    name: str, value: Any, wanted: str, fits: Callable[[float], bool]
) -> float:
    """A real number that fits as a float, or `ValueError`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # of an int
        number = math.inf
    if not fits(number):
        raise ValueError(f"{name} (={reprlib.repr(value)}) must be {wanted}")
    return number


def check_vector(role: str, param_shapes: Mapping[str, Shape], features: int) -> None:
    """Raises `ValueError` where a parameter has no entry for each feature."""
    shape = param_shapes.get(role)
    if shape is not None and shape != (features,):
        raise ValueError(f"its {role} has shape {shape}, but expected ({features},)")
