"""`python -m bench.small_blocks`: from which size on a fused block trains faster on the CPU than
the original: the measurement behind fastres/_heuristic.py.

A training step (forward, backward, no optimiser) of a block with an identity shortcut, eager and on
rung b, malloc kept for both; the variants take turns, the ratio is the median over the rounds.
`chosen` is what fastres does untuned."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres import _heuristic
from fastres._chosen import _unmeasured
from fastres.memory import keep_buffers

from .session import DTYPES
from .timing import in_turns
from .winograd import save

# kind, channels inside, height and width; the CIFAR networks' stages, then torchvision's
BLOCKS = (
    ("basic", 16, 32), ("basic", 32, 16), ("basic", 64, 8),
    ("basic", 64, 56), ("basic", 128, 28), ("basic", 256, 14), ("basic", 512, 7),
    ("bottleneck", 64, 56), ("bottleneck", 128, 28), ("bottleneck", 256, 14),
    ("bottleneck", 512, 7),
)  # fmt: skip


def cases(batches: list[int]) -> list[tuple[str, int, int, int, str]]:
    """(kind, channels, height, batch, dtype); the small images in larger batches."""
    return [
        (kind, c, h, n * (4 if h * c == 512 else 1), dtype)
        for dtype in ("bf16", "fp32")
        for n in batches
        for kind, c, h in BLOCKS
    ]


def measure(kind: str, c: int, h: int, n: int, dtype: str, budget: float) -> dict[str, Any]:
    torch.manual_seed(0)
    block: nn.Module = BasicBlock(c, c) if kind == "basic" else Bottleneck(4 * c, c)
    block = block.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inner = nn.Sequential(copy.deepcopy(block))
    fused = fastres.convert(inner, fusion="b")
    low = dtype != "fp32"
    width = c if kind == "basic" else 4 * c
    x = torch.randn(n, width, h, h).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    dz = torch.randn_like(x)
    x.requires_grad_()

    def step(model: nn.Module) -> None:
        with torch.autocast("cpu", DTYPES[dtype], enabled=low):
            z = model(x)
        z.backward(dz)
        x.grad = None
        model.zero_grad(set_to_none=True)

    eager, ours = in_turns((lambda: step(block), lambda: step(fused)), budget)
    with torch.autocast("cpu", DTYPES[dtype], enabled=low):
        choice, why = _unmeasured(fused[0], x, True)
    outputs = 2 * c if kind == "basic" else 6 * c
    return {
        "block": kind, "C": c, "H": h, "N": n, "dtype": dtype,
        "outputs": n * outputs * h * h,
        "eager_ms": 1e3 * statistics.median(eager), "fused_ms": 1e3 * statistics.median(ours),
        "ratio": statistics.median(a / b for a, b in zip(eager, ours, strict=True)),
        "chosen": choice, "why": why,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.small_blocks", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each case (0.6)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if min(options.batch) < 1 or options.seconds <= 0:
        parser.error("--batch and --seconds must be positive")
    console = Console()
    keep_buffers()
    rows = [
        measure(*case, options.seconds)
        for case in track(cases(options.batch), "blocks", console=console, transient=True)
    ]
    limit = f"{_heuristic.SMALL / 1e6:.2f} million outputs"
    table = Table(title=f"Training a block on the CPU, fused against eager; small: {limit}")
    for column in ("block", "C", "H", "N", "dtype", "outputs, M", "eager ms", "fused ms", "ratio",
                   "chosen"):  # fmt: skip
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            *(str(r[key]) for key in ("block", "C", "H", "N", "dtype")),
            f"{r['outputs'] / 1e6:.2f}", f"{r['eager_ms']:.2f}", f"{r['fused_ms']:.2f}",
            f"{r['ratio']:.2f}x", r["chosen"],
        )  # fmt: skip
    console.print(table)
    if options.json:
        save(options.json, "fastres-small-blocks", "small_blocks", argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
