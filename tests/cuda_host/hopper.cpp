#include "hopper.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "shim.h"

namespace shim {
namespace {

constexpr uint32_t kBase = 1024;  // of dynamic shared memory: where the hardware has it, too
constexpr int kMost = 227 << 10;  // bytes of a block
constexpr int kThreadsMost = 1024;
constexpr int kCopies = 64;  // mbarriers: each is a clock of the copy engine
constexpr int kNamed = 16;
constexpr int kFile = 65536;  // registers of an SM

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

struct Barrier {
  uint32_t at;
  int count, pending;
  int64_t bytes = 0;  // expected and not yet come
  int64_t phase = 0;
  Knowledge now, ended;  // of this phase's arrivals; of the ended phases'
};

struct MapFields {
  const uint8_t* base;
  int64_t rows, columns;
  int box_rows;
};

struct Copy {
  uint32_t to;
  MapFields map;
  int bar;
  int column;
  int64_t row;
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

struct Named {
  int threads = 0, arrived = 0;
  int64_t passed = 0;
  Knowledge sum;
};

std::vector<uint8_t> memory;
std::vector<Granule> granules;
std::vector<Knowledge> knowledge;
std::vector<Lane> lanes;
std::vector<Group> groups;
std::vector<Barrier> barriers;
std::deque<Copy> copies;
Named named[kNamed];
uint64_t stores = 0;
std::mt19937 dice;
int size = 0;
int fault = kRight;

bool producer_side() { return thread_index.x < 128; }

int me() { return static_cast<int>(thread_index.x); }

std::string hex(uint32_t at) { return "shared+" + std::to_string(at - kBase); }

void check_bounds(uint32_t at, int bytes) {
  if (at < kBase || at + static_cast<uint32_t>(bytes) > kBase + static_cast<uint32_t>(size)) {
    fail(hex(at) + " is out of bounds, " + std::to_string(size) + " bytes");
  }
  if (at % static_cast<uint32_t>(bytes) != 0) fail(hex(at) + " is not aligned");
}

bool knows(int thread, const Access& access) {
  return access.who < 0 ||
         knowledge[static_cast<size_t>(thread)].of[static_cast<size_t>(access.who)] >= access.when;
}

Clock clock_of(int thread) {
  return knowledge[static_cast<size_t>(thread)].of[static_cast<size_t>(thread)];
}

// What this thread did so far is heard by those that get its knowledge now.
void tick(int thread) { ++knowledge[static_cast<size_t>(thread)].of[static_cast<size_t>(thread)]; }

void add_read(Granule& g, int thread) {
  for (Access& r : g.reads) {
    if (r.who == thread) {
      r.when = clock_of(thread);
      return;
    }
  }
  g.reads.push_back({thread, clock_of(thread)});
}

std::string by(const Access& access) {
  return access.who >= kThreadsMost ? "a copy" : "thread " + std::to_string(access.who);
}

void check_read(uint32_t at, int bytes) {
  for (uint32_t b = at; b < at + static_cast<uint32_t>(bytes); ++b) {
    const Granule& g = granules[(b - kBase) / 4];
    if (g.in_flight) fail(hex(b) + " is read while a copy into it is in flight");
    if (!(g.known >> (b % 4) & 1)) fail(hex(b) + " is read before anything was written to it");
    if (!knows(me(), g.write)) {
      fail("race: " + hex(b) + " is written by " + by(g.write) +
           " and read with no barrier between");
    }
  }
}

void check_overwrite(uint32_t at, int bytes, const char* what) {
  for (uint32_t b = at; b < at + static_cast<uint32_t>(bytes); b += 4 - b % 4) {
    const Granule& g = granules[(b - kBase) / 4];
    if (g.in_flight) fail(hex(b) + " is " + what + " while a copy into it is in flight");
    if (!knows(me(), g.write)) {
      fail("race: " + hex(b) + " is written by " + by(g.write) + " and " + what +
           " with no barrier between");
    }
    for (const Access& r : g.reads) {
      if (!knows(me(), r)) {
        fail("race: " + hex(b) + " is read by " + by(r) + " and " + what +
             " with no barrier between");
      }
    }
  }
}

int barrier_index(uint32_t bar) {
  for (size_t i = 0; i < barriers.size(); ++i) {
    if (barriers[i].at == bar) return static_cast<int>(i);
  }
  fail(hex(bar) + " holds no mbarrier");
}

// 9.7.13.15.2: a phase ends when no arrival and no byte is pending.
void advance(Barrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  b.ended.join(b.now);
}

MapFields fields(const uint64_t* map) {
  return {reinterpret_cast<const uint8_t*>(map[0]), static_cast<int64_t>(map[1]),
          static_cast<int64_t>(map[2]), static_cast<int>(map[3])};
}

uint32_t swizzled(uint32_t at) { return at ^ ((at >> 7 & 7u) << 4); }

void deliver() {
  size_t which = 0;
  if (order_seed() == 1) which = copies.size() - 1;
  if (order_seed() > 1) which = dice() % copies.size();
  const Copy c = copies[which];
  copies.erase(copies.begin() + static_cast<long>(which));
  const MapFields& f = c.map;
  Barrier& bar = barriers[static_cast<size_t>(c.bar)];
  const int engine = kThreadsMost + c.bar;
  const Clock now = ++bar.now.of[static_cast<size_t>(engine)];
  for (int r = 0; r < f.box_rows; ++r) {
    for (int e = 0; e < 64; ++e) {
      const int64_t row = c.row + r, column = c.column + e;
      uint16_t v = 0;
      if (row < f.rows && column < f.columns && row >= 0 && column >= 0) {
        std::memcpy(&v, f.base + (row * f.columns + column) * 2, 2);
      }
      const uint32_t at = c.to + static_cast<uint32_t>(r * 128 + e * 2);
      std::memcpy(&memory[(has_fault(kPlainCopies) ? at : swizzled(at)) - kBase], &v, 2);
    }
  }
  for (uint32_t g = (c.to - kBase) / 4;
       g < (c.to - kBase) / 4 + static_cast<uint32_t>(f.box_rows) * 32; ++g) {
    granules[g].in_flight = false;
    granules[g].known = 15;
    granules[g].stored = 0;
    granules[g].write = {engine, now};
  }
  bar.bytes -= f.box_rows * 128;
  advance(bar);
}

// --- the engine's part of a block's life ---

bool idle() {
  if (copies.empty()) return false;
  deliver();
  return true;
}

void all_meet() {
  Knowledge sum = knowledge[0];
  for (size_t i = 0; i < knowledge.size(); ++i) {
    sum.join(knowledge[i]);
  }
  for (size_t i = 0; i < knowledge.size(); ++i) {
    knowledge[i] = sum;
    tick(static_cast<int>(i));
  }
}

void warp_meets(int first, int count) {
  if (has_fault(kNoSyncwarp)) return;
  Knowledge sum = knowledge[static_cast<size_t>(first)];
  for (int i = first; i < first + count; ++i) sum.join(knowledge[static_cast<size_t>(i)]);
  for (int i = first; i < first + count; ++i) {
    knowledge[static_cast<size_t>(i)] = sum;
    tick(i);
  }
}

void begin(int threads) {
  memory.assign(static_cast<size_t>(size), 0xff);
  granules.assign(static_cast<size_t>(size) / 4 + 1, Granule{});
  Knowledge none;
  none.of.assign(kThreadsMost + kCopies, 0);
  knowledge.assign(static_cast<size_t>(threads), none);
  for (int i = 0; i < threads; ++i) tick(i);
  lanes.assign(static_cast<size_t>(threads), Lane{});
  groups.assign(static_cast<size_t>(threads + 127) / 128, Group{});
  barriers.clear();
  copies.clear();
  for (Named& n : named) n = Named{};
}

std::string end() {
  if (!copies.empty()) return "the block ends while copies into its shared memory are in flight";
  for (const Lane& l : lanes) {
    if (l.retired != l.issued) return "the block ends before a wgmma was waited for";
  }
  for (const Barrier& b : barriers) {
    if (b.bytes != 0) return "the block ends while " + hex(b.at) + " expects bytes";
  }
  return "";
}

const Engine pipeline{begin, idle, end, all_meet, warp_meets};

// --- wgmma ---

float widened(uint16_t bits, bool bf16) {
  return bf16 ? bits_to_float(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

// Address of element (k, n) of b: the canonical layouts of 9.7.15.5.1.2 in rows of 128 bytes.
uint32_t element(const Product& p, int k, int n) {
  const uint32_t at = static_cast<uint32_t>(p.b & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(p.b >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(p.b >> 32 & 0x3fff) << 4;
  const auto uk = static_cast<uint32_t>(k), un = static_cast<uint32_t>(n);
  const uint32_t offset = p.transposed
                              ? un / 64 * leading + un % 64 * 2 + uk / 8 * stride + uk % 8 * 128
                              : un / 8 * stride + un % 8 * 128 + uk * 2;
  return swizzled(at + offset);
}

__attribute__((no_sanitize("address", "undefined"))) void multiply(float* d, const float* a,
                                                                   const float* b, int n) {
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float v = a[row * 16 + k];
      for (int col = 0; col < n; ++col) d[row * n + col] += v * b[k * n + col];
    }
  }
}

void execute(Product& p, int group) {
  if ((p.b >> 62) != 1 || has_fault(kPlainDescriptors))
    fail("wgmma: a descriptor without the 128-byte swizzle");
  if ((p.b >> 49 & 7) != 0) fail("wgmma: a base offset");
  std::vector<float> a(64 * 16), b(16 * static_cast<size_t>(p.n)), d(64 * static_cast<size_t>(p.n));
  // 1. b, in units of 16 bytes
  for (int k = 0; k < 16; k += p.transposed ? 1 : 8) {
    for (int n = 0; n < p.n; n += p.transposed ? 8 : 1) {
      const uint32_t at = element(p, k, n);
      if (at < kBase || at + 16 > kBase + static_cast<uint32_t>(size)) {
        fail("wgmma reads " + hex(at) + ", out of bounds");
      }
      for (uint32_t byte = at; byte < at + 16; byte += 4) {
        const Granule& g = granules[(byte - kBase) / 4];
        if (g.in_flight) fail("wgmma reads " + hex(byte) + " while a copy into it is in flight");
        if (g.known != 15) fail("wgmma reads " + hex(byte) + " before anything was written to it");
        if (!knows(me(), g.write)) {
          fail("race: " + hex(byte) + " is written by " + by(g.write) +
               " and read by wgmma with no barrier between");
        }
        if (g.stored != 0 && lanes[static_cast<size_t>(g.write.who)].proxy_fence < g.stored) {
          fail("wgmma reads " + hex(byte) + ", stored by thread " + std::to_string(g.write.who) +
               " with no fence.proxy.async since");
        }
      }
      p.units.push_back(at);
      for (int e = 0; e < 8; ++e) {
        uint16_t v;
        std::memcpy(&v, &memory[at - kBase + static_cast<uint32_t>(e) * 2], 2);
        const int row = p.transposed ? k : k + e, col = p.transposed ? n + e : n;
        b[static_cast<size_t>(row * p.n + col)] = widened(v, p.bf16);
      }
    }
  }
  // 2. a and d from the fragments (9.7.15.5.1.1.1)
  const auto row_of = [](int t, int half) { return t / 32 * 16 + t % 32 / 4 + 8 * half; };
  for (int t = 0; t < 128; ++t) {
    for (int r = 0; r < 4; ++r) {
      for (int e = 0; e < 2; ++e) {
        const auto bits = static_cast<uint16_t>(p.a[t][r] >> (16 * e));
        a[static_cast<size_t>(row_of(t, r % 2) * 16 + t % 4 * 2 + r / 2 * 8 + e)] =
            widened(bits, p.bf16);
      }
    }
    const std::vector<float>& own =
        lanes[static_cast<size_t>(group * 128 + t)].sums.at(p.d[t]).values;
    for (int i = 0; p.add && i < p.n / 2; ++i) {
      d[static_cast<size_t>(row_of(t, i % 4 / 2) * p.n + i / 4 * 8 + t % 4 * 2 + i % 2)] =
          own[static_cast<size_t>(i)];
    }
  }
  // 3. d = a * b + d
  multiply(d.data(), a.data(), b.data(), p.n);
  for (int t = 0; t < 128; ++t) {
    std::vector<float>& own = lanes[static_cast<size_t>(group * 128 + t)].sums.at(p.d[t]).values;
    for (int i = 0; i < p.n / 2; ++i) {
      own[static_cast<size_t>(i)] =
          d[static_cast<size_t>(row_of(t, i % 4 / 2) * p.n + i / 4 * 8 + t % 4 * 2 + i % 2)];
    }
  }
  p.done = true;
}

}  // namespace

// --- dynamic shared memory ---

uint32_t dynamic_shared() { return kBase; }

void store_shared(uint32_t at, const void* v, int bytes) {
  check_bounds(at, bytes);
  check_overwrite(at, bytes, "written");
  std::memcpy(&memory[at - kBase], v, static_cast<size_t>(bytes));
  ++stores;
  for (uint32_t b = at; b < at + static_cast<uint32_t>(bytes); ++b) {
    Granule& g = granules[(b - kBase) / 4];
    g.known |= static_cast<uint8_t>(1 << (b % 4));
    g.write = {me(), clock_of(me())};
    g.stored = stores;
    g.reads.clear();
  }
}

void load_shared(void* v, uint32_t at, int bytes) {
  check_bounds(at, bytes);
  check_read(at, bytes);
  for (uint32_t b = at; b < at + static_cast<uint32_t>(bytes); b += 4 - b % 4) {
    add_read(granules[(b - kBase) / 4], me());
  }
  std::memcpy(v, &memory[at - kBase], static_cast<size_t>(bytes));
}

// --- barriers ---

void mbarrier_init(uint32_t bar, int count) {
  check_bounds(bar, 8);
  for (const Barrier& b : barriers) {
    if (b.at == bar) fail(hex(bar) + " is an mbarrier already");
  }
  if (static_cast<int>(barriers.size()) == kCopies) fail("the shim has no more mbarriers");
  Barrier b;
  b.at = bar;
  b.count = b.pending = count;
  b.now.of.assign(kThreadsMost + kCopies, 0);
  b.ended = b.now;
  barriers.push_back(b);
  lanes[static_cast<size_t>(me())].made_barriers = true;
}

void fence_barrier_init() {
  if (has_fault(kNoBarrierFence)) return;
  lanes[static_cast<size_t>(me())].made_barriers = false;
}

void mbarrier_arrive(uint32_t bar, int expect) {
  if (has_fault(kNoArrive) && !producer_side()) return;
  if (has_fault(kFewerBytes)) expect /= 2;
  Barrier& b = barriers[static_cast<size_t>(barrier_index(bar))];
  if (b.pending == 0) fail(hex(bar) + ": more arrivals than its phase has");
  b.now.join(knowledge[static_cast<size_t>(me())]);
  tick(me());
  b.bytes += expect;
  --b.pending;
  advance(b);
}

void mbarrier_wait(uint32_t bar, uint32_t parity) {
  const auto i = static_cast<size_t>(barrier_index(bar));
  if (has_fault(producer_side() ? kNoEmptyWait : kNoFullWait)) return;
  if (has_fault(kWrongParity)) parity ^= 1u;
  // the phase of parity p has ended when the present one has the other parity
  wait_until([i, parity] { return (barriers[i].phase & 1) != static_cast<int64_t>(parity); });
  knowledge[static_cast<size_t>(me())].join(barriers[i].ended);
}

void fence_proxy_async() {
  if (has_fault(kNoProxyFence)) return;
  lanes[static_cast<size_t>(me())].proxy_fence = stores;
}

void named_barrier(int id, int threads) {
  if (has_fault(kNoNamedBarrier)) return;
  if (id < 1 || id >= kNamed) fail("named barriers are 1 to 15");
  Named& n = named[id];
  if (n.arrived == 0) {
    n.threads = threads;
    n.sum = knowledge[static_cast<size_t>(me())];
  }
  if (n.threads != threads) fail("a named barrier of different numbers of threads");
  n.sum.join(knowledge[static_cast<size_t>(me())]);
  const int64_t turn = n.passed;
  if (++n.arrived == threads) {
    n.arrived = 0;
    ++n.passed;
  }
  // the last to come fills the sum before any other thread runs, and none can come again before
  wait_until([id, turn] { return named[id].passed > turn; });
  knowledge[static_cast<size_t>(me())].join(named[id].sum);
  tick(me());
}

// --- copies ---

void make_map(uint64_t* map, const void* base, int64_t rows, int64_t columns, int box_rows) {
  map[0] = reinterpret_cast<uint64_t>(base);
  map[1] = static_cast<uint64_t>(rows);
  map[2] = static_cast<uint64_t>(columns);
  map[3] = static_cast<uint64_t>(box_rows);
}

void copy_tile(uint32_t to, const uint64_t* map, uint32_t bar, int column, int64_t row) {
  const MapFields f = fields(map);
  const int bytes = f.box_rows * 128;
  if (to % 128 != 0) fail("a copy to " + hex(to) + ", not aligned to 128");
  check_bounds(to, 128);
  check_bounds(to + static_cast<uint32_t>(bytes) - 128, 128);
  for (const Lane& l : lanes) {
    if (l.made_barriers) fail("a copy before the fence behind mbarrier.init");
  }
  check_overwrite(to, bytes, "copied to");
  const int index = barrier_index(bar);
  for (uint32_t b = to; b < to + static_cast<uint32_t>(bytes); b += 4) {
    Granule& g = granules[(b - kBase) / 4];
    g.in_flight = true;
    g.reads.clear();
  }
  std::fill_n(&memory[to - kBase], bytes, uint8_t{0xff});
  copies.push_back({to, f, index, column, row});
  if (order_seed() > 1 && dice() % 2 == 0) deliver();
}

// --- warps and warpgroups ---

void load_matrices(uint32_t* v, uint32_t at, bool transposed) {
  if (at % 16 != 0) fail("ldmatrix: " + hex(at) + " is not aligned to 16");
  const uint64_t* rows = warp_gather(at);
  const int lane = me() % 32;
  for (int i = 0; i < 4; ++i) {
    if (transposed) {
      uint16_t lo, hi;
      load_shared(
          &lo,
          static_cast<uint32_t>(rows[i * 8 + lane % 4 * 2]) + static_cast<uint32_t>(lane / 4 * 2),
          2);
      load_shared(&hi,
                  static_cast<uint32_t>(rows[i * 8 + lane % 4 * 2 + 1]) +
                      static_cast<uint32_t>(lane / 4 * 2),
                  2);
      v[i] = lo | static_cast<uint32_t>(hi) << 16;
    } else {
      load_shared(
          &v[i],
          static_cast<uint32_t>(rows[i * 8 + lane / 4]) + static_cast<uint32_t>(lane % 4 * 4), 4);
    }
  }
}

void wgmma(float* d, int n, const uint32_t* a, uint64_t b, bool add, bool transposed, bool bf16) {
  Lane& lane = lanes[static_cast<size_t>(me())];
  Group& group = groups[static_cast<size_t>(me() / 128)];
  if (!lane.fenced) fail("wgmma with no wgmma.fence since its registers were free");
  const auto at = static_cast<size_t>(lane.issued++ - group.first);
  if (at == group.products.size()) group.products.emplace_back();
  Product& p = group.products[at];
  if (p.issued == 0) {
    p.n = n;
    p.b = b;
    p.add = add;
    p.transposed = transposed;
    p.bf16 = bf16;
  } else if (p.n != n || p.b != b || p.add != add || p.transposed != transposed) {
    fail("the threads of a warpgroup are at different wgmmas");
  }
  ++p.issued;
  p.a[me() % 128] = a;
  p.d[me() % 128] = d;
  Accumulator& sum = lane.sums[d];
  if (sum.pending++ == 0) {
    sum.values.assign(static_cast<size_t>(n) / 2, 0.0f);
    if (add) std::copy_n(d, n / 2, sum.values.begin());
    std::fill_n(d, n / 2, std::numeric_limits<float>::quiet_NaN());
  }
}

void wgmma_fence() {
  if (has_fault(kNoWgmmaFence)) return;
  lanes[static_cast<size_t>(me())].fenced = true;
}

void wgmma_commit() {
  Lane& lane = lanes[static_cast<size_t>(me())];
  lane.groups.push_back(lane.issued);
  lane.committed = lane.issued;
  lane.fenced = false;  // a is written anew for the next group
}

void wgmma_wait(int pending) {
  if (has_fault(kNoWgmmaWait)) return;
  const int thread = me(), index = thread / 128;
  Lane& lane = lanes[static_cast<size_t>(thread)];
  Group& group = groups[static_cast<size_t>(index)];
  lane.fenced = false;
  int64_t end = lane.retired;
  while (static_cast<int>(lane.groups.size()) > pending) {
    end = lane.groups.front();
    lane.groups.pop_front();
  }
  if (end == lane.retired) return;
  wait_until([&group, end] {
    return group.first >= end ||
           group.products[static_cast<size_t>(end - 1 - group.first)].issued == 128;
  });
  for (int64_t i = lane.retired; i < end; ++i) {
    Product& p = group.products[static_cast<size_t>(i - group.first)];
    if (!p.done) execute(p, index);
    if (thread % 32 == 0) {  // the warp's, now that it knows the product has ended
      for (const uint32_t unit : p.units) {
        for (uint32_t b = unit; b < unit + 16; b += 4) add_read(granules[(b - kBase) / 4], thread);
      }
    }
    float* d = p.d[thread % 128];
    Accumulator& sum = lane.sums.at(d);
    if (--sum.pending == 0) {
      std::copy(sum.values.begin(), sum.values.end(), d);
      lane.sums.erase(d);
    }
  }
  lane.retired = end;
  int64_t least = end;
  for (int t = index * 128; t < index * 128 + 128; ++t) {
    least = std::min(least, lanes[static_cast<size_t>(t)].retired);
  }
  for (; group.first < least; ++group.first) group.products.pop_front();
}

void set_registers(int registers) {
  if (registers < 24 || registers > 256 || registers % 8 != 0) fail("setmaxnreg: 24 to 256, by 8");
  Lane& lane = lanes[static_cast<size_t>(me())];
  lane.registers = registers;
  int sum = 0;
  for (const Lane& l : lanes) sum += l.registers;
  if (sum > kFile) fail("setmaxnreg: more registers than an SM has");
}

void set_fault(int f) { fault = f; }
bool has_fault(Fault f) { return fault == f; }

void launch_shared(const char* name, int64_t blocks, int threads, int bytes,
                   const std::function<void()>& kernel) {
  if (bytes > kMost) throw std::runtime_error(std::string(name) + ": too much shared memory");
  size = bytes;
  dice.seed(order_seed());
  launch(name, blocks, threads, kernel, &pipeline);
}

}  // namespace shim
