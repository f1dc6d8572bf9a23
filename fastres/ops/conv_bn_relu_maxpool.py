"""z = maxpool(relu(bn(conv(x)))): a ResNet's stem on the backend's own conv, one autograd node.

Traffic beyond the conv's x, w and y: forward reads y once (the conv's epilogue takes the
statistics, where a vendor's needs a pass) and writes z and one byte a pooled element; backward
reads dz, the index and y twice and writes dy, which wgrad reads. Saved: x, y, statistics, index."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import backends
from fastres._contract import Gradient

from ._args import BatchNorm, Conv, check_conv_bn, raw_bn, raw_conv
from ._ladder import check_fusion, weight_like
from ._library import define, refuse_double_backward
from ._one_conv import conv_alloc, conv_grads, conv_norm_fwd
from ._units import alloc_stats, alloc_vectors, dense, vector
from .bn_relu_maxpool import _alloc_pooled, _bwd, check_pool_bwd, check_window
from .conv_bn import check_conv_output
from .running_stats import update_running_stats

OP = "conv_bn_relu_maxpool"


def _forward(x, weight, bias, geometry, gamma, beta, running_mean, running_var, training, eps,
             kernel, stride, padding, fusion):  # fmt: skip
    x = dense(x, OP)
    y, stats = conv_norm_fwd(
        x, weight, bias, geometry, running_mean, running_var, training, eps, fusion, OP
    )
    z = _alloc_pooled(y, kernel, stride, padding, y.dtype)
    index = _alloc_pooled(y, kernel, stride, padding, torch.uint8)
    backends.select(y).bn_relu_maxpool(
        z, index, y, stats[0], stats[2], vector(gamma, y), vector(beta, y), kernel, stride, padding
    )
    return z, index, y, stats


def _fake(x, weight, bias, geometry, gamma, beta, running_mean, running_var, training, eps,
          kernel, stride, padding, fusion):  # fmt: skip
    y = conv_alloc(dense(x, OP), weight, bias, geometry, fusion, OP)
    pool = (kernel, stride, padding)
    return (
        _alloc_pooled(y, *pool, y.dtype),
        _alloc_pooled(y, *pool, torch.uint8),
        y,
        alloc_stats(y),
    )


def _backward_impl(
    dz: Tensor, index: Tensor, x: Tensor, weight: Tensor, geometry: list[int], y: Tensor,
    stats: Tensor, gamma: Tensor, training: bool, kernel: int, stride: int, padding: int,
    fusion: str, need_dx: bool, need_dw: bool, need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = dense(x, f"{OP} backward")
    dy, dgamma, dbeta = _bwd(dz, index, y, stats, gamma, training, kernel, stride, padding)
    dx, dw = conv_grads(Gradient(dy), None, x, weight, geometry, need_dx, need_dw, training, fusion)
    db = dy.sum((0, 2, 3), dtype=stats.dtype) if need_db else None
    none = stats.new_empty(0)
    dx, dw, db = (none.clone() if t is None else t for t in (dx, dw, db))
    return dx, dw, db, dgamma, dbeta


def _backward_fake(dz, index, x, weight, geometry, y, stats, gamma, training, kernel, stride,
                   padding, fusion, need_dx, need_dw, need_db):  # fmt: skip
    db, dgamma, dbeta = alloc_vectors(y, 3)
    none = stats.new_empty(0)
    return (
        torch.empty_like(dense(x, OP)) if need_dx else none,
        weight_like(weight) if need_dw else none.clone(),
        db if need_db else none.clone(),
        dgamma,
        dbeta,
    )


def _check(x, weight, bias, geometry, gamma, beta, running_mean, running_var, training, eps,
           kernel, stride, padding, fusion):  # fmt: skip
    bn = raw_bn(gamma, beta, running_mean, running_var, training)
    shape = check_conv_bn(OP, x, raw_conv(OP, weight, bias, geometry), bn)
    check_window(OP, shape, kernel, stride, padding)
    check_fusion(OP, fusion, x)


def _check_bwd(dz, index, x, weight, geometry, y, stats, gamma, training, kernel, stride, padding,
               fusion, need_dx, need_dw, need_db):  # fmt: skip
    op = f"{OP}_bwd"
    check_conv_output(op, x, weight, geometry, y)
    check_pool_bwd(op, dz, index, y, stats, gamma, kernel, stride, padding)
    check_fusion(op, fusion, x)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    (x, weight, bias, ctx.geometry, gamma, beta, _, _, ctx.training, _, *ctx.pool,
     ctx.fusion) = inputs  # fmt: skip
    _, index, y, stats = output
    ctx.beta_dtype = beta.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(index, y, stats)
    ctx.save_for_backward(index, x, weight, y, stats, gamma)


def _backward(ctx, dz, *_):
    index, x, weight, y, stats, gamma = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    dx, dw, db, dgamma, dbeta = torch.ops.fastres.conv_bn_relu_maxpool_bwd(
        dz, index, x, weight, ctx.geometry, y, stats, gamma, ctx.training, *ctx.pool, ctx.fusion,
        *needs,
    )  # fmt: skip
    return (
        dx if needs[0] else None,
        dw if needs[1] else None,
        db.to(ctx.bias_dtype) if needs[2] else None,
        None, dgamma.to(gamma.dtype), dbeta.to(ctx.beta_dtype), *([None] * 8),
    )  # fmt: skip


define(
    "conv_bn_relu_maxpool_bwd(Tensor dz, Tensor index, Tensor x, Tensor weight, int[] geometry, "
    "Tensor y, Tensor stats, Tensor gamma, bool training, int kernel, int stride, int padding, "
    "str fusion, bool need_dx, bool need_dw, bool need_db) "
    "-> (Tensor dx, Tensor dw, Tensor db, Tensor dgamma, Tensor dbeta)",
    _backward_impl,
    _backward_fake,
    *refuse_double_backward(OP),
    _check_bwd,
)
define(
    "conv_bn_relu_maxpool(Tensor x, Tensor weight, Tensor? bias, int[] geometry, Tensor gamma, "
    "Tensor beta, Tensor running_mean, Tensor running_var, bool training, float eps, int kernel, "
    "int stride, int padding, str fusion) "
    "-> (Tensor z, Tensor index, Tensor y, Tensor stats)",
    _forward,
    _fake,
    _setup,
    _backward,
    _check,
)


def conv_bn_relu_maxpool(
    x: Tensor,
    conv: Conv,
    bn: BatchNorm,
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
    fusion: str | None = None,
) -> Tensor:
    """max_pool2d(relu(batch_norm(conv2d(x))), kernel, stride, padding), floor mode, dilation 1.

    x, conv, bn: as in `conv_bn_relu`; the window as in `bn_relu_maxpool`. fusion: the rung on which
    the conv runs, as in `conv_bn_relu` (rung c2 is c1 here: the pool is in between). Returns z in
    the conv's output layout. Source: He et al. 2015, table 1."""
    shape = check_conv_bn(OP, x, conv, bn)
    check_window(OP, shape, kernel, stride, padding)
    fusion = check_fusion(OP, fusion, x)
    gamma, beta = bn.affine(shape[1], x)
    z, _, _, stats = torch.ops.fastres.conv_bn_relu_maxpool(
        x, conv.weight, conv.bias, conv.geometry(), gamma, beta, *bn.running(shape[1], x),
        bn.training, bn.eps, kernel, stride, padding, fusion,
    )  # fmt: skip
    update_running_stats([bn], [stats], [shape[0] * shape[2] * shape[3]])
    return z
