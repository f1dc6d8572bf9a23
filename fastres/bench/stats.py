"""Medians and per-round ratios.

Machines drift: clocks, neighbours, heat. A ratio is therefore taken within a round, in which all
variants ran one after the other, and the median over rounds is reported with its quartiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles (linear interpolation, as numpy's default)."""

    median: float
    q1: float
    q3: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of `values` by linear interpolation between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Spread:
    """Spread of a non-empty sequence."""
    return Spread(median(values), quantile(values, 0.25), quantile(values, 0.75))


def speed_ratios(seconds: Sequence[float], baseline: Sequence[float]) -> Spread:
    """How many times faster than the baseline, per round: baseline seconds / seconds."""
    return spread([b / s for s, b in zip(seconds, baseline, strict=True)])


def best_of(names: Sequence[str], seconds: dict[str, list[float]]) -> str | None:
    """The name with the lowest median of seconds among those that were measured."""
    measured = [name for name in names if seconds.get(name)]
    return min(measured, key=lambda name: median(seconds[name])) if measured else None


def rotation(items: Sequence[T], turn: int) -> list[T]:
    """`items` starting at position turn, so that nobody always runs first."""
    if not items:
        return []
    start = turn % len(items)
    return [*items[start:], *items[:start]]
