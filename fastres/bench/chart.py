"""The bar chart: one panel per case, one bar per variant, images per second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"eager": "#8c8c8c", "compile": "#5b8db8", "fastres": "#d9542b"}
PEER_COLOUR = "#9aa86a"


def colour_of(name: str) -> str:
    """One colour per engine; malloc variants are a lighter bar of the same colour."""
    return COLOURS.get(name.removesuffix("+malloc"), PEER_COLOUR)


def draw(result: dict[str, Any], file: str, environment_line: str) -> None:
    """Writes the PNG of a result."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [c for c in result["cases"] if any(r["img_per_s"] for r in c["variants"])]
    columns = 2 if len(cases) > 1 else 1
    lines = max(1, -(-len(cases) // columns))
    bars = max((len([r for r in c["variants"] if r["img_per_s"]]) for c in cases), default=1)
    figure, axes = plt.subplots(
        lines,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(6.0 * columns, lines * (0.9 + 0.42 * bars) + 0.9),
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, case)
    options = result["options"]
    figure.suptitle(
        f"{options['model']}, batch {options['batch']}, {options['size']} px: "
        "images per second (ratio to eager)",
        fontsize=13,
        fontweight="bold",
    )
    figure.supxlabel(_wrapped(environment_line, 75 * columns), fontsize=7, color="#666666")
    figure.savefig(Path(file), dpi=130, format="png")
    plt.close(figure)


def _panel(axis: Any, case: dict[str, Any]) -> None:
    rows = [r for r in case["variants"] if r["img_per_s"]]
    names = [r["name"] for r in rows]
    values = [r["img_per_s"] for r in rows]
    drawn = axis.barh(range(len(rows)), values, height=0.72, color=[colour_of(n) for n in names])
    for bar, row in zip(drawn, rows, strict=True):
        if row["name"].endswith("+malloc"):
            bar.set_alpha(0.6)
        ratio = row["vs_eager"]
        text = f" {row['img_per_s']:,.1f}"
        if ratio is not None and row["name"] != "eager":
            text += f"  ({ratio['median']:.2f}x)"
        axis.text(
            bar.get_width(),
            bar.get_y() + bar.get_height() / 2,
            text,
            va="center",
            fontsize=9,
            fontweight="bold" if row["name"] == "fastres" else "normal",
        )
    axis.set_yticks(range(len(rows)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, max(values) * 1.3)
    axis.set_title(f"{case['dtype']} {case['mode']}", fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
