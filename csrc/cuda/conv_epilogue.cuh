// What happens to an accumulator tile of a convolution before it leaves the SM.
//
// The MMA warps put a tile of M x N fp32 sums into shared memory (`stage`, kPitch floats a row);
// then 256 threads read it back as rows of 8-channel units: 16-byte accesses to every tensor, one
// mask byte a unit, as in the kernels around the convs. A worker keeps one tile of columns
// (conv.h): a thread keeps its 8 channels, their vectors and sums in registers, from the first tile
// of rows to the last, and the block merges the threads once at the end.
//
//   StatsEpilogue     y, and (count, mean, M2) of the stored y       writes 1 tensor
//   ActEpilogue       act(normalise(v) + residual)                   reads 0-1, writes 1
//   GradientEpilogue  gate(v + gate(dres)), and batch norm's sums    reads 0-3 and bits, writes 1
//   PartialEpilogue   v in fp32, a split's share of dw
#pragma once

#include "bn_stats.cuh"
#include "conv.h"
#include "norm.cuh"

namespace fastres {
namespace cuda {

// The pixel of the activation that a GEMM's row stands for: its number, or that of a phase of
// dgrad.
struct Pixels {
  int64_t rows;
  bool dense;  // pixel = row
  uint32_t grid_h, grid_w;
  int64_t h, w;
  int stride_h, stride_w, first_h, first_w;

  FASTRES_DEVICE int64_t operator()(int64_t row) const {
    if (dense) return row;
    const uint32_t m = static_cast<uint32_t>(row), ni = m / grid_w;
    const int64_t j = m % grid_w, i = ni % grid_h, n = ni / grid_h;
    return (n * h + i * stride_h + first_h) * w + j * stride_w + first_w;
  }
};

// The tiles of a block: columns `column`, rows first, first + step, ... `tiles` of them.
struct ConvWork {
  int64_t column, index, first, step, tiles, k_begin, k_end, split;

  FASTRES_DEVICE ConvWork(const ConvSchedule& s, int64_t block) {
    index = block % s.workers;
    column = block / s.workers % s.columns;
    split = block / s.workers / s.columns;
    const int64_t group = index / s.cluster * s.per;  // a cluster's tiles, together
    const int64_t groups = (s.m_tiles + s.cluster - 1) / s.cluster;
    first = group * s.cluster + index % s.cluster;
    step = s.cluster;
    tiles = groups - group < s.per ? groups - group : s.per;
    k_begin = split * s.k_per;
    k_end = k_begin + s.k_per < s.k_tiles ? k_begin + s.k_per : s.k_tiles;
  }
  // Rows of the matrix among the worker's. The last tile of a cluster may lie past the end.
  FASTRES_DEVICE int64_t rows(const ConvSchedule& s, int64_t total) const {
    int64_t mine = first >= s.m_tiles ? 0 : (s.m_tiles - 1 - first) / step + 1;
    mine = mine < tiles ? mine : tiles;
    const bool last = mine > 0 && first + (mine - 1) * step == s.m_tiles - 1;
    return mine * s.tile_m - (last ? s.m_tiles * s.tile_m - total : 0);
  }
};

// Threads of the block that run the epilogue; the warp that loads does not.
#ifdef FASTRES_CUDA_HOST
using EpilogueBarrier = BlockBarrier;
#else
struct EpilogueBarrier {
  FASTRES_DEVICE void operator()() const { asm volatile("bar.sync 1, 256;" ::: "memory"); }
};
#endif

// 8 floats of the stage.
#ifdef FASTRES_CUDA_HOST
template <class Stage>
void load_stage(float (&v)[8], Stage& stage, int at) {
  for (int j = 0; j < 8; ++j) v[j] = stage[at + j];
}
#else
// Lanes 4-7 of eight read their upper half first: the eight 16-byte accesses of a turn, 32 bytes
// apart, then meet all 32 banks.
FASTRES_DEVICE void load_stage(float (&v)[8], const float* stage, int at) {
  const bool upper = (threadIdx.x & 4u) != 0;
  const float4 a = *reinterpret_cast<const float4*>(stage + at + (upper ? 4 : 0));
  const float4 b = *reinterpret_cast<const float4*>(stage + at + (upper ? 0 : 4));
  v[0] = upper ? b.x : a.x;
  v[1] = upper ? b.y : a.y;
  v[2] = upper ? b.z : a.z;
  v[3] = upper ? b.w : a.w;
  v[4] = upper ? a.x : b.x;
  v[5] = upper ? a.y : b.y;
  v[6] = upper ? a.z : b.z;
  v[7] = upper ? a.w : b.w;
}
#endif

// How 256 threads cover a tile: N / 8 units to a row.
template <int M, int N>
struct ConvTile {
  static constexpr int kM = M, kN = N;
  static constexpr int kUnits = N / 8;
  static constexpr int kLogUnits = kUnits == 16 ? 4 : 3;
  static constexpr int kRows = kThreads / kUnits;  // of a turn
  static constexpr int kTurns = M / kRows;
  // 8 more: the MMA's two-float stores, four rows at a time, meet all banks
  static constexpr int kPitch = N + 8;
  static_assert(kUnits == 1 << kLogUnits, "tiles are 64 or 128 wide");

