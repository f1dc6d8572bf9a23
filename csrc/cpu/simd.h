// The vector of this translation unit's ISA: VF (kW fp32 lanes), VM (a lane mask), and the same
// small set of operations on all of them. FASTRES_ISA names the namespace and selects the header.
//
// Everything is force-inlined in an anonymous namespace, and no std template is used: a function
// that the linker could share between translation units would carry AVX-512 code to machines
// without it.
//
//   lanes         Full: all kW lanes; Tail(n): the first n, 0 < n < kW. A tail load fills with
//   zeros. load/store    fp32, bf16, fp16 <-> fp32; a store rounds to nearest even and keeps NaN a
//   NaN round_to<T>   the fp32 value of v once stored as T store_rounded store of a v that
//   round_to<T> already returned passes(v)     not (v <= 0), true for NaN: where the gradient
//   passes a ReLU keep(m, v)    v where m, else +0
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
