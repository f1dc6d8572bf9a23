"""The run-book's files as sections of docs/benchmarks.md: what each stage found, and under it the
command, the card, the versions and the commit. Read from the JSON alone."""

from __future__ import annotations

from typing import Any

from bench.gpu.numbers import (
    CONV_OPS,
    CONV_WANTED,
    RUNGS,
    STREAM_PERCENT,
    backward_sums,
    completed,
    conv_sums,
    counted,
    cudnn_counts,
    said,
    stream_shares,
    tune_counts,
)
from bench.markdown import number, percent, table

Found = dict[str, Any]
DRY = "**Dry run on the CPU: tiny shapes, no GPU. The times mean nothing.**"
DEFAULT, BEST, BEST_OF_ALL = "fastres b", "best baseline", "best baseline or graph"
FORMS = ("dy", "h", "epilogue")


def section(data: Found, name: str) -> list[str]:
    """The stages of one file, each under a heading of its own. name: below bench/results/."""
    lines = []
    for stage, found in data["stages"].items():
        lines += [f"### {TITLES.get(stage, stage)}", ""]
        if found["dry_run"]:
            lines += [DRY, ""]
        if found["status"] != "done":
            lines += [f"**{found['status']}**: {found.get('error') or 'not finished'}", ""]
        lines += RENDER[stage](found) if stage in RENDER else []
        lines += [*(f"- {note}" for note in found["notes"]), ""] if found["notes"] else []
        lines += footer(found, name)
    return lines


def footer(found: Found, name: str) -> list[str]:
    env = found["environment"]
    card = [env["device"], *(f"{k} {env[k]}" for k in ("uuid", "driver") if env.get(k))]
    names = ("torch", "cuda", "cudnn", "triton", "torchvision", "nvidia-cudnn-frontend", "python")
    versions = ", ".join(f"{n} {env[n]}" for n in names if env.get(n))
    clocks = [c for c in found["clocks"] if c]
    after = ""
    if clocks:
        c = clocks[-1]
        after = (
            f" After it: SM {c.get('clocks.sm')} MHz, memory {c.get('clocks.mem')} MHz, "
            f"{c.get('power.draw')} W of {c.get('power.limit')} W, {c.get('temperature.gpu')} C."
        )
    return [
        f"`{found['command']}`, [bench/results/{name}](../bench/results/{name}), "
        f"{env['date']}, {found['seconds']:.0f} s.{after}",
        "",
        f"{', '.join(card)}; {env['cpu']}, {env['cores']} cores; "
        f"fastres {env['fastres']} ({env['commit']}), {versions}",
        "",
    ]


def times(entry: Found | None) -> str:
    """Microseconds."""
    return "" if entry is None else f"{entry['us']:,.1f}"


def against(entry: Found | None, name: str) -> str:
    """How many times as fast as that, with quartiles."""
    r = (entry or {}).get("against", {}).get(name)
    return "" if r is None else f"{r['x']:.2f} [{r['x_q1']:.2f}-{r['x_q3']:.2f}]"


# --- checks ---------------------------------------------------------------------------------------


def build(found: Found) -> list[str]:
    how = " ".join(found.get("ran") or ["found installed"])
    return [f"fastres {'is' if found.get('installed') else 'is NOT'} installed: `{how}`.", ""]


def doctor(found: Found) -> list[str]:
    states = {
        **found.get("doctor", {}).get("backends", {}),
        "Triton convolutions": found.get("convolutions", "not known"),
        "CUDA C++ convolutions": found.get("cuda_convolutions", "not known"),
    }
    return table(["backend", "state"], [[name, why or "on"] for name, why in states.items()])


def tests(found: Found) -> list[str]:
    kinds = ("passed", "failed", "skipped")
    rows = [
        [f"`{file}`", backend, *(str(n.get(k, 0)) for k in kinds)]
        for backend, files in found.get("by_backend", {}).items()
        for file, n in sorted(files.items())
    ]
    failed = [[f"`{r['test']}`", short(r["error"])] for r in found["rows"]]
    return table(["tests", "backend", *kinds], rows) + table(["failed", "error"], failed)


def sanitizer(found: Found) -> list[str]:
    rows = [[r["tool"], str(r["errors"]), r["state"]] for r in found["rows"]]
    return table(["compute-sanitizer", "errors", "state"], rows)


