// Keeps activations on the heap, and the heap on huge pages (glibc on Linux; elsewhere no-ops).
//
// Why: by default glibc maps every tensor above 128 KiB .. 32 MiB afresh and unmaps it when freed,
// so each op of a step page-faults its whole output. ANCHORS.md: a third of the CPU time of
// ResNet-50.
#include "runtime.h"

#include <cstdio>
#include <cstring>

#if defined(__GLIBC__) && defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>
#include <mutex>
#define FASTRES_GLIBC 1
#endif

namespace fastres {

#ifdef FASTRES_GLIBC

bool tune_malloc() {
  // 1. nothing is mapped on its own, 2. the heap never shrinks, 3. it grows in steps of 64 MiB
  bool ok = mallopt(M_MMAP_MAX, 0) == 1;
  ok &= mallopt(M_TRIM_THRESHOLD, -1) == 1;
  ok &= mallopt(M_TOP_PAD, 64 << 20) == 1;
  return ok;
}

bool untune_malloc() {
  // glibc's defaults. Setting M_TRIM_THRESHOLD at all switches off its dynamic mmap threshold,
  // which then stays where it is: mallopt offers no way back.
  bool ok = mallopt(M_MMAP_MAX, 65536) == 1;
  ok &= mallopt(M_TRIM_THRESHOLD, 128 << 10) == 1;
  ok &= mallopt(M_TOP_PAD, 128 << 10) == 1;
  return ok;
}

namespace {

uintptr_t heap_start() {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (maps == nullptr) return 0;
  char line[512];
  unsigned long long start = 0;
  while (std::fgets(line, sizeof line, maps) != nullptr) {
    if (std::strstr(line, "[heap]") != nullptr && std::sscanf(line, "%llx-", &start) == 1) break;
    start = 0;
  }
  std::fclose(maps);
  return static_cast<uintptr_t>(start);
}

}  // namespace

int64_t advise_heap() {
  static std::mutex mutex;
  static uintptr_t start = 0;
  static uintptr_t last_end = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const uintptr_t end = reinterpret_cast<uintptr_t>(sbrk(0));
  if (end == last_end) return 0;
  if (start == 0) start = heap_start();
  last_end = end;
  if (start == 0) return 0;
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t from = (start + kHuge - 1) / kHuge * kHuge;
  const uintptr_t to = end / kHuge * kHuge;
  if (to <= from || madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE) != 0) return 0;
  return static_cast<int64_t>(to - from);
}

#else

bool tune_malloc() { return false; }
bool untune_malloc() { return false; }
int64_t advise_heap() { return 0; }

#endif

}  // namespace fastres
