"""bn_relu and bn_add_relu: z = act(normalise(x) + shortcut), training, eval or frozen.

    mean, var of x over (N, H, W) when training, else the running ones; rstd = 1 / sqrt(var + eps)
    z = act((x - mean) * rstd * gamma + beta + s),  s = 0, a tensor, or its own batch norm's output

Traffic, training: forward reads 2 (statistics, then normalise) + 1 of the shortcut, writes 1 and a
bit mask; backward reads 2 + 2 (sums, then apply), writes 1 (2 with a shortcut). Saved: x,
statistics, mask; never the normalised copy. Accumulation in fp32. Source: Ioffe & Szegedy 2015,
Alg. 1 and section 3."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres._layout import is_nhwc

from ._args import BatchNorm, check_activation, check_bn, check_like, check_raw, raw_bn
from ._library import define, refuse_double_backward
from ._units import (
    Norm,
    Shortcut,
    alloc_mask,
    alloc_stats,
    alloc_vectors,
    bn_statistics,
    dense,
    in_format,
    needs_grad,
    normalise,
    normalise_bwd,
    vector,
)
from .running_stats import update_running_stats


def _bn_act(
    x: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x, "bn_act")
    stats = bn_statistics(x, training, running_mean, running_var, eps)
    z, mask, res_stats = apply_norm(
        x, stats, gamma, beta, residual, res_gamma, res_beta, res_running_mean, res_running_var,
        res_training, res_eps, relu, save,
    )  # fmt: skip
    return z, mask, stats, res_stats


def apply_norm(
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    res_gamma: Tensor | None,
    res_beta: Tensor | None,
    res_running_mean: Tensor | None,
    res_running_var: Tensor | None,
    res_training: bool,
    res_eps: float,
    relu: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mask, statistics of the residual) of z = act(normalise(x) + s), x's statistics given."""
    shortcut, res_stats = None, stats.new_empty((0, 0))
    if residual is not None:
        residual = in_format(residual, is_nhwc(x), "bn_act")
        shortcut = Shortcut(residual)
        if res_gamma is not None:
            assert (
                res_beta is not None
                and res_running_mean is not None
                and res_running_var is not None
            )
            res_stats = bn_statistics(
                residual, res_training, res_running_mean, res_running_var, res_eps
            )
            shortcut = Shortcut(
                residual, Norm(res_stats, vector(res_gamma, x), vector(res_beta, x))
            )
    norm = Norm(stats, vector(gamma, x), vector(beta, x))
    z, mask = normalise(x, norm, relu, save and relu, shortcut)
    return z, mask, res_stats


def _bn_act_fake(x, gamma, beta, running_mean, running_var, training, eps, residual, res_gamma,
                 res_beta, res_running_mean, res_running_var, res_training, res_eps, relu,
                 save):  # fmt: skip
    x = dense(x, "bn_act")
    stats = alloc_stats(x)
    res_stats = alloc_stats(x) if res_gamma is not None else stats.new_empty((0, 0))
    return torch.empty_like(x), alloc_mask(x, save and relu), stats, res_stats


def _bn_act_bwd(
    dz: Tensor,
    mask: Tensor,
    x: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = dense(x, "bn_act backward")
    dz = in_format(dz, is_nhwc(x), "bn_act backward")
    shortcut = Shortcut(dz) if has_shortcut else None
    if residual is not None and res_stats is not None and res_gamma is not None:
        residual = in_format(residual, is_nhwc(x), "bn_act backward")
        shortcut = Shortcut(residual, Norm(res_stats, vector(res_gamma, x)))
    grads = normalise_bwd(
        dz, mask if relu else None, x, Norm(stats, vector(gamma, x), vector(beta, x)),
        "mask" if relu else "none", training, shortcut, res_training,
    )  # fmt: skip
    none = stats.new_empty(0)
    return (
        grads.dx,
        grads.dgamma,
        grads.dbeta,
        none if grads.dres is None else grads.dres,
        none if grads.res_dgamma is None else grads.res_dgamma,
    )


def _bn_act_bwd_fake(dz, mask, x, stats, gamma, beta, training, residual, res_stats, res_gamma,
                     res_training, relu, has_shortcut):  # fmt: skip
    x = dense(x, "bn_act backward")
    none = stats.new_empty(0)
    dgamma, dbeta, res_dgamma = alloc_vectors(x, 3)
    return (
        torch.empty_like(x),
        dgamma,
        dbeta,
        torch.empty_like(x) if has_shortcut else none,
        res_dgamma if res_gamma is not None else none,
    )


def _check(x, gamma, beta, running_mean, running_var, training, eps, residual, res_gamma, res_beta,
           res_running_mean, res_running_var, res_training, res_eps, relu, save):  # fmt: skip
    op = "bn_act"
    check_raw(op, x, {"residual": residual})
    shape = tuple(x.shape)
    check_bn(op, shape, x, raw_bn(gamma, beta, running_mean, running_var, training))
    if residual is not None and res_gamma is not None:
        res = raw_bn(res_gamma, res_beta, res_running_mean, res_running_var, res_training)
        check_bn(op, shape, x, res, "residual_bn")


def _check_bwd(dz, mask, x, stats, gamma, beta, training, residual, res_stats, res_gamma,
               res_training, relu, has_shortcut):  # fmt: skip
    check_raw(
        "bn_act_bwd",
        x,
        {"dz": dz, "residual": residual},
        {"gamma": gamma, "beta": beta, "res_gamma": res_gamma},
        {"stats": stats, "res_stats": res_stats},
        {"mask": mask if relu else None},
    )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    (
        x,
        gamma,
        beta,
        _,
        _,
        training,
        _,
        residual,
        res_gamma,
        res_beta,
        _,
        _,
        res_training,
        _,
        relu,
        save,
    ) = inputs
    _, mask, stats, res_stats = output
    dual = res_gamma is not None
    ctx.mark_non_differentiable(mask, stats, res_stats)
    ctx.training, ctx.res_training, ctx.relu, ctx.save = training, res_training, relu, save
    ctx.has_shortcut = residual is not None
    ctx.save_for_backward(
        mask, x, stats, gamma, beta, residual if dual else None, res_stats if dual else None,
        res_gamma, res_beta,
    )  # fmt: skip


def _backward(ctx, dz, *_):
    if not ctx.save:
        raise RuntimeError("fastres::bn_act was called with save=False; it has no backward")
    mask, x, stats, gamma, beta, residual, res_stats, res_gamma, res_beta = ctx.saved_tensors
    dx, dgamma, dbeta, dres, res_dgamma = torch.ops.fastres.bn_act_bwd(
        dz, mask, x, stats, gamma, beta, ctx.training, residual, res_stats, res_gamma,
        ctx.res_training, ctx.relu, ctx.has_shortcut,
    )  # fmt: skip
    dual = res_gamma is not None
    return (
        dx, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), None, None, None, None,
        dres if ctx.has_shortcut else None,
        res_dgamma.to(res_gamma.dtype) if dual else None,
        dbeta.to(res_beta.dtype) if dual else None,
        None, None, None, None, None, None,
    )  # fmt: skip


