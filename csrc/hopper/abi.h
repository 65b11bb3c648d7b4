// What host and device code agree on: the kernels' names, arguments, launch shapes, shared memory and tensor maps.
// Plain C++17 without includes, so that g++, nvcc and NVRTC all read it. Sizes in bytes unless said otherwise.
#pragma once

namespace glm_hopper {

// Grows whenever a name, an argument or a rule below changes; the host refuses a cubin built from another number.
constexpr int abi_version = 9;

// CUtensorMap as the device sees it: 128 opaque bytes made by cuTensorMapEncodeTiled, passed by value as a
// `const __grid_constant__` argument. Host code passes its CUtensorMap; size and alignment are the same.
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

// ---------------------------------------------------------------------------------------------- tensor maps
// All: element type UINT8, interleave NONE, swizzle as wide as the box (128B or 64B), l2Promotion 128B (256B for weights is worth
// a try), oobFill NONE (zeros), elementStrides 1. dims and box are innermost first; strides are those of dims 1 … rank−1.
// But partial_rows: element type UINT16, swizzle NONE, so that a box of at most 256 elements holds 512 bytes of a row.
// K = hidden_size, N = intermediate_size, E = experts, P = pairs (tokens × top_k; rows of the activation buffer).
// `expert stride` is stride(0) of the weight tensor in bytes. Every stride must be a multiple of 16, every base of 16.
enum class Map : int {
    none = 0,
    w13_rows,         // dims {K, 2N, E}       strides {K, expert}          box {128, 96, 1}
    w13_quarters,     // dims {K, N, 2, E}     strides {K, N·K, expert} box {128, 48, 2, 1}
    w13_interleaved,  // dims {K, 8, 2, N/8, E} strides {K, N·K, 8·K, expert} box {128, 8, 2, 4, 1}
    act_rows,         // dims {N, P}           strides {N}                  box {128, 128}
    w2_rows,          // dims {N, K, E}        strides {N, expert}          box {128, 128, 1}
    act_steps_64,     // dims {64, P, N/64}    strides {N, 64}              box {64, 64, 3}
    w2_steps_256,     // dims {64, K, N/64, E} strides {N, 64, expert}      box {64, 256, 3, 1}
    partial_rows,     // dims {slice, slots · pairs of a band} strides {2 · slice} box {256, 32}
};

struct MapShape {
    Map map;
    int rank;
    int box[5];
    int element_bytes = 1;  // 2: UINT16, not swizzled
};

constexpr MapShape map_shapes[] = {
    {Map::w13_rows, 3, {128, 96, 1, 0, 0}},
    {Map::w13_quarters, 4, {128, 48, 2, 1, 0}},
    {Map::w13_interleaved, 5, {128, 8, 2, 4, 1}},
    {Map::act_rows, 2, {128, 128, 0, 0, 0}},
    {Map::w2_rows, 3, {128, 128, 1, 0, 0}},
    {Map::act_steps_64, 3, {64, 64, 3, 0, 0}},
    {Map::w2_steps_256, 4, {64, 256, 3, 1, 0}},
    {Map::partial_rows, 2, {256, 32, 0, 0, 0}, 2},
};

// ---------------------------------------------------------------------------------------------- arguments
// In this order, by value; pointers are device pointers, aligned to 16 bytes but for int and float arrays (4).
// `tiles` is one list of routing.py: [3, max_tiles] int32 (expert, first row, rows): GEMM1's first list (tiles), GEMM2's
// the second (tiles + 3 · max_tiles), built with BLOCK_M = the kernel's tile_rows. `counts` is routing.py's array.
//
// Family::gemm1 (all of glm_gemm1_row_*, glm_gemm1_columns_*; glm_gemm1_exact_c1 is columns with every K step summed in fp32):
//     TensorMap w13_rows (w13_quarters for quarter), const u8* tokens [M, K] FP8, const float* token_scales [M],
//     const float* w13_scales [E, 2N], void* act [P, N] (FP8 for row, bf16 for columns), float* act_scales [P] (row only;
//     columns ignores it, pass null), const int* rows [P], const int* tiles, const int* counts, int max_tiles,
//     int hidden_size, int intermediate_size, int top_k, int experts, int early
//     early: K steps of its first tile's weights that a block asks into L2 before the routing is known (split and quarter only).
//     guess: for that every expert has one tile, so that item n is expert n's; a wrong one costs bandwidth and nothing else.
//     split: glm_gemm1_*_split* count tiles in counts[3] and counts[4], zeros before and after (routing.py keeps them).
// Family::gemm2 (glm_gemm2_sum_*): GEMM2 and the top-k sum in one launch.
//     TensorMap act_rows, TensorMap w2_rows, const float* act_scales [P], const float* w2_scales [E, K],
//     const float* topk_weights [P], bf16* partial [slots, band · top_k, slice], const int* local_ids [P], bf16* out [M, K],
//     const int* rows [P], const int* tiles, const int* counts, int* counters, const int* band_tiles, int tokens,
//     int max_tiles, int hidden_size, int intermediate_size, int experts, int top_k, int slice, int slots, int band, int early
//     early: items of a block whose weights it asks into L2 before the launch before has ended, by the same guess.
//     band: tokens whose partials exist at once, ceil(M / band) bands; 0, or as many as there are or more: one band of all.
//     tiles: of several bands are listed band by band, and none has rows of two.
//     band_tiles: [bands] int32, the first tile of each band; not read where there is one.
//     counters: 3 + 2 · bands · ceil(K / slice) int32 zeros, and zeros again afterwards: counts + 3, where routing.py has 2049.
// Family::gemm2_ring (glm_gemm2_ring_*, glm_gemm2_turns_*): the same, the sums reading partials by boxes in shared memory.
//     TensorMap act_rows (act_steps_64 for turns), TensorMap w2_rows (w2_steps_256), TensorMap partial_rows,
//     const float* act_scales [P], const float* w2_scales [E, K], const float* topk_weights [P],
//     bf16* partial [slots, band · top_k, slice], const int* local_ids [P], bf16* out [M, K], const int* rows [P],
//     const int* tiles, const int* counts, int* counters, const int* band_tiles, int tokens, int max_tiles, int hidden_size,
//     int intermediate_size, int experts, int top_k, int slice, int slots, int band, int early
//     all: as of gemm2, but w2_scales of turns aligned to 16.
// Family::gemm1_decode (glm_gemm1_decode_*):
//     TensorMap w13_interleaved, const u8* tokens [M, K] FP8, const float* token_scales [M], const float* w13_scales,
//     bf16* act [P, N], const int* rows, const int* tiles, const int* counts, int max_tiles, int hidden_size,
//     int intermediate_size, int top_k
// Family::gemm2_decode (glm_gemm2_decode_*): quantises the rows of act as it reads them.
//     TensorMap w2_rows, const bf16* act [P, N], const float* w2_scales, const float* topk_weights, bf16* partial [P, K],
//     const int* rows, const int* tiles, const int* counts, int max_tiles, int hidden_size, int intermediate_size
// Family::sum (glm_topk_sum): out = Σ over a token's valid choices, choice 0 first, fp32.
//     const bf16* partial [P, K], const int* local_ids [P], bf16* out [M, K], int tokens, int hidden_size, int experts,
//     int top_k
// Family::prologue (glm_prologue_*): all that routing.py's kernels make, in one launch.
//     const bf16* hidden [M, K], u8* tokens [M, K] FP8, float* token_scales [M], const void* topk_ids [P],
//     const int* expert_map [global_experts], int* local_ids [P], int* rows [P], int* histogram, int* tiles [2, 3, max_tiles],
//     int* counts, int* band_tiles [bands], int tokens, int hidden_size, int experts, int global_experts, int top_k,
//     int max_tiles, int tile_rows_1, int tile_rows_2, int band, int wide_ids
//     topk_ids: int64 where wide_ids is not 0, else int32. expert_map: null where every expert is here.
//     histogram: [ceil(P / routing_chunk) + 1, prologue_bins(experts)], written where there are more pairs than one chunk.
//     band: 0, or no less than the tokens, or band · top_k is a multiple of routing_chunk.
enum class Family : int { gemm1 = 0, gemm2, gemm1_decode, gemm2_decode, sum, prologue, gemm2_ring };

// Sizes any kernel can serve; `supports()` on the host is this and compute capability 9.0.
//   hidden_size % 256 == 0; intermediate_size % 192 == 0; intermediate_size == 192 for glm_gemm1_row_*;
//   intermediate_size ≤ 1536 for glm_gemm2_decode_*; slice % tile_columns == 0, hidden_size % slice == 0, slots ≥ 1,
//   and slots ≥ 2 where hidden_size > slice or there are several bands; band % 32 == 0 then.
//   top_k == ring_choices and slice % ring_columns == 0 for Family::gemm2_ring, besides what is asked of every GEMM2 by slices.
//   experts ≤ prologue_experts for glm_prologue_*.
constexpr int prologue_experts = 511;
// A box of partial_rows holds whole tokens: so many choices each, of so many columns.
constexpr int ring_choices = 8;
constexpr int ring_columns = 256;
constexpr int routing_chunk = 1024;  // pairs; routing.py's CHUNK, and its SMALL_PAIRS

// ---------------------------------------------------------------------------------------------- launches
enum class Grid : int {
    persistent,  // multiprocessors, or as many clusters as run at once; fewer is right too, never 0
    per_vector,  // ceil(tokens · hidden_size / 8 / block)
    prologue,    // prologue_blocks(cluster, tokens)
};

struct Kernel {
    const char* name;    // extern "C" entry point
    const char* source;  // file under csrc/hopper that defines it
    Family family;
    Grid grid;
    int block;         // threads
    int cluster;       // CTAs along x; 1 launches without the attribute
    int tile_rows;     // BLOCK_M of the tile list it reads
    int tile_columns;  // output channels of one work item
    int stages;
    int stage_bytes;
    bool programmatic;  // may be launched with PROGRAMMATIC_STREAM_SERIALIZATION (it calls griddepcontrol)
    Map maps[3];
};

constexpr Kernel kernels[] = {
    {"glm_gemm1_row_c1", "gemm1_prefill.cu", Family::gemm1, Grid::persistent, 384, 1, 128, 192, 3, 65536, true, {Map::w13_rows, Map::none}},
    {"glm_gemm1_columns_c1", "gemm1_prefill.cu", Family::gemm1, Grid::persistent, 384, 1, 128, 192, 3, 65536, true, {Map::w13_rows, Map::none}},
    {"glm_gemm1_exact_c1", "gemm1_prefill.cu", Family::gemm1, Grid::persistent, 384, 1, 128, 96, 5, 40960, true, {Map::w13_rows, Map::none}},
    // 13 × 16 KB: four slots of token rows, and of either half of the weights three of 24 KB.
    {"glm_gemm1_row_split", "gemm1_split.cu", Family::gemm1, Grid::persistent, 384, 1, 128, 192, 13, 16384, true, {Map::w13_rows, Map::none}},
    {"glm_gemm1_columns_split", "gemm1_split.cu", Family::gemm1, Grid::persistent, 384, 1, 128, 192, 13, 16384, true, {Map::w13_rows, Map::none}},
    {"glm_gemm1_row_split_l2", "gemm1_split.cu", Family::gemm1, Grid::persistent, 384, 1, 128, 192, 13, 16384, true, {Map::w13_rows, Map::none}},
    {"glm_gemm1_columns_split_l2", "gemm1_split.cu", Family::gemm1, Grid::persistent, 384, 1, 128, 192, 13, 16384, true, {Map::w13_rows, Map::none}},
    // 11 × 20 KB: slots of 64 token rows, and of 48 gate and 48 up rows of the weights.
    {"glm_gemm1_row_quarter", "gemm1_quarter.cu", Family::gemm1, Grid::persistent, 384, 4, 128, 192, 11, 20480, true, {Map::w13_quarters, Map::none}},
    {"glm_gemm2_sum_n128", "gemm2_prefill.cu", Family::gemm2, Grid::persistent, 512, 1, 128, 128, 6, 32768, true, {Map::act_rows, Map::w2_rows}},
    {"glm_gemm2_sum_n256", "gemm2_prefill.cu", Family::gemm2, Grid::persistent, 512, 1, 128, 256, 4, 49152, true, {Map::act_rows, Map::w2_rows}},
    // 14 × 16 KB: three stages of 48 KB or four of 32, and five or six chunks of partials.
    {"glm_gemm2_ring_n128", "gemm2_prefill.cu", Family::gemm2_ring, Grid::persistent, 512, 1, 128, 128, 14, 16384, true, {Map::act_rows, Map::w2_rows, Map::partial_rows}},
    {"glm_gemm2_ring_n256", "gemm2_prefill.cu", Family::gemm2_ring, Grid::persistent, 512, 1, 128, 256, 14, 16384, true, {Map::act_rows, Map::w2_rows, Map::partial_rows}},
    // Two stages: 64 rows and 256 columns × 192 of K, two chunks, half of the staging area, and scales of two items.
    {"glm_gemm2_turns_lanes_n256", "gemm2_turns.cu", Family::gemm2_ring, Grid::persistent, 512, 1, 128, 256, 2, 113664, true, {Map::act_steps_64, Map::w2_steps_256, Map::partial_rows}},
    {"glm_gemm1_decode_t8", "gemm1_decode.cu", Family::gemm1_decode, Grid::persistent, 256, 1, 8, 32, 20, 9216, true, {Map::w13_interleaved, Map::none}},
    {"glm_gemm1_decode_t16", "gemm1_decode.cu", Family::gemm1_decode, Grid::persistent, 256, 1, 16, 32, 18, 10240, true, {Map::w13_interleaved, Map::none}},
    {"glm_gemm1_decode_t32", "gemm1_decode.cu", Family::gemm1_decode, Grid::persistent, 256, 1, 32, 64, 9, 20480, true, {Map::w13_interleaved, Map::none}},
    {"glm_gemm1_decode_t64", "gemm1_decode.cu", Family::gemm1_decode, Grid::persistent, 256, 1, 64, 64, 8, 24576, true, {Map::w13_interleaved, Map::none}},
    {"glm_gemm2_decode_t8", "gemm2_decode.cu", Family::gemm2_decode, Grid::persistent, 384, 1, 8, 128, 12, 16384, true, {Map::w2_rows, Map::none}},
    {"glm_gemm2_decode_t16", "gemm2_decode.cu", Family::gemm2_decode, Grid::persistent, 384, 1, 16, 128, 12, 16384, true, {Map::w2_rows, Map::none}},
    {"glm_gemm2_decode_t32", "gemm2_decode.cu", Family::gemm2_decode, Grid::persistent, 384, 1, 32, 128, 10, 16384, true, {Map::w2_rows, Map::none}},
    {"glm_gemm2_decode_t64", "gemm2_decode.cu", Family::gemm2_decode, Grid::persistent, 384, 1, 64, 128, 6, 16384, true, {Map::w2_rows, Map::none}},
    {"glm_topk_sum", "topk_sum.cu", Family::sum, Grid::per_vector, 256, 1, 0, 8, 0, 0, true, {Map::none, Map::none}},
    {"glm_prologue_c1", "prologue.cu", Family::prologue, Grid::prologue, 256, 1, 0, 0, 1, 20736, false, {Map::none, Map::none}},
    {"glm_prologue_c8", "prologue.cu", Family::prologue, Grid::prologue, 256, 8, 0, 0, 1, 20736, false, {Map::none, Map::none}},
};

// Barriers, scales and item numbers lie in this many bytes behind the stages; the first stage is aligned to 1024 by hand.
constexpr int shared_extra = 4096;
constexpr int ring_extra = 2048;        // the same of Family::gemm2_ring, alignment to 1024 included

#ifdef __CUDACC__
#define GLM_BOTH_SIDES __host__ __device__ constexpr
#else
#define GLM_BOTH_SIDES constexpr
#endif

// What a multiplying warpgroup of decode GEMM2 keeps: its tile's FP8 rows, a staging area for its output, scales and pairs.
GLM_BOTH_SIDES int gemm2_decode_room(int tile_rows, int intermediate_size) {
    return (tile_rows * ((intermediate_size + 127) / 128 * 128 + 272 + 8) + 1023) / 1024 * 1024;
}
// How many such warpgroups there are: two, which take turns, where there is room for both (232448 bytes a block).
GLM_BOTH_SIDES int gemm2_decode_consumers(int stages, int stage_bytes, int tile_rows, int intermediate_size) {
    const int both = stages * stage_bytes + shared_extra + 1024 + 2 * gemm2_decode_room(tile_rows, intermediate_size);
    return both <= 232448 ? 2 : 1;
}

// Bins of a prologue's histogram: one for each expert, and at least one for pairs that name none. workspace.py's bins_of.
GLM_BOTH_SIDES int prologue_bins(int experts) {
    int bins = 16;
    while (bins <= experts) bins *= 2;
    return bins;
}
// Blocks of a prologue: one cluster for the routing, and a block for every two tokens.
constexpr unsigned prologue_blocks(int cluster, int tokens) {
    const unsigned blocks = cluster + tokens / 2 + tokens % 2;
    return (blocks + cluster - 1) / cluster * cluster;
}

// Dynamic shared memory of a launch.
constexpr int shared_bytes(const Kernel& kernel, int intermediate_size) {
    if (kernel.family == Family::sum) return 0;
    if (kernel.family == Family::prologue) return kernel.stage_bytes;
    if (kernel.family == Family::gemm2_ring) return kernel.stages * kernel.stage_bytes + ring_extra;
    int bytes = kernel.stages * kernel.stage_bytes + shared_extra + 1024;
    if (kernel.family == Family::gemm2_decode)
        bytes += gemm2_decode_consumers(kernel.stages, kernel.stage_bytes, kernel.tile_rows, intermediate_size) *
                 gemm2_decode_room(kernel.tile_rows, intermediate_size);
    return bytes;
}

}  // namespace glm_hopper
