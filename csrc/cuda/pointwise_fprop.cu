#include "pointwise_fprop.cuh"

#include "pointwise_launch.cuh"

namespace fastres {
namespace cuda {
namespace {

// 256 columns: 128 accumulators a thread, of 232 registers; 32 of fragments and 16 of statistics
// fit beside them. The prologue is repeated for each tile of columns, about 70 issue slots of a
// warp for a 16-deep slice, 140 of a scheduler, against 256 cycles of wgmma at 256 columns, 128 at
// 128. conv_fprop_act has no prologue and more in its epilogue: it spills at 256.
template <bool ACT>
int fprop_columns(int64_t k) {
  return tile_columns(k, ACT ? 128 : 256);
}

template <bool ACT>
Schedule fprop_schedule(int64_t rows, int64_t c, int64_t k, bool norm) {
  Needs needs;
  needs.row_planes = norm ? 3 : 0;
  needs.column_planes = ACT ? 3 : 0;
  return schedule(rows, c, k, fprop_columns<ACT>(k), needs);
}

template <bool ACT>
void launch_fprop(Launch launch, PointwiseFprop& p, const void* x, const void* weight) {
  const Act& act = launch.act;
  const int n = fprop_columns<ACT>(p.k);
  p.s = fprop_schedule<ACT>(act.outer, p.c, p.k, p.norm);
  p.x = tensor_map(launch, x, act.outer, p.c, kTileRows);
  p.w = tensor_map(launch, weight, p.k, p.c, n);
  launch.threads = kPointwiseThreads;
  launch.shared = static_cast<int>(p.s.bytes);
  with_half(act.dtype, [&](auto type) {
    using T = decltype(type);
    auto kernel =
        n == 64 ? pointwise_fprop_kernel<T, 64, ACT> : pointwise_fprop_kernel<T, 128, ACT>;
    if constexpr (!ACT) {
      if (n == 256) kernel = pointwise_fprop_kernel<T, 256, ACT>;
    }
    run(launch, p.s.chunks * p.s.columns, kernel, p);
  });
}

}  // namespace

int64_t pointwise_fprop_floats(int64_t rows, int64_t c, int64_t k) {
  return 2 * fprop_schedule<false>(rows, c, k, true).chunks * k;
}

void pointwise_fprop(const PointwiseFpropArgs& a, float* work, const Place& place) {
  const Launch launch{"conv_fprop", a.act, place};
  const OnDevice guard("conv_fprop", a.act, place);
  check_pointwise(launch, a.k, {a.y, a.x, a.weight});
  PointwiseFprop p{};
  p.y = a.y;
  p.part = a.mean == nullptr ? nullptr : work;
  p.mean = a.norm.mean;
  p.rstd = a.norm.rstd;
  p.gamma = a.norm.gamma;
  p.beta = a.norm.beta;
  p.norm = a.has_norm;
  p.c = a.act.c;
  p.k = a.k;
  launch_fprop<false>(launch, p, a.x, a.weight);
  if (a.mean != nullptr) {
    run(launch, ceil_div(a.k, kFinaliseChannels), pointwise_stats_finalise_kernel, a.mean, a.var,
        a.rstd, static_cast<const float*>(work), a.eps, a.k, p.s.rows, p.s.tiles * kTileRows,
        p.s.chunks);
  }
}

void pointwise_fprop_act(const PointwiseFpropActArgs& a, const Place& place) {
  const Launch launch{"conv_fprop_act", a.act, place};
  const OnDevice guard("conv_fprop_act", a.act, place);
  check_pointwise(launch, a.k, {a.z, a.x, a.weight, a.residual});
  PointwiseFprop p{};
  p.y = a.z;
  p.out_mean = a.norm.mean;
  p.out_rstd = a.norm.rstd;
  p.out_gamma = a.norm.gamma;
  p.out_beta = a.norm.beta;
  p.residual = a.residual;
  p.relu = a.relu;
  p.c = a.act.c;
  p.k = a.k;
  launch_fprop<true>(launch, p, a.x, a.weight);
}

}  // namespace cuda
}  // namespace fastres
