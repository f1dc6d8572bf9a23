"""Errors against float64, and the rule that a converted model must pass before it is timed.

For each quantity (outputs, gradients, running statistics) two relative errors are taken: `max`, the
largest |a - b| / max|b| of any tensor, and `rms`, |a - b| / |b| over all tensors together. fastres
passes when both are at most twice those of eager PyTorch in the same dtype, plus a floor. The floor
stands for what rounding alone moves a result by when the order of additions changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FACTOR = 2.0
# A few roundings of the accumulation dtype (fp32), or of the dtype that activations are stored in.
FLOORS = {"fp32": 1e-5, "bf16": 8e-3, "fp16": 1e-3}


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
            limit = FACTOR * error + FLOORS[dtype]
            rows.append(Check(dtype, mode, quantity, measure, error, ours, limit))
    return rows


def largest_error(errors: Mapping[str, Mapping[str, float]]) -> float | None:
    """The largest `max` error of any quantity, for the table."""
    values = [measures["max"] for measures in errors.values()]
    return max(values) if values else None
