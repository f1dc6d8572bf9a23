#include "pointwise_launch.cuh"

#include <stdexcept>

#ifndef FASTRES_CUDA_HOST
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

namespace fastres {
namespace cuda {
namespace {

#ifdef FASTRES_CUDA_HOST
constexpr int64_t kBlocks = 3;  // small tensors in the tests are to have chunks of several tiles
constexpr int kStagesMost = 2;  // and rings that turn round
#else
constexpr int64_t kBlocks = 132;  // SMs of an H100 or H200; a constant: results depend on it
constexpr int kStagesMost = 8;
#endif
// Bytes in flight to the memory: 4.8 TB/s * 0.8 us / 132 SMs = 29 KB an SM, two tiles of 16 KB; one
// more is being multiplied and one transformed.
constexpr int kStagesWanted = 4;

}  // namespace

// Each has a block of two warpgroups over 128 pixels.
const std::vector<TileChoice>& pointwise_tiles(PointwiseOp op) {
  constexpr const char* kNarrow = "64 columns: no products of zeros";
  static const std::vector<TileChoice> wide{
      {"pointwise-128x64", kTileRows, 64, 1, kNarrow},
      {"pointwise-128x128", kTileRows, 128, 1, "more blocks and stages than 256 columns leave"},
      {"pointwise-128x256", kTileRows, 256, 1, "the prologue and the rows' loads once for 256"}};
  // conv_fprop_act and conv_dgrad spill at 256
  static const std::vector<TileChoice> half{
      wide[0],
      {"pointwise-128x128", kTileRows, 128, 1, "the prologue and the rows' loads once for 128"}};
  return op == kPointFprop || op == kPointWgrad ? wide : half;
}

int tile_columns(PointwiseOp op, int64_t width, int tile) {
  const std::vector<TileChoice>& tiles = pointwise_tiles(op);
  if (tile != 0) return tile_at(tiles, tile).columns;
  size_t i = 0;
  while (i + 1 < tiles.size() && tiles[i].columns < width) ++i;
  return tiles[i].columns;
}

int64_t blocks() { return kBlocks; }

Schedule shared_memory(int steps, int n, const Needs& needs) {
  Schedule s{};
  s.steps = steps;
  // 1. what is there once
  const int staging = needs.staging ? kConsumers / 32 * kStagingBytes : 0;
  const int row_table = 4 * needs.row_planes * steps * kTileChannels;
  const int column_table = 4 * needs.column_planes * n;
  constexpr int kCounts = 64;
  const int once = staging + row_table + column_table + kCounts + 8 * (2 * kStagesMost + 1);
  const int weights = n * kSwizzleBytes;  // of a step
  const int64_t all = static_cast<int64_t>(weights) * steps;
  // 2. a stage, and whether the weights are part of it
  const int tiles = kTileBytes * (needs.y ? 2 : 1);
  const auto fit = [&](int stage, int64_t more) { return (kMostShared - once - more) / stage; };
  s.resident = all > 0 && fit(tiles + needs.bits, all) >= (needs.y ? 2 : kStagesWanted);
  s.y = kTileBytes;
  s.bits = static_cast<uint32_t>(tiles + (s.resident ? 0 : weights));
  s.stage_bytes = static_cast<int>(s.bits) + needs.bits;
  const int64_t stages = fit(s.stage_bytes, s.resident ? all : 0);
  s.stages = static_cast<int>(stages > kStagesMost ? kStagesMost : stages);
  // 3. offsets
  auto at = static_cast<uint32_t>(s.stages * s.stage_bytes);
  s.weights = s.resident ? at : static_cast<uint32_t>(tiles);
  if (s.resident) at += static_cast<uint32_t>(all);
  s.staging = at;
  s.row_table = s.staging + static_cast<uint32_t>(staging);
  s.column_table = s.row_table + static_cast<uint32_t>(row_table);
  s.counts = s.column_table + static_cast<uint32_t>(column_table);
  s.barriers = s.counts + kCounts;
  s.bytes = s.barriers + static_cast<uint32_t>(8 * (2 * s.stages + 1));
  return s;
}

Schedule schedule(int64_t rows, int64_t length, int64_t width, int n, const Needs& needs) {
  Schedule s = shared_memory(static_cast<int>(ceil_div(length, kTileChannels)), n, needs);
  s.rows = rows;
  s.columns = static_cast<int>(ceil_div(width, n));
  // as many blocks as SMs, a multiple of the columns' tiles
  const int64_t tiles = ceil_div(rows, kTileRows);
  const int64_t chunks = kBlocks / s.columns < 1 ? 1 : kBlocks / s.columns;
  s.tiles = ceil_div(tiles, chunks);
  s.chunks = ceil_div(tiles, s.tiles);
  return s;
}

void check_ring(const Launch& launch, const Schedule& s) {
  if (s.stages >= kStagesLeast) return;
  throw std::invalid_argument("fastres cuda: " + describe(launch.name, launch.act) +
                              ": shared memory has room for " + std::to_string(s.stages) +
                              " stages of " + std::to_string(s.stage_bytes) + " bytes, " +
                              std::to_string(kStagesLeast) + " are needed; fewer channels fit");
}

PointwiseShape shape_of(const Schedule& s, int n) {
  return {n, s.stages, s.bytes, s.resident, s.chunks * s.columns};
}

NormBackward norm_backward(const PointwiseNormGradient& bn, bool on, int64_t rows) {
  const auto inverse_count = static_cast<float>(1.0 / static_cast<double>(rows));
  return {bn.mean, bn.rstd, bn.gamma, bn.dgamma, bn.dbeta, inverse_count, on, bn.training};
}

std::string pointwise_refuses(int64_t rows, int64_t c, int64_t k) {
  if (c % 8 != 0 || k % 8 != 0) {
    return std::to_string(c) + " and " + std::to_string(k) +
           " channels: multiples of 8 are needed, rows of whole 16 bytes";
  }
  // tables beside two stages: the block form's 6 vectors over the channels, 96 KB, and two of 48
  // KB; dgrad's 4, 64 KB, and two of 49 KB
  constexpr int64_t kMostChannels = 4096;
  if (c > kMostChannels || k > kMostChannels) {
    return std::to_string(c > k ? c : k) + " channels, " + std::to_string(kMostChannels) +
           " at most";
  }
  if (rows > INT32_MAX - kTileRows) return "more pixels than the copy engine's coordinates reach";
  return "";
}

void check_pointwise(const Launch& launch, int64_t k,
                     std::initializer_list<const void*> activations) {
  const Act& act = launch.act;
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument("fastres cuda: " + describe(launch.name, act) + " to " +
                                std::to_string(k) + " channels: " + why);
  };
  if (act.dtype != kBF16 && act.dtype != kF16) refuse("bfloat16 or float16 is needed");
  if (!act.nhwc) refuse("channels_last is needed");
  if (act.n <= 0 || act.c <= 0 || act.s <= 0 || k <= 0) refuse("empty");
  const std::string why = pointwise_refuses(act.outer, act.c, k);
  if (!why.empty()) refuse(why);
  for (const void* p : activations) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
      refuse("a tensor that is not aligned to 16 bytes");
  }
  const std::string missing = pointwise_missing(launch.place.device);
  if (!missing.empty()) {
    throw std::runtime_error("fastres cuda: " + describe(launch.name, act) + ", device " +
                             std::to_string(launch.place.device) + ": " + missing);
  }
}

