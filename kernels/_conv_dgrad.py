"""conv_dgrad: g = gate(dgrad(dy) + dres), and the sums over g that the batch norm before it needs.

dy is given, or formed on the way from the gradient of the batch norm behind the conv and the raw y
(norm_gradient). Reads that gradient (and y) once for each block of input channels, the others hit
in L2; dres and the previous raw y once; writes g once. A strided conv runs one launch for each
residue class of the input pixels, with the taps that reach it: no multiplication by known zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._bn_bwd import finalise
from ._conv import (
    Geometry,
    column_tiles,
    columns_of,
    descriptors,
    dot,
    inside,
    krsc,
    load_block,
    load_gate,
    load_tile,
    norm_gradient,
    phases,
    pixel,
    precision,
    source,
    units,
    wide,
)
from ._conv_config import arch_of, cut, dgrad_config
from ._launch import SIZES, launch
from ._tile import bound, load_affine, load_vector, normalise, passes, rounded


@triton.jit
def finish_gradient(
    v, row, row_ok, col0, end, units,
    res_ptr, res_mask_ptr,
    prev_ptr, prev_mask_ptr, prev_mean_ptr, prev_rstd_ptr, prev_gamma_ptr, prev_beta_ptr,
    dual_ptr, dual_mean_ptr,
    ALIGN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """g = gate(v + gate(dres)) in DTYPE of a tile of x's gradient, and its column sums of g,
    g * (y - mean) and g * (dual - dual_mean), y the previous conv's raw output. The tile's columns
    are col0 .. end."""
    C = units * ALIGN
    col = col0 + tl.arange(0, BLOCK_N)
    col_ok = col < end
    ok = row_ok[:, None] & col_ok[None, :]
    if res_ptr is not None:
        d = load_tile(res_ptr, row, col, C, ok).to(tl.float32)
        if res_mask_ptr is not None:
            keep = load_gate(res_mask_ptr, row, col0, row_ok, units, ALIGN, BLOCK_M, BLOCK_N, GROUP)
            d = tl.where(keep, d, 0.0)
        v += d
    sum_g = 0.0
    sum_gy = 0.0
    sum_gd = 0.0
    g = rounded(v, DTYPE)
    if prev_ptr is not None:
        y = load_tile(prev_ptr, row, col, C, ok)
        mean, scale, beta = load_affine(
            prev_mean_ptr, prev_rstd_ptr, prev_gamma_ptr, prev_beta_ptr,
            col[None, :], col_ok[None, :],
        )  # fmt: skip
        if prev_mask_ptr is None:
            gate = passes(rounded(normalise(y.to(tl.float32), mean, scale, beta), y.dtype))
        else:
            gate = load_gate(
                prev_mask_ptr, row, col0, row_ok, units, ALIGN, BLOCK_M, BLOCK_N, GROUP
            )
        g = tl.where(gate & ok, g, 0.0).to(DTYPE)
        stored = g.to(tl.float32)
        centred = tl.where(ok, y.to(tl.float32) - mean, 0.0)
        sum_g = tl.sum(stored, axis=0)
        sum_gy = tl.sum(stored * centred, axis=0)
        if dual_ptr is not None:
            dual = load_tile(dual_ptr, row, col, C, ok).to(tl.float32)
            dual_mean = load_vector(dual_mean_ptr, col[None, :], col_ok[None, :], 0.0)
            sum_gd = tl.sum(stored * tl.where(ok, dual - dual_mean, 0.0), axis=0)
    return g, sum_g, sum_gy, sum_gd


@triton.jit(do_not_specialize=SIZES)
def _conv_dgrad_kernel(
    dx_ptr,  # (N * in_h * in_w, C)
    part_ptr,  # (2 or 3, chunks, C) fp32: sums of each chunk, or None
    g_ptr,  # (rows of y, K): dy, or the gradient of the batch norm behind the conv; with y_ptr a
    # descriptor where DESCRIPTOR
    gmask_ptr,  # (rows of y, ceil(K / 8)) uint8: its gate, or None
    y_ptr,  # (rows of y, K) or None
    w_ptr,  # (K, R * S * C / groups)
    mean_ptr,  # (K,) fp32: the batch norm behind the conv, or None
    rstd_ptr,
    gamma_ptr,
    dgamma_ptr,
    dbeta_ptr,
    res_ptr,  # (N * in_h * in_w, C): added to dx, or None
    res_mask_ptr,  # its gate, or None
    prev_ptr,  # (N * in_h * in_w, C): raw input of the batch norm before the conv, or None
    prev_mask_ptr,
    prev_mean_ptr,
    prev_rstd_ptr,
    prev_gamma_ptr,
    prev_beta_ptr,
    dual_ptr,  # (N * in_h * in_w, C): raw input of the shortcut's batch norm, or None
    dual_mean_ptr,
    inv_count,  # 1 / rows of y
    rows,  # of this phase: N * grid_h * grid_w
    grid_h,
    grid_w,
    in_h,  # of x
    in_w,
    out_h,  # of y
    out_w,
    stride_h,
    stride_w,
    first_h,  # of the phase
    first_w,
    off_h,
    off_w,
    step_h,
    step_w,
    taps_h,
    taps_w,
    tap0,
    tap_h,
    tap_w,
    window,  # R * S
    c_units,
    k_units,
    tiles,
    chunk0,
    chunks,
    C_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    GROUP_C: tl.constexpr,  # channels of a group; 0: one group
    GROUP_K: tl.constexpr,
    POINTWISE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. locate the chunk: input channels fastest, so that dy is read from memory once
    C = c_units * C_ALIGN
    K = k_units * K_ALIGN
    tiles_n = column_tiles(C, BLOCK_N, GROUP_C)
    col0, c_first, c_end, k_first, k_count = columns_of(
        tl.program_id(0) % tiles_n, C, K, BLOCK_N, GROUP_C, GROUP_K
    )
    chunk = tl.program_id(0) // tiles_n
    col = col0 + tl.arange(0, BLOCK_N)
    col_ok = col < c_end
    c_count = c_end - c_first
    blocks = tl.cdiv(k_count, BLOCK_K)
    first = chunk * tiles
    last = tl.minimum(first + tiles, tl.cdiv(rows, BLOCK_M))

    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gy = tl.zeros((BLOCK_N,), tl.float32)
    sum_gd = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(bound(first), bound(last)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = m < rows
        row, p0, q0 = pixel(m, grid_h, grid_w, out_h, out_w, 1, 1, off_h, off_w, POINTWISE, WIDE)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, bound(blocks * taps_h * taps_w)):
            # 2. load tiles
            if POINTWISE:
                tap = 0
                k0 = k_first + step * BLOCK_K
                a_row = row
                a_ok = m_ok
            else:
                th = step // blocks // taps_w
                tw = step // blocks % taps_w
                tap = tap0 + th * tap_h + tw * tap_w
                k0 = k_first + step % blocks * BLOCK_K
                a_row = row + (th * step_h * out_w + tw * step_w)
                a_ok = inside(m_ok, p0 + th * step_h, q0 + tw * step_w, out_h, out_w, POINTWISE)
            ch = k0 + tl.arange(0, BLOCK_K)
            ch_ok = ch < k_first + k_count
            ok = a_ok[:, None] & ch_ok[None, :]
            a = load_block(g_ptr, tile * BLOCK_M, a_row, k0, ch, K, ok, DESCRIPTOR)
            y = a
            if MODE == "bn":
                y = load_block(y_ptr, tile * BLOCK_M, a_row, k0, ch, K, ok, DESCRIPTOR)
            b = tl.load(
                w_ptr
                + (ch * (window * c_count) + tap * c_count)[:, None]
                + (col - c_first)[None, :],
                mask=ch_ok[:, None] & col_ok[None, :],
                other=0.0,
            )

            # 3. prologue
            if gmask_ptr is not None:
                keep = load_gate(
                    gmask_ptr, a_row, k0, a_ok, k_units, K_ALIGN, BLOCK_M, BLOCK_K, GROUP_K
                )
                a = tl.where(keep, a, 0.0).to(a.dtype)
            if MODE != "none":
                a = norm_gradient(
                    a.to(tl.float32), y, ok, mean_ptr, rstd_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr,
                    inv_count, ch, ch_ok, dx_ptr.dtype.element_ty, MODE,
                )  # fmt: skip

            # 4. multiply
            acc = dot(a, b, acc, PRECISION)

        # 5. epilogue: residual gradient, gate, sums
        if POINTWISE:
            x_row = row
        else:
            x_row, _, _ = pixel(
                m, grid_h, grid_w, in_h, in_w, stride_h, stride_w, first_h, first_w, False, WIDE
            )
        g, s_g, s_gy, s_gd = finish_gradient(
            acc, x_row, m_ok, col0, c_end, c_units, res_ptr, res_mask_ptr,
            prev_ptr, prev_mask_ptr, prev_mean_ptr, prev_rstd_ptr, prev_gamma_ptr, prev_beta_ptr,
            dual_ptr, dual_mean_ptr, C_ALIGN, dx_ptr.dtype.element_ty, BLOCK_M, BLOCK_N,
            GROUP_C,
        )  # fmt: skip
        at = dx_ptr + (x_row * C)[:, None] + col[None, :]
        tl.store(at, g, mask=m_ok[:, None] & col_ok[None, :])
        sum_g += s_g
        sum_gy += s_gy
        sum_gd += s_gd

    # 6. store partials
    if part_ptr is not None:
        out = part_ptr + (chunk0 + chunk) * C + col
        tl.store(out, sum_g, mask=col_ok)
        tl.store(out + chunks * C, sum_gy, mask=col_ok)
        if dual_ptr is not None:
            tl.store(out + 2 * chunks * C, sum_gd, mask=col_ok)


def norm_arguments(bn):
    """(mode, y, vectors) of the batch norm behind a conv, for the kernels."""
    if bn is None:
        return "none", None, (None,) * 5
    vectors = (bn.norm.mean, bn.norm.rstd, bn.norm.gamma, bn.dgamma, bn.dbeta)
    return ("bn", bn.y, vectors) if bn.training else ("frozen", None, vectors)


def previous_arguments(prev):
    """(y, mask, vectors, dual, dual mean) of what came before a conv, for the kernels."""
    if prev is None:
        return (None,) * 8
    dual = dual_mean = None
    if prev.shortcut is not None and prev.shortcut.norm is not None:
        dual, dual_mean = prev.shortcut.x, prev.shortcut.norm.mean
    return (prev.y, prev.mask, *prev.norm, dual, dual_mean)


def finalise_sums(sums, part, prev):
    """The sums from the partials, each scaled by its batch norm's rstd."""
    dual = prev.shortcut is not None and prev.shortcut.norm is not None
    finalise(
        sums.dgamma, sums.dbeta, sums.res_dgamma if dual else None, part, prev.norm.rstd,
        prev.shortcut.norm.rstd if dual else None,
    )  # fmt: skip