define(
    "bn_act_bwd(Tensor dz, Tensor mask, Tensor x, Tensor stats, Tensor gamma, Tensor beta, bool "
    "training, "
    "Tensor? residual, Tensor? res_stats, Tensor? res_gamma, bool res_training, bool relu, bool "
    "has_shortcut) "
    "-> (Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dres, Tensor res_dgamma)",
    _bn_act_bwd,
    _bn_act_bwd_fake,
    *refuse_double_backward("bn_act"),
    _check_bwd,
)
define(
    "bn_act(Tensor x, Tensor gamma, Tensor beta, Tensor running_mean, Tensor running_var, bool "
    "training, "
    "float eps, Tensor? residual, Tensor? res_gamma, Tensor? res_beta, Tensor? res_running_mean, "
    "Tensor? res_running_var, bool res_training, float res_eps, bool relu, bool save) "
    "-> (Tensor z, Tensor mask, Tensor stats, Tensor res_stats)",
    _bn_act,
    _bn_act_fake,
    _setup,
    _backward,
    _check,
)


def _run(
    op: str,
    x: Tensor,
    bn: BatchNorm,
    residual: Tensor | None,
    residual_bn: BatchNorm | None,
    relu: bool,
) -> Tensor:
    check_activation(op, "x", x)
    shape = tuple(x.shape)
    check_bn(op, shape, x, bn)
    if residual is not None:
        check_like(op, "residual", residual, x, shape)
    gamma, beta = bn.affine(shape[1], x)
    mean, var = bn.running(shape[1], x)
    res: tuple = (None, None, None, None, False, 0.0)
    if residual_bn is not None:
        check_bn(op, shape, x, residual_bn, "residual_bn")
        res = (
            *residual_bn.affine(shape[1], x),
            *residual_bn.running(shape[1], x),
            residual_bn.training,
            residual_bn.eps,
        )
    save = needs_grad(x, gamma, beta, residual, res[0], res[1])
    z, _, stats, res_stats = torch.ops.fastres.bn_act(
        x, gamma, beta, mean, var, bn.training, bn.eps, residual, *res, relu, save
    )
    bns = [bn] if residual_bn is None else [bn, residual_bn]
    update_running_stats(bns, [stats, res_stats][: len(bns)], [x.numel() // shape[1]] * len(bns))
    return z


def bn_relu(x: Tensor, bn: BatchNorm, relu: bool = True) -> Tensor:
    """relu(batch_norm(x)); `relu=False` leaves the activation out.

    x: (N, C, H, W), float32, bfloat16 or float16 (float64 by the reference), channels_last or
    contiguous, both native. bn: `BatchNorm`, per-channel vectors of C elements; its running
    statistics are updated in place when it is training. Returns z of x's shape, dtype and layout.
    Raises ValueError or TypeError that names the argument; torch's own ValueError for one value per
    channel in training. Source: Ioffe & Szegedy 2015, Alg. 1."""
    return _run("bn_relu", x, bn, None, None, relu)


def bn_add_relu(
    x: Tensor,
    bn: BatchNorm,
    residual: Tensor,
    residual_bn: BatchNorm | None = None,
    relu: bool = True,
) -> Tensor:
    """relu(batch_norm(x) + s): the end of a residual block (He et al. 2015, figure 2).

    s = residual (identity shortcut), or batch_norm(residual) by `residual_bn` (projection
    shortcut). x, residual: (N, C, H, W) of one dtype and device; a residual in another layout than
    x is copied, and counted in `fastres.report`. Otherwise as `bn_relu`."""
    return _run("bn_add_relu", x, bn, residual, residual_bn, relu)