def short(text: Any) -> str:
    return " ".join(str(text).split())[:200]


# --- kernels --------------------------------------------------------------------------------------


def kernels(found: Found) -> list[str]:
    rows = found["rows"]
    timed = [r for r in rows if r.get("variants")]
    if "machine" not in found:
        return []
    bandwidth = found["machine"]["bandwidth"]
    of = found.get("expected", {})
    complete = [f"{counted(len(timed), of.get('cases'))} cases were timed.", ""]
    lines = machine(found) + complete + sums(conv_sums(rows, of.get("convs", {})))
    lines += shares(stream_shares(rows, bandwidth, of.get("streams", {})))
    lines += streams([r for r in timed if r["op"] not in CONV_OPS], bandwidth)
    lines += convs([r for r in timed if r["op"] in CONV_OPS and r["op"] != "backward"])
    layers = backward_sums(rows, of.get("layers"))
    lines += backward([r for r in timed if r["op"] == "backward"], layers)
    wrong = [
        [f"`{r['case']}`", v, short(verdict.get("error"))]
        for r in rows
        for v, verdict in r["checks"].items()
        if not verdict["ok"] and "not supported" not in str(verdict.get("error"))
    ]
    failed = [[f"`{r['case']}`", v, short(e)] for r in rows for v, e in r.get("failed", {}).items()]
    return lines + table(["not timed", "variant", "why"], wrong + failed)


def machine(found: Found) -> list[str]:
    m = found.get("machine")
    if not m:
        return []
    return [
        f"Copy bandwidth {m['bandwidth'] / 1e12:.2f} TB/s, bf16 matrix products "
        f"{m['rate'] / 1e12:.0f} TFLOP/s, measured in the stage. Every variant was compared with "
        "the reference before it was timed; ratios are within rounds, quartiles in brackets.",
        "",
    ]


def sums(found: Found) -> list[str]:
    """What is asked of the Hopper convolutions."""
    vendor, passes = CONV_WANTED["vendor"], CONV_WANTED["passes"]
    rows = [
        [
            which,
            *(f"{e[k]:,.0f}" if e["convs"] else "" for k in ("cuda", "vendor", "passes")),
            said(e["x vendor"], vendor, e["convs"], e["of"]),
            said(e["x passes"], passes, e["convs"], e["of"]),
            counted(e["convs"], e["of"]),
            str(len(e["left_out"])),
        ]
        for which, e in found.items()
    ]
    head = ["CUDA C++ convolutions of ResNet-50 in training", "us", "cuDNN us", "cuDNN + passes us",
            f"x cuDNN (wanted {vendor:g})", f"x cuDNN + passes (wanted {passes:g})", "convs",
            "forms without all three times"]  # fmt: skip
    return table(head, rows)


def shares(found: Found) -> list[str]:
    rows = [
        [
            name,
            counted(e["shapes"], e["of"]),
            percent(e["median"]),
            percent(e["min"]),
            counted(e["reach"], e["of"]),
            said(e["min"], STREAM_PERCENT, e["shapes"], e["of"]),
        ]
        for name, e in sorted(found.items())
    ]
    head = ["streaming kernel", "shapes", "% of copy, median", "least", f">= {STREAM_PERCENT}%",
            f"all shapes (wanted {STREAM_PERCENT}%)"]  # fmt: skip
    return table(head, rows)


def streams(rows: list[Found], bandwidth: float) -> list[str]:
    body = []
    for r in rows:
        cells = [f"`{r['case'].removesuffix('/' + r['where'])}`", r["where"]]
        for v in ("ours", "cuda"):
            e = r["variants"].get(v)
            speed = e.get("GB/s") if e else None
            share = 100e9 * speed / bandwidth if speed else None
            cells += [times(e), number(speed, ",.0f"), percent(share)]
        body.append(cells)
    heads = [f"{who} {what}" for who in ("Triton", "CUDA C++") for what in ("us", "GB/s", "% copy")]
    return table(["streaming kernel", "shape", *heads], body)


