#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(StatsEpilogue, kFprop, BF16, 256)
FASTRES_CONV(StatsEpilogue, kFprop, F16, 256)
FASTRES_CONV(ActEpilogue, kFprop, BF16, 256)
FASTRES_CONV(ActEpilogue, kFprop, F16, 256)
template std::string gemm_why_not<kFprop>(const Gemm&);

}  // namespace cuda
}  // namespace fastres
