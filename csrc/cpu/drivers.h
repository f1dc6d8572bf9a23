// The loops all kernels share: cut an activation into tiles, hand vectors to a small `body`.
//
// Rows (NHWC: pixels, NCHW: (n, c) planes) are walked in memory order. Per-channel parameters sit
// in K padded arrays; NHWC reads along them, NCHW re-reads one vector per parameter, splat once a
// row. So one body serves both layouts: it always sees parameters as vectors.
//
// Tiles are cut by shape alone and partial sums are merged in tile order, in double: the result
// does not depend on the number of threads.
#pragma once

#include "runtime.h"
#include "simd.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int64_t kGrain =
    32768;  // elements per thread below which a launch costs more than it saves

FASTRES_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTRES_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FASTRES_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Asks for the line of p; a prefetch past the end of a tensor is harmless. Two 16-bit vectors share
// a line, and asking twice is cheaper than a branch.
template <class T>
FASTRES_INLINE void fetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
// Room for c channels in whole vectors, plus a skew of 17 cache lines: at a power-of-two stride the
// parameters of a channel and its activations would all compete for one set of the L1 cache.
FASTRES_INLINE int64_t padded(int64_t c) { return ceil_div(c, 16) * 16 + 272; }

// The value of x once stored as T, by type.
template <class T>
FASTRES_INLINE VF round_to(VF v) {
  return round_as(v, static_cast<const T*>(nullptr));
}

template <class F>
FASTRES_INLINE void parallel(int64_t n, int64_t grain, const F& f) {
  const RangeFn call = [](int64_t begin, int64_t end, void* ctx) {
    (*static_cast<const F*>(ctx))(begin, end);
  };
  parallel_for(n, grain, call, const_cast<void*>(static_cast<const void*>(&f)));
}

// Calls f with a null pointer of the element type of `dtype`.
template <class F>
FASTRES_INLINE void with_dtype(int dtype, const F& f) {
  if (dtype == kF32) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == kBF16) {
    f(static_cast<BF16*>(nullptr));
  } else {
    f(static_cast<F16*>(nullptr));
  }
}

// --- per-channel parameters
// -----------------------------------------------------------------------

// K arrays of padded(C) floats in scratch slot 0; `extra` more floats follow them (the workspace).
struct Params {
  float* data;
  int64_t stride;
  int64_t c;

  Params(int k, int64_t channels, int64_t extra = 0) : stride(padded(channels)), c(channels) {
    data = static_cast<float*>(scratch(0, static_cast<size_t>((k * stride + extra) * 4)));
    for (int j = 0; j < k; ++j) {
      for (int64_t i = c; i < stride; ++i) data[j * stride + i] = 0.0f;
    }
  }
  float* operator[](int k) const { return data + k * stride; }
  float* after(int k) const { return data + k * stride; }

  void copy(int k, const float* src, float otherwise) const {
    float* dst = (*this)[k];
    for (int64_t i = 0; i < c; ++i) dst[i] = src != nullptr ? src[i] : otherwise;
  }
  // gamma * rstd, the one product of the contract's `normalise`
  void scale(int k, const float* gamma, const float* rstd) const {
    float* dst = (*this)[k];
    for (int64_t i = 0; i < c; ++i) {
      const float r = rstd != nullptr ? rstd[i] : 1.0f;
      dst[i] = gamma != nullptr ? gamma[i] * r : r;
    }
  }
};

FASTRES_INLINE VF normalise(VF x, VF mean, VF scale, VF beta) {
  return fma(sub(x, mean), scale, beta);
}

// --- element-wise: body(offset, mask_offset, params, lanes)
// ---------------------------------------

template <int K, class B>
FASTRES_INLINE void run_row(const B& body, int64_t off, int64_t moff, int64_t len, const float* p,
                            int64_t stride, int64_t step) {
  VF q[K > 0 ? K : 1];
  int64_t i = 0;
  for (; i + kW <= len; i += kW, p += step) {
    for (int k = 0; k < K; ++k) q[k] = load(p + k * stride, Full{});
    body(off + i, moff + i / 8, q, Full{});
  }
  if (i < len) {
    for (int k = 0; k < K; ++k) q[k] = load(p + k * stride, Full{});
    body(off + i, moff + i / 8, q, Tail(len - i));
  }
}

