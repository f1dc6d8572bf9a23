"""add_relu: z = relu(a + b). relu_bwd: dx = gate(dz) + dy.

add_relu reads 2, writes 1 tensor and the bits; relu_bwd reads 1-2 and the bits, writes 1.
Accumulates in fp32; rounded once, and the ReLU gates the rounded value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import SIZES, elementwise_tile, flat, launch, layout
from ._tile import locate, pack_bits, passes, rounded, unpack_bits


@triton.jit(do_not_specialize=SIZES)
def _add_relu_kernel(
    z_ptr,  # (outer, inner)
    mask_ptr,  # (outer, ceil(inner / 8)) uint8 or None
    a_ptr,  # (outer, inner)
    b_ptr,  # (outer, inner)
    outer,
    inner_units,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 1. locate the tile
    row0, col0, row_ok, col_ok, at, bits_at, bits_ok = locate(
        outer, inner_units, ALIGN, BLOCK_M, BLOCK_N
    )
    ok = row_ok[:, None] & col_ok[None, :]

    # 2. load tile
    a = tl.load(a_ptr + at, mask=ok, other=0.0)
    b = tl.load(b_ptr + at, mask=ok, other=0.0)

    # 3. add, gate the stored value
    stored = rounded(a.to(tl.float32) + b.to(tl.float32), z_ptr.dtype.element_ty)
    keep = passes(stored)

    # 4. pack the bits
    if mask_ptr is not None:
        tl.store(mask_ptr + bits_at, pack_bits(keep & ok, BLOCK_M, BLOCK_N), mask=bits_ok)

    # 5. store tile
    tl.store(z_ptr + at, tl.where(keep, stored, 0.0), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def _relu_bwd_kernel(
    dx_ptr,  # (outer, inner)
    dy_ptr,  # (outer, inner) or None
    dz_ptr,  # (outer, inner)
    mask_ptr,  # (outer, ceil(inner / 8)) uint8
    outer,
    inner_units,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 1. locate the tile
    row0, col0, row_ok, col_ok, at, bits_at, bits_ok = locate(
        outer, inner_units, ALIGN, BLOCK_M, BLOCK_N
    )
    ok = row_ok[:, None] & col_ok[None, :]

    # 2. load tile
    g = tl.load(dz_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if dy_ptr is not None:
        dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)

    # 3. unpack the bits, gate
    byte = tl.load(mask_ptr + bits_at, mask=bits_ok, other=0)
    dx = tl.where(unpack_bits(byte, BLOCK_M, BLOCK_N), g, 0.0)

    # 4. add, store tile
    if dy_ptr is not None:
        dx = dx + dy
    tl.store(dx_ptr + at, rounded(dx, dx_ptr.dtype.element_ty), mask=ok)


def add_relu(z, mask, a, b):
    lay = flat(layout(a), mask is not None)
    tile = elementwise_tile(lay, a.element_size())
    launch(
        _add_relu_kernel,
        triton.cdiv(lay.outer, tile.block_m) * triton.cdiv(lay.inner, tile.block_n),
        (z, mask, a, b, lay.outer, lay.inner // lay.align),
        num_warps=tile.num_warps,
        ALIGN=lay.align,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )


def relu_bwd(dx, dy, dz, mask):
    lay = flat(layout(dz), True)
    tile = elementwise_tile(lay, dz.element_size())
    launch(
        _relu_bwd_kernel,
        triton.cdiv(lay.outer, tile.block_m) * triton.cdiv(lay.inner, tile.block_n),
        (dx, dy, dz, mask, lay.outer, lay.inner // lay.align),
        num_warps=tile.num_warps,
        ALIGN=lay.align,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
