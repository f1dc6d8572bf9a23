// How blocks cover an activation, the (outer, inner) matrix of docs/kernels.md.
//
// A row is cut into units of L elements. Elementwise kernels take a Map: a thread of an NHWC kernel
// keeps its channels, hence their vectors in registers, and walks down the rows; a thread of an
// NCHW kernel keeps its row and walks along it. Reductions take a Cut: a block sums one chunk of
// rows (NHWC) or of one channel's images (NCHW) into a workspace (parts, chunks, C), from which a
// second kernel merges the chunks. Both are functions of shape, layout and dtype alone.
#pragma once

#include "device.cuh"

namespace fastres {
namespace cuda {

struct Map {
  int64_t outer, inner, units, mask_row;
  int64_t channels;
  int64_t blocks;
  uint32_t col_tiles;
  int log_tx;  // 1 << log_tx threads along a row
  int steps;   // positions of a thread
  bool by_row, nhwc;
};

struct Cut {
  int64_t total;  // rows (NHWC) or images (NCHW), `chunk` of them to a block
  int64_t inner, units, mask_row;
  int64_t channels;
  int64_t chunk, chunks;
  uint32_t programs;  // blocks of a chunk: column tiles (NHWC) or channels (NCHW)
  int log_tx;
  bool nhwc;
};

constexpr int kFinaliseChannels = kThreads / 32;  // of a block of the finalise kernels: a warp each

// Positions of which a thread has the loads in flight at once: 64 bytes of a tensor, or 8 elements.
template <class T, int L>
FASTRES_DEVICE constexpr int in_flight() {
  return L == 1 ? 8 : 64 / (8 * static_cast<int>(sizeof(T)));
}

// A thread's positions of a Map: k = 0, 1, ... of them are `count`.
template <int L>
struct Walk {
  int64_t at, step_at;      // element offset of position 0, and its growth
  int64_t bits, step_bits;  // byte offset in the mask, likewise
  int64_t row, unit;        // of position 0
  int64_t step_row, step_unit;
  int64_t channel;
  int count;

  FASTRES_DEVICE explicit Walk(const Map& m) {
    const int tx = static_cast<int>(threadIdx.x) & ((1 << m.log_tx) - 1);
    const int ty = static_cast<int>(threadIdx.x) >> m.log_tx;
    const int64_t tile_row = blockIdx.x / m.col_tiles, tile_col = blockIdx.x % m.col_tiles;
    const int rows = kThreads >> m.log_tx, cols = 1 << m.log_tx;
    step_row = m.by_row ? rows : 0;
    step_unit = m.by_row ? 0 : cols;
    row = tile_row * rows * (m.by_row ? m.steps : 1) + ty;
    unit = tile_col * cols * (m.by_row ? 1 : m.steps) + tx;
    const int64_t left =
        m.by_row ? (m.outer - row + rows - 1) / rows : (m.units - unit + cols - 1) / cols;
    const bool some = row < m.outer && unit < m.units;
    count = !some ? 0 : left < m.steps ? static_cast<int>(left) : m.steps;
    at = row * m.inner + unit * L;
    step_at = step_row * m.inner + step_unit * L;
    bits = row * m.mask_row + unit * L / 8;
    step_bits = step_row * m.mask_row + step_unit * L / 8;
    channel = !some ? 0 : m.nhwc ? unit * L : row % m.channels;
  }
};

// The bits of 8 elements: a thread's own (L = 8), or of 8 neighbouring lanes (L = 1; all lanes of a
// warp must call it). The byte is stored by one of them.
FASTRES_DEVICE void store_bits(uint8_t* mask, int64_t at, const bool (&keep)[8], bool ok) {
  unsigned byte = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) byte |= keep[j] ? 1u << j : 0u;
  if (ok) mask[at] = static_cast<uint8_t>(byte);
}
FASTRES_DEVICE void store_bits(uint8_t* mask, int64_t at, const bool (&keep)[1], bool ok) {
  const unsigned lane = threadIdx.x & 31u;
  const unsigned all = __ballot_sync(kWarp, keep[0] && ok);
  if (ok && (lane & 7u) == 0) mask[at] = static_cast<uint8_t>(all >> lane);
}

// Whether lane j of a unit passes, from its mask byte. `unit` tells the bit where L is 1.
template <int L>
FASTRES_DEVICE bool bit_of(unsigned byte, int64_t unit, int j) {
  return (byte >> (L == 8 ? j : static_cast<int>(unit & 7))) & 1u;
}

// A block's chunk of a Cut as two nested loops over (row, unit): NHWC runs the outer loop once and
// walks down a column of units; NCHW walks images, and units along each.
template <int L>
struct Chunk {
  int64_t r, r_end, r_step;
  int64_t i, i_end, i_step;
  int64_t unit, plane;  // NHWC: the column; NCHW: the channel
  int64_t channel, index;
  int tx, ty;

