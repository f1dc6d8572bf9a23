"""bn_relu_maxpool: z = maxpool(relu(normalise(x))); index = offset of each window's first maximum.
Backward: g = sum of dz over the windows whose index points at the pixel; then as in _bn_bwd.py.

Forward reads 1, writes 1 / stride^2 tensors; reduce reads 1 + 1 / stride^2; apply writes 1 more.
A pixel is read by up to (kernel / stride)^2 windows, from cache but for the first.
Accumulates in fp32; the pool compares rounded values; gather form, no atomics.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from ._bn_bwd import finalise
from ._launch import SIZES, elementwise_tile, launch, layout, reduction, workspace
from ._tile import bound, load_affine, load_vector, normalise, passes, rounded


@triton.jit
def pixel_offsets(matrix_row, col, P, W, C, NHWC: tl.constexpr):
    """Plane, pixel row and pixel column of each element of an (outer, inner) tile.

    NHWC: rows are (n, pixel), columns channels. NCHW: rows are (n, c), columns pixels.
    Shapes (M, 1) and (1, N).
    `plane` is the 64-bit index of the image (NHWC) or of the (n, c) plane (NCHW).
    """
    if NHWC:
        plane = (matrix_row // P).to(tl.int64)[:, None]
        pixel = (matrix_row % P)[:, None]
    else:
        plane = matrix_row.to(tl.int64)[:, None]
        pixel = col[None, :]
    return plane, pixel // W, pixel % W


@triton.jit
def window_step(
    best, index, x_ptr, origin, h, w, k, ok, mean, scale, beta,
    H, W, stride_h, stride_w, DTYPE: tl.constexpr,
):  # fmt: skip
    """Compare one pixel of each window; `k` is its offset in the window."""
    inside = ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    x = tl.load(x_ptr + origin + h * stride_h + w * stride_w, mask=inside, other=0.0)
    v = rounded(normalise(x.to(tl.float32), mean, scale, beta), DTYPE).to(tl.float32)
    v = tl.where(passes(v), v, 0.0)
    wins = inside & ((v > best) | (v != v))
    return tl.where(wins, v, best), tl.where(wins, k, index)


@triton.jit(do_not_specialize=SIZES)
def _bn_relu_maxpool_kernel(
    z_ptr,  # (N, C, OH, OW) in x's layout
    index_ptr,  # like z, uint8, or None
    x_ptr,  # (N, C, H, W)
    mean_ptr,  # (C,) fp32 or None, like all vectors
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    outer,  # of z
    inner_units,
    C,
    H,
    W,
    OH,
    OW,
    ALIGN: tl.constexpr,
    NHWC: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 1. locate the tile of z, and each element's window
    inner = inner_units * ALIGN
    tiles_n = tl.cdiv(inner, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < outer)[:, None] & (col < inner)[None, :]
    at = row.to(tl.int64)[:, None] * inner + col[None, :]
    plane, oh, ow = pixel_offsets(row, col, OH * OW, OW, C, NHWC)
    h0 = oh * STRIDE - PADDING
    w0 = ow * STRIDE - PADDING
    if NHWC:
        stride_w = inner
        origin = plane * H * W * inner + col[None, :]
        ch = col[None, :]
    else:
        stride_w = 1
        origin = plane * H * W
        ch = (row % C)[:, None]
    stride_h = W * stride_w

    # 2. load per-channel vectors
    mean, scale, beta = load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch, ch < C)

    # 3. walk the window: later values win only if greater, or NaN
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M, BLOCK_N), 255, tl.int32)
    if KERNEL <= 3:  # unrolled: every load is independent of the comparisons
        for k in tl.static_range(KERNEL * KERNEL):
            best, index = window_step(
                best, index, x_ptr, origin, h0 + k // KERNEL, w0 + k % KERNEL, k, ok,
                mean, scale, beta, H, W, stride_h, stride_w, z_ptr.dtype.element_ty,
            )  # fmt: skip
    else:
        for k in range(KERNEL * KERNEL):
            best, index = window_step(
                best, index, x_ptr, origin, h0 + k // KERNEL, w0 + k % KERNEL, k, ok,
                mean, scale, beta, H, W, stride_h, stride_w, z_ptr.dtype.element_ty,
            )  # fmt: skip

    # 4. store tile: `best` is already a value of z's dtype
    tl.store(z_ptr + at, rounded(best, z_ptr.dtype.element_ty), mask=ok)
    if index_ptr is not None:
        tl.store(index_ptr + at, tl.where(passes(best), index, 255).to(tl.uint8), mask=ok)


@triton.jit
def gather_step(
    g, dz_ptr, index_ptr, origin, h, w, t, ok, OH, OW, stride_h, stride_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Add dz of the t-th window that may hold the pixel (h, w), where that window chose it."""
    oh = (h + PADDING) // STRIDE - t // WINDOWS
    ow = (w + PADDING) // STRIDE - t % WINDOWS
    kh = h + PADDING - oh * STRIDE
    kw = w + PADDING - ow * STRIDE
    inside = ok & (oh >= 0) & (oh < OH) & (kh < KERNEL) & (ow >= 0) & (ow < OW) & (kw < KERNEL)
    at = origin + oh * stride_h + ow * stride_w
    index = tl.load(index_ptr + at, mask=inside, other=255).to(tl.int32)
    dz = tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return g + tl.where(inside & (index == kh * KERNEL + kw), dz, 0.0)


