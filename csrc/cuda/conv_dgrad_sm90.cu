#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(GradientEpilogue, kDgrad, BF16, 256)
FASTRES_CONV(GradientEpilogue, kDgrad, F16, 256)
template std::string gemm_why_not<kDgrad>(const Gemm&);

}  // namespace cuda
}  // namespace fastres
