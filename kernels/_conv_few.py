"""conv_fprop and conv_wgrad of images: few input channels (a network's first conv).

One tap of 3 channels fills a fifth of the 16 that a dot sums over at least. Here the sum runs over
(r, s, c) at once, in the order of the weight's memory: 147 terms of a 7x7 in five steps of 32 where
tap by tap it is 49 steps of 16. The price is that neighbours in the sum are 2-byte loads of x (any
other way: its pixels are 6 bytes), which L1 serves: about as many cycles as y takes to be written.

Reads x and writes y once (fprop), with y's batch statistics; reads x and dy once for each 64 terms
(wgrad; the others hit in L2). Accumulation in fp32, statistics of the stored y as _conv_fprop's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ._bn_stats import chan
from ._conv import Geometry, dot, krsc, load_gate, load_tile, norm_gradient, pixel, precision, wide
from ._conv import units as units_of
from ._conv_config import arch_of, cut, few_fprop_config, few_wgrad_config, wgrad_cut
from ._launch import SIZES, launch, workspace
from ._tile import bound, rounded

MOST_CHANNELS = 8  # from 8 on a tap of 16-bit numbers is a 16-byte load


def takes(geo: Geometry) -> bool:
    """Whether a conv of a raw input is faster here than on the kernels of all convs."""
    return geo.groups == 1 and geo.c < MOST_CHANNELS and geo.r * geo.s > 1


@triton.jit
def _terms(k, in_w, channels, taps_w, dil_h, dil_w):
    """Term k = (r, s, c) of the sum -> (its h, its w and its element, from those of tap 0)."""
    h = k // (taps_w * channels) * dil_h
    w = k // channels % taps_w * dil_w
    return h, w, (h * in_w + w) * channels + k % channels


@triton.jit
def _load_terms(x_ptr, row, h0, w0, h, w, at, in_h, in_w, channels, ok):
    """x of pixels (row, h0, w0) at terms (h, w, at), 0 outside of the image and where not ok."""
    y = h0[:, None] + h[None, :]
    x = w0[:, None] + w[None, :]
    ok = ok & (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)
    return tl.load(x_ptr + (row * channels)[:, None] + at[None, :], mask=ok, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def _conv_few_fprop_kernel(
    y_ptr,  # (rows, K)
    part_ptr,  # (3, chunks, K) fp32: mean - shift, M2, shift of each chunk; None: no statistics
    x_ptr,  # (N * H * W, channels)
    w_ptr,  # (K, R * S * channels)
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
    taps_w,
    terms,  # R * S * channels
    k_units,
    tiles,  # tiles of BLOCK_M rows in a chunk
    chunks,
    CHANNELS: tl.constexpr,
    K_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. locate the chunk: output channels fastest, so that x is read from memory once
    K = k_units * K_ALIGN
    tiles_n = tl.cdiv(K, BLOCK_N)
    chunk = tl.program_id(0) // tiles_n
    col = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < K
    first = chunk * tiles
    last = tl.minimum(first + tiles, tl.cdiv(rows, BLOCK_M))

    n = 0.0
    shift = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    m2 = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(bound(first), bound(last)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = m < rows
        row, h0, w0 = pixel(
            m, grid_h, grid_w, in_h, in_w, stride_h, stride_w, -pad_h, -pad_w, False, WIDE
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, bound(terms), BLOCK_K):
            # 2. load tiles
            k = k0 + tl.arange(0, BLOCK_K)
            k_ok = k < terms
            h, w, at = _terms(k, in_w, CHANNELS, taps_w, dil_h, dil_w)
            ok = m_ok[:, None] & k_ok[None, :]
            a = _load_terms(x_ptr, row, h0, w0, h, w, at, in_h, in_w, CHANNELS, ok)
            b = tl.load(
                w_ptr + k[:, None] + (col * terms)[None, :],
                mask=k_ok[:, None] & col_ok[None, :],
                other=0.0,
            )

            # 3. multiply
            acc = dot(a, b, acc, PRECISION)

        # 4. epilogue: store, statistics of the stored tile, merged (Chan)
        y = rounded(acc, y_ptr.dtype.element_ty)
        out = (m.to(tl.int64) if WIDE else m) * K
        tl.store(y_ptr + out[:, None] + col[None, :], y, mask=m_ok[:, None] & col_ok[None, :])
        if part_ptr is not None:
            y = tl.where(m_ok[:, None], y.to(tl.float32), 0.0)
            count = tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.float32)
            if tile == first:
                shift = tl.sum(y, axis=0) / count
            y = tl.where(m_ok[:, None], y - shift[None, :], 0.0)
            tile_mean = tl.sum(y, axis=0) / count
            d = tl.where(m_ok[:, None], y - tile_mean[None, :], 0.0)
            n, mean, m2 = chan(n, mean, m2, count, tile_mean, tl.sum(d * d, axis=0))

    # 5. store partials
    if part_ptr is not None:
        out = part_ptr + chunk * K + col
        tl.store(out, mean, mask=col_ok)
        tl.store(out + chunks * K, m2, mask=col_ok)
        tl.store(out + 2 * chunks * K, shift, mask=col_ok)


def conv_fprop(y, with_stats, x, weight, geometry):
    """y = conv(x); the partials of its statistics, its geometry and cut for `finalise`."""
    geo = Geometry.of(x.shape, weight.shape, geometry)
    config = few_fprop_config(geo, x)
    plan = cut(geo.rows, geo.k, config)
    part = workspace(3, plan, y) if with_stats else None
    k_units, k_align = units_of(geo.k)
    launch(
        _conv_few_fprop_kernel,
        plan.programs,
        (y, part, x, krsc(weight), geo.rows, geo.p, geo.q, geo.h, geo.w)
        + (*geo.stride, *geo.padding, *geo.dilation, geo.s, geo.r * geo.s * geo.c)
        + (k_units, plan.tiles, plan.chunks),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        CHANNELS=geo.c,
        K_ALIGN=k_align,
        WIDE=wide(x, y),
        PRECISION=precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return part, geo, plan


@triton.jit(do_not_specialize=SIZES)
def _conv_few_wgrad_kernel(
    part_ptr,  # (splits, K, R * S * channels) fp32
    g_ptr,  # (rows, K): dy, or the gradient of the batch norm behind the conv
    gmask_ptr,  # (rows, ceil(K / 8)) uint8: its gate, or None
    y_ptr,  # (rows, K) or None
    x_ptr,  # (N * H * W, channels)
    mean_ptr,  # (K,) fp32: the batch norm behind the conv, or None
    rstd_ptr,
    gamma_ptr,
    dgamma_ptr,
    dbeta_ptr,
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
    taps_w,
    terms,  # R * S * channels
    k_units,
    chunk,  # rows of a split
    CHANNELS: tl.constexpr,
    K_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # terms
    BLOCK_K: tl.constexpr,  # output channels
):
    # 1. locate the tile: terms, then output channels, then the split
    K = k_units * K_ALIGN
    tiles_n = tl.cdiv(terms, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    k0 = pid // tiles_n % tiles_k * BLOCK_K
    split = pid // (tiles_n * tiles_k)
    col = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ch = k0 + tl.arange(0, BLOCK_K)
    col_ok = col < terms
    ch_ok = ch < K
    h, w, at = _terms(col, in_w, CHANNELS, taps_w, dil_h, dil_w)

    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for m0 in range(bound(split * chunk), bound(tl.minimum(split * chunk + chunk, rows)), BLOCK_M):
        # 2. load tiles
        m = m0 + tl.arange(0, BLOCK_M)
        m_ok = m < rows
        x_row, h0, w0 = pixel(
            m, grid_h, grid_w, in_h, in_w, stride_h, stride_w, -pad_h, -pad_w, False, WIDE
        )
        ok = m_ok[:, None] & col_ok[None, :]
        x = _load_terms(x_ptr, x_row, h0, w0, h, w, at, in_h, in_w, CHANNELS, ok)
        g_ok = m_ok[:, None] & ch_ok[None, :]
        row = m.to(tl.int64) if WIDE else m
        g = load_tile(g_ptr, row, ch, K, g_ok)
        y = g
        if MODE == "bn":
            y = load_tile(y_ptr, row, ch, K, g_ok)

        # 3. prologue
        if gmask_ptr is not None:
            keep = load_gate(gmask_ptr, row, k0, m_ok, k_units, K_ALIGN, BLOCK_M, BLOCK_K, 0)
            g = tl.where(keep, g, 0.0).to(g.dtype)
        if MODE != "none":
            g = norm_gradient(
                g.to(tl.float32), y, g_ok, mean_ptr, rstd_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr,
                inv_count, ch, ch_ok, x.dtype, MODE,
            )  # fmt: skip

        # 4. multiply
        acc = dot(tl.trans(g), x, acc, PRECISION)

    # 5. store partials
    out = (split * K + ch[:, None]).to(tl.int64) * terms + col[None, :]
    tl.store(part_ptr + out, acc, mask=ch_ok[:, None] & col_ok[None, :])


def conv_wgrad(g, x, geo, bn_arguments):
    """The partials of dw, (splits, K, R * S, C): `add_splits` adds them up."""
    mode, y, vectors = bn_arguments
    config = few_wgrad_config(geo, x, mode)
    terms = geo.r * geo.s * geo.c
    flat = replace(geo, c=terms, r=1, s=1)
    tiles, splits, chunk = wgrad_cut(flat, config, arch_of(x.device).split_steps)
    part = torch.empty((splits, geo.k, geo.r * geo.s, geo.c), dtype=torch.float32, device=x.device)
    k_units, k_align = units_of(geo.k)
    launch(
        _conv_few_wgrad_kernel,
        tiles * splits,
        (part, g.dz, g.mask, y, x, *vectors, 1.0 / geo.rows, geo.rows, geo.p, geo.q, geo.h, geo.w)
        + (*geo.stride, *geo.padding, *geo.dilation, geo.s, terms, k_units, chunk),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        CHANNELS=geo.c,
        K_ALIGN=k_align,
        WIDE=wide(x, g.dz),
        MODE=mode,
        PRECISION=precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return part
