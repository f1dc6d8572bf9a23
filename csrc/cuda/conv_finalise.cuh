// The second kernel of the convolutions' reductions: a worker's partials to the result, in a fixed
// order.
#pragma once

#include "conv_epilogue.cuh"

namespace fastres {
namespace cuda {

// mean, var, rstd of a channel from the workers' (mean, M2); a warp a channel.
__global__ void __launch_bounds__(kThreads)
    conv_stats_finalise_kernel(float* mean_p, float* var_p, float* rstd_p, const float* part,
                               float eps, int64_t rows, int64_t channels, ConvSchedule s) {
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinaliseChannels + (threadIdx.x >> 5);
  if (channel >= channels) return;
  // 1. merge every 32nd worker (Chan)
  float n = 0.0f, mean = 0.0f, m2 = 0.0f;
  for (int64_t k = lane; k < s.workers; k += 32) {
    const float count = static_cast<float>(ConvWork(s, k).rows(s, rows));
    if (count > 0.0f) {
      chan(n, mean, m2, count, part[k * channels + channel],
           part[(s.workers + k) * channels + channel]);
    }
  }

  // 2. merge the lanes
  for (int other = 16; other > 0; other /= 2) {
    const float lane_n = __shfl_down_sync(kWarp, n, static_cast<unsigned>(other));
    const float lane_mean = __shfl_down_sync(kWarp, mean, static_cast<unsigned>(other));
    const float lane_m2 = __shfl_down_sync(kWarp, m2, static_cast<unsigned>(other));
    chan(n, mean, m2, lane_n, lane_mean, lane_m2);
  }

  // 3. store
  if (lane == 0) {
    const float var = m2 / n;
    mean_p[channel] = mean;
    var_p[channel] = var;
    rstd_p[channel] = 1.0f / sqrtf(var + eps);
  }
}

// dw[i] = sum over the splits of part[split, i], 8 elements a thread.
template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_wgrad_finalise_kernel(void* dw, const float* part, int64_t splits, int64_t total) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (at >= total) return;
  float sum[8] = {};
  for (int64_t s = 0; s < splits; ++s) {
    Raw<float, 8> raw;
    float v[8];
    load(raw, part, s * total + at, true);
    expand(v, raw);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += v[j];
  }
  store<T>(dw, at, sum);
}

}  // namespace cuda
}  // namespace fastres
