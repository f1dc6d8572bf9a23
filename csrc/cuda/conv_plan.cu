// Tiles, workers and phases of the convolutions: functions of shape alone, so that two runs cut
// alike.
#include <algorithm>

#include "conv.h"
#include "launch.cuh"

namespace fastres {
namespace cuda {
namespace {

// SMs of an H100 or H200 SXM; each holds one block. A constant, not the device's: the sums'
// partials, hence their bits, are the same on every part. Fewer SMs run the same blocks in two
// turns.
#ifdef FASTRES_CUDA_HOST
constexpr int64_t kWorkers = 4;  // small tensors in the tests are to walk, too
#else
constexpr int64_t kWorkers = 132;
#endif

// A warpgroup pair multiplies 2048 FMA a clock: 128 x 128 x 64 in 512 clocks, for 32 KB of
// operands.
constexpr double kStepClocks = 512;
// Filling the ring and storing the tile, about: two latencies and 64 KB through shared memory.
constexpr double kTileClocks = 4000;
// 4.3 TB/s at 1.755 GHz.
constexpr double kBytesPerClock = 2450;

int64_t padded(int64_t v, int64_t tile) { return ceil_div(v, tile) * tile; }

// The wide tile, then the narrow one.
const std::vector<TileChoice> kTiles{
    {"cutlass-128x128-pair", 128, 128, 2,
     "loads 64 B a clock at full rate, about twice what the L2 gives an SM; two blocks share the "
     "columns' operand: 48 B"},
    {"cutlass-256x64", 256, 64, 1,
     "64 columns: no products of zeros; 256 tall, as 128 would load 96 B a clock"}};
const std::vector<TileChoice> kWgradTiles{
    {"cutlass-128x128", 128, 128, 1, "loads 64 B a clock at full rate"},
    {"cutlass-128x64", 128, 64, 1, "64 input channels: no products of zeros"}};

// By shape: the narrow one where it pads fewer columns (ResNet's 64-channel layers).
const TileChoice& tile_of(ConvPass pass, int64_t channels, int tile) {
  const int narrow = padded(channels, 64) < padded(channels, 128) ? 2 : 1;
  return tile_at(conv_tiles(pass), tile == 0 ? narrow : tile);
}

ConvSchedule wgrad_schedule(int64_t k, int64_t c, int64_t taps, int64_t pixels,
                            const TileChoice& tile) {
  ConvSchedule s{};
  s.tile_m = tile.rows;
  s.tile_n = tile.columns;
  s.cluster = tile.cluster;
  s.m_tiles = s.workers = ceil_div(k, s.tile_m);
  s.per = 1;
  s.columns = ceil_div(c, s.tile_n) * taps;
  s.k_tiles = ceil_div(pixels, kTileK);
  // The depth is cut so that the last wave is full and the partials, written and read in fp32, cost
  // less than that gains: 3x3 of 512 has 144 tiles, 1.09 waves, and 6 splits make 6.5 waves of a
  // sixth.
  const double tiles = static_cast<double>(s.workers * s.columns);
  const double bytes = 8.0 * static_cast<double>(k * c * taps);
  double best = -1;
  for (int64_t splits = 1; splits <= std::min(s.k_tiles, kWorkers); ++splits) {
    const int64_t per = ceil_div(s.k_tiles, splits);
    if (ceil_div(s.k_tiles, per) != splits) continue;
    const double waves =
        static_cast<double>(ceil_div(static_cast<int64_t>(tiles) * splits, kWorkers));
    const double clocks =
        waves * (static_cast<double>(per) * kStepClocks * s.tile_n / 128 + kTileClocks) +
        static_cast<double>(splits) * bytes / kBytesPerClock;
    if (best < 0 || clocks < best) {
      best = clocks;
      s.splits = splits;
      s.k_per = per;
    }
  }
  return s;
}

}  // namespace

const std::vector<TileChoice>& conv_tiles(ConvPass pass) {
  return pass == kWgrad ? kWgradTiles : kTiles;
}

ConvSchedule conv_schedule(ConvPass pass, int64_t rows, int64_t channels, int64_t taps,
                           int64_t depth, int tile) {
  const TileChoice& of = tile_of(pass, channels, tile);
  if (pass == kWgrad) return wgrad_schedule(rows, channels, taps, depth, of);
  ConvSchedule s{};
  s.tile_m = of.rows;
  s.tile_n = of.columns;
  s.cluster = of.cluster;
  s.m_tiles = ceil_div(rows, s.tile_m);
  s.columns = ceil_div(channels, s.tile_n);
  const int64_t groups = ceil_div(s.m_tiles, s.cluster);
  // One wave. ResNet-50 at batch 256 has 98 to 6,272 tiles of rows and 1 to 16 of columns; the
  // longest worker is at most 9% above the mean, but 35% at 7 x 7 with 512 channels: 49 pairs for
  // 16 clusters.
  const int64_t most = std::max<int64_t>(1, kWorkers / s.cluster / s.columns);
  s.per = ceil_div(groups, most);
  s.workers = ceil_div(groups, s.per) * s.cluster;
  s.splits = 1;
  s.k_tiles = s.k_per = ceil_div(depth, kTileK) * taps;
  return s;
}

std::vector<Phase> conv_phases(int64_t size, int64_t taps, int stride, int padding, int dilation) {
  std::vector<Phase> phases;
  for (int64_t first = 0; first < std::min<int64_t>(stride, size); ++first) {
    Phase p{first, ceil_div(size - first, stride), 0, 0, 1, 0, 1};
    for (int64_t tap = 0; tap < taps; ++tap) {
      if ((first + padding - tap * dilation) % stride != 0) continue;
      if (p.taps == 0) p.tap0 = tap;
      if (p.taps == 1) p.tap_step = tap - p.tap0;
      ++p.taps;
    }
    if (p.taps > 0) p.off = (first + padding - p.tap0 * dilation) / stride;
    if (p.taps > 1) p.step = p.tap_step * dilation / stride;
    phases.push_back(p);
  }
  return phases;
}

}  // namespace cuda
}  // namespace fastres
