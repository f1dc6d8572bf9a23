// 8 lanes in GCC/Clang vector types: SSE2 on any x86-64, NEON on Arm, scalar code elsewhere.
// See simd.h for what the operations mean.
#pragma once

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int kW = 8;
typedef float VF __attribute__((vector_size(32)));
typedef int32_t VI __attribute__((vector_size(32)));
typedef uint32_t VU __attribute__((vector_size(32)));
typedef uint16_t VH __attribute__((vector_size(16)));
struct VM {
  VI v;  // -1 or 0 per lane
};

struct Full {};
struct Tail {
  int n;
  FASTRES_INLINE explicit Tail(int64_t count) : n(static_cast<int>(count)) {}
};

FASTRES_INLINE VF zero() { return VF{}; }
FASTRES_INLINE VF splat(float v) { return VF{v, v, v, v, v, v, v, v}; }
FASTRES_INLINE VF add(VF a, VF b) { return a + b; }
FASTRES_INLINE VF sub(VF a, VF b) { return a - b; }
FASTRES_INLINE VF mul(VF a, VF b) { return a * b; }
FASTRES_INLINE VF fma(VF a, VF b, VF c) { return a * b + c; }
FASTRES_INLINE VF fnma(VF a, VF b, VF c) { return c - a * b; }

FASTRES_INLINE VM passes(VF v) { return {~(v <= zero())}; }
FASTRES_INLINE VM passes_above(VF v, float t) { return {~(v <= splat(t))}; }
FASTRES_INLINE VM greater_or_nan(VF v, VF best) { return {(v > best) | (v != v)}; }
FASTRES_INLINE VF select(VM m, VF yes, VF no) { return (VF)((m.v & (VI)yes) | (~m.v & (VI)no)); }
FASTRES_INLINE VF keep(VM m, VF v) { return (VF)(m.v & (VI)v); }
FASTRES_INLINE VF keep_lanes(VF v, Full) { return v; }
FASTRES_INLINE VF keep_lanes(VF v, Tail t) {
  const VI lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return keep(VM{lane < t.n}, v);
}

// 1. bf16: the upper half of an fp32
FASTRES_INLINE VU bf16_round_bits(VF v) {
  const VU u = (VU)v;
  const VU up = u + 0x7fffu + ((u >> 16) & 1u);
  // rounding could carry a NaN's mantissa into infinity: quieten it instead
  const VU nan = (VU)(v != v);
  return (nan & (u | 0x400000u)) | (~nan & up);
}
FASTRES_INLINE VF widen(VH h, const BF16*) { return (VF)(__builtin_convertvector(h, VU) << 16); }
FASTRES_INLINE VH narrow_rounded(VF v, const BF16*) {
  return __builtin_convertvector((VU)v >> 16, VH);
}
FASTRES_INLINE VH narrow(VF v, const BF16*) {
  return __builtin_convertvector(bf16_round_bits(v) >> 16, VH);
}

// 2. fp16, in integer arithmetic
FASTRES_INLINE VF widen(VH h, const F16*) {
  const VU u = __builtin_convertvector(h, VU);
  const VU sign = (u & 0x8000u) << 16;
  const VU em = u & 0x7fffu;
  const VU normal = (em << 13) + (112u << 23);
  const VU special = (em << 13) | 0x7f800000u;                     // inf, NaN
  const VF tiny = __builtin_convertvector((VI)em, VF) * 0x1p-24f;  // subnormal
  const VU is_special = (VU)(em >= 0x7c00u);
  const VU is_tiny = (VU)(em < 0x400u);
  const VU body = (is_special & special) | (is_tiny & (VU)tiny) | (~is_special & ~is_tiny & normal);
  return (VF)(sign | body);
}
FASTRES_INLINE VH narrow(VF v, const F16*) {
  const VU bits = (VU)v;
  const VU sign = (bits >> 16) & 0x8000u;
  const VU u = bits & 0x7fffffffu;
  const VU r = u - (112u << 23);
  const VU normal = (r + 0xfffu + ((r >> 13) & 1u)) >> 13;  // 65520 and more carries into inf
  // adding 0.5 puts the unit of an fp16 subnormal, 2^-24, at the last bit: the FPU rounds
  const VU tiny = (VU)((VF)u + 0.5f) - 0x3f000000u;
  const VU nan = (VU)(u > 0x7f800000u);
  const VU is_inf = (VU)(u >= 0x47800000u) & ~nan;
  const VU is_tiny = (VU)(u < 0x38800000u);
  const VU quiet = 0x7e00u | ((u >> 13) & 0x3ffu);
  const VU body =
      (nan & quiet) | (is_inf & 0x7c00u) | (is_tiny & tiny) | (~nan & ~is_inf & ~is_tiny & normal);
  return __builtin_convertvector(sign | body, VH);
}
FASTRES_INLINE VH narrow_rounded(VF v, const F16* tag) { return narrow(v, tag); }

