// add_relu: z = relu(a + b)                            reads 2 tensors, writes 1 (and 1 bit per
// element) relu_bwd: dx = gate(dz) + (dy if given else 0)       reads 1-2 tensors and the mask,
// writes 1 Arithmetic: fp32; the mask is taken from z as stored.
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

template <class T, bool MASK>
struct AddReluBody {
  T* z;
  uint8_t* mask;
  const T *a, *b;

  template <class L>
  FASTRES_INLINE void operator()(int64_t off, int64_t moff, const VF*, L lanes) const {
    const VF v = add(load(a + off, lanes), load(b + off, lanes));
    const VM m = passes_stored<T>(v);
    store_kept(z + off, m, v, lanes);
    if constexpr (MASK) store_bits(mask + moff, m, lanes);
  }
};

template <class T, bool DY>
struct ReluBwdBody {
  T* dx;
  const T *dy, *dz;
  const uint8_t* mask;

  template <class L>
  FASTRES_INLINE void operator()(int64_t off, int64_t moff, const VF*, L lanes) const {
    const VF g = keep(load_bits(mask + moff, lanes), load(dz + off, lanes));
    if constexpr (DY) {
      store(dx + off, add(g, load(dy + off, lanes)), lanes);
    } else {
      store_rounded(dx + off, g, lanes);  // g is dz, exact in T
    }
  }
};

}  // namespace

void add_relu(const AddRelu& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* z = static_cast<T*>(p.z);
    const T* a = static_cast<const T*>(p.a);
    const T* b = static_cast<const T*>(p.b);
    if (p.mask != nullptr) {
      for_each_vector(p.act, true, AddReluBody<T, true>{z, p.mask, a, b});
    } else {
      for_each_vector(p.act, false, AddReluBody<T, false>{z, nullptr, a, b});
    }
  });
}

void relu_bwd(const ReluBwd& p) {
  with_dtype(p.act.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* dx = static_cast<T*>(p.dx);
    const T* dy = static_cast<const T*>(p.dy);
    const T* dz = static_cast<const T*>(p.dz);
    if (dy != nullptr) {
      for_each_vector(p.act, true, ReluBwdBody<T, true>{dx, dy, dz, p.mask});
    } else {
      for_each_vector(p.act, true, ReluBwdBody<T, false>{dx, nullptr, dz, p.mask});
    }
  });
}

}  // namespace FASTRES_ISA
}  // namespace fastres
