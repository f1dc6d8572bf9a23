"""conv_bn, conv_bn_relu and conv_bn_add_relu: y = conv(x); z = act(bn(y) + s), one autograd node.

s = 0, a tensor, or its own batch norm's output (see bn_act). Saved: x, the raw conv output y,
(mean, var, rstd), a bit mask. Traffic beyond the conv: forward reads y twice and writes z; backward
reads dz and y twice and writes dy once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastres._contract import Gradient
from fastres._layout import is_nhwc

from ._args import (
    BatchNorm,
    Conv,
    check_activation,
    check_bn,
    check_conv,
    check_conv_bn,
    check_like,
    check_raw,
    conv_out_shape,
    raw_bn,
    raw_conv,
)
from ._ladder import check_fusion, weight_like
from ._library import define, plain_backward, plain_eager, refuse_double_backward
from ._one_conv import (
    conv_alloc,
    conv_grads,
    conv_norm_act,
    conv_norm_fwd,
    folds,
    norm_sums,
    own,
)
from ._units import (
    Norm,
    alloc_mask,
    alloc_stats,
    alloc_vectors,
    conv_bwd,
    dense,
    in_format,
    needs_grad,
    running_statistics,
    vector,
)
from .bn_act import _bn_act_bwd, apply_norm
from .running_stats import update_running_stats


def _conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    eps: float,
    residual: Tensor | None,
    res_gamma: Tensor | None,
    res_beta: Tensor | None,
    res_running_mean: Tensor | None,
    res_running_var: Tensor | None,
    res_training: bool,
    res_eps: float,
    relu: bool,
    save: bool,
    fusion: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = dense(x, "conv_bn")
    running = running_mean, running_var
    plain = bias is None and res_gamma is None and not (save or training)
    if plain and own(fusion, "fprop", x, weight, geometry):
        stats = alloc_stats(x.new_empty((1, weight.shape[0], 1, 1)))
        running_statistics(stats, *running, eps)
        if residual is not None:
            residual = in_format(residual, True, "conv_bn")
        norm = Norm(stats, vector(gamma, x), vector(beta, x))
        z = conv_norm_act(x, weight, geometry, norm, residual, relu, fusion)
        return z, alloc_mask(z, False), z.new_empty(0), stats, stats.new_empty((0, 0))
    y, stats = conv_norm_fwd(
        x, weight, bias, geometry, *running, training, eps, fusion, "conv_bn conv output"
    )
    z, mask, res_stats = apply_norm(
        y, stats, gamma, beta, residual, res_gamma, res_beta,
        res_running_mean, res_running_var, res_training, res_eps, relu, save,
    )  # fmt: skip
    return z, mask, y if save else y.new_empty(0), stats, res_stats


def _conv_bn_act_fake(x, weight, bias, geometry, gamma, beta, running_mean, running_var, training,
                      eps, residual, res_gamma, res_beta, res_running_mean, res_running_var,
                      res_training, res_eps, relu, save, fusion):  # fmt: skip
    where = "conv_bn conv output"
    y = conv_alloc(dense(x, "conv_bn"), weight, bias, geometry, fusion, where)
    stats = alloc_stats(y)
    res_stats = alloc_stats(y) if res_gamma is not None else stats.new_empty((0, 0))
    return (
        torch.empty_like(y),
        alloc_mask(y, save and relu),
        y if save else y.new_empty(0),
        stats,
        res_stats,
    )


def _conv_bn_act_bwd(
    dz: Tensor,
    mask: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: list[int],
    y: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    training: bool,
    residual: Tensor | None,
    res_stats: Tensor | None,
    res_gamma: Tensor | None,
    res_training: bool,
    relu: bool,
    has_shortcut: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    fusion: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = dense(x, "conv_bn backward")
    none = stats.new_empty(0)
    if not (has_shortcut or need_db) and folds(fusion, need_dx, need_dw, x, weight, geometry):
        dz = in_format(dz, is_nhwc(y), "conv_bn backward")
        norm = Norm(stats, vector(gamma, y), vector(beta, y))
        g, bn = norm_sums(dz, mask if relu else None, y, norm, training)
        dgamma, dbeta, dres, res_dgamma = bn.dgamma, bn.dbeta, none, none.clone()
    else:
        dy, dgamma, dbeta, dres, res_dgamma = _bn_act_bwd(
            dz, mask, y, stats, gamma, beta, training, residual, res_stats, res_gamma,
            res_training, relu, has_shortcut,
        )  # fmt: skip
        g, bn = Gradient(dy), None
    dx, dw = conv_grads(g, bn, x, weight, geometry, need_dx, need_dw, training, fusion)
    db = g.dz.sum((0, 2, 3), dtype=stats.dtype) if need_db else none.clone()
    return (
        none.clone() if dx is None else dx,
        none.clone() if dw is None else dw,
        db,
        dgamma,
        dbeta,
        dres,
        res_dgamma,
    )


def _conv_bn_act_bwd_fake(dz, mask, x, weight, geometry, y, stats, gamma, beta, training, residual,
                          res_stats, res_gamma, res_training, relu, has_shortcut, need_dx, need_dw,
                          need_db, fusion):  # fmt: skip
    x = dense(x, "conv_bn backward")
    dx, dw = conv_bwd(torch.empty_like(y), x, weight, geometry, need_dx, need_dw)
    conv = x, weight, geometry
    dx = torch.empty_like(x) if need_dx and own(fusion, "dgrad", *conv) else dx
    dw = weight_like(weight) if need_dw and own(fusion, "wgrad", *conv) else dw
    db, dgamma, dbeta, res_dgamma = alloc_vectors(y, 4)
    none = stats.new_empty(0)
    return (
        none if dx is None else dx,
        none.clone() if dw is None else dw,
        db if need_db else none.clone(),
        dgamma,
        dbeta,
        torch.empty_like(y) if has_shortcut else none.clone(),
        res_dgamma if res_gamma is not None else none.clone(),
    )


def _check(x, weight, bias, geometry, gamma, beta, running_mean, running_var, training, eps,
           residual, res_gamma, res_beta, res_running_mean, res_running_var, res_training, res_eps,
           relu, save, fusion):  # fmt: skip
    op = "conv_bn_act"
    check_fusion(op, fusion, x)
    bn = raw_bn(gamma, beta, running_mean, running_var, training)
    shape = check_conv_bn(op, x, raw_conv(op, weight, bias, geometry), bn)
    if residual is not None:
        check_like(op, "residual", residual, x, shape)
        if res_gamma is not None:
            res = raw_bn(res_gamma, res_beta, res_running_mean, res_running_var, res_training)
            check_bn(op, shape, x, res, "residual_bn")


def check_conv_output(op: str, x: Tensor, weight: Tensor, geometry: list[int], y: Tensor) -> None:
    """x and weight fit, and y is like what the conv makes of them."""
    check_activation(op, "x", x)
    conv = raw_conv(op, weight, None, geometry)
    check_conv(op, x, conv)
    check_like(op, "y", y, x, conv_out_shape(op, tuple(x.shape), conv))


def _check_bwd(dz, mask, x, weight, geometry, y, stats, gamma, beta, training, residual, res_stats,
               res_gamma, res_training, relu, has_shortcut, need_dx, need_dw, need_db,
               fusion):  # fmt: skip
    op = "conv_bn_act_bwd"
    check_conv_output(op, x, weight, geometry, y)
    check_fusion(op, fusion, x)
    check_raw(
        op,
        y,
        {"dz": dz, "residual": residual},
        {"gamma": gamma, "beta": beta, "res_gamma": res_gamma},
        {"stats": stats, "res_stats": res_stats},
        {"mask": mask if relu else None},
    )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    (x, weight, bias, ctx.geometry, gamma, beta, _, _, ctx.training, _, residual, res_gamma,
     res_beta, _, _, ctx.res_training, _, ctx.relu, ctx.save, ctx.fusion) = inputs  # fmt: skip
    _, mask, y, stats, res_stats = output
    dual = res_gamma is not None
    ctx.has_shortcut = residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mask, y, stats, res_stats)
    ctx.save_for_backward(
        mask, x, weight, y, stats, gamma, beta, residual if dual else None,
        res_stats if dual else None, res_gamma, res_beta,
    )  # fmt: skip


def _backward(ctx, dz, *_):
    if not ctx.save:
        raise RuntimeError("fastres::conv_bn_act was called with save=False; it has no backward")
    mask, x, weight, y, stats, gamma, beta, residual, res_stats, res_gamma, res_beta = (
        ctx.saved_tensors
    )
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    # create_graph: the registered op records a node that refuses to be differentiated
    direct = getattr(ctx, "direct", False) and plain_backward(dz)
    run: Callable = _conv_bn_act_bwd if direct else torch.ops.fastres.conv_bn_act_bwd
    dx, dw, db, dgamma, dbeta, dres, res_dgamma = run(
        dz, mask, x, weight, ctx.geometry, y, stats, gamma, beta, ctx.training, residual, res_stats,
        res_gamma, ctx.res_training, ctx.relu, ctx.has_shortcut, need_x, need_w, need_b,
        ctx.fusion,
    )  # fmt: skip
    dual = res_gamma is not None
    return (
        dx if need_x else None,
        dw if need_w else None,
        db.to(ctx.bias_dtype) if need_b else None,
        None, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), None, None, None, None,
        dres if ctx.has_shortcut else None,
        res_dgamma.to(res_gamma.dtype) if dual else None,
        dbeta.to(res_beta.dtype) if dual else None,
        None, None, None, None, None, None, None,
    )  # fmt: skip


define(
    "conv_bn_act_bwd(Tensor dz, Tensor mask, Tensor x, Tensor weight, int[] geometry, Tensor y, "
    "Tensor stats, "
    "Tensor gamma, Tensor beta, bool training, Tensor? residual, Tensor? res_stats, Tensor? "
    "res_gamma, "
    "bool res_training, bool relu, bool has_shortcut, bool need_dx, bool need_dw, bool need_db, "
    "str fusion) "
    "-> (Tensor dx, Tensor dw, Tensor db, Tensor dgamma, Tensor dbeta, Tensor dres, Tensor "
    "res_dgamma)",
    _conv_bn_act_bwd,
    _conv_bn_act_bwd_fake,
    *refuse_double_backward("conv_bn_act"),
    _check_bwd,
)
define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, int[] geometry, Tensor gamma, Tensor beta, "
    "Tensor running_mean, Tensor running_var, bool training, float eps, Tensor? residual, "
    "Tensor? res_gamma, "
    "Tensor? res_beta, Tensor? res_running_mean, Tensor? res_running_var, bool res_training, "
    "float res_eps, "
    "bool relu, bool save, str fusion) "
    "-> (Tensor z, Tensor mask, Tensor y, Tensor stats, Tensor res_stats)",
    _conv_bn_act,
    _conv_bn_act_fake,
    _setup,
    _backward,
    _check,
)


class _EagerNode(torch.autograd.Function):
    """The op's node without the dispatcher, as residual_stage's: what plain eager training runs.
    It spares half a millisecond of host time a step."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _conv_bn_act(*inputs)
        _setup(ctx, inputs, output)
        ctx.direct = True
        return output

    @staticmethod
    def backward(ctx, dz, *others):
        if dz is None:  # z was not used
            return (None,) * len(ctx.needs_input_grad)
        return _backward(ctx, dz, *others)


