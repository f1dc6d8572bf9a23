// What the pointwise (1 x 1, stride 1) convolutions of sm_90a share: a GEMM whose A operand passes
// through registers, on its way from the raw activation to wgmma.
//
// A block is three warpgroups. One thread of the first, the producer, keeps a ring of stages in
// shared memory full by the copy engine; another of its warps fetches the ReLU bits where there are
// any. The two consumer warpgroups, 64 rows of the tile each, read their part of a stage as wgmma's
// register fragments, apply scale-shift-ReLU or the batch norm's backward, round, and multiply by
// the weights, which wgmma reads from shared memory. While a stage is multiplied the next one's
// fragments are formed. Blocks stay: each has one tile of columns and walks down a chunk of rows.
#pragma once

#include "hopper.cuh"
#include "norm.cuh"

namespace fastres {
namespace cuda {

constexpr int kTileRows = 128;                            // of a block: 64 a consumer warpgroup
constexpr int kTileBytes = kTileRows * kSwizzleBytes;     // 64 channels of them
constexpr int kBoxBytes = kTileChannels * kSwizzleBytes;  // a box of 64 x 64
constexpr int kConsumers = 256;                           // threads
constexpr int kPointwiseThreads = 384;
constexpr int kMostShared = 227 << 10;
constexpr int kPanel = 32;               // columns that an epilogue handles at once
constexpr int kStagingBytes = 16 * 128;  // of a warp: 16 rows of a panel in fp32
constexpr int kConsumerBarrier = 1;
// 384 threads have 168 registers each at launch, 64,512 in all: 40 * 128 + 2 * 232 * 128.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

// How a launch covers its GEMM, and where things lie in shared memory (offsets).
struct Schedule {
  int64_t rows;   // of the GEMM: pixels
  int64_t tiles;  // of kTileRows rows, in a chunk
  int64_t chunks;
  int columns;  // tiles of columns; block b has column b % columns of chunk b / columns
  int steps;    // of 64 of the reduction's length
  int stages, stage_bytes;
  bool resident;              // the weights of the block's columns stay in shared memory
  uint32_t y, weights, bits;  // in a stage (weights: unless resident)
  uint32_t staging, row_table, column_table, counts, barriers, bytes;
};

struct Ring {
  uint32_t full, empty;  // the first stage's mbarriers
  int stages, stage = 0;
  uint32_t parity = 0;

  FASTRES_DEVICE Ring(const Schedule& s, uint32_t shared)
      : full(shared + s.barriers), empty(full + 8 * s.stages), stages(s.stages) {}
  FASTRES_DEVICE uint32_t full_now() const { return full + 8 * stage; }
  FASTRES_DEVICE uint32_t empty_now() const { return empty + 8 * stage; }
  FASTRES_DEVICE void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1u;
    }
  }
};

FASTRES_DEVICE uint32_t resident_barrier(const Schedule& s, uint32_t shared) {
  return shared + s.barriers + 16 * s.stages;
}

// Thread 0: the ring's mbarriers, and the resident weights'. `arrivals`: of the producer's side.
FASTRES_DEVICE void make_barriers(const Schedule& s, uint32_t shared, int arrivals) {
  if (threadIdx.x != 0) return;
  const Ring ring(s, shared);
  for (int i = 0; i < s.stages; ++i) {
    barrier_init(ring.full + 8 * i, arrivals);
    barrier_init(ring.empty + 8 * i, kConsumers / 32);
  }
  barrier_init(resident_barrier(s, shared), 1);
  fence_barrier_init();
}

// The tiles of a block's chunk: first to end.
struct Tiles {
  int64_t first, end;
  FASTRES_DEVICE explicit Tiles(const Schedule& s) {
    const int64_t all = (s.rows + kTileRows - 1) / kTileRows;
    first = blockIdx.x / s.columns * s.tiles;
    end = first + s.tiles < all ? first + s.tiles : all;
  }
};