  int row, unit;  // of the thread's first cell
  FASTRES_DEVICE ConvTile()
      : row(static_cast<int>(threadIdx.x) / kUnits), unit(static_cast<int>(threadIdx.x) % kUnits) {}
  FASTRES_DEVICE int cell(int turn) const { return (row + turn * kRows) * kPitch + unit * 8; }
};

// Of the columns of a worker, as sum_block and merge_block want it.
inline Cut worker_cut(const ConvSchedule& s, int64_t channels, int64_t chunks) {
  Cut c{};
  c.channels = channels;
  c.chunks = chunks;
  c.programs = static_cast<uint32_t>(s.columns);
  c.log_tx = s.tile_n == 128 ? 4 : 3;
  c.nhwc = true;
  return c;
}

template <class T, int M, int N>
class StatsEpilogue {
 public:
  struct Params {
    void* y;
    float* part;  // (2, workers, C) or null
    Pixels pixels;
    Cut cut;
  };

  FASTRES_DEVICE StatsEpilogue(const Params& p, const ConvWork& work)
      : p_(p), channel_(work.column * N + tile_.unit * 8), n_(0.0f), mean_{}, m2_{} {}

  template <class Stage>
  FASTRES_DEVICE void tile(Stage& stage, int64_t m0) {
    constexpr int P = ConvTile<M, N>::kTurns;
    Raw<T, 8> kept[P];
    // 1. round, store
    const bool mine = channel_ < p_.cut.channels;
    int64_t left = p_.pixels.rows - m0 - tile_.row;
    left = !mine || left <= 0 ? 0 : (left + ConvTile<M, N>::kRows - 1) / ConvTile<M, N>::kRows;
    const int count = left < P ? static_cast<int>(left) : P;
#pragma unroll
    for (int t = 0; t < P; ++t) {
      float v[8];
      load_stage(v, stage, tile_.cell(t));
      kept[t].q[0] = make_uint4(narrow2(v[0], v[1], T{}), narrow2(v[2], v[3], T{}),
                                narrow2(v[4], v[5], T{}), narrow2(v[6], v[7], T{}));
      if (t < count) {
        const int64_t row = p_.pixels(m0 + tile_.row + t * ConvTile<M, N>::kRows);
        const uint4 q = kept[t].q[0];
        store16(static_cast<T*>(p_.y) + row * p_.cut.channels + channel_, q.x, q.y, q.z, q.w);
      }
    }
    if (p_.part == nullptr || count == 0) return;

    // 2. mean and M2 of the tile's stored values, inside the thread
    const float tile_n = static_cast<float>(count), inverse = 1.0f / tile_n;
    float mean[8] = {}, m2[8] = {};
#pragma unroll
    for (int t = 0; t < P; ++t) {
      float v[8];
      expand(v, kept[t]);
#pragma unroll
      for (int j = 0; j < 8; ++j) mean[j] += t < count ? v[j] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) mean[j] *= inverse;
#pragma unroll
    for (int t = 0; t < P; ++t) {
      float v[8];
      expand(v, kept[t]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float d = t < count ? v[j] - mean[j] : 0.0f;
        m2[j] = fmaf(d, d, m2[j]);
      }
    }

    // 3. merge (Chan) with the tiles before
    const float total = n_ + tile_n, weight = tile_n / total, cross = n_ * weight;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float delta = mean[j] - mean_[j];
      mean_[j] = fmaf(delta, weight, mean_[j]);
      m2_[j] += fmaf(delta * delta, cross, m2[j]);
    }
    n_ = total;
  }

