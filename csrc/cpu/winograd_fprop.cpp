// y = act(conv3x3(x, w) + bias + residual), stride 1, NHWC, by Winograd's F(4x4, 3x3); dgrad is the
// same on dy with the weights turned and transposed.
// Traffic: reads x 2.25 times (the halos from cache) and the residual once, writes y once; the
// transformed tiles and their products stay in L2 or L3.
// Accumulation: fp32 over the channels in order, whatever the number of threads.
#include "winograd.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int64_t kSkew = 16;        // floats: power-of-two strides would share one set of L1
constexpr int64_t kRowGroup = 12;    // tiles of one pass of `multiply`, where they suffice
constexpr int64_t kMostPanels = 4;   // so that the products of so many tiles stay in L2
constexpr int64_t kMostTiles = 48;   // a panel of weights is then read every 24 flops a byte
constexpr int64_t kBlockTiles = 36;  // of a block whose weights stay in L2
constexpr int64_t kL2 = 512 << 10;   // bytes: half of an L2
constexpr int64_t kL3 = 12 << 20;    // bytes: part of an L3
constexpr int64_t kHotWeights =
    3 << 20;  // bytes of transformed weights that every block may reread

// Transformed inputs (36, tile, C) of `count` tiles.
struct Inputs {
  int64_t row, plane;  // floats
  Inputs(int64_t count, int64_t c)
      : row(ceil_div(c, kW) * kW + (c < 128 ? 0 : kSkew)), plane(count * row + kSkew) {}
  int64_t floats() const { return kPoints * plane; }
};

// The products (panel, 36, tile, columns): kCols, or half of them where that is all there is.
struct Products {
  int64_t tiles, cols, plane;  // floats
  Products(int64_t tiles, int64_t k)
      : tiles(tiles), cols(2 * k <= kCols ? kCols / 2 : kCols), plane(tiles * cols + kSkew) {}
  int64_t floats() const { return kPoints * plane; }  // of one panel
};

int64_t panel_floats(int64_t c) { return kPoints * c * kCols; }

// 1. u (36, C, kCols) = G w G^T of one panel, 0 for the channels that pad the last one
void transform_weights(float* u, const WinogradWeights& p, int64_t panel, int64_t begin,
                       int64_t end) {
  const int64_t k0 = panel * kCols, width = min64(kCols, p.k - k0);
  for (int64_t c = begin; c < end; ++c) {
    float taps[9][kCols];  // of kCols filters, side by side
    for (int tap = 0; tap < 9; ++tap) {
      const int at = p.turned ? 8 - tap : tap;
      const float* from =
          p.w + k0 * p.stride_k + c * p.stride_c + at / 3 * p.stride_r + at % 3 * p.stride_s;
      for (int64_t k = 0; k < width; ++k) taps[tap][k] = from[k * p.stride_k];
      for (int64_t k = width; k < kCols; ++k) taps[tap][k] = 0.0f;
    }
    for (int j = 0; j < kCols; j += kW) {
      VF w[3][3], made[kHalo][kHalo];
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) {
        const VF v = load(taps[tap] + j, Full{});
        w[tap / 3][tap % 3] = p.dtype == kBF16 ? round_to<BF16>(v) : v;
      }
      both_ways(w, made, WeightTransform{});
      store_points(u + c * kCols + j, p.c * kCols, made);
    }
  }
}

}  // namespace

void winograd_weights(float* u, const WinogradWeights& p) {
  const int64_t panels = ceil_div(p.k, kCols);
  parallel(panels * p.c, 64, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t panel = job / p.c, c = job % p.c;
      transform_weights(u + panel * panel_floats(p.c), p, panel, c, c + 1);
    }
  });
}

namespace {

// 2. tiles [begin, end), counted from `first`, to v (36, tile, C)
template <class T>
void transform_inputs(float* v, const Inputs& in, const WinogradFprop& p, const TileGrid& g,
                      int64_t first, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Window win(g, first + t, p.padding, kHalo, p.h, p.w);
    float* to = v + t * in.row;
    transform_tile<kHalo>(
        static_cast<const T*>(p.x), p.h, p.w, p.c, p.c, win, InputTransform{},
        [&](int64_t c, const VF(&made)[kHalo][kHalo]) { store_points(to + c, in.plane, made); });
  }
}

// A panel of one vector and kFew channels: its weights stay in registers.
constexpr int kFew = 16;

