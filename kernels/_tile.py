"""Device functions shared by the kernels: bit masks, the ReLU gate, the per-channel affine.

Forward and backward call the same `normalise`, with an explicit fma: a recomputed ReLU gate must
see the very bits the
forward stored, whatever the compiler contracts.
"""

import triton
import triton.language as tl

from ._launch import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)
BF16 = tl.constexpr(tl.bfloat16)

if _INTERPRETED:

    def bound(v):
        """A loop bound. Triton 3.6's interpreter cannot make one of a tensor with numpy >= 2.4."""
        return int(v.handle.data.item()) if isinstance(v, tl.tensor) else int(v)

else:

    @triton.jit
    def bound(v):
        return v


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """fp32 -> DTYPE, to nearest even. Triton's interpreter truncates to bf16: there the bits are
    rounded by hand.
    """
    if INTERPRETED and DTYPE == BF16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(v != v, 0x7FC0, bits)
        out = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = v.to(DTYPE)
    return out


@triton.jit
def pack_bits(keep, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool -> (BLOCK_M, BLOCK_N / 8) uint8: bit j of byte b = column 8b + j."""
    bits = tl.reshape(keep.to(tl.int32), (BLOCK_M, BLOCK_N // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(byte, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N / 8) uint8 -> (BLOCK_M, BLOCK_N) bool: one load per eight elements."""
    bits = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def passes(stored):
    """The ReLU gate on a stored pre-activation: not (z <= 0), so NaN passes."""
    return (stored.to(tl.float32) <= 0.0) == 0


@triton.jit
def load_vector(ptr, ch, ok, default: tl.constexpr):
    """A per-channel fp32 vector, or `default` where there is none."""
    if ptr is None:
        v = tl.full(ch.shape, default, tl.float32)
    else:
        v = tl.load(ptr + ch, mask=ok, other=0.0)
    return v


@triton.jit
def load_affine(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, ch, ok):
    """mean, gamma * rstd and beta of `normalise`."""
    mean = load_vector(mean_ptr, ch, ok, 0.0)
    scale = load_vector(gamma_ptr, ch, ok, 1.0) * load_vector(rstd_ptr, ch, ok, 1.0)
    beta = load_vector(beta_ptr, ch, ok, 0.0)
    return mean, scale, beta


@triton.jit
def normalise(x, mean, scale, beta):
    """(x - mean) * (gamma * rstd) + beta in fp32; the subtraction comes first."""
    return tl.fma(x - mean, scale, beta)


@triton.jit
def row_stride(units, ALIGN: tl.constexpr):
    """inner, and the bytes of a mask row, from inner / ALIGN: the product tells the compiler the
    alignment.
    """
    inner = units * ALIGN
    return inner, units * (ALIGN // 8) if ALIGN % 8 == 0 else (inner + 7) // 8


@triton.jit
def locate(outer, inner_units, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of the (outer, inner) matrix, columns fastest.

    Returns row0, col0, row_ok, col_ok, the element offsets and the offsets and guard of the mask
    bytes. The tile's origin is 64 bit, offsets inside it 32 bit: that covers tensors past 2^31
    elements at no cost.
    """
    inner, mask_stride = row_stride(inner_units, ALIGN)
    tiles_n = tl.cdiv(inner, BLOCK_N)
    row0 = tl.program_id(0) // tiles_n * BLOCK_M
    col0 = tl.program_id(0) % tiles_n * BLOCK_N
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_N // 8)
    row_ok = row0 + i < outer
    col_ok = col0 + j < inner
    at = (row0.to(tl.int64) * inner + col0) + (i[:, None] * inner + j[None, :])
    bits_at = (row0.to(tl.int64) * mask_stride + col0 // 8) + (
        i[:, None] * mask_stride + b[None, :]
    )
    bits_ok = row_ok[:, None] & (col0 // 8 + b < mask_stride)[None, :]
    return row0, col0, row_ok, col_ok, at, bits_at, bits_ok
