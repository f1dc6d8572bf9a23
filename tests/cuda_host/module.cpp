// The launchers and kernels of csrc/cuda on the host shim, with the bindings of the real module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "cuda/launch.cuh"
#include "hopper.h"

namespace fastres {
namespace cuda {

OnDevice::OnDevice(const char*, const Act&, const Place&) : before_(-1) {}
OnDevice::~OnDevice() {}
std::string built_archs() { return "host"; }
std::array<int, 2> versions() { return {0, 0}; }

}  // namespace cuda
}  // namespace fastres

PYBIND11_MODULE(fastres_cuda_host, m) {
  fastres::cuda::bind(m);
  m.def("set_order", &shim::set_order, "0: in order, 1: last first, others: shuffled by this seed");
  m.def("set_fault", &shim::set_fault, "Run kernels as if broken: shim::Fault; 0: right.");
  m.def("launches", &shim::launches);
  m.def("recent", &shim::recent, "(name, blocks) of the last launches.");
}
