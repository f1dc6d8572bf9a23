#include "pointwise_wgrad.cuh"

#include "pointwise_launch.cuh"

namespace fastres {
namespace cuda {
namespace {

// At most 256 columns: 128 accumulators a thread, no epilogue to feed. A tile of 128 x 256
// multiplies 85 times what it loads of L2 (2 * 128 * 256 / (128 + 256) / 2 flops a byte), of 128 x
// 128 64 times.
int columns_of(int64_t c, int tile) { return tile_columns(kPointWgrad, c, tile); }

// Steps of 64 pixels that a split has at least: its ring must fill, its partial be stored.
constexpr int64_t kLeastSteps = 8;

Schedule wgrad_schedule(int64_t rows, int64_t c, int64_t k, bool y, bool mask, bool norm,
                        int tile) {
  const int n = columns_of(c, tile);
  const int64_t tiles = ceil_div(k, kTileRows) * ceil_div(c, n);
  Needs needs;
  needs.y = y;
  needs.bits = mask ? kTileChannels * kTileRows / 8 : 0;
  needs.column_planes = norm ? 3 : 0;
  needs.staging = false;
  Schedule s = shared_memory(0, n, needs);
  s.rows = rows;
  s.columns = static_cast<int>(tiles);
  const int64_t steps = ceil_div(rows, kTileChannels);
  int64_t splits = blocks() / tiles;
  if (splits > steps / kLeastSteps) splits = steps / kLeastSteps;
  s.tiles = ceil_div(steps, splits < 1 ? 1 : splits);
  s.chunks = ceil_div(steps, s.tiles);
  return s;
}

}  // namespace

int64_t pointwise_wgrad_floats(int64_t rows, int64_t c, int64_t k, int tile) {
  return wgrad_schedule(rows, c, k, true, true, true, tile).chunks * k * c;
}

PointwiseShape pointwise_wgrad_shape(int64_t rows, int64_t c, int64_t k) {
  return shape_of(wgrad_schedule(rows, c, k, true, true, true, 0), columns_of(c, 0));
}

void pointwise_wgrad(const PointwiseWgradArgs& a, float* work, const Place& place) {
  const OnDevice guard("conv_wgrad", a.act, place);
  const Launch small{"conv_wgrad", a.act, place};
  check_pointwise(small, a.k, {a.dz, a.x, a.bn.y, work});
  const int64_t rows = a.act.outer, c = a.act.c;
  const int n = columns_of(c, a.tile);
  PointwiseWgrad p{};
  p.part = work;
  p.mask = a.mask;
  p.bn = norm_backward(a.bn, a.has_bn, rows);
  p.mean = a.norm.mean;
  p.rstd = a.norm.rstd;
  p.gamma = a.norm.gamma;
  p.beta = a.norm.beta;
  p.norm = a.has_norm;
  p.c = c;
  p.k = a.k;
  p.c_tiles = static_cast<int>(ceil_div(c, n));
  const bool read_y = p.bn.on && p.bn.training;
  p.s = wgrad_schedule(rows, c, a.k, read_y, p.mask != nullptr, p.norm, a.tile);
  check_ring(small, p.s);
  p.g = tensor_map(small, a.dz, rows, a.k, kTileChannels);
  if (read_y) p.y = tensor_map(small, a.bn.y, rows, a.k, kTileChannels);
  p.x = tensor_map(small, a.x, rows, c, kTileChannels);
  Launch launch = small;
  launch.threads = kPointwiseThreads;
  launch.shared = static_cast<int>(p.s.bytes);
  with_half(a.act.dtype, [&](auto type) {
    using T = decltype(type);
    run(launch, p.s.chunks * p.s.columns,
        n == 64    ? pointwise_wgrad_kernel<T, 64>
        : n == 128 ? pointwise_wgrad_kernel<T, 128>
                   : pointwise_wgrad_kernel<T, 256>,
        p);
    run(small, ceil_div(a.k * c, kThreads), pointwise_wgrad_finalise_kernel<T>, a.dw,
        static_cast<const float*>(work), a.k * c, c, a.stride_k, a.stride_c, p.s.chunks);
  });
}

}  // namespace cuda
}  // namespace fastres