  // 4. merge the threads of the block
  template <class Counts, class Means, class Squares>
  FASTRES_DEVICE void finish(const ConvWork& work, Counts& counts, Means& means, Squares& squares) {
    if (p_.part == nullptr) return;
    merge_block<8>(p_.part, counts, means, squares, n_, mean_, m2_, p_.cut,
                   Share(work.index, work.column), EpilogueBarrier{});
  }

 private:
  const Params& p_;
  const ConvTile<M, N> tile_;
  const int64_t channel_;
  float n_, mean_[8], m2_[8];
};

template <class T, int M, int N>
class ActEpilogue {
 public:
  struct Params {
    void* z;
    const void* residual;
    const float *mean, *rstd, *gamma, *beta;
    bool relu;
    Pixels pixels;
    int64_t channels;
  };

  FASTRES_DEVICE ActEpilogue(const Params& p, const ConvWork& work)
      : p_(p), channel_(work.column * N + tile_.unit * 8) {
    const bool mine = channel_ < p.channels;
    norm_.load(p.mean, p.rstd, p.gamma, p.beta, mine ? channel_ : 0, false);
  }

  template <class Stage>
  FASTRES_DEVICE void tile(Stage& stage, int64_t m0) {
    constexpr int P = ConvTile<M, N>::kTurns, U = 4;
    for (int t0 = 0; t0 < P; t0 += U) {
      // 1. load the residual
      Raw<T, 8> raw[U];
      int64_t at[U];
      bool ok[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t row = m0 + tile_.row + (t0 + u) * ConvTile<M, N>::kRows;
        ok[u] = row < p_.pixels.rows && channel_ < p_.channels;
        at[u] = p_.pixels(row) * p_.channels + channel_;
        load(raw[u], p_.residual, at[u], ok[u] && p_.residual != nullptr);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        // 2. normalise, add
        float v[8], r[8];
        load_stage(v, stage, tile_.cell(t0 + u));
        expand(r, raw[u]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          v[j] = norm_(v[j], j);
          if (p_.residual != nullptr) v[j] += r[j];
          if (p_.relu) v[j] = passes_stored<T>(v[j]) ? v[j] : 0.0f;
        }

        // 3. store
        if (ok[u]) store<T>(p_.z, at[u], v);
      }
    }
  }

  template <class Counts, class Means, class Squares>
  FASTRES_DEVICE void finish(const ConvWork&, Counts&, Means&, Squares&) {}

 private:
  const Params& p_;
  const ConvTile<M, N> tile_;
  const int64_t channel_;
  Affine<8> norm_;
};

template <class T, int M, int N>
class GradientEpilogue {
 public:
  struct Params {
    void* dx;
    float* part;  // (3, workers of all phases, C) or null
    const void* dres;
    const uint8_t* dres_mask;
    int gate;
    const uint8_t* mask;
    const void* y;  // null without sums
    const float *mean, *rstd, *gamma, *beta;
    const void* residual;
    const float* res_mean;
    Pixels pixels;
    int64_t mask_row, base;  // chunks of the phases before
    Cut cut;
  };

  FASTRES_DEVICE GradientEpilogue(const Params& p, const ConvWork& work)
      : p_(p), channel_(work.column * N + tile_.unit * 8), acc_{} {
    const int64_t channel = channel_ < p.cut.channels ? channel_ : 0;
    norm_.load(p.mean, p.rstd, p.gamma, p.beta, channel, false);
    load_vector<8>(res_mean_, p.res_mean, channel, false, 0.0f);
  }

