#include <stdexcept>

#include "conv_finalise.cuh"
#include "conv_gemm.cuh"

namespace fastres {
namespace cuda {
namespace {

std::string shape_of(const ConvShape& v) {
  const auto t = [](int64_t a) { return std::to_string(a); };
  return "x " + t(v.n) + " x " + t(v.c) + " x " + t(v.h) + " x " + t(v.w) + ", weight " + t(v.k) +
         " x " + t(v.c) + " x " + t(v.r) + " x " + t(v.s) + ", stride " + t(v.stride_h) + " " +
         t(v.stride_w) + ", padding " + t(v.pad_h) + " " + t(v.pad_w) + ", dilation " + t(v.dil_h) +
         " " + t(v.dil_w);
}

// One of the activations, as the launch's errors name it.
Act act_of(const ConvShape& v, int64_t channels, int64_t pixels) {
  Act a{v.dtype, true, v.n, channels, pixels, v.n * pixels, channels, 0};
  a.mask_row = (channels + 7) / 8;
  return a;
}

Gemm gemm_of(const ConvShape& v, const void* a, const void* b) {
  return {a,         b,      v.n,        v.h,        v.w,     v.c,
          v.k,       v.r,    v.s,        v.p,        v.q,     v.r * v.s * v.c,
          v.s * v.c, v.c,    v.stride_h, v.stride_w, v.pad_h, v.pad_w,
          v.dil_h,   v.dil_w};
}

// A phase of dgrad, and whether any tap reaches it; without one the operands are never loaded.
struct PhaseGemm {
  Gemm gemm;
  Pixels pixels;
  ConvSchedule schedule;
};

PhaseGemm phase_of(const ConvShape& v, const Phase& i, const Phase& j, const void* dy,
                   const void* w, int tile) {
  PhaseGemm out{gemm_of(v, dy, w), {}, {}};
  Gemm& g = out.gemm;
  const int64_t taps = i.taps * j.taps;
  g.stride_h = g.stride_w = 1;
  if (taps > 0) {
    // two bytes an element, whatever the type
    g.b = static_cast<const char*>(w) + 2 * (i.tap0 * g.stride_r + j.tap0 * g.stride_s);
    g.h = i.size;
    g.w = j.size;
    g.r = i.taps;
    g.s = j.taps;
    g.stride_r *= i.tap_step;
    g.stride_s *= j.tap_step;
    g.pad_h = static_cast<int>(i.off);
    g.pad_w = static_cast<int>(j.off);
    g.dil_h = static_cast<int>(i.step);
    g.dil_w = static_cast<int>(j.step);
  } else {
    g.h = v.p;
    g.w = v.q;
    g.r = g.s = g.dil_h = g.dil_w = 1;
    g.pad_h = g.pad_w = 0;
  }
  Pixels& p = out.pixels;
  p.rows = v.n * i.size * j.size;
  p.dense = v.stride_h == 1 && v.stride_w == 1;
  p.grid_h = static_cast<uint32_t>(i.size);
  p.grid_w = static_cast<uint32_t>(j.size);
  p.h = v.h;
  p.w = v.w;
  p.stride_h = v.stride_h;
  p.stride_w = v.stride_w;
  p.first_h = static_cast<int>(i.first);
  p.first_w = static_cast<int>(j.first);
  out.schedule = conv_schedule(kDgrad, p.rows, v.c, taps, v.k, tile);
  return out;
}

template <class F>
void for_phases(const ConvShape& v, const void* dy, const void* w, int tile, const F& f) {
  for (const Phase& i : conv_phases(v.h, v.r, v.stride_h, v.pad_h, v.dil_h)) {
    for (const Phase& j : conv_phases(v.w, v.s, v.stride_w, v.pad_w, v.dil_w)) {
      f(phase_of(v, i, j, dy, w, tile));
    }
  }
}

Pixels dense(int64_t rows) {
  Pixels p{};
  p.rows = rows;
  p.dense = true;
  return p;
}

ConvSchedule fprop_schedule(const ConvShape& v, int tile) {
  return conv_schedule(kFprop, v.n * v.p * v.q, v.k, v.r * v.s, v.c, tile);
}

ConvSchedule wgrad_schedule(const ConvShape& v, int tile) {
  return conv_schedule(kWgrad, v.k, v.c, v.r * v.s, v.n * v.p * v.q, tile);
}

int64_t dgrad_chunks(const ConvShape& v, int tile) {
  int64_t chunks = 0;
  for_phases(v, nullptr, nullptr, tile, [&](const PhaseGemm& g) { chunks += g.schedule.workers; });
  return chunks;
}

void refuse(const char* op, const ConvShape& v, const std::string& why) {
  throw std::invalid_argument(std::string("fastres cuda: ") + op + " on " + shape_of(v) + ": " +
                              why);
}

void check(const char* op, const ConvShape& v, std::initializer_list<const void*> activations,
           std::initializer_list<const float*> vectors) {
  const std::string why = conv_why_not(v);
  if (!why.empty()) refuse(op, v, why);
  for (const void* p : activations) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
      refuse(op, v, "a tensor that is not aligned to 16 bytes");
  }
  for (const float* p : vectors) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) {
      refuse(op, v, "a per-channel vector that is not aligned to 16 bytes");
    }
  }
}

