// GEMM2 and the top-k sum for many tokens without partial results in memory: a block keeps the fp32 sums of BAND tokens × 64
// columns in shared memory, goes through all experts, and writes each element of the output once.
//
// An item is a band of tokens × 64 columns. Its tiles, up to 48 rows of one expert, are listed band by band and by expert
// (routing.py), and every tile's rows are added to the sums of their tokens. Blocks know nothing of each other: items go
// round by number, bands innermost, so that those under way share some ten slices of w2, which L2 holds, and all of act.
//
// The launch before makes act and its scales; all else, the lists too, is older. So a block that starts while that one ends
// zeroes its sums and asks for its first weights before it waits for it.
//
// Three warpgroups a block. Of the first, one warp copies: 64 columns of w2 and the tile's rows, 192 wide in K, a stage. The
// others prepare: for each row of a tile where its token's sums lie, and its scale; every warp a tile in three. The other
// two warpgroups take tiles by turns: one multiplies the next tile while the other adds the one before. Who adds a tile
// waits for the tile before to be added, so each sum is made in one order: by expert, and within one by pair.
//
// Sums lie 256 bytes a token, so an element's bank depends on its column alone. A thread holds 8 pairs of columns of two rows
// (mma.cuh); two pairs that belong to neighbouring groups of 8 lie together, 16 bytes, and threads of odd rows start with the
// other half of a line of 128 bytes: no two of the 8 lanes that go at once meet in a bank, whatever their tokens are.
#include "ablation.cuh"
#include "barrier.cuh"
#include "epilogue.cuh"
#include "mma.cuh"
#include "tma.cuh"