template <int MR>
FASTRES_INLINE void multiply_few(float* c, const VF (&u)[kFew], const float* a, int64_t a_row) {
  VF acc[MR];
#pragma GCC unroll 12  // kRowGroup
  for (int r = 0; r < MR; ++r) acc[r] = mul(splat(a[r * a_row]), u[0]);
#pragma GCC unroll 16
  for (int k = 1; k < kFew; ++k) {
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) acc[r] = fma(splat(a[r * a_row + k]), u[k], acc[r]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) store(c + r * kW, acc[r], Full{});
}

void multiply_few_all(float* m, const Products& out, const float* v, const Inputs& in,
                      const float* u) {
  for (int point = 0; point < kPoints; ++point) {
    const float* a = v + point * in.plane;
    float* to = m + point * out.plane;
    VF b[kFew];
#pragma GCC unroll 16
    for (int k = 0; k < kFew; ++k) b[k] = load(u + (point * kFew + k) * kCols, Full{});
    int64_t t = 0;
    for (; t + kRowGroup <= out.tiles; t += kRowGroup) {
      multiply_few<kRowGroup>(to + t * kW, b, a + t * in.row, in.row);
    }
    for (; t < out.tiles; ++t) multiply_few<1>(to + t * kW, b, a + t * in.row, in.row);
  }
}

// 3. m (panel, 36, tile, columns) = v (36, tile, C) u (panel, 36, C, kCols). All panels of a point
// before the next point: v and u come from L3, and each is then read from there once.
template <int VECS>
void multiply_panels(float* m, const Products& out, const float* v, const Inputs& in,
                     const float* u, int64_t panels, int64_t c) {
  // accumulators: 24 of 32 registers, or 8 of 16
  constexpr int kRows = (kW >= 16 ? 24 : 8) / VECS;
  for (int point = 0; point < kPoints; ++point) {
    const float* a = v + point * in.plane;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* b = u + panel * panel_floats(c) + point * c * kCols;
      float* to = m + panel * out.floats() + point * out.plane;
      int64_t t = 0;
      const auto rows = [&](auto count) {
        constexpr int kR = decltype(count)::value;
        for (; t + kR <= out.tiles; t += kR) {
          multiply<kR, VECS>(to + t * out.cols, out.cols, a + t * in.row, in.row, 1, b, kCols, kW,
                             c);
        }
      };
      rows(std::integral_constant<int, kRows>{});
      if (kRows > kRowGroup) rows(std::integral_constant<int, kRowGroup>{});
      if (kRows > 8) rows(std::integral_constant<int, 8>{});
      if (kRows > 4) rows(std::integral_constant<int, 4>{});
      rows(std::integral_constant<int, 1>{});
    }
  }
}

void multiply_all(float* m, const Products& out, const float* v, const Inputs& in, const float* u,
                  int64_t panels, int64_t c) {
  if (kW == kFew && out.cols == kW && c == kFew) {
    multiply_few_all(m, out, v, in, u);
  } else if (out.cols == kCols) {
    multiply_panels<kVecs>(m, out, v, in, u, panels, c);
  } else {
    multiply_panels<kVecs / 2>(m, out, v, in, u, panels, c);
  }
}

// 4. the pixels of the tiles from `first` on, channels [k, k + kCols)
template <class T>
void transform_outputs(const WinogradFprop& p, const TileGrid& g, int64_t first, const float* m,
                       const Products& in, int64_t k) {
  const int64_t row = p.ow * p.k;
  for (int64_t t = 0; t < in.tiles; ++t) {
    const Window win(g, first + t, 0, kTile, p.oh, p.ow);
    const int64_t origin = ((win.image * p.oh + win.h) * p.ow + win.w) * p.k + k;
    const auto at = [&](int64_t j, auto lanes) {
      VF products[kHalo][kHalo], y[kTile][kTile];
      load_points(products, m + t * in.cols + j, in.plane);
      both_ways(products, y, OutputTransform{});
      const VF bias = p.bias != nullptr ? load(p.bias + k + j, lanes) : zero();
      for (int h = 0; h < win.h1; ++h) {
#pragma GCC unroll 4
        for (int w = 0; w < kTile; ++w) {
          if (w >= win.w1) break;
          const int64_t off = origin + j + h * row + w * p.k;
          VF z = add(y[h][w], bias);
          if (p.residual != nullptr) {
            z = add(z, load(static_cast<const T*>(p.residual) + off, lanes));
          }
          T* to = static_cast<T*>(p.y) + off;
          if (p.relu) {
            store_kept(to, passes(z), z, lanes);
          } else {
            store(to, z, lanes);
          }
        }
      }
    };
    const int64_t width = min64(kCols, p.k - k);
    int64_t j = 0;
    for (; j + kW <= width; j += kW) at(j, Full{});
    if (j < width) at(j, Tail(width - j));
  }
}

