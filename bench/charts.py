"""The charts of docs/benchmarks.md, each only where there are data for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastres.bench.chart import colour_of

from .gpu.numbers import counted
from .results import OURS, Result

# of the run-book's charts, which have up to 20 series
WARM = ("#d9542b", "#e8a33d", "#b03a48", "#f2c14e", "#8c2d19", "#e67f83")
COLD = ("#8c8c8c", "#5b8db8", "#9aa86a", "#3d5a80", "#bdbdbd", "#6b8e8e")
MODE_STYLE = {"inference": "-", "train": "--", "forward": ":"}


@dataclass(frozen=True)
class Chart:
    """name: of the file; draw: on one axis."""

    name: str
    title: str
    height: float
    draw: Callable[[Any], None]

    def save(self, file: Path) -> None:
        """The PNG: the same data and matplotlib give the same bytes."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(layout="constrained", figsize=(8, self.height))
        self.draw(axis)
        axis.set_title(self.title, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        figure.savefig(file, dpi=110, format="png", metadata={"Software": None})
        plt.close(figure)


def of(result: Result) -> list[Chart]:
    """Those that the result has data for."""
    if result.kind == "bench":
        return _bench(result)
    if result.kind == "gpu":
        return _gpu(result)
    rows = result.rows()
    networks = [row for row in rows if row["suite"] == "network"]
    kernels = [row for row in rows if row["suite"] == "kernel" and row["percent_of_roofline"]]
    found = []
    if networks:
        found.append(_throughput(networks))
    if kernels:
        found.append(_roofline(kernels))
    trained = [row for row in networks if row["saved_ratio"]]
    if trained:
        found.append(_memory(trained))
    lines = _by_batch(networks)
    if lines:
        found.append(_batches(lines))
    return found


def _bars(
    axis: Any,
    names: list[str],
    series: dict[str, list[float | None]],
    unit: str,
    colour: Callable[[str], str] | None = None,
) -> None:
    """Groups of horizontal bars: one group a name, one bar a series. colour: of many series, whose
    legend goes beside the bars."""
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        at = [y + (i - (len(series) - 1) / 2) * width for y in range(len(names))]
        axis.barh(
            at, [v or 0 for v in values], width, label=label, color=(colour or colour_of)(label)
        )
        for y, value in zip(at, values, strict=True):
            if value:
                text = f" {value:,.0f}" if colour and value >= 100 else f" {value:,.3g}"
                axis.text(value, y, text, va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(unit, fontsize=8)
    if colour and len(series) > 1:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif len(series) > 1:
        axis.legend(fontsize=8, loc="lower right")


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']} {row['mode']} {row['dtype']} n{row['batch']}"


def _throughput(rows: list[dict[str, Any]]) -> Chart:
    others = dict.fromkeys(
        b["name"] for row in rows for b in row["baselines"] if b["img_per_s"] is not None
    )
    series: dict[str, list[float | None]] = {}
    for other in others:
        series[other] = [
            next((b["img_per_s"] for b in row["baselines"] if b["name"] == other), None)
            for row in rows
        ]
    series[OURS] = [row["img_per_s"] for row in rows]

    def draw(axis: Any) -> None:
        _bars(axis, [_name(row) for row in rows], series, "images per second")
        axis.set_xscale("log")

    height = 1.2 + 0.12 * len(rows) * max(2, len(series))
    return Chart("throughput", "Throughput by network, images per second", height, draw)


def _roofline(rows: list[dict[str, Any]]) -> Chart:
    names = [f"{row['name']} {row['shape']} {row['dtype']}" for row in rows]

    def draw(axis: Any) -> None:
        _bars(axis, names, {OURS: [row["percent_of_roofline"] for row in rows]}, "percent")
        axis.axvline(100, color="#444444", linewidth=0.8)

    return Chart("roofline", "Kernels in percent of roofline", 1.2 + 0.17 * len(rows), draw)


def _memory(rows: list[dict[str, Any]]) -> Chart:
    ours = [row["saved_bytes"] / 1e6 for row in rows]
    eager = [row["saved_bytes"] / row["saved_ratio"] / 1e6 for row in rows]

    def draw(axis: Any) -> None:
        _bars(axis, [_name(row) for row in rows], {"eager": eager, OURS: ours}, "MB")

    return Chart("memory", "Bytes kept for the backward, MB", 1.2 + 0.35 * len(rows), draw)


def _by_batch(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, str]]]:
    lines: dict[str, list[tuple[int, float, str]]] = {}
    for row in rows:
        ratio = next((b["ratio"] for b in row["baselines"] if b["name"] == "eager"), None)
        if ratio is not None:
            key = f"{row['name']} {row['mode']} {row['dtype']}"
            lines.setdefault(key, []).append((row["batch"], ratio["median"], row["mode"]))
    return {key: sorted(points) for key, points in lines.items() if len(points) > 1}


