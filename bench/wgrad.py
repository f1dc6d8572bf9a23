"""`python -m bench.wgrad`: weight gradients of bf16 convolutions on the CPU, fastres's kernel
against oneDNN's convolution and, of a 1x1 filter, its matrix product: the measurement behind
fastres/_wgrad.py.

For every convolution of one group of the ResNets (bench/shapes.py) and of the CIFAR networks, in
NHWC, each from the same operands to an fp32 gradient, which oneDNN's is cast to. The variants take
turns; the ratio is the median over the rounds of the better of oneDNN's two over ours. Errors are
RMS errors against float64, relative to the RMS of the result. `chosen` is fastres's own decision,
but for what Winograd's algorithm takes first (python -m bench.winograd)."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastres import _pointwise, _wgrad
from fastres.memory import keep_buffers

from . import shapes
from .timing import in_turns
from .winograd import CIFAR, CL, rms, save

Layer = tuple[int, int, int, int, int]  # C, K, height and width of the input, R = S, stride


def layers() -> list[Layer]:
    found: dict[Layer, None] = {
        (s.C, s.K, s.H, s.R, s.stride[0]): None
        for s in (conv.shape for conv in shapes.convs())
        if s.groups == 1
    }
    for c, h in CIFAR:
        found[c, c, h, 3, 1] = None
        if c < 64:
            found[c, 2 * c, h, 3, 2] = None
    return list(found)


def cases(n: int, layer: Layer) -> tuple[dict[str, Callable[[], torch.Tensor]], torch.Tensor]:
    """(variant -> its call, the truth)."""
    c, k, h, r, s = layer
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, h, generator=g).relu().bfloat16().contiguous(memory_format=CL)
    weight = torch.empty(k, c, r, r, dtype=torch.bfloat16).contiguous(memory_format=CL)
    pad = r // 2
    out = (h + 2 * pad - r) // s + 1
    dy = torch.randn(n, k, out, out, generator=g).bfloat16().contiguous(memory_format=CL)

    def onednn(dy: Any, x: Any, w: Any) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, [s, s], [pad, pad], [1, 1], False, [0, 0], 1, [False, True, False]
        )[1]

    geometry = (s, s, pad, pad, 1, 1, 1)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: _wgrad.wgrad(dy, x, (r, r), geometry),
        "conv": lambda: onednn(dy, x, weight).float(),
    }
    if r == 1:
        calls["matmul"] = lambda: _pointwise.wgrad(dy, x, (s, s)).float()
    return calls, onednn(dy.double(), x.double(), weight.double())


def measure(n: int, layer: Layer, budget: float) -> dict[str, Any]:
    c, k, h, r, s = layer
    calls, truth = cases(n, layer)
    times = dict(zip(calls, in_turns(tuple(calls.values()), budget), strict=True))
    best = [min(turn) for turn in zip(*(times[v] for v in times if v != "ours"), strict=True)]
    mine = statistics.median(times["ours"])
    pad = r // 2
    why = _wgrad.why_not((n, c, h, h), torch.bfloat16, k, (s, s, pad, pad, 1, 1, 1), (r, r))
    return {
        "N": n, "C": c, "K": k, "H": h, "R": r, "stride": s,
        **{f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()},
        "ratio": statistics.median(a / b for a, b in zip(best, times["ours"], strict=True)),
        "gflops": 2e-9 * n * truth.numel() * ((h + 2 * pad - r) // s + 1) ** 2 / mine,
        "error": rms(calls["ours"](), truth), "conv_error": rms(calls["conv"](), truth),
        "chosen": why is None, "why_not": why,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.wgrad", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each case (0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if min(options.batch) < 1 or options.seconds <= 0:
        parser.error("--batch and --seconds must be positive")
    if reason := _wgrad.unable():
        parser.error(f"fastres's kernel does not run here: {reason}")
    todo = [(n, layer) for n in options.batch for layer in layers()]
    console = Console()
    keep_buffers()
    with torch.no_grad():
        rows = [
            measure(*case, options.seconds)
            for case in track(todo, "convolutions", console=console, transient=True)
        ]
    table = Table(title="Weight gradients in bf16: fastres against oneDNN")
    for column in ("N", "C", "K", "H", "R", "stride", "ours ms", "conv ms", "matmul ms", "ratio",
                   "GFLOP/s", "error", "conv error", "chosen"):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("N", "C", "K", "H", "R", "stride")),
            f"{row['ours_ms']:.2f}", f"{row['conv_ms']:.2f}",
            f"{row['matmul_ms']:.2f}" if "matmul_ms" in row else "-",
            f"{row['ratio']:.2f}x", f"{row['gflops']:.0f}", f"{row['error']:.1e}",
            f"{row['conv_error']:.1e}", "yes" if row["chosen"] else "no",
        )  # fmt: skip
    console.print(table)
    if options.json:
        save(options.json, "fastres-wgrad", "wgrad", argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