// A consumer thread's place: warp `warp` of warpgroup `group`, rows 64 * group + 16 * warp + ... of
// the tile; in the fragments rows `quad` and quad + 8, columns 2 * pair + 0, 1.
struct Place16 {
  int lane, warp, group, quad, pair;
  FASTRES_DEVICE Place16() {
    const int tid = static_cast<int>(threadIdx.x) - (kPointwiseThreads - kConsumers);
    lane = tid & 31;
    warp = tid >> 5 & 3;
    group = tid >> 7;
    quad = lane >> 2;
    pair = lane & 3;
  }
  FASTRES_DEVICE int row() const { return 64 * group + 16 * warp; }
  FASTRES_DEVICE int index() const { return 4 * group + warp; }  // of the warp
};

// --- multiply: acc = A * B over the steps of one tile ---

// fragment(a, stage, step) forms a[4], the 16-deep fragments of a stage; b(stage, step, i) is the
// descriptor of B's 16-deep slice i.
template <int N, bool TRANSPOSED, class T>
struct Multiply {
  float (&acc)[N / 2];
  Ring& ring;
  uint32_t before;  // empty barrier of the stage that is being multiplied

  template <class Fragment, class B>
  FASTRES_DEVICE void step(uint32_t (&a)[4][4], int step, const Fragment& fragment, const B& b) {
    // 2. a stage has come: A's fragments
    barrier_wait(ring.full_now(), ring.parity);
    fragment(a, ring.stage, step);

    // 3. multiply
#pragma unroll
    for (int i = 0; i < 4; ++i) settle(a[i]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      wgmma<N, TRANSPOSED>(acc, a[i], b(ring.stage, step, i), step > 0 || i > 0, T{});
    }
    wgmma_commit();

    // 4. the step before is done: its stage is free
    if (step > 0) {
      wgmma_wait<1>();
      release();
    }
    before = ring.empty_now();
    ring.advance();
  }
  FASTRES_DEVICE void release() const {
    __syncwarp();
    if ((threadIdx.x & 31u) == 0) barrier_arrive(before);
  }

  template <class Fragment, class B>
  FASTRES_DEVICE void operator()(int steps, const Fragment& fragment, const B& b) {
    uint32_t even[4][4], odd[4][4];  // one is multiplied while the other is formed
    for (int i = 0; i < steps; i += 2) {
      step(even, i, fragment, b);
      if (i + 1 < steps) step(odd, i + 1, fragment, b);
    }
    wgmma_wait<0>();
    settle(acc);
    release();
  }
};

// --- tables of per-channel vectors in shared memory ---

// Plane `plane` of a table of `length` channels: f(channel) for channels below `count`, else 0, by
// all threads of the block.
template <class F>
FASTRES_DEVICE void fill_table(uint32_t table, int plane, int length, int64_t first, int64_t count,
                               const F& f) {
  for (int i = static_cast<int>(threadIdx.x); i < length; i += kPointwiseThreads) {
    store_shared(table + 4 * (plane * length + i), first + i < count ? f(first + i) : 0.0f);
  }
}
FASTRES_DEVICE float value_or(const float* p, int64_t at, float missing) {
  return p == nullptr ? missing : p[at];
}

// mean, gamma * rstd and beta of normalise(), planes 0 to 2. A channel past the end becomes 0.
FASTRES_DEVICE void fill_affine(uint32_t table, int length, int64_t first, int64_t count,
                                const float* mean, const float* rstd, const float* gamma,
                                const float* beta) {
  fill_table(table, 0, length, first, count, [=](int64_t c) { return value_or(mean, c, 0.0f); });
  fill_table(table, 1, length, first, count,
             [=](int64_t c) { return value_or(gamma, c, 1.0f) * value_or(rstd, c, 1.0f); });
  fill_table(table, 2, length, first, count, [=](int64_t c) { return value_or(beta, c, 0.0f); });
}

