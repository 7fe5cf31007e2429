"""Laying a declared chain over parameters: every check that shapes allow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import optax

from backmatch_optax import spec as _spec
from backmatch_optax._param_paths import ParamPaths, join, listed
from backmatch_optax._site import Shape, Site

Unlisted = Literal["error", "identity"]


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


def locate(
    spec: _spec.LayerChain, params: optax.Params, *, unlisted: Unlisted = "error"
) -> list[Site]:
    """The links at their places, with shapes and parameters (see `check_spec`)."""
    if not isinstance(spec, _spec.LayerChain):
        raise ValueError(
            "spec must be a backmatch_optax.spec.LayerChain, but it is "
            + _spec.kind_of(spec)
        )
    if unlisted not in ("error", "identity"):
        raise ValueError(f"unlisted (={unlisted!r}) must be 'error' or 'identity'")
    paths = ParamPaths(params)
    sites = _locate_links(
        spec.layers, "layers", tuple(spec.input_shape), "the input of the chain", paths
    )
    missed = paths.unclaimed()
    if missed and unlisted == "error":
        raise ValueError(
            f"spec: no declared layer covers {listed(missed)}. Declared: "
            f"{listed(spec.paths)}. Declare the layers, or pass unlisted='identity' to "
            "leave the gradients of such parameters as they are."
        )
    return sites


def _locate_links(
    links: Sequence[_spec.Link],
    within: str,
    shape: Shape,
    source: str,
    paths: ParamPaths,
) -> list[Site]:
    sites = []
    for index, link in enumerate(links):
        place = f"{within}[{index}]"
        path = getattr(link, "path", None)
        label = place if path is None else repr(path)
        name = f"{place}, {link!r}" if path is None else f"{label} ({place})"
        with _naming(name, f"{source} has shape {shape}"):
            params = {} if path is None else _claim(link, path, paths)
        arms = {
            arm: _locate_links(chain, f"{place}.{arm}", shape, source, paths)
            for arm, chain in link.arms.items()
        }
        with _naming(name, f"{source} has shape {shape}"):
            # A Block's parameters are nested, and it declares its output itself.
            leaves = {} if link.owns_subtree else params
            shapes = {role: jnp.shape(leaf) for role, leaf in leaves.items()}
            after = _arms_shape(arms, shape) or link.shape_after(shape, shapes)
        sites.append(Site(link, label, shape, after, params, arms))
        shape, source = after, f"the output of {name}"
    return sites


@contextlib.contextmanager
def _naming(name: str, source: str) -> Iterator[None]:
    """Adds to an error which link it is about, and what that link is fed."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"spec layer {name}: {error}; {source}") from None


def _claim(link: Any, path: str, paths: ParamPaths) -> Mapping[str, Any]:
    """The parameters a link owns, by role."""
    if link.owns_subtree:
        if not paths.below(path):
            raise ValueError(paths.missing(path))
        for found in paths.below(path):
            _check_dtype(found, paths.claim(found))
        return paths.subtree(path)
    params = {}
    for role in link.roles:
        leaf = paths.claim(join(path, role))
        if leaf is not None:
            _check_dtype(join(path, role), leaf)
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


def _check_dtype(path: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{path!r} must be an array of a real floating dtype, but it is "
            + (f"a {type(leaf).__name__}" if dtype is None else f"of {dtype}")
        )


def _arms_shape(arms: Mapping[str, Sequence[Site]], shape: Shape) -> Shape | None:
    """The shape that all arms put out; None where a link has no arms."""
    outputs = {
        arm: sites[-1].output_shape if sites else shape for arm, sites in arms.items()
    }
    if len(set(outputs.values())) > 1:
        listed_outputs = ", ".join(f"{arm} {out}" for arm, out in outputs.items())
        raise ValueError(f"its arms must end in one shape, but: {listed_outputs}")
    return next(iter(outputs.values()), None)
