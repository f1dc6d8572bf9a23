"""What the pointwise kernels of csrc/cuda should take on an H200, by arithmetic: nothing measured.

    python -m bench.pointwise_model          # the table
    python -m bench.pointwise_model --write  # into docs/cuda.md

For each 1x1, stride 1 conv of ResNet-50 (bf16, channels_last, batch 256) the time of a pass is the
largest of four: bytes of memory, bytes of L2 into the SMs (tiles of columns read their rows again),
tensor cores, and the issue slots of the prologue. Beside it the vendor's conv with the passes it
needs around it, by its bytes of memory and FLOPs alone, which favours it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cuda.md"
BEGIN, END = "<!-- bench.pointwise_model: begin -->\n", "<!-- end -->\n"

BATCH = 256
MEMORY, L2, FLOPS = 4.3e12, 5.5e12, 790e12  # reached of an H200's; a second
SMS, CLOCK, SCHEDULERS = 132, 1.7e9, 4
TILE, DEPTH = 128, 16  # rows of a tile; of a wgmma's reduction
# Instructions of a warp for a 16-deep slice of its 16 rows: fprop 8 elements of 6, their vectors
# and ldmatrix; dgrad reads y too, gates and has 4 vectors; wgrad's in-place x, 70 a box and step.
ISSUE = {"fprop": 70, "dgrad": 110, "wgrad": 110}
ISSUE_X = 70 / 4

# (input channels, output channels, height) and how often, of ResNet-50
LAYERS = {
    (64, 64, 56): 1, (256, 64, 56): 2, (64, 256, 56): 4,
    (256, 128, 56): 1, (512, 128, 28): 3, (128, 512, 28): 4,
    (512, 256, 28): 1, (1024, 256, 14): 5, (256, 1024, 14): 6,
    (1024, 512, 14): 1, (2048, 512, 7): 2, (512, 2048, 7): 3,
}  # fmt: skip


@dataclass(frozen=True)
class Pass:
    memory: float  # bytes
    l2: float
    flops: float
    slots: float  # of a scheduler, over all SMs
    vendor: float  # bytes of the vendor's conv and the passes around it

    @property
    def times(self) -> dict[str, float]:
        """Microseconds, by what bounds."""
        return {
            "memory": self.memory / MEMORY * 1e6,
            "L2": self.l2 / L2 * 1e6,
            "wgmma": self.flops / FLOPS * 1e6,
            "issue": self.slots / SMS / CLOCK * 1e6,
        }

    @property
    def vendor_time(self) -> float:
        return max(self.vendor / MEMORY, self.flops / FLOPS) * 1e6


def columns(width: int, most: int) -> int:
    """tile_columns() of csrc/cuda/pointwise.cu."""
    n = 64
    while n < most and n < width:
        n *= 2
    return n


def fprop(c: int, k: int, h: int) -> Pass:
    """relu(normalise(x)) in, statistics out. Vendor: apply x -> h, conv, statistics of y."""
    m = BATCH * h * h
    x, y, w = (2.0 * v for v in (m * c, m * k, c * k))
    tiles = math.ceil(k / columns(k, 256))
    slots = ISSUE["fprop"] * m / DEPTH * math.ceil(c / DEPTH) * tiles / SCHEDULERS
    return Pass(x + y + w, x * tiles + w * SMS / tiles, 2.0 * m * c * k, slots, 3 * x + 2 * y + w)


def dgrad(c: int, k: int, h: int) -> Pass:
    """From the gradient behind y's batch norm to x's, gated, with its sums. Vendor: apply
    g, y -> dy; conv; sums of dx and the previous y."""
    m = BATCH * h * h
    x, y, w = (2.0 * v for v in (m * c, m * k, c * k))
    tiles = math.ceil(c / columns(c, 128))
    slots = ISSUE["dgrad"] * m / DEPTH * math.ceil(k / DEPTH) * tiles / SCHEDULERS
    reads = 2 * y * tiles + w * SMS / tiles + x
    return Pass(2 * y + 2 * x + w, reads, 2.0 * m * c * k, slots, 4 * y + 3 * x + w)


def wgrad(c: int, k: int, h: int) -> Pass:
    """dy and h formed on the way. Vendor: it has both in memory from other passes."""
    m = BATCH * h * h
    x, y, w = (2.0 * v for v in (m * c, m * k, c * k))
    n = columns(c, 256)
    across, down = math.ceil(c / n), math.ceil(k / TILE)
    splits = max(1, SMS // (across * down))
    partials = 2 * 4.0 * splits * c * k
    issue = ISSUE["wgrad"] + ISSUE_X * n / 64
    # a warp forms 16 channels of dy at 16 pixels a slice; 8 of a tile's 128
    slots = issue * 8 * (m / DEPTH) * across * down / SCHEDULERS
    reads = 2 * y * across + x * down + partials
    return Pass(2 * y + x + w + partials, reads, 2.0 * m * c * k, slots, y + x + w)


PASSES = {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}


def table() -> str:
    head = ["C", "K", "H", "x"]
    for name in PASSES:
        head += [f"{name}: MB", "GFLOP", "us, by", "vendor us"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    total: dict[str, list[float]] = {name: [0.0, 0.0] for name in PASSES}
    for (c, k, h), times in LAYERS.items():
        row = [str(c), str(k), str(h), str(times)]
        for name, model in PASSES.items():
            p = model(c, k, h)
            by = max(p.times, key=lambda v: p.times[v])
            row += [f"{p.memory / 1e6:.0f}", f"{p.flops / 1e9:.0f}", f"{p.times[by]:.0f} {by}",
                    f"{p.vendor_time:.0f}"]  # fmt: skip
            total[name][0] += times * p.times[by]
            total[name][1] += times * p.vendor_time
        lines.append("| " + " | ".join(row) + " |")
    row = ["all", "", "", str(sum(LAYERS.values()))]
    for ours, vendor in total.values():
        row += ["", "", f"{ours:.0f}", f"{vendor:.0f}"]
    lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """docs/cuda.md with the table of today."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(table())
