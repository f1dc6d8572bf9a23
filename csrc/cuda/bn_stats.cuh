// bn_stats: mean[c], biased var[c] of x over (N, H, W), rstd = 1 / sqrt(var + eps).
//
// Reads 1 tensor.
// Accumulates (count, mean, M2) in fp32, of x - x[0, c, 0, 0]: per thread over the loads in flight,
// merged by Chan's rule over the steps of a chunk, then the threads of a block, then the chunks; a
// fixed order, no atomics.
#pragma once

#include "tiles.cuh"

namespace fastres {
namespace cuda {

// (n, mean, m2) += (tile_n, tile_mean, tile_m2); either may be empty.
FASTRES_DEVICE void chan(float& n, float& mean, float& m2, float tile_n, float tile_mean,
                         float tile_m2) {
  const float total = n + tile_n;
  const float weight = tile_n / fmaxf(total, 1.0f);
  const float delta = tile_mean - mean;
  mean = fmaf(delta, weight, mean);
  m2 += tile_m2 + delta * delta * (n * weight);
  n = total;
}

// Merges (n, mean, M2) of the threads over the rows of the tree, and stores the chunk's. A fixed
// order; kThreads threads of the block take part, `barrier` holds them.
template <int L, class Counts, class Means, class Squares, class Barrier = BlockBarrier>
FASTRES_DEVICE void merge_block(float* part, Counts& count_cell, Means& mean_cell, Squares& m2_cell,
                                float n, const float (&mean)[L], const float (&m2)[L], const Cut& c,
                                const Share& share, const Barrier& barrier = Barrier{}) {
  const Tree<L> tree(c);
  const int tid = static_cast<int>(threadIdx.x);
  const int columns = c.nhwc ? 1 << c.log_tx : 1;  // of counts
  if (c.nhwc) {
    count_cell[tid] = n;
#pragma unroll
    for (int j = 0; j < L; ++j) {
      mean_cell[tree.row * tree.cols + tree.col + j] = mean[j];
      m2_cell[tree.row * tree.cols + tree.col + j] = m2[j];
    }
  } else {
    float lanes_n = n, lanes_mean = mean[0], lanes_m2 = m2[0];
#pragma unroll
    for (int j = 1; j < L; ++j) chan(lanes_n, lanes_mean, lanes_m2, n, mean[j], m2[j]);
    count_cell[tid] = lanes_n;
    mean_cell[tid] = lanes_mean;
    m2_cell[tid] = lanes_m2;
  }
  for (int half = tree.rows / 2; half > 0; half /= 2) {
    barrier();
    const int cells = half * tree.cols;
    for (int i = tid; i < cells; i += kThreads) {
      // cell i is in the tree's row i / cols; its count has one column for L channels (NHWC)
      const int at = c.nhwc ? i / L : i;
      float count = count_cell[at], cell_mean = mean_cell[i], cell_m2 = m2_cell[i];
      chan(count, cell_mean, cell_m2, count_cell[at + half * columns], mean_cell[i + cells],
           m2_cell[i + cells]);
      mean_cell[i] = cell_mean;
      m2_cell[i] = cell_m2;
    }
    barrier();
    for (int i = tid; i < half * columns; i += kThreads) {
      count_cell[i] = count_cell[i] + count_cell[i + half * columns];
    }
  }
  barrier();

  // store the chunk's mean and M2
  for (int i = tid; i < tree.cols; i += kThreads) {
    const int64_t channel = tree.channel(c, share, i);
    if (channel < c.channels) {
      part[share.index * c.channels + channel] = mean_cell[i];
      part[(c.chunks + share.index) * c.channels + channel] = m2_cell[i];
    }
  }
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2) bn_stats_kernel(BnStats p, float* part, Cut c) {
  constexpr int U = 2 * in_flight<T, L>();  // one tensor only
  constexpr int kCells = kThreads * L;
  FASTRES_SHARED(float, count_cell, kThreads);
  FASTRES_SHARED(float, mean_cell, kCells);
  FASTRES_SHARED(float, m2_cell, kCells);
  // 1. locate the chunk
  const Chunk<L> w(c);

  // 2. shift: a value of the channel, so near its mean; an outlier does no harm, M2 is not raw
  Raw<T, L> raw_shift;
  float shift[L], mean[L] = {}, m2[L] = {};
  load(raw_shift, p.x, c.nhwc ? w.channel : w.channel * c.inner, c.nhwc || L == 1);
  expand(shift, raw_shift);
  if (!c.nhwc && L > 1) {
    const float one = widen(static_cast<const T*>(p.x)[w.channel * c.inner]);
#pragma unroll
    for (int j = 0; j < L; ++j) shift[j] = one;
  }
  float n = 0.0f;
  for (int64_t r = w.r; r < w.r_end; r += w.r_step) {
    for (int64_t i = w.i; i < w.i_end; i += U * w.i_step) {
      // 3. load tile
      Raw<T, L> raw[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = i + u * w.i_step;
        load(raw[u], p.x, w.row_of(c, r, at) * c.inner + w.unit_of(c, at) * L, at < w.i_end);
      }

      // 4. mean and M2 of the tile, inside the thread
      const int64_t left = (w.i_end - i + w.i_step - 1) / w.i_step;
      const float tile_n = left < U ? static_cast<float>(left) : static_cast<float>(U);
      const float inverse = left < U ? 1.0f / tile_n : 1.0f / U;
      float tile_mean[L] = {}, tile_m2[L] = {};
#pragma unroll
      for (int u = 0; u < U; ++u) {
        float x[L];
        expand(x, raw[u]);
#pragma unroll
        for (int j = 0; j < L; ++j) tile_mean[j] += u < left ? x[j] - shift[j] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < L; ++j) tile_mean[j] *= inverse;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        float x[L];
        expand(x, raw[u]);
#pragma unroll
        for (int j = 0; j < L; ++j) {
          const float d = u < left ? x[j] - shift[j] - tile_mean[j] : 0.0f;
          tile_m2[j] = fmaf(d, d, tile_m2[j]);
        }
      }

      // 5. merge (Chan)
      const float total = n + tile_n, weight = tile_n / total, cross = n * weight;
#pragma unroll
      for (int j = 0; j < L; ++j) {
        const float delta = tile_mean[j] - mean[j];
        mean[j] = fmaf(delta, weight, mean[j]);
        m2[j] += fmaf(delta * delta, cross, tile_m2[j]);
      }
      n = total;
    }
  }

