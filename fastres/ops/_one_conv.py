"""One conv and its batch norm outside of a stage of blocks, a network's stem, on each rung of the
ladder (see _ladder; its passes are called stem.fprop, stem.dgrad and stem.wgrad):

    b        the vendor's conv, the passes of the batch norm around it
    c1       the backend's own; statistics in fprop's epilogue
    c2, d    + the batch norm's backward in the prologues of wgrad and dgrad, where neither a pool
             nor a shortcut is in between"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import backends
from fastres._contract import Gradient, Normalise, NormGradient

from ._choice import parse
from ._ladder import (
    as_normalise,
    conv_output,
    convs_named,
    kernel_weight,
    vendor_reason,
    weight_like,
)
from ._units import (
    Norm,
    alloc_stats,
    alloc_vectors,
    bn_statistics,
    cast,
    conv_bwd,
    conv_fwd,
    dense,
    vector,
)


def own(fusion: str, which: str, x: Tensor, weight: Tensor, geometry: list[int]) -> bool:
    """Whether a pass of the conv runs on the backend's own kernels: asked for, and taken."""
    choice = parse(fusion)
    if not choice.rung.conv or f"stem.{which}" in choice.vendor:
        return False
    return vendor_reason(convs(fusion, which, x), x, weight, geometry) is None


def convs(fusion: str, which: str, x: Tensor) -> Any:
    """Whose kernels run a pass: those of x's backend, or the cuda backend's on a tile."""
    return convs_named(backends.select(x), parse(fusion), f"stem.{which}")


def conv_alloc(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], fusion: str, where: str
) -> Tensor:
    """y for the fake implementations."""
    if own(fusion, "fprop", x, weight, geometry):
        return conv_output(x, weight, geometry)
    return dense(conv_fwd(x, weight, bias, geometry), where)


def conv_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], running_mean: Tensor,
    running_var: Tensor, training: bool, eps: float, fusion: str, where: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, stats) of y = conv(x) + bias and the batch norm behind it."""
    running = running_mean, running_var
    if not own(fusion, "fprop", x, weight, geometry):
        y = dense(conv_fwd(x, weight, bias, geometry, training), where)
        return y, bn_statistics(y, training, *running, eps)
    backend = convs(fusion, "fprop", x)
    y, w = conv_output(x, weight, geometry), kernel_weight(weight, x)
    if bias is None and training:
        stats = alloc_stats(y)
        backend.conv_fprop(y, stats, None, None, x, w, geometry, None, None, eps)
        return y, stats
    if bias is None:
        backend.conv_fprop(y, None, None, None, x, w, geometry, None, None, eps)
    else:  # the affine of the epilogue; its statistics are those of y before
        one = vector(torch.ones_like(bias), x)
        plain = Normalise(torch.zeros_like(one), one, one, vector(bias, x))
        backend.conv_fprop_act(y, x, w, geometry, plain, None, False)
    return y, bn_statistics(y, training, *running, eps)


def conv_norm_act(
    x: Tensor, weight: Tensor, geometry: list[int], norm: Norm, residual: Tensor | None, relu: bool,
    fusion: str,
) -> Tensor:  # fmt: skip
    """act(normalise(conv(x)) + residual) in one kernel: inference on the backend's own conv."""
    z = conv_output(x, weight, geometry)
    convs(fusion, "fprop", x).conv_fprop_act(
        z, x, kernel_weight(weight, x), geometry, as_normalise(norm), residual, relu
    )
    return z


class ConvGrads(NamedTuple):
    dx: Tensor | None
    dw: Tensor | None


def conv_grads(
    g: Gradient, bn: NormGradient | None, x: Tensor, weight: Tensor, geometry: list[int],
    need_dx: bool, need_dw: bool, training: bool, fusion: str,
) -> ConvGrads:  # fmt: skip
    """Gradients of the conv from dy, or (bn) from that of the batch norm behind it."""
    conv = x, weight, geometry
    our_dx, our_dw = own(fusion, "dgrad", *conv), own(fusion, "wgrad", *conv)
    dx = dw = None
    if (need_dx and not our_dx) or (need_dw and not our_dw):
        assert bn is None
        asked = need_dx and not our_dx, need_dw and not our_dw
        dx, dw = conv_bwd(g.dz, x, weight, geometry, *asked, training)
    if need_dx and our_dx:
        dx = torch.empty_like(x)
        w = kernel_weight(weight, x)
        convs(fusion, "dgrad", x).conv_dgrad(dx, None, g, w, geometry, bn, None, None)
    if need_dw and our_dw:
        dw = weight_like(cast(weight, x))
        convs(fusion, "wgrad", x).conv_wgrad(dw, g, x, geometry, bn, None)
        dw = dw.to(weight.dtype)
    return ConvGrads(dx, dw)


def folds(
    fusion: str, need_dx: bool, need_dw: bool, x: Tensor, weight: Tensor, geometry: list[int]
) -> bool:
    """Whether the conv's kernels form dy themselves."""
    asked = [name for name, need in (("dgrad", need_dx), ("wgrad", need_dw)) if need]
    if not (parse(fusion).rung.fold and asked):
        return False
    return all(own(fusion, name, x, weight, geometry) for name in asked)


def norm_sums(
    dz: Tensor, mask: Tensor | None, y: Tensor, norm: Norm, training: bool
) -> tuple[Gradient, NormGradient]:
    """The batch norm's sums by their pass, and its gradient as the conv's kernels fold it."""
    dgamma, dbeta = alloc_vectors(y, 2)
    backends.select(y).bn_bwd_reduce(
        dgamma, dbeta, None, dz, mask, y, norm.mean, norm.rstd, norm.gamma, norm.beta,
        None, None, None, "none" if mask is None else "mask",
    )  # fmt: skip
    return Gradient(dz, mask), NormGradient(y, as_normalise(norm), dgamma, dbeta, training)
