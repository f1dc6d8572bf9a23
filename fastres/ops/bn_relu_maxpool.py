"""z = maxpool(relu(normalise(x))): the stem's tail in one pass, the ReLU'd tensor never written.

Traffic for the ImageNet stem (kernel 3, stride 2), in units of x: forward reads 2 (statistics, then
normalise), writes 1/4 and one byte a pooled element; backward reads 2 * (1 + 1/4) and writes 1.
Eager also writes and reads the normalised and the ReLU'd tensor, and 8-byte indices. Saved: x,
statistics, the byte of each pooled element. Source: He et al. 2015, table 1 (conv1, 3x3 max pool,
stride 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import backends
from fastres._layout import is_nhwc

from ._args import BatchNorm, check_activation, check_bn, check_like, check_raw, raw_bn
from ._library import define, refuse_double_backward
from ._units import (
    alloc_stats,
    alloc_vectors,
    bn_statistics,
    dense,
    in_format,
    vector,
)
from .running_stats import update_running_stats

MAX_KERNEL = 15  # a window offset lives in a byte; 255 means that no gradient passes


def _alloc_pooled(x: Tensor, kernel: int, stride: int, padding: int, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    out_h, out_w = ((size + 2 * padding - kernel) // stride + 1 for size in (h, w))
    fmt = torch.channels_last if is_nhwc(x) else torch.contiguous_format
    return torch.empty((n, c, out_h, out_w), dtype=dtype, device=x.device, memory_format=fmt)


def _forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    eps: float,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x, "bn_relu_maxpool")
    stats = bn_statistics(x, training, running_mean, running_var, eps)
    z = _alloc_pooled(x, kernel, stride, padding, x.dtype)
    index = _alloc_pooled(x, kernel, stride, padding, torch.uint8)
    backends.select(x).bn_relu_maxpool(
        z, index, x, stats[0], stats[2], vector(gamma, x), vector(beta, x), kernel, stride, padding
    )
    return z, index, stats


def _fake(x, gamma, beta, running_mean, running_var, training, eps, kernel, stride, padding):
    x = dense(x, "bn_relu_maxpool")
    pool = (kernel, stride, padding)
    return (
        _alloc_pooled(x, *pool, x.dtype),
        _alloc_pooled(x, *pool, torch.uint8),
        alloc_stats(x),
    )


def _bwd(
    dz: Tensor,
    index: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    training: bool,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x, "bn_relu_maxpool backward")
    dz = in_format(dz, is_nhwc(x), "bn_relu_maxpool backward")
    backend = backends.select(x)
    dgamma, dbeta = alloc_vectors(x, 2)
    pool = (kernel, stride, padding)
    backend.bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, stats[0], stats[2], *pool)
    dx = torch.empty_like(x)
    backend.bn_relu_maxpool_bwd_apply(
        dx, dz, index, x, stats[0], stats[2], vector(gamma, x), dgamma, dbeta, *pool, training
    )
    return dx, dgamma, dbeta


def _bwd_fake(dz, index, x, stats, gamma, training, kernel, stride, padding):
    x = dense(x, "bn_relu_maxpool backward")
    return torch.empty_like(x), *alloc_vectors(x, 2)


def _check(x, gamma, beta, running_mean, running_var, training, eps, kernel, stride, padding):
    op = "bn_relu_maxpool"
    check_activation(op, "x", x)
    shape = tuple(x.shape)
    check_window(op, shape, kernel, stride, padding)
    check_bn(op, shape, x, raw_bn(gamma, beta, running_mean, running_var, training))


def _check_bwd(dz, index, x, stats, gamma, training, kernel, stride, padding):
    check_pool_bwd("bn_relu_maxpool_bwd", dz, index, x, stats, gamma, kernel, stride, padding)


def check_pool_bwd(op, dz, index, x, stats, gamma, kernel, stride, padding):
    """The gradient and index are those of x's pool."""
    check_raw(op, x, vectors={"gamma": gamma}, stats={"stats": stats})
    check_window(op, tuple(x.shape), kernel, stride, padding)
    pooled = _alloc_pooled(x.to("meta"), kernel, stride, padding, torch.uint8)
    check_like(op, "dz", dz, x, tuple(pooled.shape))
    fits = index.shape == pooled.shape and index.stride() == pooled.stride()
    if not fits or index.dtype != torch.uint8 or index.device != x.device:
        raise ValueError(
            f"{op}: index must be uint8 of shape {tuple(pooled.shape)} in x's layout, on its device"
        )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, gamma, beta, _, _, ctx.training, _, *ctx.pool = inputs
    _, index, stats = output
    ctx.beta_dtype = beta.dtype
    ctx.mark_non_differentiable(index, stats)
    ctx.save_for_backward(index, x, stats, gamma)


