// The host side that the pointwise launchers share: schedules, tensor maps, refusals.
#pragma once

#include "launch.cuh"
#include "pointwise.cuh"
#include "pointwise.h"

namespace fastres {
namespace cuda {

// What a kernel keeps in shared memory besides its ring.
struct Needs {
  bool y = false;         // a second tile in each stage
  int bits = 0;           // bytes of mask in each stage
  int row_planes = 0;     // vectors over the reduction
  int column_planes = 0;  // vectors over the tile's columns
  bool staging = true;    // for an epilogue
};

// Blocks that a launch aims at.
int64_t blocks();

// The part of a schedule that lies in shared memory. The weights of `steps` steps stay there where
// they fit; of 0 steps they, or wgrad's x, never do.
Schedule shared_memory(int steps, int n, const Needs& needs);

// Of a GEMM of `rows` x `width` over `length` in tiles of kTileRows x n.
Schedule schedule(int64_t rows, int64_t length, int64_t width, int n, const Needs& needs);

// The columns of an op's tile; by shape the widest that is no wider than `width` asks for.
int tile_columns(PointwiseOp op, int64_t width, int tile);

// A stage is given back after the next one's wgmmas were issued (Multiply): a ring of one would
// wait for itself.
constexpr int kStagesLeast = 2;
// Refuses a schedule whose ring is too short, with std::invalid_argument.
void check_ring(const Launch& launch, const Schedule& s);

PointwiseShape shape_of(const Schedule& s, int n);

NormBackward norm_backward(const PointwiseNormGradient& bn, bool on, int64_t rows);

// The map of a row-major (rows, columns) matrix of 16-bit elements, read in boxes of
// (box_rows, 64) under the 128-byte swizzle.
TensorMap tensor_map(const Launch& launch, const void* base, int64_t rows, int64_t columns,
                     int box_rows);

// Refuses what the kernels do not take: with std::invalid_argument sizes, dtype and alignment,
// with std::runtime_error the device.
void check_pointwise(const Launch& launch, int64_t k,
                     std::initializer_list<const void*> activations);

template <class F>
void with_half(int dtype, const F& f) {
  if (dtype == kBF16) {
    f(BF16{});
  } else {
    f(F16{});
  }
}

}  // namespace cuda
}  // namespace fastres
