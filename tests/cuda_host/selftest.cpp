// What the shim must get right, and must catch: selftest CASE. Broken cases end with an exception's
// text on stderr and exit code 3, or in AddressSanitizer's report.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/device.cuh"

// A kernel that the launchers run, with its barriers left out: those of the shared tiles, too.
#define __syncthreads()
#include "cuda/bn_stats.cuh"
#undef __syncthreads

#include "cuda/add_relu.cuh"

using namespace fastres;
using namespace fastres::cuda;

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (!ok) {
    std::fprintf(stderr, "selftest: %s\n", what);
    ++failures;
  }
}

// --- right kernels: every primitive, in several orders of the threads ---

void reverse_kernel(float* out, const float* in, int n) {
  FASTRES_SHARED(float, cell, 256);
  const int i = static_cast<int>(threadIdx.x);
  cell[i] = in[static_cast<int>(blockIdx.x) * n + i];
  __syncthreads();
  out[static_cast<int>(blockIdx.x) * n + i] = cell[n - 1 - i];
}

void warp_kernel(unsigned* ballots, float* sums, int* down, int* total) {
  const int i = static_cast<int>(threadIdx.x);
  ballots[i] = __ballot_sync(kWarp, i % 3 == 0);
  float v = static_cast<float>(i % 32);
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(kWarp, v, o);
  sums[i] = v;
  down[i] = __shfl_down_sync(kWarp, i, 1u);
  down[i] += 1000 * __shfl_sync(kWarp, i % 32, 5);
  atomicAdd(total, i);
}

void right() {
  for (unsigned order = 0; order < 4; ++order) {
    shim::set_order(order);
    std::vector<float> in(512), out(512, -1.0f), sums(64, -1.0f);
    for (int i = 0; i < 512; ++i) in[i] = static_cast<float>(i);
    shim::launch("reverse", 2, 256, [&] { reverse_kernel(out.data(), in.data(), 256); });
    for (int i = 0; i < 512; ++i) expect(out[i] == (i / 256 * 256 + 255 - i % 256), "reverse");
    std::vector<unsigned> ballots(64);
    std::vector<int> down(64);
    int total = 0;
    shim::launch("warp", 1, 64,
                 [&] { warp_kernel(ballots.data(), sums.data(), down.data(), &total); });
    for (int i = 0; i < 64; ++i) {
      unsigned bits = 0;
      for (int lane = 0; lane < 32; ++lane) bits |= (i / 32 * 32 + lane) % 3 == 0 ? 1u << lane : 0u;
      expect(ballots[i] == bits, "ballot");
      expect(sums[i] == 496.0f, "shuffle xor");
      expect(down[i] == 5000 + (i % 32 == 31 ? i : i + 1), "shuffle down");
    }
    expect(total == 63 * 32, "atomicAdd");
  }
  for (uint32_t h = 0; h < 0x10000; ++h) {  // every fp16 there and back
    const float v = shim::half_to_float(static_cast<uint16_t>(h));
    if (v == v) expect(shim::float_to_half(v) == h, "fp16");
  }
}

// --- broken kernels ---

void no_barrier_kernel(float* out, const float* in, int n) {
  FASTRES_SHARED(float, cell, 256);
  const int i = static_cast<int>(threadIdx.x);
  cell[i] = in[i];
  out[i] = cell[n - 1 - i];
}

void overwrite_kernel(float* out, const float* in, int n) {  // the second barrier is missing
  FASTRES_SHARED(float, cell, 256);
  const int i = static_cast<int>(threadIdx.x);
  cell[i] = in[i];
  __syncthreads();
  out[i] = cell[n - 1 - i];
  cell[i] = 0.0f;
}

void shared_bounds_kernel(float* out) {
  FASTRES_SHARED(float, cell, 256);
  cell[static_cast<int>(threadIdx.x) + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = cell[threadIdx.x];
}

void divergent_kernel(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

// The real add_relu_kernel with one unit too many in its map: past the end of its tensors.
void out_of_bounds() {
  const int64_t n = 1000;
  std::vector<float> a(n, 1.0f), b(n, 1.0f), z(n);
  Map m{};
  m.outer = 1;
  m.inner = n;
  m.units = n / 8 + 1;
  m.mask_row = n / 8;
  m.channels = 1;
  m.col_tiles = 1;
  m.blocks = 1;
  m.log_tx = 8;
  m.steps = 2;
  const Act act{kF32, true, 1, n, 1, 1, n, n / 8};
  const AddRelu p{z.data(), nullptr, a.data(), b.data(), act};
  shim::launch("add_relu", 1, kThreads, [&] { add_relu_kernel<float, 8>(p, m); });
}

void stats_without_barriers() {
  const int64_t rows = 64;
  std::vector<float> x(rows * 8, 1.0f), part(16), out(24);
  Cut c{};
  c.total = c.chunk = rows;
  c.inner = c.channels = 8;
  c.units = c.chunks = c.programs = 1;
  c.nhwc = true;
  const Act act{kF32, true, 1, 8, rows, rows, 8, 1};
  const BnStats p{out.data(), out.data() + 8, out.data() + 16, x.data(), 1e-5, act};
  shim::launch("bn_stats", 1, kThreads, [&] { bn_stats_kernel<float, 8>(p, part.data(), c); });
}

void run(const char* which) {
  std::vector<float> in(256, 1.0f), out(256);
  const auto is = [&](const char* name) { return std::strcmp(which, name) == 0; };
  if (is("right")) {
    right();
  } else if (is("missing barrier")) {
    shim::launch("no_barrier", 1, 256, [&] { no_barrier_kernel(out.data(), in.data(), 256); });
  } else if (is("missing second barrier")) {
    shim::launch("overwrite", 1, 256, [&] { overwrite_kernel(out.data(), in.data(), 256); });
  } else if (is("shared bounds")) {
    shim::launch("shared_bounds", 1, 256, [&] { shared_bounds_kernel(out.data()); });
  } else if (is("divergent barrier")) {
    shim::launch("divergent", 1, 256, [&] { divergent_kernel(out.data()); });
  } else if (is("kernel without barriers")) {
    stats_without_barriers();
  } else if (is("out of bounds")) {
    out_of_bounds();
  } else {
    throw std::runtime_error("unknown case");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "caught: %s\n", error.what());
    return 3;
  }
  return failures == 0 ? 0 : 1;
}
