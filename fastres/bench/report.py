"""Results as a dict (schema below), a rich table and a JSON file.

schema_version, command, options, inputs, environment, verification: [Check.to_dict()],
cases: [{dtype, mode, batch, size, iters, best, best_malloc,
    roofline: {rung, bandwidth, rate, bytes, flops (of a batch), img_per_s} or null, variants: [
    {name, status: "ok" | "failed" | "not measured", reason, seconds: [per step, by round],
     img_per_s, vs_eager, vs_best, vs_best_malloc: {median, q1, q3} or null,
     errors, max_error, gradient_error, saved_bytes, saved_ratio, percent_of_roofline}]}]
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from fastres.bench.machine import Machine, ceiling
from fastres.bench.models import build_model
from fastres.bench.options import Case, Options
from fastres.bench.stats import best_of, speed_ratios

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA_VERSION = 1
PLAIN = ("eager", "compile")
MALLOC = ("eager+malloc", "compile+malloc")


def case_result(
    case: Case,
    options: Options,
    iters: int,
    times: dict[str, list[float]],
    reasons: dict[str, tuple[str, str]],
    errors: dict[str, Any],
    saved: dict[str, int],
) -> dict[str, Any]:
    """The result of one case. `reasons`: (status, reason) of variants without times."""
    best, best_malloc = best_of(PLAIN, times), best_of(MALLOC, times)
    rows = []
    for name in [*times, *(n for n in reasons if n not in times)]:
        seconds = times.get(name) or []
        status, reason = ("ok", None) if seconds else reasons.get(name, ("failed", "no times"))
        row: dict[str, Any] = {
            "name": name,
            "status": status,
            "reason": reason,
            "seconds": seconds,
            "img_per_s": options.batch / median(seconds) if seconds else None,
        }
        baselines = (("vs_eager", "eager"), ("vs_best", best), ("vs_best_malloc", best_malloc))
        for key, base in baselines:
            usable = seconds and base is not None and times.get(base)
            row[key] = speed_ratios(seconds, times[base]).to_dict() if usable and base else None
        row["errors"] = errors.get(name) or {}
        row["max_error"] = row["errors"].get("outputs", {}).get("max")
        row["gradient_error"] = row["errors"].get("gradients", {}).get("rms")
        row["saved_bytes"] = saved.get(name)
        row["saved_ratio"] = (
            saved[name] / saved["eager"] if name in saved and saved.get("eager") else None
        )
        rows.append(row)
    return {
        "dtype": case.dtype,
        "mode": case.mode,
        "batch": options.batch,
        "size": options.size,
        "iters": iters,
        "best": best,
        "best_malloc": best_malloc,
        "variants": rows,
    }


def add_roofline(cases: list[dict[str, Any]], options: Options, machine: Machine) -> None:
    """Adds to every case its ceiling on the machine (null when it could not be measured), and to
    every variant its img/s in percent of that."""
    net = build_model(options.model)
    for case in cases:
        roof = ceiling(net, Case(case["dtype"], case["mode"]), options, machine)
        case["roofline"] = roof
        for row in case["variants"]:
            speed = row["img_per_s"]
            percent = 100 * speed / roof["img_per_s"] if roof and speed else None
            row["percent_of_roofline"] = percent


def _percent(row: dict[str, Any]) -> str:
    value = row.get("percent_of_roofline")
    return "-" if value is None else f"{value:.0f}%"


def _ratio(value: dict[str, float] | None, quartiles: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value['median']:.2f}x"
    return f"{text} [{value['q1']:.2f}-{value['q3']:.2f}]" if quartiles else text


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _saved(row: dict[str, Any]) -> str:
    if row["saved_bytes"] is None:
        return "-"
    text = f"{row['saved_bytes'] / 1e6:,.0f} MB"
    return text if row["name"] == "eager" else f"{text} ({row['saved_ratio']:.2f}x)"


def table(result: dict[str, Any]) -> Table:
    """All cases of a result as one table with a section per case."""
    from rich.table import Table

    options = result["options"]
    drawn = Table(
        title=f"{options['model']}, batch {options['batch']}, {options['size']} px",
        title_justify="left",
    )
    drawn.add_column("case", no_wrap=True)
    drawn.add_column("variant", no_wrap=True)
    for head in (
        "img/s",
        "roof",
        "x eager [quartiles]",
        "x best",
        "x best+malloc",
        "saved",
        "max error",
        "grad error",
    ):
        drawn.add_column(head, justify="right", no_wrap=True)
    for case in result["cases"]:
        for i, row in enumerate(case["variants"]):
            label = f"{case['dtype']} {case['mode']}" if i == 0 else ""
            style = "bold" if row["name"] == "fastres" else "" if row["status"] == "ok" else "dim"
            if row["status"] != "ok":
                why = row["reason"] if row["status"] == "not measured" else "failed, see below"
                drawn.add_row(
                    label, row["name"], "-", "-", why, "-", "-", _saved(row), "-", "-", style=style
                )
                continue
            drawn.add_row(
                label,
                row["name"],
                f"{row['img_per_s']:,.1f}",
                _percent(row),
                "1.00x" if row["name"] == "eager" else _ratio(row["vs_eager"], quartiles=True),
                _ratio(row["vs_best"]),
                _ratio(row["vs_best_malloc"]),
                _saved(row),
                _error(row["max_error"]),
                _error(row["gradient_error"]),
                style=style,
            )
        drawn.add_section()
    return drawn


def notes(result: dict[str, Any]) -> list[str]:
    """Lines under the table: why rows are empty, what the columns mean."""
    lines: dict[str, list[str]] = {}
    for case in result["cases"]:
        for row in case["variants"]:
            if row["status"] == "failed":
                where = f"{case['dtype']} {case['mode']}"
                lines.setdefault(f"{row['name']}: {row['reason']}", []).append(where)
    total = len(result["cases"])
    said = [
        text if len(where) == total else f"{text} ({', '.join(where)})"
        for text, where in lines.items()
    ]
    said.append(
        "x best: against the faster of eager and compile; x best+malloc: the same, both "
        "with malloc set to reuse buffers (medians of per-round ratios)"
    )
    said.append(
        "errors are relative, against float64: the largest of the outputs, the RMS of all "
        "gradients; saved: bytes kept for backward"
    )
    said += _roofline_note(result["cases"])
    if any(case["dtype"] != "fp32" for case in result["cases"]):
        said.append("bf16 and fp16: autocast in every torch variant")
    return said


def _roofline_note(cases: list[dict[str, Any]]) -> list[str]:
    """What the roofline column is a percentage of."""
    found = [(case, case["roofline"]) for case in cases if case.get("roofline")]
    if not found:
        return []
    ceilings = ", ".join(
        f"{case['dtype']} {case['mode']} {roof['img_per_s']:,.1f} (rung {roof['rung']})"
        for case, roof in found
    )
    rates = {case["dtype"]: roof["rate"] for case, roof in found}
    speeds = ", ".join(f"{dtype} {rate / 1e12:,.2f}" for dtype, rate in rates.items())
    return [
        f"roof: percent of the img/s that fastres's kernels would reach at the copy bandwidth "
        f"({found[0][1]['bandwidth'] / 1e9:,.0f} GB/s) and matrix product rate (TFLOP/s: {speeds}) "
        f"measured in this run: {ceilings}; Winograd's algorithm on the CPU multiplies less than "
        "that counts, and may pass 100%; docs/roofline.md"
    ]


def print_result(result: dict[str, Any], console: Console, environment_line: str) -> None:
    """Table, notes, environment."""
    console.print(table(result))
    for line in notes(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(environment_line, markup=False, highlight=False, soft_wrap=True)


def jsonable(value: Any) -> Any:
    """`value` with non-finite floats as strings: JSON has none."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(result: dict[str, Any], file: str) -> None:
    """Writes `result` in one step: a reader sees the old file or the new one, never a part."""
    path = Path(file)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as out:
            json.dump(jsonable(result), out, indent=1, allow_nan=False)
            out.write("\n")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
