#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(StatsEpilogue, kFprop, BF16, 256)
template std::string gemm_why_not<kFprop>(const Gemm&);

}  // namespace cuda
}  // namespace fastres
