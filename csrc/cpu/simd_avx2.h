// 8 lanes, AVX2 + FMA + F16C. See simd.h for what the operations mean.
#pragma once

#include <immintrin.h>

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int kW = 8;
using VF = __m256;
struct VM {
  __m256 v;  // all ones or all zeros per lane
};

struct Full {};
struct Tail {
  int n;
  FASTRES_INLINE explicit Tail(int64_t count) : n(static_cast<int>(count)) {}
  FASTRES_INLINE __m256i lanes() const {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

FASTRES_INLINE VF zero() { return _mm256_setzero_ps(); }
FASTRES_INLINE VF splat(float v) { return _mm256_set1_ps(v); }
FASTRES_INLINE VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
FASTRES_INLINE VF sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
FASTRES_INLINE VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
FASTRES_INLINE VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
FASTRES_INLINE VF fnma(VF a, VF b, VF c) { return _mm256_fnmadd_ps(a, b, c); }

FASTRES_INLINE VM passes(VF v) { return {_mm256_cmp_ps(v, zero(), _CMP_NLE_UQ)}; }
FASTRES_INLINE VM passes_above(VF v, float t) { return {_mm256_cmp_ps(v, splat(t), _CMP_NLE_UQ)}; }
FASTRES_INLINE VM greater_or_nan(VF v, VF best) {
  return {_mm256_or_ps(_mm256_cmp_ps(v, best, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q))};
}
FASTRES_INLINE VF keep(VM m, VF v) { return _mm256_and_ps(m.v, v); }
FASTRES_INLINE VF select(VM m, VF yes, VF no) { return _mm256_blendv_ps(no, yes, m.v); }
FASTRES_INLINE VF keep_lanes(VF v, Full) { return v; }
FASTRES_INLINE VF keep_lanes(VF v, Tail t) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(t.lanes()));
}

// 1. fp32
FASTRES_INLINE VF load(const float* p, Full) { return _mm256_loadu_ps(p); }
FASTRES_INLINE VF load(const float* p, Tail t) { return _mm256_maskload_ps(p, t.lanes()); }
FASTRES_INLINE void store(float* p, VF v, Full) { _mm256_storeu_ps(p, v); }
FASTRES_INLINE void store(float* p, VF v, Tail t) { _mm256_maskstore_ps(p, t.lanes(), v); }

// 2. bf16: the upper half of an fp32
FASTRES_INLINE VF widen(__m128i h, const BF16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
FASTRES_INLINE __m256i bf16_round_bits(VF v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  // rounding could carry a NaN's mantissa into infinity: quieten it instead
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan));
}
FASTRES_INLINE __m128i narrow_rounded(VF v, const BF16*) {
  const __m256i top = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  const __m256i packed = _mm256_packus_epi32(top, top);  // within each 128-bit half
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
FASTRES_INLINE __m128i narrow(VF v, const BF16* tag) {
  return narrow_rounded(_mm256_castsi256_ps(bf16_round_bits(v)), tag);
}

// 3. fp16
FASTRES_INLINE VF widen(__m128i h, const F16*) { return _mm256_cvtph_ps(h); }
FASTRES_INLINE __m128i narrow(VF v, const F16*) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTRES_INLINE __m128i narrow_rounded(VF v, const F16* tag) { return narrow(v, tag); }

// 4. both 16-bit types; a tail goes through the stack, AVX2 has no 16-bit masked access
template <class T>
FASTRES_INLINE VF load(const T* p, Full) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
}
template <class T>
FASTRES_INLINE VF load(const T* p, Tail t) {
  alignas(16) T buffer[kW] = {};
  for (int j = 0; j < t.n; ++j) buffer[j] = p[j];
  return load(buffer, Full{});
}
template <class T>
FASTRES_INLINE void store(T* p, VF v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p));
}
template <class T>
FASTRES_INLINE void store(T* p, VF v, Tail t) {
  alignas(16) T buffer[kW];
  store(buffer, v, Full{});
  for (int j = 0; j < t.n; ++j) p[j] = buffer[j];
}

FASTRES_INLINE VF round_as(VF v, const float*) { return v; }
FASTRES_INLINE VF round_as(VF v, const BF16*) {
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(bf16_round_bits(v), top));
}
FASTRES_INLINE VF round_as(VF v, const F16* tag) { return widen(narrow(v, tag), tag); }

FASTRES_INLINE void store_rounded(float* p, VF v, Full lanes) { store(p, v, lanes); }
FASTRES_INLINE void store_rounded(float* p, VF v, Tail lanes) { store(p, v, lanes); }
template <class T>
FASTRES_INLINE void store_rounded(T* p, VF v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_rounded(v, p));
}
template <class T>
FASTRES_INLINE void store_rounded(T* p, VF v, Tail t) {
  store(p, v, t);
}

template <class T, class L>
FASTRES_INLINE void store_kept(T* p, VM m, VF v, L lanes) {
  store(p, keep(m, v), lanes);
}

// 5. mask bits and pool indices
FASTRES_INLINE VM expand_bits(uint8_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(bits), lane);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane))};
}
FASTRES_INLINE VM load_bits(const uint8_t* p, Full) { return expand_bits(*p); }
FASTRES_INLINE VM load_bits(const uint8_t* p, Tail t) {
  return expand_bits(static_cast<uint8_t>(*p & ((1 << t.n) - 1)));
}
FASTRES_INLINE void store_bits(uint8_t* p, VM m, Full) {
  *p = static_cast<uint8_t>(_mm256_movemask_ps(m.v));
}
FASTRES_INLINE void store_bits(uint8_t* p, VM m, Tail t) {
  *p = static_cast<uint8_t>(_mm256_movemask_ps(m.v) & ((1 << t.n) - 1));  // pad bits are 0
}
FASTRES_INLINE VM equals_u8(const uint8_t* p, uint8_t v, Full) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(x), _mm256_set1_epi32(v)))};
}
FASTRES_INLINE VM equals_u8(const uint8_t* p, uint8_t v, Tail t) {
  uint8_t buffer[kW] = {};
  for (int j = 0; j < t.n; ++j) buffer[j] = p[j];
  return {keep_lanes(equals_u8(buffer, v, Full{}).v, t)};
}
// v: whole numbers 0..255
FASTRES_INLINE void store_u8(uint8_t* p, VF v, Full) {
  const __m256i x = _mm256_cvttps_epi32(v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
FASTRES_INLINE void store_u8(uint8_t* p, VF v, Tail t) {
  uint8_t buffer[kW];
  store_u8(buffer, v, Full{});
  for (int j = 0; j < t.n; ++j) p[j] = buffer[j];
}

}  // namespace
}  // namespace FASTRES_ISA
}  // namespace fastres
