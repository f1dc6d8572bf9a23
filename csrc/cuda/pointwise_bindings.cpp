// fastres._C.cuda's pointwise convolutions. fastres/_cuda_pointwise.py is the caller.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "../arguments.h"
#include "pointwise.h"

namespace py = pybind11;

namespace fastres {
namespace cuda {
namespace {

using NormPtrs = std::array<Ptr, 4>;  // mean, rstd, gamma, beta
PointwiseNorm norm_of(const NormPtrs& p) { return {f32(p[0]), f32(p[1]), f32(p[2]), f32(p[3])}; }

void bind_fprop(Ptr y, Ptr mean, Ptr var, Ptr rstd, Ptr z, Ptr z_mask, Ptr x, Ptr weight,
                NormPtrs norm, bool has_norm, Ptr shortcut, NormPtrs shortcut_norm,
                bool has_shortcut_norm, double eps, I64 k, Ptr work, int tile, int dtype, bool nhwc,
                I64 n, I64 c, I64 s, int device, Ptr stream) {
  pointwise_fprop({any(y), f32(mean), f32(var), f32(rstd), any(x), any(weight), norm_of(norm),
                   has_norm, any(shortcut), norm_of(shortcut_norm), has_shortcut_norm, any(z),
                   u8(z_mask), eps, tile, k, act(dtype, nhwc, n, c, s)},
                  f32(work), {device, stream});
}

void bind_fprop_act(Ptr z, Ptr x, Ptr weight, NormPtrs norm, Ptr residual, bool relu, I64 k,
                    int tile, int dtype, bool nhwc, I64 n, I64 c, I64 s, int device, Ptr stream) {
  pointwise_fprop_act({any(z), any(x), any(weight), norm_of(norm), any(residual), relu, tile, k,
                       act(dtype, nhwc, n, c, s)},
                      {device, stream});
}

// y, mean, rstd, gamma, dgamma, dbeta
using NormGradientPtrs = std::array<Ptr, 6>;
PointwiseNormGradient norm_gradient(const NormGradientPtrs& p, bool training) {
  return {any(p[0]), f32(p[1]), f32(p[2]), f32(p[3]), f32(p[4]), f32(p[5]), training};
}

// sums: dgamma, dbeta, res_dgamma; prev: y, mask, mean, rstd, gamma, beta; dual: x, mean, rstd
void bind_dgrad(Ptr dx, std::array<Ptr, 3> sums, Ptr dz, Ptr mask, Ptr weight, NormGradientPtrs bn,
                bool has_bn, bool training, Ptr dres, Ptr dres_mask, std::array<Ptr, 6> prev,
                std::array<Ptr, 3> dual, I64 k, Ptr work, int tile, int dtype, bool nhwc, I64 n,
                I64 c, I64 s, int device, Ptr stream) {
  pointwise_dgrad({any(dx),
                   f32(sums[0]),
                   f32(sums[1]),
                   f32(sums[2]),
                   any(dz),
                   u8(mask),
                   any(weight),
                   norm_gradient(bn, training),
                   has_bn,
                   any(dres),
                   u8(dres_mask),
                   any(prev[0]),
                   u8(prev[1]),
                   {f32(prev[2]), f32(prev[3]), f32(prev[4]), f32(prev[5])},
                   any(dual[0]),
                   f32(dual[1]),
                   f32(dual[2]),
                   tile,
                   k,
                   act(dtype, nhwc, n, c, s)},
                  f32(work), {device, stream});
}

void bind_wgrad(Ptr dw, I64 stride_k, I64 stride_c, Ptr dz, Ptr mask, Ptr x, NormGradientPtrs bn,
                bool has_bn, bool training, NormPtrs norm, bool has_norm, I64 k, Ptr work, int tile,
                int dtype, bool nhwc, I64 n, I64 c, I64 s, int device, Ptr stream) {
  pointwise_wgrad(
      {any(dw), stride_k, stride_c, any(dz), u8(mask), any(x), norm_gradient(bn, training), has_bn,
       norm_of(norm), has_norm, tile, k, act(dtype, nhwc, n, c, s)},
      f32(work), {device, stream});
}

py::dict shape(const PointwiseShape& s) {
  py::dict out;
  out["columns"] = s.columns;
  out["stages"] = s.stages;
  out["shared"] = s.bytes;
  out["resident"] = s.resident;
  out["blocks"] = s.blocks;
  return out;
}

}  // namespace

py::list tile_list(const std::vector<TileChoice>& tiles) {
  py::list out;
  for (const TileChoice& t : tiles) {
    out.append(py::make_tuple(t.name, t.rows, t.columns, t.cluster, t.why));
  }
  return out;
}

void bind_pointwise(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("pointwise_fprop", &bind_fprop, NoGil());
  m.def("pointwise_fprop_act", &bind_fprop_act, NoGil());
  m.def("pointwise_fprop_floats", &pointwise_fprop_floats, "Floats of its workspace.");
  m.def("pointwise_dgrad", &bind_dgrad, NoGil());
  m.def("pointwise_dgrad_floats", &pointwise_dgrad_floats, "Floats of its workspace.");
  m.def("pointwise_wgrad", &bind_wgrad, NoGil());
  m.def("pointwise_wgrad_floats", &pointwise_wgrad_floats, "Floats of its workspace.");
  m.def(
      "pointwise_fprop_shape",
      [](int form, I64 rows, I64 c, I64 k) {
        return shape(pointwise_fprop_shape(form, rows, c, k));
      },
      "Tile and ring of a launch; form 0: normalised input, 1: a block's, 2: affine output.");
  m.def("pointwise_dgrad_shape",
        [](I64 rows, I64 c, I64 k) { return shape(pointwise_dgrad_shape(rows, c, k)); });
  m.def("pointwise_wgrad_shape",
        [](I64 rows, I64 c, I64 k) { return shape(pointwise_wgrad_shape(rows, c, k)); });
  m.def(
      "pointwise_tiles",
      [](int op) { return tile_list(pointwise_tiles(static_cast<PointwiseOp>(op))); },
      "(name, rows, columns, cluster, why) of each tile of an op; 0: fprop, 1: fprop_act, 2: "
      "dgrad, "
      "3: wgrad.");
  m.def("pointwise_missing", &pointwise_missing, "Why they do not run on a device; or empty.");
  m.def("pointwise_refuses", &pointwise_refuses, "Why they do not take these sizes; or empty.");
}

}  // namespace cuda
}  // namespace fastres