// R rows in lockstep under one load of the parameters, for so many channels that the parameters do
// not stay in L1. No hardware prefetcher follows R rows, so the next ones, one run of memory, are
// fetched in order meanwhile.
template <int K, int R, class B>
FASTRES_INLINE void run_rows(const B& body, const Act& a, int64_t row, const Params& par) {
  int64_t ahead = (row + R) * a.inner;
  const auto column = [&](int64_t i, auto lanes) {
    VF q[K];
    for (int k = 0; k < K; ++k) q[k] = load(par[k] + i, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      body.prefetch(ahead + r * kW);
      body((row + r) * a.inner + i, (row + r) * a.mask_row + i / 8, q, lanes);
    }
    ahead += R * kW;
  };
  int64_t i = 0;
  for (; i + kW <= a.inner; i += kW) column(i, Full{});
  if (i < a.inner) column(i, Tail(a.inner - i));
}

constexpr int64_t kParamsInL1 = 4096;  // floats: half of a 32 KiB cache

template <int K, class B>
void for_each_vector(const Act& act, const Params& par, const B& body) {
  parallel(act.outer, max64(1, kGrain / act.inner), [&](int64_t begin, int64_t end) {
    alignas(64) float splats[K * kW];
    int64_t c = act.nhwc ? 0 : begin % act.c;
    int64_t r = begin;
    if (act.nhwc && K * act.c >= kParamsInL1) {
      for (; r + 2 <= end; r += 2) run_rows<K, 2>(body, act, r, par);
    }
    for (; r < end; ++r) {
      if (act.nhwc) {
        run_row<K>(body, r * act.inner, r * act.mask_row, act.inner, par.data, par.stride, kW);
      } else {
        for (int k = 0; k < K; ++k) store(splats + k * kW, splat(par[k][c]), Full{});
        run_row<K>(body, r * act.inner, r * act.mask_row, act.inner, splats, kW, 0);
        c = c + 1 == act.c ? 0 : c + 1;
      }
    }
  });
}

// The same without parameters. Where mask rows have no pad bits the tensor is one long row.
template <class B>
void for_each_vector(const Act& act, bool has_mask, const B& body) {
  if (!has_mask || act.inner % 8 == 0) {
    constexpr int64_t kChunk = 4096;
    const int64_t total = act.outer * act.inner;
    parallel(ceil_div(total, kChunk), kGrain / kChunk, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * kChunk;
      run_row<0>(body, from, from / 8, min64(end * kChunk, total) - from, nullptr, 0, 0);
    });
  } else {
    parallel(act.outer, max64(1, kGrain / act.inner), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        run_row<0>(body, r * act.inner, r * act.mask_row, act.inner, nullptr, 0, 0);
      }
    });
  }
}

// --- reductions per channel
// -----------------------------------------------------------------------

// How an activation is cut for a reduction. A tile is a run of rows (NHWC) or a group of images by
// a chunk of the plane (NCHW); each tile leaves `planes` partial values for every channel.
struct Tiles {
  int64_t count;   // tiles
  int64_t rows;    // NHWC: rows of a tile
  int64_t group;   // NCHW: images of a tile
  int64_t chunk;   // NCHW: values of a plane in a tile
  int64_t chunks;  // NCHW: chunks of a plane

  explicit Tiles(const Act& a) : rows(0), group(0), chunk(0), chunks(0) {
    if (a.nhwc) {
      // at most 2048 values in one fp32 sum; not so short that merging costs like reading
      rows = min64(max64(ceil_div(a.outer, 64), 32), 2048);
      count = ceil_div(a.outer, rows);
    } else {
      chunk = min64(a.s, 4096);
      chunks = ceil_div(a.s, chunk);
      group = min64(min64(max64(2048 / a.s, 1), 8), a.n);
      count = ceil_div(a.n, group) * chunks;
    }
  }

