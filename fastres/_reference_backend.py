"""The `reference` backend: `fastres/reference.py` behind the out-variant contract of
docs/kernels.md.

Any dtype (float64 included), any device, no fusion. Internals in float32, or float64 for float64
tensors."""

from __future__ import annotations

import torch

from . import reference as ref
from ._layout import outer_inner, rows
from ._reference_conv import (
    conv_bwd_pointwise,
    conv_bwd_pointwise_why_not,
    conv_dgrad,
    conv_fprop,
    conv_fprop_act,
    conv_missing,
    conv_wgrad,
    conv_why_not,
)
from ._reference_conv import gate_from_mask as _gate_from_mask
from ._reference_conv import up as _up

NAME = "reference"

__all__ = [
    "conv_bwd_pointwise",
    "conv_bwd_pointwise_why_not",
    "conv_dgrad",
    "conv_fprop",
    "conv_fprop_act",
    "conv_missing",
    "conv_wgrad",
    "conv_why_not",
]


def _g(dz, mask, x, mean, rstd, gamma, beta, gate):
    g = _up(dz)
    if gate == "mask":
        return torch.where(_gate_from_mask(mask, dz), g, torch.zeros_like(g))
    if gate == "recompute":
        z = ref.normalise(_up(x), mean, rstd, gamma, beta).to(x.dtype)
        return torch.where(ref.relu_gate(z), g, torch.zeros_like(g))
    assert gate == "none", gate
    return g


def bn_stats(mean, var, rstd, x, eps):
    for out, value in zip((mean, var, rstd), ref.bn_stats(_up(x), eps), strict=True):
        out.copy_(value)


def bn_apply(
    z, mask, x, mean, rstd, gamma, beta, residual, res_mean, res_rstd, res_gamma, res_beta, relu
):
    if residual is not None:
        residual = _up(residual)
    pre = ref.bn_apply(
        _up(x), mean, rstd, gamma, beta, residual, res_mean, res_rstd, res_gamma, res_beta, False
    ).to(z.dtype)
    if mask is not None:
        mask.copy_(ref.pack_mask(rows(ref.relu_gate(pre)), outer_inner(z)[1]))
    z.copy_(ref.relu(pre) if relu else pre)


def bn_bwd_reduce(
    dgamma,
    dbeta,
    res_dgamma,
    dz,
    mask,
    x,
    mean,
    rstd,
    gamma,
    beta,
    residual,
    res_mean,
    res_rstd,
    gate,
):
    g = _g(dz, mask, x, mean, rstd, gamma, beta, gate)
    dg, db = ref.bn_bwd_reduce(g, _up(x), mean, rstd)
    dgamma.copy_(dg)
    dbeta.copy_(db)
    if res_dgamma is not None:
        res_dgamma.copy_(ref.bn_bwd_reduce(g, _up(residual), res_mean, res_rstd)[0])


def bn_bwd_apply(
    dx, dres, dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta,
    residual, res_mean, res_rstd, res_gamma, res_dgamma, gate, training, res_training,
):  # fmt: skip
    g = _g(dz, mask, x, mean, rstd, gamma, beta, gate)
    out = ref.bn_bwd_apply(g, _up(x), mean, rstd, gamma, dgamma, dbeta, training)
    if dres is not None:
        if res_mean is None:
            dres.copy_(g)
        else:
            dres.copy_(
                ref.bn_bwd_apply(
                    g, _up(residual), res_mean, res_rstd, res_gamma, res_dgamma, dbeta, res_training
                )
            )
    dx.copy_(out)


def add_relu(z, mask, a, b):
    pre = (_up(a) + _up(b)).to(z.dtype)
    if mask is not None:
        mask.copy_(ref.pack_mask(rows(ref.relu_gate(pre)), outer_inner(z)[1]))
    z.copy_(ref.relu(pre))


def relu_bwd(dx, dy, dz, mask):
    g = _up(dz)
    g = torch.where(_gate_from_mask(mask, dz), g, torch.zeros_like(g))
    dx.copy_(g if dy is None else g + _up(dy))


def bn_relu_maxpool(z, index, x, mean, rstd, gamma, beta, kernel, stride, padding):
    pre = ref.bn_apply(_up(x), mean, rstd, gamma, beta).to(x.dtype)
    pooled, offset = ref.maxpool_index(_up(pre), kernel, stride, padding)
    z.copy_(pooled)
    if index is not None:
        index.copy_(offset)


def bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, mean, rstd, kernel, stride, padding):
    g = ref.maxpool_scatter(_up(dz), index, x.shape, kernel, stride, padding)
    dg, db = ref.bn_bwd_reduce(g, _up(x), mean, rstd)
    dgamma.copy_(dg)
    dbeta.copy_(db)


def bn_relu_maxpool_bwd_apply(
    dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, kernel, stride, padding, training
):
    g = ref.maxpool_scatter(_up(dz), index, x.shape, kernel, stride, padding)
    dx.copy_(ref.bn_bwd_apply(g, _up(x), mean, rstd, gamma, dgamma, dbeta, training))
