"""GB/s of every CPU kernel on ResNet-50 block shapes, next to memcpy on the same threads.

    python bench/cpu_kernels.py [--batch 8] [--threads 2] [--json FILE] [--dtypes fp32,bf16]

Bytes are what the formula must move: tensors read and written once, plus 1 bit an element for a
mask. Buffers rotate, so that together they exceed the last-level cache; the copy moves as many
bytes as the kernel and rotates likewise. Calls of kernel and copy are timed one by one and
alternate; the best of each counts (the median, in the JSON, says the same on an idle machine and
nothing on a shared one)."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

import fastres._cpu as k
from fastres._layout import mask_shape

SHAPES = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
STEM = (64, 112)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
ROTATE_BYTES = 96 << 20  # three times this machine's last-level cache


class Buffers:
    """One set of operands of a shape."""

    def __init__(self, shape, dtype, layout):
        def new(s=shape):
            return torch.randn(s).to(dtype).contiguous(memory_format=layout)

        n, c, h, w = shape
        self.x, self.r, self.dz = new(), new(), new()
        self.out, self.out2 = torch.empty_like(self.x), torch.empty_like(self.x)
        self.mask = torch.randint(0, 256, mask_shape(self.x), dtype=torch.uint8)
        self.v = [torch.rand(c) + 0.5 for _ in range(12)]
        half = (n, c, (h + 1) // 2, (w + 1) // 2)
        self.z, self.dzp = new(half), new(half)
        self.index = torch.randint(0, 9, half, dtype=torch.uint8).contiguous(memory_format=layout)


# name -> (call, tensors of x's size moved, masks moved, pooled tensors moved, index bytes moved)
def kernels(stem: bool):
    none5 = (None,) * 5
    if stem:
        return {
            "bn_relu_maxpool": (
                lambda b: k.bn_relu_maxpool(b.z, b.index, b.x, *b.v[:4], 3, 2, 1), 1, 0, 1, 1),
            "pool_bwd_reduce": (
                lambda b: k.bn_relu_maxpool_bwd_reduce(
                    b.v[4], b.v[5], b.dzp, b.index, b.x, *b.v[:2], 3, 2, 1), 1, 0, 1, 1),
            "pool_bwd_apply": (
                lambda b: k.bn_relu_maxpool_bwd_apply(
                    b.out, b.dzp, b.index, b.x, *b.v[:5], 3, 2, 1, True), 2, 0, 1, 1),
        }  # fmt: skip
    return {
        "bn_stats": (lambda b: k.bn_stats(*b.v[:3], b.x, 1e-5), 1, 0, 0, 0),
        "bn_relu": (lambda b: k.bn_apply(b.out, b.mask, b.x, *b.v[:4], *none5, True), 2, 1, 0, 0),
        "bn_add_relu": (
            lambda b: k.bn_apply(b.out, b.mask, b.x, *b.v[:4], b.r, *none5[:4], True), 3, 1, 0, 0),
        "bn_bn_add_relu": (
            lambda b: k.bn_apply(b.out, b.mask, b.x, *b.v[:4], b.r, *b.v[4:8], True), 3, 1, 0, 0),
        "bwd_reduce recompute": (
            lambda b: k.bn_bwd_reduce(
                b.v[4], b.v[5], None, b.dz, None, b.x, *b.v[:4], *none5[:3], "recompute"),
            2, 0, 0, 0),
        "bwd_reduce mask": (
            lambda b: k.bn_bwd_reduce(
                b.v[4], b.v[5], None, b.dz, b.mask, b.x, *b.v[:4], *none5[:3], "mask"), 2, 1, 0, 0),
        "bwd_reduce mask dual": (
            lambda b: k.bn_bwd_reduce(
                b.v[4], b.v[5], b.v[6], b.dz, b.mask, b.x, *b.v[:4], b.r, *b.v[7:9], "mask"),
            3, 1, 0, 0),
        "bwd_apply recompute": (
            lambda b: k.bn_bwd_apply(
                b.out, None, b.dz, None, b.x, *b.v[:6], *none5, "recompute", True, False),
            3, 0, 0, 0),
        "bwd_apply mask": (
            lambda b: k.bn_bwd_apply(
                b.out, None, b.dz, b.mask, b.x, *b.v[:6], *none5, "mask", True, False), 3, 1, 0, 0),
        "bwd_apply mask dres": (
            lambda b: k.bn_bwd_apply(
                b.out, b.out2, b.dz, b.mask, b.x, *b.v[:6], *none5, "mask", True, False),
            4, 1, 0, 0),
        "bwd_apply mask dual": (
            lambda b: k.bn_bwd_apply(
                b.out, b.out2, b.dz, b.mask, b.x, *b.v[:6], b.r, *b.v[6:10], "mask", True, True),
            5, 1, 0, 0),
        "add_relu": (lambda b: k.add_relu(b.out, b.mask, b.x, b.r), 3, 1, 0, 0),
        "relu_bwd": (lambda b: k.relu_bwd(b.out, None, b.dz, b.mask), 2, 1, 0, 0),
        "relu_bwd dy": (lambda b: k.relu_bwd(b.out, b.r, b.dz, b.mask), 3, 1, 0, 0),
    }  # fmt: skip


def clock(call, sets) -> list[float]:
    """Seconds of each call, for one round of the sets."""
    times = []
    for s in sets:
        start = time.perf_counter()
        call(s)
        times.append(time.perf_counter() - start)
    return times


def measure(shape, dtype, layout, stem, seconds, only):
    count = shape[0] * shape[1] * shape[2] * shape[3]
    size = count * torch.empty((), dtype=dtype).element_size()
    sets = [Buffers(shape, dtype, layout) for _ in range(max(2, -(-ROTATE_BYTES // (4 * size))))]
    copies = {}
    rows = []
    for name, (call, tensors, masks, pooled, index) in kernels(stem).items():
        if only not in name:
            continue
        moved = tensors * size + masks * count // 8 + pooled * size // 4 + index * count // 4
        if moved not in copies:
            half = moved // 2 // 4 * 4
            rounds = max(2, -(-ROTATE_BYTES // moved))
            copies[moved] = [
                (torch.ones(half // 4), torch.ones(half // 4), half) for _ in range(rounds)
            ]
        copy = copies[moved]
        kernel_times, copy_times = [], []
        clock(call, sets)
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or len(kernel_times) < 5 * len(sets):
            kernel_times += clock(call, sets)
            copy_times += clock(lambda t: k._C.copy(t[0].data_ptr(), t[1].data_ptr(), t[2]), copy)
        rows.append(
            {
                "kernel": name,
                "us": round(min(kernel_times) * 1e6, 1),
                "median_us": round(statistics.median(kernel_times) * 1e6, 1),
                "gb_s": round(moved / min(kernel_times) / 1e9, 1),
                "copy_gb_s": round(moved / min(copy_times) / 1e9, 1),
            }
        )
        copies.clear()
    return rows


def overhead_us() -> float:
    """Microseconds of one adapter call on a tensor too small to matter."""
    b = Buffers((1, 16, 2, 2), torch.float32, torch.channels_last)
    call = kernels(False)["bwd_apply mask dual"][0]
    return min(clock(lambda _: call(b), range(2000))) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--layouts", default="nhwc")
    parser.add_argument("--shapes", default="", help="for example 256x56,64x112; default all")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.3, help="per kernel and shape")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",") if s]
    print(f"isa {k._C.isa()}, {args.threads} threads, call overhead {overhead_us():.1f} us")
    head = f"{'shape':>16} {'dtype':>5} {'kernel':<22} {'us':>8}"
    print(head, f"{'GB/s':>6} {'copy':>6} {'ratio':>6}")
    results = []
    chosen = shapes or [*SHAPES, STEM]
    for (c, s), dtype, layout in itertools.product(
        chosen, args.dtypes.split(","), args.layouts.split(",")
    ):
        shape = (args.batch, c, s, s)
        stem = (c, s) == STEM
        for row in measure(shape, DTYPES[dtype], LAYOUTS[layout], stem, args.seconds, args.only):
            results.append({"shape": list(shape), "dtype": dtype, "layout": layout} | row)
            ratio = row["gb_s"] / row["copy_gb_s"]
            print(
                f"{'x'.join(map(str, shape)):>16} {dtype:>5} {row['kernel']:<22} {row['us']:8.1f} "
                f"{row['gb_s']:6.1f} {row['copy_gb_s']:6.1f} {ratio:6.2f}"
            )
    if args.json:
        facts = {
            "isa": k._C.isa(),
            "threads": args.threads,
            "torch": torch.__version__,
            "build": json.loads(k._C.build_info),
        }
        args.json.write_text(json.dumps(facts | {"rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
