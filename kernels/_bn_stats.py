"""bn_stats: mean[c], biased var[c] of x over (N, H, W), rstd = 1 / sqrt(var + eps).

Reads 1 tensor.
Accumulates (count, mean, M2) in fp32, of x - x[0, c, 0, 0]: per thread over `unroll` rows, merged
by Chan's rule over the steps of a chunk, then the rows of a tile, then the chunks; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import FINALISE_CHANNELS, SIZES, launch, layout, reduction, workspace
from ._tile import bound


@triton.jit
def chan(n, mean, m2, tile_n, tile_mean, tile_m2):
    """Merge the statistics of a tile into the running ones; tile_n may be 0."""
    delta = tile_mean - mean
    total = n + tile_n
    w = tile_n / tl.maximum(total, 1.0)
    return total, mean + delta * w, m2 + tile_m2 + delta * delta * (n * w)


@triton.jit(do_not_specialize=SIZES)
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
    STEP: tl.constexpr = UNROLL * ROWS
    C = inner_units * ALIGN
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0) // tiles_c
    col = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = col < C
    begin = pid * chunk
    size = tl.minimum(outer - begin, chunk)
    full = begin + size // STEP * STEP
    # Loaded as a matrix, then split: the layout of a 3-d load is Triton's guess, and in 3.6 it puts
    # `unroll` across threads.
    offs = tl.arange(0, STEP)[:, None] * C + col[None, :]

    # 2. shift: a value of the channel, so near its mean; an outlier does no harm, M2 is not raw
    shift = tl.load(x_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    n = 0.0
    mean = tl.zeros((ROWS, BLOCK_C), tl.float32)
    m2 = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(bound(begin), bound(full), STEP):
        # 3. load tile
        at = x_ptr + tl.cast(start, tl.int64) * C + offs
        x = tl.load(at, mask=col_ok[None, :], other=0.0).to(tl.float32) - shift
        x = tl.reshape(x, (UNROLL, ROWS, BLOCK_C))

        # 4. mean and M2 over `unroll`, inside the thread
        tile_mean = tl.sum(x, axis=0) * (1.0 / UNROLL)
        d = x - tile_mean[None, :, :]

        # 5. merge (Chan)
        n, mean, m2 = chan(n, mean, m2, 1.0 * UNROLL, tile_mean, tl.sum(d * d, axis=0))

    # 6. the last, ragged step, which only the last chunk has
    rows = n + tl.zeros((ROWS, 1), tl.float32)
    left = begin + size - full
    if not EVEN_ROWS and left > 0:
        ok = (tl.arange(0, STEP) < left)[:, None] & col_ok[None, :]
        at = x_ptr + full.to(tl.int64) * C + offs
        x = tl.where(ok, tl.load(at, mask=ok, other=0.0).to(tl.float32) - shift, 0.0)
        # of the tile's row r: rows r, r + ROWS, ... of the step
        count = tl.cdiv(left - tl.arange(0, ROWS) + STEP, ROWS) - UNROLL
        count = tl.maximum(count, 0).to(tl.float32)[:, None]
        tile_mean = tl.sum(tl.reshape(x, (UNROLL, ROWS, BLOCK_C)), axis=0) / tl.maximum(count, 1.0)
        spread = tl.broadcast_to(tile_mean[None, :, :], (UNROLL, ROWS, BLOCK_C))
        d = tl.where(ok, x - tl.reshape(spread, (STEP, BLOCK_C)), 0.0)
        tile_m2 = tl.sum(tl.reshape(d * d, (UNROLL, ROWS, BLOCK_C)), axis=0)
        rows, mean, m2 = chan(rows, mean, m2, count, tile_mean, tile_m2)

    # 7. merge the rows of the tile, store partials
    mean_c = tl.sum(rows * mean, axis=0) / tl.sum(rows, axis=0)
    d = mean - mean_c[None, :]
    m2_c = tl.sum(m2 + rows * d * d, axis=0)
    tl.store(part_ptr + pid * C + col, mean_c, mask=col_ok)
    tl.store(part_ptr + (chunks + pid) * C + col, m2_c, mask=col_ok)


@triton.jit(do_not_specialize=SIZES)
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
    for n0 in range(bound(pid * chunk), bound(end), ROWS):
        for p0 in range(0, bound(P), BLOCK_P):
            # 3. load tile
            ok = (n0 + image < end)[:, None] & (p0 + pixel < P)[None, :]
            at = x_ptr + n0 * stride + p0 + image[:, None] * stride + pixel[None, :]
            x = tl.where(ok, tl.load(at, mask=ok, other=0.0).to(tl.float32) - shift, 0.0)

            # 4. mean and M2 of the tile
            count = (tl.minimum(end - n0, ROWS) * tl.minimum(P - p0, BLOCK_P)).to(tl.float32)
            tile_mean = tl.sum(tl.sum(x, axis=1), axis=0) / count
            d = tl.where(ok, x - tile_mean, 0.0)

            # 5. merge (Chan)
            tile_m2 = tl.sum(tl.sum(d * d, axis=1), axis=0)
            n, mean, m2 = chan(n, mean, m2, count, tile_mean, tile_m2)

    # 6. store partials
    tl.store(part_ptr + pid * C + c, mean)
    tl.store(part_ptr + (chunks + pid) * C + c, m2)


@triton.jit(do_not_specialize=SIZES)
def _bn_stats_finalise_kernel(
    mean_ptr,  # (C,) fp32
    var_ptr,  # (C,) fp32
    rstd_ptr,  # (C,) fp32
    part_ptr,  # (2, chunks, C) fp32; (3, chunks, C) with a shift for each chunk where x_ptr is None
    x_ptr,  # the activation, whose first values are the shift of all chunks
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
    if x_ptr is None:
        shift = tl.load(part_ptr + 2 * chunks * C + col, mask=col_ok, other=0.0)
        mean += tl.load(part_ptr + 2 * chunks * C + offs, mask=ok, other=0.0) - shift[None, :]
    else:
        at = x_ptr + col.to(tl.int64) * shift_stride
        shift = tl.load(at, mask=col_ok, other=0.0).to(tl.float32)

    # 2. merge (Chan, all at once)
    total = tl.sum(n, axis=0)
    mean_c = tl.sum(n * mean, axis=0) / total
    d = tl.where(ok, mean - mean_c[None, :], 0.0)
    var = tl.sum(m2 + n * d * d, axis=0) / total

    # 3. undo the shift, store
    tl.store(mean_ptr + col, mean_c + shift, mask=col_ok)
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
    shift = (lay.outer, 1, 1) if lay.nhwc else (lay.batch, lay.pixels, lay.pixels)
    finalise(mean, var, rstd, part, x, eps, *shift, cut.chunk)


def finalise(mean, var, rstd, part, x, eps, units, unit, shift_stride, chunk):
    """Merge the partials (2, chunks, C): `chunk` units of `unit` values each but the last.

    x: the activation whose first values the partial means are relative to; None: each chunk has its
    own shift, a third row of the partials.
    """
    _, chunks, channels = part.shape
    launch(
        _bn_stats_finalise_kernel,
        triton.cdiv(channels, FINALISE_CHANNELS),
        (mean, var, rstd, part, x, float(eps), units, unit, channels, shift_stride, chunk, chunks),
        num_warps=4,
        BLOCK_K=triton.next_power_of_2(chunks),
        BLOCK_C=FINALISE_CHANNELS,
    )
