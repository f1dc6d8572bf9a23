"""Stage `kernels`: every streaming kernel and every fused convolution on the layers of ResNet-50,
checked, then timed against the vendor's convolution, the passes it spares, and the roofline.

Workers check and compile side by side; a case that crashes or differs is not timed."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu import cases as lib
from bench.gpu.cases import Case, Set
from bench.gpu.device import Device, Shot, one_line, ratio, summary, table, take_turns
from bench.gpu.networks import DRY_SIZE, SIZE, network
from bench.gpu.numbers import (
    CONV_WANTED,
    RUNGS,
    STREAM_PERCENT,
    STREAM_VARIANTS,
    backward_sums,
    conv_sums,
    counted,
    said,
    stream_shares,
)
from bench.gpu.pool import parallel_workers, run_jobs
from bench.gpu.record import Record
from bench.gpu.work import flops, moved
from fastres.roofline import ConvShape

DTYPE, NAME = torch.bfloat16, "bf16"
ROUNDS = 7
SHOT_SECONDS = 1e-3
JOB_SECONDS = 60.0
# Against the reference backend, which computes in fp32 from the same bf16 operands and rounds once:
# rms errors of a stored tensor are under a bf16 rounding (2^-9 of the value) twice; sums add them
# up. A wrong formula or index is off by about 1.
RMS_LIMIT, MAX_LIMIT, BITS_LIMIT = 6e-3, 5e-2, 2e-3
# whose kernel a variant is
LABELS = {"ours": "triton", "fused": "triton", "cuda": "cuda", "cutlass": "cutlass"}
HOPPER = ("cuda", "cutlass")  # variants
GEMM = 8192
COPY_BYTES = 1 << 30


@functools.cache
def all_cases(dry: bool) -> tuple[Case, ...]:
    net = network("resnet50", dry).to("meta")
    shape = (2, 3, DRY_SIZE, DRY_SIZE) if dry else (256, 3, SIZE, SIZE)
    streams, convs = lib.stream_cases(net, shape, NAME), lib.conv_cases(net, shape, NAME)
    if dry:
        streams, convs = lib.thinned(streams), lib.thinned(convs)
    convs.sort(key=_worth)
    return tuple(lib.unique([*streams, *convs]))


def _worth(case: Case) -> int:
    """What there may be no time for comes last: first the convs of the sums that the issues ask
    for, then a layer's whole backward by rung, then the forms of other rungs and of inference."""
    if case.op == "backward":
        return 1
    return 0 if case.c2 else 2


def expected(cases: Sequence[Case]) -> dict[str, Any]:
    """How many cases each verdict and each sum is over when all were timed: of the streaming
    kernels, of the convs in training that the C++ kernels take by their shapes, of the layers'
    backward, and of what has a percent of roofline, by op and by form."""
    streams: Counter[str] = Counter()
    convs = dict.fromkeys(("fprop", "dgrad", "wgrad"), 0)
    ops: Counter[str] = Counter()
    forms: dict[str, Counter[str]] = {}
    for case in cases:
        taken = {v: name for v, name in LABELS.items() if v not in HOPPER or _shape_fits(case)}
        if not isinstance(case.shape, ConvShape):
            streams.update(f"{case.op} ({who})" for who in STREAM_VARIANTS.values())
        elif case.op in convs and "cuda" in taken:
            convs[case.op] += case.c2
        for v in lib.variants(case):
            if v in taken and moved(case, v, NAME) is not None:
                ops[label(case.op, v)] += 1
                if v != "cutlass":
                    forms.setdefault(form(case), Counter())[LABELS[v]] += 1
    layers = sum(c.count for c in cases if c.op == "backward")
    return {
        "cases": len(cases), "streams": dict(streams), "convs": convs, "layers": layers,
        "roofline": dict(ops), "forms": {k: dict(v) for k, v in forms.items()},
    }  # fmt: skip


