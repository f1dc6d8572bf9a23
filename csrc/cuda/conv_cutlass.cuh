// run_gemm on CUTLASS's implicit-GEMM collectives for Hopper (sm_90a): TMA im2col loads into a ring
// of shared memory, wgmma from there, fp32 accumulators in registers.
//
// CUTLASS 4.2 drives its conv collectives by one kernel: one tile a block, one MMA warpgroup, no
// split of the depth, no strided dgrad ("persistent schedules not supported for conv yet"). This is
// the kernel it lacks: a producer warp and two MMA warpgroups on one tile (cooperative), persistent
// over a worker's tiles (conv.h), so that the next tile's loads run under the epilogue, with any
// share of the depth.
//
#pragma once

#include <cuda_runtime_api.h>
// clang-format off: cute/tensor.hpp and the driver hook come before the collectives
#include "cutlass/cuda_host_adapter.hpp"
#include "conv_driver.h"
#include "cute/tensor.hpp"
#include "cutlass/kernel_hardware_info.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
// clang-format on

#include <atomic>
#include <stdexcept>

#include "conv_gemm.cuh"

namespace fastres {
namespace cuda {

template <class T>
struct Element;
template <>
struct Element<BF16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct Element<F16> {
  using type = cutlass::half_t;
};

template <ConvPass PASS>
constexpr cutlass::conv::Operator kOperator =
    PASS == ConvPass::kFprop   ? cutlass::conv::Operator::kFprop
    : PASS == ConvPass::kDgrad ? cutlass::conv::Operator::kDgrad
                               : cutlass::conv::Operator::kWgrad;

template <ConvPass PASS>
using Problem = cutlass::conv::ConvProblemShape<kOperator<PASS>, 2>;

template <ConvPass PASS>
Problem<PASS> problem_of(const Gemm& g) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  Problem<PASS> p;
  p.mode = cutlass::conv::Mode::kCrossCorrelation;
  p.lower_padding = {g.pad_h, g.pad_w};
  p.upper_padding = {g.pad_h, g.pad_w};
  p.traversal_stride = {g.stride_h, g.stride_w};
  p.dilation = {g.dil_h, g.dil_w};
  const cute::array<int, 4> act{i(g.n), i(g.h), i(g.w), i(g.c)},
      flt{i(g.k), i(g.r), i(g.s), i(g.c)}, out{i(g.n), i(g.p), i(g.q), i(g.k)};
  // the output's extents are given, not derived: a phase of dgrad need not reach dy's last pixel
  p.set_shape_stride_ABC(act, p.packed_stride_right_major(act), flt,
                         {g.stride_k, g.stride_r, g.stride_s, 1}, out,
                         p.packed_stride_right_major(out));
  return p;
}

// The collective for a tile of M x N, multicast to clusters of C blocks along the rows.
template <ConvPass PASS, class T, int M, int N, int C, int STAGES>
struct Mainloop {
  using E = typename Element<T>::type;
  using K = cute::Shape<cute::Int<kTileK>>;
  using TileShape = cute::conditional_t<PASS == ConvPass::kWgrad,
                                        cute::Shape<cute::Int<M>, cute::Shape<cute::Int<N>>, K>,
                                        cute::Shape<cute::Int<M>, cute::Int<N>, K>>;
  using Cluster = cute::Shape<cute::Int<C>, cute::_1, cute::_1>;
  using OneWarpgroup = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kOperator<PASS>, E,
      cutlass::layout::TensorNHWC, 8, E, cutlass::layout::TensorNHWC, 8, float, TileShape, Cluster,
      cutlass::conv::collective::StageCount<STAGES>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  // the same with the rows divided between two warpgroups
  using TiledMma =
      decltype(cute::make_tiled_mma(typename OneWarpgroup::TiledMma::Atom{},
                                    cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  template <class Copy, class Layout>
  using Traits = cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<Copy, Layout>;
  using type = cutlass::conv::collective::CollectiveConv<
      typename OneWarpgroup::DispatchPolicy, TileShape, E, E, TiledMma,
      Traits<typename OneWarpgroup::GmemTiledCopyA, typename OneWarpgroup::SmemLayoutA>,
      Traits<typename OneWarpgroup::GmemTiledCopyB, typename OneWarpgroup::SmemLayoutB>>;
};

template <ConvPass PASS>
std::string gemm_why_not(const Gemm& gemm) {
  using Collective = typename Mainloop<PASS, BF16, 128, 128, 1, 2>::type;
  if (Collective::can_implement(problem_of<PASS>(gemm), typename Collective::Arguments{}))
    return "";
  return "padding, dilation or size is past what the copy engine's im2col takes";
}

constexpr int kConvThreads = kThreads + 128;  // two MMA warpgroups, then the one that loads
constexpr int kSharedMost = 227 << 10;
// Registers of a thread by setmaxnreg: 2 * 232 + 40 warpgroup-sized shares of 64K / 128 = 512.
constexpr int kMmaRegisters = 232, kLoadRegisters = 40;

template <template <class, int, int> class EpilogueOf, ConvPass PASS, class T, int M, int N>
struct ConvKernel {
  static constexpr int kCluster = PASS != ConvPass::kWgrad && N == 128 ? 2 : 1;
  static constexpr int kStage = M * ConvTile<M, N>::kPitch * 4, kSlot = (M + N) * kTileK * 2;
  // what fits beside the epilogue's stage and the barriers
  static constexpr int kStages = (kSharedMost - kStage - 1024) / kSlot;
  static_assert(kStages >= 3, "a ring of two cannot hide a load");
  using Collective = typename Mainloop<PASS, T, M, N, kCluster, kStages>::type;
  using Cluster = typename Mainloop<PASS, T, M, N, kCluster, kStages>::Cluster;
  using TiledMma = typename Collective::TiledMma;
  using Pipeline = typename Collective::MainloopPipeline;
  using Epilogue = EpilogueOf<T, M, N>;

  struct Params {
    typename Collective::Params collective;
    decltype(Collective::get_problem_shape_MNKL(Problem<PASS>{})) shape;
    typename Epilogue::Params epilogue;
    ConvSchedule schedule;
  };
  struct Shared {
    typename Collective::TensorStorage tensors;  // at 0: the swizzle wants 1024 bytes' alignment
    alignas(16) float stage[kStage / 4];
    alignas(16) typename Collective::PipelineStorage pipeline;
  };
  static_assert(sizeof(Shared) <= kSharedMost, "more shared memory than an SM gives a block");

  static FASTRES_DEVICE void run(const Params& p) {
    extern __shared__ __align__(1024) char bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(bytes);
    const int warpgroup = cutlass::canonical_warp_group_idx();
    const bool loads = warpgroup == kThreads / 128;
    const int warp = cutlass::canonical_warp_idx_sync();
    if (warp == kThreads / 32 && cute::elect_one_sync()) {
      Collective::prefetch_tma_descriptors(p.collective);
    }

    // 1. the ring, known to the whole cluster before anyone uses it
    typename Pipeline::Params pipeline_params;
    pipeline_params.role =
        loads ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    pipeline_params.is_leader = threadIdx.x % 128 == 0;
    pipeline_params.num_consumers = kThreads;
    pipeline_params.transaction_bytes = p.collective.tma_transaction_bytes;
    Pipeline pipeline(shared.pipeline, pipeline_params, Cluster{});
    if constexpr (kCluster > 1) {
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    } else {
      __syncthreads();
    }

    // 2. the worker's tiles
    const ConvWork work(p.schedule, blockIdx.x);
    const int depth = static_cast<int>(work.k_end - work.k_begin);
    Collective collective;
    if (loads) {
      cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
      if (warp == kThreads / 32) load(p, shared, pipeline, collective, work, depth);
    } else {
      cutlass::arch::warpgroup_reg_alloc<kMmaRegisters>();
      multiply(p, shared, pipeline, collective, work, depth);
    }
  }

 private:
  static FASTRES_DEVICE void load(const Params& p, Shared& shared, Pipeline& pipeline,
                                  Collective& collective, const ConvWork& work, int depth) {
    auto state = cutlass::make_producer_start_state<Pipeline>();
    const auto inputs = collective.load_init(cute::append<4>(p.shape, cute::_1{}), p.collective);
    const auto& a = cute::get<0>(inputs);
    const auto& b = cute::get<1>(inputs);
    for (int64_t i = 0; i < work.tiles; ++i) {
      const auto row =
          cute::idx2crd(static_cast<int>(work.first + i * work.step), cute::shape<2>(a));
      const auto column = cute::idx2crd(static_cast<int>(work.column), cute::shape<2>(b));
      const auto depths = cute::shape<3>(a);
      const auto begin = cute::idx2crd(static_cast<int>(work.k_begin), depths);
      collective.load(
          p.collective, pipeline, state, inputs, cute::make_coord(row, column, cute::_, cute::_0{}),
          cute::make_coord_iterator(begin, depths), depth, static_cast<int>(threadIdx.x & 31u),
          cute::block_rank_in_cluster(), shared.tensors);
      state.advance(depth);
    }
    collective.load_tail(pipeline, state);
  }

  static FASTRES_DEVICE void multiply(const Params& p, Shared& shared, Pipeline& pipeline,
                                      Collective& collective, const ConvWork& work, int depth) {
    typename Collective::PipelineState state;
    const int thread = static_cast<int>(threadIdx.x);
    TiledMma mma;
    const auto stage = cute::make_tensor(
        cute::make_smem_ptr(shared.stage),
        cute::make_layout(cute::make_shape(cute::Int<M>{}, cute::Int<N>{}),
                          cute::make_stride(cute::Int<ConvTile<M, N>::kPitch>{}, cute::_1{})));
    auto mine = mma.get_thread_slice(thread).partition_C(stage);
    const EpilogueBarrier barrier;
    Epilogue epilogue(p.epilogue, work);
    const float* cells = shared.stage;
    for (int64_t i = 0; i < work.tiles; ++i) {
      auto accum =
          cute::partition_fragment_C(mma, cute::make_shape(cute::Int<M>{}, cute::Int<N>{}));
      if (depth > 0) {
        collective.mma(pipeline, state, accum, depth, thread, shared.tensors, p.collective);
        collective.mma_tail(pipeline, state, depth);
        // Or ptxas may move the reads below above the wait, and waits for each wgmma on its own.
        cute::warpgroup_fence_operand(accum);
        state.advance(depth);
      } else {
        cute::clear(accum);  // a phase of dgrad that no tap reaches
      }
      cute::copy(cute::AutoVectorizingCopy{}, accum, mine);
      barrier();
      epilogue.tile(cells, (work.first + i * work.step) * M);
      barrier();
    }
    float* scratch = shared.stage;
    float *counts = scratch, *means = counts + kThreads, *squares = means + 3 * kThreads * 8;
    epilogue.finish(work, counts, means, squares);
  }
};

template <template <class, int, int> class EpilogueOf, ConvPass PASS, class T, int M, int N>
__global__ void __launch_bounds__(kConvThreads, 1)
    conv_kernel(const __grid_constant__ typename ConvKernel<EpilogueOf, PASS, T, M, N>::Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ConvKernel<EpilogueOf, PASS, T, M, N>::run(p);
#endif
}

template <template <class, int, int> class EpilogueOf, ConvPass PASS, class T, int M, int N>
void run_gemm(const Launch& launch, const Gemm& gemm, const ConvSchedule& schedule,
              const typename EpilogueOf<T, M, N>::Params& params) {
  using Kernel = ConvKernel<EpilogueOf, PASS, T, M, N>;
  static_assert(8448 * 4 <= sizeof(Kernel::Shared::stage), "finish() has no room");
  if (schedule.cluster != Kernel::kCluster || schedule.tile_m != M || schedule.tile_n != N) {
    throw std::logic_error(std::string("fastres cuda: ") + launch.name +
                           ": schedule of another tile");
  }
  // 1. the operands' descriptors
  const Problem<PASS> problem = problem_of<PASS>(gemm);
  using E = typename Element<T>::type;
  driver::begin();
  const typename Kernel::Params p{
      Kernel::Collective::to_underlying_arguments(
          problem, {static_cast<const E*>(gemm.a), static_cast<const E*>(gemm.b)}, nullptr),
      Kernel::Collective::get_problem_shape_MNKL(problem), params, schedule};
  driver::check(launch);

  // 2. the launch
  const void* kernel = reinterpret_cast<const void*>(conv_kernel<EpilogueOf, PASS, T, M, N>);
  static std::atomic<uint64_t> ready{0};  // devices on which the kernel has its shared memory
  void* args[] = {const_cast<void*>(static_cast<const void*>(&p))};
  launch_cluster(launch, schedule.blocks(), kConvThreads, Kernel::kCluster,
                 sizeof(typename Kernel::Shared), ready, kernel, args);
}

// What one of the .cu files defines: a pass's GEMM for both of its tiles.
#define FASTRES_CONV(Epilogue, PASS, T, M)                                                    \
  template void run_gemm<Epilogue, PASS, T, 128, 128>(                                        \
      const Launch&, const Gemm&, const ConvSchedule&, const Epilogue<T, 128, 128>::Params&); \
  template void run_gemm<Epilogue, PASS, T, M, 64>(                                           \
      const Launch&, const Gemm&, const ConvSchedule&, const Epilogue<T, M, 64>::Params&);

}  // namespace cuda
}  // namespace fastres