namespace glm_hopper {

constexpr int stationary_columns = 64;                    // of an item
constexpr int stationary_rows = 48;                       // of a tile; the instruction multiplies 64
constexpr int stationary_stage_k = 192;                   // K of a stage
constexpr int stationary_step_k = 64;                     // and of a row of it in shared memory, in bytes
constexpr int stationary_steps = stationary_stage_k / stationary_step_k;
constexpr u32 stationary_group_bytes = 8 * stationary_stage_k;  // 8 rows of a tile, one box of Map::act_steps
constexpr u32 stationary_rows_bytes = stationary_rows / 8 * stationary_group_bytes;
constexpr u32 stationary_w2_bytes = stationary_columns * stationary_stage_k;  // one box of Map::w2_steps
constexpr u32 stationary_stage_bytes = stationary_rows_bytes + stationary_w2_bytes;
constexpr u32 stationary_atom = 512;                      // the unit of the 64-byte swizzle
constexpr u32 sums_pitch = 4 * stationary_columns;        // bytes from token to token
constexpr int preparers = 3;                              // warps, each with a table of its own
constexpr int adders = 256;                               // threads of the two warpgroups that multiply and add
// A table: (place of the token's sums, rank, scale) of each row, w2's scales by place in the sums, rows and passes.
constexpr u32 table_scales = 8 * stationary_rows, table_size = table_scales + sums_pitch, table_bytes = table_size + 16;
constexpr int rank_shift = 24;  // of a row's rank in the word that has the place of its sums
// Instructions read 64 rows where a stage has 48: the others are the beginning of w2, and nobody looks at their results.
static_assert((mma_rows - stationary_rows) / 8 * stationary_group_bytes <= stationary_w2_bytes, "rows are read past the stage");

struct StationaryArguments {
    const float* act_scales;
    const float* w2_scales;
    const float* topk_weights;
    u16* out;
    const int* rows;
    const int* tiles;
    const int* counts;
    const int* band_tiles;  // first tile of each band; not read where there is but one
    int tokens, max_tiles, hidden_size, intermediate_size, top_k;
};

// Which items a block does: number `first`, first + stride, … below `items`, bands innermost, of columns from `column` on.
struct StationaryWork {
    int bands, items, first, stride;
    int column, columns;  // columns: from one item of a band to the next
};

struct StationaryItem {
    int band, column;  // column: first of the item, in hidden_size
    int first, last;   // its tiles, `last` excluded
};

// Past the last item: one without tiles.
GLM_DEVICE StationaryItem stationary_item(const StationaryArguments& p, const StationaryWork& work, int number) {
    StationaryItem item{number % work.bands, work.column + number / work.bands * work.columns, 0, 0};
    if (number < work.items) {
        if (work.bands > 1) item.first = p.band_tiles[item.band];
        item.last = item.band + 1 < work.bands ? p.band_tiles[item.band + 1] : p.counts[2];
    }
    return item;
}

// Where the i-th 16 bytes of a thread's columns of a row lie, from the first of them on.
GLM_HD u32 sum_place(u32 first, int i) { return (first ^ (i % 2 * 64)) + i / 2 * 128; }

struct StationaryTile {
    int expert, row, size;
};

// What a preparing lane knows of a tile: of the rows with its number and 32 more, and two of the columns.
struct PreparedTile {
    int size, first_token;  // size 0: none yet
    int pair[2];
    float act_scale[2], weight[2];
    Float2 column_scale;
};

// Each lane's tile of the 32 from `first` on.
GLM_DEVICE StationaryTile tile_of_lane(const StationaryArguments& p, int first, int last, int lane) {
    StationaryTile tile{};
    const int number = first + lane;
    if (number < last) {
        tile = {p.tiles[number], p.tiles[p.max_tiles + number], p.tiles[2 * p.max_tiles + number]};
    }
    return tile;
}

// Calls body(item, tile) for a block's tiles number `turn`, turn + turns, … in order, with all lanes of a warp. Lists are read 32
// tiles, or an item, ahead.
template <class Body>
GLM_DEVICE void walk_tiles(const StationaryArguments& p, const StationaryWork& work, int turns, int turn, Body body) {
    const int lane = thread_index() % 32;
    int number = work.first, until = turn;  // until: tiles left before one is this warp's
    StationaryItem item = stationary_item(p, work, number);
    StationaryTile next = tile_of_lane(p, item.first, item.last, lane);
    while (number < work.items) {
        number += work.stride;
        const StationaryItem following = stationary_item(p, work, number);
        if (item.first == item.last) next = tile_of_lane(p, following.first, following.last, lane);
        for (int first = item.first; first < item.last; first += 32) {
            const StationaryTile window = next;
            const bool more = first + 32 < item.last;
            next = tile_of_lane(p, more ? first + 32 : following.first, more ? item.last : following.last, lane);
            const int count = item.last - first < 32 ? item.last - first : 32;
            for (; until < count; until += turns) {
                const int expert = shuffle(window.expert, until), row = shuffle(window.row, until);
                body(item, StationaryTile{expert, row, shuffle(window.size, until)});
            }
            until -= count;
        }
        item = following;
    }
}

template <int BAND, int STAGES, int CLUSTER>
GLM_DEVICE void gemm2_stationary(const TensorMap& act, const TensorMap& w2, const StationaryArguments& p) {
    constexpr u32 barriers = 8 * (2 * STAGES + 2 * preparers + 4);
    static_assert(preparers * table_bytes + barriers + stationary_atom <= stationary_extra, "no room for tables and barriers");
    static_assert(BAND % 32 == 0 && BAND * sums_pitch < 1u << rank_shift, "a pass of the output takes 32 tokens");
    // In order of their place in shared memory.
    const u32 ring = align_up(shared_base(), stationary_atom);
    const u32 sums = ring + STAGES * stationary_stage_bytes, tables = sums + BAND * sums_pitch;
    const u32 full = tables + preparers * table_bytes, empty = full + 8 * STAGES;
    const u32 prepared = empty + 8 * STAGES, taken = prepared + 8 * preparers;  // of each table
    const u32 multiplied = taken + 8 * preparers, added = multiplied + 8 * 2;   // by each of the two warpgroups

    const int thread = thread_index(), lane = thread % 32;
    const int warpgroup = warp_uniform(thread / 128);
    if (thread == 0) {
        prefetch_map(act);
        prefetch_map(w2);
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + 8 * slot, 1);
            barrier_init(empty + 8 * slot, 4 * CLUSTER);
        }
        for (int slot = 0; slot < preparers; ++slot) {
            barrier_init(prepared + 8 * slot, 1);
            barrier_init(taken + 8 * slot, 4);
        }
        for (int slot = 0; slot < 2; ++slot) {
            barrier_init(multiplied + 8 * slot, 4);
            barrier_init(added + 8 * slot, 4);
        }
        barrier_init_done();
    }
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    if (CLUSTER > 1) {
        cluster_barrier();
    } else {
        block_barrier();
    }

    const int bands = divide_up(p.tokens, BAND), columns = CLUSTER * stationary_columns;
    const StationaryWork work{bands, bands * (p.hidden_size / columns), block_index() / CLUSTER, grid_size() / CLUSTER,
                              rank * stationary_columns, columns};
    const int chunks = p.intermediate_size / stationary_stage_k;  // stages of a tile
    const int warp = warp_uniform(thread / 32);

    if (warp == 0) {  // copies
        Ring<STAGES> position;
        bool waited = false;
        walk_tiles(p, work, 1, 0, [&](const StationaryItem& item, const StationaryTile& tile) {
            if (lane != 0) return;
            const int groups = with_rows ? divide_up(tile.size, 8) : 0;
            for (int chunk = 0; chunk < chunks; ++chunk) {
                const u32 stage = ring + position.slot * stationary_stage_bytes, ready = full + 8 * position.slot;
                barrier_wait(empty + 8 * position.slot, position.parity ^ 1);
                barrier_expect(ready, (with_weights ? stationary_w2_bytes : 0) + groups * stationary_group_bytes);
                if (with_weights) {
                    copy_box(stage + stationary_rows_bytes, w2, ready, 0, item.column, chunk * stationary_steps, tile.expert);
                }
                if (!waited) wait_for_previous_launch();
                waited = true;
                // Rows past the tile's end are another's, or zeros past the buffer's: nobody adds their results.
                for (int group = rank; group < groups; group += CLUSTER) {
                    const u32 target = stage + group * stationary_group_bytes;
                    const int row = tile.row + 8 * group, step = chunk * stationary_steps;
                    if (CLUSTER > 1) {
                        copy_box_to((1u << CLUSTER) - 1, target, act, ready, 0, row, step);
                    } else {
                        copy_box(target, act, ready, 0, row, step);
                    }
                }
                position.advance();
            }
        });
    } else if (warp <= preparers) {  // prepares; a warp has its tables one after the other in one place
        const u32 table = tables + (warp - 1) * table_bytes;
        const u32 full_table = prepared + 8 * (warp - 1), free_table = taken + 8 * (warp - 1);
        u32 parity = 0;
        bool waited = false;
        // Tiles are read in two steps, since weights hang on pairs: while one is written, the weights of the next and the pairs of
        // the one after it are on their way.
        PreparedTile first{}, second{};
        auto ask_weights = [&](PreparedTile& tile) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                tile.weight[part] = lane + 32 * part < tile.size ? p.topk_weights[tile.pair[part]] : 0.0f;
            }
        };
        auto write = [&](const PreparedTile& tile) {
            const int size = tile.size;
            int token[2];
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                token[part] = lane + 32 * part < size ? tile.pair[part] / p.top_k - tile.first_token : 0;
            }
            if (lane == 0) barrier_wait(free_table, parity ^ 1);
            warp_sync();
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int row = lane + 32 * part;
                if (row < size) {
                    const float scale = tile.act_scale[part] * tile.weight[part];
                    store_shared_8(table + 8 * row, {{token[part] * sums_pitch, float_to_bits(scale)}});
                }
            }
            // Lane 4 · group + quad has two columns; in the sums they lie by (group / 2, quad, group % 2).
            const int unit = lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
            store_shared_8(table + table_scales + 8 * unit, {{float_to_bits(tile.column_scale.x), float_to_bits(tile.column_scale.y)}});
            warp_sync();
            // Ids may name an expert twice for a token. Such rows lie together; a row's rank is how many are before it, and
            // ranks are added one after the other.
            u32 rank[2] = {0, 0}, most = 0;
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int row = lane + 32 * part;
                if (row < size) {
                    int before = row - 1;
                    const int place = token[part] * static_cast<int>(sums_pitch);
                    while (before >= 0 && load_shared_int(table + 8 * before) == place) --before;
                    rank[part] = row - 1 - before;
                }
                most = rank[part] > most ? rank[part] : most;
            }