def _shape_fits(case: Case) -> bool:
    """Whether the C++ kernels take the case on a card that they serve."""
    s = case.shape
    if not isinstance(s, ConvShape):
        return True
    from fastres import _cuda

    x, w = (
        torch.empty(size, dtype=DTYPE, device="meta", memory_format=torch.channels_last)
        for size in (s.x, (s.K, s.C // s.groups, s.R, s.S))
    )
    geometry = [*s.stride, *s.padding, *s.dilation, s.groups]
    return _cuda.conv_why_not(x, w, geometry) is None


def form(case: Case) -> str:
    return case.name.removesuffix(f"/{case.where}")


def label(op: str, variant: str) -> str:
    """Of a kernel in the table of rooflines."""
    return op if LABELS[variant] == "triton" else f"{op} ({variant})"


def _module() -> Any:
    import fastres.kernels

    return fastres.kernels


def why_not(case: Case, variant: str, s: Set) -> str | None:
    """Why our kernels do not take a case; None when they do."""
    m, hopper = _module(), variant in HOPPER
    if hopper:
        from fastres import _cuda as m

        reason = m.why_missing()
        if reason is None and "w" in s:
            reason = m.conv_missing(s["x"].device)
        if reason is not None or "w" not in s:
            return reason
    elif variant not in ("fused", "c1", "c2", "d"):
        return None
    args = s["x"], s["w"], s["geometry"]
    reason = m.conv_why_not(*args)
    if reason is None and (case.op == "dgrad_wgrad" or variant == "d"):
        reason = m.conv_bwd_pointwise_why_not(*args, False)
    ends = case.h in ("norm_add_relu", "dual_add_relu") and (hopper or variant == "fused")
    if reason is None and ends and not s["shape"].pointwise:
        reason = "the block's end needs a 1x1 of stride 1"
    return reason


def run_job(device: Device, name: str) -> dict[str, Any]:
    """Every variant of a case against the reference backend: {"variants": {name: verdict}}."""
    from fastres import _reference_backend as reference

    case = next(c for c in all_cases(device.dry) if c.name == name)
    s = lib.operands(case, lib.Maker(device.torch, DTYPE, 1))
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        want = lib.outputs(case, s)
        lib.truth(case)(reference, Set(s | want))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    verdicts: dict[str, Any] = {}
    for variant, run in lib.variants(case).items():
        reason = why_not(case, variant, s)
        if reason is not None:
            verdicts[variant] = {"ok": False, "error": f"not supported: {reason}"}
            continue
        try:
            mine = Set(s | lib.outputs(case, s))
            run(_module(), mine)
            device.timer.synchronize()
            names = lib.compared(case, variant, list(want))
            verdicts[variant] = judge({n: (mine[n], want[n]) for n in names})
            del mine
        except Exception as error:
            verdicts[variant] = {"ok": False, "error": one_line(error)}
            if device.broken() is not None:
                return {"variants": verdicts}
    del s, want
    device.empty()
    return {"variants": verdicts}


def judge(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Largest errors over the outputs, and whether they are within the limits."""
    worst: dict[str, float] = {}
    wrong = []
    for name, (got, want) in pairs.items():
        if got.dtype == torch.uint8:
            found = {"bits": float((got != want).float().mean())}
        else:
            g, w = got.float(), want.float()
            d = g - w
            found = {
                "rms": float(d.norm() / w.norm().clamp_min(1e-20)),
                "max": float(d.abs().max() / w.abs().max().clamp_min(1e-20)),
            }
        limits = {"bits": BITS_LIMIT, "rms": RMS_LIMIT, "max": MAX_LIMIT}
        for kind, value in found.items():
            if not value <= limits[kind]:  # NaN, too
                wrong.append(f"{name}: {kind} error {value:.2g} > {limits[kind]:g}")
            so_far = worst.setdefault(kind, 0.0)
            if not (math.isnan(so_far) or value <= so_far):  # max() would lose a NaN
                worst[kind] = value
    verdict: dict[str, Any] = {"ok": not wrong, "errors": worst}
    return verdict if not wrong else verdict | {"error": "wrong: " + "; ".join(wrong)}


def machine(device: Device) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and bf16 FLOP/s, on random data."""
    size, side = (1 << 16, 64) if device.dry else (COPY_BYTES, GEMM)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device.torch).to(DTYPE) for _ in range(2))
    out = torch.empty_like(a)
    shots = {
        "copy": device.timer.shot([lambda: target.copy_(source)], 5e-3),
        "gemm": device.timer.shot([lambda: torch.mm(a, b, out=out)], 5e-3),
    }
    times = take_turns(shots, ROUNDS)
    return {
        "bandwidth": 2 * size / statistics.median(times["copy"]),
        "rate": 2 * side**3 / statistics.median(times["gemm"]),
    }


def check(device: Device, record: Record, names: list[str]) -> dict[str, dict[str, Any]]:
    """Verdicts of the workers; those that ran out of memory side by side are asked again alone."""
    workers = parallel_workers(device.dry, 12)
    half = 0.5 * record.time_left()
    found = run_jobs("kernels", names, device.dry, workers, JOB_SECONDS, half)
    short = [n for n, answer in found.items() if "OutOfMemory" in json.dumps(answer)]
    if short:
        found |= run_jobs("kernels", short, device.dry, 1, JOB_SECONDS, 0.2 * record.time_left())
    return found


def run(device: Device, record: Record) -> None:
    kept = {row["case"] for row in record.keep(lambda row: bool(row.get("variants")))}
    found = machine(device)
    record.set(machine=found, dtype=NAME, expected=expected(all_cases(device.dry)))
    print(f"copy {found['bandwidth'] / 1e12:.3g} TB/s, matmul {found['rate'] / 1e12:.4g} TFLOP/s")
    todo = [case for case in all_cases(device.dry) if case.name not in kept]
    checked = check(device, record, [c.name for c in todo])
    missing = 0
    for case in todo:
        answer = checked.get(case.name, {"ok": False, "error": "not checked"})
        verdicts = answer.get("variants") or {
            v: {"ok": False, "error": answer.get("error")} for v in lib.variants(case)
        }
        row: dict[str, Any] = {
            "case": case.name, "op": case.op, "dy": case.dy, "h": case.h, "where": case.where,
            "epilogue": case.epilogue, "path": case.path, "count": case.count, "c2": case.c2,
            "checks": verdicts,
        }  # fmt: skip
        good = [v for v, verdict in verdicts.items() if verdict["ok"]]
        late = any("no time left" in str(v.get("error")) for v in verdicts.values())
        if record.time_left() < 0 or late:
            missing += 1
        if record.time_left() >= 0 and good:
            try:
                row |= measure(device, case, good, found)
            except Exception as error:
                row["error"] = one_line(error)
        record.add(**row)
        device.empty()
        broken = device.broken()
        if broken is not None:
            raise RuntimeError(f"{case.name} left the device unusable: {broken}")
    if missing:
        record.unfinished(f"{missing} of {len(todo)} cases were not timed: no time left")
    record.set(machine_after=machine(device))
    show(record)


def measure(device: Device, case: Case, good: list[str], found: dict[str, float]) -> dict[str, Any]:
    """Times of the variants that were right, in turns."""
    first = lib.operands(case, lib.Maker(device.torch, DTYPE, 1))
    first |= lib.outputs(case, first)
    sets = [first]
    for _ in range(device.sets(first.bytes()) - 1):
        sets.append(Set({k: _copy(v) for k, v in first.items()}))
    m, runs = _module(), lib.variants(case)
    shots: dict[str, Shot] = {}
    failed: dict[str, str] = {}
    for v in good:
        # a set of its own: a vendor's op rebinds its outputs, and a graph keeps none alive
        calls = [functools.partial(runs[v], m, Set(s)) for s in sets]
        try:
            shots[v] = device.timer.shot(calls, SHOT_SECONDS)
        except Exception as error:
            failed[v] = one_line(error)
            if device.broken() is not None:
                raise
    times = take_turns(shots, 1 if device.dry else ROUNDS)
    base = next((v for v in ("b", "passes", "vendor") if v in shots), None)
    variants: dict[str, Any] = {}
    for v, seconds in times.items():
        entry: dict[str, Any] = {**summary(seconds), "method": shots[v].method}
        kernel = moved(case, v, NAME)
        if kernel is not None:
            median = entry["us"] / 1e6
            least = max(kernel.bytes / found["bandwidth"], kernel.flops / found["rate"])
            entry |= {
                "bytes": kernel.bytes, "flops": kernel.flops, "GB/s": kernel.bytes / median / 1e9,
                "TFLOP/s": kernel.flops / median / 1e12, "percent": 100 * least / median,
            }  # fmt: skip
        elif (count := flops(case, v, NAME)) is not None:  # bytes: of several kernels
            entry |= {"flops": count, "TFLOP/s": count / entry["us"] / 1e6}
        if base is not None and v != base:
            entry["against"] = {base: ratio(seconds, times[base])}
        variants[v] = entry
    return {"variants": variants, "sets": len(sets), "failed": failed}


def _copy(value: Any) -> Any:
    """Another copy of the large operands; per-channel vectors and the weight's shape are shared."""
    return value.clone() if isinstance(value, Tensor) else value


def show(record: Record) -> None:
    """Best and worst of each kernel, and what each rung's backward adds up to."""
    groups: dict[str, list[dict]] = {}
    wrong = []
    for row in record.rows:
        for v, verdict in row["checks"].items():
            if not verdict["ok"] and "not supported" not in str(verdict.get("error")):
                wrong.append((row["case"], v, str(verdict.get("error"))[:90]))
        for v, entry in row.get("variants", {}).items():
            if v in LABELS and "percent" in entry:
                groups.setdefault(label(row["op"], v), []).append(entry)
    lines = []
    of = record.found["expected"]["roofline"]
    for op, found in groups.items():
        percents = [f["percent"] for f in found]
        best = [f["against"][b]["x"] for f in found for b in f.get("against", {})]
        lines.append((
            op, counted(len(found), of.get(op)), statistics.median(percents), min(percents),
            max(percents),
            statistics.median(f["GB/s"] for f in found),
            statistics.median(f["TFLOP/s"] for f in found),
            statistics.median(best) if best else None,
        ))  # fmt: skip
    heads = ("kernel", "cases", "% roof", "min", "max", "GB/s", "TFLOP/s", "x passes or vendor")
    table("kernels: percent of roofline (medians over cases)", heads, lines)
    show_backward(record)
    show_numbers(record)
    if wrong:
        table("NOT timed", ("case", "variant", "why"), wrong[:40])
    else:
        print("  every variant was right", flush=True)


def show_backward(record: Record) -> None:
    """The layers' whole backward on each rung: the choice between fused and vendor."""
    lines = []
    for row in record.rows:
        if row["op"] != "backward" or "variants" not in row:
            continue
        us = {v: row["variants"][v]["us"] for v in row["variants"]}
        best = min(us, key=lambda v: us[v]) if us else None
        times = [us.get(v) for v in RUNGS]
        lines.append((row["where"], row["epilogue"], row["count"], *times, best))
    heads = ("layer", "epilogue", "n", *RUNGS, "best")
    table("backward of each layer, microseconds", heads, lines)
    totals = backward_sums(record.rows, record.found["expected"]["layers"])
    record.set(backward_us=totals)
    text = ", ".join(
        f"{v} {t['us']:.0f} us"
        if t["us"]
        else f"{v} not complete ({counted(t['layers'], t['of'])})"
        for v, t in totals.items()
    )
    print(f"  all layers of the network: {text}", flush=True)


def show_numbers(record: Record) -> None:
    """What the issue of the CUDA C++ kernels asks of them."""
    of = record.found["expected"]
    sums = conv_sums(record.rows, of["convs"])
    bandwidth = record.found["machine"]["bandwidth"]
    shares = stream_shares(record.rows, bandwidth, of["streams"])
    record.set(conv_sum_us=sums, stream_copy_percent=shares)
    keys = ("cuda", "vendor", "passes")
    lines = [
        (
            name, *(e[k] for k in keys),
            *(said(e[f"x {k}"], x, e["convs"], e["of"]) for k, x in CONV_WANTED.items()),
            len(e["left_out"]),
        )
        for name, e in sums.items()
    ]  # fmt: skip
    heads = ("pass", *keys, *(f"x {k}" for k in CONV_WANTED), "left out")
    wanted = ", ".join(f"{x:g} x {name}" for name, x in CONV_WANTED.items())
    table(f"CUDA C++ convs, microseconds; wanted: {wanted}", heads, lines)
    lines = [
        (
            name, counted(e["shapes"], e["of"]), e["median"], e["reach"],
            said(e["min"], STREAM_PERCENT, e["shapes"], e["of"]),
        )
        for name, e in shares.items()
    ]  # fmt: skip
    heads = ("kernel", "shapes", "median", f">= {STREAM_PERCENT}%", "min")
    table("streaming kernels: percent of copy bandwidth", heads, lines)
