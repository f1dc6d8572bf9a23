// Convolutions on Hopper's tensor cores: argument blocks, and how an implicit GEMM's tiles are
// dealt to workers. Activations NHWC, weights K R S C, both bf16 or fp16; sums in fp32.
//
// The GEMMs (rows x columns x depth), N P Q pixels of the output, N H W of the input:
//   fprop   (N P Q) x K x (C R S)
//   dgrad   (N H W) x C x (K R S); of a strided conv one for each phase, the pixels of x that the
//           same taps reach: i * stride + first
//   wgrad   K x (C R S) x (N P Q)
#pragma once

#include <vector>

#include "ops.h"

namespace fastres {
namespace cuda {

struct ConvShape {
  int dtype;
  int64_t n, h, w, c;  // input
  int64_t k, r, s;     // filters
  int64_t p, q;        // output
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

// y = conv(x); (mean, var, rstd) of the stored y where `work` is given.
struct ConvFprop {
  void* y;
  float *mean, *var, *rstd;
  const void *x, *w;
  double eps;
  float* work;  // or null: no statistics
  int tile;     // of conv_tiles
  ConvShape conv;
};

// z = act(normalise(conv(x)) + residual)
struct ConvFpropAct {
  void* z;
  const void *x, *w;
  const float *mean, *rstd, *gamma, *beta;  // null: 0, 1, 1, 0
  const void* residual;                     // or null
  bool relu;
  int tile;
  ConvShape conv;
};

// dx = gate(dgrad(dy) + gate(dres)); dbeta = sum dx, dgamma = sum dx * xhat and the dual
// shortcut's.
struct ConvDgrad {
  void* dx;
  float *dgamma, *dbeta, *res_dgamma;  // null: no sums
  const void *dy, *w;
  const void* dres;          // or null
  const uint8_t* dres_mask;  // or null
  int gate;                  // of dx, by `mask` or recomputed from y
  const uint8_t* mask;
  const void* y;
  const float *mean, *rstd, *gamma, *beta;
  const void* residual;
  const float *res_mean, *res_rstd;
  float* work;  // where there are sums
  int tile;
  ConvShape conv;
};

// dw (K R S C) = sum over pixels of dy * x
struct ConvWgrad {
  void* dw;
  const void *dy, *x;
  float* work;
  int tile;
  ConvShape conv;
};

void conv_fprop(const ConvFprop& p, const Place& place);
void conv_fprop_act(const ConvFpropAct& p, const Place& place);
void conv_dgrad(const ConvDgrad& p, const Place& place);
void conv_wgrad(const ConvWgrad& p, const Place& place);

// Empty when the launchers take this conv, otherwise the reason.
std::string conv_why_not(const ConvShape& conv);

enum ConvPass : int { kFprop = 0, kDgrad = 1, kWgrad = 2 };

// The tiles of a pass.
const std::vector<TileChoice>& conv_tiles(ConvPass pass);

// Floats of a pass's workspace, given the tile.
int64_t conv_workspace_floats(ConvPass pass, const ConvShape& conv, int tile);

// --- how the tiles of a GEMM are dealt to workers ---

// A worker is a thread block that keeps one tile of columns, hence its channels' vectors and sums
// in registers, and walks down its share of the rows: `per` times `cluster` tiles. The blocks of a
// cluster take neighbouring tiles of rows and share the loads of the columns' operand. wgrad, whose
// depth is all pixels, has one tile for a worker and cuts the depth instead.
struct ConvSchedule {
  int tile_m, tile_n, cluster;
  int64_t m_tiles;  // tiles of rows
  int64_t per;      // tiles of rows of a worker
  int64_t workers;  // of one tile of columns; a multiple of the cluster
  int64_t columns;  // tiles of columns
  int64_t splits;   // of the depth
  int64_t k_tiles;  // steps of 64 of the whole depth
  int64_t k_per;    // of a split
  int64_t blocks() const { return workers * columns * splits; }
};

constexpr int kTileK = 64;  // 128 bytes of a 16-bit type: the widest swizzle of TMA and wgmma

ConvSchedule conv_schedule(ConvPass pass, int64_t rows, int64_t channels, int64_t taps,
                           int64_t depth, int tile);

// One phase of dgrad along one axis: x pixel i * stride + first gets from y pixel i + off - t *
// step by tap tap0 + t * tap_step, t < taps.
struct Phase {
  int64_t first, size, taps, tap0, tap_step, off, step;
};
std::vector<Phase> conv_phases(int64_t size, int64_t taps, int stride, int padding, int dilation);

}  // namespace cuda
}  // namespace fastres