def _run(
    op: str,
    x: Tensor,
    conv: Conv,
    bn: BatchNorm,
    residual: Tensor | None,
    residual_bn: BatchNorm | None,
    relu: bool,
    fusion: str | None,
) -> Tensor:
    shape = check_conv_bn(op, x, conv, bn)
    fusion = check_fusion(op, fusion, x)
    if residual is not None:
        check_like(op, "residual", residual, x, shape)
    gamma, beta = bn.affine(shape[1], x)
    res: tuple = (None, None, None, None, False, 0.0)
    if residual_bn is not None:
        check_bn(op, shape, x, residual_bn, "residual_bn")
        res = (
            *residual_bn.affine(shape[1], x),
            *residual_bn.running(shape[1], x),
            residual_bn.training,
            residual_bn.eps,
        )
    save = needs_grad(x, conv.weight, conv.bias, gamma, beta, residual, res[0], res[1])
    run: Callable = torch.ops.fastres.conv_bn_act
    running = bn.running(shape[1], x)
    tensors = x, conv.weight, conv.bias, gamma, beta, *running, residual, *res[:4]
    # torch.jit's tracing last: torch.compile does not take the question
    if save and plain_eager(*tensors) and not torch._C._is_tracing():
        run = _EagerNode.apply
    z, _, _, stats, res_stats = run(
        x, conv.weight, conv.bias, conv.geometry(), gamma, beta, *running,
        bn.training, bn.eps, residual, *res, relu, save, fusion,
    )  # fmt: skip
    bns = [bn] if residual_bn is None else [bn, residual_bn]
    count = shape[0] * shape[2] * shape[3]
    update_running_stats(bns, [stats, res_stats][: len(bns)], [count] * len(bns))
    return z


