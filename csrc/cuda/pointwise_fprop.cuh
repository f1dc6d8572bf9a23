// conv_fprop of a 1 x 1 convolution: y = h * w^T with the batch statistics of the stored y; h = x,
// relu(normalise(x)), or a block's output relu(normalise(x) + shortcut), which is then written to z
// on the way, its bits to a mask. conv_fprop_act: z = act(normalise(x * w^T) + residual).
//
// Reads x (and the shortcut) once from memory for all columns (other columns' blocks walk the same
// rows and hit in L2), w once a block, writes y (and z) once.
// Accumulates in fp32. Statistics are (mean, M2) of 16 rows, merged by Chan's rule down a warp's
// tiles, then over the block's warps, then over the chunks: a fixed order, no atomics.
#pragma once

#include "bn_stats.cuh"
#include "pointwise.cuh"

namespace fastres {
namespace cuda {

enum FpropForm { kPlain, kBlock, kAct };

struct PointwiseFprop {
  TensorMap x, w, shortcut;
  void* y;
  float* part;                              // (2, chunks, K): mean, M2; or null
  const float *mean, *rstd, *gamma, *beta;  // of the input's norm
  bool norm;
  // kBlock: the shortcut's norm, and the block's output
  const float *res_mean, *res_rstd, *res_gamma, *res_beta;
  bool res_norm;
  void* z;          // or null
  uint8_t* z_mask;  // or null
  // kAct: of the output
  const float *out_mean, *out_rstd, *out_gamma, *out_beta;
  const void* residual;
  bool relu;
  int64_t c, k;
  Schedule s;
};

// Writes a piece of a block's output where it is in fragments, i of the step's four: words of two
// channels, and the bits, a byte for 8 channels of a row, which four lanes have two each of.
FASTRES_DEVICE void store_fragment(const PointwiseFprop& p, const uint32_t (&a)[4], unsigned keep,
                                   int64_t row, int64_t channel, int pair) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // rows quad and quad + 8; channels 2 * pair on, and 8 more
    const int64_t r = row + 8 * (j & 1), c = channel + 8 * (j >> 1) + 2 * pair;
    if (r < p.s.rows && c < p.c) {
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.z) + r * p.c + c) = a[j];
    }
  }
  if (p.z_mask == nullptr) return;
  // keep: two bits in each of four bytes, one for each j; a lane stores the byte of its number
  keep <<= 2 * pair;
  keep |= __shfl_xor_sync(kWarp, keep, 1);
  keep |= __shfl_xor_sync(kWarp, keep, 2);
  const int64_t r = row + 8 * (pair & 1), c = channel + 8 * (pair >> 1);
  if (r < p.s.rows && c < p.c) {
    p.z_mask[r * (p.c / 8) + c / 8] = static_cast<uint8_t>(keep >> (8 * pair));
  }
}

