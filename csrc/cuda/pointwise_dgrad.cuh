// conv_dgrad of a 1 x 1 convolution: dx = gate(dy * w + gate(dres)), and the sums of the stored dx
// that the batch norm before it needs. dy is g, gated, or formed from it by the backward of the
// batch norm behind the conv: scale * g - (y - mean) * slope - offset, rounded.
//
// Reads g (and y) once from memory for all columns, w once a block; dres, the previous y and the
// dual shortcut once; writes dx once.
// Accumulates in fp32. Sums: of a warp's rows down its tiles, then over the block's warps, then
// over the chunks: a fixed order, no atomics.
#pragma once

#include "pointwise.cuh"

namespace fastres {
namespace cuda {

struct PointwiseDgrad {
  TensorMap g, y, w;
  void* dx;
  float* part;          // (2 or 3, chunks, C): sum dx, dx * (y - mean), dx * (dual - mean); or null
  const uint8_t* mask;  // of g, or null
  NormBackward bn;
  const void* res;  // added, or null
  const uint8_t* res_mask;
  const void* prev;          // y of the batch norm before, or null
  const uint8_t* prev_mask;  // null: its gate is recomputed
  const float *prev_mean, *prev_rstd, *prev_gamma, *prev_beta;
  const void* dual;  // or null
  const float* dual_mean;
  int64_t c, k;
  Schedule s;
};

template <class T, int N>
__global__ void __launch_bounds__(kPointwiseThreads, 1)
    pointwise_dgrad_kernel(const FASTRES_GRID_CONSTANT PointwiseDgrad p) {
#ifdef FASTRES_SM90A
  const Schedule& s = p.s;
  const uint32_t shared = dynamic_shared();
  const int64_t column = static_cast<int64_t>(blockIdx.x % s.columns) * N;
  const uint32_t plane = 4 * kTileChannels * s.steps;
  const bool read_y = p.bn.on && p.bn.training;
  // 1. barriers, tables of per-channel vectors
  make_barriers(s, shared, p.mask == nullptr ? 1 : 1 + 32);
  if (p.bn.on) fill_gradient(shared + s.row_table, kTileChannels * s.steps, p.bn, p.k);
  if (p.prev != nullptr) {
    fill_affine(shared + s.column_table, N, column, p.c, p.prev_mean, p.prev_rstd, p.prev_gamma,
                p.prev_beta);
    fill_table(shared + s.column_table, 3, N, column, p.c,
               [&](int64_t ch) { return value_or(p.dual_mean, ch, 0.0f); });
  }
  __syncthreads();

  if (threadIdx.x < kPointwiseThreads - kConsumers) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      const auto copy_weights = [&](uint32_t to, uint32_t bar, int step) {
#pragma unroll
        for (int box = 0; box < N / kTileChannels; ++box) {
          copy_tile(to + kBoxBytes * box, p.w, bar, static_cast<int>(column) + kTileChannels * box,
                    kTileChannels * step);
        }
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
        barrier_expect(bar, kTileBytes * (read_y ? 2 : 1) + (s.resident ? 0 : N * kSwizzleBytes));
        copy_tile(to, p.g, bar, kTileChannels * step, tile * kTileRows);
        if (read_y) copy_tile(to + s.y, p.y, bar, kTileChannels * step, tile * kTileRows);
        if (!s.resident) copy_weights(to + s.weights, bar, step);
      });
    } else if (p.mask != nullptr && threadIdx.x / 32 == 1) {
      // the bits: 8 bytes of each row, loaded before the stage is free
      const int lane = static_cast<int>(threadIdx.x & 31u);
      produce(s, Ring(s, shared), [&](const Ring& ring, int64_t tile, int step) {
        uint2 bits[kTileRows / 32];
#pragma unroll
        for (int i = 0; i < kTileRows / 32; ++i) {
          const int64_t row = tile * kTileRows + 32 * i + lane;
          bits[i] = row < s.rows ? load_bits(p.mask, row, p.k / 8, kTileChannels / 8 * step)
                                 : make_uint2(0, 0);
        }
        barrier_wait(ring.empty_now(), ring.parity ^ 1u);
        const uint32_t to = shared + s.stage_bytes * ring.stage + s.bits;
#pragma unroll
        for (int i = 0; i < kTileRows / 32; ++i) store_shared(to + 8 * (32 * i + lane), bits[i]);
        barrier_arrive(ring.full_now());
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
    const auto fragment = [&](uint32_t (&a)[4][4], int stage, int step) {
      const uint32_t here = s.stage_bytes * stage;
      uint2 keep[2] = {make_uint2(~0u, ~0u), make_uint2(~0u, ~0u)};  // of rows quad and quad + 8
      if (p.mask != nullptr) {
        const uint32_t bits = shared + here + s.bits + 8 * (at.row() + at.quad);
        keep[0] = load_shared<uint2>(bits);
        keep[1] = load_shared<uint2>(bits + 8 * 8);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t piece = static_cast<uint32_t>(2 * i + (at.lane >> 4)) ^ (row & 7);
        load_matrices<false>(a[i], row_at + here + 16 * piece);
        uint32_t y[4] = {};
        if (read_y) load_matrices<false>(y, row_at + here + s.y + 16 * piece);
#pragma unroll
        for (int high = 0; high < 2; ++high) {  // channels 2 * pair + 0, 1, and 8 on
          const int bit = 16 * (i & 1) + 8 * high + 2 * at.pair;
          uint32_t pass[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) pass[r] = (i < 2 ? keep[r].x : keep[r].y) >> bit;
          if (p.bn.on) {
            const GradientPair v(vectors + 4 * (kTileChannels * step + 16 * i + 8 * high), plane);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              a[i][2 * high + r] = v(a[i][2 * high + r], y[2 * high + r], pass[r], T{});
            }
          } else {
#pragma unroll
            for (int r = 0; r < 2; ++r) a[i][2 * high + r] &= halves(pass[r]);
          }
        }
      }
    };
    const auto b = [&](int stage, int step, int i) {
      return n_major(shared + s.weights + 2 * kSwizzlePeriod * i +
                         (s.resident ? N * kSwizzleBytes * step : s.stage_bytes * stage),
                     kBoxBytes);
    };

    if (s.resident) barrier_wait(resident_barrier(s, shared), 0);
    float acc[N / 2];
    Ring ring(s, shared);
    Multiply<N, true, T> multiply{acc, ring, 0};
    float sums[N / kPanel][3] = {};  // of this lane's column of each panel
    const Tiles tiles(s);
    for (int64_t tile = tiles.first; tile < tiles.end; ++tile) {
      multiply(s.steps, fragment, b);

      const int64_t first = tile * kTileRows + at.row();
#pragma unroll
      for (int panel = 0; panel < N / kPanel; ++panel) {
        // 5. epilogue: load what is added, what gates and what is summed; whole rows
        const int offset = kPanel * panel + 8 * at.pair;
        Raw<T, 8> res[2], prev[2], dual[2];
        bool ok[2];
        int64_t to[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t r = first + 8 * half + at.quad;
          ok[half] = r < s.rows && column + offset < p.c;
          to[half] = r * p.c + column + offset;
          load(res[half], p.res, to[half], ok[half] && p.res != nullptr);
          load(prev[half], p.prev, to[half], ok[half] && p.prev != nullptr);
          load(dual[half], p.dual, to[half], ok[half] && p.dual != nullptr);
        }
        stage_panel<N>(staging, acc, panel, at);
        __syncwarp();
        float part[8 * 3] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v[8], d[8];
          staged_unit(v, staging, 8 * half + at.quad, at.pair);
          if (p.res != nullptr) {
            const unsigned keep =
                p.res_mask != nullptr && ok[half] ? p.res_mask[to[half] / 8] : 0xffu;
            expand(d, res[half]);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] += keep >> j & 1u ? d[j] : 0.0f;
          }
          if (p.prev != nullptr) {
            // 6. gate, sums of the stored values
            round_to<T>(v);
            Affine<8> norm;
            table_unit(norm.mean, shared + s.column_table, offset);
            table_unit(norm.scale, shared + s.column_table, N + offset);
            table_unit(norm.beta, shared + s.column_table, 2 * N + offset);
            expand(d, prev[half]);
            unsigned keep = 0;
            if (p.prev_mask == nullptr) {
#pragma unroll
              for (int j = 0; j < 8; ++j) keep |= passes_stored<T>(norm(d[j], j)) ? 1u << j : 0u;
            } else if (ok[half]) {
              keep = p.prev_mask[to[half] / 8];
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = keep >> j & 1u ? v[j] : 0.0f;
            if (ok[half]) {
#pragma unroll
              for (int j = 0; j < 8; ++j) {
                part[3 * j] += v[j];
                part[3 * j + 1] = fmaf(v[j], d[j] - norm.mean[j], part[3 * j + 1]);
              }
              if (p.dual != nullptr) {
                float dual_mean[8];
                table_unit(dual_mean, shared + s.column_table, 3 * N + offset);
                expand(d, dual[half]);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                  part[3 * j + 2] = fmaf(v[j], d[j] - dual_mean[j], part[3 * j + 2]);
                }
              }
            }
          }
          if (ok[half]) store<T>(p.dx, to[half], v);
        }
        if (p.prev != nullptr) {
          spread_sums<12, 16>(part);
          spread_sums<6, 8>(part);
          spread_sums<3, 4>(part);
#pragma unroll
          for (int i = 0; i < 3; ++i) sums[panel][i] += part[i];
        }
        __syncwarp();
      }
    }

    // 7. add the block's warps in order, store partials
    if (p.prev != nullptr) {
      // the lane's column of a panel, as spread_sums leaves it
      const int own = 8 * at.pair + (at.lane >> 2 & 4) + (at.lane >> 2 & 2) + (at.lane >> 2 & 1);
#pragma unroll
      for (int panel = 0; panel < N / kPanel; ++panel) {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          store_shared(staging + 4 * (N * i + kPanel * panel + own), sums[panel][i]);
        }
      }
      named_barrier(kConsumerBarrier, kConsumers);
      const int col = 128 * at.group + 32 * at.warp + at.lane;
      const int planes = p.dual == nullptr ? 2 : 3;
      const int64_t chunk = blockIdx.x / s.columns;
      for (int i = 0; i < planes && col < N && column + col < p.c; ++i) {
        float sum = 0.0f;
        for (int w = 0; w < kConsumers / 32; ++w) {
          sum += load_shared<float>(shared + s.staging + kStagingBytes * w + 4 * (N * i + col));
        }
        p.part[(i * s.chunks + chunk) * p.c + column + col] = sum;
      }
    }
  }
#endif
}

}  // namespace cuda
}  // namespace fastres
