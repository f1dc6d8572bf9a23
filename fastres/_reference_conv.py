"""The convolutions of the `reference` backend (docs/kernels.md): torch math, no fusion.

They refuse what the Triton kernels refuse, so that a block takes the same path on both."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference as ref
from ._contract import Gradient, Normalise, NormGradient, Previous, Shortcut, Sums
from ._layout import outer_inner, rows


def up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gate_from_mask(mask: Tensor, like: Tensor) -> Tensor:
    outer, inner = outer_inner(like)
    gate = torch.empty_like(like, dtype=torch.bool)
    rows_view = (
        gate.permute(0, 2, 3, 1) if like.is_contiguous(memory_format=torch.channels_last) else gate
    )
    rows_view.copy_(ref.unpack_mask(mask, inner).view(rows_view.shape))
    return gate


def conv_missing(device: torch.device) -> str | None:
    return None


def conv_why_not(x: Tensor, weight: Tensor, geometry: list[int]) -> str | None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is NCHW; the kernels take channels_last"
    return None


def conv_bwd_pointwise_why_not(
    x: Tensor, weight: Tensor, geometry: list[int], frozen: bool
) -> str | None:
    if tuple(weight.shape[2:]) != (1, 1) or geometry[:4] != [1, 1, 0, 0]:
        return "not a 1x1 conv of stride 1"
    if geometry[-1] != 1:
        return f"groups={geometry[-1]}: a program would hold dw of all of them"
    return None


def _conv(h: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    sh, sw, ph, pw, dh, dw, groups = geometry
    return torch.ops.aten.convolution.default(
        up(h), up(weight), None, [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups
    )


def _conv_bwd(
    dy: Tensor, h: Tensor, weight: Tensor, geometry: list[int], which: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    sh, sw, ph, pw, dh, dw, groups = geometry
    return torch.ops.aten.convolution_backward.default(
        up(dy), up(h), up(weight), None, [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups,
        [*which, False],
    )  # fmt: skip


def _stored(x: Tensor, norm: Normalise, shortcut: Shortcut | None) -> Tensor:
    """normalise(x) + shortcut in x's dtype: what the ReLU gates."""
    pre = ref.normalise(up(x), *norm)
    if shortcut is not None:
        res = up(shortcut.x)
        pre = pre + (res if shortcut.norm is None else ref.normalise(res, *shortcut.norm))
    return pre.to(x.dtype)


def _input(x: Tensor, norm: Normalise | None) -> Tensor:
    return x if norm is None else ref.relu(_stored(x, norm, None))


def _gated(g: Gradient) -> Tensor:
    dz = up(g.dz)
    if g.mask is None:
        return dz
    return torch.where(gate_from_mask(g.mask, g.dz), dz, torch.zeros_like(dz))


def _dy(g: Gradient, bn: NormGradient | None) -> Tensor:
    """y's gradient, rounded to its dtype as the kernels multiply it."""
    if bn is None:
        return _gated(g).to(g.dz.dtype)
    out = ref.bn_bwd_apply(
        _gated(g), up(bn.y), bn.norm.mean, bn.norm.rstd, bn.norm.gamma, bn.dgamma, bn.dbeta,
        bn.training,
    )  # fmt: skip
    return out.to(g.dz.dtype)


def conv_fprop(y, stats, z, mask, x, weight, geometry, norm, shortcut, eps):
    h = x
    if norm is not None:
        pre = _stored(x, norm, shortcut)
        h = ref.relu(pre)
        if z is not None:
            z.copy_(h)
        if mask is not None:
            mask.copy_(ref.pack_mask(rows(ref.relu_gate(pre)), outer_inner(x)[1]))
    y.copy_(_conv(h, weight, geometry))
    if stats is not None:
        for out, value in zip(stats, ref.bn_stats(up(y), eps), strict=True):
            out.copy_(value)


def conv_fprop_act(z, x, weight, geometry, norm, residual, relu):
    pre = ref.normalise(_conv(x, weight, geometry), *norm)
    if residual is not None:
        pre = pre + up(residual)
    pre = pre.to(z.dtype)
    z.copy_(ref.relu(pre) if relu else pre)


def _finish(
    dx: Tensor, sums: Sums | None, v: Tensor, dres: Gradient | None, prev: Previous | None
) -> None:
    """dx = gate(v + gate(dres)), and the sums of the batch norm before."""
    if dres is not None:
        v = v + _gated(dres)
    if prev is None:
        dx.copy_(v)
        return
    gate = (
        ref.relu_gate(_stored(prev.y, prev.norm, None))
        if prev.mask is None
        else gate_from_mask(prev.mask, dx)
    )
    v = v.to(dx.dtype)
    g = up(torch.where(gate, v, torch.zeros_like(v)))
    dx.copy_(g)
    assert sums is not None
    dgamma, dbeta = ref.bn_bwd_reduce(g, up(prev.y), prev.norm.mean, prev.norm.rstd)
    sums.dgamma.copy_(dgamma)
    sums.dbeta.copy_(dbeta)
    if prev.shortcut is not None and prev.shortcut.norm is not None:
        res, norm = prev.shortcut
        assert sums.res_dgamma is not None and norm is not None
        sums.res_dgamma.copy_(ref.bn_bwd_reduce(g, up(res), norm.mean, norm.rstd)[0])


def conv_dgrad(dx, sums, g, weight, geometry, bn, dres, prev):
    v = _conv_bwd(_dy(g, bn), dx, weight, geometry, [True, False])[0]
    _finish(dx, sums, v, dres, prev)


def conv_wgrad(dw, g, x, geometry, bn, norm):
    dw.copy_(_conv_bwd(_dy(g, bn), _input(x, norm), dw, geometry, [False, True])[1])


def conv_bwd_pointwise(dx, sums, dw, g, x, weight, geometry, bn, norm, dres, prev):
    v, dw_, _ = _conv_bwd(_dy(g, bn), _input(x, norm), weight, geometry, [True, True])
    dw.copy_(dw_)
    _finish(dx, sums, v, dres, prev)