// 3. loads and stores; a tail goes through a buffer on the stack
FASTRES_INLINE VF load(const float* p, Full) {
  VF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FASTRES_INLINE void store(float* p, VF v, Full) { std::memcpy(p, &v, sizeof v); }
template <class T>
FASTRES_INLINE VF load(const T* p, Full) {
  VH h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, p);
}
template <class T>
FASTRES_INLINE void store(T* p, VF v, Full) {
  const VH h = narrow(v, p);
  std::memcpy(p, &h, sizeof h);
}
template <class T>
FASTRES_INLINE VF load(const T* p, Tail t) {
  T buffer[kW] = {};
  for (int j = 0; j < t.n; ++j) buffer[j] = p[j];
  return load(static_cast<const T*>(buffer), Full{});
}
template <class T>
FASTRES_INLINE void store(T* p, VF v, Tail t) {
  T buffer[kW];
  store(static_cast<T*>(buffer), v, Full{});
  for (int j = 0; j < t.n; ++j) p[j] = buffer[j];
}

FASTRES_INLINE VF round_as(VF v, const float*) { return v; }
FASTRES_INLINE VF round_as(VF v, const BF16*) { return (VF)(bf16_round_bits(v) & 0xffff0000u); }
FASTRES_INLINE VF round_as(VF v, const F16* tag) { return widen(narrow(v, tag), tag); }

FASTRES_INLINE void store_rounded(float* p, VF v, Full lanes) { store(p, v, lanes); }
FASTRES_INLINE void store_rounded(float* p, VF v, Tail lanes) { store(p, v, lanes); }
template <class T>
FASTRES_INLINE void store_rounded(T* p, VF v, Full) {
  const VH h = narrow_rounded(v, p);
  std::memcpy(p, &h, sizeof h);
}
template <class T>
FASTRES_INLINE void store_rounded(T* p, VF v, Tail t) {
  store(p, v, t);
}

template <class T, class L>
FASTRES_INLINE void store_kept(T* p, VM m, VF v, L lanes) {
  store(p, keep(m, v), lanes);
}

// 4. mask bits and pool indices
FASTRES_INLINE VM expand_bits(uint8_t bits) {
  const VI lane = {1, 2, 4, 8, 16, 32, 64, 128};
  return {(lane & static_cast<int32_t>(bits)) != 0};
}
FASTRES_INLINE VM load_bits(const uint8_t* p, Full) { return expand_bits(*p); }
FASTRES_INLINE VM load_bits(const uint8_t* p, Tail t) {
  return expand_bits(static_cast<uint8_t>(*p & ((1 << t.n) - 1)));
}
FASTRES_INLINE int pack_bits(VM m) {
  const VI lane = {1, 2, 4, 8, 16, 32, 64, 128};
  const VI b = m.v & lane;
  return b[0] | b[1] | b[2] | b[3] | b[4] | b[5] | b[6] | b[7];
}
FASTRES_INLINE void store_bits(uint8_t* p, VM m, Full) { *p = static_cast<uint8_t>(pack_bits(m)); }
FASTRES_INLINE void store_bits(uint8_t* p, VM m, Tail t) {
  *p = static_cast<uint8_t>(pack_bits(m) & ((1 << t.n) - 1));  // pad bits are 0
}
FASTRES_INLINE VM equals_u8(const uint8_t* p, uint8_t v, Full) {
  VI out;
  for (int j = 0; j < kW; ++j) out[j] = p[j] == v ? -1 : 0;
  return {out};
}
FASTRES_INLINE VM equals_u8(const uint8_t* p, uint8_t v, Tail t) {
  VI out = {};
  for (int j = 0; j < t.n; ++j) out[j] = p[j] == v ? -1 : 0;
  return {out};
}
// v: whole numbers 0..255
FASTRES_INLINE void store_u8(uint8_t* p, VF v, Full) {
  for (int j = 0; j < kW; ++j) p[j] = static_cast<uint8_t>(static_cast<int>(v[j]));
}
FASTRES_INLINE void store_u8(uint8_t* p, VF v, Tail t) {
  for (int j = 0; j < t.n; ++j) p[j] = static_cast<uint8_t>(static_cast<int>(v[j]));
}

}  // namespace
}  // namespace FASTRES_ISA
}  // namespace fastres