#pragma unroll
            for (int mask = 16; mask > 0; mask /= 2) {
                const u32 other = shuffle_xor(most, mask);
                most = other > most ? other : most;
            }
            if (most > 0) {  // as all lanes know, and all have read
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    const int row = lane + 32 * part;
                    if (row < size) store_shared_int(table + 8 * row, token[part] * sums_pitch | rank[part] << rank_shift);
                }
            }
            if (lane == 0) store_shared_8(table + table_size, {{static_cast<u32>(size), most + 1}});
            warp_sync();
            if (lane == 0) barrier_arrive(full_table);
            parity ^= 1;
        };
        walk_tiles(p, work, preparers, warp - 1, [&](const StationaryItem& item, const StationaryTile& tile) {
            PreparedTile third{tile.size, item.band * BAND, {}, {}, {}, {}};
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int row = lane + 32 * part;
                third.pair[part] = row < tile.size ? p.rows[tile.row + row] : 0;
            }
            if (!waited) wait_for_previous_launch();
            waited = true;
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int row = lane + 32 * part;
                third.act_scale[part] = row < tile.size ? p.act_scales[tile.row + row] : 0.0f;
            }
            const i64 column = static_cast<i64>(tile.expert) * p.hidden_size + item.column + 2 * lane;
            third.column_scale = load_constant_2(p.w2_scales + column);
            ask_weights(second);
            if (first.size > 0) write(first);
            first = second;
            second = third;
        });
        ask_weights(second);
        if (first.size > 0) write(first);
        if (second.size > 0) write(second);
    } else {
        const int adder = thread - 128, own = warpgroup - 1, other = 1 - own;
        const int t = thread % 128, quad = lane % 4, odd = lane / 4 % 2;
        for (int token = adder / 16; token < BAND; token += adders / 16) {
            store_shared_floats(sums + token * sums_pitch + adder % 16 * 16, {});
        }
        named_barrier(1, adders);
        wait_for_previous_launch();  // before anything is written to memory

        Ring<STAGES> position;
        Ring<preparers> table_position;
        position.skip(own * chunks);
        table_position.skip(own);
        u32 turn = own ^ 1;  // parity that says of the other's tile before that it is done; before the first there is none
        int until = own;     // tiles left before one is this warpgroup's
        // A stage is free once it is in both blocks of a cluster, since either copies into both.
        auto release = [&](int slot) {
            if (CLUSTER > 1) {
                if (lane < CLUSTER) barrier_arrive_at(empty + 8 * slot, lane);
            } else if (lane == 0) {
                barrier_arrive(empty + 8 * slot);
            }
        };
        int number = work.first;
        StationaryItem item = stationary_item(p, work, number);
        while (number < work.items) {
            number += work.stride;
            const StationaryItem following = stationary_item(p, work, number);
            const int count = item.last - item.first;
            for (; until < count; until += 2) {
                // A tile of several stages may be a round of the ring ahead of the one before, which a parity cannot tell apart.
                if (chunks > 1) barrier_wait(multiplied + 8 * other, turn);
                float d[stationary_columns / 2];
                for (int chunk = 0; chunk < chunks; ++chunk) {
                    barrier_wait(full + 8 * position.slot, position.parity);
                    const u32 stage = ring + position.slot * stationary_stage_bytes;
                    const u64 a = descriptor_64(stage, stationary_group_bytes);
                    const u64 b = descriptor_64(stage + stationary_rows_bytes, stationary_atom);
                    mma_fence();
#pragma unroll
                    for (int step = 0; step < (with_products ? stationary_steps : 0); ++step) {
#pragma unroll
                        for (int k = 0; k < stationary_step_k / mma_k; ++k) {
                            const u64 a_step = step * (8 * stationary_step_k >> 4) + k * descriptor_step;
                            const u64 b_step = step * (stationary_columns * stationary_step_k >> 4) + k * descriptor_step;
                            mma<stationary_columns>(d, a + a_step, b + b_step, chunk > 0 || step > 0 || k > 0);
                        }
                    }
                    mma_commit();
                    // The stage before is done with; this one's products run on.
                    mma_wait<1>();
                    if (chunk > 0) release(position.previous());
                    position.advance();
                }
                if (chunks > 1 && lane == 0) barrier_arrive(multiplied + 8 * own);
                const u32 table = tables + table_position.slot * table_bytes;
                barrier_wait(prepared + 8 * table_position.slot, table_position.parity);
                const int size = load_shared_int(table + table_size), passes = load_shared_int(table + table_size + 4);
                const bool busy = t / 32 * 16 < size;  // whether this warp has rows at all
                Float4 column_scale[4];
                u32 sum[2] = {0, 0}, rank[2] = {0, 0};
                float row_scale[2] = {0.0f, 0.0f};
                bool real[2] = {false, false};
                if (busy) {
#pragma unroll
                    for (int group = 0; group < 4; ++group) {
                        column_scale[group] = load_shared_floats(table + table_scales + 64 * group + 16 * quad);
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int row = fragment_row(t, 2 * half);
                        real[half] = with_sums && row < size;
                        if (real[half]) {
                            const u32 word = load_shared_int(table + 8 * row);
                            row_scale[half] = load_shared_float(table + 8 * row + 4);
                            rank[half] = word >> rank_shift;
                            sum[half] = sums + (word & ((1u << rank_shift) - 1)) + 64 * odd + 16 * quad;
                        }
                    }
                }
                warp_sync();  // every lane has read
                if (lane == 0) barrier_arrive(taken + 8 * table_position.slot);
                mma_wait<0>();
                mma_settle(d);
                release(position.previous());
                // In the order in which they are added: of each half of the columns, the 16 of this thread's parity first.
                Float4 value[2][4];
                if (busy) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
#pragma unroll
                        for (int pair = 0; pair < 2; ++pair) {
                            Float4 made[2];
#pragma unroll
                            for (int which = 0; which < 2; ++which) {
                                const int group = 2 * pair + which, i = 8 * group + 2 * half;
                                const Float4 scale = column_scale[group];
                                made[which] = {d[i] * row_scale[half] * scale.x, d[i + 1] * row_scale[half] * scale.y,
                                               d[i + 4] * row_scale[half] * scale.z, d[i + 5] * row_scale[half] * scale.w};
                            }
                            value[half][2 * pair] = odd ? made[1] : made[0];
                            value[half][2 * pair + 1] = odd ? made[0] : made[1];
                        }
                    }
                }
                barrier_wait(added + 8 * other, turn);
                for (int pass = 0; pass < passes; ++pass) {
                    if (pass > 0) named_barrier(2 + own, 128);
                    Float4 old[2][4];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        if (real[half] && rank[half] == static_cast<u32>(pass)) {
#pragma unroll
                            for (int i = 0; i < 4; ++i) old[half][i] = load_shared_floats(sum_place(sum[half], i));
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        if (real[half] && rank[half] == static_cast<u32>(pass)) {
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                const Float4 v = value[half][i], o = old[half][i];
                                store_shared_floats(sum_place(sum[half], i), {o.x + v.x, o.y + v.y, o.z + v.z, o.w + v.w});
                            }
                        }
                    }
                }
                warp_sync();  // every lane has added
                if (lane == 0) barrier_arrive(added + 8 * own);
                turn ^= 1;
                position.skip(chunks);  // the other warpgroup's
                table_position.skip(2);
            }
            until -= count;

            // The sums go out as bf16 and become zeros: 8 lanes a token, 4 for the first and third 16 columns, 4 for the others.
            named_barrier(1, adders);
            const int first_token = item.band * BAND;
            const int there = p.tokens - first_token < BAND ? p.tokens - first_token : BAND;
            for (int first = 0; first < there; first += adders / 8) {
                const int token = first + adder / 8, upper = adder / 4 % 2;
                const u32 from = sums + token * sums_pitch + 64 * upper + 16 * quad;
                const Float4 low = load_shared_floats(from), high = load_shared_floats(from + 128);
                store_shared_floats(from, {});
                store_shared_floats(from + 128, {});
                const u32 packed[4] = {pack_bf16(low.x, low.y), pack_bf16(low.z, low.w), pack_bf16(high.x, high.y),
                                       pack_bf16(high.z, high.w)};
                const Vector4 columns = transpose_quad(packed, lane);
                if (token < there) {
                    const int column = item.column + quad / 2 * 32 + 16 * upper + quad % 2 * 8;
                    store_last_16(p.out + static_cast<i64>(first_token + token) * p.hidden_size + column, columns);
                }
            }
            named_barrier(1, adders);
            item = following;
        }
    }
    // A block may not end while its neighbour can still copy into it or arrive at its barriers.
    if (CLUSTER > 1) cluster_barrier();
}

}  // namespace glm_hopper