  // values per channel in tile t
  int64_t values(const Act& a, int64_t t) const {
    if (a.nhwc) return min64(rows, a.outer - t * rows);
    const int64_t images = min64(group, a.n - t / chunks * group);
    return images * min64(chunk, a.s - t % chunks * chunk);
  }
};

FASTRES_INLINE float sum_lanes(VF v) {
  float lane[kW];
  store(lane, v, Full{});
  for (int w = kW / 2; w > 0; w /= 2) {
    for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
  }
  return lane[0];
}

// R rows under one load and store of the accumulators, which stay in L1. The rows are walked in
// lockstep, which no hardware prefetcher follows (measured: half the bandwidth), so the next R
// rows, one run of memory, are fetched in order meanwhile.
template <int R, class B>
FASTRES_INLINE void accumulate_rows(const B& body, const Act& a, int64_t row, const float* par,
                                    int64_t par_stride, float* ws) {
  const int64_t plane = padded(a.c);
  int64_t ahead = row * a.inner + max64(R * a.inner, 1024);
  const auto column = [&](int64_t i, auto lanes) {
    VF acc[B::kAcc], q[B::kPar];
    for (int k = 0; k < B::kAcc; ++k) acc[k] = load(ws + k * plane + i, Full{});
    for (int k = 0; k < B::kPar; ++k) q[k] = load(par + k * par_stride + i, Full{});
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (R > 1) body.prefetch(ahead + r * kW);
      body(acc, q, (row + r) * a.inner + i, (row + r) * a.mask_row + i / 8, lanes);
    }
    ahead += R * kW;
    for (int k = 0; k < B::kAcc; ++k) store(ws + k * plane + i, acc[k], Full{});
  };
  int64_t i = 0;
  for (; i + kW <= a.inner; i += kW) column(i, Full{});
  if (i < a.inner) column(i, Tail(a.inner - i));
}

// Workspace of a reduction: [tile][plane][padded(C)]. The kAcc sums come first; with kPivot one
// more plane holds the value that was subtracted from every x of the tile, and is the body's
// parameter 0.
template <class B>
constexpr int planes() {
  return B::kAcc + (B::kPivot ? 1 : 0);
}
template <class B>
FASTRES_INLINE int64_t workspace(const Act& a, const Tiles& t) {
  return t.count * planes<B>() * padded(a.c);
}

template <class B>
void reduce_nhwc(const Act& a, const Tiles& t, const B& body, const Params& par, float* ws) {
  const int64_t plane = padded(a.c);
  parallel(t.count, max64(1, kGrain / (t.rows * a.c)), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t r0 = tile * t.rows;
      const int64_t r1 = min64(r0 + t.rows, a.outer);
      float* acc = ws + tile * planes<B>() * plane;
      // 1. clear the sums; the pivot is the mean of the tile's first rows
      for (int64_t i = 0; i < B::kAcc * plane; ++i) acc[i] = 0.0f;
      const float* p = par.data;
      if constexpr (B::kPivot) {
        float* pivot = acc + B::kAcc * plane;
        const int64_t head = min64(8, r1 - r0);
        const auto head_mean = [&](int64_t i, auto lanes) {
          const VF first = load(body.x + r0 * a.inner + i, lanes);
          VF sum = zero();
          for (int64_t r = 1; r < head; ++r) {
            sum = add(sum, sub(load(body.x + (r0 + r) * a.inner + i, lanes), first));
          }
          store(pivot + i, fma(sum, splat(1.0f / static_cast<float>(head)), first), Full{});
        };
        int64_t i = 0;
        for (; i + kW <= a.c; i += kW) head_mean(i, Full{});
        if (i < a.c) head_mean(i, Tail(a.c - i));
        p = pivot;
      }
      // 2. stream the rows
      constexpr int kRows = 4;
      int64_t r = r0;
      for (; r + kRows <= r1; r += kRows) {
        accumulate_rows<kRows>(body, a, r, p, par.stride, acc);
      }
      for (; r < r1; ++r) accumulate_rows<1>(body, a, r, p, par.stride, acc);
    }
  });
}

