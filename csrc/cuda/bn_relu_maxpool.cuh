// bn_relu_maxpool: z = maxpool(relu(normalise(x))); index = offset of each window's first maximum.
// Backward: g = sum of dz over the windows whose index points at the pixel; then as in bn_bwd.cuh.
//
// Forward reads 1, writes 1 / stride^2 tensors; reduce reads 1 + 1 / stride^2; apply writes 1 more.
// A pixel is read by up to (kernel / stride)^2 windows, from cache but for the first.
// Accumulates in fp32; the pool compares rounded values; gather form, no atomics.
//
// L = 8: the stem of a ResNet, 3 x 3, stride 2, NHWC, 8 channels a thread. L = 1: every other.
#pragma once

#include "norm.cuh"

namespace fastres {
namespace cuda {

struct Pool {
  uint32_t h, w, oh, ow;
  int kernel, stride, padding;
};

// Where the elements of plane `plane` lie in a map of `width` columns, NHWC or NCHW.
struct Plane {
  int64_t origin, pixel;  // element offset of its first pixel; elements from pixel to pixel

  FASTRES_DEVICE Plane(bool nhwc, int64_t plane, int64_t pixels, int64_t channels, int64_t channel)
      : origin(nhwc ? plane * pixels * channels + channel : plane * pixels),
        pixel(nhwc ? channels : 1) {}
};

// The plane (NHWC: image; NCHW: image and channel) and pixel of a unit.
struct Pixel {
  int64_t plane;
  int h, w;

