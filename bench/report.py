"""python -m bench.report: renders docs/benchmarks.md and its charts from the JSON files under
bench/results/, and from nothing else. The same files give the same text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fastres.bench.environment import one_line

from . import charts
from .gpu import page as gpu_page
from .markdown import number, percent, ratio, table
from .results import OURS, Result, Unreadable, bench_cases, incomplete, load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
OMITTED = "## Files not rendered"
CHARTS = "benchmarks"  # the folder of the charts, beside the page

HEAD = """# Benchmarks

Rendered by `fastres bench --report` from the JSON files under `bench/results/`, and from nothing else; do not edit.
How the numbers are made: [benchmarking.md](benchmarking.md). A ratio is how many times faster fastres is than that baseline, the
median over rounds in which all variants took turns, with its quartiles in brackets. roof: percent of what the kernels' bytes and FLOPs allow on
that machine ([roofline.md](roofline.md)). saved: bytes kept for the backward.
"""  # noqa: E501
TORCH = ("eager", "compile", "compile max-autotune")  # PyTorch's own baselines
SUITES = (
    ("network", "Networks"),
    ("block", "Residual blocks"),
    ("op", "Ops"),
    ("kernel", "Kernels"),
)


# --- fastres bench --------------------------------------------------------------------------------


def bench_section(result: Result) -> list[str]:
    """One table: every variant of every case."""
    rows = []
    reasons: dict[str, None] = {}
    for _, case in bench_cases(result.data):
        for v in case["variants"]:
            if v["status"] != "ok":
                where = f"{v['name']}, {case['mode']} {case['dtype']}"
                reasons[f"{where}: {v['reason']}"] = None
                continue
            name = f"**{v['name']}**" if v["name"] == OURS else v["name"]
            saved = v.get("saved_bytes")
            rows.append(
                [
                    f"{case['dtype']} {case['mode']}",
                    name,
                    number(v["img_per_s"]),
                    "" if v["name"] == "eager" else ratio(v["vs_eager"]),
                    ratio(v["vs_best"]),
                    percent(v.get("percent_of_roofline")),
                    "" if saved is None else f"{saved / 1e6:,.0f} MB",
                    "" if v["max_error"] is None else f"{v['max_error']:.1e}",
                ]
            )
    options = result.data["options"]
    passed = sum(1 for row in result.data["verification"] if row["passed"])
    lines = [
        f"{options['model']}, batch {options['batch']}, {options['size']} px. "
        f"{passed} of {len(result.data['verification'])} checks against float64 pass.",
        "",
        *table(
            ["case", "variant", "img/s", "x eager", "x best of eager, compile", "roof", "saved",
             "max error"],
            rows,
        ),
    ]  # fmt: skip
    if reasons:
        lines += ["Not timed: " + "; ".join(reasons) + ".", ""]
    return lines


# --- pytest bench/ --------------------------------------------------------------------------------


def _baselines(rows: list[dict[str, Any]]) -> list[str]:
    return list(
        dict.fromkeys(b["name"] for row in rows for b in row["baselines"] if b["ratio"] is not None)
    )


def suite_table(suite: str, rows: list[dict[str, Any]]) -> list[str]:
    """One table: a line a case, a column a baseline."""
    names = _baselines(rows)
    images = suite == "network"
    head = [
        {"network": "network", "block": "block", "op": "op", "kernel": "kernel"}[suite],
        "shape", "mode", "dtype", "batch", "rung", "img/s" if images else "time",
        "GB/s", "TFLOP/s", "roof", *(f"x {name}" for name in names), "saved", "x eager's saved",
    ]  # fmt: skip
    body = []
    for row in rows:
        ratios = {b["name"]: b["ratio"] for b in row["baselines"]}
        seconds, saved = row["seconds"], row["saved_bytes"]
        took = f"{seconds * 1e6:,.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms"
        batch = str(row["batch"])
        if row["batch"] != row["asked_batch"]:
            batch += f" (of {row['asked_batch']}: out of memory)"
        body.append(
            [
                f"`{row['name']}`",
                row["shape"],
                "" if row["mode"] == "kernel" else row["mode"],
                row["dtype"],
                batch,
                "" if images else row["rung"] or "",
                number(row["img_per_s"]) if images else took,
                "" if images else number(row["gb_s"]),
                number(row["tflop_s"], ".3f"),
                percent(row["percent_of_roofline"]),
                *(ratio(ratios.get(name)) for name in names),
                "" if saved is None else f"{saved / 1e6:,.1f} MB",
                number(row["saved_ratio"], ".2f"),
            ]
        )
    return table(head, body)


def standing(rows: list[dict[str, Any]]) -> str:
    """Of networks: how much faster than the faster of PyTorch's own ways."""
    worst: dict[str, float] = {}
    compiled = 0
    for row in rows:
        found = {b["name"]: b["ratio"]["median"] for b in row["baselines"] if b["ratio"]}
        mine = {name: found[name] for name in TORCH if name in found}
        compiled += len(mine) > 1
        if mine:
            worst[f"{row['name']} {row['mode']} {row['dtype']} batch {row['batch']}"] = min(
                mine.values()
            )
    if not worst:
        return "No case has a baseline."
    least = min(worst, key=lambda name: worst[name])
    return (
        f"Against the faster of eager and torch.compile (timed in {compiled} of {len(rows)}): "
        f"geometric mean {geometric_mean(worst.values()):.2f}x, "
        f"least {worst[least]:.2f}x ({least}), "
        f"{sum(r >= 1 for r in worst.values())} of {len(worst)} at 1.0x or more."
    )


