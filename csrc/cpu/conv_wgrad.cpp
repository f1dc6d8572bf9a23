// dw = wgrad of a convolution of one group in NHWC bf16, of any filter, stride, padding and
// dilation, on AVX512_BF16's products of pairs:
//
//   dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] x[n, p', q', c],
//   p' = p stride - padding + r dilation, q' likewise of s
//
// A pair is one pixel of two images, the second one 0 behind the last of an odd number: so neither
// the shift of a tap nor a stride takes a pair of x apart. Both tensors are copied into pairs,
// chunk by chunk, in panels of channels that are then read along memory, from L2.
//
// Traffic: reads x (under a filter of one tap the pixels it meets) and dy once, dw once a chunk, or
// the sums of all parts once.
// Accumulation: fp32, over the pixels of a chunk, its part, then the parts, in order, whatever the
// number of threads. The instruction takes denormals for 0.
#include "drivers.h"

namespace fastres {
namespace FASTRES_ISA {

#if defined(FASTRES_ISA_AVX512)
namespace {

constexpr int kRows = 12;          // output channels of a tile of sums, which stays in registers
constexpr int kVecs = 2;           // its vectors of input channels
constexpr int kCols = kVecs * kW;  // input channels of a panel
constexpr int kGroup = 32;         // channels that `Interleave` takes at a time
// Pairs of pixels of dy a chunk: the panel of x that meets them is in L2, all panels are in L3, and
// the sums are read and written rarely enough.
constexpr int64_t kChunk = 1 << 20;            // bytes of all panels, but
constexpr int64_t kLeast = 400, kMost = 1600;  // pairs
// Parts, whose sums are kept apart.
constexpr int64_t kParts = 32, kPart = 200;  // at most; pairs of pixels, at least
constexpr int64_t kWorkspace = 8 << 20;      // bytes of the sums of all parts
constexpr int64_t kFar = 1 << 20;  // bytes of a dw that leaves the caches before it is used

#define FASTRES_BF16_DOT __attribute__((target("avx512bf16")))

using Pair = uint32_t;  // the low half from the first image

// One axis of the convolution.
struct Axis {
  int64_t in, taps, stride, padding, dilation;
  FASTRES_INLINE int64_t at(int64_t output, int64_t tap) const {
    return output * stride - padding + tap * dilation;
  }
};

// The outputs [begin, end) of an axis whose input under a tap lies in the image.
struct Range {
  int64_t begin, end;
  Range(const Axis& axis, int64_t first, int64_t last, int64_t tap) : begin(first), end(last) {
    while (begin < end && axis.at(begin, tap) < 0) ++begin;
    while (begin < end && axis.at(end - 1, tap) >= axis.in) --end;
  }
};

// The inputs from, from + step, ... of an axis that are packed for outputs [begin, end).
struct Span {
  int64_t from, step, count;
  Span(const Axis& axis, int64_t begin, int64_t end) {
    if (axis.taps == 1) {
      const Range met(axis, begin, end, 0);
      from = axis.at(met.begin, 0);
      step = axis.stride;
      count = met.end - met.begin;
    } else {
      from = max64(0, axis.at(begin, 0));
      step = 1;
      count = max64(0, min64(axis.in, axis.at(end - 1, axis.taps - 1) + 1) - from);
    }
  }
  FASTRES_INLINE int64_t index(int64_t input) const { return (input - from) / step; }
};

// A chunk of a tensor in pairs: (panel, pair of images, row, pixel, width).
struct Panels {
  Pair* data;
  int64_t width, row, image, panel;
  Panels(Pair* data, int64_t width, int64_t cols, int64_t rows, int64_t images)
      : data(data), width(width), row(cols * width), image(rows * row), panel(images * image) {}
  FASTRES_INLINE Pair* at(int64_t p, int64_t n, int64_t r, int64_t q) const {
    return data + p * panel + n * image + r * row + q * width;
  }
};

// kGroup channels of two images (b null: one) in pairs, the first `count` of them from memory, the
// others 0.
struct Interleave {
  __m512i low, high;
  Interleave() {
    alignas(64) uint16_t l[kGroup], h[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      l[i] = static_cast<uint16_t>(i / 2 + i % 2 * kGroup);
      h[i] = static_cast<uint16_t>(l[i] + kGroup / 2);
    }
    low = _mm512_load_si512(l);
    high = _mm512_load_si512(h);
  }
  FASTRES_INLINE void operator()(__m512i (&out)[2], const BF16* a, const BF16* b,
                                 int64_t count) const {
    const __mmask32 m = count >= kGroup ? ~0u : (1u << max64(count, 0)) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(m, a);
    const __m512i y = b == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(m, b);
    out[0] = _mm512_permutex2var_epi16(x, low, y);
    out[1] = _mm512_permutex2var_epi16(x, high, y);
  }
};

FASTRES_INLINE const BF16* shifted(const BF16* p, int64_t by) { return p == nullptr ? p : p + by; }

// What a tile of sums runs over: pixels of pairs of images, `rows` x `cols` of each.
struct Pixels {
  const Pair *dy, *x;
  int64_t images, rows, cols;
  int64_t dy_image, dy_row, x_image, x_row, x_pixel;
};

// past_caches: whole lines of a dw that is larger than what stays in a cache until it is used.
struct Store {
  bool add_to, past_caches;
};

// dw (R rows, VECS vectors, the last one `tail` wide) (+)= sum over pixels of dy (R) x (VECS)
template <int R, int VECS>
FASTRES_BF16_DOT void tile(float* dw, int64_t dw_row, __mmask16 tail, const Pixels& p, Store how) {
  __m512 sum[R][VECS];
  const auto mask = [&](int j) { return j == VECS - 1 ? tail : static_cast<__mmask16>(0xffff); };
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < VECS; ++j) {
      sum[i][j] = how.add_to ? _mm512_maskz_loadu_ps(mask(j), dw + i * dw_row + j * kW)
                             : _mm512_setzero_ps();
    }
  }
  for (int64_t n = 0; n < p.images; ++n) {
    for (int64_t r = 0; r < p.rows; ++r) {
      const Pair* dy = p.dy + n * p.dy_image + r * p.dy_row;
      const Pair* x = p.x + n * p.x_image + r * p.x_row;
      for (int64_t q = 0; q < p.cols; ++q, dy += kRows, x += p.x_pixel) {
        __m512bh v[VECS];
        for (int j = 0; j < VECS; ++j) v[j] = (__m512bh)_mm512_loadu_si512(x + j * kW);
        for (int i = 0; i < R; ++i) {
          const __m512bh s = (__m512bh)_mm512_set1_epi32(static_cast<int>(dy[i]));
          for (int j = 0; j < VECS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], s, v[j]);
        }
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < VECS; ++j) {
      float* to = dw + i * dw_row + j * kW;
      if (how.past_caches) {
        _mm512_stream_ps(to, sum[i][j]);
      } else {
        _mm512_mask_storeu_ps(to, mask(j), sum[i][j]);
      }
    }
  }
}

using Tile = void (*)(float*, int64_t, __mmask16, const Pixels&, Store);
#define FASTRES_TILES(R) {tile<R, 1>, tile<R, 2>}
constexpr Tile kTiles[kRows][kVecs] = {FASTRES_TILES(1),  FASTRES_TILES(2),  FASTRES_TILES(3),
                                       FASTRES_TILES(4),  FASTRES_TILES(5),  FASTRES_TILES(6),
                                       FASTRES_TILES(7),  FASTRES_TILES(8),  FASTRES_TILES(9),
                                       FASTRES_TILES(10), FASTRES_TILES(11), FASTRES_TILES(12)};

// A row of x, the pixels that `columns` names, to `to`, its place in the first panel.
void pack_x(const Panels& panels, Pair* to, const BF16* a, const BF16* b, const Span& columns,
            int64_t c) {
  static_assert(kCols == kGroup, "a panel is a group");
  const Interleave interleave;
  for (int64_t q = 0; q < columns.count; ++q, to += kCols) {
    const int64_t at = (columns.from + q * columns.step) * c;
    Pair* out = to;
    for (int64_t i = 0; i < c; i += kGroup, out += panels.panel) {
      __m512i made[2];
      interleave(made, a + at + i, shifted(b, at + i), c - i);
      _mm512_storeu_si512(out, made[0]);
      _mm512_storeu_si512(out + kW, made[1]);
    }
  }
}

// A row of dy, of k channels. Three groups are eight panels: each panel is cut from two
// neighbouring vectors.
void pack_dy(const Panels& panels, Pair* to, const BF16* a, const BF16* b, int64_t cols,
             int64_t k) {
  static_assert(kRows == 12 && kGroup == 32 && kW == 16, "3 * 32 is 8 * 12");
  constexpr __mmask16 kPanel = (1 << kRows) - 1;
  const Interleave interleave;
  for (int64_t q = 0; q < cols; ++q, to += kRows, a += k, b = shifted(b, k)) {
    Pair* out = to;
    for (int64_t i = 0; i < k; i += 8 * kRows) {
      __m512i v[3][2];
      for (int j = 0; j < 3; ++j) {
        const int64_t from = i + j * kGroup;
        interleave(v[j], a + from, shifted(b, from), k - from);
      }
      const __m512i flat[6] = {v[0][0], v[0][1], v[1][0], v[1][1], v[2][0], v[2][1]};
      int64_t left = ceil_div(k - i, kRows);
      for (int half = 0; half < 2; ++half) {
        const __m512i* f = flat + 3 * half;
        const __m512i cut[4] = {f[0], _mm512_alignr_epi32(f[1], f[0], 12),
                                _mm512_alignr_epi32(f[2], f[1], 8),
                                _mm512_alignr_epi32(f[2], f[2], 4)};
        for (int j = 0; j < 4 && left > 0; ++j, --left, out += panels.panel) {
          if (q + 1 < cols)
            _mm512_storeu_si512(out, cut[j]);
          else
            _mm512_mask_storeu_epi32(out, kPanel, cut[j]);
        }
      }
    }
  }
}

// A convolution, and how its pixels are cut into chunks: `images` pairs of images whole, or one
// pair's rows, `rows` at a time.
struct Cut {
  ConvWgrad p;
  Axis down, along;
  int64_t pairs, images, rows;

