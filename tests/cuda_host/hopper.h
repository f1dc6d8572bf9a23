// The instructions of csrc/cuda/hopper.cuh on the host shim, with the semantics of the PTX ISA and
// none of the hardware's mercy:
//   - a copy into shared memory poisons its destination and arrives late: when nothing else can
//     run, or (set_order > 1) at any time and in any order;
//   - wgmma reads its registers and shared memory at the wait for its group; until then the
//     accumulators are NaN;
//   - every access to dynamic shared memory is checked for bounds, for bytes never written, and for
//     a race: the accesses of two threads must be ordered by barriers, mbarriers or __syncwarp
//     (vector clocks); wgmma sees ordinary stores through fence.proxy.async only.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace shim {

uint32_t dynamic_shared();
void store_shared(uint32_t at, const void* v, int bytes);
void load_shared(void* v, uint32_t at, int bytes);

void mbarrier_init(uint32_t bar, int count);
void mbarrier_arrive(uint32_t bar, int expect);
void mbarrier_wait(uint32_t bar, uint32_t parity);
void fence_barrier_init();
void fence_proxy_async();
void named_barrier(int id, int threads);
void copy_tile(uint32_t to, const uint64_t* map, uint32_t bar, int column, int64_t row);

void load_matrices(uint32_t* v, uint32_t at, bool transposed);
void wgmma(float* d, int n, const uint32_t* a, uint64_t b, bool add, bool transposed, bool bf16);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void set_registers(int registers);

// The tensor map of a row-major matrix of 16-bit elements and its box of box_rows x 64, swizzled.
void make_map(uint64_t* map, const void* base, int64_t rows, int64_t columns, int box_rows);

// For tests: the kernels run as if a primitive were missing from their source, or wrong in it.
enum Fault {
  kRight,
  kNoFullWait,      // consumers (threads from 128 on) do not wait for their stages
  kNoEmptyWait,     // the producer's warps do not wait for free ones
  kWrongParity,     // of every wait
  kFewerBytes,      // expected than copied
  kNoArrive,        // consumers never free a stage
  kNoBarrierFence,  // behind mbarrier.init
  kNoProxyFence,    // fence.proxy.async
  kNoWgmmaFence,
  kNoWgmmaWait,
  kNoSyncwarp,
  kNoNamedBarrier,
  kPlainCopies,      // tensor maps without the swizzle
  kPlainDescriptors  // wgmma descriptors without it
};
void set_fault(int fault);
bool has_fault(Fault fault);

// As launch(), with dynamic shared memory.
void launch_shared(const char* name, int64_t blocks, int threads, int bytes,
                   const std::function<void()>& kernel);

}  // namespace shim
