#include "bn_relu_maxpool.cuh"

#include <stdexcept>

#include "launch.cuh"

namespace fastres {
namespace cuda {
namespace {

Pool checked(const char* op, const Act& x, const PoolGeometry& g) {
  const int64_t most = INT32_MAX;  // pixels and rows are counted in 32 bits
  if (x.outer > most || x.s > most || x.n * g.oh * g.ow > most || g.kernel < 1 || g.kernel > 15 ||
      g.stride < 1) {
    throw std::invalid_argument("fastres cuda: " + describe(op, x) +
                                ": too large, or a window that is not 1 to 15 wide");
  }
  return Pool{static_cast<uint32_t>(g.h),
              static_cast<uint32_t>(g.w),
              static_cast<uint32_t>(g.oh),
              static_cast<uint32_t>(g.ow),
              g.kernel,
              g.stride,
              g.padding};
}

// The stem's kernel: NHWC, 3 x 3, stride 2, all aligned, the index to 8 bytes.
bool is_stem(int wide, const Act& act, const PoolGeometry& g, const void* index) {
  return wide == 8 && act.nhwc && g.kernel == 3 && g.stride == 2 &&
         reinterpret_cast<uintptr_t>(index) % 8 == 0;
}

}  // namespace

void bn_relu_maxpool(const BnReluMaxpool& p, const Place& place) {
  const char* op = "bn_relu_maxpool";
  const int wide = lanes(op, p.act, {p.z, p.x}, {p.mean, p.rstd, p.gamma, p.beta});
  const Pool g = checked(op, p.act, p.pool);
  const OnDevice guard(op, p.act, place);
  const Launch launch{op, p.act, place};
  Act z = p.act;
  z.s = p.pool.oh * p.pool.ow;
  z.outer = z.nhwc ? z.n * z.s : z.n * z.c;
  z.inner = z.nhwc ? z.c : z.s;
  z.mask_row = 0;
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_stem(wide, p.act, p.pool, p.index)) {
      const Map m = elementwise_map(z, 8, 1);
      run(launch, m.blocks, bn_relu_maxpool_kernel<T, 8>, p, g, m);
    } else {
      const Map m = elementwise_map(z, 1, 1);
      run(launch, m.blocks, bn_relu_maxpool_kernel<T, 1>, p, g, m);
    }
  });
}

void bn_relu_maxpool_bwd_reduce(const BnReluMaxpoolBwd& p, float* work, const Place& place) {
  const char* op = "bn_relu_maxpool_bwd_reduce";
  const int wide = lanes(op, p.act, {p.dz, p.x}, {p.mean, p.rstd, p.dgamma, p.dbeta, work});
  const Pool g = checked(op, p.act, p.pool);
  const OnDevice guard(op, p.act, place);
  const Launch launch{op, p.act, place};
  const bool stem = is_stem(wide, p.act, p.pool, p.index);
  const Cut c = reduction_cut(p.act, stem ? 8 : 1, 1);
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    run(launch, c.chunks * c.programs,
        stem ? bn_relu_maxpool_bwd_reduce_kernel<T, 8> : bn_relu_maxpool_bwd_reduce_kernel<T, 1>, p,
        g, work, c);
  });
  finish_sums(launch, p.dgamma, p.dbeta, nullptr, work, p.rstd, nullptr, c);
}

void bn_relu_maxpool_bwd_apply(const BnReluMaxpoolBwd& p, const Place& place) {
  const char* op = "bn_relu_maxpool_bwd_apply";
  const int wide =
      lanes(op, p.act, {p.dx, p.dz, p.x}, {p.mean, p.rstd, p.gamma, p.dgamma, p.dbeta});
  const Pool g = checked(op, p.act, p.pool);
  const OnDevice guard(op, p.act, place);
  const Launch launch{op, p.act, place};
  const bool stem = is_stem(wide, p.act, p.pool, p.index);
  const Map m = elementwise_map(p.act, stem ? 8 : 1, 1);
  const float inverse_count =
      static_cast<float>(1.0 / (static_cast<double>(p.act.n) * static_cast<double>(p.act.s)));
  with_dtype(p.act.dtype, [&](auto type) {
    using T = decltype(type);
    run(launch, m.blocks,
        stem ? bn_relu_maxpool_bwd_apply_kernel<T, 8> : bn_relu_maxpool_bwd_apply_kernel<T, 1>, p,
        g, inverse_count, m);
  });
}

}  // namespace cuda
}  // namespace fastres
