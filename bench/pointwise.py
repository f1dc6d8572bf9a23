"""`python -m bench.pointwise`: 1x1 convolutions of training on the CPU, oneDNN's convolution
against its matrix product: the measurement behind fastres/_pointwise.py.

For every 1x1 convolution of ResNet-50 (bench/shapes.py): fprop, dgrad and wgrad in NHWC, from and
to plain weights. The variants take turns; the ratio is the median over the rounds. Errors are RMS
errors against float64, relative to the RMS of the result. `chosen` is fastres's own decision."""

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

from fastres import _pointwise
from fastres.memory import keep_buffers

from . import shapes
from .session import DTYPES
from .timing import in_turns
from .winograd import CL, rms, save

Layer = tuple[int, int, int, int]  # C, K, height and width of the input, stride


def layers() -> list[Layer]:
    found = {
        (s.C, s.K, s.H, s.stride[0]): None
        for s in (c.shape for c in shapes.convs() if any(m == "resnet50" for m, _ in c.users))
        if (s.R, s.S, s.groups) == (1, 1, 1)
    }
    return list(found)


def cases(n: int, c: int, k: int, h: int, s: int, dtype: torch.dtype) -> dict[str, tuple]:
    """pass -> (oneDNN's convolution, ours, the truth)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, h, generator=g).relu().to(dtype).contiguous(memory_format=CL)
    weight = (torch.randn(k, c, 1, 1, generator=g) * (2 / c) ** 0.5).to(dtype)
    weight = weight.contiguous(memory_format=CL)
    y = torch.conv2d(x.double(), weight.double(), stride=s)
    dy = torch.randn(y.shape, generator=g).to(dtype).contiguous(memory_format=CL)

    def backward(dy: Any, x: Any, w: Any, dx: bool, dw: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, [s, s], [0, 0], [1, 1], False, [0, 0], 1, [dx, dw, False]
        )

    dx, dw, _ = backward(dy.double(), x.double(), weight.double(), True, True)
    stride = s, s
    found: dict[str, tuple[Callable, Callable, torch.Tensor]] = {
        "fprop": (
            lambda: torch.conv2d(x, weight, stride=s),
            lambda: _pointwise.fprop(x, weight, stride),
            y,
        ),
        "dgrad": (
            lambda: backward(dy, x, weight, True, False)[0],
            lambda: _pointwise.dgrad(dy, weight, x.shape, stride),
            dx,
        ),
        "wgrad": (
            lambda: backward(dy, x, weight, False, True)[1],
            lambda: _pointwise.wgrad(dy, x, stride),
            dw,
        ),
    }
    return found


def measure(n: int, c: int, k: int, h: int, s: int, dtype: str, budget: float) -> list[dict]:
    rows = []
    for name, (vendor, ours, truth) in cases(n, c, k, h, s, DTYPES[dtype]).items():
        theirs, mine = in_turns((vendor, ours), budget)
        geometry = (s, s, 0, 0, 1, 1, 1)
        why = _pointwise.why_not(name, (n, c, h, h), DTYPES[dtype], k, geometry, (1, 1))
        rows.append({
            "pass": name, "dtype": dtype, "N": n, "C": c, "K": k, "H": h, "stride": s,
            "pixels": n * (-(-h // s)) ** 2,
            "conv_ms": 1e3 * statistics.median(theirs), "matmul_ms": 1e3 * statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(theirs, mine, strict=True)),
            "conv_error": rms(vendor(), truth), "matmul_error": rms(ours(), truth),
            "chosen": why is None,
        })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pointwise", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each case (0.25)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if min(options.batch) < 1 or options.seconds <= 0:
        parser.error("--batch and --seconds must be positive")
    todo = [(n, *layer, d) for d in ("bf16", "fp32") for n in options.batch for layer in layers()]
    rows: list[dict[str, Any]] = []
    console = Console()
    keep_buffers()
    with torch.no_grad():
        for case in track(todo, "convolutions", console=console, transient=True):
            rows += measure(*case, options.seconds)
    table = Table(title="1x1 convolutions of training: matrix product against convolution")
    for column in ("pass", "dtype", "N", "C", "K", "H", "stride", "pixels", "conv ms", "matmul ms",
                   "ratio", "conv error", "matmul error", "chosen"):  # fmt: skip
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            *(str(r[key]) for key in ("pass", "dtype", "N", "C", "K", "H", "stride", "pixels")),
            f"{r['conv_ms']:.2f}", f"{r['matmul_ms']:.2f}", f"{r['ratio']:.2f}x",
            f"{r['conv_error']:.1e}", f"{r['matmul_error']:.1e}", "yes" if r["chosen"] else "no",
        )  # fmt: skip
    console.print(table)
    if options.json:
        save(options.json, "fastres-pointwise", "pointwise", argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
