// dw = wgrad of a 3x3 convolution of stride 1, NHWC, by Winograd's F(4x4, 3x3) transposed: the
// gradient of y = A^T [(G w G^T) . V] A in w.
// Traffic: reads x 2.25 times (the halos from cache) and dy once; the transformed tiles of a chunk
// stay in L3. Few channels: those of a block stay in L2, and x is read once a panel of dy.
// Accumulation: fp32 over the tiles of a chunk (a block), then over the chunks (the blocks of a
// part, then the parts), in order, whatever the number of threads.
#include <algorithm>

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
    transform_tile<R>(x, h, w, c, c, win, transform, [&](int64_t i, const VF(&made)[kHalo][kHalo]) {
      store_points(v + chunk.at(i, t), chunk.plane, made);
    });
  }
}

// 3. dw (K, 3, 3, C) (+)= G^T m G for kGroup input channels from c, kCols output channels from k;
// m (36, kGroup, kCols)
void finish(const WinogradWgrad& p, const float* m, int64_t c, int64_t k, bool add_to) {
  const int64_t rows = min64(kGroup, p.c - c), width = min64(kCols, p.k - k);
  float taps[9][kGroup][kCols];
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < width; j += kW) {
      VF in[kHalo][kHalo], dw[3][3];
      load_points(in, m + r * kCols + j, kGroup * kCols);
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

// Few channels: the sums of a panel stay in L2, and so do the transformed tensors of a block of
// tiles. A thread takes parts of the tiles, whose number depends on the shape alone.
constexpr int64_t kFewSums = 64 * 64;    // C * K
constexpr int64_t kParts = 16;           // at most
constexpr int64_t kPartTiles = 64;       // at least
constexpr int64_t kBlock = 128 << 10;    // bytes of both transformed tensors of a block, or
constexpr int64_t kBlockTiles = 16;      // tiles, for the sums are read and written once a block
constexpr int64_t kWorkspace = 4 << 20;  // bytes: the sums of all parts
constexpr int64_t kProducts = kPoints * kGroup * kCols;

// A block of transformed tiles: (36, tile, channels).
struct Block {
  float* data;
  int64_t row, plane;  // floats
  Block(float* data, int64_t tiles, int64_t channels)
      : data(data), row(channels), plane(tiles * channels + 16) {}
  int64_t floats() const { return kPoints * plane; }
};

// m (kGroup, kCols), rows of kCols, (+)= sum over tiles of v (tile, kGroup) d (tile, VECS * kW)
template <int VECS>
void multiply_block(float* m, const float* v, int64_t v_row, const float* d, int64_t d_row,
                    int64_t tiles, bool add_to) {
  constexpr int kR = (kW >= 16 ? 16 : 8) / VECS;
  for (int r = 0; r < kGroup; r += kR) {
    multiply<kR, VECS>(m + r * kCols, kCols, v + r, 1, v_row, d, d_row, kW, tiles, add_to);
  }
}

// m (group, 36, kGroup, kCols) (+)= the products of `tiles` tiles from `first` on, for the output
// channels from k on; v and d are room for them
template <class T>
void add_block(float* m, const WinogradWgrad& p, const TileGrid& g, const Block& v, const Block& d,
               int64_t first, int64_t tiles, int64_t k, bool add_to) {
  const int64_t width = min64(kCols, p.k - k);
  for (int64_t t = 0; t < tiles; ++t) {
    transform_tile<kHalo>(static_cast<const T*>(p.x), p.h, p.w, p.c, p.c,
                          Window(g, first + t, p.padding, kHalo, p.h, p.w), InputTransform{},
                          [&](int64_t c, const VF(&made)[kHalo][kHalo]) {
                            store_points(v.data + t * v.row + c, v.plane, made);
                          });
    transform_tile<kTile>(static_cast<const T*>(p.dy) + k, p.oh, p.ow, p.k, width,
                          Window(g, first + t, 0, kTile, p.oh, p.ow), GradientTransform{},
                          [&](int64_t c, const VF(&made)[kHalo][kHalo]) {
                            store_points(d.data + t * d.row + c, d.plane, made);
                          });
  }
  for (int point = 0; point < kPoints; ++point) {
    for (int64_t c = 0; c < v.row; c += kGroup) {
      float* to = m + (c * kPoints + point * kGroup) * kCols;
      const float* a = v.data + point * v.plane + c;
      const float* b = d.data + point * d.plane;
      if (d.row <= kCols / 2) {
        multiply_block<kVecs / 2>(to, a, v.row, b, d.row, tiles, add_to);
      } else {
        multiply_block<kVecs>(to, a, v.row, b, d.row, tiles, add_to);
      }
    }
  }
}

// How many parts the tiles are cut into, each with `sums` floats.
int64_t parts_of(int64_t tiles, int64_t sums) {
  return max64(1, min64(min64(kParts, tiles / kPartTiles), kWorkspace / (sums * 4)));
}

template <class T>
void accumulate_few(const WinogradWgrad& p, const TileGrid& g) {
  const int64_t groups = ceil_div(p.c, kGroup), panels = ceil_div(p.k, kCols);
  const int64_t sums = groups * panels * kProducts, parts = parts_of(g.count, sums);
  const int64_t size = ceil_div(g.count, parts);
  const int64_t rows = groups * kGroup;
  const int64_t fit = kBlock / (kPoints * 4 * (rows + min64(kCols, p.k)));
  const int64_t block = min64(size, max64(kBlockTiles, fit));
  float* all = floats(0, parts * sums);  // (part, panel, group, 36, kGroup, kCols)
  parallel(parts * panels, 1, [&](int64_t begin, int64_t end) {
    Block v(nullptr, block, rows);
    const int64_t room = v.floats() + Block(nullptr, block, kCols).floats();
    v.data = floats(1, room);
    for (int64_t job = begin; job < end; ++job) {
      const int64_t part = job / panels, k = job % panels * kCols;
      const Block d(v.data + v.floats(), block, ceil_div(min64(kCols, p.k - k), kW) * kW);
      const int64_t start = part * size, stop = min64(g.count, start + size);
      for (int64_t first = start; first < stop; first += block) {
        add_block<T>(all + job * groups * kProducts, p, g, v, d, first, min64(block, stop - first),
                     k, first > start);
      }
    }
  });
  parallel(kPoints * groups * panels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kGroup * kCols; i < end * kGroup * kCols; i += kW) {
      VF sum = load(all + i, Full{});
      for (int64_t part = 1; part * size < g.count; ++part) {
        sum = add(sum, load(all + part * sums + i, Full{}));
      }
      store(all + i, sum, Full{});
    }
  });
  parallel(groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      finish(p, all + i * kProducts, i % groups * kGroup, i / groups * kCols, false);
    }
  });
}

template <class T>
void accumulate(const WinogradWgrad& p) {
  const TileGrid g(p.n, p.oh, p.ow);
  if (g.count == 0) {
    std::fill(p.dw, p.dw + p.k * 9 * p.c, 0.0f);
    return;
  }
  if (p.c * p.k <= kFewSums) return accumulate_few<T>(p, g);
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

int64_t winograd_wgrad_jobs(const WinogradWgrad& p) {
  if (p.c * p.k > kFewSums) return Cut(p.c, p.k, p.threads).jobs;
  const int64_t panels = ceil_div(p.k, kCols), sums = ceil_div(p.c, kGroup) * panels * kProducts;
  return panels * parts_of(TileGrid(p.n, p.oh, p.ow).count, sums);
}

void winograd_wgrad(const WinogradWgrad& p) {
  if (p.dtype == kF32) {
    accumulate<float>(p);
  } else {
    accumulate<BF16>(p);
  }
}

}  // namespace FASTRES_ISA
}  // namespace fastres
