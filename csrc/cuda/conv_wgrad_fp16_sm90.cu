#include "conv_cutlass.cuh"

namespace fastres {
namespace cuda {

FASTRES_CONV(PartialEpilogue, kWgrad, F16, 128)

}  // namespace cuda
}  // namespace fastres
