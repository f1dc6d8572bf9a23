// run_gemm on the CPU: plain loops stand in for the tensor cores and the copy engine; the workers,
// their tiles, the epilogues and everything around the GEMM are those of the GPU.
#include "cuda/conv_gemm.cuh"

namespace fastres {
namespace cuda {
namespace {

template <class T>
float at(const void* p, int64_t i) {
  return widen(static_cast<const T*>(p)[i]);
}

struct Pixel {
  int64_t n, i, j;
};
Pixel pixel_of(int64_t m, int64_t h, int64_t w) { return {m / (h * w), m / w % h, m % w}; }

// Element (row, column) of the GEMM, its depth cut to the 64-steps [begin, end).
template <ConvPass PASS, class T>
float element(const Gemm& g, int tile_n, int64_t row, int64_t column, int64_t begin, int64_t end) {
  float sum = 0.0f;
  if (PASS == kWgrad) {
    // a tile of columns lies in one tap: c, then s, then r
    const int64_t tiles = (g.c + tile_n - 1) / tile_n, tile = column / tile_n;
    const int64_t c = tile % tiles * tile_n + column % tile_n, s = tile / tiles % g.s,
                  r = tile / tiles / g.s;
    if (row >= g.k || c >= g.c) return 0.0f;
    const int64_t pixels = g.n * g.p * g.q;
    for (int64_t m = begin * kTileK; m < end * kTileK && m < pixels; ++m) {
      const Pixel o = pixel_of(m, g.p, g.q);
      const int64_t h = o.i * g.stride_h - g.pad_h + r * g.dil_h;
      const int64_t w = o.j * g.stride_w - g.pad_w + s * g.dil_w;
      if (h < 0 || h >= g.h || w < 0 || w >= g.w) continue;
      sum += at<T>(g.a, m * g.k + row) * at<T>(g.b, ((o.n * g.h + h) * g.w + w) * g.c + c);
    }
    return sum;
  }
  const int64_t rows = PASS == kFprop ? g.n * g.p * g.q : g.n * g.h * g.w;
  if (row >= rows || column >= (PASS == kFprop ? g.k : g.c) || begin == end) return 0.0f;
  const Pixel o = PASS == kFprop ? pixel_of(row, g.p, g.q) : pixel_of(row, g.h, g.w);
  for (int64_t r = 0; r < g.r; ++r) {
    for (int64_t s = 0; s < g.s; ++s) {
      const int64_t tap = r * g.stride_r + s * g.stride_s;
      if (PASS == kFprop) {
        const int64_t h = o.i * g.stride_h - g.pad_h + r * g.dil_h;
        const int64_t w = o.j * g.stride_w - g.pad_w + s * g.dil_w;
        if (h < 0 || h >= g.h || w < 0 || w >= g.w) continue;
        for (int64_t c = 0; c < g.c; ++c) {
          sum += at<T>(g.a, ((o.n * g.h + h) * g.w + w) * g.c + c) *
                 at<T>(g.b, column * g.stride_k + tap + c);
        }
      } else {
        const int64_t p = o.i + g.pad_h - r * g.dil_h, q = o.j + g.pad_w - s * g.dil_w;
        if (p < 0 || p >= g.p || q < 0 || q >= g.q) continue;
        for (int64_t k = 0; k < g.k; ++k) {
          sum += at<T>(g.a, ((o.n * g.p + p) * g.q + q) * g.k + k) *
                 at<T>(g.b, k * g.stride_k + tap + column);
        }
      }
    }
  }
  return sum;
}

template <template <class, int, int> class EpilogueOf, ConvPass PASS, class T, int M, int N>
void conv_kernel(Gemm gemm, ConvSchedule schedule, typename EpilogueOf<T, M, N>::Params params) {
  FASTRES_SHARED(float, stage, (M * ConvTile<M, N>::kPitch));
  FASTRES_SHARED(float, counts, kThreads);
  FASTRES_SHARED(float, means, 3 * kThreads * 8);
  FASTRES_SHARED(float, squares, kThreads * 8);
  const ConvWork work(schedule, blockIdx.x);
  EpilogueOf<T, M, N> epilogue(params, work);
  for (int64_t i = 0; i < work.tiles; ++i) {
    const int64_t m0 = (work.first + i * work.step) * M;
    for (int cell = static_cast<int>(threadIdx.x); cell < M * N; cell += kThreads) {
      const int row = cell / N, column = cell % N;
      stage[row * ConvTile<M, N>::kPitch + column] =
          element<PASS, T>(gemm, N, m0 + row, work.column * N + column, work.k_begin, work.k_end);
    }
    EpilogueBarrier{}();
    epilogue.tile(stage, m0);
    EpilogueBarrier{}();
  }
  epilogue.finish(work, counts, means, squares);
}

}  // namespace

template <template <class, int, int> class EpilogueOf, ConvPass PASS, class T, int M, int N>
void run_gemm(const Launch& launch, const Gemm& gemm, const ConvSchedule& schedule,
              const typename EpilogueOf<T, M, N>::Params& params) {
  run(launch, schedule.blocks(), conv_kernel<EpilogueOf, PASS, T, M, N>, gemm, schedule, params);
}

// What the collectives' can_implement says of these; they do not compile here.
template <ConvPass PASS>
std::string gemm_why_not(const Gemm& g) {
  const bool outside = g.pad_h < 0 || g.pad_w < 0 || g.pad_h > 127 || g.pad_w > 127 ||
                       (g.r - 1) * g.dil_h > 127 || (g.s - 1) * g.dil_w > 127;
  return outside ? "padding, dilation or size is past what the copy engine's im2col takes" : "";
}

template std::string gemm_why_not<kFprop>(const Gemm&);
template std::string gemm_why_not<kDgrad>(const Gemm&);
template std::string gemm_why_not<kWgrad>(const Gemm&);

#define FASTRES_CONV(Epilogue, PASS, T, M, N)                                                      \
  template void run_gemm<Epilogue, PASS, T, M, N>(const Launch&, const Gemm&, const ConvSchedule&, \
                                                  const Epilogue<T, M, N>::Params&);
#define FASTRES_CONVS(T)                              \
  FASTRES_CONV(StatsEpilogue, kFprop, T, 128, 128)    \
  FASTRES_CONV(StatsEpilogue, kFprop, T, 256, 64)     \
  FASTRES_CONV(ActEpilogue, kFprop, T, 128, 128)      \
  FASTRES_CONV(ActEpilogue, kFprop, T, 256, 64)       \
  FASTRES_CONV(GradientEpilogue, kDgrad, T, 128, 128) \
  FASTRES_CONV(GradientEpilogue, kDgrad, T, 256, 64)  \
  FASTRES_CONV(PartialEpilogue, kWgrad, T, 128, 128)  \
  FASTRES_CONV(PartialEpilogue, kWgrad, T, 128, 64)
FASTRES_CONVS(BF16)
FASTRES_CONVS(F16)

}  // namespace cuda
}  // namespace fastres
