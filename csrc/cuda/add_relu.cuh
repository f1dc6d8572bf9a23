// add_relu: z = relu(a + b). relu_bwd: dx = gate(dz) + dy.
//
// add_relu reads 2, writes 1 tensor and the bits; relu_bwd reads 1-2 and the bits, writes 1.
// Accumulates in fp32; rounded once, and the ReLU gates the rounded value.
#pragma once

#include "tiles.cuh"

namespace fastres {
namespace cuda {

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2) add_relu_kernel(AddRelu p, Map m) {
  constexpr int U = in_flight<T, L>();
  // 1. locate the tile
  const Walk<L> w(m);
  for (int k0 = 0; k0 < m.steps; k0 += U) {
    // 2. load tile
    Raw<T, L> raw_a[U], raw_b[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t at = w.at + (k0 + u) * w.step_at;
      load(raw_a[u], p.a, at, k0 + u < w.count);
      load(raw_b[u], p.b, at, k0 + u < w.count);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool ok = k0 + u < w.count;
      float a[L], b[L];
      bool keep[L];
      expand(a, raw_a[u]);
      expand(b, raw_b[u]);

      // 3. add, gate the stored value
#pragma unroll
      for (int j = 0; j < L; ++j) {
        const float z = a[j] + b[j];
        keep[j] = passes_stored<T>(z);
        a[j] = keep[j] ? z : 0.0f;
      }

      // 4. pack the bits
      if (p.mask != nullptr) store_bits(p.mask, w.bits + (k0 + u) * w.step_bits, keep, ok);

      // 5. store tile
      if (ok) store<T>(p.z, w.at + (k0 + u) * w.step_at, a);
    }
  }
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2) relu_bwd_kernel(ReluBwd p, Map m) {
  constexpr int U = in_flight<T, L>();
  // 1. locate the tile
  const Walk<L> w(m);
  for (int k0 = 0; k0 < w.count; k0 += U) {
    // 2. load tile
    Raw<T, L> raw_dz[U], raw_dy[U];
    unsigned byte[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool ok = k0 + u < w.count;
      const int64_t at = w.at + (k0 + u) * w.step_at;
      load(raw_dz[u], p.dz, at, ok);
      load(raw_dy[u], p.dy, at, ok && p.dy != nullptr);
      byte[u] = ok ? p.mask[w.bits + (k0 + u) * w.step_bits] : 0u;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float g[L], dy[L];
      expand(g, raw_dz[u]);
      expand(dy, raw_dy[u]);

      // 3. unpack the bits, gate
      const int64_t unit = w.unit + (k0 + u) * w.step_unit;
#pragma unroll
      for (int j = 0; j < L; ++j) g[j] = bit_of<L>(byte[u], unit, j) ? g[j] : 0.0f;

      // 4. add, store tile
      if (p.dy != nullptr) {
#pragma unroll
        for (int j = 0; j < L; ++j) g[j] += dy[j];
      }
      if (k0 + u < w.count) store<T>(p.dx, w.at + (k0 + u) * w.step_at, g);
    }
  }
}

}  // namespace cuda
}  // namespace fastres
