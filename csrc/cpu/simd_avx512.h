// 16 lanes, AVX-512 F, BW, DQ, VL. See simd.h for what the operations mean.
#pragma once

#include <immintrin.h>

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int kW = 16;
using VF = __m512;
using VM = __mmask16;

struct Full {};
struct Tail {
  __mmask16 m;
  FASTRES_INLINE explicit Tail(int64_t n) : m(static_cast<__mmask16>((1u << n) - 1)) {}
};

FASTRES_INLINE VF zero() { return _mm512_setzero_ps(); }
FASTRES_INLINE VF splat(float v) { return _mm512_set1_ps(v); }
FASTRES_INLINE VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
FASTRES_INLINE VF sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
FASTRES_INLINE VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
FASTRES_INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
FASTRES_INLINE VF fnma(VF a, VF b, VF c) { return _mm512_fnmadd_ps(a, b, c); }

FASTRES_INLINE VM passes(VF v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_NLE_UQ); }
FASTRES_INLINE VM passes_above(VF v, float t) {
  return _mm512_cmp_ps_mask(v, splat(t), _CMP_NLE_UQ);
}
FASTRES_INLINE VM greater_or_nan(VF v, VF best) {
  return _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
}
FASTRES_INLINE VF keep(VM m, VF v) { return _mm512_maskz_mov_ps(m, v); }
FASTRES_INLINE VF select(VM m, VF yes, VF no) { return _mm512_mask_blend_ps(m, no, yes); }
FASTRES_INLINE VF keep_lanes(VF v, Full) { return v; }
FASTRES_INLINE VF keep_lanes(VF v, Tail t) { return _mm512_maskz_mov_ps(t.m, v); }

// 1. fp32
FASTRES_INLINE VF load(const float* p, Full) { return _mm512_loadu_ps(p); }
FASTRES_INLINE VF load(const float* p, Tail t) { return _mm512_maskz_loadu_ps(t.m, p); }
FASTRES_INLINE void store(float* p, VF v, Full) { _mm512_storeu_ps(p, v); }
FASTRES_INLINE void store(float* p, VF v, Tail t) { _mm512_mask_storeu_ps(p, t.m, v); }

// 2. bf16: the upper half of an fp32
FASTRES_INLINE VF widen(__m256i h, const BF16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
FASTRES_INLINE __m512i bf16_round_bits(VF v) {
  const __m512i u = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __m512i up = _mm512_mask_add_epi32(down, odd, down, _mm512_set1_epi32(1));
  // rounding could carry a NaN's mantissa into infinity: quieten it instead
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000));
}
FASTRES_INLINE __m256i narrow_rounded(VF v, const BF16*) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
}
FASTRES_INLINE __m256i narrow(VF v, const BF16* tag) {
  return narrow_rounded(_mm512_castsi512_ps(bf16_round_bits(v)), tag);
}

// 3. fp16
FASTRES_INLINE VF widen(__m256i h, const F16*) { return _mm512_cvtph_ps(h); }
FASTRES_INLINE __m256i narrow(VF v, const F16*) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTRES_INLINE __m256i narrow_rounded(VF v, const F16* tag) { return narrow(v, tag); }

// 4. both 16-bit types
template <class T>
FASTRES_INLINE VF load(const T* p, Full) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
template <class T>
FASTRES_INLINE VF load(const T* p, Tail t) {
  return widen(_mm256_maskz_loadu_epi16(t.m, p), p);
}
template <class T>
FASTRES_INLINE void store(T* p, VF v, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
template <class T>
FASTRES_INLINE void store(T* p, VF v, Tail t) {
  _mm256_mask_storeu_epi16(p, t.m, narrow(v, p));
}

FASTRES_INLINE VF round_as(VF v, const float*) { return v; }
FASTRES_INLINE VF round_as(VF v, const BF16*) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(bf16_round_bits(v), top));
}
FASTRES_INLINE VF round_as(VF v, const F16* tag) { return widen(narrow(v, tag), tag); }

FASTRES_INLINE void store_rounded(float* p, VF v, Full lanes) { store(p, v, lanes); }
FASTRES_INLINE void store_rounded(float* p, VF v, Tail lanes) { store(p, v, lanes); }
template <class T>
FASTRES_INLINE void store_rounded(T* p, VF v, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_rounded(v, p));
}
template <class T>
FASTRES_INLINE void store_rounded(T* p, VF v, Tail t) {
  _mm256_mask_storeu_epi16(p, t.m, narrow_rounded(v, p));
}

FASTRES_INLINE void store_kept(float* p, VM m, VF v, Full lanes) { store(p, keep(m, v), lanes); }
FASTRES_INLINE void store_kept(BF16* p, VM m, VF v, Full) {
  const __m512i top = _mm512_srli_epi32(bf16_round_bits(v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(m, top));
}
FASTRES_INLINE void store_kept(F16* p, VM m, VF v, Full) {
  const __m256i h = _mm512_maskz_cvtps_ph(m, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
template <class T>
FASTRES_INLINE void store_kept(T* p, VM m, VF v, Tail lanes) {
  store(p, keep(m, v), lanes);
}

// 5. mask bits and pool indices
FASTRES_INLINE VM load_bits(const uint8_t* p, Full) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}
FASTRES_INLINE VM load_bits(const uint8_t* p, Tail t) {
  return static_cast<VM>((p[0] | (t.m > 0xff ? p[1] << 8 : 0)) & t.m);
}
FASTRES_INLINE void store_bits(uint8_t* p, VM m, Full) {
  const uint16_t bits = m;
  std::memcpy(p, &bits, 2);
}
FASTRES_INLINE void store_bits(uint8_t* p, VM m, Tail t) {
  const unsigned bits = m & t.m;  // pad bits are 0
  p[0] = static_cast<uint8_t>(bits);
  if (t.m > 0xff) p[1] = static_cast<uint8_t>(bits >> 8);
}
FASTRES_INLINE VM equals_u8(const uint8_t* p, uint8_t v, Full) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_cmpeq_epi8_mask(x, _mm_set1_epi8(static_cast<char>(v)));
}
FASTRES_INLINE VM equals_u8(const uint8_t* p, uint8_t v, Tail t) {
  const __m128i x = _mm_maskz_loadu_epi8(t.m, p);
  return _mm_mask_cmpeq_epi8_mask(t.m, x, _mm_set1_epi8(static_cast<char>(v)));
}
// v: whole numbers 0..255
FASTRES_INLINE void store_u8(uint8_t* p, VF v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v)));
}
FASTRES_INLINE void store_u8(uint8_t* p, VF v, Tail t) {
  _mm512_mask_cvtepi32_storeu_epi8(p, t.m, _mm512_cvttps_epi32(v));
}

}  // namespace
}  // namespace FASTRES_ISA
}  // namespace fastres