// Calls f(type, ConvTile) for the schedule's tile.
template <class F>
void with_tile(int dtype, const ConvSchedule& s, const F& f) {
  const auto typed = [&](auto type) {
    if (s.tile_n == 64) {
      f(type, ConvTile<256, 64>{});
    } else {
      f(type, ConvTile<128, 128>{});
    }
  };
  if (dtype == kBF16) {
    typed(BF16{});
  } else {
    typed(F16{});
  }
}

}  // namespace

std::string conv_why_not(const ConvShape& v) {
  if (v.dtype != kBF16 && v.dtype != kF16) return "the kernels take bfloat16 and float16";
  if (v.c % 8 != 0 || v.k % 8 != 0) {
    return "channels " + std::to_string(v.c) + " and " + std::to_string(v.k) +
           ": the copy engine takes multiples of 8";
  }
  const int64_t most = INT32_MAX;
  if (v.n < 1 || v.h < 1 || v.w < 1 || v.c < 1 || v.k < 1 || v.r < 1 || v.s < 1 || v.p < 1 ||
      v.q < 1) {
    return "empty";
  }
  if (v.h > most / v.w || v.n > most / (v.h * v.w) || v.p > most / v.q ||
      v.n > most / (v.p * v.q) || v.k > most / (v.r * v.s * v.c)) {
    return "more than 2^31 pixels or weights";
  }
  if (v.stride_h > 8 || v.stride_w > 8) return "the copy engine takes strides up to 8";
  const Gemm g = gemm_of(v, nullptr, nullptr);
  std::string why = gemm_why_not<kFprop>(g);
  if (why.empty()) why = gemm_why_not<kWgrad>(g);
  for_phases(v, nullptr, nullptr, 0, [&](const PhaseGemm& phase) {
    if (why.empty()) why = gemm_why_not<kDgrad>(phase.gemm);
  });
  return why;
}

int64_t conv_workspace_floats(ConvPass pass, const ConvShape& v, int tile) {
  if (pass == kFprop) return 2 * fprop_schedule(v, tile).workers * v.k;
  if (pass == kDgrad) return 3 * dgrad_chunks(v, tile) * v.c;
  return wgrad_schedule(v, tile).splits * v.k * v.r * v.s * v.c;
}

void conv_fprop(const ConvFprop& p, const Place& place) {
  const ConvShape& v = p.conv;
  check("conv_fprop", v, {p.y, p.x, p.w}, {p.work});
  const Act act = act_of(v, v.k, v.p * v.q);
  const OnDevice guard("conv_fprop", act, place);
  const Launch launch{"conv_fprop", act, place};
  const ConvSchedule s = fprop_schedule(v, p.tile);
  with_tile(v.dtype, s, [&](auto type, auto tile) {
    using T = decltype(type);
    using TileOf = decltype(tile);
    run_gemm<StatsEpilogue, kFprop, T, TileOf::kM, TileOf::kN>(
        launch, gemm_of(v, p.x, p.w), s,
        {p.y, p.work, dense(act.outer), worker_cut(s, v.k, s.workers)});
  });
  if (p.work == nullptr) return;
  run(launch, ceil_div(v.k, kFinaliseChannels), conv_stats_finalise_kernel, p.mean, p.var, p.rstd,
      p.work, static_cast<float>(p.eps), act.outer, v.k, s);
}

