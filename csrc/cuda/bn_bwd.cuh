// bn_bwd_reduce: dbeta = sum g, dgamma = sum g * xhat, res_dgamma = sum g * res_xhat.
// bn_bwd_apply: dx = gamma * rstd * (g - dbeta / M - xhat * dgamma / M), frozen gamma * rstd * g;
// dres likewise, or g.
//
// Reduce reads 2-3 tensors and the bits; apply reads 2-3 (frozen: 1) and the bits, writes 1-2.
// Accumulates in fp32: per thread over a chunk, then its block, then the chunks; no atomics.
#pragma once

#include "norm.cuh"

namespace fastres {
namespace cuda {

// DUAL: with the sum of the normalised residual; its gate is never recomputed.
template <class T, int L, bool DUAL>
__global__ void __launch_bounds__(kThreads, 2)
    bn_bwd_reduce_kernel(BnBwdReduce p, float* part, Cut c) {
  constexpr int U = DUAL ? in_flight<T, L>() / 2 : in_flight<T, L>();
  constexpr int PARTS = DUAL ? 3 : 2;
  FASTRES_SHARED(float, cell, PARTS * kThreads * L);
  // 1. locate the chunk
  const Chunk<L> w(c);

  // 2. load per-channel vectors
  Affine<L> norm;
  float res_mean[L], acc[PARTS][L] = {};
  norm.load(p.mean, p.rstd, p.gamma, p.beta, w.channel, !c.nhwc);
  load_vector<L>(res_mean, p.res_mean, w.channel, !c.nhwc, 0.0f);
  const int gating = DUAL && p.gate == kGateRecompute ? static_cast<int>(kGateNone) : p.gate;
  for (int64_t r = w.r; r < w.r_end; r += w.r_step) {
    for (int64_t i = w.i; i < w.i_end; i += U * w.i_step) {
      // 3. load tile
      Raw<T, L> raw_g[U], raw_x[U], raw_r[U];
      unsigned byte[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = i + u * w.i_step;
        const int64_t row = w.row_of(c, r, at), unit = w.unit_of(c, at);
        const bool ok = at < w.i_end;
        load(raw_g[u], p.dz, row * c.inner + unit * L, ok);
        load(raw_x[u], p.x, row * c.inner + unit * L, ok);
        if (DUAL) load(raw_r[u], p.residual, row * c.inner + unit * L, ok);
        byte[u] = gating == kGateMask && ok ? p.mask[row * c.mask_row + unit * L / 8] : 0u;
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = i + u * w.i_step;
        if (at >= w.i_end) continue;
        float g[L], x[L], res[L] = {};
        expand(g, raw_g[u]);
        expand(x, raw_x[u]);
        if (DUAL) expand(res, raw_r[u]);

        // 4. gate
        gate<T, L>(g, x, norm, gating, byte[u], w.unit_of(c, at));

        // 5. add
#pragma unroll
        for (int j = 0; j < L; ++j) {
          acc[0][j] += g[j];
          acc[1][j] = fmaf(g[j], x[j] - norm.mean[j], acc[1][j]);
          if (DUAL) acc[PARTS - 1][j] = fmaf(g[j], res[j] - res_mean[j], acc[PARTS - 1][j]);
        }
      }
    }
  }

  // 6. add over the block, store partials
  sum_block<PARTS, L>(part, cell, acc, c, Share(c));
}

// A warp for each channel: all partials of dbeta, dgamma / rstd (and res_dgamma / res_rstd).
__global__ void __launch_bounds__(kThreads)
    bn_bwd_finalise_kernel(float* dgamma, float* dbeta, float* res_dgamma, const float* part,
                           const float* rstd, const float* res_rstd, Cut c) {
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinaliseChannels + (threadIdx.x >> 5);
  if (channel >= c.channels) return;
  // 1. add every 32nd chunk
  float sum[3] = {};
  for (int64_t k = lane; k < c.chunks; k += 32) {
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      if (p < 2 || res_dgamma != nullptr) sum[p] += part[(p * c.chunks + k) * c.channels + channel];
    }
  }

  // 2. add the lanes, scale, store
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    for (int other = 16; other > 0; other /= 2) sum[p] += __shfl_xor_sync(kWarp, sum[p], other);
  }
  if (lane == 0) {
    dbeta[channel] = sum[0];
    dgamma[channel] = sum[1] * (rstd == nullptr ? 1.0f : rstd[channel]);
    if (res_dgamma != nullptr) {
      res_dgamma[channel] = sum[2] * (res_rstd == nullptr ? 1.0f : res_rstd[channel]);
    }
  }
}

// DUAL: dres is the gradient of the normalised residual.
template <class T, int L, bool DUAL>
__global__ void __launch_bounds__(kThreads, 2)
    bn_bwd_apply_kernel(BnBwdApply p, float inverse_count, Map m) {
  constexpr int U = in_flight<T, L>() / 2;
  // 1. locate the tile
  const Walk<L> w(m);
  const bool recompute = !DUAL && p.gate == kGateRecompute;
  const bool read_x = p.training || recompute, read_r = DUAL && p.res_training;

  // 2. load per-channel vectors
  Gradient<L> grad, res_grad;
  Affine<L> norm;
  grad.load(p.mean, p.rstd, p.gamma, p.dgamma, p.dbeta, p.training, inverse_count, w.channel,
            !m.nhwc);
  if (DUAL) {
    res_grad.load(p.res_mean, p.res_rstd, p.res_gamma, p.res_dgamma, p.dbeta, p.res_training,
                  inverse_count, w.channel, !m.nhwc);
  } else {
    norm.load(p.mean, p.rstd, p.gamma, p.beta, w.channel, !m.nhwc);
  }
  for (int k0 = 0; k0 < w.count; k0 += U) {
    // 3. load tile
    Raw<T, L> raw_g[U], raw_x[U], raw_r[U];
    unsigned byte[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool ok = k0 + u < w.count;
      const int64_t at = w.at + (k0 + u) * w.step_at;
      load(raw_g[u], p.dz, at, ok);
      load(raw_x[u], p.x, at, ok && read_x);
      if (DUAL) load(raw_r[u], p.residual, at, ok && read_r);
      byte[u] = p.gate == kGateMask && ok ? p.mask[w.bits + (k0 + u) * w.step_bits] : 0u;
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (k0 + u >= w.count) continue;
      const int64_t at = w.at + (k0 + u) * w.step_at;
      float g[L], x[L], res[L] = {};
      expand(g, raw_g[u]);
      expand(x, raw_x[u]);
      if (DUAL) expand(res, raw_r[u]);

      // 4. gate
      const int64_t unit = w.unit + (k0 + u) * w.step_unit;
      gate<T, L>(g, x, norm, DUAL && !(p.gate == kGateMask) ? static_cast<int>(kGateNone) : p.gate,
                 byte[u], unit);

      // 5. dx
#pragma unroll
      for (int j = 0; j < L; ++j) x[j] = grad(g[j], x[j], p.training, j);
      store<T>(p.dx, at, x);

      // 6. dres
      if (p.dres != nullptr) {
        if (DUAL) {
#pragma unroll
          for (int j = 0; j < L; ++j) g[j] = res_grad(g[j], res[j], p.res_training, j);
        }
        store<T>(p.dres, at, g);
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastres
