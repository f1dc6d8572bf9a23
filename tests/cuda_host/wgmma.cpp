// Warps and warpgroups of the Hopper shim: ldmatrix, wgmma, setmaxnreg.
#include <algorithm>
#include <limits>
#include <vector>

#include "hopper_block.h"

namespace shim {
namespace {

constexpr int kFile = 65536;  // registers of an SM

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

}  // namespace shim
