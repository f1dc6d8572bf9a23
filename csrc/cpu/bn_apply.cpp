// z = act(normalise(x) + r); r = 0, residual, or normalise(residual); act = relu or identity
// Traffic: reads 1 or 2 tensors, writes 1 (and 1 bit per element).
// Arithmetic: fp32; the mask is taken from z as stored.
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

enum Residual { kNoResidual = 0, kIdentity = 1, kNormalised = 2 };
enum Activation { kLinear = 0, kRelu = 1, kReluMask = 2 };

template <class T, int RES, int ACT>
struct ApplyBody {
  static constexpr int kPar = RES == kNormalised ? 6 : 3;
  T* z;
  uint8_t* mask;
  const T* x;
  const T* residual;

  FASTRES_INLINE void prefetch(int64_t off) const {
    fetch(x + off);
    if constexpr (RES != kNoResidual) fetch(residual + off);
  }
  template <class L>
  FASTRES_INLINE void operator()(int64_t off, int64_t moff, const VF* q, L lanes) const {
    // 1. normalise
    VF v = normalise(load(x + off, lanes), q[0], q[1], q[2]);
    // 2. add the shortcut
    if constexpr (RES == kIdentity) v = add(v, load(residual + off, lanes));
    if constexpr (RES == kNormalised) {
      v = add(v, normalise(load(residual + off, lanes), q[3], q[4], q[5]));
    }
    // 3. round, gate, store
    if constexpr (ACT == kLinear) {
      store(z + off, v, lanes);
    } else {
      const VM m = passes_stored<T>(v);
      store_kept(z + off, m, v, lanes);
      if constexpr (ACT == kReluMask) store_bits(mask + moff, m, lanes);
    }
  }
};

template <class T, int RES, int ACT>
void launch(const BnApply& p) {
  using Body = ApplyBody<T, RES, ACT>;
  const Params par(Body::kPar, p.act.c);
  par.copy(0, p.mean, 0.0f);
  par.scale(1, p.gamma, p.rstd);
  par.copy(2, p.beta, 0.0f);
  if constexpr (RES == kNormalised) {
    par.copy(3, p.res_mean, 0.0f);
    par.scale(4, p.res_gamma, p.res_rstd);
    par.copy(5, p.res_beta, 0.0f);
  }
  for_each_vector<Body::kPar>(p.act, par,
                              Body{static_cast<T*>(p.z), p.mask, static_cast<const T*>(p.x),
                                   static_cast<const T*>(p.residual)});
}

template <class T, int RES>
void choose_act(const BnApply& p) {
  if (!p.relu) {
    launch<T, RES, kLinear>(p);
  } else if (p.mask == nullptr) {
    launch<T, RES, kRelu>(p);
  } else {
    launch<T, RES, kReluMask>(p);
  }
}

}  // namespace

void bn_apply(const BnApply& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.residual == nullptr) {
      choose_act<T, kNoResidual>(p);
    } else if (!p.res_norm) {
      choose_act<T, kIdentity>(p);
    } else {
      choose_act<T, kNormalised>(p);
    }
  });
}

}  // namespace FASTRES_ISA
}  // namespace fastres
