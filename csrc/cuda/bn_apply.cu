#include "bn_apply.cuh"

#include "launch.cuh"

namespace fastres {
namespace cuda {

void bn_apply(const BnApply& p, const Place& place) {
  const int wide =
      lanes("bn_apply", p.act, {p.z, p.x, p.residual},
            {p.mean, p.rstd, p.gamma, p.beta, p.res_mean, p.res_rstd, p.res_gamma, p.res_beta});
  const OnDevice guard("bn_apply", p.act, place);
  const Launch launch{"bn_apply", p.act, place};
  const bool dual = p.residual != nullptr && p.res_norm;
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    const Map m = wide == 8 ? elementwise_map(p.act, 8, depth<T, 8>())
                            : elementwise_map(p.act, 1, depth<T, 1>());
    if (wide == 8) {
      run(launch, m.blocks, dual ? bn_apply_kernel<T, 8, true> : bn_apply_kernel<T, 8, false>, p,
          m);
    } else {
      run(launch, m.blocks, dual ? bn_apply_kernel<T, 1, true> : bn_apply_kernel<T, 1, false>, p,
          m);
    }
  });
}

}  // namespace cuda
}  // namespace fastres
