// z = maxpool(relu(normalise(x))), index = window offset kh * K + kw of the first maximum, 255 if z
// <= 0 Traffic: reads 1 tensor, writes z and one byte per element of z. Arithmetic: fp32, each
// value rounded to the stored dtype before it is compared, as unfused torch does.
//
// ReLU is applied to the maximum: relu never changes which element is the first maximum, except
// where the maximum is <= 0, and there no gradient passes.
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

// The part of window `o` that lies inside [0, size).
struct Window {
  int64_t begin, end;
  int64_t first;  // window offset of `begin`

  FASTRES_INLINE Window(int64_t o, int64_t size, const PoolGeometry& g) {
    const int64_t start = o * g.stride - g.padding;
    begin = max64(start, 0);
    end = min64(start + g.kernel, size);
    first = begin - start;
  }
};

template <class T>
struct Pool {
  T* z;
  uint8_t* index;
  const T* x;
  const BnReluMaxpool& p;

  // --- NHWC: vectors of channels, one output pixel at a time ---
  template <class L>
  FASTRES_INLINE void pixel(const Params& par, int64_t image, const Window& h, const Window& w,
                            int64_t out, int64_t c, L lanes) const {
    const PoolGeometry& g = p.pool;
    const VF mean = load(par[0] + c, Full{});
    const VF scale = load(par[1] + c, Full{});
    const VF beta = load(par[2] + c, Full{});
    VF best = zero(), arg = zero();
    bool empty = true;
    // 1. maximum over the window, row by row
    for (int64_t ih = h.begin; ih < h.end; ++ih) {
      const T* row = x + ((image * g.h + ih) * g.w) * p.act.c + c;
      int64_t offset = (h.first + ih - h.begin) * g.kernel + w.first;
      for (int64_t iw = w.begin; iw < w.end; ++iw, ++offset) {
        const VF v = round_to<T>(normalise(load(row + iw * p.act.c, lanes), mean, scale, beta));
        const VF here = splat(static_cast<float>(offset));
        if (empty) {
          best = v;
          arg = here;
          empty = false;
        } else {
          const VM wins = greater_or_nan(v, best);
          best = select(wins, v, best);
          arg = select(wins, here, arg);
        }
      }
    }
    // 2. relu, store
    const VM m = passes(best);
    store_rounded(z + out, keep(m, best), lanes);
    if (index != nullptr) store_u8(index + out, select(m, arg, splat(255.0f)), lanes);
  }

  void nhwc(const Params& par) const {
    const PoolGeometry& g = p.pool;
    const int64_t channels = p.act.c;
    parallel(p.act.n * g.oh, max64(1, kGrain / (g.ow * channels * g.kernel)),
             [&](int64_t begin, int64_t end) {
               for (int64_t row = begin; row < end; ++row) {
                 const Window h(row % g.oh, g.h, g);
                 for (int64_t ow = 0; ow < g.ow; ++ow) {
                   const Window w(ow, g.w, g);
                   const int64_t out = (row * g.ow + ow) * channels;
                   int64_t c = 0;
                   for (; c + kW <= channels; c += kW) {
                     pixel(par, row / g.oh, h, w, out + c, c, Full{});
                   }
                   if (c < channels) pixel(par, row / g.oh, h, w, out + c, c, Tail(channels - c));
                 }
               }
             });
  }

  // --- NCHW: the K input rows of one output row, column by column first ---
  void nchw(const Params& par) const {
    const PoolGeometry& g = p.pool;
    const int64_t width = ceil_div(g.w, 16) * 16;
    parallel(p.act.n * p.act.c, max64(1, kGrain / p.act.s), [&](int64_t begin, int64_t end) {
      float* best = static_cast<float*>(scratch(1, static_cast<size_t>(2 * width) * sizeof(float)));
      float* arg = best + width;  // kh of the column's maximum
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t c = plane % p.act.c;
        const VF q[3] = {splat(par[0][c]), splat(par[1][c]), splat(par[2][c])};
        for (int64_t oh = 0; oh < g.oh; ++oh) {
          columns(q, x + plane * p.act.s, Window(oh, g.h, g), best, arg);
          const int64_t out = (plane * g.oh + oh) * g.ow;
          for (int64_t ow = 0; ow < g.ow; ++ow) pick(best, arg, Window(ow, g.w, g), out + ow);
        }
      }
    });
  }

  // 1. maximum of each column of the window rows
  FASTRES_INLINE void columns(const VF* q, const T* plane, const Window& h, float* best,
                              float* arg) const {
    const int64_t w = p.pool.w;
    const auto column = [&](int64_t i, auto lanes) {
      VF b = zero(), a = zero();
      for (int64_t ih = h.begin; ih < h.end; ++ih) {
        const VF v = round_to<T>(normalise(load(plane + ih * w + i, lanes), q[0], q[1], q[2]));
        const VF here = splat(static_cast<float>(h.first + ih - h.begin));
        if (ih == h.begin) {
          b = v;
          a = here;
        } else {
          const VM wins = greater_or_nan(v, b);
          b = select(wins, v, b);
          a = select(wins, here, a);
        }
      }
      store(best + i, b, Full{});
      store(arg + i, a, Full{});
    };
    int64_t i = 0;
    for (; i + kW <= w; i += kW) column(i, Full{});
    if (i < w) column(i, Tail(w - i));
  }

  // 2. the first (row-major) of the columns' maxima; among NaNs the last, as in torch
  FASTRES_INLINE void pick(const float* best, const float* arg, const Window& w,
                           int64_t out) const {
    const int64_t k = p.pool.kernel;
    float top = best[w.begin];
    int64_t at = static_cast<int64_t>(arg[w.begin]) * k + w.first;
    for (int64_t iw = w.begin + 1; iw < w.end; ++iw) {
      const float v = best[iw];
      const int64_t offset = static_cast<int64_t>(arg[iw]) * k + w.first + iw - w.begin;
      const bool v_nan = v != v;
      const bool top_nan = top != top;
      const bool wins = v_nan ? (!top_nan || offset > at) : (v > top || (v == top && offset < at));
      if (wins) {
        top = v;
        at = offset;
      }
    }
    const bool pass = !(top <= 0.0f);
    store_rounded(z + out, splat(pass ? top : 0.0f), Tail(1));
    if (index != nullptr) index[out] = static_cast<uint8_t>(pass ? at : 255);
  }
};

}  // namespace

void bn_relu_maxpool(const BnReluMaxpool& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Params par(3, p.act.c);
    par.copy(0, p.mean, 0.0f);
    par.scale(1, p.gamma, p.rstd);
    par.copy(2, p.beta, 0.0f);
    const Pool<T> pool{static_cast<T*>(p.z), p.index, static_cast<const T*>(p.x), p};
    if (p.act.nhwc) {
      pool.nhwc(par);
    } else {
      pool.nchw(par);
    }
  });
}

}  // namespace FASTRES_ISA
}  // namespace fastres
