// The host side of every launcher: checks, tiles, the one launch point, errors with a name.
//
// A launcher allocates nothing and waits for nothing: CUDA graphs can capture it. What it cannot
// take it refuses before the launch, with std::invalid_argument; an error of CUDA's is taken off
// CUDA's hands (the next, innocent call does not report it) and thrown with the kernel's name and
// shape.
#pragma once

#include <atomic>
#include <cstddef>
#include <initializer_list>
#include <string>

#include "ops.h"
#include "tiles.cuh"
#ifdef FASTRES_CUDA_HOST
#include "hopper.h"
#endif

namespace fastres {
namespace cuda {

// Makes `place.device` current while it lives, and refuses an arch that the build has no code for.
class OnDevice {
 public:
  OnDevice(const char* op, const Act& act, const Place& place);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  void restore() const;
  int before_;
};

struct Launch {
  const char* name;
  const Act& act;
  const Place& place;
  int threads = kThreads;
  int shared = 0;  // bytes of dynamic shared memory
};

std::string describe(const char* name, const Act& act);

#ifdef FASTRES_CUDA_HOST
template <class... P, class... A>
void run(const Launch& launch, int64_t blocks, void (*kernel)(P...), const A&... args) {
  if (launch.shared > 0) {
    shim::launch_shared(launch.name, blocks, launch.threads, launch.shared,
                        [&] { kernel(args...); });
  } else {
    shim::launch(launch.name, blocks, launch.threads, [&] { kernel(args...); });
  }
}
#else
// Threads, clusters and shared memory of a kernel's own choice; `ready` has a bit for each device
// on which the kernel was given its shared memory.
void launch_cluster(const Launch& launch, int64_t blocks, int threads, int cluster, size_t shared,
                    std::atomic<uint64_t>& ready, const void* kernel, void** args);
void run_raw(const Launch& launch, int64_t blocks, const void* kernel, void** args);

template <class... P, class... A>
void run(const Launch& launch, int64_t blocks, void (*kernel)(P...), const A&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "a kernel wants all its arguments");
  const auto call = [&](P... exact) {  // of exactly the kernel's types
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&exact))...};
    run_raw(launch, blocks, reinterpret_cast<const void*>(kernel), addresses);
  };
  call(args...);
}
#endif

// Calls f(T{}) with the element type of `dtype`.
template <class F>
void with_dtype(int dtype, const F& f) {
  if (dtype == kF32) {
    f(float{});
  } else if (dtype == kBF16) {
    f(BF16{});
  } else {
    f(F16{});
  }
}

// 8 where rows are whole units and every pointer is aligned to 16 bytes, so that all accesses are;
// otherwise 1. Refuses what no kernel takes: sizes, and pointers off their own type's alignment.
int lanes(const char* op, const Act& act, std::initializer_list<const void*> activations,
          std::initializer_list<const float*> vectors);

// `deep`: positions in flight, in_flight<T, L>().
Map elementwise_map(const Act& act, int lanes, int deep);
// The same of an op without channels: rows need not end where a channel's do.
Map flat_map(const Act& act, int lanes, int deep, bool mask);
Cut reduction_cut(const Act& act, int lanes, int deep);

template <class T, int L>
constexpr int depth() {
  return L == 1 ? 8 : 64 / (8 * static_cast<int>(sizeof(T)));
}

// Sums a reduction's partials in `work` over the chunks; dgamma and res_dgamma times their rstd.
void finish_sums(const Launch& launch, float* dgamma, float* dbeta, float* res_dgamma,
                 const float* work, const float* rstd, const float* res_rstd, const Cut& c);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace fastres
