"""conv_bwd_pointwise: dgrad and wgrad of a 1x1, stride 1 conv in one kernel.

Both need dy, and where the input's ReLU gate is recomputed dgrad's epilogue needs the very x that
wgrad multiplies: together they read the gradient (and y) and x once, where two kernels read them
twice. A program holds a dw of all K output channels by BLOCK_N input channels in registers over its
chunk of pixels, so K * BLOCK_N is bounded (why_not); the partials (chunks, K, C) are summed in a
fixed order.

Why K stops at 256. Every block of BLOCK_N input channels reads all of g and y, from L2 but for the
first: 4 K C / BLOCK_N bytes a pixel in bf16, where two kernels read 4 K (C / 128 + C / 128) and x
K / 128 times. With half of an SM's registers for dw BLOCK_N is 32768 / K: 64 for K = 512, 32 for
1024, 16 for 2048. At 1.5 times memory's bandwidth for L2 the joint kernel then takes 1.6 times as
long as the two at K = 1024 (C = 256), and 3 times at 2048; docs/roofline.md has the table. K = 512
with 64 columns would win, but its g tile (64 pixels x 512, g, y and dy) takes another half of the
registers: it needs a loop over parts of K with a dw in registers for each, or (sm_100) in tensor
memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._conv import (
    Geometry,
    activate,
    descriptors,
    dot,
    krsc,
    load_block,
    load_gate,
    norm_gradient,
    precision,
    source,
    units,
    wide,
)
from ._conv_config import arch_of, bwd_pointwise_config, cut, joint_odd
from ._conv_dgrad import finalise_sums, finish_gradient, norm_arguments, previous_arguments
from ._conv_wgrad import add_splits
from ._launch import SIZES, launch
from ._tile import bound


@triton.jit(do_not_specialize=SIZES)
def _conv_bwd_pointwise_kernel(
    dx_ptr,  # (rows, C)
    part_ptr,  # (2 or 3, chunks, C) fp32: sums of each chunk, or None
    dw_ptr,  # (chunks, K, C) fp32
    g_ptr,  # (rows, K); it, y_ptr and x_ptr are descriptors where DESCRIPTOR
    gmask_ptr,  # (rows, ceil(K / 8)) uint8 or None
    y_ptr,  # (rows, K) or None
    x_ptr,  # (rows, C)
    w_ptr,  # (K, C)
    mean_ptr,  # (K,) fp32: the batch norm behind the conv, or None
    rstd_ptr,
    gamma_ptr,
    dgamma_ptr,
    dbeta_ptr,
    in_mean_ptr,  # (C,) fp32: the input's batch norm; None: x is taken as it is
    in_rstd_ptr,
    in_gamma_ptr,
    in_beta_ptr,
    res_ptr,  # (rows, C): added to dx, or None
    res_mask_ptr,
    prev_ptr,  # (rows, C) or None; x itself where the input is relu(normalise(x))
    prev_mask_ptr,
    prev_mean_ptr,
    prev_rstd_ptr,
    prev_gamma_ptr,
    prev_beta_ptr,
    dual_ptr,
    dual_mean_ptr,
    inv_count,
    rows,
    c_units,
    k_units,
    tiles,
    chunks,
    C_ALIGN: tl.constexpr,
    K_ALIGN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    WIDE: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # >= K
):
    # 1. locate the chunk; the weight's tile stays
    C = c_units * C_ALIGN
    K = k_units * K_ALIGN
    tiles_n = tl.cdiv(C, BLOCK_N)
    col0 = tl.program_id(0) % tiles_n * BLOCK_N
    chunk = tl.program_id(0) // tiles_n
    col = col0 + tl.arange(0, BLOCK_N)
    ch = tl.arange(0, BLOCK_K)
    col_ok = col < C
    ch_ok = ch < K
    w_at = ch[:, None] * C + col[None, :]
    w_ok = ch_ok[:, None] & col_ok[None, :]
    w = tl.load(w_ptr + w_at, mask=w_ok, other=0.0)
    first = chunk * tiles
    last = tl.minimum(first + tiles, tl.cdiv(rows, BLOCK_M))

    dw = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gy = tl.zeros((BLOCK_N,), tl.float32)
    sum_gd = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(bound(first), bound(last)):
        # 2. load tiles
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok = m < rows
        row = m.to(tl.int64) if WIDE else m
        g_ok = m_ok[:, None] & ch_ok[None, :]
        x_ok = m_ok[:, None] & col_ok[None, :]
        g = load_block(g_ptr, tile * BLOCK_M, row, 0, ch, K, g_ok, DESCRIPTOR)
        y = g
        if MODE == "bn":
            y = load_block(y_ptr, tile * BLOCK_M, row, 0, ch, K, g_ok, DESCRIPTOR)
        x = load_block(x_ptr, tile * BLOCK_M, row, col0, col, C, x_ok, DESCRIPTOR)

        # 3. prologues
        if gmask_ptr is not None:
            keep = load_gate(gmask_ptr, row, 0, m_ok, k_units, K_ALIGN, BLOCK_M, BLOCK_K, 0)
            g = tl.where(keep, g, 0.0).to(g.dtype)
        if MODE != "none":
            g = norm_gradient(
                g.to(tl.float32), y, g_ok, mean_ptr, rstd_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr,
                inv_count, ch, ch_ok, x.dtype, MODE,
            )  # fmt: skip
        if in_mean_ptr is not None:
            x = activate(x, x_ok, in_mean_ptr, in_rstd_ptr, in_gamma_ptr, in_beta_ptr, col, col_ok)

        # 4. multiply, twice
        dw = dot(tl.trans(g), x, dw, PRECISION)
        v = dot(g, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)

        # 5. epilogue of dgrad: residual gradient, gate, sums
        v, s_g, s_gy, s_gd = finish_gradient(
            v, row, m_ok, col0, C, c_units, res_ptr, res_mask_ptr,
            prev_ptr, prev_mask_ptr, prev_mean_ptr, prev_rstd_ptr, prev_gamma_ptr, prev_beta_ptr,
            dual_ptr, dual_mean_ptr, C_ALIGN, dx_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, 0,
        )  # fmt: skip
        tl.store(dx_ptr + (row * C)[:, None] + col[None, :], v, mask=x_ok)
        sum_g += s_g
        sum_gy += s_gy
        sum_gd += s_gd

    # 6. store partials
    tl.store(dw_ptr + tl.cast(chunk, tl.int64) * (K * C) + w_at, dw, mask=w_ok)
    if part_ptr is not None:
        out = part_ptr + chunk * C + col
        tl.store(out, sum_g, mask=col_ok)
        tl.store(out + chunks * C, sum_gy, mask=col_ok)
        if dual_ptr is not None:
            tl.store(out + 2 * chunks * C, sum_gd, mask=col_ok)


def why_not(x, weight, geometry, frozen) -> str | None:
    """None when one kernel can do both, otherwise the reason. frozen: dy is formed from a batch
    norm on fixed statistics."""
    geo = Geometry.of(x.shape, weight.shape, geometry)
    if not geo.pointwise:
        return "not a 1x1 conv of stride 1"
    if geo.groups > 1:
        return f"groups={geo.groups}: a program would hold dw of all of them"
    if joint_odd(geo, x):
        return f"{geo.c} to {geo.k} channels: pixels that are no whole 16 bytes take the registers"
    if bwd_pointwise_config(geo, x) is None:
        return f"{geo.k} output channels: a program cannot hold dw of all of them"
    if frozen and bwd_pointwise_config(geo, x, "frozen") is None:
        return f"{geo.k} output channels: dy of a frozen batch norm takes dw's registers"
    return None


def conv_bwd_pointwise(dx, sums, dw, g, x, weight, geometry, bn, norm, dres, prev):
    geo = Geometry.of(dx.shape, weight.shape, geometry)
    mode, y, vectors = norm_arguments(bn)
    previous = previous_arguments(prev)
    reads = (None if dres is None else dres.dz, previous[0], previous[-2])
    config = bwd_pointwise_config(geo, x, mode, sum(t is not None for t in reads))
    assert config is not None, why_not(x, weight, geometry, mode == "frozen")
    plan = cut(geo.rows, geo.c, config)
    sum_part = None
    if prev is not None:
        shape = (2 if previous[-1] is None else 3, plan.chunks, geo.c)
        sum_part = torch.empty(shape, dtype=torch.float32, device=x.device)
    dw_part = torch.empty((plan.chunks, geo.k, 1, geo.c), dtype=torch.float32, device=x.device)
    by_descriptor = descriptors(arch_of(x.device), geo, x, g.dz, y)
    by_descriptor = by_descriptor and config.block_k < 256  # the copy engine's box; spills at it
    dz, y = (source(t, config.block_m, config.block_k, by_descriptor) for t in (g.dz, y))
    tile_x = config.block_m, config.block_n
    c_units, c_align = units(geo.c)
    k_units, k_align = units(geo.k)
    launch(
        _conv_bwd_pointwise_kernel,
        plan.programs,
        (dx, sum_part, dw_part, dz, g.mask, y, source(x, *tile_x, by_descriptor), krsc(weight))
        + vectors
        + ((None,) * 4 if norm is None else tuple(norm))
        + ((None, None) if dres is None else tuple(dres))
        + (*previous, 1.0 / geo.rows, geo.rows, c_units, k_units, plan.tiles, plan.chunks),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        C_ALIGN=c_align,
        K_ALIGN=k_align,
        DESCRIPTOR=by_descriptor,
        WIDE=wide(dx, g.dz),
        MODE=mode,
        PRECISION=precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    add_splits(dw, dw_part)
    if prev is not None:
        finalise_sums(sums, sum_part, prev)
