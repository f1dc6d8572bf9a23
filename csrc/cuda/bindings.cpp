// fastres._C.cuda: raw addresses, sizes, device and stream in; nothing allocated, nothing waited
// for. fastres/_cuda.py is the caller. Addresses are integers, 0 where the contract says None.
#include "bindings.h"

#include <pybind11/stl.h>

#include "../arguments.h"
#include "conv.h"
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

#ifdef FASTRES_CUDA_CONV

// n, h, w, c, k, r, s, p, q, stride, padding and dilation (h, w each)
using Sizes = std::array<I64, 15>;

ConvShape shape(int dtype, const Sizes& v) {
  const auto i = [&](int at) { return static_cast<int>(v[static_cast<size_t>(at)]); };
  return {dtype, v[0], v[1], v[2],  v[3],  v[4],  v[5],  v[6],
          v[7],  v[8], i(9), i(10), i(11), i(12), i(13), i(14)};
}

void bind_conv_fprop(Ptr y, Ptr mean, Ptr var, Ptr rstd, Ptr x, Ptr w, double eps, Ptr work,
                     int tile, int dtype, const Sizes& sizes, int device, Ptr stream) {
  conv_fprop({any(y), f32(mean), f32(var), f32(rstd), any(x), any(w), eps, f32(work), tile,
              shape(dtype, sizes)},
             {device, stream});
}

void bind_conv_fprop_act(Ptr z, Ptr x, Ptr w, Ptr mean, Ptr rstd, Ptr gamma, Ptr beta, Ptr residual,
                         bool relu, int tile, int dtype, const Sizes& sizes, int device,
                         Ptr stream) {
  conv_fprop_act({any(z), any(x), any(w), f32(mean), f32(rstd), f32(gamma), f32(beta),
                  any(residual), relu, tile, shape(dtype, sizes)},
                 {device, stream});
}

void bind_conv_dgrad(Ptr dx, Ptr dgamma, Ptr dbeta, Ptr res_dgamma, Ptr dy, Ptr w, Ptr dres,
                     Ptr dres_mask, int gate, Ptr mask, Ptr y, Ptr mean, Ptr rstd, Ptr gamma,
                     Ptr beta, Ptr residual, Ptr res_mean, Ptr res_rstd, Ptr work, int tile,
                     int dtype, const Sizes& sizes, int device, Ptr stream) {
  conv_dgrad({any(dx),         f32(dgamma),   f32(dbeta),
              f32(res_dgamma), any(dy),       any(w),
              any(dres),       u8(dres_mask), gate,
              u8(mask),        any(y),        f32(mean),
              f32(rstd),       f32(gamma),    f32(beta),
              any(residual),   f32(res_mean), f32(res_rstd),
              f32(work),       tile,          shape(dtype, sizes)},
             {device, stream});
}

void bind_conv_wgrad(Ptr dw, Ptr dy, Ptr x, Ptr work, int tile, int dtype, const Sizes& sizes,
                     int device, Ptr stream) {
  conv_wgrad({any(dw), any(dy), any(x), f32(work), tile, shape(dtype, sizes)}, {device, stream});
}

py::dict schedule(int pass, I64 rows, I64 channels, I64 taps, I64 depth, int tile) {
  const ConvSchedule s =
      conv_schedule(static_cast<ConvPass>(pass), rows, channels, taps, depth, tile);
  py::dict out;
  out["tile"] = py::make_tuple(s.tile_m, s.tile_n, s.cluster);
  out["m_tiles"] = s.m_tiles;
  out["per"] = s.per;
  out["workers"] = s.workers;
  out["columns"] = s.columns;
  out["splits"] = s.splits;
  out["k_tiles"] = s.k_tiles;
  out["k_per"] = s.k_per;
  return out;
}

void bind_convs(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("conv_fprop", &bind_conv_fprop, NoGil());
  m.def("conv_fprop_act", &bind_conv_fprop_act, NoGil());
  m.def("conv_dgrad", &bind_conv_dgrad, NoGil());
  m.def("conv_wgrad", &bind_conv_wgrad, NoGil());
  m.def(
      "conv_why_not",
      [](int dtype, const Sizes& sizes) { return conv_why_not(shape(dtype, sizes)); },
      "Why the launchers do not take a conv; empty when they do.");
  m.def(
      "conv_workspace_floats",
      [](int pass, int dtype, const Sizes& sizes, int tile) {
        return conv_workspace_floats(static_cast<ConvPass>(pass), shape(dtype, sizes), tile);
      },
      "Floats of a pass's workspace.");
  m.def(
      "conv_tiles", [](int pass) { return tile_list(conv_tiles(static_cast<ConvPass>(pass))); },
      "(name, rows, columns, cluster, why) of each tile of a pass.");
  m.def("conv_schedule", &schedule, "How a GEMM's tiles are dealt to workers.");
}

#endif

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
#ifdef FASTRES_CUDA_CONV
  bind_convs(m);
#endif
  m.def("archs", &built_archs, "What this build has code for.");
  m.def("versions", &versions,
        "CUDA's of the driver (0: none) and of the toolkit: 13000 for 13.0.");
}

}  // namespace cuda
}  // namespace fastres
