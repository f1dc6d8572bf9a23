// Two passes of CPU inference, on the bits of numbers: those of equal sign are ordered as their
// bits are, as integers, so that 16-bit types need no conversion.
//
// max_pool: z = maxpool(x) of x >= 0, NHWC.            reads 1 tensor, writes z
// abs_max: the largest bits of |x|, those of Inf if there is one, more if there is a NaN. reads x
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {
namespace {

template <class I>
void pool(const MaxPool& p) {
  const PoolGeometry& g = p.pool;
  const int64_t c = p.c;
  const I* x = static_cast<const I*>(p.x);
  I* z = static_cast<I*>(p.z);
  parallel(p.n * g.oh, max64(1, kGrain / (g.ow * c)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t top = row % g.oh * g.stride - g.padding;
      const int64_t h0 = max64(top, 0), h1 = min64(top + g.kernel, g.h);
      for (int64_t ow = 0; ow < g.ow; ++ow) {
        const int64_t left = ow * g.stride - g.padding;
        const int64_t w0 = max64(left, 0), w1 = min64(left + g.kernel, g.w);
        I* out = z + (row * g.ow + ow) * c;
        const I* image = x + row / g.oh * g.h * g.w * c;
        constexpr int64_t kBlock = 128 / static_cast<int64_t>(sizeof(I));  // stays in registers
        for (int64_t i = 0; i < c; i += kBlock) {
          const int64_t len = min64(kBlock, c - i);
          I best[kBlock];
          std::memcpy(best, image + (h0 * g.w + w0) * c + i, static_cast<size_t>(len) * sizeof(I));
          for (int64_t h = h0; h < h1; ++h) {
            for (int64_t w = w0; w < w1; ++w) {
              const I* in = image + (h * g.w + w) * c + i;
              if (len == kBlock) {
                for (int64_t j = 0; j < kBlock; ++j) best[j] = in[j] > best[j] ? in[j] : best[j];
              } else {
                for (int64_t j = 0; j < len; ++j) best[j] = in[j] > best[j] ? in[j] : best[j];
              }
            }
          }
          std::memcpy(out + i, best, static_cast<size_t>(len) * sizeof(I));
        }
      }
    }
  });
}

template <class I>
uint32_t largest(const void* data, int64_t count) {
  constexpr int64_t kChunk = 1 << 16;
  constexpr I kMagnitude = static_cast<I>(~(I(1) << (8 * sizeof(I) - 1)));
  const I* x = static_cast<const I*>(data);
  const int64_t chunks = ceil_div(count, kChunk);
  I* found = static_cast<I*>(scratch(0, static_cast<size_t>(chunks) * sizeof(I)));
  parallel(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t stop = min64((chunk + 1) * kChunk, count);
      I most = 0;
      for (int64_t i = chunk * kChunk; i < stop; ++i) {
        const I here = x[i] & kMagnitude;
        most = here > most ? here : most;
      }
      found[chunk] = most;
    }
  });
  I most = 0;
  for (int64_t i = 0; i < chunks; ++i) most = found[i] > most ? found[i] : most;
  return most;
}

}  // namespace

void max_pool(const MaxPool& p) {
  if (p.dtype == kF32) {
    pool<int32_t>(p);
  } else {
    pool<int16_t>(p);
  }
}

uint32_t abs_max(const void* x, int dtype, int64_t count) {
  return dtype == kF32 ? largest<uint32_t>(x, count) : largest<uint16_t>(x, count);
}

}  // namespace FASTRES_ISA
}  // namespace fastres