template <class B>
void reduce_nchw(const Act& a, const Tiles& t, const B& body, const Params& par, float* ws) {
  const int64_t grain = max64(1, kGrain / (t.group * t.chunk));
  parallel(t.count * a.c, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t tile = item / a.c;
      const int64_t c = item % a.c;
      const int64_t n0 = tile / t.chunks * t.group;
      const int64_t n1 = min64(n0 + t.group, a.n);
      const int64_t s0 = tile % t.chunks * t.chunk;
      const int64_t len = min64(t.chunk, a.s - s0);
      float* out = ws + tile * planes<B>() * padded(a.c) + c;
      VF q[B::kPar];
      if constexpr (B::kPivot) {
        float head[kW] = {};
        const int64_t count = min64(kW, len);
        for (int64_t j = 0; j < count; ++j) {
          float lane[kW];
          store(lane, load(body.x + (n0 * a.c + c) * a.inner + s0 + j, Tail(1)), Full{});
          head[j] = lane[0] - (j > 0 ? head[0] : 0.0f);
        }
        float sum = 0.0f;
        for (int64_t j = 1; j < count; ++j) sum += head[j];
        const float pivot = head[0] + sum / static_cast<float>(count);
        q[0] = splat(pivot);
        out[B::kAcc * padded(a.c)] = pivot;
      } else {
        for (int k = 0; k < B::kPar; ++k) q[k] = splat(par[k][c]);
      }
      // four sets of sums, so that the adds of one row do not wait for each other
      VF acc[4][B::kAcc];
      for (int u = 0; u < 4; ++u) {
        for (int k = 0; k < B::kAcc; ++k) acc[u][k] = zero();
      }
      for (int64_t n = n0; n < n1; ++n) {
        const int64_t off = (n * a.c + c) * a.inner + s0;
        const int64_t moff = (n * a.c + c) * a.mask_row + s0 / 8;
        int64_t i = 0;
        for (; i + 4 * kW <= len; i += 4 * kW) {
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) {
            body(acc[u], q, off + i + u * kW, moff + (i + u * kW) / 8, Full{});
          }
        }
        for (; i + kW <= len; i += kW) body(acc[0], q, off + i, moff + i / 8, Full{});
        if (i < len) body(acc[0], q, off + i, moff + i / 8, Tail(len - i));
      }
      for (int k = 0; k < B::kAcc; ++k) {
        const VF sum = add(add(acc[0][k], acc[1][k]), add(acc[2][k], acc[3][k]));
        out[k * padded(a.c)] = sum_lanes(sum);
      }
    }
  });
}

template <class B>
void reduce(const Act& a, const Tiles& t, const B& body, const Params& par, float* ws) {
  if (a.nhwc) {
    reduce_nhwc(a, t, body, par, ws);
  } else {
    reduce_nchw(a, t, body, par, ws);
  }
}

constexpr int64_t kMergeBlock = 64;

// Calls f(first channel, channels) in blocks of at most kMergeBlock.
template <class F>
FASTRES_INLINE void for_each_channel_block(const Act& a, const Tiles& t, const F& f) {
  const int64_t grain = max64(1, kGrain / (kMergeBlock * t.count));
  parallel(ceil_div(a.c, kMergeBlock), grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      f(b * kMergeBlock, min64(kMergeBlock, a.c - b * kMergeBlock));
    }
  });
}

// Sums plane k of all tiles for n channels from c on, in tile order.
FASTRES_INLINE void merge_sums(double* sum, const float* ws, int64_t tiles, int64_t tile_stride,
                               int64_t c, int64_t n) {
  for (int64_t j = 0; j < n; ++j) sum[j] = 0.0;
  for (int64_t t = 0; t < tiles; ++t) {
    const float* part = ws + t * tile_stride + c;
    for (int64_t j = 0; j < n; ++j) sum[j] += part[j];
  }
}

}  // namespace
}  // namespace FASTRES_ISA
}  // namespace fastres