def convs(rows: list[Found]) -> list[str]:
    body = []
    for r in rows:
        form = ", ".join(r[k] for k in FORMS if r[k] != "none")
        v = r["variants"]
        ours = [v.get(n) for n in ("fused", "cuda", "cutlass")]
        base = next((b for b in ("passes", "vendor") if b in v), "")
        body.append([
            f"`{r['op']}`", form, r["where"], str(r["c2"] or ""),
            *(times(e) for e in (*ours, v.get("passes"), v.get("vendor"))),
            *(number(e.get("TFLOP/s"), ",.0f") if e else "" for e in ours[:2]),
            *(percent(e.get("percent")) if e else "" for e in ours[:2]),
            *(against(e, base) for e in ours[:2]),
        ])  # fmt: skip
    head = ["convolution", "with", "shape", "in training", "Triton us", "CUDA C++ us", "CUTLASS us",
            "cuDNN + passes us", "cuDNN us", "Triton TFLOP/s", "CUDA C++ TFLOP/s", "Triton roof",
            "CUDA C++ roof", "Triton x cuDNN + passes (wgrad: cuDNN)",
            "CUDA C++ x cuDNN + passes (wgrad: cuDNN)"]  # fmt: skip
    return table(head, body)


def backward(rows: list[Found], totals: Found) -> list[str]:
    body = []
    for r in rows:
        v = r["variants"]
        cells = [r["where"], r["epilogue"], str(r["count"]), *(times(v.get(n)) for n in RUNGS)]
        body.append(cells + [against(v.get("c2"), "b")])
    if body:
        cells = [
            number(e["us"], ",.0f") or f"not complete: {counted(e['layers'], e['of'])}"
            for e in (totals[n] for n in RUNGS)
        ]
        body.append(["**the network**", "", "", *cells, ""])
    head = ["backward of a layer, us", "epilogue", "n", *(f"rung {n}" for n in RUNGS), "c2 x b"]
    return table(head, body)


# --- networks -------------------------------------------------------------------------------------


def _config(row: Found) -> tuple[str, str, int]:
    return row["model"], row["mode"], row["batch"]


def promises(rows: list[Found], expected: dict[str, list[str]]) -> list[str]:
    """What convert gives by itself, and the best of fastres, against the best baseline: of how many
    variants and baselines there are. expected: the variants of each "model|batch|mode"."""
    body = []
    planned = [(model, mode, int(n)) for model, n, mode in (c.split("|") for c in expected)]
    for config in dict.fromkeys([*planned, *map(_config, rows)]):
        same = [r for r in rows if _config(r) == config]
        model, mode, batch = config
        names = expected.get(f"{model}|{batch}|{mode}")
        ours = [r for r in same if r["variant"].startswith("fastres") and r.get("against")]
        best = max(ours, key=lambda r: r["img/s"], default=None)
        default = next((r for r in ours if r["variant"] == DEFAULT), None)
        body.append([
            *map(str, config), against(default, BEST) or "not measured",
            "not measured" if best is None else best["variant"],
            against(best, BEST), against(best, BEST_OF_ALL),
            *(variants_timed(same, names, who) for who in (True, False)),
        ])  # fmt: skip
    head = ["network", "mode", "batch", "convert's own choice, x best baseline",
            "fastest of fastres", "x best baseline", "x best, graphs too", "of fastres timed",
            "of baselines timed"]  # fmt: skip
    return table(head, body)


def variants_timed(rows: list[Found], names: list[str] | None, ours: bool) -> str:
    """How many of a network's variants (fastres's, or the others) have a time."""
    n = sum(r["status"] == "ok" and r["variant"].startswith("fastres") == ours for r in rows)
    return completed(
        n, None if names is None else sum(v.startswith("fastres") == ours for v in names)
    )


def networks(found: Found) -> list[str]:
    lines = machine(found) + promises(found["rows"], found.get("expected", {}))
    keys = ("eager bf16", BEST, BEST_OF_ALL)
    for config in dict.fromkeys(map(_config, found["rows"])):
        rows, reasons = [], []
        for r in (r for r in found["rows"] if _config(r) == config):
            if r["status"] != "ok":
                reasons.append(f"- {r['variant']}, {r['status']}: {short(r.get('error'))}")
                continue
            ours = r["variant"].startswith("fastres")
            best = r.get("against", {}).get(BEST, {}).get("name", "")
            rows.append([
                f"**{r['variant']}**" if ours else r["variant"], number(r["img/s"], ",.0f"),
                number(r["us"] / 1e3, ",.3f"), *(against(r, k) for k in keys), best,
                percent(r.get("percent")),
            ])  # fmt: skip
        model, mode, batch = config
        head = [f"{model}, {mode}, batch {batch}", "img/s", "ms", "x eager bf16", "x best baseline",
                "x best, graphs too", "the best", "roof"]  # fmt: skip
        lines += table(head, rows)
        lines += [*reasons, ""] if reasons else []
    return lines


