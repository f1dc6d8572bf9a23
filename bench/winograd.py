"""`python -m bench.winograd`: the CPU's Winograd convolutions against oneDNN's, speed and error.

For every 3x3 convolution of stride 1 of the ResNets (bench/shapes.py) and of the CIFAR networks:
inference on packed weights with bias and ReLU, fprop, dgrad and wgrad as in training, from raw
weights. The variants take turns; the ratio is the median over the rounds. Errors are RMS errors
against float64, relative to the RMS of the result. `chosen` is fastres's own decision."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastres import _winograd
from fastres.bench import environment
from fastres.memory import keep_buffers

from . import shapes
from .session import DTYPES
from .timing import in_turns

CL = torch.channels_last
CIFAR = ((16, 32), (32, 16), (64, 8))  # channels, height and width
GEOMETRY = [1, 1, 1, 1, 1, 1, 1]


def layers() -> list[tuple[int, int, int]]:
    """(C, K, height) of the 3x3 convolutions."""
    found = {
        (s.C, s.K, s.H): None
        for s in (conv.shape for conv in shapes.convs())
        if (s.R, s.S, s.stride, s.groups) == (3, 3, (1, 1), 1)
    }
    return [*found, *((c, c, h) for c, h in CIFAR)]


def cases(n: int, c: int, k: int, h: int, dtype: torch.dtype) -> dict[str, tuple]:
    """pass -> (the vendor's call, ours, the truth)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, h, generator=g).relu().to(dtype).contiguous(memory_format=CL)
    dy = torch.randn(n, k, h, h, generator=g).to(dtype).contiguous(memory_format=CL)
    weight = (torch.randn(k, c, 3, 3, generator=g) * (2 / (9 * c)) ** 0.5).to(dtype)
    weight = weight.contiguous(memory_format=CL)
    master = weight.float()
    bias = torch.randn(k, generator=g)
    pair = [1, 1], [1, 1], [1, 1], 1
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *pair, list(x.shape))
    u = _winograd.pack(master, dtype)

    def backward(dy: Any, x: Any, w: Any, dx: bool, dw: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [dx, dw, False]
        )

    def pointwise() -> Any:
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, packed, bias, *pair, "relu", [], ""
        )

    y = torch.conv2d(x.double(), weight.double(), padding=1)
    dx, dw, _ = backward(dy.double(), x.double(), weight.double(), True, True)
    return {
        "inference": (
            pointwise,
            lambda: _winograd.conv(x, u, k, 1, bias),
            (y + bias.double().view(-1, 1, 1)).relu(),
        ),
        "fprop": (
            lambda: torch.conv2d(x, weight, padding=1),
            lambda: _winograd.fprop(x, weight, 1),
            y,
        ),
        "dgrad": (
            lambda: backward(dy, x, weight, True, False)[0],
            lambda: _winograd.dgrad(dy, weight, 1),
            dx,
        ),
        "wgrad": (
            lambda: backward(dy, x, weight, False, True)[1],
            lambda: _winograd.wgrad(dy, x, 1),
            dw,
        ),
    }


def rms(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float(((got.double() - truth).square().mean() / truth.square().mean()).sqrt())


def measure(n: int, c: int, k: int, h: int, dtype: str, budget: float) -> list[dict[str, Any]]:
    rows = []
    for name, (vendor, ours, truth) in cases(n, c, k, h, DTYPES[dtype]).items():
        theirs, mine = in_turns((vendor, ours), budget)
        why = _winograd.why_not(name, (n, c, h, h), DTYPES[dtype], k, GEOMETRY, (3, 3))
        rows.append({
            "pass": name, "dtype": dtype, "N": n, "C": c, "K": k, "H": h,
            "onednn_ms": 1e3 * statistics.median(theirs),
            "winograd_ms": 1e3 * statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(theirs, mine, strict=True)),
            "gflops": 18e-9 * n * h * h * c * k / statistics.median(mine),
            "onednn_error": rms(vendor(), truth), "winograd_error": rms(ours(), truth),
            "chosen": why is None, "why_not": why,
        })  # fmt: skip
    return rows


def save(
    path: Path, kind: str, name: str, argv: list[str] | None, rows: list[dict[str, Any]]
) -> None:
    """The rows as JSON, with the command and the machine."""
    found = {
        "schema": 1,
        "kind": kind,
        "command": " ".join([f"python -m bench.{name}", *(argv or sys.argv[1:])]),
        "environment": environment.gather("cpu", torch.get_num_threads()),
        "rows": rows,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.winograd", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1], metavar="N")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each case (0.4)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if min(options.batch) < 1 or options.seconds <= 0:
        parser.error("--batch and --seconds must be positive")
    todo = [(n, *layer, d) for d in ("fp32", "bf16") for n in options.batch for layer in layers()]
    rows: list[dict[str, Any]] = []
    console = Console()
    keep_buffers()
    with torch.no_grad():
        for case in track(todo, "convolutions", console=console, transient=True):
            rows += measure(*case, options.seconds)
    table = Table(title="3x3 convolutions of stride 1: Winograd against oneDNN")
    for column in ("pass", "dtype", "N", "C", "K", "H", "oneDNN ms", "Winograd ms", "ratio",
                   "GFLOP/s", "oneDNN error", "Winograd error", "chosen"):  # fmt: skip
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            *(str(r[key]) for key in ("pass", "dtype", "N", "C", "K", "H")),
            f"{r['onednn_ms']:.2f}", f"{r['winograd_ms']:.2f}", f"{r['ratio']:.2f}x",
            f"{r['gflops']:.0f}", f"{r['onednn_error']:.1e}", f"{r['winograd_error']:.1e}",
            "yes" if r["chosen"] else "no",
        )  # fmt: skip
    console.print(table)
    if options.json:
        save(options.json, "fastres-winograd", "winograd", argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