def _batches(lines: dict[str, list[tuple[int, float, str]]]) -> Chart:
    def draw(axis: Any) -> None:
        for key, points in lines.items():
            style = MODE_STYLE[points[0][2]]
            axis.plot([p[0] for p in points], [p[1] for p in points], style, marker="o", label=key)
        axis.axhline(1.0, color="#444444", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("batch", fontsize=8)
        axis.set_ylabel("times eager", fontsize=8)
        axis.legend(fontsize=7)

    return Chart("batch", "Speed against eager by batch size", 3.6, draw)


def _bench(result: Result) -> list[Chart]:
    cases = [c for c in result.data["cases"] if any(v["img_per_s"] for v in c["variants"])]
    if not cases:
        return []
    names = dict.fromkeys(v["name"] for c in cases for v in c["variants"] if v["img_per_s"])
    series: dict[str, list[float | None]] = {
        name: [
            next((v["img_per_s"] for v in c["variants"] if v["name"] == name), None) for c in cases
        ]
        for name in names
    }
    options = result.data["options"]
    title = f"{options['model']}, batch {options['batch']}: images per second"

    def draw(axis: Any) -> None:
        _bars(axis, [f"{c['dtype']} {c['mode']}" for c in cases], series, "images per second")

    return [Chart("throughput", title, 1.2 + 0.17 * len(cases) * len(series), draw)]


# --- the GPU run-book -----------------------------------------------------------------------------


def _shades(series: Iterable[str]) -> Callable[[str], str]:
    """A colour for each of many: warm ones for what is ours."""
    ours, others = [], []
    for name in series:
        (ours if name.startswith((OURS, "triton", "cuda", "saved")) else others).append(name)
    found = dict(zip(ours, itertools.cycle(WARM), strict=False))
    return (found | dict(zip(others, itertools.cycle(COLD), strict=False))).__getitem__


def _gpu(result: Result) -> list[Chart]:
    """Of each stage of the file that has one."""
    found = []
    for stage, own in result.data["stages"].items():
        dry = " (DRY RUN)" if own["dry_run"] else ""
        rows = own["rows"]
        if stage == "kernels":
            of = own.get("expected", {}).get("forms", {})
            found += _gpu_kernels([r for r in rows if r.get("variants")], of, dry)
        elif stage == "memory":
            found += _gpu_memory([r for r in rows if r.get("saved")], dry)
        elif any("img/s" in r for r in rows):
            timed = [r for r in rows if "img/s" in r]
            found += [_gpu_networks(stage, timed, dry), *_gpu_batches(stage, timed, dry)]
    return found


def _gpu_kernels(
    rows: list[dict[str, Any]], expected: dict[str, dict[str, int]], dry: str
) -> list[Chart]:
    """Percent of roofline of each form of our kernels: the median over its shapes. A form of which
    not all (expected) shapes were timed says so in its name."""
    names: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        form = row["case"].removesuffix(f"/{row['where']}")
        for variant, label in (("ours", "triton"), ("fused", "triton"), ("cuda", "cuda")):
            value = row["variants"].get(variant, {}).get("percent")
            if value:
                names.setdefault(form, {}).setdefault(label, []).append(value)
    series: dict[str, list[float | None]] = {
        label: [median(v[label]) if label in v else None for v in names.values()]
        for label in ("triton", "cuda")
        if any(label in v for v in names.values())
    }
    if not series:
        return []

    def name(form: str) -> str:
        short = [
            f"{label} {counted(len(names[form].get(label, [])), of)}"
            for label, of in expected.get(form, dict.fromkeys(names[form])).items()
            if len(names[form].get(label, [])) != of
        ]
        return f"{form} (not complete: {', '.join(short)})" if short else form

    def draw(axis: Any) -> None:
        _bars(axis, list(map(name, names)), series, "percent", _shades(series))
        axis.axvline(100, color="#444444", linewidth=0.8)

    height = 1.2 + 0.14 * len(names) * len(series)
    return [
        Chart("roofline", f"Kernels in percent of roofline, median over shapes{dry}", height, draw)
    ]


def _gpu_networks(stage: str, rows: list[dict[str, Any]], dry: str) -> Chart:
    configs = list(dict.fromkeys((r["model"], r["mode"], r["batch"]) for r in rows))
    speeds = {(r["model"], r["mode"], r["batch"], r["variant"]): r["img/s"] for r in rows}
    series: dict[str, list[float | None]] = {
        name: [speeds.get((*config, name)) for config in configs]
        for name in dict.fromkeys(r["variant"] for r in rows)
    }

    def draw(axis: Any) -> None:
        names = [f"{model} {mode} n{batch}" for model, mode, batch in configs]
        _bars(axis, names, series, "images per second", _shades(series))

    height = 1.2 + 0.17 * len(configs) * len(series)
    return Chart(f"{stage}-throughput", f"{stage}: images per second{dry}", height, draw)


def _gpu_batches(stage: str, rows: list[dict[str, Any]], dry: str) -> list[Chart]:
    lines: dict[str, list[tuple[int, float, str]]] = {}
    for row in rows:
        ratio, mode = row.get("against", {}).get("eager bf16"), row["mode"]
        if ratio is not None and row["variant"].startswith(OURS):
            points = lines.setdefault(f"{row['model']} {mode} {row['variant']}", [])
            points.append((row["batch"], ratio["x"], mode))
    several = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    if not several:
        return []
    chart = _batches(several)
    title = f"{stage}: {chart.title.lower()}{dry}"
    return [Chart(f"{stage}-batch", title, chart.height, chart.draw)]


def _gpu_memory(rows: list[dict[str, Any]], dry: str) -> list[Chart]:
    if not rows:
        return []
    names = [f"{r['model']} {r['variant']} n{r['batch']}" for r in rows]
    series: dict[str, list[float | None]] = {"saved": [r["saved"] / 1e6 for r in rows]}
    if any(r["peak"] for r in rows):
        series["peak"] = [r["peak"] / 1e6 for r in rows]

    def draw(axis: Any) -> None:
        _bars(axis, names, series, "MB", _shades(series))

    title = f"Training: bytes kept for the backward, peak{dry}"
    return [Chart("memory", title, 1.2 + 0.2 * len(names) * len(series), draw)]