// The vectors of two neighbouring channels, in planes `plane` bytes apart.
struct NormPair {
  float2 mean, scale, beta;
  FASTRES_DEVICE NormPair(uint32_t at, uint32_t plane)
      : mean(load_shared<float2>(at)),
        scale(load_shared<float2>(at + plane)),
        beta(load_shared<float2>(at + 2 * plane)) {}
  // relu(normalise(x)) of two channels
  template <class T>
  FASTRES_DEVICE uint32_t activate(uint32_t word, T t) const {
    float x[2];
    widen2(word, x, t);
    return narrow2_relu(normalise(x[0], mean.x, scale.x, beta.x),
                        normalise(x[1], mean.y, scale.y, beta.y), t);
  }
};

// The batch norm behind a conv, through which its gradient comes.
struct NormBackward {
  const float *mean, *rstd, *gamma, *dgamma, *dbeta;
  float inverse_count;
  bool on, training;
};

// scale * g - (y - mean) * slope - offset; frozen: y, mean, slope and offset are 0.
FASTRES_DEVICE float norm_gradient(float g, float y, float mean, float scale, float slope,
                                   float offset) {
  return fmaf(scale, g, -fmaf(y - mean, slope, offset));
}

// 0xffff in the halves of a word whose bits, 0 and 1 of `pass`, are 1.
FASTRES_DEVICE uint32_t halves(uint32_t pass) {
  return (pass & 1u ? 0xffffu : 0u) | (pass & 2u ? 0xffff0000u : 0u);
}

// The factors of one channel in registers; 0 past the end.
struct GradientChannel {
  float mean = 0.0f, scale = 0.0f, slope = 0.0f, offset = 0.0f;
  FASTRES_DEVICE GradientChannel(const NormBackward& bn, int64_t c, int64_t count) {
    if (!bn.on || c >= count) return;
    const float rstd = value_or(bn.rstd, c, 1.0f);
    scale = value_or(bn.gamma, c, 1.0f) * rstd;
    if (!bn.training) return;
    mean = value_or(bn.mean, c, 0.0f);
    slope = scale * (bn.dgamma[c] * bn.inverse_count * rstd);
    offset = scale * (bn.dbeta[c] * bn.inverse_count);
  }
  // dy of one channel at two pixels, from gated g and y
  template <class T>
  FASTRES_DEVICE uint32_t operator()(uint32_t g_word, uint32_t y_word, T t) const {
    float g[2], y[2];
    widen2(g_word, g, t);
    widen2(y_word, y, t);
    return narrow2(norm_gradient(g[0], y[0], mean, scale, slope, offset),
                   norm_gradient(g[1], y[1], mean, scale, slope, offset), t);
  }
};

// Of GradientChannel's factors, planes 0 to 3.
FASTRES_DEVICE void fill_gradient(uint32_t table, int length, const NormBackward& bn,
                                  int64_t count) {
  for (int i = static_cast<int>(threadIdx.x); i < length; i += kPointwiseThreads) {
    const GradientChannel v(bn, i, count);
    store_shared(table + 4 * i, v.mean);
    store_shared(table + 4 * (length + i), v.scale);
    store_shared(table + 4 * (2 * length + i), v.slope);
    store_shared(table + 4 * (3 * length + i), v.offset);
  }
}

// Of two channels, from that table.
struct GradientPair {
  float2 mean, scale, slope, offset;
  FASTRES_DEVICE GradientPair(uint32_t at, uint32_t plane)
      : mean(load_shared<float2>(at)),
        scale(load_shared<float2>(at + plane)),
        slope(load_shared<float2>(at + 2 * plane)),
        offset(load_shared<float2>(at + 3 * plane)) {}
  // dy of two channels, from g (gated first) and y
  template <class T>
  FASTRES_DEVICE uint32_t operator()(uint32_t g_word, uint32_t y_word, uint32_t pass, T t) const {
    float g[2], y[2];
    widen2(g_word & halves(pass), g, t);
    widen2(y_word, y, t);
    return narrow2(norm_gradient(g[0], y[0], mean.x, scale.x, slope.x, offset.x),
                   norm_gradient(g[1], y[1], mean.y, scale.y, slope.y, offset.y), t);
  }
};

