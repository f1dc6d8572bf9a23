"""1x1 convolutions on the CPU as matrix products: oneDNN's matmul on channels_last activations.

    y = x W^T,   dx = dy W,   dW = dy^T x    on x (N*OH*OW, C), y (N*OH*OW, K), W (K, C)

oneDNN's convolutions bring the weights into a blocked layout and dW back out of one in every call
of a training step, in a time that grows with C*K alone; its matmul reads them as they are. With few
pixels, or for the gradient of a large weight, the matmul is up to 4 times as fast
(bench/results/cpu-pointwise.json, by `python -m bench.pointwise`). Inference runs on prepacked
weights and has nothing to gain.

The numbers are those of a convolution: the same products, fp32 sums, one rounding; a value that is
not finite stays with its pixel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from ._layout import is_nhwc
from ._winograd import matrix_unit

_CL = torch.channels_last


def why_not(what: str, shape: Sequence[int], dtype: torch.dtype, k: int, geometry: Sequence[int],
            taps: Sequence[int]) -> str | None:  # fmt: skip
    """None when `what` ("fprop", "dgrad" or "wgrad") of a training conv with an NHWC input of this
    shape, K output channels and an R x S filter should run here, otherwise the reason."""
    sh, sw, ph, pw, *_, groups = geometry
    if tuple(taps) != (1, 1) or (ph, pw, groups) != (0, 0, 1):
        return "not a 1x1 convolution of one group without padding"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} is not taken"
    n, c, h, w = shape
    pixels = n * ((h - 1) // sh + 1) * ((w - 1) // sw + 1)
    # Measured on 2 Zen 4 cores, see above. A CPU with AMX, and one without AVX-512, whose bf16
    # matmul is not oneDNN's, were not.
    if dtype == torch.bfloat16:
        if not _fast_bf16():
            return "bf16 matrix products were not measured on this CPU"
        few = {"fprop": 400, "dgrad": 1024, "wgrad": 1024}[what]
        if what == "wgrad" and c * k >= 1 << 18:
            few = 4096
        if what == "dgrad" and (sh, sw) != (1, 1) and c * k < 1 << 20:
            few = 0  # setting the rest of dx to 0 takes what the product saves
    else:
        few = {"fprop": 100, "dgrad": 0, "wgrad": 800}[what]
    return None if pixels <= few else "the convolution is as fast"


@functools.cache
def _fast_bf16() -> bool:
    if matrix_unit() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.lru_cache(1024)
def _runs(what, shape, dtype, k, geometry, taps) -> bool:
    return why_not(what, shape, dtype, k, geometry, taps) is None


def runs(what: str, x: Tensor, weight: Tensor, geometry: Sequence[int]) -> bool:
    """Whether this pass of a conv runs here; remembered, every conv of a step asks."""
    k, _, r, s = weight.shape
    if (r, s) != (1, 1) or type(x) is not Tensor or not (x.is_cpu and is_nhwc(x)):
        return False
    if backends.forced() not in (None, "cpu") or not torch._C._get_mkldnn_enabled():
        return False
    return _runs(what, x.shape, x.dtype, k, tuple(geometry), (1, 1))


def _rows(x: Tensor) -> Tensor:
    """(N*H*W, C), a view of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[:2])


def fprop(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """conv(x, w), channels_last; weight (K, C, 1, 1) in x's dtype."""
    x = x[:, :, :: stride[0], :: stride[1]]
    n, _, h, w = x.shape
    y = torch.empty((n, weight.shape[0], h, w), dtype=x.dtype, device=x.device, memory_format=_CL)
    torch.mm(_rows(x), _matrix(weight).t(), out=_rows(y))
    return y


def dgrad(dy: Tensor, weight: Tensor, shape: Sequence[int], stride: tuple[int, int]) -> Tensor:
    """The gradient of conv(x, w) in x, of this shape, channels_last."""
    if tuple(stride) == (1, 1):
        dx = torch.empty(tuple(shape), dtype=dy.dtype, device=dy.device, memory_format=_CL)
        torch.mm(_rows(dy), _matrix(weight), out=_rows(dx))
        return dx
    dx = torch.zeros(tuple(shape), dtype=dy.dtype, device=dy.device).contiguous(memory_format=_CL)
    dx[:, :, :: stride[0], :: stride[1]] = dgrad(
        dy, weight, (dy.shape[0], weight.shape[1], *dy.shape[2:]), (1, 1)
    )
    return dx


def wgrad(dy: Tensor, x: Tensor, stride: tuple[int, int]) -> Tensor:
    """The gradient of conv(x, w) in w, (K, C, 1, 1) in x's dtype."""
    x = x[:, :, :: stride[0], :: stride[1]]
    return torch.mm(_rows(dy).t(), _rows(x))[:, :, None, None]
