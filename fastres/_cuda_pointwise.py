"""The 1x1, stride 1 convolutions of the `cuda` backend on Hopper: csrc/cuda/pointwise*.

The functions of docs/kernels.md, for what `why_not` takes; fastres/_cuda.py asks it and gives the
rest to others. Nothing is allocated but workspaces (and a copy of a weight with odd strides). tile:
a place in pointwise_tiles' list, 0 the one chosen by shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import DTYPE, ptr, sizes


def _native():
    from . import _cuda

    return _cuda


def missing(device: torch.device) -> str | None:
    """None when these kernels run on the device, otherwise the reason."""
    cuda = _native()
    reason = cuda.why_missing()
    if reason is None and not cuda.on_host():
        index = device.index if device.index is not None else torch.cuda.current_device()
        reason = cuda._module().pointwise_missing(index) or None
    return reason


def why_not(x: Tensor, weight: Tensor, geometry) -> str | None:
    """None when these kernels take the conv, otherwise the reason."""
    if tuple(weight.shape[2:]) != (1, 1) or list(geometry) != [1, 1, 0, 0, *geometry[4:6], 1]:
        return "not a 1x1 conv of stride 1 and one group"
    if weight.shape[1] != x.shape[1]:
        return f"a weight of {weight.shape[1]} channels for {x.shape[1]}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {x.dtype}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is NCHW; the kernels take channels_last"
    n, c, h, w = x.shape
    return _native()._module().pointwise_refuses(n * h * w, c, weight.shape[0]) or None


def aligned(*tensors: Tensor | None) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, as the copy engine asks."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def _rows(weight: Tensor) -> Tensor:
    """The weight as a dense (K, C) matrix."""
    return weight.reshape(weight.shape[0], -1).contiguous()


def _vectors(norm) -> tuple[int, ...]:
    return (0, 0, 0, 0) if norm is None else tuple(ptr(v) for v in norm)


def _workspace(floats: int, like: Tensor) -> Tensor:
    return torch.empty(floats, dtype=torch.float32, device=like.device)


def _act(x: Tensor) -> tuple[int, bool, int, int, int]:
    """sizes(x); a tensor dense in both layouts is NHWC."""
    return (DTYPE[x.dtype], True, *sizes(x)[2:])


def conv_fprop(y, stats, z, mask, x, weight, geometry, norm, shortcut, eps, tile=0):
    """y = conv(h) and its statistics, h = x or relu(normalise(x) + shortcut)."""
    cuda = _native()
    n, c, h, w = x.shape
    k = y.shape[1]
    native, weight = cuda._module(), _rows(weight)
    work = None
    if stats is not None:
        work = _workspace(native.pointwise_fprop_floats(n * h * w, c, k, tile), x)
    rows = (None,) * 3 if stats is None else stats.unbind(0)
    other, other_norm = (None, None) if shortcut is None else shortcut
    native.pointwise_fprop(
        y.data_ptr(), *map(ptr, rows), ptr(z), ptr(mask), x.data_ptr(), weight.data_ptr(),
        _vectors(norm), norm is not None, ptr(other), _vectors(other_norm),
        other_norm is not None, float(eps), k, ptr(work), tile, *_act(x), *cuda._place(x),
    )  # fmt: skip


def conv_fprop_act(z, x, weight, geometry, norm, residual, relu, tile=0):
    """z = act(normalise(conv(x)) + residual)."""
    cuda = _native()
    weight = _rows(weight)
    cuda._module().pointwise_fprop_act(
        z.data_ptr(), x.data_ptr(), weight.data_ptr(), _vectors(norm), ptr(residual), bool(relu),
        z.shape[1], tile, *_act(x), *cuda._place(x),
    )  # fmt: skip


def _gradient(bn) -> tuple[tuple[int, ...], bool, bool]:
    """Pointers of the batch norm behind the conv; whether there is one; whether in training."""
    if bn is None:
        return (0,) * 6, False, False
    tensors = (bn.y, bn.norm.mean, bn.norm.rstd, bn.norm.gamma, bn.dgamma, bn.dbeta)
    return tuple(map(ptr, tensors)), True, bool(bn.training)


def conv_dgrad(dx, sums, g, weight, geometry, bn, dres, prev, tile=0):
    """dx = gate(dgrad(dy) + gate(dres)), and the sums of the batch norm before."""
    cuda = _native()
    native, weight = cuda._module(), _rows(weight)
    n, c, h, w = dx.shape
    k = weight.shape[0]
    outputs, before, dual = [0] * 3, [0] * 6, [0] * 3
    work = None
    if prev is not None:
        outputs = [ptr(sums.dgamma), ptr(sums.dbeta), 0]
        before = [ptr(prev.y), ptr(prev.mask), *_vectors(prev.norm)]
        if prev.shortcut is not None and prev.shortcut.norm is not None:
            other, norm = prev.shortcut
            outputs[2] = ptr(sums.res_dgamma)
            dual = [ptr(other), ptr(norm.mean), ptr(norm.rstd)]
        parts = 3 if dual[0] else 2
        work = _workspace(native.pointwise_dgrad_floats(n * h * w, c, k, parts, tile), dx)
    native.pointwise_dgrad(
        dx.data_ptr(), outputs, g.dz.data_ptr(), ptr(g.mask), weight.data_ptr(), *_gradient(bn),
        *((0, 0) if dres is None else (ptr(dres.dz), ptr(dres.mask))), before, dual, k, ptr(work),
        tile, *_act(dx), *cuda._place(dx),
    )  # fmt: skip


def conv_wgrad(dw, g, x, geometry, bn, norm, tile=0):
    """dw = sum over pixels of dy * h, h = x or relu(normalise(x))."""
    cuda = _native()
    native = cuda._module()
    n, c, h, w = x.shape
    k = dw.shape[0]
    work = _workspace(native.pointwise_wgrad_floats(n * h * w, c, k, tile), x)
    native.pointwise_wgrad(
        dw.data_ptr(), dw.stride(0), dw.stride(1), g.dz.data_ptr(), ptr(g.mask), x.data_ptr(),
        *_gradient(bn), _vectors(norm), norm is not None, k, work.data_ptr(),
        tile, *_act(x), *cuda._place(x),
    )  # fmt: skip