@triton.jit
def gather(
    dz_ptr, index_ptr, row, col, ok, inner, C, H, W, OH, OW, NHWC: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """g at the input pixels of an (outer, inner) tile of x, windows in a fixed order."""
    # along one axis, windows that may hold a pixel
    WINDOWS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    plane, h, w = pixel_offsets(row, col, H * W, W, C, NHWC)
    if NHWC:
        stride_w = inner
        origin = plane * OH * OW * inner + col[None, :]
    else:
        stride_w = 1
        origin = plane * OH * OW
    stride_h = OW * stride_w
    g = tl.zeros(ok.shape, tl.float32)
    if WINDOWS <= 2:
        for t in tl.static_range(WINDOWS * WINDOWS):
            g = gather_step(
                g, dz_ptr, index_ptr, origin, h, w, t, ok, OH, OW, stride_h, stride_w,
                KERNEL, STRIDE, PADDING, WINDOWS,
            )  # fmt: skip
    else:
        for t in range(WINDOWS * WINDOWS):
            g = gather_step(
                g, dz_ptr, index_ptr, origin, h, w, t, ok, OH, OW, stride_h, stride_w,
                KERNEL, STRIDE, PADDING, WINDOWS,
            )  # fmt: skip
    return g


@triton.jit(do_not_specialize=SIZES)
def _bn_relu_maxpool_bwd_reduce_kernel(
    part_ptr,  # (2, chunks, C) fp32: sum g, sum g * (x - mean)
    dz_ptr,  # (N, C, OH, OW) in x's layout
    index_ptr,  # like dz, uint8
    x_ptr,  # (N, C, H, W)
    mean_ptr,  # (C,) fp32 or None
    units,  # rows of x (NHWC) or images (NCHW), `chunk` of them to a program
    inner_units,
    C,
    H,
    W,
    OH,
    OW,
    chunk,
    chunks,
    ALIGN: tl.constexpr,
    NHWC: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,  # channels (NHWC) or pixels (NCHW)
):
    # 1. locate the chunk: rows of some channels, or images of one channel
    inner = inner_units * ALIGN
    programs_c = tl.cdiv(inner, BLOCK_N) if NHWC else C
    pid = tl.program_id(0) // programs_c
    pid_c = tl.program_id(0) % programs_c
    begin = pid * chunk
    end = tl.minimum(begin + chunk, units)

    # 2. load per-channel vectors
    if NHWC:
        ch = (pid_c * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    else:
        ch = pid_c + tl.zeros((1, 1), tl.int32)
    mean = load_vector(mean_ptr, ch, ch < C, 0.0)
    sum_g = tl.zeros((ROWS, BLOCK_N), tl.float32)
    sum_gx = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(bound(begin), bound(end), ROWS):
        unit = start + tl.arange(0, ROWS)
        row = unit if NHWC else unit * C + pid_c
        for p0 in range(0, 1 if NHWC else bound(inner), BLOCK_N):
            # 3. load tile, gather g
            col = (pid_c * BLOCK_N if NHWC else p0) + tl.arange(0, BLOCK_N)
            ok = (unit < end)[:, None] & (col < inner)[None, :]
            at = row.to(tl.int64)[:, None] * inner + col[None, :]
            x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
            g = gather(
                dz_ptr, index_ptr, row, col, ok, inner, C, H, W, OH, OW, NHWC,
                KERNEL, STRIDE, PADDING,
            )  # fmt: skip

            # 4. add, element by element of the tile
            sum_g += g
            sum_gx += g * tl.where(ok, x - mean, 0.0)

    # 5. add over the tile, store partials
    if NHWC:
        col = pid_c * BLOCK_N + tl.arange(0, BLOCK_N)
        out = part_ptr + pid * C + col
        tl.store(out, tl.sum(sum_g, axis=0), mask=col < C)
        tl.store(out + chunks * C, tl.sum(sum_gx, axis=0), mask=col < C)
    else:
        out = part_ptr + pid * C + pid_c
        tl.store(out, tl.sum(tl.sum(sum_g, axis=1), axis=0))
        tl.store(out + chunks * C, tl.sum(tl.sum(sum_gx, axis=1), axis=0))


@triton.jit(do_not_specialize=SIZES)
def _bn_relu_maxpool_bwd_apply_kernel(
    dx_ptr,  # (N, C, H, W)
    dz_ptr,  # (N, C, OH, OW) in x's layout
    index_ptr,  # like dz, uint8
    x_ptr,  # (N, C, H, W)
    mean_ptr,  # (C,) fp32 or None, like all vectors
    rstd_ptr,
    gamma_ptr,
    dgamma_ptr,
    dbeta_ptr,
    outer,  # of x
    inner_units,
    C,
    H,
    W,
    OH,
    OW,
    inv_count,
    ALIGN: tl.constexpr,
    NHWC: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # 1. locate the tile of x
    inner = inner_units * ALIGN
    tiles_n = tl.cdiv(inner, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < outer)[:, None] & (col < inner)[None, :]
    at = row.to(tl.int64)[:, None] * inner + col[None, :]

    # 2. load tile, gather g
    if TRAINING:
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    g = gather(
        dz_ptr, index_ptr, row, col, ok, inner, C, H, W, OH, OW, NHWC, KERNEL, STRIDE, PADDING
    )

    # 3. load per-channel vectors
    ch = col[None, :] if NHWC else (row % C)[:, None]
    mean, scale, _ = load_affine(mean_ptr, rstd_ptr, gamma_ptr, None, ch, ch < C)

    # 4. dx
    if TRAINING:
        rstd = load_vector(rstd_ptr, ch, ch < C, 1.0)
        mean_g = load_vector(dbeta_ptr, ch, ch < C, 0.0) * inv_count
        slope = load_vector(dgamma_ptr, ch, ch < C, 0.0) * inv_count * rstd
        g = g - mean_g - (x - mean) * slope
    tl.store(dx_ptr + at, rounded(scale * g, dx_ptr.dtype.element_ty), mask=ok)


def _window(kernel, stride, padding):
    return {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding}


def bn_relu_maxpool(z, index, x, mean, rstd, gamma, beta, kernel, stride, padding):
    lay = layout(x)
    pooled = layout(z, lay.nhwc)  # a 1 x 1 map is dense in both layouts: x decides
    # The nine loads of a 3 x 3 window are in flight at once: with 64 bytes a thread they spill.
    tile = elementwise_tile(pooled, x.element_size(), thread_bytes=16)
    launch(
        _bn_relu_maxpool_kernel,
        triton.cdiv(pooled.outer, tile.block_m) * triton.cdiv(pooled.inner, tile.block_n),
        (z, index, x, mean, rstd, gamma, beta, pooled.outer, pooled.inner // pooled.align)
        + (lay.channels, *x.shape[2:], *z.shape[2:]),
        num_warps=tile.num_warps,
        ALIGN=pooled.align,
        NHWC=lay.nhwc,
        **_window(kernel, stride, padding),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )


def bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, mean, rstd, kernel, stride, padding):
    lay = layout(x)
    cut = reduction(lay, x.element_size(), tensors=2)
    if not lay.nhwc:
        # An element gathers up to four windows, one by one: 104 bytes of stack on sm_90 with the
        # whole tile, 106 registers and four programs an SM with half of it.
        cut = replace(cut, block_c=max(cut.block_c // 2, 8))
    part = workspace(2, cut, x)
    launch(
        _bn_relu_maxpool_bwd_reduce_kernel,
        cut.chunks * (triton.cdiv(lay.inner, cut.block_c) if lay.nhwc else lay.channels),
        (part, dz, index, x, mean, lay.outer if lay.nhwc else lay.batch, lay.inner // lay.align)
        + (lay.channels, *x.shape[2:], *dz.shape[2:], cut.chunk, cut.chunks),
        num_warps=cut.num_warps,
        ALIGN=lay.align,
        NHWC=lay.nhwc,
        **_window(kernel, stride, padding),
        ROWS=cut.rows,
        BLOCK_N=cut.block_c,
    )
    finalise(dgamma, dbeta, None, part, rstd, None)


def bn_relu_maxpool_bwd_apply(
    dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, kernel, stride, padding, training
):
    lay = layout(x)
    # Up to four windows hold a pixel, two loads each.
    tile = elementwise_tile(lay, x.element_size(), thread_bytes=32 if lay.nhwc else 16)
    launch(
        _bn_relu_maxpool_bwd_apply_kernel,
        triton.cdiv(lay.outer, tile.block_m) * triton.cdiv(lay.inner, tile.block_n),
        (dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta)
        + (lay.outer, lay.inner // lay.align, lay.channels, *x.shape[2:], *dz.shape[2:])
        + (1.0 / lay.count,),
        num_warps=tile.num_warps,
        ALIGN=lay.align,
        NHWC=lay.nhwc,
        **_window(kernel, stride, padding),
        TRAINING=bool(training),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
