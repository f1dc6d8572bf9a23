// What the binding files share: addresses and shapes from Python to the kernels' argument blocks.
// For bindings only; the kernels' own headers define no functions (see cpu/blocks.h).
#pragma once

#include "cpu/blocks.h"

namespace fastres {

using Ptr = uintptr_t;  // an address, 0 for None
using I64 = int64_t;

template <class T>
T* as(Ptr address) {
  return reinterpret_cast<T*>(address);
}
inline float* f32(Ptr address) { return as<float>(address); }
inline void* any(Ptr address) { return as<void>(address); }
inline uint8_t* u8(Ptr address) { return as<uint8_t>(address); }

inline Act act(int dtype, bool nhwc, I64 n, I64 c, I64 s) {
  Act a{dtype, nhwc, n, c, s, nhwc ? n * s : n * c, nhwc ? c : s, 0};
  a.mask_row = (a.inner + 7) / 8;
  return a;
}

}  // namespace fastres
