"""Finding a declared layer's parameters in whatever tree the caller keeps them in.

Parameters arrive as nested dicts (Linen), as FrozenDicts, as bare arrays below an
`nnx.State` or as `nnx.Variable` and `nn.Partitioned` boxes, which add a last key
`value`. One rule serves them all: the declared path and role, `"fc1"` and `"kernel"`,
are the beginning of the leaf's key path, with exactly one array below.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, KeyPath, keystr

from backmatch_optax import spec as _spec
from backmatch_optax.spec.link import Shape, Site, every, kind_of, own_path

Unlisted = Literal["error", "identity"]

_SHOWN = 12  # paths listed in an error message


def text(key_path: KeyPath) -> str:
    """A key path as `"Block_0/Conv_1/kernel"`, without the `value` of a box."""
    if key_path and key_path[-1] == GetAttrKey("value"):
        key_path = key_path[:-1]
    return keystr(key_path, simple=True, separator="/")


def join(path: str, role: str) -> str:
    """The path of a parameter.

    The layer's own path may be the top of the tree, "", and the role too, where the
    path is the parameter's own.
    """
    return "/".join(filter(None, (path, role)))


def places(link: Any, is_array: bool) -> dict[str, str]:
    """Where a link's parameters lie, by role; one alone if its path is an array's."""
    if is_array:
        return {link.roles[0]: link.path}
    return {role: join(link.path, role) for role in link.roles}


def listed(paths: Iterable[str]) -> str:
    """Paths for an error message, cut where there are too many."""
    paths = list(paths)
    shown = ", ".join(map(repr, paths[:_SHOWN])) or "none"
    more = len(paths) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def is_masked(node: Any) -> bool:
    """Whether a leaf or module is hidden by `optax.masked` or `optax.partition`."""
    return isinstance(node, optax.MaskedNode)


def is_leafless(tree: Any) -> bool:
    """Whether a tree holds nothing, as the one that `optax.tree.map_params` passes.

    A masked layer is no leaf either, but has to be refused, so it counts.
    """
    return not jax.tree.leaves(tree, is_leaf=is_masked)


def refuse_parts(tree: Any, declared: Sequence[str] = ("",)) -> None:
    """Raises `ValueError` where an array below a declared path differs between devices.

    Outside of `shard_map` an array is whole, wherever its parts lie. Inside it a part
    looks like any array, and its norm and features would silently be taken for those of
    the whole. Its type tells, unless `shard_map` was told not to check.
    """
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):
            continue
        axes = jax.typeof(leaf).manual_axis_type.varying
        if not axes:
            continue
        path = text(key_path)
        modules = itertools.accumulate(path.split("/"), join, initial="")
        if any(module in declared for module in modules):
            raise ValueError(
                f"{path!r} differs between devices along {listed(sorted(axes))} inside "
                "jax.shard_map, but norms need whole kernels, not one device's part of "
                "them. Return the gradients from shard_map and call update outside, "
                "under jax.jit: it takes sharded arrays as they are. Where every "
                "device trains a whole model of its own, pass check_vma=False to "
                "shard_map."
            )


def masked_text(path: str) -> str:
    """What to do about a masked parameter."""
    return (
        f"{path!r} is masked, but the scales depend on all layers: scale outside and "
        "mask or freeze inside, "
        "optax.chain(scale_by_backmatch(spec), optax.masked(...))"
    )


class ParamPaths:
    """The parameters of a tree by path text."""

    def __init__(self, params: optax.Params, declared: Iterable[str] = ()):
        self.leaves: dict[str, Any] = {}
        self._keys: dict[str, KeyPath] = {}
        self._below: dict[str, list[str]] = {}
        self.unclaimed: dict[str, None] = {}  # in order
        self.declared = frozenset(declared)
        self.first_uses: dict[str, Site] = {}  # of a declared path
        entries = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_masked)[0]
        for key_path, leaf in entries:
            path = text(key_path)
            if path in self.leaves:
                raise ValueError(f"two parameters have the path {path!r}")
            self.leaves[path], self._keys[path] = leaf, key_path
            self.unclaimed[path] = None
            modules = path.split("/") if path else ()
            for module in itertools.accumulate(modules, join, initial=""):
                self._below.setdefault(module, []).append(path)

    def below(self, path: str) -> Sequence[str]:
        """The paths of all leaves that a path is the beginning of."""
        return self._below.get(path, [])

    def claim(self, path: str) -> Any | None:
        """The one array at or below a path, or None where there is nothing.

        Raises:
          ValueError: where it is masked or no real floating array, or there are several
            below.
        """
        found = self.below(path)
        if not found:
            # A mask for a whole module leaves one masked node in its place.
            for module in itertools.accumulate(path.split("/"), join, initial=""):
                if is_masked(self.leaves.get(module)):
                    raise ValueError(masked_text(module))
            return None
        if len(found) > 1:
            raise ValueError(
                f"expected one array at {path!r}, but found {listed(found)}"
            )
        leaf = self.leaves[found[0]]
        if is_masked(leaf):
            raise ValueError(masked_text(path))
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{path!r} must be an array of a real floating dtype, but it is "
                + (f"a {type(leaf).__name__}" if dtype is None else f"of {dtype}")
            )
        self.unclaimed.pop(found[0], None)
        return leaf

    def subtree(self, path: str) -> dict[Any, Any]:
        """Claims everything below a path: nested dicts of arrays, keys as they are."""
        depth = len(path.split("/")) if path else 0
        tree: dict[Any, Any] = {}
        for found in self.below(path):
            node = tree
            parts = found.split("/") if found else []
            keys = [_key(key) for key in self._keys[found]]
            names = keys if len(keys) >= len(parts) else parts  # "a/b" is one key
            *modules, role = names[depth : len(parts)] or [""]
            for module in modules:
                node = node.setdefault(module, {})
            node[role] = self.claim(found)
        return tree

    def missing(self, path: str) -> str:
        """Why there is nothing at a path, with the nearest that there is."""
        near = difflib.get_close_matches(path, self.leaves, n=3)
        hint = f" Did you mean {listed(near)}?" if near else ""
        if self.below(f"params/{path}"):
            hint = " Pass variables['params'], not all variables."
        return f"no parameter at {path!r}.{hint} Available: {listed(self.leaves)}"


def _key(key: Any) -> Any:
    """The key of a dict, the index of a sequence or the name of an attribute."""
    return next(
        getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)
    )


def check_spec(
    spec: _spec.LayerChain, params: optax.Params, *, unlisted: Unlisted = "error"
) -> None:
    """Checks a declared chain against parameters, by their paths, shapes and dtypes.

    `scale_by_backmatch` does the same in `init`, so a wrong declaration never trains.
    Nothing is computed: the leaves may be `jax.ShapeDtypeStruct`s.

    Args:
      spec: the declared chain.
      params: the model's parameters: nested dicts, FrozenDicts or an `nnx.State`, with
        arrays of real floating dtype.
      unlisted: what to do about parameters that no declared layer covers: `"error"`, or
        `"identity"` to leave their gradients as they are.

    Raises:
      ValueError: where a declared layer has no parameters in the tree, its shapes do
        not fit its kind or its neighbours, its dtype is not a real floating one, it is
        masked, or a parameter is covered by no layer. The message names the layer, what
        was found, what was expected and the nearest paths.

    Examples:
      >>> import jax.numpy as jnp
      >>> import backmatch_optax as bmo
      >>> from backmatch_optax import spec
      >>> net = spec.LayerChain([spec.Dense("fc1")], input_shape=(64,))
      >>> bmo.check_spec(net, {"fc1": {"kernel": jnp.ones((64, 10))}})
      >>> bmo.check_spec(net, {"fc1": {"kernel": jnp.ones((32, 10))}})
      Traceback (most recent call last):
      ...
      ValueError: spec layer 'fc1' (layers[0]): its kernel of shape (32, 10) takes 32 \