  FASTRES_DEVICE explicit Chunk(const Cut& c) {
    tx = static_cast<int>(threadIdx.x) & ((1 << c.log_tx) - 1);
    ty = static_cast<int>(threadIdx.x) >> c.log_tx;
    const int rows = kThreads >> c.log_tx, cols = 1 << c.log_tx;
    index = blockIdx.x / c.programs;
    const int64_t program = blockIdx.x % c.programs;
    const int64_t begin = index * c.chunk;
    const int64_t end = begin + c.chunk < c.total ? begin + c.chunk : c.total;
    if (c.nhwc) {
      unit = program * cols + tx;
      plane = 0;
      r = 0;
      r_end = unit < c.units ? 1 : 0;
      r_step = 1;
      i = begin + ty;
      i_end = end;
      i_step = rows;
      channel = unit < c.units ? unit * L : 0;
    } else {
      unit = 0;
      plane = program;
      r = begin + ty;
      r_end = end;
      r_step = rows;
      i = tx;
      i_end = c.units;
      i_step = cols;
      channel = program;
    }
  }

  FASTRES_DEVICE int64_t row_of(const Cut& c, int64_t outer, int64_t at) const {
    return c.nhwc ? at : outer * c.channels + plane;
  }
  FASTRES_DEVICE int64_t unit_of(const Cut& c, int64_t at) const { return c.nhwc ? unit : at; }
};

// Which chunk a block sums, and which of its tiles of channels.
struct Share {
  int64_t index, program;
  FASTRES_DEVICE Share(int64_t index, int64_t program) : index(index), program(program) {}
  FASTRES_DEVICE explicit Share(const Cut& c)
      : index(blockIdx.x / c.programs), program(blockIdx.x % c.programs) {}
};

struct BlockBarrier {
  FASTRES_DEVICE void operator()() const { __syncthreads(); }
};

// The matrix of partial results that a block merges: NHWC: rows of threads x the channels of the
// tile; NCHW: all threads x one channel.
template <int L>
struct Tree {
  int rows, cols, row, col;
  FASTRES_DEVICE explicit Tree(const Cut& c) {
    const int tid = static_cast<int>(threadIdx.x);
    rows = c.nhwc ? kThreads >> c.log_tx : kThreads;
    cols = c.nhwc ? L << c.log_tx : 1;
    row = c.nhwc ? tid >> c.log_tx : tid;
    col = c.nhwc ? (tid & ((1 << c.log_tx) - 1)) * L : 0;
  }
  // of a column of the tile
  FASTRES_DEVICE int64_t channel(const Cut& c, const Share& share, int column) const {
    return c.nhwc ? share.program * cols + column : share.program;
  }
};

// Sums over the rows of the tree, PARTS planes of kThreads * L cells, and stores the chunk's
// partials. A fixed order: the result does not depend on which thread comes first. kThreads threads
// of the block take part; `barrier` holds them.
template <int PARTS, int L, class Shared, class Barrier = BlockBarrier>
FASTRES_DEVICE void sum_block(float* part, Shared& cell, const float (&acc)[PARTS][L], const Cut& c,
                              const Share& share, const Barrier& barrier = Barrier{}) {
  const Tree<L> tree(c);
  const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    const int plane = p * kThreads * L;
    if (c.nhwc) {
#pragma unroll
      for (int j = 0; j < L; ++j) cell[plane + tree.row * tree.cols + tree.col + j] = acc[p][j];
    } else {
      float sum = acc[p][0];
#pragma unroll
      for (int j = 1; j < L; ++j) sum += acc[p][j];
      cell[plane + tree.row] = sum;
    }
  }
  for (int half = tree.rows / 2; half > 0; half /= 2) {
    barrier();
    const int cells = half * tree.cols;
    for (int i = tid; i < cells; i += kThreads) {
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        const int plane = p * kThreads * L;
        cell[plane + i] = cell[plane + i] + cell[plane + cells + i];
      }
    }
  }
  barrier();
  for (int i = tid; i < tree.cols; i += kThreads) {
    const int64_t ch = tree.channel(c, share, i);
    if (ch < c.channels) {
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        part[(p * c.chunks + share.index) * c.channels + ch] = cell[p * kThreads * L + i];
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastres
