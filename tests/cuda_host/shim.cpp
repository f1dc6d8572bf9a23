#include "shim.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

Index thread_index, block_index;
int epoch = 0;
long generation = 0;

namespace {

constexpr size_t kStack = 128 << 10;

// --- the switch between two stacks ---

#if defined(__x86_64__)
// Callee-saved registers on the old stack, then the same from the new one. swapcontext does this
// with two system calls.
asm(R"(
.text
.type fastres_shim_switch, @function
fastres_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void fastres_shim_switch(void** save, void* load);
#endif

struct Fiber {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  std::unique_ptr<char[]> stack;
  int thread = -1;
  void* fake = nullptr;  // AddressSanitizer's
};

enum State { kNew, kRunning, kReady, kBarrier, kWarpOp, kWaiting, kDone };

struct Thread {
  State state = kNew;
  Fiber* fiber = nullptr;
  int kind = 0, argument = 0;
  unsigned mask = 0;
  uint64_t value = 0;
  const std::function<bool()>* ready = nullptr;
};

Fiber main_fiber;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
Fiber* running = nullptr;
std::vector<Thread> threads;
std::vector<int> order;  // of the threads
size_t started = 0;
int at_barrier = 0, done = 0;
const std::function<void()>* body = nullptr;
std::string failure;
unsigned seed = 0;
int64_t count = 0;
std::deque<std::pair<std::string, int64_t>> last;  // launches
const Engine* engine = nullptr;
std::vector<uint64_t> gathered;  // of each warp's last kGather

void enter();

#if defined(__SANITIZE_ADDRESS__)
const void* main_bottom = nullptr;
size_t main_size = 0;
#endif

void arrived([[maybe_unused]] Fiber* self) {
#if defined(__SANITIZE_ADDRESS__)
  if (self == &main_fiber) {
    __sanitizer_finish_switch_fiber(self->fake, nullptr, nullptr);
  } else {  // every switch to a fiber comes from the main stack
    __sanitizer_finish_switch_fiber(self->fake, &main_bottom, &main_size);
  }
#endif
}

void go(Fiber* from, Fiber* to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->fake, to->stack ? to->stack.get() : main_bottom,
                                 to->stack ? kStack : main_size);
#endif
  running = to;
#if defined(__x86_64__)
  fastres_shim_switch(&from->sp, to->sp);
#else
  swapcontext(&from->context, &to->context);
#endif
  arrived(from);
}

Fiber* fresh() {
  if (!idle.empty()) {
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
  }
  fibers.push_back(std::make_unique<Fiber>());
  Fiber* fiber = fibers.back().get();
  fiber->stack.reset(new char[kStack]);
#if defined(__x86_64__)
  auto top = (reinterpret_cast<uintptr_t>(fiber->stack.get()) + kStack) & ~uintptr_t{15};
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber->sp = sp;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  makecontext(&fiber->context, &enter, 0);
#endif
  return fiber;
}

// A fiber's life: it runs threads that have not started, one after another, as long as they come
// to their end; a thread that waits keeps it.
void enter() {
  arrived(running);
  for (;;) {
    Fiber* self = running;
    while (started < order.size()) {
      const int id = order[started++];
      self->thread = id;
      threads[id].fiber = self;
      threads[id].state = kRunning;
      thread_index = Index{static_cast<unsigned>(id), 0, 0};
      (*body)();
      threads[id].state = kDone;
      ++done;
    }
    self->thread = -1;
    idle.push_back(self);
    go(self, &main_fiber);
  }
}

void wait(int id) {
  go(running, &main_fiber);
  thread_index.x = static_cast<unsigned>(id);
}

const char* name_of(State s) {
  return s == kDone      ? "has ended"
         : s == kBarrier ? "waits at a barrier"
         : s == kWarpOp  ? "waits for its warp"
                         : "waits at an mbarrier, a named barrier or for its warpgroup";
}

void stuck() {
  std::string text = "deadlock:";
  const State seen[] = {kDone, kBarrier, kWarpOp, kWaiting};
  for (const State s : seen) {
    for (size_t i = 0; i < threads.size(); ++i) {
      if (threads[i].state == s) {
        text += std::string(" thread ") + std::to_string(i) + " " + name_of(s) + ";";
        break;
      }
    }
  }
  failure = text + " a barrier or warp operation is not reached by all";
}

void run_block() {
  for (Thread& t : threads) t = Thread{};
  started = 0;
  at_barrier = done = 0;
  epoch = 0;
  ++generation;
  gathered.assign(threads.size() + 32, 0);
  if (engine != nullptr) engine->begin(static_cast<int>(threads.size()));
  while (failure.empty() && done < static_cast<int>(threads.size())) {
    bool moved = false;
    while (failure.empty() && started < order.size()) {
      moved = true;
      go(&main_fiber, fresh());
    }
    for (size_t i = 0; failure.empty() && i < order.size(); ++i) {
      Thread& t = threads[order[i]];
      if (t.state == kWaiting && (*t.ready)()) t.state = kReady;
      if (t.state != kReady) continue;
      moved = true;
      t.state = kRunning;
      thread_index = Index{static_cast<unsigned>(order[i]), 0, 0};
      go(&main_fiber, t.fiber);
    }
    if (!moved && failure.empty() && !(engine != nullptr && engine->idle())) stuck();
  }
  if (failure.empty() && engine != nullptr) failure = engine->end();
}

}  // namespace

