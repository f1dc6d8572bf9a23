"""Bytes, FLOPs and the implied ceiling of a model, kernel by kernel: docs/roofline.md.

    fastres.roofline.model(net, (256, 3, 224, 224)).ceiling(bandwidth=4.3e12, rate=790e12)

One file, one job:

    traffic.py   the formulas: bytes of every tensor that a kernel reads and writes
    kernel.py    a kernel of a model, and the rows of the breakdown
    trace.py     what a model runs, and which blocks of it convert fuses
    eager.py     rung a
    fused.py     rungs b, c1, c2, d, and folded inference
    result.py    the whole: model(), tables, JSON
"""

from .kernel import ROWS, Access, Kernel
from .result import (
    BANDWIDTH,
    INFERENCE_RUNGS,
    RATE,
    TRAINING_RUNGS,
    Roofline,
    check_rung,
    comparison,
    ladder,
    ladder_dict,
    model,
)
from .traffic import (
    ConvShape,
    Traffic,
    bn_apply,
    bn_bwd_apply,
    bn_bwd_reduce,
    bn_relu_maxpool,
    bn_relu_maxpool_bwd_apply,
    bn_relu_maxpool_bwd_reduce,
    bn_stats,
    dgrad,
    dgrad_wgrad,
    fprop,
    relu_bwd,
    wgrad,
)

__all__ = [
    "BANDWIDTH",
    "INFERENCE_RUNGS",
    "RATE",
    "ROWS",
    "TRAINING_RUNGS",
    "Access",
    "ConvShape",
    "Kernel",
    "Roofline",
    "Traffic",
    "bn_apply",
    "bn_bwd_apply",
    "bn_bwd_reduce",
    "bn_relu_maxpool",
    "bn_relu_maxpool_bwd_apply",
    "bn_relu_maxpool_bwd_reduce",
    "bn_stats",
    "check_rung",
    "comparison",
    "dgrad",
    "dgrad_wgrad",
    "fprop",
    "ladder",
    "ladder_dict",
    "model",
    "relu_bwd",
    "wgrad",
]