#ifdef FASTRES_CUDA_HOST

std::string pointwise_missing(int) { return ""; }

TensorMap tensor_map(const Launch&, const void* base, int64_t rows, int64_t columns, int box_rows) {
  TensorMap map{};
  shim::make_map(map.word, base, rows, columns, box_rows);
  return map;
}

#else

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= 64,
              "a TensorMap is a CUtensorMap");

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, through the runtime: libcuda is not linked.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &status);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status);
#endif
    if (error != cudaSuccess || status != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      function = nullptr;
    }
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

}  // namespace

std::string pointwise_missing(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();
    return "no CUDA device";
  }
  if (major != 9 || minor != 0) {
    return "the kernels are for compute capability 9.0 (Hopper), this is " + std::to_string(major) +
           "." + std::to_string(minor);
  }
  if ((" " + built_archs() + " ").find(" 90a ") == std::string::npos) {
    return "the build has code for " + built_archs() + ", not for 90a";
  }
  if (encoder() == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  return "";
}

TensorMap tensor_map(const Launch& launch, const void* base, int64_t rows, int64_t columns,
                     int box_rows) {
  TensorMap map{};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {kTileChannels, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[] = {1, 1};
  // UINT16: the bits are copied, and past the ends 0 is written
  const CUresult error =
      encoder()(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
                const_cast<void*>(base), sizes, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error("fastres cuda: " + describe(launch.name, launch.act) + ", device " +
                             std::to_string(launch.place.device) +
                             ": cuTensorMapEncodeTiled: error " + std::to_string(error));
  }
  return map;
}

#endif

}  // namespace cuda
}  // namespace fastres
