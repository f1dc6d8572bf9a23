#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(GradientEpilogue, kDgrad, F16, 256)

}  // namespace cuda
}  // namespace fastres
