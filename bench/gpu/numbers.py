"""What the issues ask of a card, from the rows of the run-book's stages."""

from __future__ import annotations

import statistics
from typing import Any

CONV_OPS = ("fprop", "dgrad", "wgrad", "dgrad_wgrad", "backward")
RUNGS = ("b", "c1", "c2", "d")
STREAM_PERCENT = 92  # of copy bandwidth, wanted of every streaming kernel
CONV_WANTED = {"vendor": 0.95, "passes": 1.2}  # how many times as fast the C++ convs are to be


def conv_sums(rows: list[dict]) -> dict[str, dict[str, Any]]:
    """Pass by pass, and of all three, the network's convs in training on rung c2: microseconds of
    the CUDA C++ kernels, of the vendor's bare convs, and of those with the passes that they need
    (wgrad finds dy and h in memory: none); how many times as fast the first is as each. A conv
    without all three times is in no sum, but among `left_out` (one that the kernels do not take, as
    of images; one that was not timed)."""
    names = ("cuda", "vendor", "passes")
    sums: dict[str, dict[str, Any]] = {}
    for which in ("fprop", "dgrad", "wgrad"):
        entry: dict[str, Any] = {**dict.fromkeys(names, 0.0), "convs": 0, "left_out": []}
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
    sums["all"] = {**every, "left_out": [c for e in sums.values() for c in e["left_out"]]}
    for entry in sums.values():
        for v in names[1:]:
            entry[f"x {v}"] = entry[v] / entry["cuda"] if entry["cuda"] else None
    return sums


def backward_sums(rows: list[dict]) -> dict[str, float | None]:
    """Microseconds of the network's backward by rung; None where a layer of it was not timed."""
    totals: dict[str, float | None] = dict.fromkeys(RUNGS, 0.0)
    for row in (r for r in rows if r["op"] == "backward"):
        us = {v: e["us"] for v, e in row.get("variants", {}).items()}
        for v in RUNGS:
            taken = us.get(v, us.get("c2") if v == "d" else None)  # d runs as c2 but for 1x1
            total = totals[v]
            totals[v] = None if taken is None or total is None else total + taken * row["count"]
    return totals


def stream_shares(rows: list[dict], bandwidth: float) -> dict[str, dict[str, Any]]:
    """Of each streaming kernel, ours in Triton and in C++: percent of the measured copy bandwidth
    over its shapes, and how many of them reach STREAM_PERCENT."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for v, name in (("ours", "triton"), ("cuda", "cuda")):
            entry = row.get("variants", {}).get(v, {})
            if row["op"] not in CONV_OPS and "GB/s" in entry:
                share = 100 * entry["GB/s"] * 1e9 / bandwidth
                found.setdefault(f"{row['op']} ({name})", []).append(share)
    return {
        name: {
            "shapes": len(shares), "min": min(shares), "median": statistics.median(shares),
            "reach": sum(s >= STREAM_PERCENT for s in shares),
        }
        for name, shares in found.items()
    }  # fmt: skip


def cudnn_counts(rows: list[dict[str, Any]]) -> list[tuple]:
    """The table's lines: how many of the shapes that were tried each form takes."""
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
            f"{sum(r['supported'] for r in down)}/{len(down)}",
            1 / statistics.median(ratios) if ratios else None,
        ))  # fmt: skip
    return lines
