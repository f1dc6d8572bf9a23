"""What the ops are made of: allocation, one conv, one batch norm, each forward and backward.

The `alloc_*` functions serve the real and the fake implementations alike, so that shapes and
strides cannot differ. Statistics of a batch norm travel as one tensor (3, C): mean, biased
variance, rstd."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastres import _pointwise, _wgrad, _winograd, backends, counters
from fastres._layout import is_dense, is_nhwc, mask_shape

GEOMETRY = 7  # ints of one conv: stride, padding, dilation (h, w each), groups


class Shortcut(NamedTuple):
    """What is added before the ReLU: a tensor as it is (norm None), or normalised by its own batch
    norm."""

    x: Tensor
    norm: Norm | None = None


class Norm:
    """A batch norm ready to apply: statistics (3, C), gamma, beta in the statistics' dtype.

    A backward under a saved mask needs no beta."""

    __slots__ = ("beta", "gamma", "mean", "rstd", "stats")

    def __init__(self, stats: Tensor, gamma: Tensor, beta: Tensor | None = None) -> None:
        self.stats, self.gamma, self.beta = stats, gamma, beta
        self.mean, _, self.rstd = stats.unbind(0)  # once: both passes ask for them


def stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense(x: Tensor, where: str) -> Tensor:
    """x itself when dense in NHWC or NCHW; otherwise a counted contiguous copy."""
    if is_dense(x):
        return x
    counters.count(f"{where}: input of strides {tuple(x.stride())} copied to a dense layout")
    return x.contiguous()


def in_format(x: Tensor, channels_last: bool, where: str) -> Tensor:
    """x dense in the given layout; a copy is counted."""
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    if x.is_contiguous(memory_format=fmt):
        return x
    counters.count(f"{where}: a tensor copied to {'NHWC' if channels_last else 'NCHW'}")
    return x.contiguous(memory_format=fmt)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come, so that something has to be saved for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def vector(t: Tensor, like: Tensor) -> Tensor:
    """A per-channel vector in the dtype the kernels take."""
    dtype = stats_dtype(like)
    return t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous()


def alloc_stats(x: Tensor) -> Tensor:
    return torch.empty((3, x.shape[1]), dtype=stats_dtype(x), device=x.device)


def alloc_mask(z: Tensor, save: bool) -> Tensor:
    shape = mask_shape(z) if save else (0, 0)
    return torch.empty(shape, dtype=torch.uint8, device=z.device)


def alloc_vectors(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` per-channel vectors; no two share storage, since ops return them."""
    return tuple(
        torch.empty(x.shape[1], dtype=stats_dtype(x), device=x.device) for _ in range(count)
    )


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t itself where it has the dtype: `to` costs a microsecond of host time to find that out."""
    return t if t.dtype == dtype else t.to(dtype)


def cast(w: Tensor, x: Tensor) -> Tensor:
    """Weights are used in the activation's dtype (fp32 master weights under autocast)."""
    return in_dtype(w, x.dtype)


def _winograd_runs(
    what: str, x: Tensor, weight: Tensor, geometry: list[int], batch_statistics: bool
) -> bool:
    """Whether a pass of a conv runs on the kernels of _winograd. A value that is not finite reaches
    more pixels there: only under a batch norm that spreads it to the whole channel anyway."""
    if not batch_statistics or not x.is_cpu or backends.forced() not in (None, "cpu"):
        return False
    if not is_nhwc(x) or weight.dtype not in (x.dtype, torch.float32):
        return False
    k, _, *taps = weight.shape
    if type(x) is Tensor:  # sizes are plain numbers
        return _winograd.runs(what, x.shape, x.dtype, k, tuple(geometry), tuple(taps))
    return _winograd.why_not(what, x.shape, x.dtype, k, geometry, taps) is None


