// What the two halves of the Hopper shim share: a block's state. hopper.cpp: dynamic shared memory,
// barriers, copies; wgmma.cpp: warps and warpgroups.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "hopper.h"
#include "shim.h"

namespace shim {

constexpr uint32_t kBase = 1024;  // of dynamic shared memory: where the hardware has it, too

using Clock = uint32_t;

// What a thread knows of the others: its own clock and, of each, the last one it heard of.
struct Knowledge {
  std::vector<Clock> of;
  void join(const Knowledge& other) {
    for (size_t i = 0; i < of.size(); ++i) of[i] = std::max(of[i], other.of[i]);
  }
};

struct Access {
  int who = -1;  // a thread, or a barrier's copies
  Clock when = 0;
};

// Four bytes of shared memory.
struct Granule {
  Access write;
  std::vector<Access> reads;  // since the write
  uint64_t stored = 0;        // when by an ordinary store; 0: by a copy
  uint8_t known = 0;          // which bytes were written
  bool in_flight = false;
};

struct Product {
  int n = 0;
  uint64_t b = 0;
  bool add = false, transposed = false, bf16 = false, done = false;
  int issued = 0;
  const uint32_t* a[128];
  float* d[128];
  std::vector<uint32_t> units;  // of 16 bytes, read
};

struct Accumulator {
  std::vector<float> values;
  int pending = 0;
};

struct Lane {
  int64_t issued = 0, committed = 0, retired = 0;  // products
  std::deque<int64_t> groups;                      // ends of committed groups
  bool fenced = false;
  uint64_t proxy_fence = 0;  // stores before it are seen by wgmma and the copy engine
  bool made_barriers = false;
  int registers = 0;
  std::map<float*, Accumulator> sums;
};

struct Group {
  std::deque<Product> products;
  int64_t first = 0;  // number of products.front()
};

extern std::vector<uint8_t> memory;
extern std::vector<Granule> granules;
extern std::vector<Knowledge> knowledge;
extern std::vector<Lane> lanes;
extern std::vector<Group> groups;
extern uint64_t stores;
extern int size;

int me();
std::string hex(uint32_t at);
bool knows(int thread, const Access& access);
void add_read(Granule& g, int thread);
std::string by(const Access& access);
inline uint32_t swizzled(uint32_t at) { return at ^ ((at >> 7 & 7u) << 4); }

}  // namespace shim
