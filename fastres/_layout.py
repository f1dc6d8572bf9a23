"""How an activation lies in memory, as every backend sees it (docs/kernels.md, Conventions)."""

from __future__ import annotations

import torch
from torch import Tensor


def is_nhwc(x: Tensor) -> bool:
    """Whether x is dense in channels_last; a tensor dense in both layouts counts as
    channels_last."""
    return x.is_contiguous(memory_format=torch.channels_last)


def is_dense(x: Tensor) -> bool:
    """Whether x is dense in one of the two layouts the kernels take."""
    return x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_nhwc(x) else torch.contiguous_format


def outer_inner(x: Tensor) -> tuple[int, int]:
    """The activation as a row-major matrix: NHWC (N*H*W, C), NCHW (N*C, H*W)."""
    n, c, h, w = x.shape
    return (n * h * w, c) if is_nhwc(x) else (n * c, h * w)


def mask_shape(x: Tensor) -> tuple[int, int]:
    """Shape of the 1-bit ReLU mask of x: one bit an element, rows padded to a byte."""
    outer, inner = outer_inner(x)
    return outer, (inner + 7) // 8


def rows(x: Tensor) -> Tensor:
    """x viewed as its (outer, inner) matrix, in memory order."""
    flat = x.permute(0, 2, 3, 1) if is_nhwc(x) else x
    return flat.reshape(outer_inner(x))
