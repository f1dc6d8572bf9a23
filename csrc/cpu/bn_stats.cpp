// mean[c], var[c] = mean and biased variance of x over (N, H, W); rstd = 1 / sqrt(var + eps)
// Traffic: reads 1 tensor.
// Accumulation: fp32 sums of x - pivot per tile, tiles merged by Chan's rule in double, in tile
// order.
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

// The pivot, the mean of the tile's first values, takes the mean's magnitude out before squaring.
// Taken relative to the very first value, so that a constant channel has variance 0 exactly.
template <class T>
struct StatsBody {
  static constexpr int kAcc = 2, kPar = 1;
  static constexpr bool kPivot = true;
  const T* x;

  FASTRES_INLINE void prefetch(int64_t off) const { fetch(x + off); }
  template <class L>
  FASTRES_INLINE void operator()(VF* acc, const VF* q, int64_t off, int64_t, L lanes) const {
    const VF d = keep_lanes(sub(load(x + off, lanes), q[0]), lanes);
    acc[0] = add(acc[0], d);
    acc[1] = fma(d, d, acc[1]);
  }
};

void finish(const BnStats& p, const Tiles& t, const float* ws) {
  const int64_t cpad = padded(p.act.c);
  for_each_channel_block(p.act, t, [&](int64_t c, int64_t n) {
    double mean[kMergeBlock], m2[kMergeBlock];
    for (int64_t j = 0; j < n; ++j) mean[j] = m2[j] = 0.0;
    double seen = 0.0;
    // 3. merge tiles: (seen, mean, m2) + (count, tile mean, tile m2)
    for (int64_t tile = 0; tile < t.count; ++tile) {
      const float* sum = ws + tile * 3 * cpad + c;
      const float* sq = sum + cpad;
      const float* pivot = sq + cpad;
      const double count = static_cast<double>(t.values(p.act, tile));
      const double inv = 1.0 / count;
      const double weight = count / (seen + count);
      const double cross = seen * weight;
      for (int64_t j = 0; j < n; ++j) {
        const double s = sum[j];
        const double tile_m2 = sq[j] - s * s * inv;
        const double delta = pivot[j] + s * inv - mean[j];
        mean[j] += delta * weight;
        m2[j] += (tile_m2 < 0.0 ? 0.0 : tile_m2) + delta * delta * cross;
      }
      seen += count;
    }
    // 4. finalise
    for (int64_t j = 0; j < n; ++j) {
      const double var = m2[j] / seen;
      p.mean[c + j] = static_cast<float>(mean[j]);
      p.var[c + j] = static_cast<float>(var);
      p.rstd[c + j] = static_cast<float>(1.0 / __builtin_sqrt(var + p.eps));
    }
  });
}

}  // namespace

void bn_stats(const BnStats& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Body = StatsBody<T>;
    const Tiles t(p.act);
    const Params none(0, p.act.c, workspace<Body>(p.act, t));
    reduce(p.act, t, Body{static_cast<const T*>(p.x)}, none, none.data);
    finish(p, t, none.data);
  });
}

}  // namespace FASTRES_ISA
}  // namespace fastres
