// fastres._C.cuda's pointwise convolutions. fastres/_cuda_pointwise.py is the caller.
#include "bindings.h"

#include "../arguments.h"
#include "pointwise.h"

namespace py = pybind11;

namespace fastres {
namespace cuda {
namespace {

void bind_fprop(Ptr y, Ptr mean, Ptr var, Ptr rstd, Ptr x, Ptr weight, Ptr in_mean, Ptr in_rstd,
                Ptr in_gamma, Ptr in_beta, bool norm, double eps, I64 k, Ptr work, int dtype,
                bool nhwc, I64 n, I64 c, I64 s, int device, Ptr stream) {
  pointwise_fprop({any(y),
                   f32(mean),
                   f32(var),
                   f32(rstd),
                   any(x),
                   any(weight),
                   {f32(in_mean), f32(in_rstd), f32(in_gamma), f32(in_beta)},
                   norm,
                   eps,
                   k,
                   act(dtype, nhwc, n, c, s)},
                  f32(work), {device, stream});
}

void bind_fprop_act(Ptr z, Ptr x, Ptr weight, Ptr mean, Ptr rstd, Ptr gamma, Ptr beta, Ptr residual,
                    bool relu, I64 k, int dtype, bool nhwc, I64 n, I64 c, I64 s, int device,
                    Ptr stream) {
  pointwise_fprop_act({any(z),
                       any(x),
                       any(weight),
                       {f32(mean), f32(rstd), f32(gamma), f32(beta)},
                       any(residual),
                       relu,
                       k,
                       act(dtype, nhwc, n, c, s)},
                      {device, stream});
}

}  // namespace

void bind_pointwise(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("pointwise_fprop", &bind_fprop, NoGil());
  m.def("pointwise_fprop_act", &bind_fprop_act, NoGil());
  m.def("pointwise_fprop_floats", &pointwise_fprop_floats, "Floats of its workspace.");
  m.def("pointwise_missing", &pointwise_missing, "Why they do not run on a device; or empty.");
  m.def("pointwise_refuses", &pointwise_refuses, "Why they do not take these sizes; or empty.");
}

}  // namespace cuda
}  // namespace fastres
