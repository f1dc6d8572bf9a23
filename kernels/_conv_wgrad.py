"""conv_wgrad: dw[k, c, r, s] = sum over pixels of dy[., k] * h[., c at tap (r, s)].

dy is given, or formed from the gradient of the batch norm behind the conv and the raw y; h is x, or
relu(normalise(x)) recomputed. A program owns (k, c) tile at one tap and a chunk of pixels; the
chunks' partials (splits, K, R, S, C) in fp32 are summed in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _conv_few as few
from ._conv import (
    Geometry,
    activate,
    column_tiles,
    columns_of,
    descriptors,
    dot,
    inside,
    load_block,
    load_gate,
    norm_gradient,
    pixel,
    precision,
    source,
    units,
    wide,
)
from ._conv_config import arch_of, wgrad_config, wgrad_cut
from ._conv_dgrad import norm_arguments
from ._launch import SIZES, launch
from ._tile import bound, rounded


@triton.jit(do_not_specialize=SIZES)
def _conv_wgrad_kernel(
    part_ptr,  # (splits, K, R * S, C / groups) fp32
    g_ptr,  # (rows, K): dy, or the gradient of the batch norm behind the conv
    gmask_ptr,  # (rows, ceil(K / 8)) uint8: its gate, or None
    y_ptr,  # (rows, K) or None
    x_ptr,  # (N * H * W, C); it, g_ptr and y_ptr are descriptors where DESCRIPTOR
    mean_ptr,  # (K,) fp32: the batch norm behind the conv, or None
    rstd_ptr,
    gamma_ptr,
    dgamma_ptr,
    dbeta_ptr,
    in_mean_ptr,  # (C,) fp32: the input's batch norm; None: x is taken as it is
    in_rstd_ptr,
    in_gamma_ptr,
    in_beta_ptr,
    inv_count,
    rows,
    grid_h,
    grid_w,
    in_h,
    in_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    taps_h,
    taps_w,
    c_units,
    k_units,
    chunk,  # rows of a split
    C_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of a group; 0: one group
    GROUP_K: tl.constexpr,
    POINTWISE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # input channels
    BLOCK_K: tl.constexpr,  # output channels
):
    # 1. locate the tile: input channels, then taps, then output channels, then the split, so that
    # programs that run together read the same pixels
    C = c_units * C_ALIGN
    K = k_units * K_ALIGN
    taps = taps_h * taps_w
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(GROUP_C if GROUP_C else C, BLOCK_N)
    tiles_k = column_tiles(K, BLOCK_K, GROUP_K)
    tap = pid // tiles_c % taps
    k0, _, k_end, c_first, c_count = columns_of(
        pid // (tiles_c * taps) % tiles_k, K, C, BLOCK_K, GROUP_K, GROUP_C
    )
    c0 = c_first + pid % tiles_c * BLOCK_N
    split = pid // (tiles_c * taps * tiles_k)
    dh = tap // taps_w * dil_h
    dw = tap % taps_w * dil_w
    col = c0 + tl.arange(0, BLOCK_N)
    ch = k0 + tl.arange(0, BLOCK_K)
    col_ok = col < c_first + c_count
    ch_ok = ch < k_end

    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for m0 in range(bound(split * chunk), bound(tl.minimum(split * chunk + chunk, rows)), BLOCK_M):
        # 2. load tiles
        m = m0 + tl.arange(0, BLOCK_M)
        m_ok = m < rows
        x_row, h0, w0 = pixel(
            m, grid_h, grid_w, in_h, in_w, stride_h, stride_w, -pad_h, -pad_w, POINTWISE, WIDE
        )
        if not POINTWISE:
            x_row += dh * in_w + dw
        x_ok = inside(m_ok, h0 + dh, w0 + dw, in_h, in_w, POINTWISE)[:, None] & col_ok[None, :]
        g_ok = m_ok[:, None] & ch_ok[None, :]
        row = m.to(tl.int64) if WIDE else m
        g = load_block(g_ptr, m0, row, k0, ch, K, g_ok, DESCRIPTOR)
        y = g
        if MODE == "bn":
            y = load_block(y_ptr, m0, row, k0, ch, K, g_ok, DESCRIPTOR)
        x = load_block(x_ptr, m0, x_row, c0, col, C, x_ok, DESCRIPTOR)

        # 3. prologues
        if gmask_ptr is not None:
            keep = load_gate(gmask_ptr, row, k0, m_ok, k_units, K_ALIGN, BLOCK_M, BLOCK_K, GROUP_K)
            g = tl.where(keep, g, 0.0).to(g.dtype)
        if MODE != "none":
            g = norm_gradient(
                g.to(tl.float32), y, g_ok, mean_ptr, rstd_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr,
                inv_count, ch, ch_ok, x.dtype, MODE,
            )  # fmt: skip
        if in_mean_ptr is not None:
            x = activate(x, x_ok, in_mean_ptr, in_rstd_ptr, in_gamma_ptr, in_beta_ptr, col, col_ok)

        # 4. multiply
        acc = dot(tl.trans(g), x, acc, PRECISION)

    # 5. store partials
    at = (split * K + ch[:, None]).to(tl.int64) * (taps * c_count) + tap * c_count
    at += (col - c_first)[None, :]
    tl.store(part_ptr + at, acc, mask=ch_ok[:, None] & col_ok[None, :])


@triton.jit
def _conv_wgrad_finalise_kernel(
    dw_ptr,  # (K, C, R, S), any strides
    part_ptr,  # (splits, K, R * S, C) fp32
    numel,
    taps,
    C,
    stride_k,
    stride_c,
    stride_tap,
    splits,
    BLOCK: tl.constexpr,
):
    # 1. add the splits in order
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < numel
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, bound(splits)):
        at = tl.cast(split, tl.int64) * numel + i
        acc += tl.load(part_ptr + at, mask=ok, other=0.0)

    # 2. store in the weight's own order
    at = i // (taps * C) * stride_k + i // C % taps * stride_tap + i % C * stride_c
    tl.store(dw_ptr + at, rounded(acc, dw_ptr.dtype.element_ty), mask=ok)


def add_splits(dw, part):
    """dw = the sum of part (splits, K, R * S, C / groups) over splits."""
    splits = part.shape[0]
    k, c, r, s = dw.shape
    assert r == 1 or dw.stride(2) == s * dw.stride(3), dw.stride()
    stride_tap = dw.stride(3) if s > 1 else dw.stride(2)
    block = 1024
    launch(
        _conv_wgrad_finalise_kernel,
        triton.cdiv(dw.numel(), block),
        (dw, part, dw.numel(), r * s, c, dw.stride(0), dw.stride(1), stride_tap, splits),
        num_warps=4,
        BLOCK=block,
    )


def conv_wgrad(dw, g, x, geometry, bn, norm):
    geo = Geometry.of(x.shape, dw.shape, geometry)
    mode, y, vectors = norm_arguments(bn)
    if norm is None and few.takes(geo):
        add_splits(dw, few.conv_wgrad(g, x, geo, (mode, y, vectors)))
        return
    config = wgrad_config(geo, x, mode, norm is not None)
    tiles, splits, chunk = wgrad_cut(geo, config, arch_of(x.device).split_steps)
    part = torch.empty(
        (splits, geo.k, geo.r * geo.s, geo.group_c), dtype=torch.float32, device=x.device
    )
    by_descriptor = descriptors(arch_of(x.device), geo, x, g.dz, y)
    dz, y = (source(t, config.block_m, config.block_k, by_descriptor) for t in (g.dz, y))
    tile_x = config.block_m, config.block_n
    c_units, c_align = units(geo.c)
    k_units, k_align = units(geo.k)
    launch(
        _conv_wgrad_kernel,
        tiles * splits,
        (part, dz, g.mask, y, source(x, *tile_x, by_descriptor), *vectors)
        + ((None,) * 4 if norm is None else tuple(norm))
        + (1.0 / geo.rows, geo.rows, geo.p, geo.q, geo.h, geo.w)
        + (*geo.stride, *geo.padding, *geo.dilation, geo.r, geo.s, c_units, k_units, chunk),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        C_ALIGN=c_align,
        K_ALIGN=k_align,
        **geo.group_constants,
        POINTWISE=geo.pointwise,
        DESCRIPTOR=by_descriptor,
        WIDE=wide(x, g.dz),
        MODE=mode,
        PRECISION=precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    add_splits(dw, part)
