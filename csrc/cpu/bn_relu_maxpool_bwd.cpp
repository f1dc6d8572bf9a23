// Backward of bn_relu_maxpool. g at an input pixel = sum of dz over the windows whose index points
// at it.
//
// reduce: dbeta = sum g; dgamma = sum g * (x - mean) * rstd
// apply:  dx = gamma * rstd * (g - dbeta / M - (x - mean) * rstd * dgamma / M), or gamma * rstd * g
// Traffic: reads x, dz and index (dz and index up to ceil(K / stride)^2 times, from cache); apply
// writes dx. Accumulation: fp32 per tile (NHWC: an image row block, NCHW: a plane), tiles summed in
// double in order.
//
// g is gathered, never scattered: each input pixel knows its windows, so no two threads write one
// value. NHWC gathers vectors of channels; NCHW builds one row of g at a time, dz element by
// element.
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int kMaxWindows = 15 * 15;  // stride 1 and kernel 15: every offset of the window

// The windows that hold one input pixel: where their output is, and the index that points at the
// pixel.
struct Windows {
  int count = 0;
  int64_t offset[kMaxWindows];
  uint8_t expected[kMaxWindows];

  // pixel (h, w); offsets are in output pixels of this image
  FASTRES_INLINE void find(const PoolGeometry& g, int64_t h, int64_t w) {
    count = 0;
    const int64_t h0 = first(h, g), h1 = min64((h + g.padding) / g.stride, g.oh - 1);
    const int64_t w0 = first(w, g), w1 = min64((w + g.padding) / g.stride, g.ow - 1);
    for (int64_t oh = h0; oh <= h1; ++oh) {
      const int64_t kh = h - (oh * g.stride - g.padding);
      for (int64_t ow = w0; ow <= w1; ++ow) {
        offset[count] = oh * g.ow + ow;
        expected[count] = static_cast<uint8_t>(kh * g.kernel + w - (ow * g.stride - g.padding));
        ++count;
      }
    }
  }
  FASTRES_INLINE static int64_t first(int64_t at, const PoolGeometry& g) {
    const int64_t low = at + g.padding - g.kernel + 1;
    return low <= 0 ? 0 : ceil_div(low, g.stride);
  }
};

template <class T>
struct Source {
  const T* dz;
  const uint8_t* index;
  const T* x;
  const BnReluMaxpoolBwd& p;

  template <class L>
  FASTRES_INLINE VF gather(const Windows& ws, int64_t image, int64_t c, L lanes) const {
    VF g = zero();
    const int64_t base = image * p.pool.oh * p.pool.ow;
    for (int j = 0; j < ws.count; ++j) {
      const int64_t at = (base + ws.offset[j]) * p.act.c + c;
      g = add(g, keep(equals_u8(index + at, ws.expected[j], lanes), load(dz + at, lanes)));
    }
    return g;
  }

  // Row h of g of one NCHW plane.
  FASTRES_INLINE void gather_row(float* g, int64_t plane, int64_t h) const {
    const PoolGeometry& geo = p.pool;
    for (int64_t w = 0; w < ceil_div(geo.w, 16) * 16; ++w) g[w] = 0.0f;
    const int64_t last = min64((h + geo.padding) / geo.stride, geo.oh - 1);
    for (int64_t oh = Windows::first(h, geo); oh <= last; ++oh) {
      const int kh = static_cast<int>(h - (oh * geo.stride - geo.padding));
      const int64_t row = (plane * geo.oh + oh) * geo.ow;
      for (int64_t ow = 0; ow < geo.ow; ++ow) {
        const int kw = index[row + ow] - kh * geo.kernel;
        if (index[row + ow] != 255 && kw >= 0 && kw < geo.kernel) {
          float lane[kW];
          store(lane, load(dz + row + ow, Tail(1)), Full{});
          g[ow * geo.stride - geo.padding + kw] += lane[0];
        }
      }
    }
  }
};

