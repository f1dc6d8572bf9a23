// What the kernels need from their surroundings: threads, scratch memory, the choice of ISA,
// malloc. Declarations only; the definitions live in runtime.cpp and heap.cpp, built for the
// baseline ISA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace fastres {

using RangeFn = void (*)(int64_t begin, int64_t end, void* ctx);

// Runs fn over [0, n) in contiguous ranges of at least `grain`, on the pool given to
// set_parallel_for, or in the calling thread when there is none. fn must not throw.
void parallel_for(int64_t n, int64_t grain, RangeFn fn, void* ctx);

// The address of torch's C function torch_parallel_for; 0 means serial.
void set_parallel_for(uintptr_t address);
bool has_parallel_for();

// 64-byte aligned scratch of this thread, kept between calls and valid until the next call with the
// same slot. Slot 0 belongs to the thread that entered the kernel (parameters, workspace), slot 1
// to the body of a parallel region: the entering thread is also a worker, so they must differ.
void* scratch(int slot, size_t bytes);

// Whether this CPU has AVX512_BF16, which no variant is built for as a whole.
bool has_bf16_dot();

// The kernels of the best ISA this CPU runs, or of the one FASTRES_CPU_ISA names.
const Kernels& kernels();
// Space-separated names of the variants in this build that this CPU runs, worst first.
const char* supported_isas();
const char* built_isas();

// See heap.cpp.
bool tune_malloc();
bool untune_malloc();

}  // namespace fastres