def conv_bn(x: Tensor, conv: Conv, bn: BatchNorm, fusion: str | None = None) -> Tensor:
    """batch_norm(conv2d(x)); see `conv_bn_relu`."""
    return _run("conv_bn", x, conv, bn, None, None, False, fusion)


def conv_bn_relu(x: Tensor, conv: Conv, bn: BatchNorm, fusion: str | None = None) -> Tensor:
    """relu(batch_norm(conv2d(x))).

    x: (N, C, H, W), float32, bfloat16 or float16 (float64 by the reference), channels_last or
    contiguous. conv: weight (K, C / groups, R, S), used in x's dtype; bn: vectors of K elements,
    its running statistics updated in place when training. fusion: the rung of the ladder, "b" (the
    vendor's conv), "c1", "c2" or "d" (the backend's own), with the passes left to the vendor as in
    "c1 vendor stem.wgrad"; None: "b", under use_backend("triton"), and "cuda" on Hopper, "c2". A
    conv that the backend's kernels do not take runs on "b". Returns (N, K, H', W') in the conv's
    output layout. Raises ValueError or TypeError that names the argument before anything
    is computed; torch's own ValueError for one value per channel in training; BackendError where
    `fusion` asks for what the backend does not have, or for it on an x that is not channels_last.
    Source: Ioffe & Szegedy 2015, section 3.2; He et al. 2015, section 3.4 (BN after each conv,
    before activation)."""
    return _run("conv_bn_relu", x, conv, bn, None, None, True, fusion)


def conv_bn_add_relu(
    x: Tensor,
    conv: Conv,
    bn: BatchNorm,
    residual: Tensor,
    residual_bn: BatchNorm | None = None,
    fusion: str | None = None,
) -> Tensor:
    """relu(batch_norm(conv2d(x)) + s), s = residual, or batch_norm(residual) by `residual_bn`.

    residual: of the conv's output shape, x's dtype and device. Otherwise as `conv_bn_relu`.
    Source: He et al. 2015, eq. 1 and 2."""
    return _run("conv_bn_add_relu", x, conv, bn, residual, residual_bn, True, fusion)
