"""Layer-wise adaptive rates from back-matching propagation, for Optax and Flax.

A `GradientTransformation` that multiplies each layer's gradient by one number, which
undoes what the layers above it do to the signal. Declare the layer chain once, and add
one line to the `optax.chain` you have.
"""

from importlib.metadata import version as _version

from backmatch_optax import exact, local_hessian, spec
from backmatch_optax._alias import backmatch_sgd
from backmatch_optax._compare import ScaleComparison, compare_scales
from backmatch_optax._describe import describe
from backmatch_optax._infer import infer_spec
from backmatch_optax._keep_norms import keep_norms
from backmatch_optax._layer_scales import layer_scales
from backmatch_optax._locate import check_spec
from backmatch_optax._measure import (
    MeasuredLayerScales,
    ScaleByMeasuredBackmatchState,
    measure_layer_scales,
    scale_by_measured_backmatch,
)
from backmatch_optax._transform import (
    ScaleByBackmatchState,
    scale_by_backmatch,
    scale_by_lsalr,
)

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
    "scale_by_backmatch",
    "scale_by_lsalr",
    "scale_by_measured_backmatch",
    "spec",
]
