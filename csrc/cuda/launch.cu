#include "launch.cuh"

#include <stdexcept>

#ifndef FASTRES_CUDA_HOST
#include <cuda_runtime_api.h>

#include <atomic>
#include <sstream>
#endif

namespace fastres {
namespace cuda {
namespace {

constexpr int64_t kMaxBlocks = 0x7fffffff;
[[maybe_unused]] constexpr int kSharedUnasked = 48 << 10;  // a kernel gets it without asking
// About two waves of blocks on 132 SMs at four blocks each.
constexpr int64_t kReduceBlocks = 1024;
// Partials of a channel: a warp of the finalise kernel reads them in 16 turns.
constexpr int64_t kMaxChunks = 512;
// Above this many blocks a thread walks further instead, so that its channels' vectors, 24 to 64
// floats, are loaded for more than a few rows.
#ifdef FASTRES_CUDA_HOST
constexpr int64_t kManyBlocks = 1;  // small tensors in the tests are to walk, too
#else
constexpr int64_t kManyBlocks = 2048;
#endif
constexpr int64_t kMaxWalk = 8;

int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }

int log2_at_least(int64_t v) {
  int log = 0;
  while ((int64_t{1} << log) < v) ++log;
  return log;
}

int log_threads(int64_t along, int lanes, int64_t most) {
  return log2_at_least(clamp(along, lanes == 1 ? 8 : 1, most));  // 8 lanes of one byte: one row
}

std::string dims(const Act& a) {
  return std::to_string(a.n) + " x " + std::to_string(a.c) + " x " + std::to_string(a.s);
}

}  // namespace

const TileChoice& tile_at(const std::vector<TileChoice>& list, int place) {
  if (place < 1 || place > static_cast<int>(list.size())) {
    throw std::invalid_argument("fastres cuda: tile " + std::to_string(place) + " of a list of " +
                                std::to_string(list.size()));
  }
  return list[static_cast<size_t>(place) - 1];
}

std::string describe(const char* name, const Act& a) {
  const char* dtypes[] = {"float32", "bfloat16", "float16"};
  return std::string(name) + " on (N x C x H*W) = " + dims(a) + " " + dtypes[a.dtype] +
         (a.nhwc ? " NHWC" : " NCHW");
}

int lanes(const char* op, const Act& act, std::initializer_list<const void*> activations,
          std::initializer_list<const float*> vectors) {
  if (act.dtype < 0 || act.dtype > 2) {
    throw std::invalid_argument(std::string("fastres cuda: ") + op + ": unknown dtype code " +
                                std::to_string(act.dtype));
  }
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument("fastres cuda: " + describe(op, act) + ": " + why);
  };
  if (act.n <= 0 || act.c <= 0 || act.s <= 0) refuse("empty");
  const int64_t most = INT64_MAX / 8;
  if (act.s > most / act.c || act.n > most / (act.c * act.s)) {
    refuse("too large");
  }
  const auto size = static_cast<uintptr_t>(act.dtype == kF32 ? 4 : 2);
  bool wide = act.inner % 8 == 0;
  const auto check = [&](const void* p, uintptr_t own, const char* what) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (address % own != 0) {
      refuse(std::string(what) + " at an address that is not a multiple of " + std::to_string(own) +
             " bytes");
    }
    wide = wide && address % 16 == 0;
  };
  for (const void* p : activations) check(p, size, "an activation");
  for (const float* p : vectors) check(p, 4, "a per-channel vector");
  return wide ? 8 : 1;
}