def conv_dgrad(dx, sums, g, weight, geometry, bn, dres, prev):
    geo = Geometry.of(dx.shape, weight.shape, geometry)
    mode, y, vectors = norm_arguments(bn)
    previous = previous_arguments(prev)
    dres = (None, None) if dres is None else dres
    reads = (dres[0], previous[0], previous[-2])
    config = dgrad_config(geo, dx, g.dz, mode, sum(t is not None for t in reads))
    pairs = [
        (a, b)
        for a in phases(geo.h, geo.r, geo.stride[0], geo.padding[0], geo.dilation[0])
        for b in phases(geo.w, geo.s, geo.stride[1], geo.padding[1], geo.dilation[1])
    ]
    columns = geo.group_c, config, geo.groups, len(pairs)
    every = [
        (a, b, geo.n * a.size * b.size, cut(geo.n * a.size * b.size, *columns)) for a, b in pairs
    ]
    chunks = sum(plan.chunks for *_, plan in every)
    part = None
    if prev is not None:
        part = dx.new_empty((2 if previous[-1] is None else 3, chunks, geo.c), dtype=torch.float32)
    weight = krsc(weight)
    by_descriptor = descriptors(arch_of(dx.device), geo, g.dz, y)
    dz, y = (source(t, config.block_m, config.block_k, by_descriptor) for t in (g.dz, y))
    c_units, c_align = units(geo.c)
    k_units, k_align = units(geo.k)
    chunk0 = 0
    for a, b, rows, plan in every:
        launch(
            _conv_dgrad_kernel,
            plan.programs,
            (dx, part, dz, g.mask, y, weight, *vectors, *dres, *previous, 1.0 / geo.rows)
            + (rows, a.size, b.size, geo.h, geo.w, geo.p, geo.q, *geo.stride, a.first, b.first)
            + (a.off, b.off, a.step, b.step, a.taps, b.taps, a.tap0 * geo.s + b.tap0)
            + (a.tap_step * geo.s, b.tap_step, geo.r * geo.s, c_units, k_units)
            + (plan.tiles, chunk0, chunks),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
            C_ALIGN=c_align,
            K_ALIGN=k_align,
            **geo.group_constants,
            POINTWISE=geo.pointwise,
            DESCRIPTOR=by_descriptor,
            WIDE=wide(dx, g.dz),
            MODE=mode,
            PRECISION=precision(dx.dtype),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
        )
        chunk0 += plan.chunks
    if prev is not None:
        finalise_sums(sums, part, prev)
