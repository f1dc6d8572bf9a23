// Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016): a 4x4 tile of a 3x3 convolution
// from a 6x6 tile of its input, in 36 products a channel pair instead of 144.
//
//   fprop  y  = A^T [ (G w G^T) . (B^T x B) ] A         . the product by element, summed over C
//   wgrad  dw = G^T [ (B^T x B) . (A dy A^T) ] G                                summed over tiles
//
// The points are 0, +-5/8, +-3/2 and infinity: against float64 their error is a quarter of that of
// the usual 0, +-1, +-2, and about twice a direct convolution's at C = 64, the same at C = 512.
// All arithmetic is fp32. A value that is not finite spreads to its whole tile.
#pragma once

#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int kTile = 4, kHalo = 6, kPoints = 36;
constexpr int kCols = 32;  // output channels a panel; a layout that callers may keep: see kernels.h
constexpr int kVecs = kCols / kW;

constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA * kA2, kB3 = kB * kB2;
constexpr float kSum = kA2 + kB2, kProd = kA2 * kB2;
constexpr float kG0 = 1.0f / kProd;
constexpr float kGa = 1.0f / (2.0f * kA2 * (kA2 - kB2)), kGb = 1.0f / (2.0f * kB2 * (kB2 - kA2));

// Scratch memory, see runtime.h.
FASTRES_INLINE float* floats(int slot, int64_t count) {
  return static_cast<float*>(scratch(slot, static_cast<size_t>(count) * sizeof(float)));
}

// Each transform is its matrix times a vector, rows ordered 0, a, -a, b, -b, infinity.

// B^T
struct InputTransform {
  FASTRES_INLINE void operator()(const VF (&d)[kHalo], VF (&v)[kHalo]) const {
    const VF a2 = splat(kA2), b2 = splat(kB2), sum = splat(kSum), prod = splat(kProd);
    const VF ea = fnma(b2, d[2], d[4]), oa = mul(splat(kA), fnma(b2, d[1], d[3]));
    const VF eb = fnma(a2, d[2], d[4]), ob = mul(splat(kB), fnma(a2, d[1], d[3]));
    v[0] = fma(prod, d[0], fnma(sum, d[2], d[4]));
    v[1] = add(ea, oa);
    v[2] = sub(ea, oa);
    v[3] = add(eb, ob);
    v[4] = sub(eb, ob);
    v[5] = fma(prod, d[1], fnma(sum, d[3], d[5]));
  }
};

// A^T
struct OutputTransform {
  FASTRES_INLINE void operator()(const VF (&m)[kHalo], VF (&y)[kTile]) const {
    const VF sa = add(m[1], m[2]), da = sub(m[1], m[2]);
    const VF sb = add(m[3], m[4]), db = sub(m[3], m[4]);
    y[0] = add(m[0], add(sa, sb));
    y[1] = fma(splat(kA), da, mul(splat(kB), db));
    y[2] = fma(splat(kA2), sa, mul(splat(kB2), sb));
    y[3] = fma(splat(kA3), da, fma(splat(kB3), db, m[5]));
  }
};

// A
struct GradientTransform {
  FASTRES_INLINE void operator()(const VF (&y)[kTile], VF (&v)[kHalo]) const {
    const VF ea = fma(splat(kA2), y[2], y[0]), oa = fma(splat(kA3), y[3], mul(splat(kA), y[1]));
    const VF eb = fma(splat(kB2), y[2], y[0]), ob = fma(splat(kB3), y[3], mul(splat(kB), y[1]));
    v[0] = y[0];
    v[1] = add(ea, oa);
    v[2] = sub(ea, oa);
    v[3] = add(eb, ob);
    v[4] = sub(eb, ob);
    v[5] = y[3];
  }
};

// G
struct WeightTransform {
  FASTRES_INLINE void operator()(const VF (&w)[3], VF (&u)[kHalo]) const {
    const VF ea = fma(splat(kA2), w[2], w[0]), oa = mul(splat(kA), w[1]);
    const VF eb = fma(splat(kB2), w[2], w[0]), ob = mul(splat(kB), w[1]);
    u[0] = mul(splat(kG0), w[0]);
    u[1] = mul(splat(kGa), add(ea, oa));
    u[2] = mul(splat(kGa), sub(ea, oa));
    u[3] = mul(splat(kGb), add(eb, ob));
    u[4] = mul(splat(kGb), sub(eb, ob));
    u[5] = w[2];
  }
};

// G^T
struct WeightGradientTransform {
  FASTRES_INLINE void operator()(const VF (&m)[kHalo], VF (&w)[3]) const {
    const VF sa = mul(splat(kGa), add(m[1], m[2])), da = mul(splat(kGa), sub(m[1], m[2]));
    const VF sb = mul(splat(kGb), add(m[3], m[4])), db = mul(splat(kGb), sub(m[3], m[4]));
    w[0] = fma(splat(kG0), m[0], add(sa, sb));
    w[1] = fma(splat(kA), da, mul(splat(kB), db));
    w[2] = fma(splat(kA2), sa, fma(splat(kB2), sb, m[5]));
  }
};

// out = M in M^T for a matrix given as its 1-d transform, in (R, R) to out (S, S).
template <int R, int S, class F>
FASTRES_INLINE void both_ways(const VF (&in)[R][R], VF (&out)[S][S], const F& transform) {
  VF half[S][R];
#pragma GCC unroll 6
  for (int j = 0; j < R; ++j) {
    VF column[R], made[S];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) column[i] = in[i][j];
    transform(column, made);
#pragma GCC unroll 6
    for (int i = 0; i < S; ++i) half[i][j] = made[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < S; ++i) transform(half[i], out[i]);
}