Map elementwise_map(const Act& a, int lanes, int deep) {
  Map m{};
  m.outer = a.outer;
  m.inner = a.inner;
  m.units = ceil_div(a.inner, lanes);
  m.mask_row = a.mask_row;
  m.channels = a.c;
  m.nhwc = a.nhwc;
  m.by_row = a.nhwc;
  m.log_tx = m.by_row ? log_threads(m.units, lanes, 32)
                      : log_threads(ceil_div(m.units, deep), lanes, kThreads);
  const int64_t cols = int64_t{1} << m.log_tx, rows = kThreads / cols;
  const int64_t cross = m.by_row ? ceil_div(m.units, cols) : ceil_div(m.outer, rows);
  const int64_t along = m.by_row ? ceil_div(m.outer, rows) : ceil_div(m.units, cols);
  const int64_t tiles = ceil_div(along, deep);
  const int64_t walk = clamp(cross * tiles / kManyBlocks, 1, clamp(tiles, 1, kMaxWalk));
  m.steps = static_cast<int>(deep * walk);
  const int64_t walks = ceil_div(along, m.steps);
  m.col_tiles = static_cast<uint32_t>(m.by_row ? cross : walks);
  m.blocks = cross * walks;
  return m;
}

Map flat_map(const Act& a, int lanes, int deep, bool mask) {
  Act flat = a;
  if (!mask || a.inner % 8 == 0) {
    flat.inner = a.outer * a.inner;
    flat.outer = 1;
    flat.mask_row = (flat.inner + 7) / 8;
  }
  flat.nhwc = false;
  flat.c = 1;
  return elementwise_map(flat, lanes, deep);
}

Cut reduction_cut(const Act& a, int lanes, int deep) {
  Cut c{};
  c.inner = a.inner;
  c.units = ceil_div(a.inner, lanes);
  c.mask_row = a.mask_row;
  c.channels = a.c;
  c.nhwc = a.nhwc;
  c.total = a.nhwc ? a.outer : a.n;
  c.log_tx = a.nhwc ? log_threads(c.units, lanes, 32)
                    : log_threads(ceil_div(c.units, deep), lanes, kThreads);
  const int64_t cols = int64_t{1} << c.log_tx, rows = kThreads / cols;
  const int64_t programs = a.nhwc ? ceil_div(c.units, cols) : a.c;
  const int64_t step = a.nhwc ? rows * deep : rows;
  const int64_t chunks = clamp(kReduceBlocks / programs, 1, kMaxChunks);
  c.programs = static_cast<uint32_t>(programs);
  c.chunk = ceil_div(ceil_div(c.total, chunks), step) * step;
  c.chunks = ceil_div(c.total, c.chunk);
  return c;
}

int64_t workspace_floats(const Act& a, int parts) {
  int64_t chunks = 0;
  for (const int lanes : {1, 8}) {
    if (lanes == 8 && a.inner % 8 != 0) continue;
    for (const int deep : {1, 2, 4, 8, 16}) {
      const Cut c = reduction_cut(a, lanes, deep);
      chunks = c.chunks > chunks ? c.chunks : chunks;
    }
  }
  return parts * chunks * a.c;
}

#ifndef FASTRES_CUDA_HOST

