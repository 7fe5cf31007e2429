r"""Back-matching propagation without approximation (BM section 2).

Back-propagation (BP) asks how the loss responds to a layer's weight and input.
Back-matching asks which changes of them bring about the wanted change of the layer's
output, and answers with least squares. The functions here compute what their ordinary
counterparts do, but pull a cotangent :math:`\delta b` back to the least-squares
solutions:

.. math::
  \delta' W = (\mathbb{E}\, a a^T)^{-1} \, \mathbb{E}[a \, \delta b^T], \qquad
  \delta' a_j = \frac{w_j^T \delta b}{w_j^T w_j}

So `jax.grad` of a network made of them returns the exact back-matching direction of
every parameter. `scale_by_backmatch` follows the same rule with :math:`\mathbb{E}\,
a a^T` and the :math:`w_j^T w_j` replaced by their mean diagonals, BM (32) to (36).

`backmatch_optax.exact.linen` and `backmatch_optax.exact.nnx` have `dense`, `conv` and
`batch_norm` as Flax layers with the names, arguments and parameters of Flax's own, so
that a trained model's parameters fit. Import these by name: they need Flax.

Equations of BM (Zhang, Chen and Liu, arXiv 1802.09750) and LH (Zhang, Chen and Liu, "On
the Local Hessian in Back-propagation", NeurIPS 2018), and what computes them:

====================================  ===============================================
BM (1), (2), (5), (8) to (15)         `dense`
BM (16), (19), (22), (23)             `conv`
:math:`\mathbb{E}\, a a^T`            `second_moment`
BM (24), (26)                         `batch_norm`
BM (28) to (31)                       `jax.nn.relu`, whose BP is the solution
LH (3) to (5), Procedure 1            `procedure_1`, of which BP is the solution
====================================  ===============================================

* **The top.** The derivative of the loss with respect to the network's output counts as
  the wanted change of it (BM 3.2): nothing is done about the loss, and a descent step
  subtracts what `jax.grad` returns, as usual.
* **The batch** is the first axis of every input, all axes between it and the features
  are positions, and :math:`\mathbb{E}` is a mean over the batch and a sum over
  positions, as in BM (21). The loss must be a mean over the same batch. Under a sum,
  all directions grow by the size of the batch, as BP's gradients do.
* **What is not covered.** Everything in between keeps its BP rule. This is the
  least-squares one for reshaping, ReLU and max pooling without overlap. It is not for
  dropout (whose factor should divide), average pooling, other activations or residual
  sums.
* Only first derivatives, and only in reverse mode.
"""

from backmatch_optax.exact.linear import conv, dense, second_moment
from backmatch_optax.exact.normalisation import batch_norm, batch_statistics
from backmatch_optax.exact.procedure import procedure_1

__all__ = [
    "batch_norm",
    "batch_statistics",
    "conv",
    "dense",
    "procedure_1",
    "second_moment",
]