FASTRES_INLINE float* row_buffer(int64_t w) {
  return static_cast<float*>(scratch(1, static_cast<size_t>(ceil_div(w, 16) * 16) * sizeof(float)));
}

// --- reduce: workspace [tile][2][padded(C)]
// -------------------------------------------------------

template <class T>
void reduce_pool_nhwc(const Source<T>& s, const Tiles& t, const Params& par, float* ws) {
  const BnReluMaxpoolBwd& p = s.p;
  const int64_t cpad = padded(p.act.c);
  parallel(t.count, 1, [&](int64_t begin, int64_t end) {
    Windows win;
    for (int64_t tile = begin; tile < end; ++tile) {
      float* sum = ws + tile * 2 * cpad;
      float* dot = sum + cpad;
      for (int64_t i = 0; i < 2 * cpad; ++i) sum[i] = 0.0f;
      const int64_t stop = min64((tile + 1) * t.rows, p.act.outer);
      for (int64_t r = tile * t.rows; r < stop; ++r) {
        const int64_t image = r / p.act.s;
        win.find(p.pool, r % p.act.s / p.pool.w, r % p.pool.w);
        const auto step = [&](int64_t c, auto lanes) {
          const VF g = s.gather(win, image, c, lanes);
          const VF d = sub(load(s.x + r * p.act.c + c, lanes), load(par[0] + c, Full{}));
          store(sum + c, add(load(sum + c, Full{}), g), Full{});
          store(dot + c, fma(g, d, load(dot + c, Full{})), Full{});
        };
        int64_t c = 0;
        for (; c + kW <= p.act.c; c += kW) step(c, Full{});
        if (c < p.act.c) step(c, Tail(p.act.c - c));
      }
    }
  });
}

// A tile is one image's plane of every channel.
template <class T>
void reduce_pool_nchw(const Source<T>& s, const Params& par, float* ws) {
  const BnReluMaxpoolBwd& p = s.p;
  const int64_t cpad = padded(p.act.c);
  const int64_t w = p.pool.w;
  parallel(p.act.n * p.act.c, max64(1, kGrain / p.act.s), [&](int64_t begin, int64_t end) {
    float* g = row_buffer(w);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t c = plane % p.act.c;
      const VF mean = splat(par[0][c]);
      double sum = 0.0, dot = 0.0;
      for (int64_t h = 0; h < p.pool.h; ++h) {
        s.gather_row(g, plane, h);
        const T* x = s.x + plane * p.act.s + h * w;
        VF a = zero(), b = zero();
        const auto step = [&](int64_t i, auto lanes) {
          const VF gv = load(g + i, lanes);
          a = add(a, gv);
          b = fma(gv, sub(load(x + i, lanes), mean), b);
        };
        int64_t i = 0;
        for (; i + kW <= w; i += kW) step(i, Full{});
        if (i < w) step(i, Tail(w - i));
        sum += sum_lanes(a);
        dot += sum_lanes(b);
      }
      float* out = ws + plane / p.act.c * 2 * cpad + c;
      out[0] = static_cast<float>(sum);
      out[cpad] = static_cast<float>(dot);
    }
  });
}

// --- apply
// ----------------------------------------------------------------------------------------

// Parameters: mean, a = gamma * rstd, b = dbeta / M, k = rstd * dgamma / M (b = k = 0 unless
// training).
template <bool TRAINING, class T, class L>
FASTRES_INLINE void store_dx(T* dx, VF g, const T* x, VF mean, VF a, VF b, VF k, L lanes) {
  if constexpr (TRAINING) g = fnma(sub(load(x, lanes), mean), k, sub(g, b));
  store(dx, mul(g, a), lanes);
}

