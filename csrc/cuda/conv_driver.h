// The driver's two functions that encode tensor maps, found through the runtime at the first call:
// fastres._C loads and imports where there is no driver. CUTLASS drops what they return; here it is
// kept, and `check` raises it with the kernel's name and shape.
//
// Comes between cutlass/cuda_host_adapter.hpp and the headers that use its macro.
#pragma once

#include <cuda.h>

#include "launch.cuh"

namespace fastres {
namespace cuda {
namespace driver {

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* p, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);
CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* p, const cuuint64_t* sizes, const cuuint64_t* strides,
                                 const int* lower, const int* upper, cuuint32_t channels,
                                 cuuint32_t pixels, const cuuint32_t* steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

// Of this thread's encodings since: the first that failed is thrown.
void begin();
void check(const Launch& launch);

}  // namespace driver
}  // namespace cuda
}  // namespace fastres

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) ::fastres::cuda::driver::function
