// What every CUDA kernel of fastres stands on: element types, 16-byte accesses, the ReLU gate.
//
// The same text is compiled by nvcc and, for the tests, by g++ against tests/cuda_host/shim.h
// (FASTRES_CUDA_HOST): what only one of the two knows is in this file and in launch.cuh.
// Compiled with -fmad=false (g++: -ffp-contract=off): an fma only where the source says fmaf, so
// that a recomputed ReLU gate sees the very bits that the forward stored.
#pragma once

#include <cstdint>

#ifdef FASTRES_CUDA_HOST
#include "shim.h"
#else
#define FASTRES_SHARED(type, name, count) __shared__ type name[count]
#endif

#include "../cpu/blocks.h"

#define FASTRES_DEVICE __device__ __forceinline__

namespace fastres {
namespace cuda {

constexpr int kThreads = 256;  // of every block
constexpr unsigned kWarp = 0xffffffffu;

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// --- conversions: two 16-bit values share a word, the first in the low half ---

FASTRES_DEVICE float bits_to_float(uint32_t bits) {
#ifdef FASTRES_CUDA_HOST
  return shim::bits_to_float(bits);
#else
  return __uint_as_float(bits);
#endif
}

FASTRES_DEVICE float half_to_float(uint16_t bits) {
#ifdef FASTRES_CUDA_HOST
  return shim::half_to_float(bits);
#else
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
#endif
}

FASTRES_DEVICE float widen(float v) { return v; }
FASTRES_DEVICE float widen(BF16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
FASTRES_DEVICE float widen(F16 v) { return half_to_float(v.bits); }

FASTRES_DEVICE void widen2(uint32_t word, float* v, BF16) {
  v[0] = bits_to_float(word << 16);
  v[1] = bits_to_float(word & 0xffff0000u);
}
FASTRES_DEVICE void widen2(uint32_t word, float* v, F16) {
  v[0] = half_to_float(static_cast<uint16_t>(word));
  v[1] = half_to_float(static_cast<uint16_t>(word >> 16));
}

// To nearest even; NaN stays NaN.
FASTRES_DEVICE uint32_t narrow2(float lo, float hi, BF16) {
#ifdef FASTRES_CUDA_HOST
  return shim::float_to_bf16(lo) | static_cast<uint32_t>(shim::float_to_bf16(hi)) << 16;
#else
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
#endif
}
FASTRES_DEVICE uint32_t narrow2(float lo, float hi, F16) {
#ifdef FASTRES_CUDA_HOST
  return shim::float_to_half(lo) | static_cast<uint32_t>(shim::float_to_half(hi)) << 16;
#else
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
#endif
}

FASTRES_DEVICE float narrow(float v, float) { return v; }
FASTRES_DEVICE BF16 narrow(float v, BF16 t) {
  return BF16{static_cast<uint16_t>(narrow2(v, 0.0f, t))};
}
FASTRES_DEVICE F16 narrow(float v, F16 t) {
  return F16{static_cast<uint16_t>(narrow2(v, 0.0f, t))};
}

// The largest value that is stored as 0: half the smallest subnormal, a tie that goes to even.
FASTRES_DEVICE constexpr float underflow(float) { return 0.0f; }
FASTRES_DEVICE constexpr float underflow(BF16) { return 0x1p-134f; }
FASTRES_DEVICE constexpr float underflow(F16) { return 0x1p-25f; }

// not (z <= 0) of z = v once stored as T: where the gradient passes a ReLU. True for NaN.
template <class T>
FASTRES_DEVICE bool passes_stored(float v) {
  return !(v <= underflow(T{}));
}

// --- a unit: L consecutive elements of a row, one thread's share. L = 8: 16-byte accesses and one
// mask byte; L = 1: any alignment ---

template <class T, int L>
struct Raw;
template <class T>
struct Raw<T, 1> {
  T q;
};
template <class T>
struct Raw<T, 8> {
  uint4 q[sizeof(T) / 2];
};

template <class T>
FASTRES_DEVICE void load(Raw<T, 1>& raw, const void* base, int64_t at, bool ok) {
  raw.q = T{};
  if (ok) raw.q = static_cast<const T*>(base)[at];
}
template <class T>
FASTRES_DEVICE void load(Raw<T, 8>& raw, const void* base, int64_t at, bool ok) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) raw.q[i] = make_uint4(0, 0, 0, 0);
  if (ok) {
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const T*>(base) + at);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) raw.q[i] = p[i];
  }
}