  FASTRES_DEVICE Pixel(bool nhwc, int64_t row, int64_t unit, uint32_t height, uint32_t width) {
    uint32_t pixel;
    if (nhwc) {  // a launcher refuses 2^31 rows
      const auto at = static_cast<uint32_t>(row);
      plane = at / (height * width);
      pixel = at % (height * width);
    } else {
      plane = row;
      pixel = static_cast<uint32_t>(unit);
    }
    h = static_cast<int>(pixel / width);
    w = static_cast<int>(pixel % width);
  }
};

// Later values win only if greater, or NaN.
template <class T, int L>
FASTRES_DEVICE void compare(float (&best)[L], int (&index)[L], const Raw<T, L>& raw, bool inside,
                            int offset, const Affine<L>& norm) {
  float v[L];
  expand(v, raw);
#pragma unroll
  for (int j = 0; j < L; ++j) v[j] = norm(v[j], j);
  round_to<T, L>(v);
#pragma unroll
  for (int j = 0; j < L; ++j) {
    v[j] = v[j] <= 0.0f ? 0.0f : v[j];
    if (inside && (v[j] > best[j] || v[j] != v[j])) {
      best[j] = v[j];
      index[j] = offset;
    }
  }
}

FASTRES_DEVICE void store_index(uint8_t* index, int64_t at, const int (&v)[1]) {
  index[at] = static_cast<uint8_t>(v[0]);
}
FASTRES_DEVICE void store_index(uint8_t* index, int64_t at, const int (&v)[8]) {
  uint32_t word[2] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) word[j / 4] |= static_cast<uint32_t>(v[j] & 255) << (8 * (j % 4));
  *reinterpret_cast<uint2*>(index + at) = make_uint2(word[0], word[1]);
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_maxpool_kernel(BnReluMaxpool p, Pool g, Map m) {
  // 1. locate the tile of z, and each element's window
  const Walk<L> w(m);

  // 2. load per-channel vectors
  Affine<L> norm;
  norm.load(p.mean, p.rstd, p.gamma, p.beta, w.channel, !m.nhwc);
  for (int k = 0; k < w.count; ++k) {
    const int64_t unit = w.unit + k * w.step_unit;
    const Pixel z(m.nhwc, w.row + k * w.step_row, unit, g.oh, g.ow);
    const Plane x(m.nhwc, z.plane, static_cast<int64_t>(g.h) * g.w, m.channels, w.channel);
    const int h0 = z.h * g.stride - g.padding, w0 = z.w * g.stride - g.padding;

    // 3. walk the window
    float best[L];
    int index[L];
#pragma unroll
    for (int j = 0; j < L; ++j) {
      best[j] = -INFINITY;
      index[j] = 255;
    }
    const auto inside = [&](int h, int w) {
      return h >= 0 && h < static_cast<int>(g.h) && w >= 0 && w < static_cast<int>(g.w);
    };
    if constexpr (L == 8) {
      constexpr int BATCH = sizeof(T) == 2 ? 9 : 3;  // loads in flight, before their comparisons
#pragma unroll
      for (int k0 = 0; k0 < 9; k0 += BATCH) {
        Raw<T, L> raw[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int h = h0 + (k0 + i) / 3, w = w0 + (k0 + i) % 3;
          load(raw[i], p.x, x.origin + (static_cast<int64_t>(h) * g.w + w) * x.pixel, inside(h, w));
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int h = h0 + (k0 + i) / 3, w = w0 + (k0 + i) % 3;
          compare<T, L>(best, index, raw[i], inside(h, w), k0 + i, norm);
        }
      }
    } else {
      for (int kh = 0; kh < g.kernel; ++kh) {
        for (int kw = 0; kw < g.kernel; ++kw) {
          const int h = h0 + kh, w = w0 + kw;
          Raw<T, L> raw;
          load(raw, p.x, x.origin + (static_cast<int64_t>(h) * g.w + w) * x.pixel, inside(h, w));
          compare<T, L>(best, index, raw, inside(h, w), kh * g.kernel + kw, norm);
        }
      }
    }

    // 4. store tile: `best` is already a value of z's dtype
    const int64_t at = w.at + k * w.step_at;
    if (p.index != nullptr) {
#pragma unroll
      for (int j = 0; j < L; ++j) index[j] = best[j] <= 0.0f ? 255 : index[j];
      store_index(p.index, at, index);
    }
    store<T>(p.z, at, best);
  }
}

template <class T, int L>
FASTRES_DEVICE void add_window(float (&g)[L], const BnReluMaxpoolBwd& p, int64_t at, bool inside,
                               int offset) {
  Raw<T, L> raw;
  float dz[L];
  load(raw, p.dz, at, inside);
  if constexpr (L == 8) {
    uint2 index = make_uint2(0xffffffffu, 0xffffffffu);
    if (inside) index = *reinterpret_cast<const uint2*>(p.index + at);
    expand(dz, raw);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t word = j < 4 ? index.x : index.y;
      g[j] += static_cast<int>((word >> (8 * (j % 4))) & 255u) == offset ? dz[j] : 0.0f;
    }
  } else {
    const int index = inside ? p.index[at] : 255;
    expand(dz, raw);
    g[0] += index == offset ? dz[0] : 0.0f;
  }
}

// g at a unit of x: the windows that chose it, in a fixed order.
template <class T, int L>
FASTRES_DEVICE void gather(float (&g)[L], const BnReluMaxpoolBwd& p, const Pool& pool, bool nhwc,
                           int64_t channels, int64_t channel, int64_t row, int64_t unit) {
  const Pixel x(nhwc, row, unit, pool.h, pool.w);
  const Plane z(nhwc, x.plane, static_cast<int64_t>(pool.oh) * pool.ow, channels, channel);
#pragma unroll
  for (int j = 0; j < L; ++j) g[j] = 0.0f;
  const auto window = [&](int oh, int ow, int kh, int kw) {
    const bool inside = oh >= 0 && oh < static_cast<int>(pool.oh) && kh < pool.kernel && ow >= 0 &&
                        ow < static_cast<int>(pool.ow) && kw < pool.kernel;
    add_window<T, L>(g, p, z.origin + (static_cast<int64_t>(oh) * pool.ow + ow) * z.pixel, inside,
                     kh * pool.kernel + kw);
  };
  if constexpr (L == 8) {  // 3 x 3, stride 2: two windows along each axis, four loads in flight
    const int oh = (x.h + pool.padding) / 2, ow = (x.w + pool.padding) / 2;
    const int kh = x.h + pool.padding - 2 * oh, kw = x.w + pool.padding - 2 * ow;
#pragma unroll
    for (int t = 0; t < 4; ++t) window(oh - t / 2, ow - t % 2, kh + t / 2 * 2, kw + t % 2 * 2);
  } else {
    const int last_h = (x.h + pool.padding) / pool.stride;
    const int last_w = (x.w + pool.padding) / pool.stride;
    for (int oh = last_h, kh = x.h + pool.padding - oh * pool.stride; kh < pool.kernel;
         --oh, kh += pool.stride) {
      for (int ow = last_w, kw = x.w + pool.padding - ow * pool.stride; kw < pool.kernel;
           --ow, kw += pool.stride) {
        window(oh, ow, kh, kw);
      }
    }
  }
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_maxpool_bwd_reduce_kernel(BnReluMaxpoolBwd p, Pool pool, float* part, Cut c) {
  FASTRES_SHARED(float, cell, 2 * kThreads * L);
  // 1. locate the chunk
  const Chunk<L> w(c);

  // 2. load per-channel vectors
  float mean[L], acc[2][L] = {};
  load_vector<L>(mean, p.mean, w.channel, !c.nhwc, 0.0f);
  for (int64_t r = w.r; r < w.r_end; r += w.r_step) {
    for (int64_t at = w.i; at < w.i_end; at += w.i_step) {
      // 3. load tile, gather g
      const int64_t row = w.row_of(c, r, at), unit = w.unit_of(c, at);
      Raw<T, L> raw;
      float g[L], x[L];
      load(raw, p.x, row * c.inner + unit * L, true);
      gather<T, L>(g, p, pool, c.nhwc, c.channels, w.channel, row, unit);
      expand(x, raw);

      // 4. add
#pragma unroll
      for (int j = 0; j < L; ++j) {
        acc[0][j] += g[j];
        acc[1][j] = fmaf(g[j], x[j] - mean[j], acc[1][j]);
      }
    }
  }

  // 5. add over the block, store partials
  sum_block<2, L>(part, cell, acc, c, Share(c));
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_maxpool_bwd_apply_kernel(BnReluMaxpoolBwd p, Pool pool, float inverse_count, Map m) {
  // 1. locate the tile of x
  const Walk<L> w(m);

  // 2. load per-channel vectors
  Gradient<L> grad;
  grad.load(p.mean, p.rstd, p.gamma, p.dgamma, p.dbeta, p.training, inverse_count, w.channel,
            !m.nhwc);
  for (int k = 0; k < w.count; ++k) {
    // 3. load tile, gather g
    const int64_t at = w.at + k * w.step_at;
    Raw<T, L> raw;
    float g[L], x[L];
    load(raw, p.x, at, p.training);
    gather<T, L>(g, p, pool, m.nhwc, m.channels, w.channel, w.row + k * w.step_row,
                 w.unit + k * w.step_unit);
    expand(x, raw);

    // 4. dx
#pragma unroll
    for (int j = 0; j < L; ++j) x[j] = grad(g[j], x[j], p.training, j);
    store<T>(p.dx, at, x);
  }
}

}  // namespace cuda
}  // namespace fastres