Fprop = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def fprop_of(
    x: Tensor, weight: Tensor, geometry: list[int], batch_statistics: bool = False
) -> tuple[Fprop, bool]:
    """(run, any_dtype): run(x, weight) is the conv, without a bias, on tensors of these sizes and
    strides; by the vendor, its convolution or its matrix product, or by Winograd's algorithm,
    whichever is faster. It takes the weight in x's dtype, or, any_dtype, as it is.

    batch_statistics: a batch norm in training mode follows."""
    sh, sw, ph, pw, dh, dw, groups = geometry
    if _winograd_runs("fprop", x, weight, geometry, batch_statistics):
        return lambda x, w: _winograd.fprop(x, w, ph), True
    if _pointwise.runs("fprop", x, weight, geometry):
        return lambda x, w: _pointwise.fprop(x, w, (sh, sw)), False
    where = [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups

    def vendor(x: Tensor, weight: Tensor) -> Tensor:
        return torch.convolution(x, weight, None, *where)

    return vendor, False


def backward_of(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: list[int],
    need_dx: bool,
    need_dw: bool,
    batch_statistics: bool = False,
    as_summed: bool = False,
) -> Backward:
    """run(dy, x, weight) -> (dx, dw), dw in the weight's dtype, or, as_summed, in fp32 where our
    kernels sum it; on tensors of these sizes and strides. batch_statistics: as in `fprop_of`."""
    sh, sw, ph, pw, dh, dw, groups = geometry
    stride = sh, sw
    dgrad: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    wgrad: Callable[[Tensor, Tensor], Tensor] | None = None
    if is_nhwc(dy):
        if not need_dx:
            pass
        elif _winograd_runs("dgrad", x, weight, geometry, batch_statistics):
            dgrad = lambda dy, x, w: _winograd.dgrad(dy, w, ph)  # noqa: E731
        elif _pointwise.runs("dgrad", x, weight, geometry):
            dgrad = lambda dy, x, w: _pointwise.dgrad(dy, cast(w, x), x.shape, stride)  # noqa: E731
        if not need_dw:
            pass
        elif _winograd_runs("wgrad", x, weight, geometry, batch_statistics):
            wgrad = lambda dy, x: _winograd.wgrad(dy, x, ph)  # noqa: E731
        elif _wgrad.runs(dy, x, weight, geometry):
            taps = weight.shape[2:]
            wgrad = lambda dy, x: _wgrad.wgrad(dy, x, taps, geometry)  # noqa: E731
        elif _pointwise.runs("wgrad", x, weight, geometry):
            wgrad = lambda dy, x: _pointwise.wgrad(dy, x, stride)  # noqa: E731
    vendor = [need_dx and dgrad is None, need_dw and wgrad is None, False]
    where = None, [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups, vendor

    def run(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad_x = None if dgrad is None else dgrad(dy, x, weight)
        grad_w = None if wgrad is None else wgrad(dy, x)
        if vendor[0] or vendor[1]:
            vendor_x, vendor_w, _ = _convolution_backward(dy, x, cast(weight, x), *where)
            grad_x = vendor_x if vendor[0] else grad_x
            grad_w = vendor_w if vendor[1] else grad_w
        if grad_w is not None and not as_summed and grad_w.dtype != weight.dtype:
            grad_w = grad_w.to(weight.dtype)
        return grad_x, grad_w

    return run


_convolution_backward = torch.ops.aten.convolution_backward.default


def conv_weight(
    x: Tensor, weight: Tensor, geometry: list[int], batch_statistics: bool = False
) -> Tensor:
    """The weight as `conv_fwd` reads it, for a caller that keeps it for the backward: in x's dtype
    unless Winograd's algorithm takes it as it is."""
    if weight.dtype == x.dtype or fprop_of(x, weight, geometry, batch_statistics)[1]:
        return weight
    return weight.to(x.dtype)


def conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    batch_statistics: bool = False,
) -> Tensor:
    """conv(x); batch_statistics as in `fprop_of`."""
    if bias is None:
        run, any_dtype = fprop_of(x, weight, geometry, batch_statistics)
        return run(x, weight if any_dtype else cast(weight, x))
    sh, sw, ph, pw, dh, dw, groups = geometry
    weight, bias = cast(weight, x), cast(bias, x)
    return torch.convolution(x, weight, bias, [sh, sw], [ph, pw], [dh, dw], False, [0, 0], groups)


def conv_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: list[int],
    need_dx: bool,
    need_dw: bool,
    batch_statistics: bool = False,
    as_summed: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw) as `backward_of` says."""
    run = backward_of(dy, x, weight, geometry, need_dx, need_dw, batch_statistics, as_summed)
    return run(dy, x, weight)


def bn_statistics(
    x: Tensor, training: bool, running_mean: Tensor, running_var: Tensor, eps: float
) -> Tensor:
    """Statistics (3, C) to normalise x by: the batch's, or the running ones."""
    stats = alloc_stats(x)
    if training:
        backends.select(x).bn_stats(*stats.unbind(0), x, eps)
    else:
        running_statistics(stats, running_mean, running_var, eps)
    return stats


def running_statistics(
    stats: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> None:
    """stats (3, C) from the running mean and variance."""
    stats[0].copy_(running_mean)
    stats[1].copy_(running_var)
    torch.rsqrt(stats[1] + eps, out=stats[2])


def normalise(
    x: Tensor,
    norm: Norm,
    relu: bool,
    save_mask: bool = False,
    shortcut: Shortcut | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(z, mask) of z = act(norm(x) + shortcut); `out` may be x itself where x is not needed
    again."""
    z = torch.empty_like(x) if out is None else out
    mask = alloc_mask(x, save_mask)
    res, res_norm = (None, None) if shortcut is None else shortcut
    res_vectors: tuple = (None,) * 4
    if res_norm is not None:
        res_vectors = (res_norm.mean, res_norm.rstd, res_norm.gamma, res_norm.beta)
    backends.select(x).bn_apply(
        z, mask if save_mask else None, x, norm.mean, norm.rstd, norm.gamma, norm.beta,
        res, *res_vectors, relu,
    )  # fmt: skip
    return z, mask


class NormGrads(NamedTuple):
    """Gradients of z = act(norm(x) + shortcut)."""

    dx: Tensor
    dgamma: Tensor
    dbeta: Tensor
    dres: Tensor | None = None
    res_dgamma: Tensor | None = None


def normalise_bwd(
    dz: Tensor,
    mask: Tensor | None,
    x: Tensor,
    norm: Norm,
    gate: str,
    training: bool,
    shortcut: Shortcut | None = None,
    res_training: bool = False,
    want_dres: bool = True,
    inplace: bool = False,
) -> NormGrads:
    """The two passes of a batch norm's backward: sums, then apply. `inplace` writes dx over dz."""
    backend = backends.select(x)
    dual = shortcut is not None and shortcut.norm is not None
    vectors = alloc_vectors(x, 3 if dual else 2)
    dgamma, dbeta = vectors[:2]
    res_dgamma = vectors[2] if dual else None
    res, res_norm = (None, None) if not dual or shortcut is None else shortcut
    res_mean, res_rstd, res_gamma = (
        (None, None, None) if res_norm is None else (res_norm.mean, res_norm.rstd, res_norm.gamma)
    )
    backend.bn_bwd_reduce(
        dgamma, dbeta, res_dgamma, dz, mask, x, norm.mean, norm.rstd, norm.gamma, norm.beta,
        res, res_mean, res_rstd, gate,
    )  # fmt: skip
    dx = dz if inplace else torch.empty_like(x)
    dres = torch.empty_like(x) if shortcut is not None and want_dres else None
    backend.bn_bwd_apply(
        dx, dres, dz, mask, x, norm.mean, norm.rstd, norm.gamma, norm.beta, dgamma, dbeta,
        res, res_mean, res_rstd, res_gamma, res_dgamma, gate, training, res_training,
    )  # fmt: skip
    return NormGrads(dx, dgamma, dbeta, dres, res_dgamma)
