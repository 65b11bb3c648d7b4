// A grouped FP8 GEMM with per-token and per-channel scales, as vLLM's MoE has it, around the epilogue header of one source tree.
//
// Nothing of vLLM but that header is in it: -I TREE/csrc chooses which. Built twice by build.sh, for a tree as released and for
// the same after `vllm-glm-patch apply-source`; guard_epilogue.py runs both.
#include <cuda_runtime.h>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass_extensions/epilogue/broadcast_load_epilogue_array_c3x.hpp"

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;
namespace collective = cutlass::gemm::collective;

using Element = cutlass::float_e4m3_t;
using Out = cutlass::bfloat16_t;
using Rows = cutlass::layout::RowMajor;
using Columns = cutlass::layout::ColumnMajor;
using TileShape = Shape<_64, _128, _128>;
using ClusterShape = Shape<_1, _1, _1>;
using Groups = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;

using TokenScale = fusion::Sm90ColOrScalarBroadcastArray<0, TileShape, float, Stride<_1, _0, _0>>;
using ChannelScale = fusion::Sm90RowOrScalarBroadcastArray<0, TileShape, float, Stride<_0, _1, _0>>;
constexpr auto nearest = cutlass::FloatRoundStyle::round_to_nearest;
using ByChannel = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, float, float, nearest>, ChannelScale, fusion::Sm90AccFetch>;
using Scaled = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, Out, float, nearest>, TokenScale, ByChannel>;

using Epilogue = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
    void, Rows*, 8, Out, Rows*, 8, cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong, Scaled>::CollectiveOp;
using Mainloop = collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Rows*, 16, Element, Columns*, 16, float, TileShape, ClusterShape,
    collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongFP8FastAccum>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Groups, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

// Everything is in device memory: sizes [experts, 3] int32 (rows, columns, depth), pointers and strides one an expert.
struct Call {
    int experts;
    void *sizes, *a, *a_strides, *b, *b_strides, *a_scales, *b_scales, *out, *out_strides;
};

static Gemm::Arguments arguments_of(const Call& c) {
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = device;
    hardware.sm_count = multiprocessors;
    typename Kernel::EpilogueArguments epilogue{
        {{static_cast<const float* const*>(c.a_scales), true, {}},
         {{static_cast<const float* const*>(c.b_scales), true, {}}, {}, {}},
         {}},
        nullptr,
        static_cast<typename Kernel::InternalStrideC*>(c.out_strides),
        static_cast<Out**>(c.out),
        static_cast<typename Kernel::InternalStrideD*>(c.out_strides)};
    typename Kernel::MainloopArguments mainloop{
        static_cast<const Element**>(c.a), static_cast<typename Kernel::InternalStrideA*>(c.a_strides),
        static_cast<const Element**>(c.b), static_cast<typename Kernel::InternalStrideB*>(c.b_strides)};
    return {cutlass::gemm::GemmUniversalMode::kGrouped,
            {c.experts, static_cast<typename Groups::UnderlyingProblemShape*>(c.sizes), nullptr},
            mainloop,
            epilogue,
            hardware};
}

extern "C" long workspace_bytes(const Call* call) { return static_cast<long>(Gemm::get_workspace_size(arguments_of(*call))); }

// 0, or CUTLASS's status.
extern "C" int run(const Call* call, void* workspace, void* stream) {
    const auto arguments = arguments_of(*call);
    Gemm gemm;
    auto status = gemm.can_implement(arguments);
    if (status != cutlass::Status::kSuccess) return static_cast<int>(status);
    return static_cast<int>(gemm.run(arguments, workspace, static_cast<cudaStream_t>(stream)));
}
