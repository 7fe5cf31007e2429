"""Layer-wise adaptive rates from back-matching propagation, for Optax and Flax.

A `GradientTransformation` that multiplies each layer's gradient by one number, which
undoes what the layers above it do to the signal. Declare the layer chain once, and add
one line to the `optax.chain` you have.
"""

from importlib.metadata import version as _version

from backmatch_optax import exact, local_hessian, plots, spec
from backmatch_optax.comparison import ScaleComparison, compare_scales
from backmatch_optax.infer import infer_spec
from backmatch_optax.kept_norms import keep_norms
from backmatch_optax.measured import (
    MeasuredLayerScales,
    ScaleByMeasuredBackmatchState,
    measure_layer_scales,
    scale_by_measured_backmatch,
)
from backmatch_optax.optimizers import (
    ScaleByBackmatchState,
    backmatch_sgd,
    scale_by_backmatch,
    scale_by_lsalr,
    scale_steps_by_backmatch,
)
from backmatch_optax.parameters import check_spec
from backmatch_optax.scales import layer_scales
from backmatch_optax.tables import describe

__version__ = _version("backmatch-optax")

__all__ = [
    "MeasuredLayerScales",
    "ScaleByBackmatchState",
    "ScaleByMeasuredBackmatchState",
    "ScaleComparison",
    "backmatch_sgd",
    "check_spec",
    "compare_scales",
    "describe",
    "exact",
    "infer_spec",
    "keep_norms",
    "layer_scales",
    "local_hessian",
    "measure_layer_scales",
    "plots",
    "scale_by_backmatch",
    "scale_by_lsalr",
    "scale_by_measured_backmatch",
    "scale_steps_by_backmatch",
    "spec",
]