template <class T>
FASTRES_DEVICE void expand(float (&v)[1], const Raw<T, 1>& raw) {
  v[0] = widen(raw.q);
}
template <class T>
FASTRES_DEVICE void expand(float (&v)[8], const Raw<T, 8>& raw) {
  widen2(raw.q[0].x, v, T{});
  widen2(raw.q[0].y, v + 2, T{});
  widen2(raw.q[0].z, v + 4, T{});
  widen2(raw.q[0].w, v + 6, T{});
}
FASTRES_DEVICE void expand(float (&v)[8], const Raw<float, 8>& raw) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    v[4 * i] = bits_to_float(raw.q[i].x);
    v[4 * i + 1] = bits_to_float(raw.q[i].y);
    v[4 * i + 2] = bits_to_float(raw.q[i].z);
    v[4 * i + 3] = bits_to_float(raw.q[i].w);
  }
}

template <class T>
FASTRES_DEVICE void store(void* base, int64_t at, const float (&v)[1]) {
  static_cast<T*>(base)[at] = narrow(v[0], T{});
}
// One 16-byte store: nvcc 13.0 makes four of a uint4 whose words come from an asm (sm_80, sm_90a).
FASTRES_DEVICE void store16(void* p, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
#ifdef FASTRES_CUDA_HOST
  *static_cast<uint4*>(p) = make_uint4(x, y, z, w);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
#endif
}

template <class T>
FASTRES_DEVICE void store(void* base, int64_t at, const float (&v)[8]) {
  if constexpr (sizeof(T) == 4) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(base) + at);
    p[0] = make_float4(v[0], v[1], v[2], v[3]);
    p[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    store16(static_cast<T*>(base) + at, narrow2(v[0], v[1], T{}), narrow2(v[2], v[3], T{}),
            narrow2(v[4], v[5], T{}), narrow2(v[6], v[7], T{}));
  }
}

// v as it will be stored.
template <class T, int L>
FASTRES_DEVICE void round_to(float (&v)[L]) {
#pragma unroll
  for (int j = 0; j < L; ++j) v[j] = widen(narrow(v[j], T{}));
}

// --- per-channel vectors, fp32 ---

// L channels from `ch` on (one channel for all lanes: `splat`), or `missing` where there is none.
template <int L>
FASTRES_DEVICE void load_vector(float (&v)[L], const float* p, int64_t ch, bool splat,
                                float missing) {
  if (p == nullptr) {
#pragma unroll
    for (int j = 0; j < L; ++j) v[j] = missing;
    return;
  }
  if constexpr (L == 8) {
    if (!splat) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 q = reinterpret_cast<const float4*>(p + ch)[i];
        v[4 * i] = q.x;
        v[4 * i + 1] = q.y;
        v[4 * i + 2] = q.z;
        v[4 * i + 3] = q.w;
      }
      return;
    }
  }
  const float one = p[ch];
#pragma unroll
  for (int j = 0; j < L; ++j) v[j] = one;
}

// gamma * rstd.
template <int L>
FASTRES_DEVICE void load_scale(float (&v)[L], const float* gamma, const float* rstd, int64_t ch,
                               bool splat) {
  float r[L];
  load_vector<L>(v, gamma, ch, splat, 1.0f);
  load_vector<L>(r, rstd, ch, splat, 1.0f);
#pragma unroll
  for (int j = 0; j < L; ++j) v[j] *= r[j];
}

// (x - mean) * (gamma * rstd) + beta; the subtraction comes first.
FASTRES_DEVICE float normalise(float x, float mean, float scale, float beta) {
  return fmaf(x - mean, scale, beta);
}

}  // namespace cuda
}  // namespace fastres
