#include <cuda_runtime_api.h>

#include "cutlass/cuda_host_adapter.hpp"
// clang-format off: after the macro that it replaces
#include "conv_driver.h"
// clang-format on

#include <stdexcept>

namespace fastres {
namespace cuda {
namespace driver {
namespace {

thread_local CUresult failed = CUDA_SUCCESS;
thread_local bool missing = false;

void* find(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // said by check(), not by the next call
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
}

template <class F, class... A>
CUresult call(F* function, A... args) {
  if (function == nullptr) {
    missing = true;
    return CUDA_ERROR_NOT_FOUND;
  }
  const CUresult result = function(args...);
  if (result != CUDA_SUCCESS && failed == CUDA_SUCCESS) failed = result;
  return result;
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* p, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const auto function =
      reinterpret_cast<decltype(&::cuTensorMapEncodeTiled)>(find("cuTensorMapEncodeTiled"));
  return call(function, map, type, rank, p, sizes, strides, box, steps, interleave, swizzle,
              promotion, fill);
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                 void* p, const cuuint64_t* sizes, const cuuint64_t* strides,
                                 const int* lower, const int* upper, cuuint32_t channels,
                                 cuuint32_t pixels, const cuuint32_t* steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const auto function =
      reinterpret_cast<decltype(&::cuTensorMapEncodeIm2col)>(find("cuTensorMapEncodeIm2col"));
  return call(function, map, type, rank, p, sizes, strides, lower, upper, channels, pixels, steps,
              interleave, swizzle, promotion, fill);
}

void begin() {
  failed = CUDA_SUCCESS;
  missing = false;
}

void check(const Launch& launch) {
  const std::string what = "fastres cuda: " + describe(launch.name, launch.act) + ", device " +
                           std::to_string(launch.place.device) + ": ";
  if (missing) {
    throw std::runtime_error(what + "the driver has no cuTensorMapEncodeIm2col (CUDA 12.0)");
  }
  if (failed != CUDA_SUCCESS) {
    throw std::runtime_error(what + "cuTensorMapEncode failed with CUresult " +
                             std::to_string(static_cast<int>(failed)));
  }
}

}  // namespace driver
}  // namespace cuda
}  // namespace fastres
