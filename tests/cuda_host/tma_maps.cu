// The convolutions' copies replayed on the host. The tensor maps that CUTLASS asks the driver for
// are kept, and what ConvKernel's loads name is copied as the engine would: cluster by cluster,
// each block its slice, a multicast one to all of them, into rings under the 128-byte swizzle. Each
// GEMM is then computed from the ring, as its layout reads it: exact, in integers, against the
// definition of a conv. So maps, im2col offsets, slices, swizzle, phases, workers and splits are
// proven where there is no GPU; barriers and wgmma are not. Run by ctest (csrc/cuda/build.cmake); a
// line a wrong pass.
#include "conv_finalise.cuh"  // the kernels that the launchers name; nothing else is the device's
#ifndef __CUDA_ARCH__         // whose part would take half of nvcc's time
#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "conv_gemm.cuh"
// run_gemm with its kernel is not wanted: it takes minutes to compile
#define run_gemm run_gemm_on_the_device
#include "conv_cutlass.cuh"
#undef run_gemm
// the launchers' own phases and schedules
#include "conv.cu"
#include "launch.cu"
#define FASTRES_CUDA_HOST  // four workers: each walks several tiles
#include "conv_plan.cu"
#undef FASTRES_CUDA_HOST

namespace fastres {
namespace cuda {

// The launchers are not called, their parts are.
template <template <class, int, int> class Epilogue, ConvPass PASS, class T, int M, int N>
void run_gemm(const Launch& launch, const Gemm&, const ConvSchedule&,
              const typename Epilogue<T, M, N>::Params&) {
  throw std::logic_error(launch.name);
}
void finish_sums(const Launch& launch, float*, float*, float*, const float*, const float*,
                 const float*, const Cut&) {
  throw std::logic_error(launch.name);
}

namespace driver {

struct Map {
  const uint16_t* base;
  int rank;
  int64_t size[5], stride[5];  // in bytes
  int64_t box[5];              // of im2col channels and pixels
  int boxed;                   // modes of the box
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
  map = {static_cast<const uint16_t*>(p), static_cast<int>(rank), {}, {}, {}, 0, {}, {}, {}};
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
  const CUresult result = keep(tiled, type, rank, p, sizes, strides, steps, swizzle);
  for (cuuint32_t i = 0; i < rank; ++i) tiled.box[i] = box[i];
  tiled.boxed = tiled.rank;
  return result;
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
  im2col.box[0] = channels;
  im2col.box[1] = pixels;
  im2col.boxed = 2;
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

// The copy engine: the elements of a box, one after the other, to `put`.
template <class Coordinate, class F>
void tiled_copy(const Coordinate& nested, const F& put) {
  const auto flat = cute::flatten(nested);
  constexpr int kRank = decltype(cute::rank(flat))::value;
  const driver::Map& map = driver::tiled;
  int64_t first[5] = {};
  cute::for_each(cute::make_seq<kRank>{},
                 [&](auto i) { first[i] = static_cast<int64_t>(cute::get<i>(flat)); });
  int64_t size = 1;
  for (int i = 0; i < map.rank; ++i) size *= map.box[i];
  for (int64_t at = 0; at < size; ++at) {
    int64_t offset = 0, rest = at;
    bool inside = true;
    for (int i = 0; i < map.rank; ++i) {
      const int64_t here = first[i] + rest % map.box[i];
      rest /= map.box[i];
      inside = inside && here >= 0 && here < map.size[i];
      offset += here * map.stride[i];
    }
    put(inside ? map.base[offset / 2] : 0);
  }
}

// Rows of channels: the pixels from (w, h, n) on inside the bounding box, each displaced by (s, r);
// 0 outside the tensor. PTX ISA, im2col mode.
template <class Coordinate, class F>
void im2col_copy(const Coordinate& nested, const F& put) {
  const auto flat = cute::flatten(nested);
  const auto get = [&](auto i) { return static_cast<int64_t>(cute::get<i>(flat)); };
  const int64_t c = get(cute::_0{}), s = get(cute::_4{}), r = get(cute::_5{});
  int64_t w = get(cute::_1{}), h = get(cute::_2{}), n = get(cute::_3{});
  driver::expect(s >= 0 && s <= 255 && r >= 0 && r <= 255,
                 "that is read at an offset which im2col does not take");
  const driver::Map& map = driver::im2col;
  for (int64_t i = 0; i < map.box[1]; ++i) {
    const bool inside = w + s >= 0 && w + s < map.size[1] && h + r >= 0 && h + r < map.size[2] &&
                        n >= 0 && n < map.size[3];
    for (int64_t e = 0; e < map.box[0]; ++e) {
      const int64_t offset =
          (c + e) * 2 + (w + s) * map.stride[1] + (h + r) * map.stride[2] + n * map.stride[3];
      put(inside && c + e < map.size[0] ? map.base[offset / 2] : 0);
    }
    w += map.steps[1];
    if (w < map.size[1] + map.upper[0]) continue;
    w = map.lower[0];
    h += map.steps[2];
    if (h < map.size[2] + map.upper[1]) continue;
    h = map.lower[1];
    ++n;
  }
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

int64_t walked[2] = {};  // the most tiles of a worker, wide and narrow
constexpr uint16_t kPoison = 1000;

// put(work, row, column of the tile, sum) for each element of each tile, as ConvKernel makes them.
template <template <class, int, int> class EpilogueOf, ConvPass PASS, class T, int M, int N,
          class F>
void gemm(const Gemm& g, const ConvSchedule& s, const F& put) {
  using namespace cute;
  using Kernel = ConvKernel<EpilogueOf, PASS, T, M, N>;
  using Collective = typename Kernel::Collective;
  using Tile = typename Collective::TileShape;
  using E = typename Element<T>::type;
  constexpr int kRanks = Kernel::kCluster;
  driver::expect(s.cluster == kRanks, "of a schedule with another cluster");
  const auto problem = problem_of<PASS>(g);
  auto p = Collective::to_underlying_arguments(
      problem, {static_cast<const E*>(g.a), static_cast<const E*>(g.b)}, nullptr);
  const auto [rows, columns, depth, batch] = Collective::get_problem_shape_MNKL(problem);
  const auto a = local_tile(p.tma_load_a.get_tma_tensor(make_shape(rows, depth)), Tile{},
                            make_coord(_, _, _), Step<_1, Underscore, _1>{});
  const auto b = local_tile(p.tma_load_b.get_tma_tensor(make_shape(columns, depth)), Tile{},
                            make_coord(_, _, _), Step<Underscore, _1, _1>{});
  const auto depths = shape<3>(a);  // a name: the iterator keeps a reference
  // 1. each block's rings
  using LayoutA = typename Collective::SmemLayoutA;
  using LayoutB = typename Collective::SmemLayoutB;
  constexpr int kSizeA = cosize_v<LayoutA>, kSizeB = cosize_v<LayoutB>;
  struct alignas(1024) Rings {
    uint16_t a[kSizeA], b[kSizeB];
  };
  static std::vector<Rings> shared(kRanks);
  const auto ring_a = [&](int rank) {
    return make_tensor(make_smem_ptr(shared[rank].a), LayoutA{});
  };
  const auto ring_b = [&](int rank) {
    return make_tensor(make_smem_ptr(shared[rank].b), LayoutB{});
  };
  // A copy's instructions; each block in `to` has the box at the same place of its own ring.
  const auto copy = [&](auto im2col, const auto& from, const auto& into, const uint16_t* ring,
                        const std::vector<uint16_t*>& to) {
    const driver::Map& map = decltype(im2col)::value ? driver::im2col : driver::tiled;
    // elements of an instruction: a box, and the slices of it that the others bring
    int all = static_cast<int>(to.size());
    for (int i = 0; i < map.boxed; ++i) all *= static_cast<int>(map.box[i]);
    uint32_t bytes = 0;
    for (int i = 0; i < size(from); i += all) {
      int64_t at = raw_pointer_cast(into.data() + into.layout()(i)) - ring;
      const auto one = [&](uint16_t v) {
        // bits 4-6 of the address turned by bits 7-9; elements have two bytes
        for (uint16_t* block : to) block[at ^ (at >> 6 & 7) << 3] = v;
        ++at;
        bytes += 2;
      };
      if constexpr (decltype(im2col)::value) {
        im2col_copy(from(i), one);
      } else {
        tiled_copy(from(i), one);
      }
    }
    return bytes;
  };
  constexpr bool kWgradPass = PASS == ConvPass::kWgrad;
  const std::bool_constant<!kWgradPass> im2col_a{};
  const std::bool_constant<kWgradPass> im2col_b{};
  Values left(M * kTileK), right(N * kTileK), sums(M * N * kRanks);
  for (int64_t cluster = 0; cluster < s.blocks(); cluster += kRanks) {
    const Work work(s, cluster);
    walked[N == 64] = std::max(walked[N == 64], work.tiles);
    const auto column = idx2crd(static_cast<int>(work.column), shape<2>(b));
    int stage = 0;
    for (int64_t i = 0; i < work.tiles; ++i) {
      auto k = make_coord_iterator(idx2crd(static_cast<int>(work.k_begin), depths), depths);
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t step = work.k_begin; step < work.k_end; ++step, ++k) {
        // 2. the step's copies: A for the block itself, its slice of B for all
        uint32_t bytes[kRanks] = {};
        for (Rings& block : shared) {  // what no copy brings shows
          std::fill_n(block.a + stage * M * kTileK, M * kTileK, kPoison);
          std::fill_n(block.b + stage * N * kTileK, N * kTileK, kPoison);
        }
        for (int r = 0; r < kRanks; ++r) {
          const Work own(s, cluster + r);
          const auto row = idx2crd(static_cast<int>(own.first + i * own.step), shape<2>(a));
          const auto slice_a = p.tma_load_a.get_slice(0);
          const auto slice_b = p.tma_load_b.get_slice(r);
          bytes[r] +=
              copy(im2col_a, slice_a.partition_S(a(_, _, row, _))(_, _, _, *k),
                   slice_a.partition_D(ring_a(r))(_, _, _, stage), shared[r].a, {shared[r].a});
          std::vector<uint16_t*> all;
          for (Rings& block : shared) all.push_back(block.b);
          const uint32_t sent =
              copy(im2col_b, slice_b.partition_S(b(_, _, column, _))(_, _, _, *k),
                   slice_b.partition_D(ring_b(r))(_, _, _, stage), shared[r].b, all);
          for (uint32_t& arrived : bytes) arrived += sent;
        }
        for (int r = 0; r < kRanks; ++r) {
          driver::expect(bytes[r] == p.tma_transaction_bytes,
                         "whose bytes a barrier does not wait for");
          // 3. what the rings hold, multiplied
          const auto ring_of_a = ring_a(r);
          const auto ring_of_b = ring_b(r);
          for (int e = 0; e < kTileK; ++e) {
            for (int m = 0; m < M; ++m) left[e * M + m] = ring_of_a(m, e, stage);
            for (int n = 0; n < N; ++n) right[e * N + n] = ring_of_b(n, e, stage);
          }
          for (int e = 0; e < kTileK; ++e) {
            for (int m = 0; m < M; ++m) {
              const int value = left[e * M + m];
              if (value == 0) continue;
              int* sum = &sums[(r * M + m) * N];
              for (int n = 0; n < N; ++n) sum[n] += value * right[e * N + n];
            }
          }
        }
        stage = (stage + 1) % Kernel::kStages;
      }
      for (int r = 0; r < kRanks; ++r) {
        const Work own(s, cluster + r);
        for (int m = 0; m < M; ++m) {
          for (int n = 0; n < N; ++n) {
            put(own, (own.first + i * own.step) * M + m, n, sums[(r * M + m) * N + n]);
          }
        }
      }
    }
  }
}

// On the tile of the schedule; fp16 on the wide one alone.
template <template <class, int, int> class EpilogueOf, ConvPass PASS, class T, class F>
void replay(const Gemm& g, const ConvSchedule& s, const F& put) {
  if (s.tile_n == 128) return gemm<EpilogueOf, PASS, T, 128, 128>(g, s, put);
  if constexpr (std::is_same_v<T, BF16>) {
    gemm<EpilogueOf, PASS, T, PASS == ConvPass::kWgrad ? 128 : 256, 64>(g, s, put);
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

// The three passes of a layer on the tiles of a place in their lists.
template <class T>
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
  replay<StatsEpilogue, kFprop, T>(fprop, f, put_y);
  // 2. dgrad, phase by phase
  for_phases(v, dy.data(), w.data(), tile, [&](const PhaseGemm& phase) {
    const ConvSchedule& s = phase.schedule;
    const auto put = [&](const Work& work, int64_t row, int n, int sum) {
      const int64_t c = work.column * s.tile_n + n;
      if (row < phase.pixels.rows && c < v.c) {
        got.dx[static_cast<size_t>(pixel_of(phase.pixels, row) * v.c + c)] = sum;
      }
    };
    replay<GradientEpilogue, kDgrad, T>(phase.gemm, s, put);
  });
  // 3. wgrad, its splits added
  const ConvSchedule g = wgrad_schedule(v, tile);
  const int64_t of_tap = ceil_div(v.c, g.tile_n);
  const auto put_dw = [&](const Work& work, int64_t row, int n, int sum) {
    const int64_t c = work.column % of_tap * g.tile_n + n, tap = work.column / of_tap;
    if (row < v.k && c < v.c) got.dw[static_cast<size_t>((row * v.r * v.s + tap) * v.c + c)] += sum;
  };
  const Gemm wgrad = gemm_of(v, dy.data(), x.data());
  replay<PartialEpilogue, kWgrad, T>(wgrad, g, put_dw);
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
    {3, 8, 24, 25, 24, 3, 3, 1, 1, 1}, {2, 16, 19, 16, 40, 3, 3, 2, 1, 1},
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
    for (const int tile : {1, 2}) wrong += check_layer<BF16>(v, tile);
    checked += 6;
    if (&l != &kLayers[3]) continue;
    v.dtype = kF16;
    wrong += check_layer<F16>(v, 1);
    checked += 3;
  }
  if (walked[0] < 3 || walked[1] < 2) {
    std::printf("no worker walked\n");
    ++wrong;
  }
  std::printf("%d passes, %d wrong, %d bad maps\n", checked, wrong, driver::wrong);
  return wrong + driver::wrong;
}

}  // namespace cuda
}  // namespace fastres

int main() { return fastres::cuda::check_all() == 0 ? 0 : 1; }
#endif
