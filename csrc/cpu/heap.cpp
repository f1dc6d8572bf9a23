// Keeps activations on the heap (glibc on Linux; elsewhere no-ops).
//
// Why: by default glibc maps every tensor above 128 KiB .. 32 MiB afresh and unmaps it when freed,
// so each op of a step page-faults its whole output. ANCHORS.md: a third of the CPU time of
// ResNet-50. Huge pages for that heap (madvise) were tried and made no difference beyond noise:
// 0.93x to 1.02x on the four cases of `fastres bench resnet50`.
#include "runtime.h"

#if defined(__GLIBC__) && defined(__linux__)
#include <malloc.h>
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

#else

bool tune_malloc() { return false; }
bool untune_malloc() { return false; }

#endif

}  // namespace fastres
