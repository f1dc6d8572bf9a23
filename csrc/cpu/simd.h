// The vector of this translation unit's ISA: VF (kW fp32 lanes), VM (a lane mask), and the same
// small set of operations on all of them. FASTRES_ISA names the namespace and selects the header.
//
// Everything is force-inlined in an anonymous namespace, and no std template is used: a function
// that the linker could share between translation units would carry AVX-512 code to machines
// without it.
//
// clang-format off
//   lanes               Full: all kW lanes; Tail(n): the first n, 0 < n < kW; a tail load fills with 0
//   load/store          fp32, bf16, fp16 <-> fp32; a store rounds to nearest even, NaN stays NaN
//   round_to<T>         the fp32 value of v once stored as T
//   store_rounded       store of a v that round_to<T> already returned
//   passes(v)           not (v <= 0), true for NaN: where the gradient passes a ReLU
//   passes_above(v, t)  not (v <= t)
//   keep(m, v)          v where m, else +0
//   store_kept          store of keep(m, v)
// clang-format on
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>  // types only: emits no code

#define FASTRES_INLINE inline __attribute__((always_inline))

namespace fastres {
namespace FASTRES_ISA {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace
}  // namespace FASTRES_ISA
}  // namespace fastres

#if defined(FASTRES_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(FASTRES_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace fastres {
namespace FASTRES_ISA {
namespace {

// The largest value that rounds to 0 (half the smallest subnormal, a tie that goes to even).
FASTRES_INLINE constexpr float underflow(const float*) { return 0.0f; }
FASTRES_INLINE constexpr float underflow(const BF16*) { return 0x1p-134f; }
FASTRES_INLINE constexpr float underflow(const F16*) { return 0x1p-25f; }

// passes(v once stored as T), without waiting for the rounding.
template <class T>
FASTRES_INLINE VM passes_stored(VF v) {
  return passes_above(v, underflow(static_cast<const T*>(nullptr)));
}

}  // namespace
}  // namespace FASTRES_ISA
}  // namespace fastres