  explicit Cut(const ConvWgrad& p)
      : p(p),
        down{p.h, p.taps[0], p.stride[0], p.padding[0], p.dilation[0]},
        along{p.w, p.taps[1], p.stride[1], p.padding[1], p.dilation[1]},
        pairs(ceil_div(p.n, 2)) {
    const int64_t pixels = p.oh * p.ow;
    const int64_t most = min64(max64(kChunk / (4 * (p.c + p.k)), kLeast), kMost);
    images = min64(max64(most / pixels, 1), pairs);
    rows = ceil_div(p.oh, pixels > most ? min64(p.oh, ceil_div(pixels, most)) : 1);
  }
  bool whole() const { return images >= pairs && rows >= p.oh; }  // one chunk
  int64_t size() const { return p.k * p.taps[0] * p.taps[1] * p.c; }
  // Into how many parts the pixels are cut whose sums are kept apart, so that each is one thread's
  // alone: by the shape, not by the threads. 1 where there are few pixels, or many weights.
  int64_t parts() const {
    const int64_t enough = min64(pairs * p.oh, pairs * p.oh * p.ow / kPart);
    const int64_t most = min64(min64(kParts, enough), kWorkspace / (4 * size()));
    if (whole() || most < 4) return 1;
    int64_t parts = 4;
    while (2 * parts <= most) parts *= 2;
    return parts;
  }
};

// dw (+)= what pairs [n, n + images) and output rows [begin, end) give; `each` runs loops, `slot`
// is of the scratch.
template <class E>
void add_chunk(const Cut& cut, float* dw, int64_t n, int64_t images, int64_t begin, int64_t end,
               Store how, int slot, const E& each) {
  const ConvWgrad& p = cut.p;
  const Axis &down = cut.down, &along = cut.along;
  const Span rows(down, begin, end), cols(along, 0, p.ow);
  const int64_t x_panels = ceil_div(p.c, kCols), dy_panels = ceil_div(p.k, kRows);
  Panels x(nullptr, kCols, cols.count, rows.count, images);
  Panels dy(nullptr, kRows, p.ow, end - begin, images);
  const int64_t room = x_panels * x.panel + dy_panels * dy.panel;
  x.data = static_cast<Pair*>(scratch(slot, static_cast<size_t>(room) * sizeof(Pair)));
  dy.data = x.data + x_panels * x.panel;
  // 1. pairs
  const int64_t lines = rows.count + (end - begin);
  each(images * lines, [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job) {
      const int64_t i = job / lines, line = job % lines, image = 2 * (n + i);
      const bool both = image + 1 < p.n;
      // rows of x and of dy in turn, so that every thread gets its share of both
      const int64_t taken = line * rows.count / lines;  // of x, before this line
      if ((line + 1) * rows.count / lines > taken) {
        const int64_t size = p.h * p.w * p.c;
        const BF16* a = static_cast<const BF16*>(p.x) + image * size +
                        (rows.from + taken * rows.step) * p.w * p.c;
        pack_x(x, x.at(0, i, taken, 0), a, both ? a + size : nullptr, cols, p.c);
      } else {
        const int64_t r = line - taken, size = p.oh * p.ow * p.k;
        const BF16* a = static_cast<const BF16*>(p.dy) + image * size + (begin + r) * p.ow * p.k;
        pack_dy(dy, dy.at(0, i, r, 0), a, both ? a + size : nullptr, p.ow, p.k);
      }
    }
  });
  // 2. sums: a panel of x meets all of dy under all taps before the next panel
  const int64_t taps = down.taps * along.taps;
  each(x_panels * dy_panels * taps, [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job) {
      const int64_t tap = job % taps, r = tap / along.taps, s = tap % along.taps;
      const int64_t i = job / taps % dy_panels, j = job / taps / dy_panels;
      const Range py(down, begin, end, r), px(along, 0, p.ow, s);
      const int64_t k = min64(kRows, p.k - i * kRows), c = min64(kCols, p.c - j * kCols);
      const int64_t vecs = ceil_div(c, kW);
      Pixels pixels = {dy.data,
                       x.data,
                       images,
                       py.end - py.begin,
                       px.end - px.begin,
                       dy.image,
                       dy.row,
                       x.image,
                       x.row * (down.stride / rows.step),
                       kCols * (along.stride / cols.step)};
      if (pixels.rows > 0 && pixels.cols > 0) {
        pixels.dy = dy.at(i, 0, py.begin - begin, px.begin);
        pixels.x = x.at(j, 0, rows.index(down.at(py.begin, r)), cols.index(along.at(px.begin, s)));
      }
      const auto tail = static_cast<__mmask16>((1u << (c - (vecs - 1) * kW)) - 1);
      kTiles[k - 1][vecs - 1](dw + (i * kRows * taps + tap) * p.c + j * kCols, taps * p.c, tail,
                              pixels, how);
    }
    if (how.past_caches) _mm_sfence();
  });
}