  // 6. merge the threads of the block, store partials: mean - shift and M2 of the chunk
  merge_block<L>(part, count_cell, mean_cell, m2_cell, n, mean, m2, c, Share(c));
}

// A warp for each channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bn_stats_finalise_kernel(BnStats p, const float* part, Cut c) {
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinaliseChannels + (threadIdx.x >> 5);
  if (channel >= c.channels) return;
  const int64_t unit = c.nhwc ? 1 : c.inner;  // values of a channel in one row or image

  // 1. merge every 32nd chunk (Chan)
  float n = 0.0f, mean = 0.0f, m2 = 0.0f;
  for (int64_t k = lane; k < c.chunks; k += 32) {
    const int64_t left = c.total - k * c.chunk;
    const float count = static_cast<float>((left < c.chunk ? left : c.chunk) * unit);
    chan(n, mean, m2, count, part[k * c.channels + channel],
         part[(c.chunks + k) * c.channels + channel]);
  }

  // 2. merge the lanes
  for (int other = 16; other > 0; other /= 2) {
    const float lane_n = __shfl_down_sync(kWarp, n, static_cast<unsigned>(other));
    const float lane_mean = __shfl_down_sync(kWarp, mean, static_cast<unsigned>(other));
    const float lane_m2 = __shfl_down_sync(kWarp, m2, static_cast<unsigned>(other));
    chan(n, mean, m2, lane_n, lane_mean, lane_m2);
  }

  // 3. undo the shift, store
  if (lane == 0) {
    const float shift = widen(static_cast<const T*>(p.x)[c.nhwc ? channel : channel * c.inner]);
    const float var = m2 / n;
    p.mean[channel] = mean + shift;
    p.var[channel] = var;
    p.rstd[channel] = 1.0f / sqrtf(var + static_cast<float>(p.eps));
  }
}

}  // namespace cuda
}  // namespace fastres
