"""bn_apply: z = act(normalise(x) + r), r = 0, residual or normalise(residual).
normalise(x) = (x - mean) * (gamma * rstd) + beta.

Reads 1-2, writes 1 tensor (and 1/16 of one in bf16 for the mask).
Accumulates in fp32; rounded once, and the ReLU gates the rounded value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import SIZES, elementwise_tile, launch, layout
from ._tile import load_affine, locate, normalise, pack_bits, passes, rounded


@triton.jit(do_not_specialize=SIZES)
def _bn_apply_kernel(
    z_ptr,  # (outer, inner)
    mask_ptr,  # (outer, ceil(inner / 8)) uint8 or None
    x_ptr,  # (outer, inner)
    mean_ptr,  # (C,) fp32 or None, like all vectors
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    res_ptr,  # (outer, inner) or None
    res_mean_ptr,
    res_rstd_ptr,
    res_gamma_ptr,
    res_beta_ptr,
    outer,
    inner_units,
    C,
    ALIGN: tl.constexpr,
    NHWC: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 1. locate the tile
    row0, col0, row_ok, col_ok, at, bits_at, bits_ok = locate(
        outer, inner_units, ALIGN, BLOCK_M, BLOCK_N
    )
    ok = row_ok[:, None] & col_ok[None, :]

    # 2. load tile
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if res_ptr is not None:
        r = tl.load(res_ptr + at, mask=ok, other=0.0).to(tl.float32)

    # 3. load per-channel vectors
    if NHWC:
        ch = (col0 + tl.arange(0, BLOCK_N))[None, :]
        ch_ok = col_ok[None, :]
    else:
        ch = ((row0 + tl.arange(0, BLOCK_M)) % C)[:, None]
        ch_ok = row_ok[:, None]
    mean, scale, beta = load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch, ch_ok)

    # 4. normalise, add
    z = normalise(x, mean, scale, beta)
    if res_ptr is not None:
        if res_mean_ptr is not None:
            r_mean, r_scale, r_beta = load_affine(
                res_mean_ptr, res_rstd_ptr, res_gamma_ptr, res_beta_ptr, ch, ch_ok
            )
            r = normalise(r, r_mean, r_scale, r_beta)
        z = z + r
    stored = rounded(z, z_ptr.dtype.element_ty)

    # 5. gate the stored value, pack the bits
    if RELU:
        keep = passes(stored)
        stored = tl.where(keep, stored, 0.0)
        if mask_ptr is not None:
            tl.store(mask_ptr + bits_at, pack_bits(keep & ok, BLOCK_M, BLOCK_N), mask=bits_ok)

    # 6. store tile
    tl.store(z_ptr + at, stored, mask=ok)


def bn_apply(
    z, mask, x, mean, rstd, gamma, beta, residual, res_mean, res_rstd, res_gamma, res_beta, relu
):
    lay = layout(x)
    tile = elementwise_tile(lay, x.element_size())
    launch(
        _bn_apply_kernel,
        triton.cdiv(lay.outer, tile.block_m) * triton.cdiv(lay.inner, tile.block_n),
        (z, mask, x, mean, rstd, gamma, beta)
        + (residual, res_mean, res_rstd, res_gamma, res_beta)
        + (lay.outer, lay.inner // lay.align, lay.channels),
        num_warps=tile.num_warps,
        ALIGN=lay.align,
        NHWC=lay.nhwc,
        RELU=bool(relu),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
