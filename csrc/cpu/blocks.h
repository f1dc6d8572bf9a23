// The argument blocks of the functions of docs/kernels.md, for the CPU's kernels and the GPU's: one
// struct each, fields in the contract's order: outputs, inputs, saved statistics, scalars. Plain
// data on purpose: this header is compiled with several sets of machine flags, so it must not
// define a single (inline) function that the linker could merge.
#pragma once

#include <cstdint>

namespace fastres {

enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum Gate : int { kGateNone = 0, kGateMask = 1, kGateRecompute = 2 };

// An activation as a row-major (outer, inner) matrix. NHWC: (N*S, C). NCHW: (N*C, S). S = H * W.
struct Act {
  int dtype;
  bool nhwc;
  int64_t n, c, s;
  int64_t outer, inner;
  int64_t mask_row;  // bytes of one mask row: ceil(inner / 8)
};

struct BnStats {
  float *mean, *var, *rstd;  // (C)
  const void* x;
  double eps;
  Act act;
};

struct BnApply {
  void* z;
  uint8_t* mask;  // or null
  const void* x;
  const float *mean, *rstd, *gamma, *beta;  // each (C) or null: 0, 1, 1, 0
  const void* residual;                     // or null
  const float *res_mean, *res_rstd, *res_gamma, *res_beta;
  bool res_norm;  // residual is normalised with res_*
  bool relu;
  Act act;
};

struct BnBwdReduce {
  float *dgamma, *dbeta, *res_dgamma;  // res_dgamma or null
  const void* dz;
  const uint8_t* mask;
  const void* x;
  const float *mean, *rstd, *gamma, *beta;
  const void* residual;
  const float *res_mean, *res_rstd;
  int gate;
  Act act;
};

struct BnBwdApply {
  void *dx, *dres;  // dres or null
  const void* dz;
  const uint8_t* mask;
  const void* x;
  const float *mean, *rstd, *gamma, *beta, *dgamma, *dbeta;
  const void* residual;
  const float *res_mean, *res_rstd, *res_gamma, *res_dgamma;
  int gate;
  bool training, res_norm, res_training;
  Act act;
};

struct AddRelu {
  void* z;
  uint8_t* mask;  // or null
  const void *a, *b;
  Act act;
};

struct ReluBwd {
  void* dx;
  const void *dy, *dz;  // dy or null
  const uint8_t* mask;
  Act act;
};

struct PoolGeometry {
  int64_t h, w, oh, ow;
  int kernel, stride, padding;
};

struct BnReluMaxpool {
  void* z;
  uint8_t* index;  // or null
  const void* x;
  const float *mean, *rstd, *gamma, *beta;
  PoolGeometry pool;
  Act act;  // of x
};

struct BnReluMaxpoolBwd {
  void* dx;               // apply only
  float *dgamma, *dbeta;  // outputs of reduce, inputs of apply
  const void* dz;
  const uint8_t* index;
  const void* x;
  const float *mean, *rstd, *gamma;
  PoolGeometry pool;
  bool training;
  Act act;  // of x
};

}  // namespace fastres
