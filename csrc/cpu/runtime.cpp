#include "runtime.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace fastres {
namespace {

// torch/csrc/stable/c/shim.h: int32_t error, nonzero when the pool failed.
using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, RangeFn, void*);
std::atomic<TorchParallelFor> g_parallel_for{nullptr};

class ScratchBuffer {
 public:
  ~ScratchBuffer() { std::free(data_); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const size_t rounded = (bytes + (bytes >> 2) + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

#define FASTRES_TABLE(ISA)                                                                        \
  Kernels {                                                                                       \
    #ISA, ISA::bn_stats, ISA::bn_apply, ISA::bn_bwd_reduce, ISA::bn_bwd_apply, ISA::add_relu,     \
        ISA::relu_bwd, ISA::bn_relu_maxpool, ISA::bn_relu_maxpool_bwd_reduce,                     \
        ISA::bn_relu_maxpool_bwd_apply, ISA::max_pool, ISA::abs_max, ISA::winograd_weights,       \
        ISA::winograd_fprop, ISA::winograd_wgrad, ISA::winograd_wgrad_jobs, ISA::conv_wgrad_runs, \
        ISA::conv_wgrad_jobs, ISA::conv_wgrad                                                     \
  }

// Worst first. A variant that was not built is not in the list.
const Kernels kVariants[] = {
    FASTRES_TABLE(portable),
#ifdef FASTRES_HAVE_AVX2
    FASTRES_TABLE(avx2),
#endif
#ifdef FASTRES_HAVE_AVX512
    FASTRES_TABLE(avx512),
#endif
};

bool cpu_runs(const char* isa) {
  if (std::strcmp(isa, "portable") == 0) return true;
#if defined(__x86_64__) || defined(__i386__)
  // __builtin_cpu_supports asks the OS for the register state too; f16c is not in every
  // compiler's list, so it is read from cpuid leaf 1 (ecx bit 29).
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && ((ecx >> 29) & 1) != 0;
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

std::string names(bool only_supported) {
  std::string out;
  for (const Kernels& k : kVariants) {
    if (only_supported && !cpu_runs(k.isa)) continue;
    if (!out.empty()) out += ' ';
    out += k.isa;
  }
  return out;
}

const Kernels& choose() {
  const char* forced = std::getenv("FASTRES_CPU_ISA");
  const bool free_choice = forced == nullptr || *forced == '\0';
  const Kernels* best = nullptr;
  for (const Kernels& k : kVariants) {
    if (cpu_runs(k.isa) && (free_choice || std::strcmp(forced, k.isa) == 0)) best = &k;
  }
  if (best == nullptr) {
    throw std::runtime_error("FASTRES_CPU_ISA=" + std::string(forced) +
                             " is not available: this build on this CPU runs " + names(true));
  }
  return *best;
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, RangeFn fn, void* ctx) {
  if (n <= 0) return;
  const TorchParallelFor pool = g_parallel_for.load(std::memory_order_relaxed);
  if (pool == nullptr || n <= grain) {
    fn(0, n, ctx);
  } else if (pool(0, n, grain, fn, ctx) != 0) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

void set_parallel_for(uintptr_t address) {
  g_parallel_for.store(reinterpret_cast<TorchParallelFor>(address), std::memory_order_relaxed);
}

bool has_parallel_for() { return g_parallel_for.load(std::memory_order_relaxed) != nullptr; }

void* scratch(int slot, size_t bytes) {
  thread_local ScratchBuffer buffers[2];
  return buffers[slot].reserve(bytes);
}

bool has_bf16_dot() {
#if defined(__x86_64__) || defined(__i386__)
  // Leaf 7.1, eax bit 5; the registers are those of avx512f, which the caller runs already.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && ((eax >> 5) & 1) != 0;
#else
  return false;
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* supported_isas() {
  static const std::string text = names(true);
  return text.c_str();
}

const char* built_isas() {
  static const std::string text = names(false);
  return text.c_str();
}

}  // namespace fastres