// The values of a transformed tile, one vector each, `plane` floats apart.
FASTRES_INLINE void store_points(float* to, int64_t plane, const VF (&v)[kHalo][kHalo]) {
#pragma GCC unroll 36
  for (int i = 0; i < kPoints; ++i) store(to + i * plane, v[i / kHalo][i % kHalo], Full{});
}
FASTRES_INLINE void load_points(VF (&v)[kHalo][kHalo], const float* from, int64_t plane) {
#pragma GCC unroll 36
  for (int i = 0; i < kPoints; ++i) v[i / kHalo][i % kHalo] = load(from + i * plane, Full{});
}

// c (MR, VECS * kW) (+)= sum over k < depth of a[row, k] * b[k, VECS * kW]; rows of c are c_row
// apart. Summed kSlice at a time: a long sum in one accumulator would lose digits that a direct
// convolution keeps.
constexpr int64_t kSlice = 128;
constexpr int64_t kAhead = 24;  // steps: the operands come from L2 and L3, in runs of a page

template <int MR, int VECS = kVecs>
FASTRES_INLINE void multiply(float* c, int64_t c_row, const float* a, int64_t a_row, int64_t a_step,
                             const float* b, int64_t b_step, int64_t b_vec, int64_t depth,
                             bool add_to = false) {
  const float* next = a + (a_step == 1 ? MR * a_row : kAhead * a_step);
  for (int64_t done = 0; done < depth; done += kSlice) {
    const int64_t end = min64(depth, done + kSlice);
    VF acc[MR][VECS];
#pragma GCC unroll 24
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) acc[r][v] = zero();
    }
    for (int64_t k = done; k < end; ++k, a += a_step, b += b_step, next += 16) {
      VF bv[VECS];
      fetch(next);
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) {
        bv[v] = load(b + v * b_vec, Full{});
        fetch(b + v * b_vec + kAhead * b_step);
      }
#pragma GCC unroll 24
      for (int r = 0; r < MR; ++r) {
        const VF x = splat(a[r * a_row]);
#pragma GCC unroll 8
        for (int v = 0; v < VECS; ++v) acc[r][v] = fma(x, bv[v], acc[r][v]);
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) {
        float* to = c + r * c_row + v * kW;
        store(to, add_to || done > 0 ? add(load(to, Full{}), acc[r][v]) : acc[r][v], Full{});
      }
    }
  }
}

// Tiles of an output (N, OH, OW), numbered row by row.
struct TileGrid {
  int64_t rows, cols, count;
  TileGrid(int64_t n, int64_t oh, int64_t ow)
      : rows(ceil_div(oh, kTile)), cols(ceil_div(ow, kTile)), count(n * rows * cols) {}
};

// A tile of an (H, W) image: its first pixel, which may lie in the padding, and the part inside.
struct Window {
  int64_t image, h, w;
  int h0, h1, w0, w1;
  Window(const TileGrid& g, int64_t tile, int64_t shift, int size, int64_t height, int64_t width)
      : image(tile / (g.rows * g.cols)),
        h(tile / g.cols % g.rows * kTile - shift),
        w(tile % g.cols * kTile - shift),
        h0(first(h)),
        h1(last(h, size, height)),
        w0(first(w)),
        w1(last(w, size, width)) {}
  bool whole(int size) const { return h0 == 0 && w0 == 0 && h1 == size && w1 == size; }

 private:
  static int first(int64_t p) { return p < 0 ? static_cast<int>(-p) : 0; }
  static int last(int64_t p, int size, int64_t end) {
    const int64_t left = end - p;
    return left >= size ? size : left < 0 ? 0 : static_cast<int>(left);
  }
};

// Reads an (R, R) window of an NHWC tensor at one vector of channels, 0 outside the image.
template <int R, bool WHOLE, class T, class L>
FASTRES_INLINE void read_window(VF (&d)[R][R], const T* origin, const Window& win, int64_t row,
                                int64_t pixel, L lanes) {
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < R; ++j) {
      const bool inside = WHOLE || (i >= win.h0 && i < win.h1 && j >= win.w0 && j < win.w1);
      d[i][j] = inside ? load(origin + i * row + j * pixel, lanes) : zero();
    }
  }
}

// For each vector of the first `count` of c channels of one tile: out(c, v) with
// v = transform(window).
template <int R, class T, class F, class Out>
FASTRES_INLINE void transform_tile(const T* x, int64_t h, int64_t w, int64_t c, int64_t count,
                                   const Window& win, const F& transform, const Out& out) {
  const T* origin = x + ((win.image * h + win.h) * w + win.w) * c;
  // No hardware prefetcher follows so short runs: ask for the pixels that the tile below adds.
  const T* below = origin + R * w * c;
  const auto at = [&](int64_t i, auto whole, auto lanes) {
    VF d[R][R], v[kHalo][kHalo];
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) fetch(below + (r * w + j) * c + i);
    }
    read_window<R, decltype(whole)::value>(d, origin + i, win, w * c, c, lanes);
    both_ways(d, v, transform);
    out(i, v);
  };
  const auto along = [&](auto whole) {
    int64_t i = 0;
    for (; i + kW <= count; i += kW) at(i, whole, Full{});
    if (i < count) at(i, whole, Tail(count - i));
  };
  if (win.whole(R)) {
    along(std::true_type{});
  } else {
    along(std::false_type{});
  }
}

}  // namespace
}  // namespace FASTRES_ISA
}  // namespace fastres