def memory(found: Found) -> list[str]:
    rows = []
    n = sum("error" not in r for r in found["rows"])
    lines = [f"Measured: {completed(n, found.get('expected', {}).get('rows'))}.", ""]
    for r in found["rows"]:
        if "error" in r:
            rows.append([r["model"], r["variant"], str(r["batch"]), short(r["error"]), "", "", ""])
            continue
        saved, peak = (r[k] / r["batch"] / 1e6 for k in ("saved", "peak"))
        ours = r["variant"].startswith("fastres")
        rows.append([
            r["model"], f"**{r['variant']}**" if ours else r["variant"], str(r["batch"]),
            number(saved, ",.2f"), number(r["saved_x"], ".2f"), number(peak or None, ",.2f"),
            number(r["peak_x"], ".2f"),
        ])  # fmt: skip
    head = ["training", "variant", "batch", "saved MB/img", "x eager", "peak MB/img", "x eager"]
    return lines + table(head, rows)


# --- probes ---------------------------------------------------------------------------------------


def cudnn(found: Found) -> list[str]:
    rows = found["rows"]
    counts = cudnn_counts(rows, found.get("shapes"))
    head = ["graph", "dtype", "shapes taken", "3x3 stride 2", "tried", "time / bare conv"]
    lines = table(head, [[*line[:5], number(line[5], ".2f")] for line in counts])
    forms = list(dict.fromkeys(r["form"] for r in rows))
    shapes: dict[tuple[str, str], dict[str, str]] = {}
    for r in rows:
        s = r["shape"]
        where = f"{s['N']}x{s['C']}x{s['H']}x{s['W']}>{s['K']} {s['R']}x{s['S']} s{s['stride'][0]}"
        cell = times(r) if r["supported"] else "not tried" if r["supported"] is None else "no"
        shapes.setdefault((where, r["dtype"]), {})[r["form"]] = cell
    body = [[*key, *(cells.get(f, "") for f in forms)] for key, cells in shapes.items()]
    return lines + table(["conv", "dtype", *(f"{f} us" for f in forms)], body)


def tune(found: Found) -> list[str]:
    counts = tune_counts(found["rows"], found.get("expected", {}))
    blocks, tiled = (completed(**counts[k]) for k in ("blocks", "tiled"))
    lines = [f"Measured: {blocks}, of the network's distinct blocks; pass by pass: {tiled}.", ""]
    cells = [
        [f"`{name}`", *(counted(e[k], e["of"]) for k in ("chosen", "timed", "rejected"))]
        for name, e in counts["candidates"].items()
    ]
    lines += table(["candidate", "chosen", "timed", "rejected"], cells)
    candidates = list(dict.fromkeys(c for r in found["rows"] for c in r["ms"]))
    rows = [
        [
            f"`{r['path']}`",
            "x".join(map(str, r["shape"])),
            r["mode"],
            r["choice"],
            f"{r['ratio']:.2f}",
            *(number(r["ms"].get(c), ".4g") for c in candidates),
            "; ".join(f"{k}: {short(v)}" for k, v in r["rejected"].items()),
        ]
        for r in found["rows"]
    ]
    head = ["block", "input", "mode", "choice", "x eager", *(f"{c} ms" for c in candidates),
            "rejected"]  # fmt: skip
    return lines + table(head, rows)


RENDER = {
    "build": build,
    "doctor": doctor,
    "tests": tests,
    "sanitizer": sanitizer,
    "kernels": kernels,
    "train": networks,
    "inference": networks,
    "autotune": networks,
    "memory": memory,
    "cudnn": cudnn,
    "tune": tune,
}
TITLES = {
    "build": "Build",
    "doctor": "What works there",
    "tests": "Tests of the kernels on the GPU",
    "sanitizer": "compute-sanitizer",
    "kernels": "Kernels against roofline and cuDNN",
    "train": "Training steps",
    "inference": "Inference",
    "autotune": "Against torch.compile max-autotune",
    "memory": "Memory of training",
    "cudnn": "cuDNN's fused graphs",
    "tune": "fastres.tune",
}
