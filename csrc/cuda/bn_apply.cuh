// bn_apply: z = act(normalise(x) + r), r = 0, residual or normalise(residual).
// normalise(x) = (x - mean) * (gamma * rstd) + beta; without statistics a per-channel affine.
//
// Reads 1-2, writes 1 tensor (and 1/16 of one in bf16 for the mask).
// Accumulates in fp32; rounded once, and the ReLU gates the rounded value.
#pragma once

#include "norm.cuh"

namespace fastres {
namespace cuda {

// DUAL: the residual is normalised, too.
template <class T, int L, bool DUAL>
__global__ void __launch_bounds__(kThreads, 2) bn_apply_kernel(BnApply p, Map m) {
  // With two sets of vectors, half the loads in flight: they share the registers.
  constexpr int U = DUAL ? in_flight<T, L>() / 2 : in_flight<T, L>();
  // 1. locate the tile
  const Walk<L> w(m);
  const bool residual = DUAL || p.residual != nullptr;

  // 2. load per-channel vectors
  Affine<L> norm, res_norm;
  norm.load(p.mean, p.rstd, p.gamma, p.beta, w.channel, !m.nhwc);
  if (DUAL) res_norm.load(p.res_mean, p.res_rstd, p.res_gamma, p.res_beta, w.channel, !m.nhwc);
  for (int k0 = 0; k0 < m.steps; k0 += U) {
    // 3. load tile
    Raw<T, L> raw_x[U], raw_r[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool ok = k0 + u < w.count;
      const int64_t at = w.at + (k0 + u) * w.step_at;
      load(raw_x[u], p.x, at, ok);
      load(raw_r[u], p.residual, at, ok && residual);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool ok = k0 + u < w.count;
      float z[L], r[L];
      bool keep[L];
      expand(z, raw_x[u]);
      expand(r, raw_r[u]);

      // 4. normalise, add
#pragma unroll
      for (int j = 0; j < L; ++j) {
        z[j] = norm(z[j], j);
        if (DUAL) r[j] = res_norm(r[j], j);
        if (residual) z[j] += r[j];
      }

      // 5. gate the stored value, pack the bits
      if (p.relu) {
#pragma unroll
        for (int j = 0; j < L; ++j) {
          keep[j] = passes_stored<T>(z[j]);
          z[j] = keep[j] ? z[j] : 0.0f;
        }
        if (p.mask != nullptr) store_bits(p.mask, w.bits + (k0 + u) * w.step_bits, keep, ok);
      }

      // 6. store tile
      if (ok) store<T>(p.z, w.at + (k0 + u) * w.step_at, z);
    }
  }
}

}  // namespace cuda
}  // namespace fastres
