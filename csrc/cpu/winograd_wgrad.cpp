// dw = wgrad of a 3x3 convolution of stride 1, NHWC, by Winograd's F(4x4, 3x3) transposed: the
// gradient of y = A^T [(G w G^T) . V] A in w.
// Traffic: reads x 2.25 times (the halos from cache) and dy once; the transformed tiles of a chunk
// stay in L3.
// Accumulation: fp32 over the tiles of a chunk, then over the chunks, in order, whatever the number
// of threads.
#include "winograd.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

constexpr int kRows = kW >= 16 ? 8 : 2;  // input channels of one pass of `multiply`
constexpr int kGroup = 16;               // of `finish`: a line of dw in (K, 3, 3, C)
constexpr int64_t kChunk = 4 << 20;      // bytes of both transformed tensors of a chunk

// Tiles a chunk: few enough for the caches, yet enough for a sum that the transform of its result,
// once a chunk, costs little.
int64_t tiles_a_chunk(int64_t channels) { return max64(kChunk / (kPoints * 4 * channels), 128); }

// What a thread computes of dw at a time, groups x panels of kGroup x kCols channels: the larger,
// the fewer times the transformed tensors are read; up to 4 x 2 the products stay in L2.
struct Cut {
  int64_t groups, panels;  // of a job
  int64_t across, jobs;    // jobs along the panels, all jobs
  Cut(int64_t c, int64_t k, int64_t threads) : groups(4), panels(2) {
    const int64_t all_groups = ceil_div(c, kGroup), all_panels = ceil_div(k, kCols);
    const auto count = [&] { return ceil_div(all_groups, groups) * ceil_div(all_panels, panels); };
    while (groups > 1 && count() < 2 * threads) groups /= 2;
    if (count() < 2 * threads) panels = 1;
    across = ceil_div(all_panels, panels);
    jobs = count();
  }
};

// A transformed tensor of a chunk: (36, channels / kW, tile, kW), so that a sum over tiles runs
// along memory. Planes are skewed, see winograd_fprop.cpp.
struct Chunk {
  int64_t first, count, plane;
  Chunk(int64_t first, int64_t count, int64_t channels)
      : first(first), count(count), plane(ceil_div(channels, kCols) * kCols * count + 16) {}
  int64_t floats() const { return kPoints * plane; }
  FASTRES_INLINE int64_t at(int64_t c, int64_t tile) const {
    return (c / kW * count + tile) * kW + c % kW;
  }
};

// 1. tiles [begin, end) of x or dy to v
template <int R, class T, class F>
void transform_chunk(float* v, const T* x, int64_t h, int64_t w, int64_t c, int64_t padding,
                     const F& transform, const TileGrid& g, const Chunk& chunk, int64_t begin,
                     int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Window win(g, chunk.first + t, padding, R, h, w);
    transform_tile<R>(x, h, w, c, win, transform, [&](int64_t i, const VF(&made)[kHalo][kHalo]) {
      float* to = v + chunk.at(i, t);
#pragma GCC unroll 6
      for (int a = 0; a < kHalo; ++a) {
#pragma GCC unroll 6
        for (int b = 0; b < kHalo; ++b) {
          store(to + (a * kHalo + b) * chunk.plane, made[a][b], Full{});
        }
      }
    });
  }
}

// 3. dw (K, 3, 3, C) (+)= G^T m G for kGroup input channels from c, kCols output channels from k;
// m (36, kGroup, kCols)
void finish(const WinogradWgrad& p, const float* m, int64_t c, int64_t k, bool add_to) {
  const int64_t rows = min64(kGroup, p.c - c), width = min64(kCols, p.k - k);
  float taps[9][kGroup][kCols];
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < kCols; j += kW) {
      VF in[kHalo][kHalo], dw[3][3];
#pragma GCC unroll 36
      for (int i = 0; i < kPoints; ++i) {
        in[i / kHalo][i % kHalo] = load(m + (i * kGroup + r) * kCols + j, Full{});
      }
      both_ways(in, dw, WeightGradientTransform{});
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) store(&taps[i][r][j], dw[i / 3][i % 3], Full{});
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    for (int i = 0; i < 9; ++i) {
      float* to = p.dw + ((k + j) * 9 + i) * p.c + c;
      for (int64_t r = 0; r < rows; ++r) to[r] = taps[i][r][j] + (add_to ? to[r] : 0.0f);
    }
  }
}

template <class T>
void accumulate(const WinogradWgrad& p) {
  const TileGrid g(p.n, p.oh, p.ow);
  const int64_t chunks = ceil_div(g.count, tiles_a_chunk(p.c + p.k));
  const int64_t size = ceil_div(g.count, chunks);
  const Cut cut(p.c, p.k, p.threads);
  for (int64_t first = 0; first < g.count; first += size) {
    const int64_t count = min64(size, g.count - first);
    const Chunk xs(first, count, p.c), ys(first, count, p.k);
    float* v = floats(0, xs.floats() + ys.floats());
    float* d = v + xs.floats();
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      transform_chunk<kHalo>(v, static_cast<const T*>(p.x), p.h, p.w, p.c, p.padding,
                             InputTransform{}, g, xs, begin, end);
      transform_chunk<kTile>(d, static_cast<const T*>(p.dy), p.oh, p.ow, p.k, 0,
                             GradientTransform{}, g, ys, begin, end);
    });
    // 2. m (group, panel, 36, kGroup, kCols) = sum over tiles of v (36, C, tile) d (36, tile, K),
    // point by point, so that the channels of a job are read once
    constexpr int64_t kProducts = kPoints * kGroup * kCols;
    parallel(cut.jobs, 1, [&](int64_t begin, int64_t end) {
      float* m = floats(1, cut.groups * cut.panels * kProducts);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t c0 = job / cut.across * cut.groups * kGroup;
        const int64_t k0 = job % cut.across * cut.panels * kCols;
        const auto each = [&](auto&& f) {
          for (int64_t i = 0; i < cut.groups; ++i) {
            for (int64_t j = 0; j < cut.panels; ++j) {
              const int64_t c = c0 + i * kGroup, k = k0 + j * kCols;
              if (c < p.c && k < p.k) f(m + (i * cut.panels + j) * kProducts, c, k);
            }
          }
        };
        for (int point = 0; point < kPoints; ++point) {
          each([&](float* to, int64_t c, int64_t k) {
            for (int r = 0; r < kGroup; r += kRows) {
              multiply<kRows>(to + (point * kGroup + r) * kCols, kCols,
                              v + point * xs.plane + xs.at(c + r, 0), 1, kW,
                              d + point * ys.plane + ys.at(k, 0), kW, count * kW, count);
            }
          });
        }
        each([&](float* from, int64_t c, int64_t k) { finish(p, from, c, k, first > 0); });
      }
    });
  }
}

}  // namespace

void winograd_wgrad(const WinogradWgrad& p) {
  if (p.dtype == kF32) {
    accumulate<float>(p);
  } else {
    accumulate<BF16>(p);
  }
}

}  // namespace FASTRES_ISA
}  // namespace fastres
