// The instructions of sm_90a that the pointwise convolutions stand on: mbarriers, the copy engine
// (TMA), ldmatrix, wgmma with A in registers, register reallocation.
//
// Shared memory is addressed as PTX does, by 32-bit addresses of the shared window. Under
// FASTRES_CUDA_HOST each function has a twin in tests/cuda_host/hopper.h with PTX's semantics:
// copies that arrive late, phases, transaction counts, accumulators that are NaN until waited for.
// Sections are those of the PTX ISA 9.x.
#pragma once

#include "device.cuh"

#ifdef FASTRES_CUDA_HOST
#include "hopper.h"
#endif

// Bodies of kernels for sm_90a alone; other archs of the build compile empty ones.
#if defined(FASTRES_CUDA_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTRES_SM90A
#endif
#ifdef FASTRES_CUDA_HOST
#define FASTRES_GRID_CONSTANT
#else
#define FASTRES_GRID_CONSTANT __grid_constant__
#endif

namespace fastres {
namespace cuda {

// A CUtensorMap, made by the launcher, in the kernel's parameters.
struct alignas(64) TensorMap {
  uint64_t word[16];
};

constexpr int kSwizzleBytes = 128;    // a row of a tile in shared memory
constexpr int kSwizzlePeriod = 1024;  // tiles begin at multiples of it
constexpr int kTileChannels = 64;     // 16-bit elements of such a row

// Where byte `at` of a tile of 128-byte rows lies under the 128-byte swizzle of the copy engine and
// of wgmma: bits 4-6 xor bits 7-9 (9.7.15.5.1.2, "128B swizzling").
FASTRES_DEVICE constexpr uint32_t swizzle128(uint32_t at) { return at ^ ((at >> 7 & 7u) << 4); }

#ifdef FASTRES_CUDA_HOST

FASTRES_DEVICE uint32_t dynamic_shared() { return shim::dynamic_shared(); }
FASTRES_DEVICE void store_shared(uint32_t at, float v) { shim::store_shared(at, &v, 4); }
FASTRES_DEVICE void store_shared(uint32_t at, float2 v) { shim::store_shared(at, &v, 8); }
FASTRES_DEVICE void store_shared(uint32_t at, uint2 v) { shim::store_shared(at, &v, 8); }
FASTRES_DEVICE void store_shared(uint32_t at, uint4 v) { shim::store_shared(at, &v, 16); }
template <class V>
FASTRES_DEVICE V load_shared(uint32_t at) {
  V v;
  shim::load_shared(&v, at, sizeof(V));
  return v;
}
FASTRES_DEVICE void barrier_init(uint32_t bar, int count) { shim::mbarrier_init(bar, count); }
FASTRES_DEVICE void barrier_arrive(uint32_t bar) { shim::mbarrier_arrive(bar, 0); }
FASTRES_DEVICE void barrier_expect(uint32_t bar, int bytes) { shim::mbarrier_arrive(bar, bytes); }
FASTRES_DEVICE void barrier_wait(uint32_t bar, uint32_t parity) {
  shim::mbarrier_wait(bar, parity);
}
FASTRES_DEVICE void fence_barrier_init() { shim::fence_barrier_init(); }
FASTRES_DEVICE void fence_proxy_async() { shim::fence_proxy_async(); }
FASTRES_DEVICE void named_barrier(int id, int threads) { shim::named_barrier(id, threads); }
FASTRES_DEVICE void copy_tile(uint32_t to, const TensorMap& map, uint32_t bar, int column,
                              int64_t row) {
  shim::copy_tile(to, map.word, bar, column, row);
}
template <bool TRANSPOSED>
FASTRES_DEVICE void load_matrices(uint32_t (&v)[4], uint32_t at) {
  shim::load_matrices(v, at, TRANSPOSED);
}
template <int N, bool TRANSPOSED, class T>
FASTRES_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, T) {
  shim::wgmma(d, N, a, b, add, TRANSPOSED, std::is_same<T, BF16>::value);
}
FASTRES_DEVICE void wgmma_fence() { shim::wgmma_fence(); }
FASTRES_DEVICE void wgmma_commit() { shim::wgmma_commit(); }
template <int PENDING>
FASTRES_DEVICE void wgmma_wait() {
  shim::wgmma_wait(PENDING);
}
template <int REGISTERS>
FASTRES_DEVICE void take_registers() {
  shim::set_registers(REGISTERS);
}
template <int REGISTERS>
FASTRES_DEVICE void give_registers() {
  shim::set_registers(REGISTERS);
}
template <class V, int COUNT>
FASTRES_DEVICE void settle(V (&)[COUNT]) {}
template <class T>
FASTRES_DEVICE uint32_t narrow2_relu(float lo, float hi, T t) {
  return narrow2(lo <= 0.0f ? 0.0f : lo, hi <= 0.0f ? 0.0f : hi, t);
}

#else

// The block's dynamic shared memory.
FASTRES_DEVICE uint32_t dynamic_shared() {
  extern __shared__ __align__(kSwizzlePeriod) uint8_t bytes[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(bytes));
}

FASTRES_DEVICE void store_shared(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}
FASTRES_DEVICE void store_shared(uint32_t at, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(v.x), "f"(v.y) : "memory");
}
FASTRES_DEVICE void store_shared(uint32_t at, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}
FASTRES_DEVICE void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
template <class V>
FASTRES_DEVICE V load_shared(uint32_t at);
template <>
FASTRES_DEVICE float load_shared<float>(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
template <>
FASTRES_DEVICE float2 load_shared<float2>(uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
  return v;
}
template <>
FASTRES_DEVICE float4 load_shared<float4>(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
template <>
FASTRES_DEVICE uint4 load_shared<uint4>(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
template <>
FASTRES_DEVICE uint2 load_shared<uint2>(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
template <>
FASTRES_DEVICE uint16_t load_shared<uint16_t>(uint32_t at) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
  return v;
}

// --- mbarriers (9.7.13.15): a phase ends when `count` threads have arrived and as many bytes have
// come as were expected. A wait for parity p passes once the phase of parity p has ended. ---

FASTRES_DEVICE void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
FASTRES_DEVICE void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives, and tells how many bytes of copies this phase waits for.
FASTRES_DEVICE void barrier_expect(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
FASTRES_DEVICE void barrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred passed;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 passed, [%0], %1;\n"
      "@!passed bra again;\n"
      "}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// Before other threads and the copy engine use barriers that this thread made.
FASTRES_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Ordinary stores to shared memory by this thread, then wgmma or the copy engine (9.7.15.4):
// between the store and the barrier behind which the other reads.
FASTRES_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
FASTRES_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// One box of the map from (column, row) on, 0 past the tensor's ends; all bytes of the box count.
FASTRES_DEVICE void copy_tile(uint32_t to, const TensorMap& map, uint32_t bar, int column,
                              int64_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(bar), "r"(column), "r"(static_cast<int>(row))
      : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i holds the address of row i % 8 of matrix i / 8.
// Lane i gets elements (i / 4, 2 * (i % 4) + 0, 1) of each, or of its transpose (9.7.14.5.15).
template <bool TRANSPOSED>
FASTRES_DEVICE void load_matrices(uint32_t (&v)[4], uint32_t at) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
  }
}

// Registers of this warpgroup's threads, changed by all of its warps (9.7.20, setmaxnreg).
template <int REGISTERS>
FASTRES_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FASTRES_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// max(v, 0), NaN stays, then narrow2.
FASTRES_DEVICE uint32_t narrow2_relu(float lo, float hi, BF16) {
  uint32_t word;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
}
FASTRES_DEVICE uint32_t narrow2_relu(float lo, float hi, F16) {
  uint32_t word;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(hi), "f"(lo));
  return word;
}

// --- wgmma (9.7.15): d (64 x N) = a (64 x 16) * b (16 x N) + (add ? d : 0), by four warps.
//
// Fragments (9.7.15.5.1.1.1), warp w of the four, lane i: a[0] holds row 16 * w + i / 4, columns
// 2 * (i % 4) + 0, 1; a[1] row + 8; a[2] columns + 8; a[3] both. d[4 * j + e] is row
// 16 * w + i / 4 + 8 * (e / 2), column 8 * j + 2 * (i % 4) + e % 2.
//
// Neither a nor d nor b's shared memory may be touched from the wgmma to the wait for its group; a
// fence comes between the thread's own use of a or d and the wgmma. ---

FASTRES_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTRES_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All groups but the last PENDING have ended.
template <int PENDING>
FASTRES_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// What was computed into v so far is in registers here: the compiler may move neither the
// computation of a fragment behind the fence, nor the use of an accumulator before the wait.
template <int COUNT>
FASTRES_DEVICE void settle(uint32_t (&v)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(v[i])::"memory");
}
template <int COUNT>
FASTRES_DEVICE void settle(float (&v)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

// clang-format off
#define FASTRES_D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTRES_D64 \
  FASTRES_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTRES_D128 \
  FASTRES_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define FASTRES_F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
  "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTRES_F32(i) FASTRES_F8(i), FASTRES_F8(i + 8), FASTRES_F8(i + 16), FASTRES_F8(i + 24)
#define FASTRES_F64(i) FASTRES_F32(i), FASTRES_F32(i + 32)
#define FASTRES_F128(i) FASTRES_F64(i), FASTRES_F64(i + 64)
// clang-format on

// The last operands: scale-a = scale-b = 1, and whether b is N-major.
#define FASTRES_WGMMA(N, TYPE, COUNT, A, B, ADD, TRANS)                                          \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                       \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                   \
               " {" FASTRES_D##COUNT "}, {" A "}, " B ", add, 1, 1, " TRANS ";\n}"               \
               : FASTRES_F##COUNT(0)                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), \
                 "n"(TRANSPOSED ? 1 : 0))

#define FASTRES_WGMMA_N(N, COUNT, A, B, ADD, TRANS)    \
  if constexpr (std::is_same<T, BF16>::value) {        \
    FASTRES_WGMMA(N, "bf16", COUNT, A, B, ADD, TRANS); \
  } else {                                             \
    FASTRES_WGMMA(N, "f16", COUNT, A, B, ADD, TRANS);  \
  }

// b: a descriptor, k_major() or n_major(); TRANSPOSED: the latter.
template <int N, bool TRANSPOSED, class T>
FASTRES_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, T) {
  static_assert(N == 64 || N == 128 || N == 256, "of these the strings above are");
  if constexpr (N == 64) {
    FASTRES_WGMMA_N(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38")
  } else if constexpr (N == 128) {
    FASTRES_WGMMA_N(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70")
  } else {
    FASTRES_WGMMA_N(256, 128, "%128, %129, %130, %131", "%132", "%133", "%134")
  }
}

#endif

// Descriptors of b in shared memory, rows of 128 bytes under the 128-byte swizzle (9.7.15.5.1.2.2):
// bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 62-63: 1.
FASTRES_DEVICE uint64_t descriptor(uint32_t at, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((at & 0x3ffffu) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}
// Rows are n, 64 of k in each; 8 rows are 1024 bytes. `at` may lie 16 * i of k into the row.
FASTRES_DEVICE uint64_t k_major(uint32_t at) { return descriptor(at, 16, 1024); }
// Rows are k, 64 of n in each; the next 64 of n begin `block` bytes on.
FASTRES_DEVICE uint64_t n_major(uint32_t at, uint32_t block) { return descriptor(at, block, 1024); }

}  // namespace cuda
}  // namespace fastres
