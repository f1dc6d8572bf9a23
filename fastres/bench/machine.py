"""What the machine can do, for the roofline: copy bandwidth and matrix product rate, and the
ceiling that fastres.roofline derives from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastres.bench.options import Case, Options

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of the source: past any cache
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
SECONDS = 0.2  # of each measurement


def measure(device: str, dtype: str, seconds: float = SECONDS) -> dict[str, float]:
    """Copy bandwidth (bytes read + written a second) and the FLOP/s of a square matrix product in
    dtype: the best of the runs that fit into `seconds` each, 3 at least."""
    import torch

    from fastres._tf32 import conv_tf32
    from fastres.bench.engines import DTYPES

    def best(call: Callable[[], Any]) -> float:
        least, runs, end = float("inf"), 0, time.perf_counter() + seconds
        while runs < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            least, runs = min(least, time.perf_counter() - start), runs + 1
        return least

    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / best(lambda: target.copy_(source))
    side = GEMM_SIDE[device]
    a = torch.ones((side, side), dtype=DTYPES[dtype], device=device)
    product = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    if device == "cuda" and conv_tf32():
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's fp32 convolutions
    rate = 2 * side**3 / best(lambda: torch.mm(a, a, out=product))
    torch.set_float32_matmul_precision(before)
    return {"bandwidth": bandwidth, "rate": rate}


class Machine:
    """The best bandwidth, and the best rate of each dtype, of all measurements of a run: taken
    before and after the timing of each case, since machines drift."""

    def __init__(self) -> None:
        self.bandwidth = 0.0
        self.rate: dict[str, float] = {}

    def add(self, dtype: str, measured: dict[str, float]) -> None:
        self.bandwidth = max(self.bandwidth, measured["bandwidth"])
        self.rate[dtype] = max(self.rate.get(dtype, 0.0), measured["rate"])


def ceiling(net: Any, case: Case, options: Options, machine: Machine) -> dict[str, Any] | None:
    """The roofline of a case, None when the machine was not measured: of the rung that fastres runs
    on the device (docs/roofline.md).

    Training is rung b; inference is folded on the CPU, and one pass after each conv on a GPU."""
    from fastres import roofline

    if case.dtype not in machine.rate:
        return None
    training = case.mode == "train"
    rung = "b" if training or options.device == "cuda" else "folded"
    shape = (options.batch, 3, options.size, options.size)
    found = roofline.model(net, shape, case.dtype, rung, training, options.model)
    bandwidth, rate = machine.bandwidth, machine.rate[case.dtype]
    return {
        "rung": rung,
        "bandwidth": bandwidth,
        "rate": rate,
        "bytes": found.bytes,
        "flops": found.flops,
        "img_per_s": found.ceiling(bandwidth, rate),
    }
