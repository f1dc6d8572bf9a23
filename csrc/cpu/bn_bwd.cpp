// Backward of bn_apply, in two passes. g = dz gated by the mask, by the recomputed z, or not at
// all.
//
// bn_bwd_reduce: dbeta = sum g; dgamma = sum g * (x - mean) * rstd; res_dgamma likewise with res_*
//   Traffic: reads 2-3 tensors. Accumulation: fp32 per tile, tiles summed in double in tile order.
// bn_bwd_apply: dx = gamma * rstd * (g - dbeta / M - (x - mean) * rstd * dgamma / M)
//   Traffic: reads 2-3 tensors, writes 1-2. Arithmetic: fp32.
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

// g, from parameters q[0] = mean, q[1] = gamma * rstd, q[2] = beta where it is recomputed
template <class T, int GATE, class L>
FASTRES_INLINE VF gated(const T* dz, const uint8_t* mask, VF x, const VF* q, L lanes) {
  const VF g = load(dz, lanes);
  if constexpr (GATE == kGateMask) return keep(load_bits(mask, lanes), g);
  if constexpr (GATE == kGateRecompute) {
    // exactly bn_apply's z: same operations, same rounding
    return keep(passes_stored<T>(normalise(x, q[0], q[1], q[2])), g);
  }
  return g;
}

// --- bn_bwd_reduce
// --------------------------------------------------------------------------------

template <class T, int GATE, bool RES>
struct ReduceBody {
  static constexpr int kAcc = RES ? 3 : 2;
  static constexpr int kGatePar =
      GATE == kGateRecompute ? 3 : 1;  // mean alone, or all of normalise
  static constexpr int kPar = kGatePar + (RES ? 1 : 0);
  static constexpr bool kPivot = false;
  const T* dz;
  const uint8_t* mask;
  const T* x;
  const T* residual;

  FASTRES_INLINE void prefetch(int64_t off) const {
    fetch(dz + off);
    fetch(x + off);
    if constexpr (RES) fetch(residual + off);
  }
  template <class L>
  FASTRES_INLINE void operator()(VF* acc, const VF* q, int64_t off, int64_t moff, L lanes) const {
    const VF xv = load(x + off, lanes);
    const VF g = gated<T, GATE>(dz + off, mask + moff, xv, q, lanes);
    acc[0] = add(acc[0], g);
    acc[1] = fma(g, sub(xv, q[0]), acc[1]);
    if constexpr (RES) acc[2] = fma(g, sub(load(residual + off, lanes), q[kGatePar]), acc[2]);
  }
};

template <class T, int GATE, bool RES>
void launch_reduce(const BnBwdReduce& p) {
  using Body = ReduceBody<T, GATE, RES>;
  const Act& a = p.act;
  const Tiles t(a);
  const Params par(Body::kPar, a.c, workspace<Body>(a, t));
  par.copy(0, p.mean, 0.0f);
  if constexpr (GATE == kGateRecompute) {
    par.scale(1, p.gamma, p.rstd);
    par.copy(2, p.beta, 0.0f);
  }
  if constexpr (RES) par.copy(Body::kGatePar, p.res_mean, 0.0f);
  float* ws = par.after(Body::kPar);
  // 1. tiles
  reduce(a, t,
         Body{static_cast<const T*>(p.dz), p.mask, static_cast<const T*>(p.x),
              static_cast<const T*>(p.residual)},
         par, ws);
  // 2. merge in tile order
  const int64_t cpad = padded(a.c);
  const int64_t stride = Body::kAcc * cpad;
  for_each_channel_block(a, t, [&](int64_t c, int64_t n) {
    double sum[kMergeBlock];
    merge_sums(sum, ws, t.count, stride, c, n);
    for (int64_t j = 0; j < n; ++j) p.dbeta[c + j] = static_cast<float>(sum[j]);
    merge_sums(sum, ws + cpad, t.count, stride, c, n);
    for (int64_t j = 0; j < n; ++j) {
      const double rstd = p.rstd != nullptr ? p.rstd[c + j] : 1.0;
      p.dgamma[c + j] = static_cast<float>(sum[j] * rstd);
    }
    if constexpr (RES) {
      merge_sums(sum, ws + 2 * cpad, t.count, stride, c, n);
      for (int64_t j = 0; j < n; ++j) {
        const double rstd = p.res_rstd != nullptr ? p.res_rstd[c + j] : 1.0;
        p.res_dgamma[c + j] = static_cast<float>(sum[j] * rstd);
      }
    }
  });
}

// --- bn_bwd_apply
// ---------------------------------------------------------------------------------

enum Shortcut { kNoDres = 0, kDresIsG = 1, kDresNormalised = 2 };

// One BN's dx from g: training: a * (g - b - (x - mean) * k), else a * g.
struct Affine {
  static constexpr int kPar = 4;  // mean, a, b, k
  template <bool TRAINING>
  FASTRES_INLINE static VF dx(VF g, VF x, const VF* q) {
    if constexpr (TRAINING) g = fnma(sub(x, q[0]), q[3], sub(g, q[2]));
    return mul(g, q[1]);
  }
};

// Parameters: 0-3 x's mean, a, b, k; 4-7 the shortcut's, or 4 the beta of a recomputed z (a is its
// scale).
template <class T, int GATE, int DRES, bool TRAINING, bool RES_TRAINING>
struct DxBody {
  static constexpr int kPar = DRES == kDresNormalised ? 8 : GATE == kGateRecompute ? 5 : 4;
  T *dx, *dres;
  const T* dz;
  const uint8_t* mask;
  const T* x;
  const T* residual;