template <bool TRAINING, class T>
void apply_pool(const Source<T>& s, const Params& par) {
  const BnReluMaxpoolBwd& p = s.p;
  T* dx = static_cast<T*>(p.dx);
  if (p.act.nhwc) {
    parallel(p.act.outer, max64(1, kGrain / p.act.c), [&](int64_t begin, int64_t end) {
      Windows win;
      for (int64_t r = begin; r < end; ++r) {
        const int64_t image = r / p.act.s;
        win.find(p.pool, r % p.act.s / p.pool.w, r % p.pool.w);
        const auto step = [&](int64_t c, auto lanes) {
          const int64_t at = r * p.act.c + c;
          store_dx<TRAINING>(dx + at, s.gather(win, image, c, lanes), s.x + at,
                             load(par[0] + c, Full{}), load(par[1] + c, Full{}),
                             load(par[2] + c, Full{}), load(par[3] + c, Full{}), lanes);
        };
        int64_t c = 0;
        for (; c + kW <= p.act.c; c += kW) step(c, Full{});
        if (c < p.act.c) step(c, Tail(p.act.c - c));
      }
    });
    return;
  }
  const int64_t w = p.pool.w;
  parallel(p.act.n * p.act.c, max64(1, kGrain / p.act.s), [&](int64_t begin, int64_t end) {
    float* g = row_buffer(w);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t c = plane % p.act.c;
      const VF mean = splat(par[0][c]), a = splat(par[1][c]);
      const VF b = splat(par[2][c]), k = splat(par[3][c]);
      for (int64_t h = 0; h < p.pool.h; ++h) {
        s.gather_row(g, plane, h);
        const int64_t at = plane * p.act.s + h * w;
        const auto step = [&](int64_t i, auto lanes) {
          store_dx<TRAINING>(dx + at + i, load(g + i, lanes), s.x + at + i, mean, a, b, k, lanes);
        };
        int64_t i = 0;
        for (; i + kW <= w; i += kW) step(i, Full{});
        if (i < w) step(i, Tail(w - i));
      }
    }
  });
}

}  // namespace

void bn_relu_maxpool_bwd_reduce(const BnReluMaxpoolBwd& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Source<T> s{static_cast<const T*>(p.dz), p.index, static_cast<const T*>(p.x), p};
    Tiles t(p.act);
    if (!p.act.nhwc) t.count = p.act.n;
    const int64_t cpad = padded(p.act.c);
    const Params par(1, p.act.c, t.count * 2 * cpad);
    par.copy(0, p.mean, 0.0f);
    float* ws = par.after(1);
    // 1. tiles
    if (p.act.nhwc) {
      reduce_pool_nhwc(s, t, par, ws);
    } else {
      reduce_pool_nchw(s, par, ws);
    }
    // 2. merge in tile order
    for_each_channel_block(p.act, t, [&](int64_t c, int64_t n) {
      double sum[kMergeBlock];
      merge_sums(sum, ws, t.count, 2 * cpad, c, n);
      for (int64_t j = 0; j < n; ++j) p.dbeta[c + j] = static_cast<float>(sum[j]);
      merge_sums(sum, ws + cpad, t.count, 2 * cpad, c, n);
      for (int64_t j = 0; j < n; ++j) {
        const double rstd = p.rstd != nullptr ? p.rstd[c + j] : 1.0;
        p.dgamma[c + j] = static_cast<float>(sum[j] * rstd);
      }
    });
  });
}

void bn_relu_maxpool_bwd_apply(const BnReluMaxpoolBwd& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Source<T> s{static_cast<const T*>(p.dz), p.index, static_cast<const T*>(p.x), p};
    const double count = static_cast<double>(p.act.n) * static_cast<double>(p.act.s);
    const Params par(4, p.act.c);
    par.copy(0, p.mean, 0.0f);
    par.scale(1, p.gamma, p.rstd);
    for (int64_t c = 0; c < p.act.c; ++c) {
      const float r = p.rstd != nullptr ? p.rstd[c] : 1.0f;
      par[2][c] = p.training ? static_cast<float>(p.dbeta[c] / count) : 0.0f;
      par[3][c] = p.training ? static_cast<float>(r * (p.dgamma[c] / count)) : 0.0f;
    }
    if (p.training) {
      apply_pool<true>(s, par);
    } else {
      apply_pool<false>(s, par);
    }
  });
}

}  // namespace FASTRES_ISA
}  // namespace fastres
