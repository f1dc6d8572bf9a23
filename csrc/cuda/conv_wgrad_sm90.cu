#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(PartialEpilogue, kWgrad, BF16, 128)
FASTRES_CONV(PartialEpilogue, kWgrad, F16, 128)
template std::string gemm_why_not<kWgrad>(const Gemm&);

}  // namespace cuda
}  // namespace fastres