  FASTRES_INLINE void prefetch(int64_t off) const {
    fetch(dz + off);
    if constexpr (TRAINING || GATE == kGateRecompute) fetch(x + off);
    if constexpr (DRES == kDresNormalised && RES_TRAINING) fetch(residual + off);
  }
  template <class L>
  FASTRES_INLINE void operator()(int64_t off, int64_t moff, const VF* q, L lanes) const {
    // 1. g
    VF xv = zero();
    if constexpr (TRAINING || GATE == kGateRecompute) xv = load(x + off, lanes);
    VF z[3] = {q[0], q[1], q[0]};
    if constexpr (GATE == kGateRecompute) z[2] = q[4];
    const VF g = gated<T, GATE>(dz + off, mask + moff, xv, z, lanes);
    // 2. the shortcut's gradient
    if constexpr (DRES == kDresNormalised) {
      VF rv = zero();
      if constexpr (RES_TRAINING) rv = load(residual + off, lanes);
      const VF dr = Affine::dx<RES_TRAINING>(g, rv, q + 4);
      // 3. dx
      const VF d = Affine::dx<TRAINING>(g, xv, q);
      store(dres + off, dr, lanes);
      store(dx + off, d, lanes);
    } else {
      const VF d = Affine::dx<TRAINING>(g, xv, q);
      if constexpr (DRES == kDresIsG) store_rounded(dres + off, g, lanes);  // g is dz, exact in T
      store(dx + off, d, lanes);
    }
  }
};

void fill_affine(const Params& par, int at, const float* mean, const float* rstd,
                 const float* gamma, const float* dgamma, const float* dbeta, bool training,
                 double count) {
  par.copy(at, mean, 0.0f);
  par.scale(at + 1, gamma, rstd);
  const float inv = static_cast<float>(1.0 / count);
  float* b = par[at + 2];
  float* k = par[at + 3];
  for (int64_t c = 0; c < par.c; ++c) {
    const float r = rstd != nullptr ? rstd[c] : 1.0f;
    b[c] = training ? dbeta[c] * inv : 0.0f;
    k[c] = training ? dgamma[c] * inv * r : 0.0f;
  }
}

template <class T, int GATE, int DRES, bool TRAINING, bool RES_TRAINING>
void launch_apply(const BnBwdApply& p) {
  using Body = DxBody<T, GATE, DRES, TRAINING, RES_TRAINING>;
  const double count = static_cast<double>(p.act.n) * static_cast<double>(p.act.s);
  const Params par(Body::kPar, p.act.c);
  fill_affine(par, 0, p.mean, p.rstd, p.gamma, p.dgamma, p.dbeta, TRAINING, count);
  if constexpr (DRES == kDresNormalised) {
    fill_affine(par, 4, p.res_mean, p.res_rstd, p.res_gamma, p.res_dgamma, p.dbeta, RES_TRAINING,
                count);
  } else if constexpr (GATE == kGateRecompute) {
    par.copy(4, p.beta, 0.0f);
  }
  for_each_vector<Body::kPar>(
      p.act, par,
      Body{static_cast<T*>(p.dx), static_cast<T*>(p.dres), static_cast<const T*>(p.dz), p.mask,
           static_cast<const T*>(p.x), static_cast<const T*>(p.residual)});
}

template <class T, int GATE>
void choose_shortcut(const BnBwdApply& p) {
  if (p.dres == nullptr) {
    p.training ? launch_apply<T, GATE, kNoDres, true, false>(p)
               : launch_apply<T, GATE, kNoDres, false, false>(p);
  } else if (!p.res_norm) {
    p.training ? launch_apply<T, GATE, kDresIsG, true, false>(p)
               : launch_apply<T, GATE, kDresIsG, false, false>(p);
  } else if constexpr (GATE != kGateRecompute) {  // the contract: no residual with "recompute"
    if (p.res_training) {
      p.training ? launch_apply<T, GATE, kDresNormalised, true, true>(p)
                 : launch_apply<T, GATE, kDresNormalised, false, true>(p);
    } else {
      p.training ? launch_apply<T, GATE, kDresNormalised, true, false>(p)
                 : launch_apply<T, GATE, kDresNormalised, false, false>(p);
    }
  }
}

template <class T, int GATE>
void choose_residual(const BnBwdReduce& p) {
  if constexpr (GATE != kGateRecompute) {
    if (p.res_dgamma != nullptr) return launch_reduce<T, GATE, true>(p);
  }
  launch_reduce<T, GATE, false>(p);
}

}  // namespace

void bn_bwd_reduce(const BnBwdReduce& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.gate == kGateMask) {
      choose_residual<T, kGateMask>(p);
    } else if (p.gate == kGateRecompute) {
      choose_residual<T, kGateRecompute>(p);
    } else {
      choose_residual<T, kGateNone>(p);
    }
  });
}

void bn_bwd_apply(const BnBwdApply& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.gate == kGateMask) {
      choose_shortcut<T, kGateMask>(p);
    } else if (p.gate == kGateRecompute) {
      choose_shortcut<T, kGateRecompute>(p);
    } else {
      choose_shortcut<T, kGateNone>(p);
    }
  });
}

}  // namespace FASTRES_ISA
}  // namespace fastres
