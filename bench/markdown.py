"""Tables and numbers of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def ratio(r: dict[str, float] | None) -> str:
    """Median and quartiles."""
    return "" if r is None else f"{r['median']:.2f} [{r['q1']:.2f}-{r['q3']:.2f}]"


def number(value: float | None, form: str = ",.1f") -> str:
    return "" if value is None else format(value, form)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}%"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table without the columns that are empty in every row; nothing without rows."""
    rows = [list(row) for row in rows]
    if not rows:
        return []
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells[i].replace("|", "/") for i in kept) + " |"

    rule = "|" + "|".join("---" if i == 0 else "---:" for i in kept) + "|"
    return [line(head), rule, *(line(row) for row in rows), ""]