// Few weights: a thread takes blocks of tiles, all their channels.
template <class T>
void convolve_by_tiles(const WinogradFprop& p, const TileGrid& g) {
  const int64_t panels = ceil_div(p.k, kCols);
  const float* u = p.u;
  if (u == nullptr) {
    float* made = floats(0, panels * panel_floats(p.c));
    winograd_weights(made, p.weights);
    u = made;
  }
  const int64_t fit = kL2 / (kPoints * 4 * (p.c + kCols)) / kRowGroup * kRowGroup;
  const int64_t most = max64(2 * kRowGroup, min64(kBlockTiles, fit));
  // a multiple of the threads, so that all end together
  const int64_t blocks = ceil_div(ceil_div(g.count, most), p.threads) * p.threads;
  const int64_t size = ceil_div(ceil_div(g.count, blocks), kRowGroup) * kRowGroup;
  const Inputs in(size, p.c);
  parallel(ceil_div(g.count, size), 1, [&](int64_t begin, int64_t end) {
    float* v = floats(1, in.floats() + Products(size, p.k).floats());
    float* m = v + in.floats();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * size;
      const Products out(min64(size, g.count - first), p.k);
      transform_inputs<T>(v, in, p, g, first, 0, out.tiles);
      for (int64_t panel = 0; panel < panels; ++panel) {
        multiply_all(m, out, v, in, u + panel * panel_floats(p.c), 1, p.c);
        transform_outputs<T>(p, g, first, m, out, panel * kCols);
      }
    }
  });
}

// Many weights: they are read, or made, once for as many tiles as L3 holds; a thread takes a few
// panels of them.
template <class T>
void convolve_by_panels(const WinogradFprop& p, const TileGrid& g) {
  const int64_t panels = ceil_div(p.k, kCols);
  const int64_t most = max64(kMostTiles, kL3 / Inputs(1, p.c).floats() / 4);
  const int64_t chunk = ceil_div(g.count, ceil_div(g.count, most));
  const Inputs in(chunk, p.c);
  for (int64_t first = 0; first < g.count; first += chunk) {
    const int64_t count = min64(chunk, g.count - first);
    float* v = floats(0, in.floats());
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      transform_inputs<T>(v, in, p, g, first, begin, end);
    });
    const int64_t blocks = ceil_div(count, kMostTiles);
    const int64_t size = max64(1, min64(kMostPanels, panels * blocks / (2 * p.threads)));
    parallel(ceil_div(panels, size) * blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t products = size * Products(kMostTiles, p.k).floats();
      float* m = floats(1, products + (p.u == nullptr ? size * panel_floats(p.c) : 0));
      float* own = m + products;
      int64_t made = -1;
      for (int64_t job = begin; job < end; ++job) {
        const int64_t panel = job / blocks * size, from = job % blocks * kMostTiles;
        const int64_t here = min64(size, panels - panel);
        const float* u = own;
        if (p.u != nullptr) {
          u = p.u + panel * panel_floats(p.c);
        } else if (panel != made) {
          for (int64_t i = 0; i < here; ++i) {
            transform_weights(own + i * panel_floats(p.c), p.weights, panel + i, 0, p.c);
          }
          made = panel;
        }
        const Products out(min64(kMostTiles, count - from), p.k);
        multiply_all(m, out, v + from * in.row, in, u, here, p.c);
        for (int64_t i = 0; i < here; ++i) {
          transform_outputs<T>(p, g, first + from, m + i * out.floats(), out, (panel + i) * kCols);
        }
      }
    });
  }
}

template <class T>
void convolve(const WinogradFprop& p) {
  const TileGrid g(p.n, p.oh, p.ow);
  if (g.count == 0) return;
  const int64_t bytes = panel_floats(p.c) * ceil_div(p.k, kCols) * 4;
  if (bytes <= kHotWeights && g.count >= 2 * kRowGroup * p.threads) {
    convolve_by_tiles<T>(p, g);
  } else {
    convolve_by_panels<T>(p, g);
  }
}

}  // namespace

void winograd_fprop(const WinogradFprop& p) {
  if (p.dtype == kF32) {
    convolve<float>(p);
  } else {
    convolve<BF16>(p);
  }
}

}  // namespace FASTRES_ISA
}  // namespace fastres