  template <class Stage>
  FASTRES_DEVICE void tile(Stage& stage, int64_t m0) {
    constexpr int P = ConvTile<M, N>::kTurns, U = 4;
    for (int t0 = 0; t0 < P; t0 += U) {
      // 1. load
      Raw<T, 8> raw_d[U], raw_y[U], raw_r[U];
      int64_t at[U];
      bool ok[U];
      unsigned dres_byte[U], byte[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t row = m0 + tile_.row + (t0 + u) * ConvTile<M, N>::kRows;
        ok[u] = row < p_.pixels.rows && channel_ < p_.cut.channels;
        const int64_t pixel = p_.pixels(row), bits = pixel * p_.mask_row + channel_ / 8;
        at[u] = pixel * p_.cut.channels + channel_;
        load(raw_d[u], p_.dres, at[u], ok[u] && p_.dres != nullptr);
        load(raw_y[u], p_.y, at[u], ok[u] && p_.y != nullptr);
        load(raw_r[u], p_.residual, at[u], ok[u] && p_.residual != nullptr);
        dres_byte[u] = ok[u] && p_.dres_mask != nullptr ? p_.dres_mask[bits] : 0xffu;
        byte[u] = ok[u] && p_.gate == kGateMask ? p_.mask[bits] : 0u;
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        // 2. add the gradient that goes round the conv
        float v[8], d[8], y[8], r[8];
        load_stage(v, stage, tile_.cell(t0 + u));
        expand(d, raw_d[u]);
        expand(y, raw_y[u]);
        expand(r, raw_r[u]);
        if (p_.dres != nullptr) {
#pragma unroll
          for (int j = 0; j < 8; ++j) v[j] += bit_of<8>(dres_byte[u], 0, j) ? d[j] : 0.0f;
        }

        // 3. round, gate, store
        round_to<T>(v);
        gate<T, 8>(v, y, norm_, p_.gate, byte[u], 0);
        if (!ok[u]) continue;
        store<T>(p_.dx, at[u], v);

        // 4. add up the stored values
        if (p_.part != nullptr) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            acc_[0][j] += v[j];
            acc_[1][j] = fmaf(v[j], y[j] - norm_.mean[j], acc_[1][j]);
            acc_[2][j] = fmaf(v[j], r[j] - res_mean_[j], acc_[2][j]);
          }
        }
      }
    }
  }

  // 5. add the threads of the block
  template <class Counts, class Means, class Squares>
  FASTRES_DEVICE void finish(const ConvWork& work, Counts&, Means& cells, Squares&) {
    if (p_.part == nullptr) return;
    sum_block<3, 8>(p_.part, cells, acc_, p_.cut, Share(p_.base + work.index, work.column),
                    EpilogueBarrier{});
  }

 private:
  const Params& p_;
  const ConvTile<M, N> tile_;
  const int64_t channel_;
  Affine<8> norm_;
  float res_mean_[8], acc_[3][8];
};

// A tile of columns is `tile` of the channels of one tap: c fastest, then s, then r.
template <class T, int M, int N>
class PartialEpilogue {
 public:
  struct Params {
    float* part;  // (splits, K, R, S, C)
    int64_t k, taps, c;
  };

  FASTRES_DEVICE PartialEpilogue(const Params& p, const ConvWork& work) : p_(p) {
    const int64_t tiles = (p.c + N - 1) / N;
    const int64_t channel = work.column % tiles * N + tile_.unit * 8;
    mine_ = channel < p.c;
    at_ = (work.split * p.k * p.taps + work.column / tiles) * p.c + channel;
  }

  template <class Stage>
  FASTRES_DEVICE void tile(Stage& stage, int64_t m0) {
#pragma unroll
    for (int t = 0; t < ConvTile<M, N>::kTurns; ++t) {
      const int64_t row = m0 + tile_.row + t * ConvTile<M, N>::kRows;
      float v[8];
      load_stage(v, stage, tile_.cell(t));
      if (mine_ && row < p_.k) store<float>(p_.part, at_ + row * p_.taps * p_.c, v);
    }
  }

  template <class Counts, class Means, class Squares>
  FASTRES_DEVICE void finish(const ConvWork&, Counts&, Means&, Squares&) {}

 private:
  const Params& p_;
  const ConvTile<M, N> tile_;
  bool mine_;
  int64_t at_;
};

}  // namespace cuda
}  // namespace fastres
