// The functions that every ISA variant of the CPU kernels provides, and the argument blocks of
// those that the CPU alone has. No functions are defined here: see blocks.h.
#pragma once

#include <cstdint>

#include "blocks.h"

namespace fastres {

struct MaxPool {
  void* z;
  const void* x;  // NHWC
  int dtype;
  int64_t n, c;
  PoolGeometry pool;
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

// Any convolution of one group in NHWC, of n, h, w, c, k >= 1 and at least one output; bf16.
struct ConvWgrad {
  float* dw;  // (K, taps, C)
  const void *dy, *x;
  int64_t n, h, w, c, k, oh, ow;
  int64_t taps[2], stride[2], padding[2], dilation[2];  // h, w
};

// Every variant fills one table; runtime.cpp picks the table once.
#define FASTRES_DECLARE_KERNELS                              \
  void bn_stats(const BnStats&);                             \
  void bn_apply(const BnApply&);                             \
  void bn_bwd_reduce(const BnBwdReduce&);                    \
  void bn_bwd_apply(const BnBwdApply&);                      \
  void add_relu(const AddRelu&);                             \
  void relu_bwd(const ReluBwd&);                             \
  void bn_relu_maxpool(const BnReluMaxpool&);                \
  void bn_relu_maxpool_bwd_reduce(const BnReluMaxpoolBwd&);  \
  void bn_relu_maxpool_bwd_apply(const BnReluMaxpoolBwd&);   \
  void max_pool(const MaxPool&);                             \
  uint32_t abs_max(const void* x, int dtype, int64_t count); \
  void winograd_weights(float* u, const WinogradWeights&);   \
  void winograd_fprop(const WinogradFprop&);                 \
  void winograd_wgrad(const WinogradWgrad&);                 \
  int64_t winograd_wgrad_jobs(const WinogradWgrad&);         \
  bool conv_wgrad_runs();                                    \
  int64_t conv_wgrad_jobs(const ConvWgrad&);                 \
  void conv_wgrad(const ConvWgrad&);

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
  void (*max_pool)(const MaxPool&);
  uint32_t (*abs_max)(const void* x, int dtype, int64_t count);
  void (*winograd_weights)(float* u, const WinogradWeights&);
  void (*winograd_fprop)(const WinogradFprop&);
  void (*winograd_wgrad)(const WinogradWgrad&);
  int64_t (*winograd_wgrad_jobs)(const WinogradWgrad&);
  bool (*conv_wgrad_runs)();                     // whether conv_wgrad may be called
  int64_t (*conv_wgrad_jobs)(const ConvWgrad&);  // what the threads can share
  void (*conv_wgrad)(const ConvWgrad&);
};

}  // namespace fastres
