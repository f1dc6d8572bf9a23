// The boundary between the launchers and the tensor cores: an implicit GEMM with an epilogue.
// Defined on CUTLASS's collectives in conv_cutlass.cuh, for sm_90a; for the tests on the CPU by
// plain loops in tests/cuda_host/conv_gemm.cpp.
#pragma once

#include "conv_epilogue.cuh"
#include "launch.cuh"

namespace fastres {
namespace cuda {

// The operands as CUTLASS's problem shape wants them. `a` is x (fprop) or dy (dgrad, wgrad), `b`
// the filters (fprop, dgrad) or x (wgrad). For a phase of dgrad: h and w are the phase's pixels,
// the filters a strided view of its taps, `pad` and `dil` what they are off and apart in dy.
struct Gemm {
  const void *a, *b;
  int64_t n, h, w, c, k, r, s, p, q;
  int64_t stride_k, stride_r, stride_s;  // of the filters, in elements
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

template <template <class, int, int> class Epilogue, ConvPass PASS, class T, int M, int N>
void run_gemm(const Launch& launch, const Gemm& gemm, const ConvSchedule& schedule,
              const typename Epilogue<T, M, N>::Params& params);

// Why the GEMM cannot run, from the collectives' own checks; empty when it can.
template <ConvPass PASS>
std::string gemm_why_not(const Gemm& gemm);

}  // namespace cuda
}  // namespace fastres
