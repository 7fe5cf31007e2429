"""The declared layer chain: which layers a network has, from its input to its output.

Every kind of layer is one class that states, for a link between its input and output,

* `shape_after`: the shape of its output, without the batch dimension;
* `moments_after`: the moments of its output, given those of its input;
* `m_W` and `m_z`: its two local Hessians, each reduced to a scalar, the mean diagonal
  of `J^T J`, where `J` is the Jacobian of the output with respect to one of its
  parameters, or to its input.

That is all the recursion needs, so a new kind of layer is one new class. Four more
answers make it exact in company and have defaults, see `Link`: `centres` (no change),
`featurewise` (False), `common_below` (no change) and `aligned_below` (nothing).

Spellings and defaults are Flax's own, kernels are in Flax layout: Dense `(in, out)`,
Conv `(*window, in / groups, out)`. Links are frozen, hashable and comparable, and their
`repr` is the code that rebuilds them (functions of a `Block` by their names).

Equation numbers: BM is Zhang, Chen and Liu, arXiv 1802.09750; LH is Zhang, Chen and
Liu, "On the Local Hessian in Back-propagation", NeurIPS 2018.
"""

from backmatch_optax.moments import Moments
from backmatch_optax.powers import Positive
from backmatch_optax.spec.attention import Attention, DenseGeneral, DotProductAttention
from backmatch_optax.spec.chain import LayerChain
from backmatch_optax.spec.composite import (
    Block,
    Concatenate,
    Gate,
    Input,
    Outputs,
    Residual,
)
from backmatch_optax.spec.elementwise import Activation, Dropout, Scale, Shift
from backmatch_optax.spec.embed import Embed, Tied, Unembed
from backmatch_optax.spec.learned import Bias, ClassToken, LayerScale, PReLU
from backmatch_optax.spec.linear import Conv, ConvTranspose, Dense
from backmatch_optax.spec.link import Link, Site
from backmatch_optax.spec.memory import Memory, Queries, Recall
from backmatch_optax.spec.norm import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from backmatch_optax.spec.pool import AvgPool, Flatten, GlobalAvgPool, MaxPool
from backmatch_optax.spec.repeat import Repeat
from backmatch_optax.spec.reshape import Reshape, Resize, Slice, Transpose
from backmatch_optax.spec.softmax import LogSoftmax, Softmax

__all__ = [
    "Activation",
    "Attention",
    "AvgPool",
    "BatchNorm",
    "Bias",
    "Block",
    "ClassToken",
    "Concatenate",
    "Conv",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "DotProductAttention",
    "Dropout",
    "Embed",
    "Flatten",
    "Gate",
    "GlobalAvgPool",
    "GroupNorm",
    "Input",
    "LayerChain",
    "LayerNorm",
    "LayerScale",
    "Link",
    "LogSoftmax",
    "MaxPool",
    "Memory",
    "Moments",
    "Outputs",
    "PReLU",
    "Positive",
    "Queries",
    "RMSNorm",
    "Recall",
    "Repeat",
    "Reshape",
    "Residual",
    "Resize",
    "Scale",
    "Shift",
    "Site",
    "Slice",
    "Softmax",
    "Tied",
    "Transpose",
    "Unembed",
]
