#include "pointwise_dgrad.cuh"

#include "pointwise_launch.cuh"

namespace fastres {
namespace cuda {
namespace {

// At most 128 columns: beside 64 accumulators and 32 fragments, the epilogue holds 6 units of 4
// registers in flight and 24 sums; 256 columns spill 56 registers. From 1024 columns on the tiles
// wait for g and y, read from L2 for each (bench/pointwise_model.py): there the vendor's conv may
// be faster.
int columns_of(int64_t c, int tile) { return tile_columns(kPointDgrad, c, tile); }

Schedule dgrad_schedule(int64_t rows, int64_t c, int64_t k, bool bn, bool y, bool mask, bool prev,
                        int tile) {
  Needs needs;
  needs.y = y;
  needs.bits = mask ? kTileRows * kTileChannels / 8 : 0;
  needs.row_planes = bn ? 4 : 0;
  needs.column_planes = prev ? 4 : 0;
  return schedule(rows, k, c, columns_of(c, tile), needs);
}

}  // namespace

int64_t pointwise_dgrad_floats(int64_t rows, int64_t c, int64_t k, int parts, int tile) {
  return parts * dgrad_schedule(rows, c, k, true, true, true, true, tile).chunks * c;
}

PointwiseShape pointwise_dgrad_shape(int64_t rows, int64_t c, int64_t k) {
  return shape_of(dgrad_schedule(rows, c, k, true, true, true, true, 0), columns_of(c, 0));
}

void pointwise_dgrad(const PointwiseDgradArgs& a, float* work, const Place& place) {
  const OnDevice guard("conv_dgrad", a.act, place);
  const Launch small{"conv_dgrad", a.act, place};
  check_pointwise(small, a.k, {a.dx, a.dz, a.weight, a.bn.y, a.dres, a.prev_y, a.dual});
  const int64_t rows = a.act.outer, c = a.act.c;
  PointwiseDgrad p{};
  p.dx = a.dx;
  p.part = work;
  p.mask = a.mask;
  p.bn = norm_backward(a.bn, a.has_bn, rows);
  p.res = a.dres;
  p.res_mask = a.dres_mask;
  p.prev = a.prev_y;
  p.prev_mask = a.prev_mask;
  p.prev_mean = a.prev.mean;
  p.prev_rstd = a.prev.rstd;
  p.prev_gamma = a.prev.gamma;
  p.prev_beta = a.prev.beta;
  p.dual = a.dual;
  p.dual_mean = a.dual_mean;
  p.c = c;
  p.k = a.k;
  const bool read_y = p.bn.on && p.bn.training;
  p.s = dgrad_schedule(rows, c, a.k, p.bn.on, read_y, p.mask != nullptr, p.prev != nullptr, a.tile);
  check_ring(small, p.s);
  p.g = tensor_map(small, a.dz, rows, a.k, kTileRows);
  if (read_y) p.y = tensor_map(small, a.bn.y, rows, a.k, kTileRows);
  p.w = tensor_map(small, a.weight, a.k, c, kTileChannels);
  Launch launch = small;
  launch.threads = kPointwiseThreads;
  launch.shared = static_cast<int>(p.s.bytes);
  with_half(a.act.dtype, [&](auto type) {
    using T = decltype(type);
    run(launch, p.s.chunks * p.s.columns,
        columns_of(c, a.tile) == 64 ? pointwise_dgrad_kernel<T, 64>
                                    : pointwise_dgrad_kernel<T, 128>,
        p);
  });
  if (a.prev_y != nullptr) {
    Cut cut{};
    cut.chunks = p.s.chunks;
    cut.channels = c;
    finish_sums(small, a.dgamma, a.dbeta, a.res_dgamma, work, a.prev.rstd, a.dual_rstd, cut);
  }
}

}  // namespace cuda
}  // namespace fastres