using namespace glm_hopper;

#define GLM_GEMM2_STATIONARY(entry, name, band, stages, cluster)                                                               \
    entry name(GLM_MAP act, GLM_MAP w2, const float* act_scales, const float* w2_scales, const float* topk_weights,  \
                         u16* out, const int* rows, const int* tiles, const int* counts, const int* band_tiles, int tokens,    \
                         int max_tiles, int hidden_size, int intermediate_size, int top_k) {                                   \
        gemm2_stationary<band, stages, cluster>(act, w2, {act_scales, w2_scales, topk_weights, out, rows, tiles, counts,       \
                                                          band_tiles, tokens, max_tiles, hidden_size, intermediate_size,       \
                                                          top_k});                                                             \
    }

GLM_GEMM2_STATIONARY(GLM_KERNEL(384), glm_gemm2_stationary_t640, 640, 3, 1)
GLM_GEMM2_STATIONARY(GLM_KERNEL(384), glm_gemm2_stationary_t512, 512, 4, 1)
GLM_GEMM2_STATIONARY(GLM_CLUSTER_KERNEL(384, 2), glm_gemm2_stationary_t640_c2, 640, 3, 2)
GLM_GEMM2_STATIONARY(GLM_CLUSTER_KERNEL(384, 2), glm_gemm2_stationary_t512_c2, 512, 4, 2)
