// Runs CUDA kernels on the CPU: g++ compiles csrc/cuda against this header (FASTRES_CUDA_HOST).
//
// The threads of a block are fibers that run until they wait: at __syncthreads, or for the other
// lanes of their warp at a shuffle or ballot. Blocks and threads run in an order that set_order
// chooses: a result that depends on it is a race. Shared memory is checked access by access
// (bounds, reads of what nobody wrote, and two threads at one cell with no barrier between them);
// global memory by AddressSanitizer, alignment and arithmetic by UBSan. What is wrong ends the
// launch with an exception that names kernel, block and thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

namespace shim {

struct Index {
  unsigned x, y, z;
};
extern Index thread_index, block_index;
extern int epoch;        // barriers that the block has passed
extern long generation;  // blocks run so far: shared memory is new in each

[[noreturn]] void fail(const std::string& what);  // from inside a kernel: ends the launch
void barrier();
uint64_t warp(int kind, uint64_t value, int argument, unsigned mask);

// 0: in order; 1: last first; others: shuffled by this seed.
void set_order(unsigned seed);
unsigned order_seed();

// What dynamic shared memory, copies and wgmma (hopper.cpp) need to know of a block's life.
struct Engine {
  void (*begin)(int threads);
  bool (*idle)();                            // no thread can run: true when something happened
  std::string (*end)();                      // of the block: what is wrong, or nothing
  void (*all_meet)();                        // at __syncthreads
  void (*warp_meets)(int first, int count);  // at __syncwarp
};
// Runs the kernel; throws std::runtime_error.
void launch(const char* name, int64_t blocks, int threads, const std::function<void()>& kernel,
            const Engine* engine = nullptr);
int64_t launches();
std::vector<std::pair<std::string, int64_t>> recent();  // name, blocks of the last 64 launches

void wait_until(const std::function<bool()>& ready);
const uint64_t* warp_gather(uint64_t value);  // of all lanes, until this lane's next warp operation

enum { kBallot, kShuffle, kShuffleXor, kShuffleDown, kSyncWarp, kGather };

template <class T>
uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t out = 0;
  std::memcpy(&out, &v, sizeof(T));
  return out;
}
template <class T>
T unpack(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}

// --- shared memory ---

template <class T, int N>
class Shared {
 public:
  explicit Shared(const char* name) : name_(name) {}

  class Cell {
   public:
    Cell(Shared& array, int64_t i) : array_(array), i_(i) {}
    Cell(const Cell&) = default;
    operator T() const { return array_.read(i_); }
    T operator=(T v) const { return array_.write(i_, v); }
    T operator=(const Cell& other) const { return array_.write(i_, static_cast<T>(other)); }
    T operator+=(T v) const { return array_.write(i_, array_.read(i_) + v); }

   private:
    Shared& array_;
    int64_t i_;
  };

  Shared& enter() {  // each thread, at the declaration
    if (generation_ != generation) {
      generation_ = generation;
      for (auto& use : uses_) use = Use{-1, -1, -1, -1};
    }
    return *this;
  }
  Cell operator[](int64_t i) {
    if (i < 0 || i >= N) fail(cell(i) + " is out of bounds, " + std::to_string(N) + " cells");
    return Cell(*this, i);
  }

 private:
  struct Use {
    int writer, written, reader, read;  // thread and epoch of the last write and read; -2: several
  };

  std::string cell(int64_t i) const {
    return std::string("shared ") + name_ + "[" + std::to_string(i) + "]";
  }
  T read(int64_t i) {
    Use& use = uses_[i];
    const int me = static_cast<int>(thread_index.x);
    if (use.written < 0) fail(cell(i) + " is read before anything was written to it");
    if (use.written == epoch && use.writer != me) {
      fail("race: " + cell(i) + " is written by thread " + std::to_string(use.writer) +
           " and read with no barrier between");
    }
    use.reader = use.read == epoch && use.reader != me ? -2 : me;
    use.read = epoch;
    return values_[i];
  }
  T write(int64_t i, T v) {
    Use& use = uses_[i];
    const int me = static_cast<int>(thread_index.x);
    if (use.written == epoch && use.writer != me) {
      fail("race: " + cell(i) + " is also written by thread " + std::to_string(use.writer) +
           " with no barrier between");
    }
    if (use.read == epoch && use.reader != me) {
      fail("race: " + cell(i) + " is read by " +
           (use.reader == -2 ? "several threads" : "thread " + std::to_string(use.reader)) +
           " and written with no barrier between");
    }
    use.writer = me;
    use.written = epoch;
    return values_[i] = v;
  }

  const char* name_;
  long generation_ = -1;
  T values_[N];
  Use uses_[N];
};

// --- numbers ---

inline float bits_to_float(uint32_t bits) { return unpack<float>(bits); }
inline uint32_t float_to_bits(float v) { return static_cast<uint32_t>(pack(v)); }

inline uint16_t float_to_bf16(float v) {
  const uint32_t bits = float_to_bits(v);
  if (v != v) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float v = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -v : v;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_half(float v) {
  const uint16_t sign = static_cast<uint16_t>((float_to_bits(v) >> 16) & 0x8000u);
  const float a = std::fabs(v);
  if (v != v) return 0x7fff;
  if (a >= 65520.0f) return sign | 0x7c00u;
  if (a < 0x1p-14f) {  // subnormal: a multiple of 2^-24, rounded to even by the fp32 add
    const float magic = 0x1p-1f;
    return static_cast<uint16_t>(sign |
                                 ((float_to_bits(a + magic) - float_to_bits(magic)) & 0xffffu));
  }
  const uint32_t bits = float_to_bits(a);
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

}  // namespace shim

#define threadIdx (shim::thread_index)
#define blockIdx (shim::block_index)

#define FASTRES_SHARED(type, name, count)                  \
  static shim::Shared<type, (count)> name##_shared(#name); \
  auto& name = name##_shared.enter()

inline void __syncthreads() { shim::barrier(); }
inline void __syncwarp() { shim::warp(shim::kSyncWarp, 0, 0, 0xffffffffu); }
inline unsigned __ballot_sync(unsigned mask, bool v) {
  return static_cast<unsigned>(shim::warp(shim::kBallot, v, 0, mask));
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane) {
  return shim::unpack<T>(shim::warp(shim::kShuffle, shim::pack(v), lane, mask));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes) {
  return shim::unpack<T>(shim::warp(shim::kShuffleXor, shim::pack(v), lanes, mask));
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by) {
  return shim::unpack<T>(shim::warp(shim::kShuffleDown, shim::pack(v), static_cast<int>(by), mask));
}
template <class T>
T atomicAdd(T* at, T v) {  // fibers take turns
  const T before = *at;
  *at = before + v;
  return before;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