def suites_section(result: Result) -> list[str]:
    """A table for each suite that the file has, and what it lacks."""
    own, rows = result.data["fastres"], result.rows()
    lines = []
    rates = ", ".join(f"{d} {r / 1e12:.2f}" for d, r in sorted(own["machine"]["rate"].items()))
    if own["options"].get("tiny"):
        lines += ["**Tiny shapes (`--tiny`): the times mean nothing.**", ""]
    lines += [
        f"Copy bandwidth {own['machine']['bandwidth'] / 1e9:,.0f} GB/s, matrix products TFLOP/s: "
        f"{rates}. Every case was checked against float64 before it was timed.",
        "",
    ]
    left = [
        f"{suite} {n['of'] - n['run']}" for suite, n in own["cases"].items() if n["of"] > n["run"]
    ]
    for suite, title in SUITES:
        found = [row for row in rows if row["suite"] == suite]
        if found:
            lines += [f"### {title}", "", *suite_table(suite, found)]
            lines += [standing(found), ""] if suite == "network" else []
    failed: dict[str, int] = {}
    for row in rows:
        for b in row["baselines"]:
            if b["status"] == "failed":
                why = f"{b['name']} failed: {b['reason']}"
                failed[why] = failed.get(why, 0) + 1
    lines += [f"- {why} ({n} cases)" for why, n in failed.items()]
    lines += [f"- {text}" for text in own["halved"]]
    if left:
        lines.append(f"- cases that `--full` adds: {', '.join(left)}")
    return [*lines, ""] if lines[-1] else lines


# --- the page -------------------------------------------------------------------------------------


def section(result: Result, name: str) -> list[str]:
    """A result's tables, and where they come from."""
    if result.kind == "gpu":  # each of its stages says that for itself
        return gpu_page.section(result.data, name)
    return [
        *(bench_section(result) if result.kind == "bench" else suites_section(result)),
        f"`{result.command}`, [bench/results/{name}](../bench/results/{name})",
        "",
        one_line(result.environment),
        "",
    ]


def render(results: Path) -> tuple[str, dict[str, charts.Chart]]:
    """The page, and its charts by file name."""
    lines: list[str] = [HEAD]
    omitted: dict[tuple[str, str], list[str]] = {}
    drawn: dict[str, charts.Chart] = {}
    for file in sorted(results.rglob("*.json")):
        name = file.relative_to(results).as_posix()
        stem = name.removesuffix(".json").replace("/", "-")
        try:
            result = load(file)
            try:
                pictures = {f"{stem}-{chart.name}.png": chart for chart in charts.of(result)}
                tables = section(result, name)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise incomplete(error) from error
        except Unreadable as error:
            folder = (Path("bench/results") / name).parent.as_posix()
            omitted.setdefault((folder, str(error)), []).append(file.name)
            continue
        drawn |= pictures
        lines += [f"## {stem}", ""]
        for picture, chart in pictures.items():
            lines += [f"![{chart.title}]({CHARTS}/{picture})", ""]
        lines += tables
    if len(lines) == 1:
        lines += ["There are no results yet.", ""]
    if omitted:
        lines += [OMITTED, ""]
        for (folder, why), names in omitted.items():
            lines.append(f"- `{folder}/`: {', '.join(f'`{n}`' for n in names)}: {why}")
        lines.append("")
    return "\n".join(lines), drawn


def write(results: Path = RESULTS, page: Path = PAGE) -> tuple[int, list[str]]:
    """Writes the page and its charts, removes charts of results that are gone; how many results
    were rendered, and the files written."""
    text, drawn = render(results)
    folder = page.parent / CHARTS
    part = page.with_name(f".{page.name}.part")
    try:
        part.write_text(text)
        part.replace(page)
    finally:
        part.unlink(missing_ok=True)
    if drawn:
        folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        if old.name not in drawn:
            old.unlink()
    for name, chart in drawn.items():
        chart.save(folder / name)
    return text.count("\n## ") - text.count(f"\n{OMITTED}"), [page.name, *drawn]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        print(f"bench.report: error: there is no folder '{args.results}'", file=sys.stderr)
        return 2
    try:
        count, files = write(args.results, args.page)
    except OSError as error:
        print(
            f"bench.report: error: '{error.filename or args.page}' cannot be written: "
            f"{error.strerror}",
            file=sys.stderr,
        )
        return 2
    print(f"wrote {args.page} from {count} result files, with {len(files) - 1} charts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
