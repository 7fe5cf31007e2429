r"""Local Hessians of a block: products, spectra, condition numbers, a report.

LH is "On the Local Hessian in Back-propagation". It reads back-propagation as one
gradient step on a back-matching loss of each block (LH (5), Proposition 1). That loss
asks the block's output :math:`F(W, z)` to meet a target :math:`t`:

.. math::
  \ell(W, z) = \tfrac{1}{2} \Vert F(W, z) - t \Vert^2 .

The Hessians of this loss decide how far one step gets (LH (6)). LH calls them local:

.. math::
  H_z = J_z^T J_z + \sum_i (F - t)_i \nabla_z^2 F_i , \qquad
  H_W = J_W^T J_W + \sum_i (F - t)_i \nabla_W^2 F_i .

The first terms are the Gauss-Newton parts, which LH analyses: LH (8) and (9) for a
dense layer, LH (13) and (14) for a residual block (its Remark 1 is LH (15)), LH (17)
and (18) with batch normalisation. The means of their
diagonals are the numbers `m_z` and `m_W` of the package's recursion.

A block is any function `fn(params, z)` from one array to another, with the batch as
first axis of both. Only small blocks have their Jacobian formed.

`H_z` is over the coordinates of all examples in `z`, and not divided by their number. A
block that treats examples one by one has one diagonal block for each, LH's `H_z`. Pass
`z[:1]` for a single one. `H_W` is divided by the batch size: a mean over examples, as
in BM (2) and LH's Remark 3. LH (9) and (18) print the sum.

Batch normalisation with the batch's own statistics couples the examples of a block. LH
(17) and (18) ignore the terms this adds, which are of order 1 / batch. For the papers'
matrices pass a block with fixed statistics: in Flax `use_running_average=True`, with
the statistics of the batch. For the true ones pass a block in training mode.

Needs matfree: `pip install "backmatch-optax[local-hessian]"`.
"""

from backmatch_optax.local_hessian.estimates import (
    MeanDiagonal,
    Spectrum,
    mean_diagonal,
    spectrum,
)
from backmatch_optax.local_hessian.extremes import Condition, condition, eigenvalues
from backmatch_optax.local_hessian.operator import (
    LocalHessian,
    input_hessian,
    weight_hessian,
)
from backmatch_optax.local_hessian.random_matrices import (
    MarchenkoPastur,
    marchenko_pastur,
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
