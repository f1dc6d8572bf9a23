#include "pointwise_fprop.cuh"

#include "pointwise_launch.cuh"

namespace fastres {
namespace cuda {
namespace {

// 256 columns: 128 accumulators a thread, of 232 registers; 32 of fragments and 16 of statistics
// fit beside them. The prologue is repeated for each tile of columns, about 70 issue slots of a
// warp for a 16-deep slice, 140 of a scheduler, against 256 cycles of wgmma at 256 columns, 128 at
// 128. conv_fprop_act has no prologue and more in its epilogue: it spills at 256.
template <int FORM>
Needs fprop_needs(int row_planes) {
  Needs needs;
  needs.y = FORM == kBlock;
  needs.row_planes = row_planes;
  needs.column_planes = FORM == kAct ? 3 : 0;
  return needs;
}

// Where the vectors over many channels leave no room for a ring of wide tiles (the block form with
// two norms, C > 3520), 128 columns; a tile that was asked for is left to check_ring.
template <int FORM>
int fprop_columns(int64_t c, int64_t k, int row_planes, int tile) {
  const int n = tile_columns(FORM == kAct ? kPointFpropAct : kPointFprop, k, tile);
  if (tile != 0) return n;
  const int steps = static_cast<int>(ceil_div(c, kTileChannels));
  const bool fits = shared_memory(steps, n, fprop_needs<FORM>(row_planes)).stages >= kStagesLeast;
  return n == 256 && !fits ? 128 : n;
}

template <int FORM>
Schedule fprop_schedule(int64_t rows, int64_t c, int64_t k, int row_planes, int tile) {
  return schedule(rows, c, k, fprop_columns<FORM>(c, k, row_planes, tile),
                  fprop_needs<FORM>(row_planes));
}

template <int FORM>
PointwiseShape fprop_shape(int64_t rows, int64_t c, int64_t k, int row_planes) {
  return shape_of(fprop_schedule<FORM>(rows, c, k, row_planes, 0),
                  fprop_columns<FORM>(c, k, row_planes, 0));
}

template <int FORM>
void launch_fprop(Launch launch, PointwiseFprop& p, const void* x, const void* weight,
                  const void* shortcut, int tile) {
  const Act& act = launch.act;
  const int row_planes = 3 * (p.norm + p.res_norm);
  const int n = fprop_columns<FORM>(p.c, p.k, row_planes, tile);
  p.s = fprop_schedule<FORM>(act.outer, p.c, p.k, row_planes, tile);
  check_ring(launch, p.s);
  p.x = tensor_map(launch, x, act.outer, p.c, kTileRows);
  p.w = tensor_map(launch, weight, p.k, p.c, n);
  if (FORM == kBlock) p.shortcut = tensor_map(launch, shortcut, act.outer, p.c, kTileRows);
  launch.threads = kPointwiseThreads;
  launch.shared = static_cast<int>(p.s.bytes);
  with_half(act.dtype, [&](auto type) {
    using T = decltype(type);
    auto kernel =
        n == 64 ? pointwise_fprop_kernel<T, 64, FORM> : pointwise_fprop_kernel<T, 128, FORM>;
    if constexpr (FORM != kAct) {
      if (n == 256) kernel = pointwise_fprop_kernel<T, 256, FORM>;
    }
    run(launch, p.s.chunks * p.s.columns, kernel, p);
  });
}

}  // namespace

PointwiseShape pointwise_fprop_shape(int form, int64_t rows, int64_t c, int64_t k) {
  if (form == kBlock) return fprop_shape<kBlock>(rows, c, k, 6);
  return form == kAct ? fprop_shape<kAct>(rows, c, k, 0) : fprop_shape<kPlain>(rows, c, k, 3);
}

// No form has more chunks: a narrower tile means more columns of them, and fewer chunks.
int64_t pointwise_fprop_floats(int64_t rows, int64_t c, int64_t k, int tile) {
  return 2 * fprop_schedule<kPlain>(rows, c, k, 3, tile).chunks * k;
}

void pointwise_fprop(const PointwiseFpropArgs& a, float* work, const Place& place) {
  const Launch launch{"conv_fprop", a.act, place};
  const OnDevice guard("conv_fprop", a.act, place);
  check_pointwise(launch, a.k, {a.y, a.x, a.weight, a.shortcut, a.z});
  PointwiseFprop p{};
  p.y = a.y;
  p.part = a.mean == nullptr ? nullptr : work;
  p.mean = a.norm.mean;
  p.rstd = a.norm.rstd;
  p.gamma = a.norm.gamma;
  p.beta = a.norm.beta;
  p.norm = a.has_norm;
  p.res_mean = a.shortcut_norm.mean;
  p.res_rstd = a.shortcut_norm.rstd;
  p.res_gamma = a.shortcut_norm.gamma;
  p.res_beta = a.shortcut_norm.beta;
  p.res_norm = a.has_shortcut_norm;
  p.z = a.z;
  p.z_mask = a.z_mask;
  p.c = a.act.c;
  p.k = a.k;
  if (a.shortcut != nullptr) {
    launch_fprop<kBlock>(launch, p, a.x, a.weight, a.shortcut, a.tile);
  } else {
    launch_fprop<kPlain>(launch, p, a.x, a.weight, nullptr, a.tile);
  }
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
  launch_fprop<kAct>(launch, p, a.x, a.weight, nullptr, a.tile);
}

}  // namespace cuda
}  // namespace fastres
