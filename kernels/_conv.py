"""What the convolution kernels share: addressing, prologues, and the host's view of a conv.

A conv is an implicit GEMM over NHWC rows. Row m of the GEMM is a pixel (n, i, j) of a grid; for tap
(th, tw) it meets the input pixel

    h = i * mul_h + off_h + th * step_h,    w alike,

which is fprop with mul = stride, off = -padding, step = dilation, and one phase of dgrad with
mul = 1. Weights are K R S C (channels_last) in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres._tf32 import conv_tf32

from ._tile import (
    BF16,
    INTERPRETED,
    load_affine,
    load_vector,
    normalise,
    passes,
    rounded,
    row_stride,
    unpack_bits,
)

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def pixel(
    m, grid_h, grid_w, in_h, in_w, mul_h, mul_w, off_h, off_w,
    POINTWISE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """GEMM row -> (row of the input matrix at tap 0, its h, its w); the first may lie outside."""
    if POINTWISE:
        h = m * 0
        w = h
        row = m
    else:
        n = m // (grid_h * grid_w)
        ij = m % (grid_h * grid_w)
        h = ij // grid_w * mul_h + off_h
        w = ij % grid_w * mul_w + off_w
        row = (n * in_h + h) * in_w + w
    return row.to(tl.int64) if WIDE else row, h, w


@triton.jit
def inside(ok, h, w, in_h, in_w, POINTWISE: tl.constexpr):
    """Rows of a tile whose pixel exists."""
    if not POINTWISE:
        ok = ok & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
    return ok


@triton.jit
def load_tile(ptr, rows, cols, stride, ok):
    """ptr[rows, cols] of a row-major matrix, 0 where not ok."""
    return tl.load(ptr + (rows * stride)[:, None] + cols[None, :], mask=ok, other=0.0)


@triton.jit
def load_block(source, row0, rows, col0, cols, stride, ok, DESCRIPTOR: tl.constexpr):
    """load_tile of consecutive rows and columns; by the copy engine (TMA) where source is a tensor
    descriptor, which knows the borders."""
    if DESCRIPTOR:  # noqa: SIM108 (Triton compiles the branch that is taken)
        tile = source.load([row0, col0])
    else:
        tile = load_tile(source, rows, cols, stride, ok)
    return tile


@triton.jit
def load_gate(
    mask_ptr, rows, col0, row_ok, units, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The bits of rows and columns col0 .. col0 + BLOCK_N, as booleans. Groups (of GROUP columns,
    0: one) may begin inside a byte: then a byte is loaded for each element."""
    _, stride = row_stride(units, ALIGN)
    if GROUP % 8 == 0:
        b = col0 // 8 + tl.arange(0, BLOCK_N // 8)
        ok = row_ok[:, None] & (b < stride)[None, :]
        byte = tl.load(mask_ptr + (rows * stride)[:, None] + b[None, :], mask=ok, other=0)
        keep = unpack_bits(byte, BLOCK_M, BLOCK_N)
    else:
        col = col0 + tl.arange(0, BLOCK_N)
        ok = row_ok[:, None] & (col // 8 < stride)[None, :]
        byte = tl.load(mask_ptr + (rows * stride)[:, None] + (col // 8)[None, :], mask=ok, other=0)
        keep = ((byte.to(tl.int32) >> (col % 8)[None, :]) & 1) != 0
    return keep


@triton.jit
def column_tiles(size, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """How many tiles of BLOCK columns cover `size` of them, group by group (of GROUP; 0: one)."""
    if GROUP:  # noqa: SIM108 (Triton compiles the branch that is taken)
        tiles = size // GROUP * ((GROUP + BLOCK - 1) // BLOCK)
    else:
        tiles = tl.cdiv(size, BLOCK)
    return tiles


@triton.jit
def columns_of(
    tile, size, other, BLOCK: tl.constexpr, GROUP: tl.constexpr, OTHER: tl.constexpr
):  # fmt: skip
    """(first column of a tile, first and end of its group's columns, first and number of the
    channels that the group meets). A tile lies in one group, so that a NaN stays in its group.

    GROUP, OTHER: columns of a group, and the channels it meets; 0: one group of `size` and
    `other`."""
    if GROUP:
        tiles = (GROUP + BLOCK - 1) // BLOCK
        group = tile // tiles
        start = group * GROUP
        col0 = start + tile % tiles * BLOCK
        end = start + GROUP
        first = group * OTHER
        count = tile * 0 + OTHER
    else:
        start = tile * 0
        col0 = tile * BLOCK
        end = size
        first = tile * 0
        count = other
    return col0, start, end, first, count


@triton.jit
def activate(x, ok, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch, ch_ok):
    """relu(normalise(x)) in x's dtype, 0 where not ok: padding is 0 after the transform."""
    mean, scale, beta = load_affine(
        mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch[None, :], ch_ok[None, :]
    )
    stored = rounded(normalise(x.to(tl.float32), mean, scale, beta), x.dtype)
    return tl.where(ok & passes(stored), stored, 0.0).to(x.dtype)


@triton.jit
def norm_gradient(
    g, y, ok, mean_ptr, rstd_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr, inv_count, ch, ch_ok,
    DTYPE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dy of fp32 g (and raw y) in DTYPE, 0 where not ok. MODE: "none", "frozen" or "bn"."""
    if MODE != "none":
        mean, scale, _ = load_affine(
            mean_ptr, rstd_ptr, gamma_ptr, None, ch[None, :], ch_ok[None, :]
        )
        if MODE == "bn":
            rstd = load_vector(rstd_ptr, ch[None, :], ch_ok[None, :], 1.0)
            mean_g = load_vector(dbeta_ptr, ch[None, :], ch_ok[None, :], 0.0) * inv_count
            slope = load_vector(dgamma_ptr, ch[None, :], ch_ok[None, :], 0.0) * inv_count * rstd
            g = g - mean_g - (y.to(tl.float32) - mean) * slope
        g = tl.where(ok, scale * g, 0.0)
    return rounded(g, DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32. Triton's interpreter multiplies the bits of bf16: there they are
    widened, which is exact."""
    if INTERPRETED and a.dtype == BF16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# --- host -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Sizes of one conv: x (n, c, h, w), weight (k, c / groups, r, s), y (n, k, p, q)."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1

    @classmethod
    def of(cls, x_shape, weight_shape, geometry) -> Geometry:
        n, c, h, w = x_shape
        k, _, r, s = weight_shape
        sh, sw, ph, pw, dh, dw, groups = geometry
        p = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1
        q = (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
        return cls(n, c, h, w, k, r, s, p, q, (sh, sw), (ph, pw), (dh, dw), groups)

    @property
    def pointwise(self) -> bool:
        """A plain GEMM: 1x1, stride 1, no padding."""
        return (self.r, self.s, self.stride, self.padding) == (1, 1, (1, 1), (0, 0))

    @property
    def rows(self) -> int:
        """Rows of y."""
        return self.n * self.p * self.q

    @property
    def group_c(self) -> int:
        """Input channels of a group."""
        return self.c // self.groups

    @property
    def group_k(self) -> int:
        """Output channels of a group."""
        return self.k // self.groups

    @property
    def group_constants(self) -> dict[str, int]:
        """The kernels' GROUP_C and GROUP_K: 0 where there is one group."""
        if self.groups == 1:
            return {"GROUP_C": 0, "GROUP_K": 0}
        return {"GROUP_C": self.group_c, "GROUP_K": self.group_k}

    @property
    def flops(self) -> int:
        """Of each of fprop, dgrad and wgrad, counting padding as if it were there."""
        return 2 * self.rows * self.k * self.group_c * self.r * self.s


@dataclass(frozen=True)
class Phase:
    """Input pixels (i * stride + first) of one residue class, along one axis: what dgrad writes in
    one go.

    They meet the taps tap0, tap0 + tap_step, ... (`taps` of them), at output pixels
    i + off, i + off + step, ...
    """

    first: int
    size: int
    taps: int
    tap0: int
    tap_step: int
    off: int
    step: int


def phases(size: int, taps: int, stride: int, padding: int, dilation: int) -> list[Phase]:
    """dgrad's phases along one axis: x pixel h receives from y pixel (h + padding - r * dilation)
    / stride for the taps r where that is whole, and only those are multiplied."""
    out = []
    for first in range(min(stride, size)):
        mine = [r for r in range(taps) if (first + padding - r * dilation) % stride == 0]
        tap_step = stride // math.gcd(dilation, stride)
        tap0 = mine[0] if mine else 0
        assert mine == list(range(tap0, taps, tap_step)) or not mine
        out.append(
            Phase(
                first=first,
                size=len(range(first, size, stride)),
                taps=len(mine),
                tap0=tap0,
                tap_step=tap_step,
                off=(first + padding - tap0 * dilation) // stride,
                step=-(tap_step * dilation // stride),
            )
        )
    return out


def krsc(weight: torch.Tensor) -> torch.Tensor:
    """The weight with K R S C memory; copied if it is not (1/30 of a ResNet-50's activations at
    batch 8, 1/1000 at 256)."""
    return weight.contiguous(memory_format=torch.channels_last)


def units(channels: int) -> tuple[int, int]:
    """(channels / align, align): see Layout.align."""
    align = min(channels & -channels, 128)
    return channels // align, align


def wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an offset may pass 2^31 elements: the kernels then take 64-bit rows. The margin is a
    tile past the end."""
    return any(t is not None and t.numel() >= 2**31 - 2**24 for t in tensors)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies fp32: TF32 where the user allowed it for convolutions, as cuDNN."""
    if dtype == torch.float32 and conv_tf32():
        return "tf32"
    return "ieee"


def descriptors(arch, geo: Geometry, *tensors: torch.Tensor | None) -> bool:
    """Whether a conv's tiles are loaded by tensor descriptor: a plain GEMM whose tensors and rows
    start at whole 16 bytes, on an architecture with a copy engine. (A descriptor would load the
    next group's channels.)"""
    if not (arch.descriptors and geo.pointwise and geo.groups == 1):
        return False
    return all(
        t is None or (t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0)
        for t in tensors
    )


def source(x: torch.Tensor | None, rows: int, columns: int, by_descriptor: bool):
    """What load_block takes: x, or a descriptor of its (pixels, channels) matrix with (rows,
    columns) tiles."""
    if x is None or not by_descriptor:
        return x
    n, c, h, w = x.shape
    return TensorDescriptor(x, [n * h * w, c], [c, 1], [rows, columns])


def why_not(x: torch.Tensor, weight: torch.Tensor, geometry) -> str | None:
    """None when these kernels take the conv, otherwise the reason."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is NCHW; the kernels take channels_last"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {x.dtype}"
    return None
