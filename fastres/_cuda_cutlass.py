"""The convolutions of the `cuda` backend on Hopper (docs/kernels.md), on CUTLASS's implicit-GEMM
collectives (csrc/cuda/conv*).

Statistics, affine, residual, ReLU, gates and batch norm's sums are in the GEMMs' epilogues. What a
conv wants of its operands beforehand (a normalised input, dy from the gradient of the batch norm
behind) is formed by the passes of `_cuda` into a tensor of its own, as TMA copies operands as they
are."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import _cuda, _native, counters
from ._arguments import DTYPE, GATE, ptr
from ._contract import Gradient, Normalise, NormGradient, Previous, Shortcut, Sums
from ._layout import is_nhwc

_FPROP, _DGRAD, _WGRAD = range(3)
_NONE = (None,) * 5  # no residual
_OPEN = 64  # stands for a batch, height or width that a compiled model leaves open


def built() -> str | None:
    """None when the build has the convolutions, otherwise the reason."""
    if _cuda.on_host():
        return None
    missing = _cuda.built()
    if missing is not None:
        return missing
    if hasattr(_native.module().cuda, "conv_fprop"):
        return None
    reasons = (_native.build_info() or {}).get("not_built", {})
    return (
        "fastres._C was built without the CUDA convolutions: "
        f"{reasons.get('CUDA convolutions', 'unknown')}"
    )


def conv_missing(device: torch.device) -> str | None:
    reason = built()
    if reason is not None or _cuda.on_host():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return (
            "the CUDA C++ convolutions are for Hopper (sm_90a), "
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}"
        )
    return None


# --- arguments ------------------------------------------------------------------------------------


def _sizes(x: Tensor, weight: Tensor, geometry: list[int]) -> tuple[int, tuple[int, ...]]:
    """dtype code; N H W C, K R S, P Q, stride, padding, dilation."""
    return DTYPE.get(x.dtype, 0), _sizes_of(tuple(x.shape), weight, geometry)


def _sizes_of(shape: tuple[int, ...], weight: Tensor, geometry: list[int]) -> tuple[int, ...]:
    n, c, h, w = shape
    k, of_group, r, s = weight.shape
    sh, sw, ph, pw, dh, dw, groups = geometry
    if groups != 1 or of_group != c:  # the launchers have no argument for it: they would read on
        raise ValueError(
            f"fastres cuda: a conv of {groups} groups, {c} channels and a weight of "
            f"{tuple(weight.shape)}: the kernels take one group and a weight of all channels "
            "(conv_why_not tells beforehand)"
        )
    p = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1
    q = (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
    return n, h, w, c, k, r, s, p, q, sh, sw, ph, pw, dh, dw


@functools.lru_cache(maxsize=1024)
def _refused(
    host: ModuleType | None, missing: str | None, dtype: int, sizes: tuple[int, ...]
) -> str | None:
    return missing or _cuda._module().conv_why_not(dtype, sizes) or None


def conv_why_not(x: Tensor, weight: Tensor, geometry: list[int]) -> str | None:
    """Why the kernels do not take a conv; None when they do.

    A fake implementation asks for the strides of its results, on sizes that may be open: no guard
    is set on those, and where one is too large is found when the op runs."""
    if not is_nhwc(x):
        return "the input is NCHW; the kernels take channels_last"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')}: the kernels take bfloat16 and float16"
    if geometry[-1] != 1:
        return f"groups={geometry[-1]}: the kernels take one group"
    if type(x) is Tensor:
        return _refused(_cuda._host, built(), *_sizes(x, weight, geometry))
    n, c, h, w = x.shape
    n, h, w = (size if isinstance(size, int) else _OPEN for size in (n, h, w))
    sizes = _sizes_of((n, int(c), h, w), weight, geometry)
    return _refused(_cuda._host, built(), DTYPE[x.dtype], sizes)


def conv_bwd_pointwise_why_not(
    x: Tensor, weight: Tensor, geometry: list[int], frozen: bool
) -> str | None:
    return "these kernels do dgrad and wgrad one after the other"


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy at a multiple of 16 bytes, as the copy engine wants it; allocations are."""
    if t.data_ptr() % 16 == 0:
        return t
    counters.count("cuda convolution: copied a tensor that is not aligned to 16 bytes")
    return t.clone()


def _output(t: Tensor) -> Tensor:
    """t, or a tensor to compute in and copy from."""
    dense = t.is_contiguous(memory_format=torch.channels_last)
    if dense and t.data_ptr() % 16 == 0:
        return t
    counters.count("cuda convolution: copied a result to a tensor of other strides or alignment")
    return torch.empty_like(t, memory_format=torch.channels_last)


def _deliver(to: Tensor, out: Tensor) -> None:
    if out is not to:
        to.copy_(out)


