"""How tensors become arguments of fastres._C's kernels: codes, addresses, sizes."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GATE = {"none": 0, "mask": 1, "recompute": 2}
_NHWC = torch.channels_last


def ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def sizes(x: Tensor) -> tuple[int, bool, int, int, int]:
    """dtype code, NHWC, N, C, H * W."""
    n, c, h, w = x.shape
    return DTYPE[x.dtype], x.is_contiguous(memory_format=_NHWC), n, c, h * w


def pool_sizes(x: Tensor, z: Tensor) -> tuple[int, bool, int, int, int, int, int, int]:
    """dtype code, NHWC, N, C, H, W of the pool's input x; H, W of its output z."""
    n, c, h, w = x.shape
    nhwc = x.is_contiguous(memory_format=_NHWC)
    return DTYPE[x.dtype], nhwc, n, c, h, w, z.shape[2], z.shape[3]