template <class T, int N, int FORM>
__global__ void __launch_bounds__(kPointwiseThreads, 1)
    pointwise_fprop_kernel(const FASTRES_GRID_CONSTANT PointwiseFprop p) {
#ifdef FASTRES_SM90A
  const Schedule& s = p.s;
  const uint32_t shared = dynamic_shared();
  const int64_t column = static_cast<int64_t>(blockIdx.x % s.columns) * N;
  const uint32_t plane = 4 * kTileChannels * s.steps;
  // 1. barriers, tables of per-channel vectors
  make_barriers(s, shared, 1);
  if (p.norm) {
    fill_affine(shared + s.row_table, kTileChannels * s.steps, 0, p.c, p.mean, p.rstd, p.gamma,
                p.beta);
  }
  if (FORM == kBlock && p.res_norm) {
    fill_affine(shared + s.row_table + 3 * plane, kTileChannels * s.steps, 0, p.c, p.res_mean,
                p.res_rstd, p.res_gamma, p.res_beta);
  }
  if (FORM == kAct) {
    fill_affine(shared + s.column_table, N, column, p.k, p.out_mean, p.out_rstd, p.out_gamma,
                p.out_beta);
  }
  __syncthreads();

  if (threadIdx.x < kPointwiseThreads - kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      const auto copy_weights = [&](uint32_t to, uint32_t bar, int step) {
        copy_tile(to, p.w, bar, kTileChannels * step, column);
      };
      if (s.resident) {
        const uint32_t bar = resident_barrier(s, shared);
        barrier_expect(bar, N * kSwizzleBytes * s.steps);
        for (int step = 0; step < s.steps; ++step) {
          copy_weights(shared + s.weights + N * kSwizzleBytes * step, bar, step);
        }
      }
      produce(s, Ring(s, shared), [&](const Ring& ring, int64_t tile, int step) {
        barrier_wait(ring.empty_now(), ring.parity ^ 1u);
        const uint32_t bar = ring.full_now(), to = shared + s.stage_bytes * ring.stage;
        barrier_expect(
            bar, kTileBytes * (FORM == kBlock ? 2 : 1) + (s.resident ? 0 : N * kSwizzleBytes));
        copy_tile(to, p.x, bar, kTileChannels * step, tile * kTileRows);
        if (FORM == kBlock) {
          copy_tile(to + s.y, p.shortcut, bar, kTileChannels * step, tile * kTileRows);
        }
        if (!s.resident) copy_weights(to + s.weights, bar, step);
      });
    }
  } else {
    take_registers<kConsumerRegisters>();
    const Place16 at;
    const uint32_t staging = shared + s.staging + kStagingBytes * at.index();
    const uint32_t vectors = shared + s.row_table + 8 * at.pair;
    // ldmatrix: lane i points at row i % 16, channels 8 * (i / 16) on, of its warp's 16 x 16
    const int row = at.row() + (at.lane & 15);
    const uint32_t row_at = shared + kSwizzleBytes * row;
    const bool write_z = FORM == kBlock && p.z != nullptr && column == 0;
    int64_t tile = 0;
    const auto fragment = [&](uint32_t (&a)[4][4], int stage, int step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t piece = static_cast<uint32_t>(2 * i + (at.lane >> 4)) ^ (row & 7);
        load_matrices<false>(a[i], row_at + s.stage_bytes * stage + 16 * piece);
        const uint32_t channel = vectors + 4 * (kTileChannels * step + 16 * i);
        if constexpr (FORM == kBlock) {
          uint32_t res[4];
          load_matrices<false>(res, row_at + s.stage_bytes * stage + s.y + 16 * piece);
          unsigned keep = 0;
#pragma unroll
          for (int high = 0; high < 2; ++high) {
            const NormPair norm(channel + 4 * 8 * high, plane);
            NormPair res_norm = norm;
            if (p.res_norm) res_norm = NormPair(channel + 4 * 8 * high + 3 * plane, plane);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int j = 2 * high + r;
              float x[2], other[2];
              widen2(a[i][j], x, T{});
              widen2(res[j], other, T{});
              if (p.res_norm) {
                other[0] = normalise(other[0], res_norm.mean.x, res_norm.scale.x, res_norm.beta.x);
                other[1] = normalise(other[1], res_norm.mean.y, res_norm.scale.y, res_norm.beta.y);
              }
              x[0] = normalise(x[0], norm.mean.x, norm.scale.x, norm.beta.x) + other[0];
              x[1] = normalise(x[1], norm.mean.y, norm.scale.y, norm.beta.y) + other[1];
              keep |= (passes_stored<T>(x[0]) ? 1u : 0u) << (8 * j);
              keep |= (passes_stored<T>(x[1]) ? 2u : 0u) << (8 * j);
              a[i][j] = narrow2_relu(x[0], x[1], T{});
            }
          }
          if (write_z) {
            store_fragment(p, a[i], keep, tile * kTileRows + at.row() + at.quad,
                           kTileChannels * step + 16 * i, at.pair);
          }
        } else if (p.norm) {
          const NormPair low(channel, plane), high(channel + 4 * 8, plane);
          a[i][0] = low.activate(a[i][0], T{});
          a[i][1] = low.activate(a[i][1], T{});
          a[i][2] = high.activate(a[i][2], T{});
          a[i][3] = high.activate(a[i][3], T{});
        }
      }
    };
    const auto b = [&](int stage, int step, int i) {
      return k_major(shared + s.weights + 32 * i +
                     (s.resident ? N * kSwizzleBytes * step : s.stage_bytes * stage));
    };

    if (s.resident) barrier_wait(resident_barrier(s, shared), 0);
    float acc[N / 2];
    Ring ring(s, shared);
    Multiply<N, false, T> multiply{acc, ring, 0};
    float n = 0.0f, mean[N / kPanel] = {}, m2[N / kPanel] = {};  // of column `lane` of each panel
    const Tiles tiles(s);
    for (tile = tiles.first; tile < tiles.end; ++tile) {
      multiply(s.steps, fragment, b);

      const int64_t first = tile * kTileRows + at.row();
      const int64_t left = s.rows - first;
      const int count = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
      const float tile_n = static_cast<float>(count);
      const float inverse = 1.0f / fmaxf(tile_n, 1.0f);
#pragma unroll
      for (int panel = 0; panel < N / kPanel; ++panel) {
        // 5. epilogue: whole rows, rounded, stored
        stage_panel<N>(staging, acc, panel, at);
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = 8 * half + at.quad;
          const int offset = kPanel * panel + 8 * at.pair;
          const bool ok = r < count && column + offset < p.k;
          const int64_t to = (first + r) * p.k + column + offset;
          float v[8];
          staged_unit(v, staging, r, at.pair);
          if (FORM == kAct) {
            Affine<8> norm;
            table_unit(norm.mean, shared + s.column_table, offset);
            table_unit(norm.scale, shared + s.column_table, N + offset);
            table_unit(norm.beta, shared + s.column_table, 2 * N + offset);
            float res[8] = {};
            if (p.residual != nullptr) {
              Raw<T, 8> raw;
              load(raw, p.residual, to, ok);
              expand(res, raw);
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              v[j] = norm(v[j], j) + res[j];
              if (p.relu && !passes_stored<T>(v[j])) v[j] = 0.0f;
            }
          }
          if (ok) store<T>(p.y, to, v);
        }

        // 6. statistics of the stored values: a column a lane
        if (FORM != kAct && p.part != nullptr && count > 0) {
          float y[16], tile_mean = 0.0f, tile_m2 = 0.0f;
#pragma unroll
          for (int r = 0; r < 16; ++r) {
            y[r] = widen(narrow(staged(staging, r, at.lane), T{}));
            tile_mean += r < count ? y[r] : 0.0f;
          }
          tile_mean *= inverse;
#pragma unroll
          for (int r = 0; r < 16; ++r) {
            const float d = r < count ? y[r] - tile_mean : 0.0f;
            tile_m2 = fmaf(d, d, tile_m2);
          }
          float before = n;
          chan(before, mean[panel], m2[panel], tile_n, tile_mean, tile_m2);
        }
        __syncwarp();
      }
      n += tile_n;
    }

    // 7. merge the block's warps in order, store partials
    if (FORM != kAct && p.part != nullptr) {
#pragma unroll
      for (int panel = 0; panel < N / kPanel; ++panel) {
        store_shared(staging + 8 * (kPanel * panel + at.lane), make_float2(mean[panel], m2[panel]));
      }
      if (at.lane == 0) store_shared(shared + s.counts + 4 * at.index(), n);
      named_barrier(kConsumerBarrier, kConsumers);
      const int col = 128 * at.group + 32 * at.warp + at.lane;
      if (col < N && column + col < p.k) {
        float all_n = 0.0f, all_mean = 0.0f, all_m2 = 0.0f;
        for (int w = 0; w < kConsumers / 32; ++w) {
          const float2 q = load_shared<float2>(shared + s.staging + kStagingBytes * w + 8 * col);
          const float warp_n = load_shared<float>(shared + s.counts + 4 * w);
          if (warp_n > 0.0f) chan(all_n, all_mean, all_m2, warp_n, q.x, q.y);
        }
        const int64_t chunk = blockIdx.x / s.columns;
        p.part[chunk * p.k + column + col] = all_mean;
        p.part[(s.chunks + chunk) * p.k + column + col] = all_m2;
      }
    }
  }
#endif
}

// A warp for each channel: merges the chunks' (mean, M2).
__global__ void __launch_bounds__(kThreads)
    pointwise_stats_finalise_kernel(float* mean_p, float* var_p, float* rstd_p, const float* part,
                                    double eps, int64_t channels, int64_t rows, int64_t chunk,
                                    int64_t chunks) {
  const int lane = static_cast<int>(threadIdx.x & 31u);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinaliseChannels + (threadIdx.x >> 5);
  if (channel >= channels) return;
  // 1. merge every 32nd chunk (Chan)
  float n = 0.0f, mean = 0.0f, m2 = 0.0f;
  for (int64_t i = lane; i < chunks; i += 32) {
    const int64_t left = rows - i * chunk;
    chan(n, mean, m2, static_cast<float>(left < chunk ? left : chunk), part[i * channels + channel],
         part[(chunks + i) * channels + channel]);
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
    rstd_p[channel] = 1.0f / sqrtf(var + static_cast<float>(eps));
  }
}

}  // namespace cuda
}  // namespace fastres
