#include "add_relu.cuh"

#include "launch.cuh"

namespace fastres {
namespace cuda {

void add_relu(const AddRelu& p, const Place& place) {
  const int wide = lanes("add_relu", p.act, {p.z, p.a, p.b}, {});
  const OnDevice guard("add_relu", p.act, place);
  const Launch launch{"add_relu", p.act, place};
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    const bool mask = p.mask != nullptr;
    if (wide == 8) {
      const Map m = flat_map(p.act, 8, depth<T, 8>(), mask);
      run(launch, m.blocks, add_relu_kernel<T, 8>, p, m);
    } else {
      const Map m = flat_map(p.act, 1, depth<T, 1>(), mask);
      run(launch, m.blocks, add_relu_kernel<T, 1>, p, m);
    }
  });
}

void relu_bwd(const ReluBwd& p, const Place& place) {
  const int wide = lanes("relu_bwd", p.act, {p.dx, p.dy, p.dz}, {});
  const OnDevice guard("relu_bwd", p.act, place);
  const Launch launch{"relu_bwd", p.act, place};
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    if (wide == 8) {
      const Map m = flat_map(p.act, 8, depth<T, 8>(), true);
      run(launch, m.blocks, relu_bwd_kernel<T, 8>, p, m);
    } else {
      const Map m = flat_map(p.act, 1, depth<T, 1>(), true);
      run(launch, m.blocks, relu_bwd_kernel<T, 1>, p, m);
    }
  });
}

}  // namespace cuda
}  // namespace fastres