void fail(const std::string& what) {
  failure = "thread " + std::to_string(thread_index.x) + ": " + what;
  go(running, &main_fiber);  // for good: the launch forgets its fibers
  __builtin_unreachable();
}

void barrier() {
  const int id = static_cast<int>(thread_index.x);
  if (++at_barrier == static_cast<int>(threads.size())) {
    at_barrier = 0;
    ++epoch;
    if (engine != nullptr) engine->all_meet();
    for (Thread& t : threads) {
      if (t.state == kBarrier) t.state = kReady;
    }
    return;
  }
  threads[id].state = kBarrier;
  wait(id);
}

uint64_t warp(int kind, uint64_t value, int argument, unsigned mask) {
  const int id = static_cast<int>(thread_index.x);
  Thread& me = threads[id];
  me.kind = kind;
  me.value = value;
  me.argument = argument;
  me.mask = mask;
  me.state = kWarpOp;
  const int first = id / 32 * 32;
  const int lanes = std::min<int>(32, static_cast<int>(threads.size()) - first);
  if (!(mask >> (id - first) & 1u)) fail("a warp operation whose mask leaves the caller out");
  bool all = true;
  for (int lane = 0; lane < lanes; ++lane) {
    const Thread& t = threads[first + lane];
    if (!(mask >> lane & 1u)) continue;
    if (t.state != kWarpOp) {
      all = false;
    } else if (t.kind != kind || t.mask != mask) {
      fail("lanes of a warp are at different warp operations");
    }
  }
  if (!all) {
    wait(id);
    return me.value;
  }
  uint64_t in[32] = {}, out[32] = {};
  for (int lane = 0; lane < lanes; ++lane) in[lane] = threads[first + lane].value;
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    const int a = threads[first + lane].argument;
    int from = kind == kShuffle ? a & 31 : kind == kShuffleXor ? lane ^ a : lane + a;
    if (from >= 32) from = lane;
    if (kind == kSyncWarp || kind == kGather) {
      gathered[static_cast<size_t>(first + lane)] = in[lane];
    } else if (kind == kBallot) {
      for (int other = 0; other < lanes; ++other) {
        if ((mask >> other & 1u) && in[other]) out[lane] |= uint64_t{1} << other;
      }
    } else {
      if (!(mask >> from & 1u)) fail("a shuffle reads a lane outside its mask");
      out[lane] = in[from];
    }
  }
  if (kind == kSyncWarp && engine != nullptr) engine->warp_meets(first, lanes);
  for (int lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    threads[first + lane].value = out[lane];
    threads[first + lane].state = kReady;
  }
  me.state = kRunning;
  return me.value;
}

const uint64_t* warp_gather(uint64_t value) {
  const int id = static_cast<int>(thread_index.x);
  warp(kGather, value, 0, 0xffffffffu);
  return &gathered[static_cast<size_t>(id / 32 * 32)];
}

void wait_until(const std::function<bool()>& ready) {
  if (ready()) return;
  const int id = static_cast<int>(thread_index.x);
  threads[id].ready = &ready;
  threads[id].state = kWaiting;
  wait(id);
}

void set_order(unsigned s) { seed = s; }
unsigned order_seed() { return seed; }
int64_t launches() { return count; }
std::vector<std::pair<std::string, int64_t>> recent() { return {last.begin(), last.end()}; }

void launch(const char* name, int64_t blocks, int n, const std::function<void()>& kernel,
            const Engine* of) {
  if (blocks < 1) throw std::runtime_error(std::string(name) + ": a launch of no blocks");
  ++count;
  last.emplace_back(name, blocks);
  if (last.size() > 64) last.pop_front();
  threads.assign(static_cast<size_t>(n), Thread{});
  order.resize(static_cast<size_t>(n));
  std::vector<int64_t> block_order(static_cast<size_t>(blocks));
  for (int i = 0; i < n; ++i) order[i] = seed == 1 ? n - 1 - i : i;
  for (int64_t i = 0; i < blocks; ++i) block_order[i] = seed == 1 ? blocks - 1 - i : i;
  if (seed > 1) {
    std::mt19937 random(seed);
    std::shuffle(order.begin(), order.end(), random);
    std::shuffle(block_order.begin(), block_order.end(), random);
  }
  body = &kernel;
  engine = of;
  failure.clear();
  for (const int64_t block : block_order) {
    block_index = Index{static_cast<unsigned>(block), 0, 0};
    run_block();
    if (!failure.empty()) {
      idle.clear();  // stacks of a broken launch are left as they are, and not used again
      for (auto& fiber : fibers) fiber.release();
      fibers.clear();
      throw std::runtime_error(std::string(name) + ", block " + std::to_string(block) + ", " +
                               failure);
    }
  }
}

}  // namespace shim
