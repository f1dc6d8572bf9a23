// The launchers of the CUDA kernels: the argument blocks of ../cpu/blocks.h, a workspace of
// workspace_floats(...) floats where a reduction needs one, and where to run.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../cpu/blocks.h"

namespace fastres {
namespace cuda {

// Where a launcher runs: the stream's handle (0: the default stream) and its device.
struct Place {
  int device;
  uintptr_t stream;
};

void bn_stats(const BnStats& p, float* work, const Place& place);
void bn_apply(const BnApply& p, const Place& place);
void bn_bwd_reduce(const BnBwdReduce& p, float* work, const Place& place);
void bn_bwd_apply(const BnBwdApply& p, const Place& place);
void add_relu(const AddRelu& p, const Place& place);
void relu_bwd(const ReluBwd& p, const Place& place);
void bn_relu_maxpool(const BnReluMaxpool& p, const Place& place);
void bn_relu_maxpool_bwd_reduce(const BnReluMaxpoolBwd& p, float* work, const Place& place);
void bn_relu_maxpool_bwd_apply(const BnReluMaxpoolBwd& p, const Place& place);

// Floats of the workspace of a reduction of `parts` sums, for any of its cuts.
int64_t workspace_floats(const Act& act, int parts);

// A tile of sums that a convolution has kernels for. Its launchers take the place in their list,
// from 1, or 0: the tile that they choose by shape. Plan files know it by its name.
struct TileChoice {
  const char* name;
  int rows, columns, cluster;
  const char* why;
};

// The tile at `place` of a list, from 1; throws std::invalid_argument where it has none.
const TileChoice& tile_at(const std::vector<TileChoice>& list, int place);

// Compute capabilities in the build, "80 90a ptx80": machine code, then PTX.
std::string built_archs();
// The CUDA version that the driver supports (0: no driver) and the toolkit's of this build, as
// 1000 * major + 10 * minor.
std::array<int, 2> versions();

}  // namespace cuda
}  // namespace fastres