void conv_fprop_act(const ConvFpropAct& p, const Place& place) {
  const ConvShape& v = p.conv;
  check("conv_fprop_act", v, {p.z, p.x, p.w, p.residual}, {p.mean, p.rstd, p.gamma, p.beta});
  const Act act = act_of(v, v.k, v.p * v.q);
  const OnDevice guard("conv_fprop_act", act, place);
  const Launch launch{"conv_fprop_act", act, place};
  const ConvSchedule s = fprop_schedule(v, p.tile);
  with_tile(v.dtype, s, [&](auto type, auto tile) {
    using T = decltype(type);
    using TileOf = decltype(tile);
    run_gemm<ActEpilogue, kFprop, T, TileOf::kM, TileOf::kN>(
        launch, gemm_of(v, p.x, p.w), s,
        {p.z, p.residual, p.mean, p.rstd, p.gamma, p.beta, p.relu, dense(act.outer), v.k});
  });
}

void conv_dgrad(const ConvDgrad& p, const Place& place) {
  const ConvShape& v = p.conv;
  check("conv_dgrad", v, {p.dx, p.dy, p.w, p.dres, p.y, p.residual},
        {p.mean, p.rstd, p.gamma, p.beta, p.res_mean, p.work});
  const bool sums = p.dgamma != nullptr, dual = p.res_dgamma != nullptr;
  const Act act = act_of(v, v.c, v.h * v.w);
  const OnDevice guard("conv_dgrad", act, place);
  const Launch launch{"conv_dgrad", act, place};
  const int64_t chunks = dgrad_chunks(v, p.tile);
  int64_t base = 0;
  Cut cut{};
  for_phases(v, p.dy, p.w, p.tile, [&](const PhaseGemm& g) {
    const ConvSchedule& s = g.schedule;
    cut = worker_cut(s, v.c, chunks);
    with_tile(v.dtype, s, [&](auto type, auto tile) {
      using T = decltype(type);
      using TileOf = decltype(tile);
      run_gemm<GradientEpilogue, kDgrad, T, TileOf::kM, TileOf::kN>(
          launch, g.gemm, s,
          {p.dx, sums ? p.work : nullptr, p.dres, p.dres_mask, p.gate, p.mask,
           sums || p.gate == kGateRecompute ? p.y : nullptr, p.mean, p.rstd, p.gamma, p.beta,
           dual ? p.residual : nullptr, p.res_mean, g.pixels, act.mask_row, base, cut});
    });
    base += s.workers;
  });
  if (sums) finish_sums(launch, p.dgamma, p.dbeta, p.res_dgamma, p.work, p.rstd, p.res_rstd, cut);
}

void conv_wgrad(const ConvWgrad& p, const Place& place) {
  const ConvShape& v = p.conv;
  check("conv_wgrad", v, {p.dw, p.dy, p.x}, {p.work});
  const Act act = act_of(v, v.k, v.p * v.q);
  const OnDevice guard("conv_wgrad", act, place);
  const Launch launch{"conv_wgrad", act, place};
  const ConvSchedule s = wgrad_schedule(v, p.tile);
  const auto gemm = [&](auto type, auto tile) {
    using T = decltype(type);
    using TileOf = decltype(tile);
    run_gemm<PartialEpilogue, kWgrad, T, TileOf::kM, TileOf::kN>(launch, gemm_of(v, p.dy, p.x), s,
                                                                 {p.work, v.k, v.r * v.s, v.c});
    const int64_t total = v.k * v.r * v.s * v.c;
    run(launch, ceil_div(total, kThreads * 8), conv_wgrad_finalise_kernel<T>, p.dw, p.work,
        s.splits, total);
  };
  const auto typed = [&](auto type) {
    if (s.tile_n == 64) {
      gemm(type, ConvTile<128, 64>{});
    } else {
      gemm(type, ConvTile<128, 128>{});
    }
  };
  if (v.dtype == kBF16) {
    typed(BF16{});
  } else {
    typed(F16{});
  }
}

}  // namespace cuda
}  // namespace fastres
