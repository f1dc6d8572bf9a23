// fastres._C.cuda: raw addresses, sizes, device and stream in; nothing allocated, nothing waited
// for. fastres/_cuda.py is the caller. Addresses are integers, 0 where the contract says None.
#include "bindings.h"

#include "../arguments.h"
#include "ops.h"

namespace py = pybind11;

namespace fastres {
namespace cuda {
namespace {

void bind_bn_stats(Ptr mean, Ptr var, Ptr rstd, Ptr x, double eps, Ptr work, int dtype, bool nhwc,
                   I64 n, I64 c, I64 s, int device, Ptr stream) {
  bn_stats({f32(mean), f32(var), f32(rstd), any(x), eps, act(dtype, nhwc, n, c, s)}, f32(work),
           {device, stream});
}

void bind_bn_apply(Ptr z, Ptr mask, Ptr x, Ptr mean, Ptr rstd, Ptr gamma, Ptr beta, Ptr residual,
                   Ptr res_mean, Ptr res_rstd, Ptr res_gamma, Ptr res_beta, bool res_norm,
                   bool relu, int dtype, bool nhwc, I64 n, I64 c, I64 s, int device, Ptr stream) {
  bn_apply({any(z), u8(mask), any(x), f32(mean), f32(rstd), f32(gamma), f32(beta), any(residual),
            f32(res_mean), f32(res_rstd), f32(res_gamma), f32(res_beta), res_norm, relu,
            act(dtype, nhwc, n, c, s)},
           {device, stream});
}

void bind_bn_bwd_reduce(Ptr dgamma, Ptr dbeta, Ptr res_dgamma, Ptr dz, Ptr mask, Ptr x, Ptr mean,
                        Ptr rstd, Ptr gamma, Ptr beta, Ptr residual, Ptr res_mean, Ptr res_rstd,
                        int gate, Ptr work, int dtype, bool nhwc, I64 n, I64 c, I64 s, int device,
                        Ptr stream) {
  bn_bwd_reduce({f32(dgamma), f32(dbeta), f32(res_dgamma), any(dz), u8(mask), any(x), f32(mean),
                 f32(rstd), f32(gamma), f32(beta), any(residual), f32(res_mean), f32(res_rstd),
                 gate, act(dtype, nhwc, n, c, s)},
                f32(work), {device, stream});
}

void bind_bn_bwd_apply(Ptr dx, Ptr dres, Ptr dz, Ptr mask, Ptr x, Ptr mean, Ptr rstd, Ptr gamma,
                       Ptr beta, Ptr dgamma, Ptr dbeta, Ptr residual, Ptr res_mean, Ptr res_rstd,
                       Ptr res_gamma, Ptr res_dgamma, int gate, bool training, bool res_norm,
                       bool res_training, int dtype, bool nhwc, I64 n, I64 c, I64 s, int device,
                       Ptr stream) {
  bn_bwd_apply({any(dx),         any(dres),     any(dz),
                u8(mask),        any(x),        f32(mean),
                f32(rstd),       f32(gamma),    f32(beta),
                f32(dgamma),     f32(dbeta),    any(residual),
                f32(res_mean),   f32(res_rstd), f32(res_gamma),
                f32(res_dgamma), gate,          training,
                res_norm,        res_training,  act(dtype, nhwc, n, c, s)},
               {device, stream});
}

void bind_bn_relu_maxpool(Ptr z, Ptr index, Ptr x, Ptr mean, Ptr rstd, Ptr gamma, Ptr beta,
                          int kernel, int stride, int padding, int dtype, bool nhwc, I64 n, I64 c,
                          I64 h, I64 w, I64 oh, I64 ow, int device, Ptr cuda_stream) {
  bn_relu_maxpool({any(z),
                   u8(index),
                   any(x),
                   f32(mean),
                   f32(rstd),
                   f32(gamma),
                   f32(beta),
                   {h, w, oh, ow, kernel, stride, padding},
                   act(dtype, nhwc, n, c, h * w)},
                  {device, cuda_stream});
}

void bind_bn_relu_maxpool_bwd_reduce(Ptr dgamma, Ptr dbeta, Ptr dz, Ptr index, Ptr x, Ptr mean,
                                     Ptr rstd, int kernel, int stride, int padding, Ptr work,
                                     int dtype, bool nhwc, I64 n, I64 c, I64 h, I64 w, I64 oh,
                                     I64 ow, int device, Ptr cuda_stream) {
  bn_relu_maxpool_bwd_reduce({nullptr,
                              f32(dgamma),
                              f32(dbeta),
                              any(dz),
                              u8(index),
                              any(x),
                              f32(mean),
                              f32(rstd),
                              nullptr,
                              {h, w, oh, ow, kernel, stride, padding},
                              true,
                              act(dtype, nhwc, n, c, h * w)},
                             f32(work), {device, cuda_stream});
}

void bind_bn_relu_maxpool_bwd_apply(Ptr dx, Ptr dz, Ptr index, Ptr x, Ptr mean, Ptr rstd, Ptr gamma,
                                    Ptr dgamma, Ptr dbeta, int kernel, int stride, int padding,
                                    bool training, int dtype, bool nhwc, I64 n, I64 c, I64 h, I64 w,
                                    I64 oh, I64 ow, int device, Ptr cuda_stream) {
  bn_relu_maxpool_bwd_apply({any(dx),
                             f32(dgamma),
                             f32(dbeta),
                             any(dz),
                             u8(index),
                             any(x),
                             f32(mean),
                             f32(rstd),
                             f32(gamma),
                             {h, w, oh, ow, kernel, stride, padding},
                             training,
                             act(dtype, nhwc, n, c, h * w)},
                            {device, cuda_stream});
}

void bind_add_relu(Ptr z, Ptr mask, Ptr a, Ptr b, int dtype, bool nhwc, I64 n, I64 c, I64 s,
                   int device, Ptr stream) {
  add_relu({any(z), u8(mask), any(a), any(b), act(dtype, nhwc, n, c, s)}, {device, stream});
}

void bind_relu_bwd(Ptr dx, Ptr dy, Ptr dz, Ptr mask, int dtype, bool nhwc, I64 n, I64 c, I64 s,
                   int device, Ptr stream) {
  relu_bwd({any(dx), any(dy), any(dz), u8(mask), act(dtype, nhwc, n, c, s)}, {device, stream});
}

}  // namespace

void bind(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("bn_stats", &bind_bn_stats, NoGil());
  m.def("bn_apply", &bind_bn_apply, NoGil());
  m.def("bn_bwd_reduce", &bind_bn_bwd_reduce, NoGil());
  m.def("bn_bwd_apply", &bind_bn_bwd_apply, NoGil());
  m.def("bn_relu_maxpool", &bind_bn_relu_maxpool, NoGil());
  m.def("bn_relu_maxpool_bwd_reduce", &bind_bn_relu_maxpool_bwd_reduce, NoGil());
  m.def("bn_relu_maxpool_bwd_apply", &bind_bn_relu_maxpool_bwd_apply, NoGil());
  m.def("add_relu", &bind_add_relu, NoGil());
  m.def("relu_bwd", &bind_relu_bwd, NoGil());
  m.def(
      "workspace_floats",
      [](int parts, int dtype, bool nhwc, I64 n, I64 c, I64 s) {
        return workspace_floats(act(dtype, nhwc, n, c, s), parts);
      },
      "Floats of a reduction's workspace.");
  bind_pointwise(m);
  m.def("archs", &built_archs, "What this build has code for.");
}

}  // namespace cuda
}  // namespace fastres
