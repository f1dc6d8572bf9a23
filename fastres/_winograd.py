"""3x3 convolutions of stride 1 on the CPU by Winograd's F(4x4, 3x3), forward and backward, on the
C++ kernels of csrc/cpu/winograd*: who may use them, when they pay, and the calls.

    y = A^T [ (G w G^T) . (B^T x B) ] A    for each 4x4 tile of y, summed over the input channels

36 products a tile and channel pair instead of 144; the two transforms cost passes over activations
in cache. Against float64 the error is two to three times a direct convolution's at 16 channels,
about twice at 64, and near it at 512, but for wgrad (docs/numerics.md). Everything is fp32 inside,
so bf16 results are rounded once.

A value that is not finite spreads to its whole tile. Callers take this path where that cannot be
seen: under the statistics of the batch, which spread it to the whole channel anyway, or where every
value is known to be finite. FASTRES_WINOGRAD=0 switches it off.

Source: Lavin & Gray 2016, with the points 0, +-5/8, +-3/2 and infinity."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native
from ._arguments import DTYPE, ptr

TILE = 4
PANEL = 32  # output channels of a panel of transformed weights
# Intermediate values may be this much larger than max |x| * max over outputs of sum |w|: the
# products of the largest absolute row sums of B^T, G and A^T, squared.
GROWTH = 2700.0
_DTYPES = (torch.float32, torch.bfloat16)
_CL = torch.channels_last

Geometry = Sequence[int]  # stride, padding, dilation (h, w each), groups


def why_not(what: str, shape: Sequence[int], dtype: torch.dtype, k: int, geometry: Geometry,
            taps: Sequence[int]) -> str | None:  # fmt: skip
    """None when `what` ("inference", on packed weights, "fprop", "dgrad" or "wgrad") of a conv with
    an NHWC input of this shape, K output channels and an R x S filter should run here, otherwise
    the reason."""
    if tuple(taps) != (3, 3) or tuple(geometry[:2]) != (1, 1) or tuple(geometry[4:]) != (1, 1, 1):
        return "not a 3x3 convolution of stride 1, dilation 1 and one group"
    if dtype not in _DTYPES:
        return f"{dtype} is not taken"
    if not 0 <= geometry[2] == geometry[3] <= 2:
        return f"padding {tuple(geometry[2:4])} is not taken"
    n, c, h, w = shape
    oh, ow = h + 2 * geometry[2] - 2, w + 2 * geometry[3] - 2
    if n < 1 or oh < 1 or ow < 1:
        return "no output"
    tiles = n * -(-oh // TILE) * -(-ow // TILE)
    # Measured on 2 Zen 4 cores against oneDNN (bench/results/cpu-winograd.json):
    # 1. transforms cost as much as they save for few channels, and tiles that hang over the edge
    #    are work without a result
    if c < 16 or k < 16:
        return "fewer than 16 channels"
    if n * oh * ow < 0.5 * tiles * TILE * TILE:
        return "most of each tile lies outside the image"
    # 2. training transforms the weights in every call, 4 times their size; wgrad its result
    if what != "inference" and tiles < 16:
        return "too few pixels for the transform of the weights"
    # 3. bf16: oneDNN multiplies twice as fast as in fp32, these kernels do not. What is left is a
    #    gain where the transformed weights, or sums of wgrad, are few or used on many tiles
    few, many = (256, 96) if what == "inference" else (128, 192)
    if dtype == torch.bfloat16 and (
        max(c, k) > few or (c * k > 64 * 64 and tiles < many) or matrix_unit()
    ):
        return "bf16 multiplies faster directly"
    if reason := switched_off() or _native.why_missing():
        return reason
    # 4. where channels are few wgrad is cut by the shape alone, so that these kernels' sums do not
    #    depend on the threads; not measured, as 2 threads never want for jobs
    threads = torch.get_num_threads()
    if what == "wgrad" and threads > 2:
        sizes = map(int, (n, h, w, c, k, geometry[2], threads))
        jobs = _native.module().winograd_wgrad_jobs(*sizes)
        if 2 * jobs < threads:
            return f"{jobs} jobs for {threads} threads"
    return None


def switched_off() -> str | None:
    return "FASTRES_WINOGRAD=0" if os.environ.get("FASTRES_WINOGRAD", "1") == "0" else None


@functools.lru_cache(1024)
def _runs(what, shape, dtype, k, geometry, taps, threads) -> bool:  # threads: why_not asks torch
    return why_not(what, shape, dtype, k, geometry, taps) is None


def runs(
    what: str, shape: tuple[int, ...], dtype: torch.dtype, k: int, geometry: tuple[int, ...],
    taps: tuple[int, ...],
) -> bool:  # fmt: skip
    """Whether why_not(...) is None, remembered: every conv of a step asks."""
    return switched_off() is None and _runs(
        what, shape, dtype, k, geometry, taps, torch.get_num_threads()
    )


@functools.cache
def matrix_unit() -> bool:
    """Whether the CPU has AMX, with which oneDNN multiplies bf16 16 times as fast as fp32."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """G w G^T, fp32, for `conv` on activations of a dtype; weight (K, C, 3, 3), fp32."""
    k, c = weight.shape[:2]
    u = torch.empty(-(-k // PANEL) * 36 * c * PANEL, dtype=torch.float32, device=weight.device)
    _native.module().winograd_weights(
        u.data_ptr(), weight.data_ptr(), DTYPE[dtype], k, c, *weight.stride(), False
    )
    return u


def conv(
    x: Tensor,
    u: Tensor,
    k: int,
    padding: int,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """act(conv(x, w) + bias + residual) on packed weights; `out` may be the residual."""
    return _fprop(x, u, None, False, k, padding, bias, residual, relu, out)


def fprop(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """conv(x, w); weight (K, C, 3, 3), rounded to x's dtype."""
    return _fprop(x, None, weight.float(), False, weight.shape[0], padding)


def dgrad(dy: Tensor, weight: Tensor, padding: int) -> Tensor:
    """The gradient of conv(x, w) in x."""
    return _fprop(dy, None, weight.float(), True, weight.shape[1], 2 - padding)


def wgrad(dy: Tensor, x: Tensor, padding: int) -> Tensor:
    """The gradient of conv(x, w) in w, fp32, channels_last."""
    n, c, h, w = x.shape
    shape = (dy.shape[1], c, 3, 3)
    dw = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=_CL)
    _native.module().winograd_wgrad(
        dw.data_ptr(), dy.data_ptr(), x.data_ptr(), DTYPE[x.dtype], n, h, w, c, dy.shape[1],
        padding, torch.get_num_threads(),
    )  # fmt: skip
    return dw


def _fprop(
    x: Tensor,
    u: Tensor | None,
    weight: Tensor | None,
    turned: bool,
    k: int,
    padding: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    n, c, h, w = x.shape
    if out is None:
        shape = (n, k, h + 2 * padding - 2, w + 2 * padding - 2)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_CL)
    strides = [0] * 4 if weight is None else list(weight.stride())
    if turned:  # the roles of the channels change
        strides[0], strides[1] = strides[1], strides[0]
    _native.module().winograd_fprop(
        out.data_ptr(), x.data_ptr(), ptr(u), ptr(weight), *strides, turned,
        ptr(bias), ptr(residual), relu, DTYPE[x.dtype], n, h, w, c, k, padding,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