def _krsc(weight: Tensor) -> Tensor:
    """The weight with K R S C memory; a copy if it has another."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _aligned(weight)


def _workspace(x: Tensor, which: int, dtype: int, sizes: tuple[int, ...], tile: int) -> Tensor:
    """fp32, every element is written before it is read."""
    floats = _cuda._module().conv_workspace_floats(which, dtype, sizes, tile)
    return torch.empty(floats, dtype=torch.float32, device=x.device)


def _vectors(norm: Normalise | None) -> list[Tensor | None]:
    return [None] * 4 if norm is None else [None if v is None else _aligned(v) for v in norm]


# --- operands -------------------------------------------------------------------------------------


def _input(
    x: Tensor,
    norm: Normalise | None,
    shortcut: Shortcut | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """h = x, or relu(normalise(x) + shortcut) in z or a tensor of its own."""
    if norm is None:
        return _aligned(x)
    h = torch.empty_like(x) if z is None else z
    other: tuple[Tensor | None, ...] = _NONE
    if shortcut is not None:
        other = (shortcut.x, *(shortcut.norm or _NONE[:4]))
    residual, mean, rstd, gamma, beta = other
    _cuda.bn_apply(h, mask, x, *norm, residual, mean, rstd, gamma, beta, True)
    return _aligned(h)


def _dy(g: Gradient, bn: NormGradient | None) -> Tensor:
    """The gradient of the conv's output, in a tensor of its own unless it is dz."""
    if bn is None and g.mask is None:
        return _aligned(g.dz)
    dy = torch.empty_like(g.dz)
    if bn is None:
        _cuda.relu_bwd(dy, None, g.dz, g.mask)
    else:
        _cuda.bn_bwd_apply(
            dy, None, g.dz, g.mask, bn.y, *bn.norm, bn.dgamma, bn.dbeta, *_NONE,
            "none" if g.mask is None else "mask", bn.training, False,
        )  # fmt: skip
    return dy


# --- passes: tile is a place in conv_tiles' list, 0 the one chosen by shape -----------------------


def conv_fprop(y, stats, z, mask, x, weight, geometry, norm, shortcut, eps, tile=0):
    """y = conv(h) and its statistics, h = x or relu(normalise(x) + shortcut)."""
    h, w, out = _input(x, norm, shortcut, z, mask), _krsc(weight), _output(y)
    dtype, sizes = _sizes(x, weight, geometry)
    rows = [None] * 3 if stats is None else list(stats.unbind())
    work = None if stats is None else _workspace(x, _FPROP, dtype, sizes, tile)
    _cuda._module().conv_fprop(
        out.data_ptr(), *(ptr(v) for v in rows), h.data_ptr(), w.data_ptr(), float(eps),
        ptr(work), tile, dtype, sizes, *_cuda._place(x),
    )  # fmt: skip
    _deliver(y, out)


def conv_fprop_act(z, x, weight, geometry, norm, residual, relu, tile=0):
    """z = act(normalise(conv(x)) + residual)."""
    h, w, out = _aligned(x), _krsc(weight), _output(z)
    res = None if residual is None else _aligned(residual)
    vectors = _vectors(norm)  # names: they must outlive the call
    dtype, sizes = _sizes(x, weight, geometry)
    _cuda._module().conv_fprop_act(
        out.data_ptr(), h.data_ptr(), w.data_ptr(), *(ptr(v) for v in vectors), ptr(res),
        bool(relu), tile, dtype, sizes, *_cuda._place(x),
    )  # fmt: skip
    _deliver(z, out)


def conv_dgrad(dx, sums, g, weight, geometry, bn, dres, prev, tile=0):
    """dx = gate(dgrad(dy) + dres), and the sums of the batch norm before the conv."""
    _dgrad(dx, sums, _dy(g, bn), weight, geometry, dres, prev, tile)


def _dgrad(
    dx: Tensor,
    sums: Sums | None,
    dy: Tensor,
    weight: Tensor,
    geometry: list[int],
    dres: Gradient | None,
    prev: Previous | None,
    tile: int = 0,
) -> None:
    w, out = _krsc(weight), _output(dx)
    dtype, sizes = _sizes(dx, weight, geometry)
    res = None if dres is None else _aligned(dres.dz)
    res_mask = None if dres is None else dres.mask
    y = mask = other = res_mean = res_rstd = work = None
    vectors, gate, made = _vectors(None), GATE["none"], Sums(None, None)  # type: ignore[arg-type]
    if prev is not None:
        assert sums is not None
        y, mask, vectors, made = _aligned(prev.y), prev.mask, _vectors(prev.norm), sums
        gate = GATE["recompute" if mask is None else "mask"]
        work = _workspace(dx, _DGRAD, dtype, sizes, tile)
        if prev.shortcut is not None and prev.shortcut.norm is not None:
            other = _aligned(prev.shortcut.x)
            res_mean, res_rstd = _aligned(prev.shortcut.norm.mean), prev.shortcut.norm.rstd
    _cuda._module().conv_dgrad(
        out.data_ptr(), *(ptr(v) for v in made), dy.data_ptr(), w.data_ptr(), ptr(res),
        ptr(res_mask), gate, ptr(mask), ptr(y), *(ptr(v) for v in vectors), ptr(other),
        ptr(res_mean), ptr(res_rstd), ptr(work), tile, dtype, sizes, *_cuda._place(dx),
    )  # fmt: skip
    _deliver(dx, out)


def conv_wgrad(dw, g, x, geometry, bn, norm, tile=0):
    """dw = wgrad(dy, h), h = x or relu(normalise(x))."""
    _wgrad(dw, _dy(g, bn), _input(x, norm), geometry, tile)


def _wgrad(dw: Tensor, dy: Tensor, h: Tensor, geometry: list[int], tile: int = 0) -> None:
    out = _output(dw)
    dtype, sizes = _sizes(h, dw, geometry)
    work = _workspace(h, _WGRAD, dtype, sizes, tile)
    _cuda._module().conv_wgrad(
        out.data_ptr(), dy.data_ptr(), h.data_ptr(), work.data_ptr(), tile, dtype, sizes,
        *_cuda._place(h),
    )  # fmt: skip
    _deliver(dw, out)


def conv_bwd_pointwise(dx, sums, dw, g, x, weight, geometry, bn, norm, dres, prev):
    """conv_dgrad and conv_wgrad; dy is formed once for both."""
    dy = _dy(g, bn)
    _wgrad(dw, dy, _input(x, norm), geometry)
    _dgrad(dx, sums, dy, weight, geometry, dres, prev)
