r"""Local Hessians of a block: products, spectra, condition numbers, a report.

Back-propagation is one gradient step on each block's back-matching loss, which asks the
block's output :math:`F(W, z)` to meet a target :math:`t` (LH 5, Proposition 1),

.. math::
  \ell(W, z) = \tfrac{1}{2} \Vert F(W, z) - t \Vert^2 ,

and how far one step gets is decided by the Hessians of that loss (LH 6), which "On the
Local Hessian in Back-propagation" (LH) calls local:

.. math::
  H_z = J_z^T J_z + \sum_i (F - t)_i \nabla_z^2 F_i , \qquad
  H_W = J_W^T J_W + \sum_i (F - t)_i \nabla_W^2 F_i .

The first terms are the Gauss-Newton parts, which LH analyses: (8) and (9) for a dense
layer, (13) and (14) for a residual block, (17) and (18) with batch normalisation. The
means of their diagonals are the numbers `m_z` and `m_W` of the package's recursion.

A block is any function `fn(params, z)` from an array with the batch as first axis to
another. Nothing here forms a Jacobian, except where a block is small.

What is averaged. `H_z` is over the coordinates of all examples in `z`, and not divided
by their number: for a block that treats examples one by one it has one diagonal block
for each, LH's `H_z`. Give one example, `z[:1]`, for a single one. `H_W` is divided by
the batch size, a mean over examples as in BM (2) and in LH's Remark 3; LH (9) and (18)
print the sum.

Batch normalisation. With the batch's own statistics a block couples its examples. LH
(17) and (18) ignore the terms that come of it, which are of order 1 / batch; give a
block whose statistics are fixed (in Flax `use_running_average=True`, with the
statistics of the batch) for the papers' matrices, and one in training mode for the true
ones.

Needs matfree: `pip install "backmatch-optax[local-hessian]"`.
"""

from backmatch_optax.local_hessian.estimates import (
    Condition,
    MeanDiagonal,
    Spectrum,
    condition,
    eigenvalues,
    mean_diagonal,
    spectrum,
)
from backmatch_optax.local_hessian.marchenko_pastur import (
    MarchenkoPastur,
    marchenko_pastur,
)
from backmatch_optax.local_hessian.operator import (
    LocalHessian,
    input_hessian,
    weight_hessian,
)
from backmatch_optax.local_hessian.reports import BlockReport, Report, report

__all__ = [
    "BlockReport",
    "Condition",
    "LocalHessian",
    "MarchenkoPastur",
    "MeanDiagonal",
    "Report",
    "Spectrum",
    "condition",
    "eigenvalues",
    "input_hessian",
    "marchenko_pastur",
    "mean_diagonal",
    "report",
    "spectrum",
    "weight_hessian",
]
