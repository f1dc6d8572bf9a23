"""Weight gradients of bf16 convolutions on the CPU, on the C++ kernel of csrc/cpu/conv_wgrad.cpp:
who may use it, when it pays, and the call.

    dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] x[n, p', q', c],
    p' = p stride - padding + r dilation, q' likewise of s

oneDNN brings both activations into its own layout, sums there in fp32, brings dw back out of it,
and rounds it to bf16, from which a training step casts it to the fp32 of the weight. This kernel
copies both into pairs of images, which any filter and stride leaves whole, and writes dw as it was
summed: fp32, channels_last, as a channels_last weight is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, backends
from ._layout import is_nhwc
from ._winograd import matrix_unit

_CL = torch.channels_last


def why_not(shape: Sequence[int], dtype: torch.dtype, k: int, geometry: Sequence[int],
            taps: Sequence[int]) -> str | None:  # fmt: skip
    """None when the weight gradient of a conv with an NHWC input of this shape, K output channels
    and an R x S filter should run here, otherwise the reason."""
    if dtype != torch.bfloat16:
        return f"{dtype} is not taken"
    if geometry[6] != 1:
        return "more than one group"
    n, c, *_ = shape
    # Measured on 2 Zen 4 cores against oneDNN's convolution and matrix product
    # (bench/results/cpu-wgrad.json); vectors run along C, and half of the last pair of an odd
    # batch is 0
    if c < 16:
        return "fewer than 16 input channels"
    if n % 2 and n < 8:
        return "a small odd batch leaves too much of its pairs empty"
    if reason := unable():
        return reason
    # a part of the pixels, or a tile of the weights, is one thread's; not measured, as 2 threads
    # never want for them
    threads = torch.get_num_threads()
    if threads > 2:
        jobs = _native.module().conv_wgrad_jobs(*_sizes(shape, k, geometry, taps))
        if 2 * jobs < threads:
            return f"{jobs} jobs for {threads} threads"
    return None


@functools.cache
def unable() -> str | None:
    """Why no weight gradient runs here on this machine."""
    if reason := _native.why_missing():
        return reason
    if not _native.module().conv_wgrad_runs():
        return "no AVX512_BF16 on this CPU, or not in what FASTRES_CPU_ISA asks for"
    if matrix_unit():
        return "bf16 multiplies faster on the matrix unit"
    return None


def _sizes(
    shape: Sequence[int], k: int, geometry: Sequence[int], taps: Sequence[int]
) -> tuple[Any, ...]:
    """n, h, w, c, k, output, filter, stride, padding, dilation as the kernel takes them."""
    n, c, h, w = map(int, shape)
    pairs = [tuple(map(int, geometry[i : i + 2])) for i in (0, 2, 4)]
    out = tuple(
        (size + 2 * p - d * (r - 1) - 1) // s + 1
        for size, r, s, p, d in zip((h, w), taps, *pairs, strict=True)
    )
    return n, h, w, c, int(k), out, tuple(taps), *pairs


@functools.lru_cache(1024)
def _runs(shape, dtype, k, geometry, taps, threads) -> bool:  # threads: why_not asks torch
    return why_not(shape, dtype, k, geometry, taps) is None


def runs(dy: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int]) -> bool:
    """Whether this conv's weight gradient runs here; remembered, every conv of a step asks."""
    if type(x) is not Tensor or not (x.is_cpu and is_nhwc(x)) or dy.dtype != x.dtype:
        return False
    if x.is_contiguous():  # one pixel: torch's gradient is laid out as the weight is
        return False
    if backends.forced() not in (None, "cpu"):
        return False
    k, _, *taps = weight.shape
    call = x.shape, x.dtype, k, tuple(geometry), tuple(taps), torch.get_num_threads()
    return unable() is None and _runs(*call)


def wgrad(dy: Tensor, x: Tensor, taps: Sequence[int], geometry: Sequence[int]) -> Tensor:
    """The gradient of conv(x, w) in w (K, C, R, S), fp32, channels_last; dy and x NHWC."""
    k, c = dy.shape[1], x.shape[1]
    dw = torch.empty((k, c, *taps), dtype=torch.float32, device=x.device, memory_format=_CL)
    _native.module().conv_wgrad(
        dw.data_ptr(), dy.data_ptr(), x.data_ptr(), *_sizes(x.shape, k, geometry, taps)
    )
    return dw
