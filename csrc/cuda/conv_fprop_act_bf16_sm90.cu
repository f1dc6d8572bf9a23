#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(ActEpilogue, kFprop, BF16, 256)

}  // namespace cuda
}  // namespace fastres