def _backward(ctx, dz, *_):
    index, x, stats, gamma = ctx.saved_tensors
    dx, dgamma, dbeta = torch.ops.fastres.bn_relu_maxpool_bwd(
        dz, index, x, stats, gamma, ctx.training, *ctx.pool
    )
    return dx, dgamma.to(gamma.dtype), dbeta.to(ctx.beta_dtype), *([None] * 7)


define(
    "bn_relu_maxpool_bwd(Tensor dz, Tensor index, Tensor x, Tensor stats, Tensor gamma, bool "
    "training, "
    "int kernel, int stride, int padding) -> (Tensor dx, Tensor dgamma, Tensor dbeta)",
    _bwd,
    _bwd_fake,
    *refuse_double_backward("bn_relu_maxpool"),
    _check_bwd,
)
define(
    "bn_relu_maxpool(Tensor x, Tensor gamma, Tensor beta, Tensor running_mean, Tensor running_var, "
    "bool training, float eps, int kernel, int stride, int padding) "
    "-> (Tensor z, Tensor index, Tensor stats)",
    _forward,
    _fake,
    _setup,
    _backward,
    _check,
)


def check_window(op: str, shape: tuple[int, ...], kernel: int, stride: int, padding: int) -> None:
    """The pool's kernels take this window on activations of this shape."""
    if not (1 <= kernel <= MAX_KERNEL and stride >= 1 and 0 <= padding <= kernel // 2):
        raise ValueError(
            f"{op}: kernel={kernel}, stride={stride}, padding={padding}; accepted: 1 <= kernel "
            f"<= {MAX_KERNEL}, "
            "stride >= 1, 0 <= padding <= kernel // 2"
        )
    if min(shape[2:]) + 2 * padding < kernel:
        raise ValueError(f"{op}: x {shape} is smaller than the {kernel}x{kernel} window")


def bn_relu_maxpool(
    x: Tensor, bn: BatchNorm, kernel: int = 3, stride: int = 2, padding: int = 1
) -> Tensor:
    """max_pool2d(relu(batch_norm(x)), kernel, stride, padding), floor mode, dilation 1.

    x: (N, C, H, W), float32, bfloat16 or float16 (float64 by the reference), channels_last or
    contiguous. kernel <= 15, padding <= kernel / 2. Returns (N, C, (H + 2 * padding - kernel) //
    stride + 1, ...) in x's layout. Running statistics are updated in place when bn is training.
    Ties and NaN as in torch: the first maximum takes the gradient, a NaN wins. Raises ValueError or
    TypeError that names the argument."""
    op = "bn_relu_maxpool"
    check_activation(op, "x", x)
    shape = tuple(x.shape)
    check_window(op, shape, kernel, stride, padding)
    check_bn(op, shape, x, bn)
    gamma, beta = bn.affine(shape[1], x)
    z, _, stats = torch.ops.fastres.bn_relu_maxpool(
        x, gamma, beta, *bn.running(shape[1], x), bn.training, bn.eps, kernel, stride, padding
    )
    update_running_stats([bn], [stats], [x.numel() // shape[1]])
    return z