namespace {

[[noreturn]] void fail(const char* op, const Act& act, const Place& place, cudaError_t error) {
  cudaGetLastError();  // it is reported here: the next call must not report it again
  std::string text = "fastres cuda: " + describe(op, act) + ", device " +
                     std::to_string(place.device) + ": " + cudaGetErrorString(error) + " (" +
                     cudaGetErrorName(error) + ")";
  if (error == cudaErrorIllegalAddress || error == cudaErrorLaunchFailure ||
      error == cudaErrorMisalignedAddress) {
    text += "; an earlier kernel broke this process's CUDA context, nothing can run in it any more";
  }
  throw std::runtime_error(text);
}

void check(const char* op, const Act& act, const Place& place, cudaError_t error) {
  if (error != cudaSuccess) fail(op, act, place, error);
}

// Whether the build has code for compute capability `sm` (major * 10 + minor): machine code runs on
// its own major version from its minor on (an "a" arch: on exactly that one), PTX on all later.
bool has_code(int sm) {
  std::istringstream list(built_archs());
  for (std::string arch; list >> arch;) {
    const bool ptx = arch.rfind("ptx", 0) == 0;
    const int built = std::stoi(arch.substr(ptx ? 3 : 0));
    const bool exact = arch.back() == 'a';
    if (exact ? sm == built : ptx ? sm >= built : sm / 10 == built / 10 && sm >= built) return true;
  }
  return false;
}

void check_arch(const char* op, const Act& act, const Place& place) {
  const int device = place.device;
  constexpr int kKnown = 64;
  static std::atomic<bool> known[kKnown];
  if (device < kKnown && known[device].load(std::memory_order_relaxed)) return;
  int major = 0, minor = 0;
  check(op, act, place, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(op, act, place, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (!has_code(major * 10 + minor)) {
    throw std::runtime_error("fastres cuda: " + describe(op, act) + ", device " +
                             std::to_string(device) + ": it has compute capability " +
                             std::to_string(major) + "." + std::to_string(minor) +
                             ", this build has code for " + built_archs() +
                             "; set FASTRES_CUDA_ARCHS and install again");
  }
  if (device < kKnown) known[device].store(true, std::memory_order_relaxed);
}

}  // namespace

std::string built_archs() { return FASTRES_CUDA_ARCHS; }

std::array<int, 2> versions() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) cudaGetLastError();
  return {driver, CUDART_VERSION};
}

OnDevice::OnDevice(const char* op, const Act& act, const Place& place) : before_(-1) {
  int current = 0;
  check(op, act, place, cudaGetDevice(&current));
  if (current != place.device) {
    check(op, act, place, cudaSetDevice(place.device));
    before_ = current;
  }
  try {
    check_arch(op, act, place);
  } catch (...) {
    restore();
    throw;
  }
}

OnDevice::~OnDevice() { restore(); }

// A destructor cannot report: what fails here must not come up as the next call's error.
void OnDevice::restore() const {
  if (before_ >= 0 && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
}

void run_raw(const Launch& launch, int64_t blocks, const void* kernel, void** args) {
  if (blocks < 1 || blocks > kMaxBlocks) {
    throw std::invalid_argument("fastres cuda: " + describe(launch.name, launch.act) +
                                ": too large, " + std::to_string(blocks) + " blocks");
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(launch.threads));
  if (launch.shared > kSharedUnasked) {
    check(launch.name, launch.act, launch.place,
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared));
  }
  // its own error alone: what others left behind (cudaPeekAtLastError) is not this kernel's
  const cudaError_t error =
      cudaLaunchKernel(kernel, grid, block, args, static_cast<size_t>(launch.shared),
                       reinterpret_cast<cudaStream_t>(launch.place.stream));
  check(launch.name, launch.act, launch.place, error);
}

void launch_cluster(const Launch& launch, int64_t blocks, int threads, int cluster, size_t shared,
                    std::atomic<uint64_t>& ready, const void* kernel, void** args) {
  const auto checked = [&](cudaError_t error) {
    check(launch.name, launch.act, launch.place, error);
  };
  if (blocks < 1 || blocks > kMaxBlocks) {
    throw std::invalid_argument("fastres cuda: " + describe(launch.name, launch.act) +
                                ": too large, " + std::to_string(blocks) + " blocks");
  }
  const int device = launch.place.device;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((ready.load(std::memory_order_relaxed) & bit) == 0) {
    int major = 0, minor = 0;
    checked(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    checked(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    if (major != 9 || minor != 0) {
      throw std::runtime_error("fastres cuda: " + describe(launch.name, launch.act) + ", device " +
                               std::to_string(device) + ": it has compute capability " +
                               std::to_string(major) + "." + std::to_string(minor) +
                               ", the kernel is for 9.0");
    }
    checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared)));
    ready.fetch_or(bit, std::memory_order_relaxed);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = reinterpret_cast<cudaStream_t>(launch.place.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  checked(cudaLaunchKernelExC(&config, kernel, args));
}

#endif

}  // namespace cuda
}  // namespace fastres
