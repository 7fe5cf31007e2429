r"""Back-matching propagation without approximation (BM section 2).

Back-propagation (BP) asks how the loss responds to a layer's weight and input;
back-matching asks which changes of them bring about the wanted change of the layer's
output, and answers with least squares. The functions here compute what their ordinary
counterparts do, but pull a cotangent :math:`\delta b` back to the least-squares
solutions:

.. math::
  \delta' W = (\mathbb{E}\, a a^T)^{-1} \, \mathbb{E}[a \, \delta b^T], \qquad
  \delta' a_j = \frac{w_j^T \delta b}{w_j^T w_j}

where :math:`w_j` are the weights that emanate from unit :math:`j` of the input
(BM (12), (13); for a convolution (22), (23), with the patches of im2col in the place of
:math:`a`). So `jax.grad` of a network made of them returns the exact back-matching
direction of every parameter. What `scale_by_backmatch` multiplies the gradient by is
this rule with :math:`\mathbb{E}\, a a^T` and the :math:`w_j^T w_j` replaced by their
mean diagonals.

`dense`, `conv`, `batch_norm` and `relu` are functions; `backmatch_optax.exact.linen`
and `backmatch_optax.exact.nnx` have them as Flax layers with the names, arguments and
parameters of Flax's own, so that a trained model's parameters fit. Import these by
name: they need Flax.

* **The top.** The derivative of the loss with respect to the network's output counts as
  the wanted change of it (BM 3.2): nothing is done about the loss, and a descent step
  subtracts what `jax.grad` returns, as usual.
* **The batch** is the first axis of every input, all axes between it and the features
  are positions, and :math:`\mathbb{E}` is a mean over the batch and a sum over
  positions, as in BM (21). The loss must be a mean over the same batch, as everywhere
  in this package; under a sum, all directions grow by the size of the batch, as BP's
  gradients do.
* **What is not covered.** Everything in between keeps its BP rule. That is the
  least-squares one for dropout, reshaping and max pooling without overlap, but not for
  average pooling, other activations or residual sums.
* Only first derivatives, and only in reverse mode.

`procedure_1` is the other view of the same thing: LH's procedure, of which BP is the
solution by one gradient step.
"""

from backmatch_optax.exact.linear import conv, dense, second_moment
from backmatch_optax.exact.normalisation import batch_norm, batch_statistics, relu
from backmatch_optax.exact.procedure import procedure_1

__all__ = [
    "batch_norm",
    "batch_statistics",
    "conv",
    "dense",
    "procedure_1",
    "relu",
    "second_moment",
]
