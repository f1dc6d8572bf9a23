"""conv_fprop: y = conv(h), h = x, relu(normalise(x)) or relu(normalise(x) + shortcut), with y's
batch statistics.
conv_fprop_act: z = act(normalise(conv(x)) + residual).

Reads h's inputs once for each block of output channels (the others hit in L2), writes y once.
Statistics are those of the stored (rounded) y: (count, mean, M2) in fp32 of each tile, merged by
Chan's rule over a program's tiles, then over the programs; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _conv_few as few
from ._bn_stats import chan, finalise
from ._conv import (
    Geometry,
    activate,
    column_tiles,
    columns_of,
    descriptors,
    dot,
    inside,
    krsc,
    load_block,
    load_tile,
    pixel,
    precision,
    source,
    units,
    wide,
)
from ._conv_config import arch_of, cut, fprop_config
from ._launch import SIZES, launch, workspace
from ._tile import bound, load_affine, normalise, pack_bits, passes, rounded, row_stride


@triton.jit(do_not_specialize=SIZES)
def _conv_fprop_kernel(
    y_ptr,  # (rows, K)
    part_ptr,  # (3, chunks, K) fp32: mean - shift, M2, shift of each chunk; None: no statistics
    z_ptr,  # (rows, C): the block's output, written on the way; None: not wanted
    zmask_ptr,  # (rows, ceil(C / 8)) uint8 or None
    x_ptr,  # (N * H * W, C); a descriptor of it where DESCRIPTOR
    w_ptr,  # (K, R * S * C / groups)
    mean_ptr,  # (C,) fp32: the input's batch norm; None: x is taken as it is
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    res_ptr,  # (rows, C): the block's shortcut, or None
    res_mean_ptr,  # (C,) fp32: the shortcut's own batch norm, or None
    res_rstd_ptr,
    res_gamma_ptr,
    res_beta_ptr,
    out_mean_ptr,  # (K,) fp32: batch norm of the output (inference), or None
    out_rstd_ptr,
    out_gamma_ptr,
    out_beta_ptr,
    add_ptr,  # (rows, K): added to the output before the ReLU, or None
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
    tiles,  # tiles of BLOCK_M rows in a chunk
    chunks,
    C_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of a group; 0: one group
    GROUP_K: tl.constexpr,
    POINTWISE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDE: tl.constexpr,
    RELU: tl.constexpr,  # of the output
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. locate the chunk: output channels fastest, so that x is read from memory once
    C, mask_stride = row_stride(c_units, C_ALIGN)
    K = k_units * K_ALIGN
    tiles_n = column_tiles(K, BLOCK_N, GROUP_K)
    pid_n = tl.program_id(0) % tiles_n
    chunk = tl.program_id(0) // tiles_n
    col0, _, k_end, c_first, c_count = columns_of(pid_n, K, C, BLOCK_N, GROUP_K, GROUP_C)
    col = col0 + tl.arange(0, BLOCK_N)
    col_ok = col < k_end
    kk = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(c_count, BLOCK_K)
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
            m, grid_h, grid_w, in_h, in_w, stride_h, stride_w, -pad_h, -pad_w, POINTWISE, WIDE
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, bound(blocks * taps_h * taps_w)):
            # 2. load tiles
            if POINTWISE:
                tap = 0
                c0 = c_first + step * BLOCK_K
                a_row = row
                a_ok = m_ok
            else:
                tap = step // blocks
                c0 = c_first + step % blocks * BLOCK_K
                dh = tap // taps_w * dil_h
                dw = tap % taps_w * dil_w
                a_row = row + (dh * in_w + dw)
                a_ok = inside(m_ok, h0 + dh, w0 + dw, in_h, in_w, POINTWISE)
            ch = c0 + kk
            ch_ok = ch < c_first + c_count
            ok = a_ok[:, None] & ch_ok[None, :]
            a = load_block(x_ptr, tile * BLOCK_M, a_row, c0, ch, C, ok, DESCRIPTOR)
            b = tl.load(
                w_ptr
                + (tap * c_count + (ch - c_first))[:, None]
                + (col * (taps_h * taps_w * c_count))[None, :],
                mask=ch_ok[:, None] & col_ok[None, :],
                other=0.0,
            )

            # 3. prologue
            if res_ptr is not None:
                mean_c, scale, beta = load_affine(
                    mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch[None, :], ch_ok[None, :]
                )
                r = load_tile(res_ptr, a_row, ch, C, ok).to(tl.float32)
                if res_mean_ptr is not None:
                    r_mean, r_scale, r_beta = load_affine(
                        res_mean_ptr, res_rstd_ptr, res_gamma_ptr, res_beta_ptr,
                        ch[None, :], ch_ok[None, :],
                    )  # fmt: skip
                    r = normalise(r, r_mean, r_scale, r_beta)
                stored = rounded(normalise(a.to(tl.float32), mean_c, scale, beta) + r, a.dtype)
                keep = passes(stored)
                a = tl.where(ok & keep, stored, 0.0).to(a.dtype)
                if z_ptr is not None and pid_n == 0:
                    at = z_ptr + (a_row * C)[:, None] + ch[None, :]
                    tl.store(at, a, mask=ok)
                    if zmask_ptr is not None:
                        byte = c0 // 8 + tl.arange(0, BLOCK_K // 8)
                        tl.store(
                            zmask_ptr + (a_row * mask_stride)[:, None] + byte[None, :],
                            pack_bits(keep & ok, BLOCK_M, BLOCK_K),
                            mask=a_ok[:, None] & (byte < mask_stride)[None, :],
                        )
            elif mean_ptr is not None:
                a = activate(a, ok, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch, ch_ok)

            # 4. multiply
            acc = dot(a, b, acc, PRECISION)

        # 5. epilogue: batch norm, residual, ReLU
        ok = m_ok[:, None] & col_ok[None, :]
        out = (m.to(tl.int64) if WIDE else m) * K
        at = out[:, None] + col[None, :]
        if out_mean_ptr is not None:
            o_mean, o_scale, o_beta = load_affine(
                out_mean_ptr, out_rstd_ptr, out_gamma_ptr, out_beta_ptr,
                col[None, :], col_ok[None, :],
            )  # fmt: skip
            acc = normalise(acc, o_mean, o_scale, o_beta)
        if add_ptr is not None:
            acc += tl.load(add_ptr + at, mask=ok, other=0.0).to(tl.float32)
        y = rounded(acc, y_ptr.dtype.element_ty)
        if RELU:
            y = tl.where(passes(y), y, 0.0).to(y.dtype)
        tl.store(y_ptr + at, y, mask=ok)

        # 6. epilogue: statistics of the stored tile, relative to about the mean of the first,
        # merged (Chan)
        if part_ptr is not None:
            y = tl.where(m_ok[:, None], y.to(tl.float32), 0.0)
            count = tl.minimum(rows - tile * BLOCK_M, BLOCK_M).to(tl.float32)
            if tile == first:
                shift = tl.sum(y, axis=0) / count
            y = tl.where(m_ok[:, None], y - shift[None, :], 0.0)
            tile_mean = tl.sum(y, axis=0) / count
            d = tl.where(m_ok[:, None], y - tile_mean[None, :], 0.0)
            n, mean, m2 = chan(n, mean, m2, count, tile_mean, tl.sum(d * d, axis=0))

    # 7. store partials
    if part_ptr is not None:
        out = part_ptr + chunk * K + col
        tl.store(out, mean, mask=col_ok)
        tl.store(out + chunks * K, m2, mask=col_ok)
        tl.store(out + 2 * chunks * K, shift, mask=col_ok)


_NONE = (None,) * 4


def _run(y, with_stats, z, mask, x, weight, geometry, norm, shortcut, out_norm, add, relu):
    geo = Geometry.of(x.shape, weight.shape, geometry)
    config = fprop_config(geo, x, y, shortcut is not None, with_stats)
    plan = cut(geo.rows, geo.group_k, config, geo.groups)
    # The block prologue writes z where it read x: it has the addresses anyway.
    by_descriptor = shortcut is None and descriptors(arch_of(x.device), geo, x)
    tile = config.block_m, config.block_k
    part = workspace(3, plan, y) if with_stats else None
    c_units, c_align = units(geo.c)
    k_units, k_align = units(geo.k)
    res, res_norm = (None, None) if shortcut is None else shortcut
    launch(
        _conv_fprop_kernel,
        plan.programs,
        (y, part, z, mask, source(x, *tile, by_descriptor), krsc(weight))
        + (_NONE if norm is None else tuple(norm))
        + (res, *(_NONE if res_norm is None else res_norm))
        + (_NONE if out_norm is None else tuple(out_norm))
        + (add, geo.rows, geo.p, geo.q, geo.h, geo.w)
        + (*geo.stride, *geo.padding, *geo.dilation, geo.r, geo.s)
        + (c_units, k_units, plan.tiles, plan.chunks),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        C_ALIGN=c_align,
        K_ALIGN=k_align,
        **geo.group_constants,
        POINTWISE=geo.pointwise,
        DESCRIPTOR=by_descriptor,
        WIDE=wide(x, y),
        RELU=relu,
        PRECISION=precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    return part, geo, plan


def conv_fprop(y, stats, z, mask, x, weight, geometry, norm, shortcut, eps):
    if norm is None and few.takes(Geometry.of(x.shape, weight.shape, geometry)):
        part, geo, plan = few.conv_fprop(y, stats is not None, x, weight, geometry)
    else:
        part, geo, plan = _run(
            y, stats is not None, z, mask, x, weight, geometry, norm, shortcut, None, None, False
        )
    if stats is not None:
        finalise(*stats, part, None, eps, geo.rows, 1, 0, plan.tiles * plan.block_m)


def conv_fprop_act(z, x, weight, geometry, norm, residual, relu):
    _run(z, False, None, None, x, weight, geometry, None, None, norm, residual, relu)
