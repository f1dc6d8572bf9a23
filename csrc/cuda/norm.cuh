// Per-channel arithmetic on a thread's L channels: normalise, the ReLU gate, the gradient.
#pragma once

#include "tiles.cuh"

namespace fastres {
namespace cuda {

// mean, scale and beta of a thread's channels.
template <int L>
struct Affine {
  float mean[L], scale[L], beta[L];

  FASTRES_DEVICE void load(const float* mean_p, const float* rstd_p, const float* gamma_p,
                           const float* beta_p, int64_t channel, bool splat) {
    load_vector<L>(mean, mean_p, channel, splat, 0.0f);
    load_scale<L>(scale, gamma_p, rstd_p, channel, splat);
    load_vector<L>(beta, beta_p, channel, splat, 0.0f);
  }
  FASTRES_DEVICE float operator()(float x, int j) const {
    return normalise(x, mean[j], scale[j], beta[j]);
  }
};

// g, gated by the bits or by the recomputed stored pre-activation.
template <class T, int L>
FASTRES_DEVICE void gate(float (&g)[L], const float (&x)[L], const Affine<L>& norm, int gate,
                         unsigned byte, int64_t unit) {
#pragma unroll
  for (int j = 0; j < L; ++j) {
    if (gate == kGateMask && !bit_of<L>(byte, unit, j)) g[j] = 0.0f;
    if (gate == kGateRecompute && !passes_stored<T>(norm(x[j], j))) g[j] = 0.0f;
  }
}

// dx = scale * g - (x - mean) * slope - offset: the formula above, its per-channel factors formed
// once. The mean is subtracted first.
template <int L>
struct Gradient {
  float mean[L], scale[L], slope[L], offset[L];

  FASTRES_DEVICE void load(const float* mean_p, const float* rstd_p, const float* gamma_p,
                           const float* dgamma_p, const float* dbeta_p, bool training,
                           float inverse_count, int64_t channel, bool splat) {
    load_vector<L>(mean, mean_p, channel, splat, 0.0f);
    load_scale<L>(scale, gamma_p, rstd_p, channel, splat);
    if (training) {
      float rstd[L], dbeta[L];
      load_vector<L>(rstd, rstd_p, channel, splat, 1.0f);
      load_vector<L>(slope, dgamma_p, channel, splat, 0.0f);
      load_vector<L>(dbeta, dbeta_p, channel, splat, 0.0f);
#pragma unroll
      for (int j = 0; j < L; ++j) {
        slope[j] = scale[j] * (slope[j] * inverse_count * rstd[j]);
        offset[j] = scale[j] * (dbeta[j] * inverse_count);
      }
    }
  }
  FASTRES_DEVICE float operator()(float g, float x, bool training, int j) const {
    return training ? fmaf(scale[j], g, -fmaf(x - mean[j], slope[j], offset[j])) : scale[j] * g;
  }
};

}  // namespace cuda
}  // namespace fastres
