"""bn_stats: mean[c], biased var[c] of x over (N, H, W), rstd = 1 / sqrt(var + eps).

Reads 1 tensor.
Accumulates (count, mean, M2) in fp32, of x - x[0, c, 0, 0]: per thread over `unroll` rows, merged
by Chan's rule over the steps of a chunk, then the rows of a tile, then the chunks; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import FINALISE_CHANNELS, launch, layout, reduction, workspace


@triton.jit
def _bn_stats_nhwc_kernel(
    part_ptr,  # (2, chunks, C) fp32: mean - shift, M2 of each chunk
    x_ptr,  # (outer, C)
    outer,
    inner_units,
    chunk,
    chunks,
    ALIGN: tl.constexpr,
    EVEN_ROWS: tl.constexpr,  # no step has a row past the end
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # 1. locate the chunk: columns fastest
    C = inner_units * ALIGN
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0) // tiles_c
    col = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col < C
    begin = pid * chunk
    row = tl.arange(0, UNROLL)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    offs = row * C + col[None, None, :]

    # 2. shift: a value of the channel, so near its mean; an outlier does no harm, M2 is exact
    shift = tl.load(x_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, None, :]
    n = tl.zeros((ROWS, 1), tl.float32)
    mean = tl.zeros((ROWS, BLOCK_C), tl.float32)
    m2 = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(begin, tl.minimum(begin + chunk, outer), UNROLL * ROWS):
        # 3. load tile
        at = x_ptr + tl.cast(start, tl.int64) * C
        if EVEN_ROWS:
            x = tl.load(at + offs, mask=col_ok[None, None, :], other=0.0).to(tl.float32) - shift
            count = tl.full((ROWS, 1), UNROLL, tl.float32)
        else:
            row_ok = start + row < outer
            x = tl.load(at + offs, mask=row_ok & col_ok[None, None, :], other=0.0).to(tl.float32)
            x = tl.where(row_ok, x - shift, 0.0)
            count = tl.sum(row_ok.to(tl.float32), axis=0)

        # 4. mean and M2 over `unroll`, inside the thread
        tile_mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
        d = x - tile_mean[None, :, :]
        if not EVEN_ROWS:
            d = tl.where(row_ok, d, 0.0)

        # 5. merge (Chan)
        delta = tile_mean - mean
        total = n + count
        w = count / tl.maximum(total, 1.0)
        mean += delta * w
        m2 += tl.sum(d * d, axis=0) + delta * delta * (n * w)
        n = total

    # 6. merge the rows of the tile, store partials
    total = tl.sum(n, axis=0)
    mean_c = tl.sum(n * mean, axis=0) / total
    d = mean - mean_c[None, :]
    m2_c = tl.sum(m2 + n * d * d, axis=0)
    tl.store(part_ptr + pid * C + col, mean_c, mask=col_ok)
    tl.store(part_ptr + (chunks + pid) * C + col, m2_c, mask=col_ok)


@triton.jit
def _bn_stats_nchw_kernel(
    part_ptr,  # (2, chunks, C) fp32: mean - shift, M2 of each chunk
    x_ptr,  # (N * C, H * W)
    N,
    C,
    inner_units,
    chunk,
    chunks,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,  # images
    BLOCK_P: tl.constexpr,  # pixels
):
    # 1. locate the chunk: some images of one channel
    P = inner_units * ALIGN
    c = tl.program_id(0) % C
    pid = tl.program_id(0) // C
    image = tl.arange(0, ROWS)
    pixel = tl.arange(0, BLOCK_P)
    stride = tl.cast(C, tl.int64) * P
    x_ptr += c.to(tl.int64) * P
    end = tl.minimum(pid * chunk + chunk, N)

    # 2. shift: a value of the channel
    shift = tl.load(x_ptr).to(tl.float32)
    n = 0.0
    mean = 0.0
    m2 = 0.0
    for n0 in range(pid * chunk, end, ROWS):
        for p0 in range(0, P, BLOCK_P):
            # 3. load tile
            ok = (n0 + image < end)[:, None] & (p0 + pixel < P)[None, :]
            at = x_ptr + n0 * stride + p0 + image[:, None] * stride + pixel[None, :]
            x = tl.where(ok, tl.load(at, mask=ok, other=0.0).to(tl.float32) - shift, 0.0)

            # 4. mean and M2 of the tile
            count = (tl.minimum(end - n0, ROWS) * tl.minimum(P - p0, BLOCK_P)).to(tl.float32)
            tile_mean = tl.sum(tl.sum(x, axis=1), axis=0) / count
            d = tl.where(ok, x - tile_mean, 0.0)

            # 5. merge (Chan)
            delta = tile_mean - mean
            w = count / (n + count)
            mean += delta * w
            m2 += tl.sum(tl.sum(d * d, axis=1), axis=0) + delta * delta * (n * w)
            n += count

    # 6. store partials
    tl.store(part_ptr + pid * C + c, mean)
    tl.store(part_ptr + (chunks + pid) * C + c, m2)


@triton.jit
def _bn_stats_finalise_kernel(
    mean_ptr,  # (C,) fp32
    var_ptr,  # (C,) fp32
    rstd_ptr,  # (C,) fp32
    part_ptr,  # (2, chunks, C) fp32
    x_ptr,  # the activation, for the shift
    eps,
    units,  # rows (NHWC) or images (NCHW), `chunk` of them in each chunk but the last
    unit,  # values per channel in one of them
    C,
    shift_stride,  # 1 (NHWC) or H * W (NCHW)
    chunk,
    chunks,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # 1. load all partials of a few channels
    k = tl.arange(0, BLOCK_K)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col < C
    ok = (k < chunks)[:, None] & col_ok[None, :]
    offs = k[:, None] * C + col[None, :]
    mean = tl.load(part_ptr + offs, mask=ok, other=0.0)
    m2 = tl.load(part_ptr + chunks * C + offs, mask=ok, other=0.0)
    n = tl.minimum(tl.maximum(units - k * chunk, 0), chunk).to(tl.float32)[:, None] * unit

    # 2. merge (Chan, all at once)
    total = tl.sum(n, axis=0)
    mean_c = tl.sum(n * mean, axis=0) / total
    d = tl.where(ok, mean - mean_c[None, :], 0.0)
    var = tl.sum(m2 + n * d * d, axis=0) / total

    # 3. undo the shift, store
    shift = tl.load(x_ptr + col.to(tl.int64) * shift_stride, mask=col_ok, other=0.0)
    tl.store(mean_ptr + col, mean_c + shift.to(tl.float32), mask=col_ok)
    tl.store(var_ptr + col, var, mask=col_ok)
    tl.store(rstd_ptr + col, tl.div_rn(1.0, tl.sqrt_rn(var + eps)), mask=col_ok)


def bn_stats(mean, var, rstd, x, eps):
    lay = layout(x)
    cut = reduction(lay, x.element_size(), tensors=1)
    part = workspace(2, cut, x)
    units = lay.inner // lay.align
    if lay.nhwc:
        launch(
            _bn_stats_nhwc_kernel,
            cut.chunks * triton.cdiv(lay.inner, cut.block_c),
            (part, x, lay.outer, units, cut.chunk, cut.chunks),
            num_warps=cut.num_warps,
            ALIGN=lay.align,
            EVEN_ROWS=lay.outer % cut.step == 0,
            UNROLL=cut.unroll,
            ROWS=cut.rows,
            BLOCK_C=cut.block_c,
        )
    else:
        launch(
            _bn_stats_nchw_kernel,
            cut.chunks * lay.channels,
            (part, x, lay.batch, lay.channels, units, cut.chunk, cut.chunks),
            num_warps=cut.num_warps,
            ALIGN=lay.align,
            ROWS=cut.rows,
            BLOCK_P=cut.block_c,
        )
    launch(
        _bn_stats_finalise_kernel,
        triton.cdiv(lay.channels, FINALISE_CHANNELS),
        (mean, var, rstd, part, x, float(eps))
        + ((lay.outer, 1) if lay.nhwc else (lay.batch, lay.pixels))
        + (lay.channels, 1 if lay.nhwc else lay.pixels, cut.chunk, cut.chunks),
        num_warps=4,
        BLOCK_K=triton.next_power_of_2(cut.chunks),
        BLOCK_C=FINALISE_CHANNELS,
    )
