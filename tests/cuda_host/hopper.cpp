#include "hopper.h"

#include <algorithm>
#include <deque>
#include <random>
#include <stdexcept>
#include <vector>

#include "hopper_block.h"
#include "shim.h"

namespace shim {

std::vector<uint8_t> memory;
std::vector<Granule> granules;
std::vector<Knowledge> knowledge;
std::vector<Lane> lanes;
std::vector<Group> groups;
uint64_t stores = 0;
int size = 0;

int me() { return static_cast<int>(thread_index.x); }

std::string hex(uint32_t at) { return "shared+" + std::to_string(at - kBase); }

bool knows(int thread, const Access& access) {
  return access.who < 0 ||
         knowledge[static_cast<size_t>(thread)].of[static_cast<size_t>(access.who)] >= access.when;
}

namespace {

constexpr int kMost = 227 << 10;  // bytes of a block
constexpr int kThreadsMost = 1024;
constexpr int kCopies = 64;  // mbarriers: each is a clock of the copy engine
constexpr int kNamed = 16;

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

struct Named {
  int threads = 0, arrived = 0;
  int64_t passed = 0;
  Knowledge sum;
};

std::vector<Barrier> barriers;
std::deque<Copy> copies;
Named named[kNamed];
std::mt19937 dice;
int fault = kRight;

bool producer_side() { return thread_index.x < 128; }

void check_bounds(uint32_t at, int bytes) {
  if (at < kBase || at + static_cast<uint32_t>(bytes) > kBase + static_cast<uint32_t>(size)) {
    fail(hex(at) + " is out of bounds, " + std::to_string(size) + " bytes");
  }
  if (at % static_cast<uint32_t>(bytes) != 0) fail(hex(at) + " is not aligned");
}

Clock clock_of(int thread) {
  return knowledge[static_cast<size_t>(thread)].of[static_cast<size_t>(thread)];
}

// What this thread did so far is heard by those that get its knowledge now.
void tick(int thread) { ++knowledge[static_cast<size_t>(thread)].of[static_cast<size_t>(thread)]; }

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

}  // namespace

// --- dynamic shared memory ---

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
