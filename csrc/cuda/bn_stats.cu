#include "bn_stats.cuh"

#include "launch.cuh"

namespace fastres {
namespace cuda {

void bn_stats(const BnStats& p, float* work, const Place& place) {
  const int wide = lanes("bn_stats", p.act, {p.x}, {p.mean, p.var, p.rstd, work});
  const OnDevice guard("bn_stats", p.act, place);
  const Launch launch{"bn_stats", p.act, place};
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    const Cut c = wide == 8 ? reduction_cut(p.act, 8, 2 * depth<T, 8>())
                            : reduction_cut(p.act, 1, 2 * depth<T, 1>());
    run(launch, c.chunks * c.programs, wide == 8 ? bn_stats_kernel<T, 8> : bn_stats_kernel<T, 1>, p,
        work, c);
    run(launch, ceil_div(c.channels, kFinaliseChannels), bn_stats_finalise_kernel<T>, p,
        static_cast<const float*>(work), c);
  });
}

}  // namespace cuda
}  // namespace fastres
