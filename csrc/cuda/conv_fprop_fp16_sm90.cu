#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(StatsEpilogue, kFprop, F16, 256)

}  // namespace cuda
}  // namespace fastres