input features, but its input has 64; the input of the chain has shape (64,)
    """
    locate(spec, params, unlisted=unlisted)


def check_chain(spec: Any) -> None:
    """Raises `ValueError` for what is no declared chain."""
    if not isinstance(spec, _spec.LayerChain):
        raise ValueError(
            "spec must be a backmatch_optax.spec.LayerChain, but it is " + kind_of(spec)
        )


def locate(
    spec: _spec.LayerChain, params: optax.Params, *, unlisted: Unlisted = "error"
) -> list[Site]:
    """The links at their places, with shapes and parameters (see `check_spec`)."""
    check_chain(spec)
    if unlisted not in ("error", "identity"):
        raise ValueError(f"unlisted (={unlisted!r}) must be 'error' or 'identity'")
    paths = ParamPaths(params, spec.paths)
    sites = _locate_links(spec.layers, "layers", tuple(spec.input_shape), None, paths)
    if paths.unclaimed and unlisted == "error":
        raise ValueError(
            f"spec: no declared layer covers {listed(paths.unclaimed)}. Declared: "
            f"{listed(spec.paths)}. Declare the layers, or pass unlisted='identity' to "
            "leave the gradients of such parameters as they are."
        )
    return sites


def _locate_links(
    links: Sequence[_spec.Link],
    within: str,
    shape: Shape,
    source: tuple[str, _spec.Link] | None,
    paths: ParamPaths,
    stacked: Shape = (),
) -> list[Site]:
    sites = []
    for index, link in enumerate(links):
        place = f"{within}[{index}]"
        path = own_path(link)
        label = repr(path) if path else place
        with _naming(place, link, source, shape):
            params = {} if path is None else _claim(link, path, paths)
            _check_stack(params, stacked)
        inner = (*stacked, link.n) if isinstance(link, _spec.Repeat) else stacked
        arms = {
            arm: _locate_links(chain, f"{place}.{arm}", shape, source, paths, inner)
            for arm, chain in link.arms.items()
        }
        with _naming(place, link, source, shape):
            # A Block's parameters are nested, and it declares its output itself.
            leaves = {} if link.owns_subtree else params
            shapes = {
                role: jnp.shape(leaf)[len(stacked) :] for role, leaf in leaves.items()
            }
            if arms and (shape or all(arms.values())):
                after = link.joined_shape(
                    {arm: s[-1].output_shape if s else shape for arm, s in arms.items()}
                )
            elif shape or link.begins or isinstance(link, _spec.Embed | _spec.Block):
                after = link.shape_after(shape, shapes)
            else:
                raise ValueError("takes features, but a label has none; see spec.Embed")
            if isinstance(link, _spec.Repeat) and after != shape:
                raise ValueError(
                    f"its chain puts out shape {after}, but each of its {link.n} "
                    "layers takes what the one before puts out"
                )
        is_array = path is not None and path in paths.leaves
        site = Site(link, label, shape, after, params, arms, stacked, is_array)
        if isinstance(link, _spec.Memory):
            with _naming(place, link, source, shape):
                link.bind(site, [*every(arms["links"])])
        if path is not None:
            first = paths.first_uses.setdefault(path, site)
            if first is not site:
                site.uses = first.uses = first.uses or [first]
                site.uses.append(site)
        sites.append(site)
        shape, source = after, (place, link)
    return sites


def _check_stack(params: Mapping[Any, Any], stacked: Shape) -> None:
    """Raises `ValueError` where a parameter lacks the axes of the layers."""
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(dict(params)):
        shape = jnp.shape(leaf)
        if shape[: len(stacked)] != stacked:
            expected = ", ".join(map(str, (*stacked, "...")))
            raise ValueError(
                f"its {text(key_path)} has shape {shape}, but expected ({expected}): "
                "an entry for each layer of a Repeat along the first axis"
            )


@contextlib.contextmanager
def _naming(
    place: str, link: _spec.Link, below: tuple[str, _spec.Link] | None, shape: Shape
) -> Iterator[None]:
    """Adds to an error which link it is about, and what the one below feeds it."""
    try:
        yield
    except ValueError as error:
        source = f"the output of {_name(*below)}" if below else "the input of the chain"
        raise ValueError(
            f"spec layer {_name(place, link)}: {error}; {source} has shape {shape}"
        ) from None


def _name(place: str, link: _spec.Link) -> str:
    path = own_path(link)
    return f"{path!r} ({place})" if path else f"{place}, {link!r}"


def _claim(link: Any, path: str, paths: ParamPaths) -> Mapping[str, Any]:
    """The parameters a link owns, by role."""
    if link.owns_subtree:
        if not paths.below(path):
            raise ValueError(paths.missing(path))
        return paths.subtree(path)
    params = {}
    is_array = path in paths.leaves
    for role, place in places(link, is_array).items():
        if place != path and place in paths.declared:  # a bias that is added later
            if role in link.required_roles:
                raise ValueError(f"its {role} {place!r} is declared by itself as well")
            continue
        leaf = paths.claim(place)
        if leaf is not None and not role and not is_array:
            raise ValueError(
                f"path (={path!r}) must be the array's own, {listed(paths.below(path))}"
            )
        if leaf is not None:
            params[role] = leaf
        elif role in link.required_roles:
            raise ValueError(paths.missing(join(path, role)))
    if not params:
        raise ValueError(
            f"{paths.missing(join(path, link.roles[0]))} One without parameters is "
            f"spec.{type(link).__name__}()."
        )
    for role, leaf in params.items():
        if 0 in jnp.shape(leaf):
            raise ValueError(f"its {role} of shape {leaf.shape} holds nothing")
    return params
