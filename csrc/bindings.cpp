// fastres._C: raw addresses and sizes in, nothing allocated, no torch. fastres/_cpu.py is the
// caller. Addresses are integers, 0 where the contract says None. The GIL is released while a
// kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "build_info.h"
#include "cpu/runtime.h"
#include "route.h"
#include "watch.h"
#ifdef FASTRES_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace fastres {
namespace {

void bn_stats(Ptr mean, Ptr var, Ptr rstd, Ptr x, double eps, int dtype, bool nhwc, I64 n, I64 c,
              I64 s) {
  kernels().bn_stats({f32(mean), f32(var), f32(rstd), any(x), eps, act(dtype, nhwc, n, c, s)});
}

void bn_apply(Ptr z, Ptr mask, Ptr x, Ptr mean, Ptr rstd, Ptr gamma, Ptr beta, Ptr residual,
              Ptr res_mean, Ptr res_rstd, Ptr res_gamma, Ptr res_beta, bool res_norm, bool relu,
              int dtype, bool nhwc, I64 n, I64 c, I64 s) {
  kernels().bn_apply({any(z), u8(mask), any(x), f32(mean), f32(rstd), f32(gamma), f32(beta),
                      any(residual), f32(res_mean), f32(res_rstd), f32(res_gamma), f32(res_beta),
                      res_norm, relu, act(dtype, nhwc, n, c, s)});
}

void bn_bwd_reduce(Ptr dgamma, Ptr dbeta, Ptr res_dgamma, Ptr dz, Ptr mask, Ptr x, Ptr mean,
                   Ptr rstd, Ptr gamma, Ptr beta, Ptr residual, Ptr res_mean, Ptr res_rstd,
                   int gate, int dtype, bool nhwc, I64 n, I64 c, I64 s) {
  kernels().bn_bwd_reduce({f32(dgamma), f32(dbeta), f32(res_dgamma), any(dz), u8(mask), any(x),
                           f32(mean), f32(rstd), f32(gamma), f32(beta), any(residual),
                           f32(res_mean), f32(res_rstd), gate, act(dtype, nhwc, n, c, s)});
}

void bn_bwd_apply(Ptr dx, Ptr dres, Ptr dz, Ptr mask, Ptr x, Ptr mean, Ptr rstd, Ptr gamma,
                  Ptr beta, Ptr dgamma, Ptr dbeta, Ptr residual, Ptr res_mean, Ptr res_rstd,
                  Ptr res_gamma, Ptr res_dgamma, int gate, bool training, bool res_norm,
                  bool res_training, int dtype, bool nhwc, I64 n, I64 c, I64 s) {
  kernels().bn_bwd_apply({any(dx),         any(dres),     any(dz),
                          u8(mask),        any(x),        f32(mean),
                          f32(rstd),       f32(gamma),    f32(beta),
                          f32(dgamma),     f32(dbeta),    any(residual),
                          f32(res_mean),   f32(res_rstd), f32(res_gamma),
                          f32(res_dgamma), gate,          training,
                          res_norm,        res_training,  act(dtype, nhwc, n, c, s)});
}

void add_relu(Ptr z, Ptr mask, Ptr a, Ptr b, int dtype, bool nhwc, I64 n, I64 c, I64 s) {
  kernels().add_relu({any(z), u8(mask), any(a), any(b), act(dtype, nhwc, n, c, s)});
}

void relu_bwd(Ptr dx, Ptr dy, Ptr dz, Ptr mask, int dtype, bool nhwc, I64 n, I64 c, I64 s) {
  kernels().relu_bwd({any(dx), any(dy), any(dz), u8(mask), act(dtype, nhwc, n, c, s)});
}

void bn_relu_maxpool(Ptr z, Ptr index, Ptr x, Ptr mean, Ptr rstd, Ptr gamma, Ptr beta, int kernel,
                     int stride, int padding, int dtype, bool nhwc, I64 n, I64 c, I64 h, I64 w,
                     I64 oh, I64 ow) {
  kernels().bn_relu_maxpool({any(z),
                             u8(index),
                             any(x),
                             f32(mean),
                             f32(rstd),
                             f32(gamma),
                             f32(beta),
                             {h, w, oh, ow, kernel, stride, padding},
                             act(dtype, nhwc, n, c, h * w)});
}

void bn_relu_maxpool_bwd_reduce(Ptr dgamma, Ptr dbeta, Ptr dz, Ptr index, Ptr x, Ptr mean, Ptr rstd,
                                int kernel, int stride, int padding, int dtype, bool nhwc, I64 n,
                                I64 c, I64 h, I64 w, I64 oh, I64 ow) {
  kernels().bn_relu_maxpool_bwd_reduce({nullptr,
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
                                        act(dtype, nhwc, n, c, h * w)});
}

void bn_relu_maxpool_bwd_apply(Ptr dx, Ptr dz, Ptr index, Ptr x, Ptr mean, Ptr rstd, Ptr gamma,
                               Ptr dgamma, Ptr dbeta, int kernel, int stride, int padding,
                               bool training, int dtype, bool nhwc, I64 n, I64 c, I64 h, I64 w,
                               I64 oh, I64 ow) {
  kernels().bn_relu_maxpool_bwd_apply({any(dx),
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
                                       act(dtype, nhwc, n, c, h * w)});
}

void max_pool(Ptr z, Ptr x, int kernel, int stride, int padding, int dtype, I64 n, I64 c, I64 h,
              I64 w, I64 oh, I64 ow) {
  kernels().max_pool({any(z), any(x), dtype, n, c, {h, w, oh, ow, kernel, stride, padding}});
}

I64 abs_max(Ptr x, int dtype, I64 count) { return kernels().abs_max(any(x), dtype, count); }

WinogradWeights winograd(Ptr w, int dtype, I64 k, I64 c, I64 stride_k, I64 stride_c, I64 stride_r,
                         I64 stride_s, bool turned) {
  return {f32(w), dtype, k, c, stride_k, stride_c, stride_r, stride_s, turned};
}

void winograd_weights(Ptr u, Ptr w, int dtype, I64 k, I64 c, I64 stride_k, I64 stride_c,
                      I64 stride_r, I64 stride_s, bool turned) {
  kernels().winograd_weights(
      f32(u), winograd(w, dtype, k, c, stride_k, stride_c, stride_r, stride_s, turned));
}

void winograd_fprop(Ptr y, Ptr x, Ptr u, Ptr w, I64 stride_k, I64 stride_c, I64 stride_r,
                    I64 stride_s, bool turned, Ptr bias, Ptr residual, bool relu, int dtype, I64 n,
                    I64 height, I64 width, I64 c, I64 k, I64 padding, I64 threads) {
  kernels().winograd_fprop(
      {any(y), any(x), f32(u),
       winograd(w, dtype, k, c, stride_k, stride_c, stride_r, stride_s, turned), f32(bias),
       any(residual), relu, dtype, n, height, width, c, k, padding, height + 2 * padding - 2,
       width + 2 * padding - 2, threads});
}

void winograd_wgrad(Ptr dw, Ptr dy, Ptr x, int dtype, I64 n, I64 h, I64 w, I64 c, I64 k,
                    I64 padding, I64 threads) {
  kernels().winograd_wgrad({f32(dw), any(dy), any(x), dtype, n, h, w, c, k, padding,
                            h + 2 * padding - 2, w + 2 * padding - 2, threads});
}

I64 winograd_wgrad_jobs(I64 n, I64 h, I64 w, I64 c, I64 k, I64 padding, I64 threads) {
  return kernels().winograd_wgrad_jobs({nullptr, nullptr, nullptr, 0, n, h, w, c, k, padding,
                                        h + 2 * padding - 2, w + 2 * padding - 2, threads});
}

bool conv_wgrad_runs() { return kernels().conv_wgrad_runs(); }

using Pair = std::array<I64, 2>;  // h, w

ConvWgrad wgrad_of(Ptr dw, Ptr dy, Ptr x, I64 n, I64 h, I64 w, I64 c, I64 k, Pair out, Pair taps,
                   Pair stride, Pair padding, Pair dilation) {
  return {f32(dw),
          any(dy),
          any(x),
          n,
          h,
          w,
          c,
          k,
          out[0],
          out[1],
          {taps[0], taps[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

I64 conv_wgrad_jobs(I64 n, I64 h, I64 w, I64 c, I64 k, Pair out, Pair taps, Pair stride,
                    Pair padding, Pair dilation) {
  return kernels().conv_wgrad_jobs(
      wgrad_of(0, 0, 0, n, h, w, c, k, out, taps, stride, padding, dilation));
}

void conv_wgrad(Ptr dw, Ptr dy, Ptr x, I64 n, I64 h, I64 w, I64 c, I64 k, Pair out, Pair taps,
                Pair stride, Pair padding, Pair dilation) {
  kernels().conv_wgrad(wgrad_of(dw, dy, x, n, h, w, c, k, out, taps, stride, padding, dilation));
}

// The yardstick of the benchmark suites (bench/): memcpy on the same threads, in chunks of 256 KiB.
void copy(Ptr dst, Ptr src, I64 bytes) {
  constexpr I64 kChunk = 256 << 10;
  struct Job {
    char* dst;
    const char* src;
    I64 bytes;
  } job{as<char>(dst), as<const char>(src), bytes};
  parallel_for((bytes + kChunk - 1) / kChunk, 1,
               [](int64_t begin, int64_t end, void* ctx) {
                 const Job& j = *static_cast<const Job*>(ctx);
                 const I64 stop = end * kChunk < j.bytes ? end * kChunk : j.bytes;
                 std::memcpy(j.dst + begin * kChunk, j.src + begin * kChunk,
                             static_cast<size_t>(stop - begin * kChunk));
               },
               &job);
}

// running = (1 - momentum) * running + momentum * batch for (mean, var, stats, C, momentum, unbias,
// batches) of each batch norm, in double and rounded once, as torch's batch norm does; vectors are
// fp32, stats (3, C); *batches, an int64, counts up.
void update_running_stats(const py::list& norms) {
  for (const py::handle entry : norms) {
    const auto norm = py::reinterpret_borrow<py::tuple>(entry);
    float* mean = f32(norm[0].cast<Ptr>());
    float* var = f32(norm[1].cast<Ptr>());
    const float* stats = f32(norm[2].cast<Ptr>());
    const I64 c = norm[3].cast<I64>();
    const double momentum = norm[4].cast<double>();
    const double unbias = norm[5].cast<double>();
    if (const Ptr batches = norm[6].cast<Ptr>()) {
      ++*as<int64_t>(batches);
    }
    for (I64 i = 0; i < c; ++i) {
      mean[i] = static_cast<float>(momentum * stats[i] + (1 - momentum) * mean[i]);
      var[i] = static_cast<float>(momentum * (unbias * stats[c + i]) + (1 - momentum) * var[i]);
    }
  }
}

// The handle that torch._C._aoti gives out in a capsule; the reference becomes ours. None: none.
Tensor tensor(const py::handle& capsule) {
  if (capsule.is_none()) return Tensor();
  return Tensor(static_cast<TensorHandle>(py::reinterpret_borrow<py::capsule>(capsule)));
}

// (weight, bias, add_bias) as capsules, then padding, stride, dilation, groups, channels
PackedConv packed_conv(const py::handle& entry) {
  const auto c = py::reinterpret_borrow<py::tuple>(entry);
  PackedConv found{tensor(c[0]), tensor(c[1]), tensor(c[2]), {}, {}, {}, 0, 0};
  int64_t* const pairs[] = {found.padding, found.stride, found.dilation};
  for (size_t i = 0; i < 3; ++i) {
    const auto pair = c[3 + i].cast<std::pair<int64_t, int64_t>>();
    pairs[i][0] = pair.first;
    pairs[i][1] = pair.second;
  }
  found.groups = c[6].cast<int64_t>();
  found.channels = c[7].cast<int64_t>();
  return found;
}

using BoundTuple = std::tuple<double, double, double>;

void add_stem(Route& r, const py::tuple& conv, const BoundTuple& b, int kernel, int stride,
              int padding) {
  r.add_stem(packed_conv(conv), {std::get<0>(b), std::get<1>(b), std::get<2>(b)}, kernel, stride,
             padding);
}

void add_block(Route& r, const py::list& convs, const BoundTuple& b, bool projected) {
  std::vector<PackedConv> packed;
  for (const py::handle c : convs) packed.push_back(packed_conv(c));
  r.add_block(std::move(packed), {std::get<0>(b), std::get<1>(b), std::get<2>(b)}, projected);
}

py::tuple run_route(const Route& r, const py::capsule& x, double largest, int64_t threads) {
  Tensor given = tensor(x);
  Route::Result result;
  {
    py::gil_scoped_release no_gil;
    result = r.run(std::move(given), largest, threads);
  }
  return py::make_tuple(py::capsule(result.z.release()), result.largest, result.done);
}

std::string isa() { return kernels().isa; }
py::object isas() { return py::str(supported_isas()).attr("split")(); }
py::object all_isas() { return py::str(built_isas()).attr("split")(); }

}  // namespace
}  // namespace fastres

PYBIND11_MODULE(_C, m) {
  using namespace fastres;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CPU kernels of docs/kernels.md on raw addresses. Private: use fastres.ops.";
  m.def("bn_stats", &bn_stats, NoGil());
  m.def("bn_apply", &bn_apply, NoGil());
  m.def("bn_bwd_reduce", &bn_bwd_reduce, NoGil());
  m.def("bn_bwd_apply", &bn_bwd_apply, NoGil());
  m.def("add_relu", &fastres::add_relu, NoGil());
  m.def("relu_bwd", &fastres::relu_bwd, NoGil());
  m.def("bn_relu_maxpool", &bn_relu_maxpool, NoGil());
  m.def("bn_relu_maxpool_bwd_reduce", &bn_relu_maxpool_bwd_reduce, NoGil());
  m.def("bn_relu_maxpool_bwd_apply", &bn_relu_maxpool_bwd_apply, NoGil());
  m.def("max_pool", &fastres::max_pool, NoGil());
  m.def("abs_max", &fastres::abs_max, NoGil());
  m.def("winograd_weights", &winograd_weights, NoGil());
  m.def("winograd_fprop", &winograd_fprop, NoGil());
  m.def("winograd_wgrad", &winograd_wgrad, NoGil());
  m.def("winograd_wgrad_jobs", &winograd_wgrad_jobs);
  m.def("conv_wgrad_runs", &conv_wgrad_runs);
  m.def("conv_wgrad_jobs", &conv_wgrad_jobs);
  m.def("conv_wgrad", &conv_wgrad, NoGil());
  m.def("update_running_stats", &update_running_stats);
  m.def("copy", &copy, NoGil(), "Parallel memcpy(dst, src, bytes): the bandwidth yardstick.");

  py::class_<Watch>(m, "Watch", "Whether modules and tensors are as they were: fastres/_watch.py.")
      .def(py::init<py::list, py::list, py::list, py::list>())
      .def("holds", &Watch::holds);

  py::class_<Route>(m, "Route", "A network's folded convs in a row: fastres/_route.py.")
      .def(py::init<int>())
      .def("add_stem", &add_stem)
      .def("add_block", &add_block)
      .def("run", &run_route);
  m.def("torch_shim_names", &torch_shim_names);
  m.def("set_torch_shims", &set_torch_shims);

  m.def("isa", &isa, "The ISA in use; FASTRES_CPU_ISA forces one.");
  m.def("isas", &isas, "The ISA variants of this build that this CPU runs, worst first.");
  m.def("built_isas", &all_isas, "All ISA variants of this build.");
  m.def("set_parallel_for", &set_parallel_for, "Address of torch_parallel_for; 0 = serial.");
  m.def("has_parallel_for", &has_parallel_for);
  m.def("tune_malloc", &tune_malloc, "Keep large blocks on the heap (glibc); False elsewhere.");
  m.def("untune_malloc", &untune_malloc, "glibc's defaults again; False elsewhere.");
  m.attr("build_info") = kBuildInfo;
#ifdef FASTRES_CUDA
  auto cuda_module = m.def_submodule("cuda", "CUDA kernels of docs/kernels.md on raw addresses.");
  fastres::cuda::bind(cuda_module);
#endif
}
