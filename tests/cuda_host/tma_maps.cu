// The convolutions' copies replayed on the host. The tensor maps that CUTLASS asks the driver for
// are kept, and each GEMM is computed from what its copies would bring, in the order and at the
// coordinates of ConvKernel's loads: exact, in integers, against the definition of a conv. So maps,
// im2col offsets, phases, workers and splits are proven where there is no GPU; the swizzle within a
// tile, barriers and wgmma are not. Run by ctest (csrc/cuda/build.cmake); a line a wrong pass.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "conv_cutlass.cuh"
// the launchers' own phases and schedules
#include "conv.cu"
#include "conv_plan.cu"

namespace fastres {
namespace cuda {
namespace driver {

struct Map {
  const uint16_t* base;
  int rank;
  int64_t size[5], stride[5];  // in bytes
  int lower[2], upper[2];      // im2col: of W and H
  int steps[5];
} tiled, im2col;

int wrong = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("a tensor map %s\n", what);
  ++wrong;
}

CUresult keep(Map& map, CUtensorMapDataType type, cuuint32_t rank, void* p, const cuuint64_t* sizes,
              const cuuint64_t* strides, const cuuint32_t* steps, CUtensorMapSwizzle swizzle) {
  map = {static_cast<const uint16_t*>(p), static_cast<int>(rank), {}, {}, {}, {}, {}};
  for (int i = 0; i < map.rank; ++i) {
    map.size[i] = static_cast<int64_t>(sizes[i]);
    map.stride[i] = i == 0 ? 2 : static_cast<int64_t>(strides[i - 1]);
    map.steps[i] = static_cast<int>(steps[i]);
    expect(sizes[i] >= 1 && sizes[i] <= 1ull << 32, "of a size that no map takes");
    expect(i == 0 || (map.stride[i] % 16 == 0 && map.stride[i] < 1ll << 40),
           "of a stride that no map takes");
  }
  expect(type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_UINT16,
         "of a type that has not two bytes");
  expect(swizzle == CU_TENSOR_MAP_SWIZZLE_128B, "without the 128-byte swizzle");
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* made, CUtensorMapDataType type, cuuint32_t rank,
                                void* p, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *made = {};
  expect(box[0] * 2 == 128, "whose box is not as wide as its swizzle");
  for (cuuint32_t i = 0; i < rank; ++i) {
    expect(box[i] >= 1 && box[i] <= 256 && steps[i] == 1, "of a box that no map takes");
  }
  return keep(tiled, type, rank, p, sizes, strides, steps, swizzle);
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* made, CUtensorMapDataType type, cuuint32_t rank,
                                 void* p, const cuuint64_t* sizes, const cuuint64_t* strides,
                                 const int* lower, const int* upper, cuuint32_t channels,
                                 cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave,
                                 CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  *made = {};
  expect(rank == 4 && channels * 2 == 128 && pixels <= 1024, "of a box that im2col does not take");
  const CUresult result = keep(im2col, type, rank, p, sizes, strides, steps, swizzle);
  for (int i = 0; i < 2; ++i) {
    im2col.lower[i] = lower[i];
    im2col.upper[i] = upper[i];
    expect(lower[i] >= -128 && lower[i] <= 127 && upper[i] >= -128 && upper[i] <= 127,
           "of a corner that im2col does not take");
  }
  return result;
}

void begin() {}
void check(const Launch&) {}

}  // namespace driver

namespace {

using Values = std::vector<int>;

// What a tiled copy brings for one element; 0 outside the tensor.
template <class Coordinate>
int tiled_at(const Coordinate& nested) {
  const auto flat = cute::flatten(nested);
  constexpr int kRank = decltype(cute::rank(flat))::value;
  const driver::Map& map = driver::tiled;
  int64_t at[kRank];
  cute::for_each(cute::make_seq<kRank>{},
                 [&](auto i) { at[i] = static_cast<int64_t>(cute::get<i>(flat)); });
  int64_t offset = 0;
  for (int i = 0; i < kRank && i < map.rank; ++i) {
    if (at[i] < 0 || at[i] >= map.size[i]) return 0;
    offset += at[i] * map.stride[i];
  }
  return map.base[offset / 2];
}

// What an im2col copy brings: `pixels` rows of 64 channels, the pixels from (w, h, n) on inside the
// bounding box, each displaced by (s, r); 0 outside the tensor. PTX ISA, im2col mode.
template <class Coordinate>
Values im2col_of(const Coordinate& nested, int pixels) {
  const auto flat = cute::flatten(nested);
  const auto get = [&](auto i) { return static_cast<int64_t>(cute::get<i>(flat)); };
  const int64_t c = get(cute::_0{}), s = get(cute::_4{}), r = get(cute::_5{});
  int64_t w = get(cute::_1{}), h = get(cute::_2{}), n = get(cute::_3{});
  driver::expect(s >= 0 && s <= 255 && r >= 0 && r <= 255,
                 "that is read at an offset which im2col does not take");
  const driver::Map& map = driver::im2col;
  Values out(static_cast<size_t>(pixels) * kTileK, 0);
  for (int i = 0; i < pixels; ++i) {
    const bool inside = w + s >= 0 && w + s < map.size[1] && h + r >= 0 && h + r < map.size[2] &&
                        n >= 0 && n < map.size[3];
    for (int e = 0; inside && e < kTileK && c + e < map.size[0]; ++e) {
      const int64_t offset =
          (c + e) * 2 + (w + s) * map.stride[1] + (h + r) * map.stride[2] + n * map.stride[3];
      out[static_cast<size_t>(i * kTileK + e)] = map.base[offset / 2];
    }
    w += map.steps[1];
    if (w < map.size[1] + map.upper[0]) continue;
    w = map.lower[0];
    h += map.steps[2];
    if (h < map.size[2] + map.upper[1]) continue;
    h = map.lower[1];
    ++n;
  }
  return out;
}

// ConvWork and Pixels, which are the device's; tests/test_cuda_conv.py runs those on the host shim.
struct Work {
  int64_t column, first, step, tiles, k_begin, k_end;
  Work(const ConvSchedule& s, int64_t block) {
    const int64_t index = block % s.workers, split = block / s.workers / s.columns;
    const int64_t group = index / s.cluster * s.per, groups = ceil_div(s.m_tiles, s.cluster);
    column = block / s.workers % s.columns;
    first = group * s.cluster + index % s.cluster;
    step = s.cluster;
    tiles = std::min(groups - group, s.per);
    k_begin = split * s.k_per;
    k_end = std::min(k_begin + s.k_per, s.k_tiles);
  }
};

int64_t pixel_of(const Pixels& p, int64_t row) {
  if (p.dense) return row;
  const int64_t j = row % p.grid_w, i = row / p.grid_w % p.grid_h, n = row / p.grid_w / p.grid_h;
  return (n * p.h + p.first_h + i * p.stride_h) * p.w + p.first_w + j * p.stride_w;
}

// put(work, row, column of the tile, sum) for each element of each tile, as ConvKernel makes them.
template <ConvPass PASS, int M, int N, class F>
void gemm(const Gemm& g, const ConvSchedule& s, const F& put) {
  using namespace cute;
  using Collective = typename Mainloop<PASS, BF16, M, N, 1, 2>::type;
  using Tile = typename Collective::TileShape;
  using E = cutlass::bfloat16_t;
  const auto problem = problem_of<PASS>(g);
  auto p = Collective::to_underlying_arguments(
      problem, {static_cast<const E*>(g.a), static_cast<const E*>(g.b)}, nullptr);
  const auto [rows, columns, depth, batch] = Collective::get_problem_shape_MNKL(problem);
  const auto a = local_tile(p.tma_load_a.get_tma_tensor(make_shape(rows, depth)), Tile{},
                            make_coord(_, _, _), Step<_1, Underscore, _1>{});
  const auto b = local_tile(p.tma_load_b.get_tma_tensor(make_shape(columns, depth)), Tile{},
                            make_coord(_, _, _), Step<Underscore, _1, _1>{});
  const auto depths = shape<3>(a);  // a name: the iterator keeps a reference
  Values left(M * kTileK), right(N * kTileK), sums(M * N);
  for (int64_t block = 0; block < s.blocks(); ++block) {
    const Work work(s, block);
    const auto column = idx2crd(static_cast<int>(work.column), shape<2>(b));
    for (int64_t i = 0; i < work.tiles; ++i) {
      const auto row = idx2crd(static_cast<int>(work.first + i * work.step), shape<2>(a));
      auto k = make_coord_iterator(idx2crd(static_cast<int>(work.k_begin), depths), depths);
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t step = work.k_begin; step < work.k_end; ++step, ++k) {
        // 1. the step's copies
        if constexpr (PASS != ConvPass::kWgrad) {
          left = im2col_of(a(0, 0, row, *k), M);
          for (int n = 0; n < N; ++n) {
            for (int e = 0; e < kTileK; ++e) right[n * kTileK + e] = tiled_at(b(n, e, column, *k));
          }
        } else {
          for (int m = 0; m < M; ++m) {
            for (int e = 0; e < kTileK; ++e) left[m * kTileK + e] = tiled_at(a(m, e, row, *k));
          }
          for (int n = 0; n < N; n += kTileK) {  // 64 pixels of 64 channels, N-major
            const Values pixels = im2col_of(b(n, 0, column, *k), kTileK);
            for (int e = 0; e < kTileK; ++e) {
              for (int c = 0; c < kTileK; ++c) right[(n + c) * kTileK + e] = pixels[e * kTileK + c];
            }
          }
        }
        // 2. their product
        for (int m = 0; m < M; ++m) {
          for (int n = 0; n < N; ++n) {
            int sum = 0;
            for (int e = 0; e < kTileK; ++e) sum += left[m * kTileK + e] * right[n * kTileK + e];
            sums[m * N + n] += sum;
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
          put(work, (work.first + i * work.step) * M + m, n, sums[m * N + n]);
        }
      }
    }
  }
}

std::vector<uint16_t> random_values(int64_t size, unsigned seed) {
  std::vector<uint16_t> out(static_cast<size_t>(size));
  for (uint16_t& v : out) {
    seed = seed * 1664525u + 1013904223u;
    v = static_cast<uint16_t>((seed >> 24) % 7);
  }
  return out;
}

// y, dx and dw by the definition.
struct Truth {
  Values y, dx, dw;
};

Truth truth_of(const ConvShape& v, const uint16_t* x, const uint16_t* w, const uint16_t* dy) {
  Truth out{Values(static_cast<size_t>(v.n * v.p * v.q * v.k)),
            Values(static_cast<size_t>(v.n * v.h * v.w * v.c)),
            Values(static_cast<size_t>(v.k * v.r * v.s * v.c))};
  for (int64_t i = 0; i < v.n * v.p * v.q * v.r * v.s; ++i) {
    const int64_t s = i % v.s, r = i / v.s % v.r, pixel = i / (v.s * v.r);
    const int64_t q = pixel % v.q, p = pixel / v.q % v.p, n = pixel / (v.q * v.p);
    const int64_t h = p * v.stride_h - v.pad_h + r * v.dil_h;
    const int64_t wide = q * v.stride_w - v.pad_w + s * v.dil_w;
    if (h < 0 || h >= v.h || wide < 0 || wide >= v.w) continue;
    for (int64_t k = 0; k < v.k; ++k) {
      for (int64_t c = 0; c < v.c; ++c) {
        const int64_t a = ((n * v.h + h) * v.w + wide) * v.c + c;
        const int64_t b = ((k * v.r + r) * v.s + s) * v.c + c, o = pixel * v.k + k;
        out.y[static_cast<size_t>(o)] += x[a] * w[b];
        out.dx[static_cast<size_t>(a)] += dy[o] * w[b];
        out.dw[static_cast<size_t>(b)] += dy[o] * x[a];
      }
    }
  }
  return out;
}

// The three passes of a layer on the tiles of a place in their lists (0: by shape).
int check_layer(const ConvShape& v, int tile) {
  const auto x = random_values(v.n * v.h * v.w * v.c, 1),
             w = random_values(v.k * v.r * v.s * v.c, 2),
             dy = random_values(v.n * v.p * v.q * v.k, 3);
  const Truth want = truth_of(v, x.data(), w.data(), dy.data());
  Truth got{Values(want.y.size(), -1), Values(want.dx.size(), -1), Values(want.dw.size(), 0)};
  // 1. fprop
  const ConvSchedule f = fprop_schedule(v, tile);
  const auto put_y = [&](const Work& work, int64_t row, int n, int sum) {
    const int64_t k = work.column * f.tile_n + n;
    if (row < v.n * v.p * v.q && k < v.k) got.y[static_cast<size_t>(row * v.k + k)] = sum;
  };
  const Gemm fprop = gemm_of(v, x.data(), w.data());
  f.tile_n == 64 ? gemm<ConvPass::kFprop, 256, 64>(fprop, f, put_y)
                 : gemm<ConvPass::kFprop, 128, 128>(fprop, f, put_y);
  // 2. dgrad, phase by phase
  for_phases(v, dy.data(), w.data(), tile, [&](const PhaseGemm& phase) {
    const ConvSchedule& s = phase.schedule;
    const auto put = [&](const Work& work, int64_t row, int n, int sum) {
      const int64_t c = work.column * s.tile_n + n;
      if (row < phase.pixels.rows && c < v.c) {
        got.dx[static_cast<size_t>(pixel_of(phase.pixels, row) * v.c + c)] = sum;
      }
    };
    s.tile_n == 64 ? gemm<ConvPass::kDgrad, 256, 64>(phase.gemm, s, put)
                   : gemm<ConvPass::kDgrad, 128, 128>(phase.gemm, s, put);
  });
  // 3. wgrad, its splits added
  const ConvSchedule g = wgrad_schedule(v, tile);
  const int64_t of_tap = ceil_div(v.c, g.tile_n);
  const auto put_dw = [&](const Work& work, int64_t row, int n, int sum) {
    const int64_t c = work.column % of_tap * g.tile_n + n, tap = work.column / of_tap;
    if (row < v.k && c < v.c) got.dw[static_cast<size_t>((row * v.r * v.s + tap) * v.c + c)] += sum;
  };
  const Gemm wgrad = gemm_of(v, dy.data(), x.data());
  g.tile_n == 64 ? gemm<ConvPass::kWgrad, 128, 64>(wgrad, g, put_dw)
                 : gemm<ConvPass::kWgrad, 128, 128>(wgrad, g, put_dw);
  int wrong = 0;
  const auto compare = [&](const char* pass, const Values& a, const Values& b) {
    if (a == b) return;
    std::printf("%s is wrong on %s, tile %d\n", pass, shape_of(v).c_str(), tile);
    ++wrong;
  };
  compare("fprop", got.y, want.y);
  compare("dgrad", got.dx, want.dx);
  compare("wgrad", got.dw, want.dw);
  return wrong;
}

// n c h w, k r s, stride, padding, dilation: one tile and several, columns past the end, odd sizes,
// phases without taps, taps far apart, a stride past the filter.
constexpr int kLayers[][10] = {
    {2, 64, 8, 8, 48, 1, 1, 1, 0, 1},  {1, 24, 12, 12, 136, 1, 1, 1, 0, 1},
    {2, 16, 9, 9, 40, 1, 1, 2, 0, 1},  {2, 16, 13, 12, 72, 3, 3, 1, 1, 1},
    {2, 8, 16, 17, 24, 3, 3, 1, 1, 1}, {2, 16, 19, 16, 40, 3, 3, 2, 1, 1},
    {1, 8, 15, 14, 16, 7, 7, 2, 3, 1}, {1, 16, 9, 9, 16, 3, 3, 1, 2, 2},
    {1, 8, 11, 10, 16, 3, 3, 3, 2, 2}, {1, 8, 6, 9, 16, 1, 3, 1, 0, 1},
    {3, 72, 7, 7, 72, 3, 3, 2, 1, 1},  {2, 136, 5, 5, 72, 3, 3, 1, 1, 1},
    {5, 8, 14, 14, 8, 3, 3, 2, 0, 1},  {2, 8, 12, 11, 8, 5, 5, 4, 2, 1}};

}  // namespace

int check_all() {
  int wrong = 0, checked = 0;
  for (const auto& l : kLayers) {
    ConvShape v{kBF16, l[0], l[2], l[3], l[1], l[4], l[5], l[6],
                0,     0,    l[7], l[7], l[8], l[8], l[9], l[9]};
    v.p = (v.h + 2 * v.pad_h - v.dil_h * (v.r - 1) - 1) / v.stride_h + 1;
    v.q = (v.w + 2 * v.pad_w - v.dil_w * (v.s - 1) - 1) / v.stride_w + 1;
    const std::string why = conv_why_not(v);
    if (!why.empty()) {
      std::printf("%s is refused: %s\n", shape_of(v).c_str(), why.c_str());
      ++wrong;
      continue;
    }
    for (const int tile : {1, 2}) wrong += check_layer(v, tile);
    checked += 6;
  }
  std::printf("%d passes, %d wrong, %d bad maps\n", checked, wrong, driver::wrong);
  return wrong + driver::wrong;
}

}  // namespace cuda
}  // namespace fastres

int main() { return fastres::cuda::check_all() == 0 ? 0 : 1; }
