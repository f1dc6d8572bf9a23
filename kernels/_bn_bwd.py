"""bn_bwd_reduce: dbeta = sum g, dgamma = sum g * xhat, res_dgamma = sum g * res_xhat.
bn_bwd_apply: dx = gamma * rstd * (g - dbeta / M - xhat * dgamma / M), frozen gamma * rstd * g;
dres likewise, or g.

Reduce reads 2-3 tensors and the bits; apply reads 2-3 (frozen: 1) and the bits, writes 1-2.
Accumulates in fp32: per thread over a chunk, then its rows, then the chunks; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import (
    FINALISE_CHANNELS,
    SIZES,
    elementwise_tile,
    launch,
    layout,
    reduction,
    workspace,
)
from ._tile import (
    bound,
    load_affine,
    load_vector,
    locate,
    normalise,
    passes,
    rounded,
    row_stride,
    unpack_bits,
)


@triton.jit
def gated(
    g, x, byte, mean, scale, beta,
    DTYPE: tl.constexpr, GATE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """g, gated by the bits or by the recomputed stored pre-activation."""
    if GATE == "mask":
        g = tl.where(unpack_bits(byte, M, N), g, 0.0)
    if GATE == "recompute":
        g = tl.where(passes(rounded(normalise(x, mean, scale, beta), DTYPE)), g, 0.0)
    return g


@triton.jit(do_not_specialize=SIZES)
def _bn_bwd_reduce_nhwc_kernel(
    part_ptr,  # (2 or 3, chunks, C) fp32: sum g, sum g * (x - mean), sum g * (residual - res_mean)
    dz_ptr,  # (outer, C)
    mask_ptr,  # (outer, ceil(C / 8)) uint8 or None
    x_ptr,  # (outer, C)
    mean_ptr,  # (C,) fp32 or None, like all vectors
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    res_ptr,  # (outer, C) or None
    res_mean_ptr,
    outer,
    inner_units,
    chunk,
    chunks,
    ALIGN: tl.constexpr,
    GATE: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # 1. locate the chunk: columns fastest
    STEP: tl.constexpr = UNROLL * ROWS
    C, mask_stride = row_stride(inner_units, ALIGN)
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0) // tiles_c
    col0 = tl.program_id(0) % tiles_c * BLOCK_C
    col = col0 + tl.arange(0, BLOCK_C)
    b = col0 // 8 + tl.arange(0, BLOCK_C // 8)
    col_ok = col < C
    i = tl.arange(0, STEP)
    offs = i[:, None] * C + col[None, :]
    bits_offs = i[:, None] * mask_stride + b[None, :]
    begin = pid * chunk
    end = tl.minimum(begin + chunk, outer)

    # 2. load per-channel vectors
    mean, scale, beta = load_affine(
        mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, col[None, :], col_ok[None, :]
    )
    res_mean = load_vector(res_mean_ptr, col[None, :], col_ok[None, :], 0.0)
    sum_g = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_gx = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_gr = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(bound(begin), bound(end), STEP):
        # 3. load tile
        row_ok = (start + i < outer)[:, None]
        ok = row_ok & col_ok[None, :]
        at = tl.cast(start, tl.int64) * C
        g = tl.load(dz_ptr + at + offs, mask=ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at + offs, mask=ok, other=0.0)
        if res_ptr is not None:
            r = tl.load(res_ptr + at + offs, mask=ok, other=0.0).to(tl.float32)
        byte = 0
        if GATE == "mask":
            bits_ok = row_ok & (b < mask_stride)[None, :]
            byte = tl.load(
                mask_ptr + tl.cast(start, tl.int64) * mask_stride + bits_offs, mask=bits_ok, other=0
            )

        # 4. gate
        g = gated(g, x.to(tl.float32), byte, mean, scale, beta, x.dtype, GATE, STEP, BLOCK_C)

        # 5. add over `unroll`, inside the thread
        gx = g * tl.where(ok, x.to(tl.float32) - mean, 0.0)
        sum_g += tl.sum(tl.reshape(g, (UNROLL, ROWS, BLOCK_C)), axis=0)
        sum_gx += tl.sum(tl.reshape(gx, (UNROLL, ROWS, BLOCK_C)), axis=0)
        if res_ptr is not None:
            gr = g * tl.where(ok, r - res_mean, 0.0)
            sum_gr += tl.sum(tl.reshape(gr, (UNROLL, ROWS, BLOCK_C)), axis=0)

    # 6. add over the rows of the tile, store partials
    out = part_ptr + pid * C + col
    tl.store(out, tl.sum(sum_g, axis=0), mask=col_ok)
    tl.store(out + chunks * C, tl.sum(sum_gx, axis=0), mask=col_ok)
    if res_ptr is not None:
        tl.store(out + 2 * chunks * C, tl.sum(sum_gr, axis=0), mask=col_ok)


@triton.jit(do_not_specialize=SIZES)
def _bn_bwd_reduce_nchw_kernel(
    part_ptr,  # (2 or 3, chunks, C) fp32
    dz_ptr,  # (N * C, H * W)
    mask_ptr,  # (N * C, ceil(H * W / 8)) uint8 or None
    x_ptr,  # (N * C, H * W)
    mean_ptr,  # (C,) fp32 or None, like all vectors
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    res_ptr,  # (N * C, H * W) or None
    res_mean_ptr,
    N,
    C,
    inner_units,
    chunk,
    chunks,
    ALIGN: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,  # images
    BLOCK_P: tl.constexpr,  # pixels
):
    # 1. locate the chunk: some images of one channel
    P, mask_stride = row_stride(inner_units, ALIGN)
    c = tl.program_id(0) % C
    pid = tl.program_id(0) // C
    image = tl.arange(0, ROWS)
    pixel = tl.arange(0, BLOCK_P)
    b = tl.arange(0, BLOCK_P // 8)
    end = tl.minimum(pid * chunk + chunk, N)

    # 2. load per-channel vectors
    ch = c + tl.zeros((1, 1), tl.int32)
    mean, scale, beta = load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch, ch < C)
    res_mean = load_vector(res_mean_ptr, ch, ch < C, 0.0)
    sum_g = tl.zeros((ROWS, BLOCK_P), tl.float32)
    sum_gx = tl.zeros((ROWS, BLOCK_P), tl.float32)
    sum_gr = tl.zeros((ROWS, BLOCK_P), tl.float32)
    for n0 in range(bound(pid * chunk), bound(end), ROWS):
        matrix_row = (n0 + image).to(tl.int64)[:, None] * C + c
        row_ok = (n0 + image < end)[:, None]
        for p0 in range(0, bound(P), BLOCK_P):
            # 3. load tile
            ok = row_ok & (p0 + pixel < P)[None, :]
            at = matrix_row * P + p0 + pixel[None, :]
            g = tl.load(dz_ptr + at, mask=ok, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at, mask=ok, other=0.0)
            if res_ptr is not None:
                r = tl.load(res_ptr + at, mask=ok, other=0.0).to(tl.float32)
            byte = 0
            if GATE == "mask":
                bits_ok = row_ok & (p0 // 8 + b < mask_stride)[None, :]
                bits_at = matrix_row * mask_stride + p0 // 8 + b[None, :]
                byte = tl.load(mask_ptr + bits_at, mask=bits_ok, other=0)

            # 4. gate
            g = gated(g, x.to(tl.float32), byte, mean, scale, beta, x.dtype, GATE, ROWS, BLOCK_P)

            # 5. add, element by element of the tile
            sum_g += g
            sum_gx += g * tl.where(ok, x.to(tl.float32) - mean, 0.0)
            if res_ptr is not None:
                sum_gr += g * tl.where(ok, r - res_mean, 0.0)

    # 6. add over the tile, store partials
    out = part_ptr + pid * C + c
    tl.store(out, tl.sum(tl.sum(sum_g, axis=1), axis=0))
    tl.store(out + chunks * C, tl.sum(tl.sum(sum_gx, axis=1), axis=0))
    if res_ptr is not None:
        tl.store(out + 2 * chunks * C, tl.sum(tl.sum(sum_gr, axis=1), axis=0))


@triton.jit(do_not_specialize=SIZES)
def _bn_bwd_finalise_kernel(
    dgamma_ptr,  # (C,) fp32
    dbeta_ptr,  # (C,) fp32
    res_dgamma_ptr,  # (C,) fp32 or None
    part_ptr,  # (2 or 3, chunks, C) fp32
    rstd_ptr,  # (C,) fp32 or None
    res_rstd_ptr,
    C,
    chunks,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # 1. load all partials of a few channels
    k = tl.arange(0, BLOCK_K)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col < C
    ok = (k < chunks)[:, None] & col_ok[None, :]
    at = part_ptr + k[:, None] * C + col[None, :]
    g = tl.load(at, mask=ok, other=0.0)
    gx = tl.load(at + chunks * C, mask=ok, other=0.0)

    # 2. add, scale, store
    rstd = load_vector(rstd_ptr, col, col_ok, 1.0)
    tl.store(dbeta_ptr + col, tl.sum(g, axis=0), mask=col_ok)
    tl.store(dgamma_ptr + col, tl.sum(gx, axis=0) * rstd, mask=col_ok)
    if res_dgamma_ptr is not None:
        gr = tl.load(at + 2 * chunks * C, mask=ok, other=0.0)
        res_rstd = load_vector(res_rstd_ptr, col, col_ok, 1.0)
        tl.store(res_dgamma_ptr + col, tl.sum(gr, axis=0) * res_rstd, mask=col_ok)


@triton.jit(do_not_specialize=SIZES)
def _bn_bwd_apply_kernel(
    dx_ptr,  # (outer, inner)
    dres_ptr,  # (outer, inner) or None
    dz_ptr,  # (outer, inner)
    mask_ptr,  # (outer, ceil(inner / 8)) uint8 or None
    x_ptr,  # (outer, inner)
    mean_ptr,  # (C,) fp32 or None, like all vectors
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    dgamma_ptr,
    dbeta_ptr,
    res_ptr,  # (outer, inner) or None
    res_mean_ptr,
    res_rstd_ptr,
    res_gamma_ptr,
    res_dgamma_ptr,
    outer,
    inner_units,
    C,
    inv_count,
    ALIGN: tl.constexpr,
    NHWC: tl.constexpr,
    GATE: tl.constexpr,
    TRAINING: tl.constexpr,
    RES_TRAINING: tl.constexpr,
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
    x = g
    if TRAINING or GATE == "recompute":
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    if dres_ptr is not None and res_mean_ptr is not None and RES_TRAINING:
        r = tl.load(res_ptr + at, mask=ok, other=0.0).to(tl.float32)
    byte = 0
    if GATE == "mask":
        byte = tl.load(mask_ptr + bits_at, mask=bits_ok, other=0)

    # 3. load per-channel vectors
    if NHWC:
        ch = (col0 + tl.arange(0, BLOCK_N))[None, :]
        ch_ok = col_ok[None, :]
    else:
        ch = ((row0 + tl.arange(0, BLOCK_M)) % C)[:, None]
        ch_ok = row_ok[:, None]
    mean, scale, beta = load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch, ch_ok)

    # 4. gate
    g = gated(g, x, byte, mean, scale, beta, x_ptr.dtype.element_ty, GATE, BLOCK_M, BLOCK_N)

    # 5. dx
    dx = g
    if TRAINING:
        rstd = load_vector(rstd_ptr, ch, ch_ok, 1.0)
        mean_g = load_vector(dbeta_ptr, ch, ch_ok, 0.0) * inv_count
        slope = load_vector(dgamma_ptr, ch, ch_ok, 0.0) * inv_count * rstd
        dx = g - mean_g - (x - mean) * slope
    tl.store(dx_ptr + at, rounded(scale * dx, dx_ptr.dtype.element_ty), mask=ok)

    # 6. dres
    if dres_ptr is not None:
        dr = g
        if res_mean_ptr is not None:
            r_mean, r_scale, _ = load_affine(
                res_mean_ptr, res_rstd_ptr, res_gamma_ptr, None, ch, ch_ok
            )
            if RES_TRAINING:
                r_rstd = load_vector(res_rstd_ptr, ch, ch_ok, 1.0)
                r_mean_g = load_vector(dbeta_ptr, ch, ch_ok, 0.0) * inv_count
                r_slope = load_vector(res_dgamma_ptr, ch, ch_ok, 0.0) * inv_count * r_rstd
                dr = g - r_mean_g - (r - r_mean) * r_slope
            dr = r_scale * dr
        tl.store(dres_ptr + at, rounded(dr, dres_ptr.dtype.element_ty), mask=ok)


def bn_bwd_reduce(
    dgamma, dbeta, res_dgamma, dz, mask, x, mean, rstd, gamma, beta,
    residual, res_mean, res_rstd, gate,
):  # fmt: skip
    lay = layout(x)
    res = residual if res_dgamma is not None else None
    cut = reduction(lay, x.element_size(), tensors=2 if res is None else 3)
    part = workspace(2 if res is None else 3, cut, x)
    units = lay.inner // lay.align
    inputs = (dz, mask if gate == "mask" else None, x, mean, rstd, gamma, beta)
    inputs += (res, None if res is None else res_mean)
    if lay.nhwc:
        launch(
            _bn_bwd_reduce_nhwc_kernel,
            cut.chunks * triton.cdiv(lay.inner, cut.block_c),
            (part, *inputs, lay.outer, units, cut.chunk, cut.chunks),
            num_warps=cut.num_warps,
            ALIGN=lay.align,
            GATE=gate,
            UNROLL=cut.unroll,
            ROWS=cut.rows,
            BLOCK_C=cut.block_c,
        )
    else:
        launch(
            _bn_bwd_reduce_nchw_kernel,
            cut.chunks * lay.channels,
            (part, *inputs, lay.batch, lay.channels, units, cut.chunk, cut.chunks),
            num_warps=cut.num_warps,
            ALIGN=lay.align,
            GATE=gate,
            ROWS=cut.rows,
            BLOCK_P=cut.block_c,
        )
    finalise(dgamma, dbeta, None if res is None else res_dgamma, part, rstd, res_rstd)


def finalise(dgamma, dbeta, res_dgamma, part, rstd, res_rstd):
    """Sum the partials (2 or 3, chunks, C) over chunks."""
    _, chunks, channels = part.shape
    launch(
        _bn_bwd_finalise_kernel,
        triton.cdiv(channels, FINALISE_CHANNELS),
        (dgamma, dbeta, res_dgamma, part, rstd, None if res_dgamma is None else res_rstd)
        + (channels, chunks),
        num_warps=4,
        BLOCK_K=triton.next_power_of_2(chunks),
        BLOCK_C=FINALISE_CHANNELS,
    )


def bn_bwd_apply(
    dx, dres, dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta,
    residual, res_mean, res_rstd, res_gamma, res_dgamma, gate, training, res_training,
):  # fmt: skip
    lay = layout(x)
    tile = elementwise_tile(lay, x.element_size())
    dual = dres is not None and res_mean is not None
    launch(
        _bn_bwd_apply_kernel,
        triton.cdiv(lay.outer, tile.block_m) * triton.cdiv(lay.inner, tile.block_n),
        (dx, dres, dz, mask if gate == "mask" else None, x, mean, rstd, gamma, beta, dgamma, dbeta)
        + ((residual, res_mean, res_rstd, res_gamma, res_dgamma) if dual else (None,) * 5)
        + (lay.outer, lay.inner // lay.align, lay.channels, 1.0 / lay.count),
        num_warps=tile.num_warps,
        ALIGN=lay.align,
        NHWC=lay.nhwc,
        GATE=gate,
        TRAINING=bool(training),
        RES_TRAINING=bool(res_training),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
