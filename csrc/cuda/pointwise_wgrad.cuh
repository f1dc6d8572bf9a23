// conv_wgrad of a 1 x 1 convolution: dw[k, c] = sum over pixels of dy[., k] * h[., c], h = x or
// relu(normalise(x)); dy is g, gated, or formed from it by the backward of the batch norm behind
// the conv.
//
// Reads g (and y) once for each tile of C, x once for each tile of K, from L2 but for the first;
// writes and reads a partial dw for each split of the pixels.
// The reduction runs over pixels, rows of both tensors: dy^T is A, turned by ldmatrix.trans on its
// way to registers, where its prologue is applied; h is B, N-major as it lies in memory. wgmma
// reads B from shared memory only: x is normalised there, in place. Accumulates in fp32 over a
// split, then over the splits in order; no atomics.
#pragma once

#include "pointwise.cuh"

namespace fastres {
namespace cuda {

struct PointwiseWgrad {
  TensorMap g, y, x;
  float* part;                              // (splits, K, C)
  const uint8_t* mask;                      // of g, or null
  NormBackward bn;                          // behind the conv
  const float *mean, *rstd, *gamma, *beta;  // of the input's norm
  bool norm;
  int64_t c, k;
  int c_tiles;  // s.columns of them times those of K
  Schedule s;   // rows: pixels; a chunk is a split of `tiles` steps of 64
};

template <class T, int N>
__global__ void __launch_bounds__(kPointwiseThreads, 1)
    pointwise_wgrad_kernel(const FASTRES_GRID_CONSTANT PointwiseWgrad p) {
#ifdef FASTRES_SM90A
  const Schedule& s = p.s;
  const uint32_t shared = dynamic_shared();
  const int64_t tile = blockIdx.x % s.columns, split = blockIdx.x / s.columns;
  const int64_t k0 = tile / p.c_tiles * kTileRows, c0 = tile % p.c_tiles * N;
  const int64_t all = (s.rows + kTileChannels - 1) / kTileChannels, begin = split * s.tiles;
  const int steps = static_cast<int>(begin + s.tiles < all ? s.tiles : all - begin);
  const bool read_y = p.bn.on && p.bn.training;
  // 1. barriers, tables of per-channel vectors
  make_barriers(s, shared, p.mask == nullptr ? 1 : 1 + 32);
  if (p.norm) fill_affine(shared + s.column_table, N, c0, p.c, p.mean, p.rstd, p.gamma, p.beta);
  __syncthreads();

  if (threadIdx.x < kPointwiseThreads - kConsumers) {
    give_registers<kProducerRegisters>();
    Ring ring(s, shared);
    if (threadIdx.x == 0) {
      for (int step = 0; step < steps; ++step, ring.advance()) {
        barrier_wait(ring.empty_now(), ring.parity ^ 1u);
        const uint32_t bar = ring.full_now(), to = shared + s.stage_bytes * ring.stage;
        const int64_t pixel = (begin + step) * kTileChannels;
        barrier_expect(bar, kTileBytes * (read_y ? 2 : 1) + N * kSwizzleBytes);
#pragma unroll
        for (int box = 0; box < kTileRows / kTileChannels; ++box) {
          const int channel = static_cast<int>(k0) + kTileChannels * box;
          copy_tile(to + kBoxBytes * box, p.g, bar, channel, pixel);
          if (read_y) copy_tile(to + s.y + kBoxBytes * box, p.y, bar, channel, pixel);
        }
#pragma unroll
        for (int box = 0; box < N / kTileChannels; ++box) {
          copy_tile(to + s.weights + kBoxBytes * box, p.x, bar,
                    static_cast<int>(c0) + kTileChannels * box, pixel);
        }
      }
    } else if (p.mask != nullptr && threadIdx.x / 32 == 1) {
      // the bits: 16 bytes of each pixel, loaded before the stage is free
      const int lane = static_cast<int>(threadIdx.x & 31u);
      for (int step = 0; step < steps; ++step, ring.advance()) {
        uint2 bits[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t pixel = (begin + step) * kTileChannels + 32 * i + lane;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int at = static_cast<int>(k0 / 8) + 8 * j;
            bits[i][j] = pixel < s.rows && at < p.k / 8 ? load_bits(p.mask, pixel, p.k / 8, at)
                                                        : make_uint2(0, 0);
          }
        }
        barrier_wait(ring.empty_now(), ring.parity ^ 1u);
        const uint32_t to = shared + s.stage_bytes * ring.stage + s.bits;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          store_shared(to + 16 * (32 * (i / 2) + lane) + 8 * (i % 2), bits[i / 2][i % 2]);
        }
        barrier_arrive(ring.full_now());
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const Place16 at;
    // rows of the fragments, output channels: two a thread
    const int64_t channel = k0 + at.row() + at.quad;
    const GradientChannel vector[2] = {{p.bn, channel, p.k}, {p.bn, channel + 8, p.k}};
    // ldmatrix.trans: lane i points at pixel i % 8 + 8 * (i / 16), channels 8 * (i / 8 % 2) on
    const int pixel = (at.lane & 7) + (at.lane >> 4) * 8;
    const uint32_t piece = static_cast<uint32_t>(2 * at.warp + (at.lane >> 3 & 1)) ^ (pixel & 7);
    const uint32_t a_at = shared + kBoxBytes * at.group + kSwizzleBytes * pixel + 16 * piece;
    const auto fragment = [&](uint32_t (&a)[4][4], int stage, int step) {
      const uint32_t here = s.stage_bytes * stage;
      if (p.norm) {
        // h, in place: a thread has one piece of 8 channels of two pixels in each box
        const int tid = 128 * at.group + 32 * at.warp + at.lane;
        const int first = tid >> 3, part = tid & 7;
        const uint32_t x = shared + here + s.weights + kSwizzleBytes * first +
                           16 * (static_cast<uint32_t>(part) ^ (first & 7));
#pragma unroll
        for (int box = 0; box < N / kTileChannels; ++box) {
          Affine<8> norm;
          const int c = kTileChannels * box + 8 * part;
          table_unit(norm.mean, shared + s.column_table, c);
          table_unit(norm.scale, shared + s.column_table, N + c);
          table_unit(norm.beta, shared + s.column_table, 2 * N + c);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t unit = x + kBoxBytes * box + 32 * kSwizzleBytes * half;
            Raw<T, 8> raw;
            float v[8];
            raw.q[0] = load_shared<uint4>(unit);
            expand(v, raw);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = norm(v[j], j);
            store_shared(unit,
                         make_uint4(narrow2_relu(v[0], v[1], T{}), narrow2_relu(v[2], v[3], T{}),
                                    narrow2_relu(v[4], v[5], T{}), narrow2_relu(v[6], v[7], T{})));
          }
        }
        fence_proxy_async();
        named_barrier(kConsumerBarrier, kConsumers);
      }
      const int64_t left = s.rows - (begin + step) * kTileChannels;  // pixels from here on
      const uint32_t bits = shared + here + s.bits + 8 * at.group + 2 * at.warp;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t y[4] = {};
        load_matrices<true>(a[i], a_at + here + 16 * kSwizzleBytes * i);
        if (read_y) load_matrices<true>(y, a_at + here + s.y + 16 * kSwizzleBytes * i);
#pragma unroll
        for (int far = 0; far < 2; ++far) {  // pixels 2 * pair + 0, 1, and 8 on
          const int at_pixel = 16 * i + 8 * far + 2 * at.pair;
          uint32_t keep[2] = {0xffffu, 0xffffu};  // of the two pixels: 16 channels of the warp
          if (p.mask != nullptr) {
#pragma unroll
            for (int e = 0; e < 2; ++e) keep[e] = load_shared<uint16_t>(bits + 16 * (at_pixel + e));
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {  // channels quad and quad + 8
            uint32_t& word = a[i][2 * far + r];
            const int bit = at.quad + 8 * r;
            const uint32_t pass = (keep[0] >> bit & 1u) | (keep[1] >> bit & 1u) << 1;
            word &= halves(pass);
            if (p.bn.on) word = vector[r](word, y[2 * far + r], T{});
            // past the last pixel dy is 0: there x is not
            if (left < kTileChannels) {
              word &= halves((at_pixel < left ? 1u : 0u) | (at_pixel + 1 < left ? 2u : 0u));
            }
          }
        }
      }
    };
    const auto b = [&](int stage, int, int i) {
      return n_major(shared + s.stage_bytes * stage + s.weights + 2 * kSwizzlePeriod * i,
                     kBoxBytes);
    };

    float acc[N / 2];
    Ring ring(s, shared);
    Multiply<N, true, T> multiply{acc, ring, 0};
    multiply(steps, fragment, b);

    // 5. store partials
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int64_t c = c0 + 8 * j + 2 * at.pair;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (channel + 8 * r < p.k && c < p.c) {
          float2* to =
              reinterpret_cast<float2*>(p.part + (split * p.k + channel + 8 * r) * p.c + c);
          *to = make_float2(acc[4 * j + 2 * r], acc[4 * j + 2 * r + 1]);
        }
      }
    }
  }
#endif
}

// dw = the sum of part (splits, K, C) over the splits, in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pointwise_wgrad_finalise_kernel(void* dw, const float* part, int64_t numel, int64_t c,
                                    int64_t stride_k, int64_t stride_c, int64_t splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= numel) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < splits; ++split) sum += part[split * numel + i];
  static_cast<T*>(dw)[i / c * stride_k + i % c * stride_c] = narrow(sum, T{});
}

}  // namespace cuda
}  // namespace fastres
