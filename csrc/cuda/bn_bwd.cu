#include "bn_bwd.cuh"

#include "launch.cuh"

namespace fastres {
namespace cuda {

void finish_sums(const Launch& launch, float* dgamma, float* dbeta, float* res_dgamma,
                 const float* work, const float* rstd, const float* res_rstd, const Cut& c) {
  run(launch, ceil_div(c.channels, kFinaliseChannels), bn_bwd_finalise_kernel, dgamma, dbeta,
      res_dgamma, work, rstd, res_rstd, c);
}

void bn_bwd_reduce(const BnBwdReduce& p, float* work, const Place& place) {
  const bool dual = p.res_dgamma != nullptr;
  const int wide = lanes("bn_bwd_reduce", p.act, {p.dz, p.x, dual ? p.residual : nullptr},
                         {p.mean, p.rstd, p.gamma, p.beta, p.res_mean, p.res_rstd, p.dgamma,
                          p.dbeta, p.res_dgamma, work});
  const OnDevice guard("bn_bwd_reduce", p.act, place);
  const Launch launch{"bn_bwd_reduce", p.act, place};
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    const Cut c =
        wide == 8 ? reduction_cut(p.act, 8, depth<T, 8>()) : reduction_cut(p.act, 1, depth<T, 1>());
    if (wide == 8) {
      run(launch, c.chunks * c.programs,
          dual ? bn_bwd_reduce_kernel<T, 8, true> : bn_bwd_reduce_kernel<T, 8, false>, p, work, c);
    } else {
      run(launch, c.chunks * c.programs,
          dual ? bn_bwd_reduce_kernel<T, 1, true> : bn_bwd_reduce_kernel<T, 1, false>, p, work, c);
    }
    finish_sums(launch, p.dgamma, p.dbeta, p.res_dgamma, work, p.rstd, p.res_rstd, c);
  });
}

void bn_bwd_apply(const BnBwdApply& p, const Place& place) {
  const int wide = lanes("bn_bwd_apply", p.act, {p.dx, p.dres, p.dz, p.x, p.residual},
                         {p.mean, p.rstd, p.gamma, p.beta, p.dgamma, p.dbeta, p.res_mean,
                          p.res_rstd, p.res_gamma, p.res_dgamma});
  const OnDevice guard("bn_bwd_apply", p.act, place);
  const Launch launch{"bn_bwd_apply", p.act, place};
  const bool dual = p.dres != nullptr && p.res_norm;
  const float inverse_count =
      static_cast<float>(1.0 / (static_cast<double>(p.act.n) * static_cast<double>(p.act.s)));
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    const Map m = wide == 8 ? elementwise_map(p.act, 8, depth<T, 8>())
                            : elementwise_map(p.act, 1, depth<T, 1>());
    if (wide == 8) {
      run(launch, m.blocks,
          dual ? bn_bwd_apply_kernel<T, 8, true> : bn_bwd_apply_kernel<T, 8, false>, p,
          inverse_count, m);
    } else {
      run(launch, m.blocks,
          dual ? bn_bwd_apply_kernel<T, 1, true> : bn_bwd_apply_kernel<T, 1, false>, p,
          inverse_count, m);
    }
  });
}

}  // namespace cuda
}  // namespace fastres
