"""Errors against float64, and the rule that a converted model must pass before it is timed.

For each quantity (outputs, gradients, running statistics) two relative errors are taken: `max`, the
largest |a - b| / max|b| of any tensor, and `rms`, |a - b| / |b| over all tensors together. fastres
passes when both are at most twice those of eager PyTorch in the same dtype, plus a floor.
The floors:

outputs, running_stats: a few roundings of the dtype that activations are stored in, or, for fp32,
of sums in another order.

gradients: a pre-activation within a rounding of 0 may fall on the other side of the ReLU, and a
pool's maximum on another pixel: the gradient jumps. fp32 eager with the batch in another order
moves by up to 6e-3 (rms) and 0.2 (max; resnet18 to 50, 64 to 224 px), or by 3e-6 when nothing
flips. A wrong formula is off by about 1 in some tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FACTOR = 2.0
FLOORS: dict[str, dict[str, dict[str, float]]] = {  # quantity -> dtype -> measure
    "outputs": {
        "fp32": {"max": 1e-5, "rms": 1e-5},
        "bf16": {"max": 8e-3, "rms": 8e-3},
        "fp16": {"max": 1e-3, "rms": 1e-3},
    },
    "running_stats": {
        "fp32": {"max": 1e-5, "rms": 1e-6},
        "bf16": {"max": 2e-3, "rms": 5e-4},
        "fp16": {"max": 5e-4, "rms": 1e-4},
    },
    "gradients": {
        "fp32": {"max": 0.25, "rms": 1e-2},
        "bf16": {"max": 0.25, "rms": 5e-2},
        "fp16": {"max": 0.25, "rms": 2e-2},
    },
}


@dataclass(frozen=True)
class Check:
    """One line of the verification: a quantity of a case, eager's error and ours, and the limit."""

    dtype: str
    mode: str
    quantity: str
    measure: str
    eager: float
    fastres: float
    limit: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.fastres) and self.fastres <= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "passed": self.passed}


def relative_errors(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """{"max", "rms"} of tensors by name against float64; inf when a name or value is missing."""
    largest, square, norm = 0.0, 0.0, 0.0
    if set(ours) != set(truth):
        return {"max": math.inf, "rms": math.inf}
    for name, exact in truth.items():
        value = ours[name].detach().to("cpu").double()
        if value.shape != exact.shape or not bool(value.isfinite().all()):
            return {"max": math.inf, "rms": math.inf}
        difference = value - exact
        scale = float(exact.abs().max())
        error = float(difference.abs().max())
        largest = max(largest, error / scale if scale else error)
        square += float(difference.square().sum())
        norm += float(exact.square().sum())
    return {"max": largest, "rms": math.sqrt(square / norm) if norm else math.sqrt(square)}


def all_errors(
    ours: Mapping[str, Mapping[str, Tensor]], truth: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """relative_errors of every quantity that `truth` holds."""
    return {
        quantity: relative_errors(ours.get(quantity, {}), tensors)
        for quantity, tensors in truth.items()
    }


def checks(
    dtype: str,
    mode: str,
    eager: Mapping[str, Mapping[str, float]],
    fastres: Mapping[str, Mapping[str, float]],
) -> list[Check]:
    """The rule applied to the errors of eager and of fastres in one case."""
    rows = []
    for quantity, measures in eager.items():
        for measure, error in measures.items():
            ours = fastres.get(quantity, {}).get(measure, math.inf)
            limit = FACTOR * error + FLOORS[quantity][dtype][measure]
            rows.append(Check(dtype, mode, quantity, measure, error, ours, limit))
    return rows
