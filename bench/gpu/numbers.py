"""What the issues ask of a card, from the rows of the run-book's stages."""

from __future__ import annotations

import statistics
from typing import Any

CONV_OPS = ("fprop", "dgrad", "wgrad", "dgrad_wgrad", "backward")
RUNGS = ("b", "c1", "c2", "d")
STREAM_PERCENT = 92  # of copy bandwidth, wanted of every streaming kernel
STREAM_VARIANTS = {"ours": "triton", "cuda": "cuda"}
SINGLE = ", single passes"
CONV_WANTED = {"vendor": 0.95, "passes": 1.2}  # how many times as fast the C++ convs are to be


def said(value: float | None, least: float, n: int, of: int | None) -> str:
    """A number beside what was asked of it, which is answered over all expected cases only."""
    if not n or value is None:
        return "not measured"
    if n != of:
        return f"{value:.3g}, not complete: {counted(n, of)}"
    return f"{value:.3g}, {'reached' if value >= least else 'NOT reached'}"


def counted(n: int, of: int | None) -> str:
    return f"{n} of {'an unknown number' if of is None else of}"


def completed(n: int, of: int | None) -> str:
    """So many of so many, and whether that is all."""
    return counted(n, of) + ("" if n == of else ", not complete")


def conv_sums(rows: list[dict], expected: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Pass by pass, and of all three, the network's convs in training on rung c2: microseconds of
    the CUDA C++ kernels, of the vendor's bare convs, and of those with the passes that they need
    (wgrad finds dy and h in memory: none); how many times as fast the first is as each. A conv
    without all three times is in no sum, but among `left_out` (one that the kernels do not take, as
    of images; one that was not timed). `convs` are summed, `of` so many that the kernels take."""
    names = ("cuda", "vendor", "passes")
    sums: dict[str, dict[str, Any]] = {}
    for which in ("fprop", "dgrad", "wgrad"):
        entry: dict[str, Any] = {**dict.fromkeys(names, 0.0), "convs": 0, "left_out": []}
        entry["of"] = expected.get(which)
        for row in (r for r in rows if r["op"] == which and r.get("c2")):
            us = {v: e["us"] for v, e in row.get("variants", {}).items()}
            if which == "wgrad" and "vendor" in us:
                us["passes"] = us["vendor"]
            if not us.keys() >= set(names):
                entry["left_out"].append(row["case"])
                continue
            entry["convs"] += row["c2"]
            for v in names:
                entry[v] += us[v] * row["c2"]
        sums[which] = entry
    every = {v: sum(e[v] for e in sums.values()) for v in (*names, "convs")}
    of = [e["of"] for e in sums.values()]
    sums["all"] = {
        **every, "of": None if None in of else sum(of),
        "left_out": [c for e in sums.values() for c in e["left_out"]],
    }  # fmt: skip
    for entry in sums.values():
        for v in names[1:]:
            entry[f"x {v}"] = entry[v] / entry["cuda"] if entry["cuda"] else None
    return sums


def backward_sums(rows: list[dict], of: int | None) -> dict[str, dict[str, Any]]:
    """Of each rung the network's backward: microseconds (`us`; None where a layer of it was not
    timed), and of how many of its layers there is a time."""
    totals: dict[str, dict[str, Any]] = {v: {"us": 0.0, "layers": 0, "of": of} for v in RUNGS}
    for row in (r for r in rows if r["op"] == "backward"):
        us = {v: e["us"] for v, e in row.get("variants", {}).items()}
        for v in RUNGS:
            taken = us.get(v, us.get("c2") if v == "d" else None)  # d runs as c2 but for 1x1
            if taken is not None:
                totals[v]["us"] += taken * row["count"]
                totals[v]["layers"] += row["count"]
    for total in totals.values():
        if total["layers"] != of:
            total["us"] = None
    return totals


def stream_shares(
    rows: list[dict], bandwidth: float, expected: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Of each streaming kernel, ours in Triton and in C++: percent of the measured copy bandwidth
    over its shapes, how many of them reach STREAM_PERCENT, and `of` how many there are."""
    found: dict[str, list[float]] = {name: [] for name in expected}
    for row in rows:
        for v, who in STREAM_VARIANTS.items():
            entry = row.get("variants", {}).get(v, {})
            if row["op"] not in CONV_OPS and "GB/s" in entry:
                share = 100 * entry["GB/s"] * 1e9 / bandwidth
                found.setdefault(f"{row['op']} ({who})", []).append(share)
    return {
        name: {
            "shapes": len(shares), "of": expected.get(name), "min": min(shares, default=None),
            "median": statistics.median(shares) if shares else None,
            "reach": sum(s >= STREAM_PERCENT for s in shares),
        }
        for name, shares in found.items()
    }  # fmt: skip


def cudnn_counts(rows: list[dict[str, Any]], shapes: int | None) -> list[tuple]:
    """The table's lines: how many of the shapes that were tried each form takes, and how many of
    all of them were tried."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["form"], row["dtype"]), []).append(row)
    lines = []
    for (form, name), found in groups.items():
        tried = [r for r in found if r["supported"] is not None]
        good = [r for r in tried if r["supported"]]
        down = [r for r in tried if r["shape"]["R"] == 3 and r["shape"]["stride"][0] == 2]
        ratios = [r["against conv"]["x"] for r in good if "against conv" in r]
        lines.append((
            form, name, f"{len(good)}/{len(tried)}",
            f"{sum(r['supported'] for r in down)}/{len(down)}", counted(len(tried), shapes),
            1 / statistics.median(ratios) if ratios else None,
        ))  # fmt: skip
    return lines


def tune_counts(rows: list[dict[str, Any]], expected: dict[str, int]) -> dict[str, Any]:
    """Of how many of the network's distinct blocks (`blocks`), and of those that are tried pass by
    pass (`tiled`), there is a measurement; of each candidate in how many of them it was chosen,
    timed and rejected. What is tried of single passes is one candidate for each rung."""
    tiled = [r for r in rows if r.get("per_conv")]
    candidates: dict[str, dict[str, Any]] = {}
    for row in rows:
        sets = ("chosen", [row["choice"]]), ("timed", row["ms"]), ("rejected", row["rejected"])
        for what, names in sets:
            for name in dict.fromkeys(_whole(n) for n in names):
                of = expected.get("tiled" if name.endswith(SINGLE) else "blocks")
                none = {"chosen": 0, "timed": 0, "rejected": 0, "of": of}
                candidates.setdefault(name, none)[what] += 1
    return {
        "blocks": {"n": len(rows), "of": expected.get("blocks")},
        "tiled": {"n": len(tiled), "of": expected.get("tiled")},
        "candidates": dict(sorted(candidates.items())),
    }


def _whole(candidate: str) -> str:
    """A candidate, or the rung whose single passes it changes."""
    return candidate.split()[0] + SINGLE if "." in candidate else candidate