// dw = what rows [from, to) of all pairs, one after another, give
template <class E>
void add_rows(const Cut& cut, float* dw, int64_t from, int64_t to, bool past_caches, int slot,
              const E& each) {
  for (int64_t at = from; at < to;) {
    const int64_t oh = cut.p.oh, n = at / oh, begin = at % oh;
    const int64_t images = begin == 0 ? min64(cut.images, (to - at) / oh) : 0;
    const int64_t rows = images > 1 ? oh : min64(min64(cut.rows, oh - begin), to - at);
    add_chunk(cut, dw, n, max64(images, 1), begin, begin + rows, {at > from, past_caches}, slot,
              each);
    at += max64(images, 1) * rows;
  }
}

}  // namespace

bool conv_wgrad_runs() { return has_bf16_dot(); }

int64_t conv_wgrad_jobs(const ConvWgrad& p) {
  const int64_t parts = Cut(p).parts();
  const int64_t tiles = ceil_div(p.c, kCols) * ceil_div(p.k, kRows) * p.taps[0] * p.taps[1];
  return parts > 1 ? parts : tiles;
}

void conv_wgrad(const ConvWgrad& p) {
  const Cut cut(p);
  const int64_t all = cut.pairs * p.oh, parts = cut.parts(), size = cut.size();
  if (parts == 1) {
    const bool lines = p.c % kW == 0 && reinterpret_cast<uintptr_t>(p.dw) % 64 == 0;
    const bool past_caches = cut.whole() && lines && size * 4 >= kFar;
    add_rows(cut, p.dw, 0, all, past_caches, 0,
             [](int64_t n, const auto& f) { parallel(n, 1, f); });
    return;
  }
  // With many pixels the threads would meet twice a chunk: instead each takes parts, and they meet
  // when all are done
  float* sums = static_cast<float*>(scratch(0, static_cast<size_t>(parts * size) * sizeof(float)));
  parallel(parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      add_rows(cut, sums + i * size, all * i / parts, all * (i + 1) / parts, false, 1,
               [](int64_t n, const auto& f) { f(0, n); });
    }
  });
  parallel(ceil_div(size, kW), kGrain / kW, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kW; i < min64(last * kW, size); i += kW) {
      const auto lanes = static_cast<__mmask16>((1u << min64(kW, size - i)) - 1);
      __m512 sum = _mm512_maskz_loadu_ps(lanes, sums + i);
      for (int64_t part = 1; part < parts; ++part) {
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes, sums + part * size + i));
      }
      _mm512_mask_storeu_ps(p.dw + i, lanes, sum);
    }
  });
}

#else

bool conv_wgrad_runs() { return false; }
int64_t conv_wgrad_jobs(const ConvWgrad&) { return 0; }
void conv_wgrad(const ConvWgrad&) {}

#endif

}  // namespace FASTRES_ISA
}  // namespace fastres
