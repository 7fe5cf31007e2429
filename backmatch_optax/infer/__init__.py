"""The layer chain of a Flax model, read off one abstract trace."""

from backmatch_optax.infer.flax import infer_spec

__all__ = ["infer_spec"]
