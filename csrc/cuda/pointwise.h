// The pointwise convolutions' arguments and launchers (sm_90a): 1 x 1, stride 1, one group, NHWC,
// bf16 or fp16, channels in multiples of 8. Workspaces of *_floats(...) floats.
#pragma once

#include <string>

#include "ops.h"

namespace fastres {
namespace cuda {

struct PointwiseNorm {
  const float *mean, *rstd, *gamma, *beta;
};

struct PointwiseFpropArgs {
  void* y;
  float *mean, *var, *rstd;  // of y; or null
  const void *x, *weight;    // weight: (K, C)
  PointwiseNorm norm;        // of x
  bool has_norm;
  const void* shortcut;  // added to the normalised x, or null: then z and z_mask are, too
  PointwiseNorm shortcut_norm;
  bool has_shortcut_norm;
  void* z;          // the block's output, or null
  uint8_t* z_mask;  // its bits, or null
  double eps;
  int tile;  // of pointwise_tiles
  int64_t k;
  Act act;  // of x
};

struct PointwiseFpropActArgs {
  void* z;
  const void *x, *weight;
  PointwiseNorm norm;    // of the output
  const void* residual;  // or null
  bool relu;
  int tile;
  int64_t k;
  Act act;  // of x
};

// The batch norm behind the conv: how its gradient g becomes y's, dy.
struct PointwiseNormGradient {
  const void* y;
  const float *mean, *rstd, *gamma, *dgamma, *dbeta;
  bool training;
};

struct PointwiseDgradArgs {
  void* dx;
  float *dgamma, *dbeta, *res_dgamma;  // sums, where there is a previous norm; res_dgamma or null
  const void* dz;
  const uint8_t* mask;  // of dz, or null
  const void* weight;
  PointwiseNormGradient bn;
  bool has_bn;
  const void* dres;  // or null
  const uint8_t* dres_mask;
  const void* prev_y;  // or null: no previous norm
  const uint8_t* prev_mask;
  PointwiseNorm prev;
  const void* dual;  // the dual shortcut's raw input, or null
  const float *dual_mean, *dual_rstd;
  int tile;
  int64_t k;
  Act act;  // of dx
};

struct PointwiseWgradArgs {
  void* dw;  // (K, C), strides in elements
  int64_t stride_k, stride_c;
  const void* dz;
  const uint8_t* mask;  // of dz, or null
  const void* x;
  PointwiseNormGradient bn;
  bool has_bn;
  PointwiseNorm norm;  // of x
  bool has_norm;
  int tile;
  int64_t k;
  Act act;  // of x
};

void pointwise_fprop(const PointwiseFpropArgs& p, float* work, const Place& place);
void pointwise_fprop_act(const PointwiseFpropActArgs& p, const Place& place);
int64_t pointwise_fprop_floats(int64_t rows, int64_t c, int64_t k, int tile);
void pointwise_dgrad(const PointwiseDgradArgs& p, float* work, const Place& place);
int64_t pointwise_dgrad_floats(int64_t rows, int64_t c, int64_t k, int parts, int tile);
void pointwise_wgrad(const PointwiseWgradArgs& p, float* work, const Place& place);
int64_t pointwise_wgrad_floats(int64_t rows, int64_t c, int64_t k, int tile);

// The tiles of an op.
enum PointwiseOp : int { kPointFprop, kPointFpropAct, kPointDgrad, kPointWgrad };
const std::vector<TileChoice>& pointwise_tiles(PointwiseOp op);

// What a launch is made of.
struct PointwiseShape {
  int columns;    // of a tile
  int stages;     // of the ring
  int64_t bytes;  // of dynamic shared memory
  bool resident;  // the weights stay there
  int64_t blocks;
};
// Of the forms with most in shared memory: fprop with a norm (form 0), two norms and a shortcut
// (1), an affine output (2); dgrad and wgrad between batch norms, with masks.
PointwiseShape pointwise_fprop_shape(int form, int64_t rows, int64_t c, int64_t k);
PointwiseShape pointwise_dgrad_shape(int64_t rows, int64_t c, int64_t k);
PointwiseShape pointwise_wgrad_shape(int64_t rows, int64_t c, int64_t k);

// Empty where the kernels run on the device, otherwise why not.
std::string pointwise_missing(int device);
// Empty where they take these sizes (c: the reduction's and k: the columns' channels, or both).
std::string pointwise_refuses(int64_t rows, int64_t c, int64_t k);

}  // namespace cuda
}  // namespace fastres
