// The argument blocks of the CPU kernels, and the functions every ISA variant provides.
//
// One struct per function of docs/kernels.md, fields in the contract's order: outputs, inputs,
// saved statistics, scalars. Plain data on purpose: this header is compiled with several sets of
// machine flags, so it must not define a single (inline) function that the linker could merge.
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

// 3x3 convolutions of stride 1 in NHWC, by Winograd's F(4x4, 3x3); fp32 or bf16 activations.
struct WinogradWeights {
  const float* w;  // w[k * stride_k + c * stride_c + r * stride_r + s * stride_s]
  int dtype;       // of the activations: weights are rounded to it
  int64_t k, c, stride_k, stride_c, stride_r, stride_s;
  bool turned;  // by 180 degrees, for dgrad
};

struct WinogradFprop {
  void* y;  // (N, OH, OW, K)
  const void* x;
  const float* u;           // winograd_weights' result (ceil(K / 32), 36, C, 32); null: from
  WinogradWeights weights;  // these
  const float* bias;        // (K) or null
  const void* residual;     // like y, may be y; or null
  bool relu;
  int dtype;
  int64_t n, h, w, c, k, padding, oh, ow;
  int64_t threads;  // of the pool: how finely to cut
};

struct WinogradWgrad {
  float* dw;  // (K, 3, 3, C)
  const void *dy, *x;
  int dtype;
  int64_t n, h, w, c, k, padding, oh, ow, threads;
};

// Every variant fills one table; runtime.cpp picks the table once.
#define FASTRES_DECLARE_KERNELS                             \
  void bn_stats(const BnStats&);                            \
  void bn_apply(const BnApply&);                            \
  void bn_bwd_reduce(const BnBwdReduce&);                   \
  void bn_bwd_apply(const BnBwdApply&);                     \
  void add_relu(const AddRelu&);                            \
  void relu_bwd(const ReluBwd&);                            \
  void bn_relu_maxpool(const BnReluMaxpool&);               \
  void bn_relu_maxpool_bwd_reduce(const BnReluMaxpoolBwd&); \
  void bn_relu_maxpool_bwd_apply(const BnReluMaxpoolBwd&);  \
  void winograd_weights(float* u, const WinogradWeights&);  \
  void winograd_fprop(const WinogradFprop&);                \
  void winograd_wgrad(const WinogradWgrad&);                \
  int64_t winograd_wgrad_jobs(const WinogradWgrad&);

namespace portable {
FASTRES_DECLARE_KERNELS
}
namespace avx2 {
FASTRES_DECLARE_KERNELS
}
namespace avx512 {
FASTRES_DECLARE_KERNELS
}

struct Kernels {
  const char* isa;
  void (*bn_stats)(const BnStats&);
  void (*bn_apply)(const BnApply&);
  void (*bn_bwd_reduce)(const BnBwdReduce&);
  void (*bn_bwd_apply)(const BnBwdApply&);
  void (*add_relu)(const AddRelu&);
  void (*relu_bwd)(const ReluBwd&);
  void (*bn_relu_maxpool)(const BnReluMaxpool&);
  void (*bn_relu_maxpool_bwd_reduce)(const BnReluMaxpoolBwd&);
  void (*bn_relu_maxpool_bwd_apply)(const BnReluMaxpoolBwd&);
  void (*winograd_weights)(float* u, const WinogradWeights&);
  void (*winograd_fprop)(const WinogradFprop&);
  void (*winograd_wgrad)(const WinogradWgrad&);
  int64_t (*winograd_wgrad_jobs)(const WinogradWgrad&);
};

}  // namespace fastres