// --- epilogues: a warp's 16 rows of 32 columns in fp32 pass through shared memory, from wgmma's
// fragments to whole rows. A row is 8 pieces of 16 bytes; `row_swizzle` keeps the banks apart for
// stores of fragments (8 bytes a lane), loads of units (16 bytes) and of columns (4 bytes). ---

FASTRES_DEVICE uint32_t row_swizzle(int row) {
  return static_cast<uint32_t>((row & 3) << 1 | (row & 1));
}

template <int N>
FASTRES_DEVICE void stage_panel(uint32_t staging, const float (&acc)[N / 2], int panel,
                                const Place16& at) {
  const uint32_t row = staging + 128 * at.quad;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t piece = static_cast<uint32_t>(2 * j + (at.pair >> 1)) ^ row_swizzle(at.quad);
    const uint32_t to = row + 16 * piece + 8 * (at.pair & 1);
    store_shared(to, make_float2(acc[16 * panel + 4 * j], acc[16 * panel + 4 * j + 1]));
    store_shared(to + 8 * 128,
                 make_float2(acc[16 * panel + 4 * j + 2], acc[16 * panel + 4 * j + 3]));
  }
}
// Eight columns, `unit` of four, of a row.
FASTRES_DEVICE void staged_unit(float (&v)[8], uint32_t staging, int row, int unit) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t piece = static_cast<uint32_t>(2 * unit + i) ^ row_swizzle(row);
    const float4 q = load_shared<float4>(staging + 128 * row + 16 * piece);
    v[4 * i] = q.x;
    v[4 * i + 1] = q.y;
    v[4 * i + 2] = q.z;
    v[4 * i + 3] = q.w;
  }
}
FASTRES_DEVICE float staged(uint32_t staging, int row, int column) {
  const uint32_t piece = static_cast<uint32_t>(column >> 2) ^ row_swizzle(row);
  return load_shared<float>(staging + 128 * row + 16 * piece + 4 * (column & 3));
}
// One round of a sum over lanes that spreads the values: of 2 * COUNT each lane keeps COUNT, the
// lower or (lanes with MASK) the upper half, added to those of its partner.
template <int COUNT, int MASK>
FASTRES_DEVICE void spread_sums(float* v) {
  const bool upper = (threadIdx.x & MASK) != 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float mine = upper ? v[COUNT + i] : v[i];
    const float other = upper ? v[i] : v[COUNT + i];
    v[i] = mine + __shfl_xor_sync(kWarp, other, MASK);
  }
}
// Eight neighbouring values of a table's plane.
FASTRES_DEVICE void table_unit(float (&v)[8], uint32_t table, int at) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 q = load_shared<float4>(table + 4 * (at + 4 * i));
    v[4 * i] = q.x;
    v[4 * i + 1] = q.y;
    v[4 * i + 2] = q.z;
    v[4 * i + 3] = q.w;
  }
}

// --- the producer's side ---

// Keeps the ring full: stage(ring, tile, step) waits until its stage is free and brings it.
template <class Stage>
FASTRES_DEVICE void produce(const Schedule& s, Ring ring, const Stage& stage) {
  const Tiles tiles(s);
  for (int64_t tile = tiles.first; tile < tiles.end; ++tile) {
    for (int step = 0; step < s.steps; ++step) {
      stage(ring, tile, step);
      ring.advance();
    }
  }
}

// Eight bytes of a mask's row from byte `at` on, those past the row's end 0.
FASTRES_DEVICE uint2 load_bits(const uint8_t* mask, int64_t row, int64_t bytes, int at) {
  const uint8_t* p = mask + row * bytes + at;
  if (bytes % 8 == 0 && reinterpret_cast<uintptr_t>(mask) % 8 == 0) {
    return *reinterpret_cast<const uint2*>(p);
  }
  uint64_t word = 0;
#pragma unroll 1  // the producer's warps have few registers
  for (int i = 0; i < 8 && at + i < bytes; ++i) word |= static_cast<uint64_t>(p[i]) << (8 * i);
  return make_uint2(static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32));
}

}  // namespace cuda
}  // namespace fastres
