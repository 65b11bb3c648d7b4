// GEMM2 and the top-k sum for many tokens in one launch, phase by phase: a slice of columns of a band of tokens, whose partial
// results stay in L2. Bands go innermost, so that a slice of w2 stays there as well.
//
// Four warpgroups a block. Two multiply 64 rows each of a GEMM item (128 rows of an expert in a band × COLUMNS columns),
// scale, and scatter bf16 partials by pair; one adds up the choices of a sum item (32 tokens × a slice), choice 0
// first, beside them. What takes long round trips through memory is left to single threads of the first warpgroup:
//     the copier draws GEMM items from a counter and copies their K steps;
//     the herald tells other blocks that a GEMM item's partials are stored;
//     the foreman draws sum items, waits for their phase's products, and tells when the partials have been read.
//
// The sums read partials in either of two ways. glm_gemm2_sum_*: by loads into registers, 32 KB under way in a block.
// glm_gemm2_ring_*: by the copy engine, a chunk of 4 tokens × 8 choices × 256 columns at a time, into a ring of chunks in shared
// memory, so that 80 or 96 KB are under way whatever the threads do. The foreman's work is shared there by two threads:
//     the reader draws sum items, waits for their phase's products, hands the items out and copies their chunks;
//     the teller tells when an item's partials have been read.
//
// Phases are numbered slice · bands + band. Waits go one way: a sum waits for its phase's products, of which there may be none;
// a product waits, where its slot of partials (phase % slots) was used before, for the sums of phase − slots; where that one has
// no products, whose sums wait for nothing, for those of the last before it in this slot that has some. Items of either kind
// are drawn in the order of their phases by blocks that are running, a foreman tells what is finished before it
// waits, and either side moves on without the other. So whatever is smallest and unfinished waits for nothing, however few
// blocks are resident.
// In a ring, too: the reader waits for products, for the adding warps to free a chunk, and for the teller to free an item's
// place; adding warps wait for chunks and items in the order in which the reader asks for them; the teller waits for the adding
// warps only, and tells whatever the reader waits for. So an item that was handed out is read and told with nobody's help, and
// the reader, who asks for all of its chunks before the next item's products, keeps nobody waiting by waiting for those.
//
// Partials are written by ordinary stores and read by the copy engine, which is another proxy. A store is seen by the copy
// because it comes before it in causality order with a proxy fence on the way: store → item_stored (mbarrier, release and
// acquire in the block) → the herald's release → the reader's acquire (cumulative: all that the herald had seen) → the reader's
// fence.proxy.async.global → copy. That fence must stand behind the acquire, in the thread that asks for the copies. PTX spells
// out for aliases only that one fence anywhere on the way is enough, so the herald has another before its release. The storing
// threads have none: they would wait for their stores, which a release to the whole card has in L2 anyway, where copies read.
// Back again no fence is needed: a chunk that has arrived has been read, so what is stored after sums_done is told comes after
// the reading; nor in shared memory, where a chunk's place is copied into after its readers' arrivals, as a GEMM stage's is.
#pragma once

#include "ablation.cuh"
#include "barrier.cuh"
#include "epilogue.cuh"
#include "mma.cuh"
#include "sum.cuh"
#include "tma.cuh"

namespace glm_hopper {

constexpr int gemm2_rows = 128;
constexpr int gemm2_box_rows = 128;  // rows of one TMA box (Map::act_rows, Map::w2_rows)
constexpr int gemm2_k_step = 128;
constexpr int gemm2_mma_columns = 128;
constexpr int gemm2_items = 4;       // ring of GEMM items under way in a block
constexpr int sum_items_ahead = 2;   // ring of sum items
#ifndef GLM_SUM_TOKENS
#define GLM_SUM_TOKENS 32
#endif
constexpr int sum_tokens = GLM_SUM_TOKENS;  // tokens of one sum item, which a band is a multiple of: 32, or 16 to compare
static_assert(32 % sum_tokens == 0 && sum_tokens >= 2, "bands are multiples of 32 tokens, and a thread adds up two at once");
constexpr int sum_threads = 128;
// Of the ring: a chunk is one box of Map::partial_rows, and one token of it a warp's.
constexpr int chunk_tokens = sum_threads / 32;
constexpr u32 partial_row_bytes = 2 * ring_columns, partials_bytes = chunk_tokens * ring_choices * partial_row_bytes;
constexpr int ring_items_ahead = 4;  // ring of sum items there
static_assert(sum_tokens % (32 / ring_choices * chunk_tokens) == 0 && partial_row_bytes == 32 * 16, "a lane adds up 8 columns");
constexpr int no_more = -1;          // an item's number when there are no more

struct Gemm2Arguments {
    const float* act_scales;
    const float* w2_scales;
    const float* topk_weights;
    u16* partial;
    const int* local_ids;
    u16* out;
    const int* rows;
    const int* tiles;
    const int* counts;
    int* counters;
    const int* band_tiles;  // first tile of each band; not read where there is but one
    int tokens, max_tiles, hidden_size, intermediate_size, experts, top_k, slice, slots;
    int band;   // tokens; 0, or as many as there are or more: one band
    int early;  // items of a block whose weights to ask for before the launch before has ended
};

// The order of the GEMM items: slices outermost, then tiles (listed band by band), then the COLUMNS-wide parts of a slice.
struct Gemm2Item {
    int slice, tile, column;  // column: first of the item, in hidden_size
};

GLM_HD Gemm2Item gemm2_item(int number, int tiles, int slice_width, int columns) {
    const int parts = slice_width / columns, in_slice = tiles * parts;
    const int slice = number / in_slice, rest = number % in_slice;
    return {slice, rest / parts, slice * slice_width + rest % parts * columns};
}

// Where both multiplying warpgroups work at every item, 64 rows each, and operands come in by STAGES of 128 of K.
struct NoTurns {
    static constexpr bool there = false;
    static constexpr u32 bytes = 0;
};

// The ring of GEMM items, for who multiplies in another way: addresses of its barriers and of what is told of an item.
struct ItemSlots {
    u32 full, stored, number, row, size, phase;
};

// Before the launch before has ended and without its results: the weights of the first items, which are experts 0, 1 …'s if each
// has one tile. If not, these lines come for nothing. Which block will draw an item does not matter, as all share L2.
template <int COLUMNS, class Turns>
GLM_DEVICE void gemm2_ask_early(const TensorMap& w2, const Gemm2Arguments& p) {
    const i64 items = static_cast<i64>(p.experts) * divide_up(p.hidden_size, p.slice) * (p.slice / COLUMNS);
#pragma unroll 1
    for (int i = 0; i < p.early; ++i) {
        const i64 number = block_index() + static_cast<i64>(i) * grid_size();
        if (number >= items) return;
        const Gemm2Item item = gemm2_item(static_cast<int>(number), p.experts, p.slice, COLUMNS);
        if constexpr (Turns::there) {
            Turns::ask(w2, p.intermediate_size, item.column, item.tile);
        } else {
#pragma unroll 1
            for (int k = 0; k < p.intermediate_size; k += gemm2_k_step) {
#pragma unroll
                for (int box = 0; box < COLUMNS / gemm2_box_rows; ++box) {
                    ask_for_box(w2, k, item.column + box * gemm2_box_rows, item.tile);
                }
            }
        }
    }
}

// CHUNKS: places in the ring of partials; 0: none, they are loaded into registers, and partial_rows is not read.
// Turns: another way to copy operands and to multiply (gemm2_turns.cu), with Turns::bytes instead of stages.
template <int COLUMNS, int STAGES, int CHUNKS, class Turns = NoTurns>
GLM_DEVICE void gemm2_sum(const TensorMap& act, const TensorMap& w2, const TensorMap& partial_rows, const Gemm2Arguments& p) {
    constexpr bool in_ring = CHUNKS > 0;
    constexpr int items_ahead = in_ring ? ring_items_ahead : sum_items_ahead;
    constexpr u32 a_bytes = gemm2_rows * gemm2_k_step, b_bytes = COLUMNS * gemm2_k_step, stage_bytes = a_bytes + b_bytes;
    constexpr int consumer_threads = 256, parts = COLUMNS / gemm2_mma_columns;
    constexpr u64 part_step = gemm2_mma_columns * gemm2_k_step >> 4;
    // In order of their place behind the stages. An item's slot: full when its number is there, stored when every warp has
    // stored its partials (GEMM) or read them (sum), empty when it may be filled again.
    const u32 ring = align_up(shared_base(), atom_bytes);
    const u32 chunks = ring + (Turns::there ? Turns::bytes : STAGES * stage_bytes);
    const u32 full = chunks + CHUNKS * partials_bytes, empty = full + 8 * STAGES;
    const u32 item_full = empty + 8 * STAGES, item_stored = item_full + 8 * gemm2_items;
    const u32 item_empty = item_stored + 8 * gemm2_items;
    const u32 sum_full = item_empty + 8 * gemm2_items, sum_read = sum_full + 8 * items_ahead;
    const u32 sum_empty = sum_read + 8 * items_ahead;  // from here to item_number: of a ring only
    const u32 chunk_full = sum_empty + 8 * items_ahead, chunk_empty = chunk_full + 8 * CHUNKS;
    const u32 item_number = in_ring ? chunk_empty + 8 * CHUNKS : sum_empty, item_expert = item_number + 4 * gemm2_items;
    const u32 item_row = item_expert + 4 * gemm2_items, item_size = item_row + 4 * gemm2_items;
    const u32 item_phase = item_size + 4 * gemm2_items, sum_number = item_phase + 4 * gemm2_items;
    const u32 turn_barriers = sum_number + 4 * items_ahead;  // with Turns only

    const int thread = thread_index();
    const int warpgroup = warp_uniform(thread / 128);
    if (thread == 0) {
        prefetch_map(act);
        prefetch_map(w2);
        for (int slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + 8 * slot, 1);
            barrier_init(empty + 8 * slot, consumer_threads / 32);
        }
        for (int slot = 0; slot < gemm2_items; ++slot) {
            barrier_init(item_full + 8 * slot, 1);
            barrier_init(item_stored + 8 * slot, consumer_threads / 32);
            barrier_init(item_empty + 8 * slot, 1);
        }
        for (int slot = 0; slot < items_ahead; ++slot) {
            barrier_init(sum_full + 8 * slot, 1);
            barrier_init(sum_read + 8 * slot, sum_threads / 32);
        }
        if constexpr (in_ring) {
            prefetch_map(partial_rows);
            for (int slot = 0; slot < items_ahead; ++slot) barrier_init(sum_empty + 8 * slot, 1);
            for (int slot = 0; slot < CHUNKS; ++slot) {
                barrier_init(chunk_full + 8 * slot, 1);
                barrier_init(chunk_empty + 8 * slot, sum_threads / 32);
            }
        }
        if constexpr (Turns::there) Turns::init(turn_barriers);
        barrier_init_done();
    } else if (thread == 32) {
        gemm2_ask_early<COLUMNS, Turns>(w2, p);
    }
    block_barrier();
    wait_for_previous_launch();

    const int tiles = p.counts[2];
    const int slices = divide_up(p.hidden_size, p.slice);
    const int band_tokens = p.band > 0 && p.band < p.tokens ? p.band : p.tokens;
    const int bands = divide_up(p.tokens, band_tokens), phases = slices * bands;
    const int gemm_items = tiles * (p.slice / COLUMNS) * slices;
    const int sum_blocks = divide_up(p.tokens, sum_tokens), band_sums = divide_up(band_tokens, sum_tokens);
    int* next_item = p.counters;
    int* next_sum = p.counters + 1;
    int* gemms_done = p.counters + 2;      // [phases], counts GEMM items
    int* sums_done = gemms_done + phases;  // [phases], counts sum items
    int* blocks_done = sums_done + phases;  // counts blocks of the grid
    const int band_pairs = band_tokens * p.top_k;
    const i64 slot_elements = static_cast<i64>(band_pairs) * p.slice;
    auto tiles_until = [&](int band) { return band + 1 < bands ? p.band_tiles[band + 1] : tiles; };  // its end
    auto tiles_of = [&](int band) { return tiles_until(band) - (band > 0 ? tiles_until(band - 1) : 0); };
    const int steps = divide_up(p.intermediate_size, gemm2_k_step);
    Ring<STAGES> position;
    Ring<gemm2_items> item_position;
    const int sum_items = sum_blocks * slices;
    // Of a sum item, which end with its last token: groups of tokens, each of which is a chunk for every 256 columns.
    auto chunk_groups = [&](int first_token) {
        return divide_up(p.tokens - first_token < sum_tokens ? p.tokens - first_token : sum_tokens, chunk_tokens);
    };
    const int chunk_parts = with_sums ? p.slice / ring_columns : 0;

    if (warpgroup == 0) {
        registers_down<Turns::there ? 56 : 48>();
        if (thread == 0) {  // the copier
            Turns turns{};
            // Drawn and looked up ahead, since either takes a round trip: while one item is copied, the next one's tile is looked up
            // and the number of the one after it is on its way.
            struct Tile {
                int expert, first_row, size;
            };
            auto tile_of = [&](int number) {
                if (number >= gemm_items) return Tile{0, 0, 0};
                const int* tile = p.tiles + gemm2_item(number, tiles, p.slice, COLUMNS).tile;
                return Tile{tile[0], tile[p.max_tiles], tile[2 * p.max_tiles]};
            };
            int number = atomic_next(next_item), following = atomic_next(next_item);
            Tile tile = tile_of(number);
            int asked = -1;  // the last phase whose sums, or those before it in the same slot, are known to be finished
            int slice = 0, band = 0, band_end = tiles_until(0);  // of the item before
            while (true) {
                const bool more = number < gemm_items;
                barrier_wait(item_empty + 8 * item_position.slot, item_position.parity ^ 1);
                store_shared_int(item_number + 4 * item_position.slot, more ? number : no_more);
                Gemm2Item item{};
                if (more) {
                    item = gemm2_item(number, tiles, p.slice, COLUMNS);
                    store_shared_int(item_expert + 4 * item_position.slot, tile.expert);
                    store_shared_int(item_row + 4 * item_position.slot, tile.first_row);
                    store_shared_int(item_size + 4 * item_position.slot, tile.size);
                    if (item.slice != slice) slice = item.slice, band = 0, band_end = tiles_until(0);
                    while (item.tile >= band_end) band_end = tiles_until(++band);
                    const int phase = slice * bands + band;
                    store_shared_int(item_phase + 4 * item_position.slot, phase);
                    // Its slot of partials may still be read by the sums of an earlier phase: the last that had any products.
                    int before = phase - p.slots;
                    if (before > asked) {
                        asked = before;
                        while (before >= 0 && tiles_of(before % bands) == 0) before -= p.slots;
                        const bool last = before % bands == bands - 1;
                        if (before >= 0) {
                            acquire_at_least(sums_done + before, last ? sum_blocks - (bands - 1) * band_sums : band_sums);
                        }
                    }
                }
                if (!Turns::there || !more) barrier_arrive(item_full + 8 * item_position.slot);
                if constexpr (Turns::there) {
                    if (more) turns.ask_scales(ring, item_position.slot, item_full, p, tile.expert, item.column);
                }
                item_position.advance();
                if (!more) break;
                number = following;
                const Tile next_tile = tile_of(number);
                following = atomic_next(next_item);
                if constexpr (Turns::there) {
                    turns.copy(ring, turn_barriers, act, w2, p.intermediate_size, item, tile.expert, tile.first_row, tile.size);
                }
                for (int step = Turns::there ? steps : 0; step < steps; ++step) {
                    const u32 stage = ring + position.slot * stage_bytes, ready = full + 8 * position.slot;
                    barrier_wait(empty + 8 * position.slot, position.parity ^ 1);
                    barrier_expect(ready, (with_rows ? a_bytes : 0) + (with_weights ? b_bytes : 0));
                    // Rows past the tile's end are another expert's, or zeros past the buffer's: nobody stores their results.
                    if (with_rows) copy_box(stage, act, ready, step * gemm2_k_step, tile.first_row);
#pragma unroll
                    for (int box = 0; box < (with_weights ? COLUMNS / gemm2_box_rows : 0); ++box) {
                        copy_box(stage + a_bytes + box * gemm2_box_rows * gemm2_k_step, w2, ready, step * gemm2_k_step,
                                 item.column + box * gemm2_box_rows, tile.expert);
                    }
                    position.advance();
                }
                tile = next_tile;
            }
        } else if (thread == 32) {  // the herald
            while (true) {
                barrier_wait(item_full + 8 * item_position.slot, item_position.parity);
                const int number = load_shared_int(item_number + 4 * item_position.slot);
                if (number == no_more) break;
                const int phase = load_shared_int(item_phase + 4 * item_position.slot);
                barrier_wait(item_stored + 8 * item_position.slot, item_position.parity);
                if (in_ring) fence_proxy_async_global();
                release_add(gemms_done + phase);
                barrier_arrive(item_empty + 8 * item_position.slot);
                item_position.advance();
            }
        } else if (in_ring && thread == 64) {  // the reader
            Ring<items_ahead> sum_position;
            Ring<in_ring ? CHUNKS : 1> chunk;
            int number = atomic_next(next_sum);
            int multiplied = 0;  // phases known to be, as far as this block asked
            while (true) {
                const bool more = number < sum_items;
                const int first_token = number % sum_blocks * sum_tokens, band = number % sum_blocks / band_sums;
                const int phase = number / sum_blocks * bands + band;
                if (more && phase >= multiplied) {
                    acquire_at_least(gemms_done + phase, tiles_of(band) * (p.slice / COLUMNS));
                    fence_proxy_async_global();
                    multiplied = phase + 1;
                }
                barrier_wait(sum_empty + 8 * sum_position.slot, sum_position.parity ^ 1);
                store_shared_int(sum_number + 4 * sum_position.slot, more ? number : no_more);
                barrier_arrive(sum_full + 8 * sum_position.slot);
                sum_position.advance();
                if (!more) break;
                number = atomic_next(next_sum);
                // Rows past the last token are another slot's, or zeros past the buffer's: nobody adds them.
                int row = phase % p.slots * band_pairs + first_token * p.top_k - band * band_pairs;
                for (int group = chunk_groups(first_token); group > 0; --group, row += chunk_tokens * ring_choices) {
                    for (int part = 0; part < chunk_parts; ++part) {
                        barrier_wait(chunk_empty + 8 * chunk.slot, chunk.parity ^ 1);
                        barrier_expect(chunk_full + 8 * chunk.slot, partials_bytes);
                        copy_box(chunks + chunk.slot * partials_bytes, partial_rows, chunk_full + 8 * chunk.slot,
                                 part * ring_columns, row);
                        chunk.advance();
                    }
                }
            }
        } else if (in_ring && thread == 96) {  // the teller
            Ring<items_ahead> sum_position;
            while (true) {
                barrier_wait(sum_full + 8 * sum_position.slot, sum_position.parity);
                const int number = load_shared_int(sum_number + 4 * sum_position.slot);
                if (number == no_more) break;
                barrier_wait(sum_read + 8 * sum_position.slot, sum_position.parity);
                release_add(sums_done + number / sum_blocks * bands + number % sum_blocks / band_sums);
                barrier_arrive(sum_empty + 8 * sum_position.slot);
                sum_position.advance();
            }
        } else if (!in_ring && thread == 64) {  // the foreman
            Ring<sum_items_ahead> sum_position, read_position;
            int number = atomic_next(next_sum);
            int multiplied = 0;    // phases known to be, as far as this block asked
            int unread = no_more;  // phase of the item handed out before, if not yet told to be read
            auto tell = [&]() {
                if (unread == no_more) return;
                barrier_wait(sum_read + 8 * read_position.slot, read_position.parity);
                read_position.advance();
                release_add(sums_done + unread);
                unread = no_more;
            };
            while (number < sum_items) {
                const int band = number % sum_blocks / band_sums, phase = number / sum_blocks * bands + band;
                if (phase >= multiplied) {
                    tell();  // before waiting: somebody may wait for that
                    acquire_at_least(gemms_done + phase, tiles_of(band) * (p.slice / COLUMNS));
                    multiplied = phase + 1;
                }
                store_shared_int(sum_number + 4 * sum_position.slot, number);
                barrier_arrive(sum_full + 8 * sum_position.slot);
                sum_position.advance();
                tell();  // of the one before, so that the slot handed out next is free
                unread = phase;
                number = atomic_next(next_sum);
            }
            tell();
            store_shared_int(sum_number + 4 * sum_position.slot, no_more);
            barrier_arrive(sum_full + 8 * sum_position.slot);
        }
    } else if (Turns::there && warpgroup < 3) {
        registers_up<176>();
        if constexpr (Turns::there) {
            const ItemSlots items{item_full, item_stored, item_number, item_row, item_size, item_phase};
            Turns::multiply(ring, turn_barriers, items, p, bands, tiles, band_pairs, slot_elements);
        }
    } else if (warpgroup < 3) {
        registers_up<176>();
        const int t = thread % 128, lane = thread % 32;
        const int rows_before = (warpgroup - 1) * mma_rows;
        while (true) {
            barrier_wait(item_full + 8 * item_position.slot, item_position.parity);
            const int number = load_shared_int(item_number + 4 * item_position.slot);
            if (number == no_more) break;
            const Gemm2Item item = gemm2_item(number, tiles, p.slice, COLUMNS);
            // What is read from memory goes out before the multiplication, and what hangs on that before its end: a round trip
            // takes as long as the item's arithmetic.
            const int expert = load_shared_int(item_expert + 4 * item_position.slot);
            const int first_row = load_shared_int(item_row + 4 * item_position.slot) + rows_before;
            const int size = load_shared_int(item_size + 4 * item_position.slot) - rows_before;
            const float* scales = p.w2_scales + static_cast<i64>(expert) * p.hidden_size + item.column;
            if (lane < COLUMNS / 32) touch(scales + 32 * lane);
            int pair[2];
            float act_scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = fragment_row(t, 2 * half);
                pair[half] = row < size ? p.rows[first_row + row] : 0;
                act_scale[half] = row < size ? p.act_scales[first_row + row] : 0.0f;
            }
            // 128 columns an instruction: one of 256 does not fit the 128 registers a thread of 512 starts with.
            float d[parts][gemm2_mma_columns / 2];
            for (int step = 0; step < steps; ++step) {
                barrier_wait(full + 8 * position.slot, position.parity);
                const u32 stage = ring + position.slot * stage_bytes;
                const u64 a = descriptor(stage + rows_before * gemm2_k_step), b = descriptor(stage + a_bytes);
                mma_fence();
#pragma unroll
                for (int k = 0; k < (with_products ? gemm2_k_step / mma_k : 0); ++k) {
                    // The last step may be half a one (192 = 128 + 64); past the width both operands are zeros.
#pragma unroll
                    for (int part = 0; part < parts; ++part) {
                        mma<gemm2_mma_columns>(d[part], a + k * descriptor_step, b + part * part_step + k * descriptor_step,
                                               step > 0 || k > 0);
                    }
                }
                mma_commit();
                // The step before is done, so its stage is free; this one runs on.
                mma_wait<1>();
                if (step > 0 && lane == 0) barrier_arrive(empty + 8 * position.previous());
                position.advance();
            }
            float weight[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) weight[half] = p.topk_weights[pair[half]];
            mma_wait<0>();
#pragma unroll
            for (int part = 0; part < parts; ++part) mma_settle(d[part]);
            if (lane == 0) barrier_arrive(empty + 8 * position.previous());
            const float row_scale[2] = {act_scale[0] * weight[0], act_scale[1] * weight[1]};
            if (with_output && size > 0) {
                const int phase = load_shared_int(item_phase + 4 * item_position.slot);
                const int first_pair = (phase - item.slice * bands) * band_pairs;
                u16* slot = p.partial + (phase % p.slots) * slot_elements + (item.column - item.slice * p.slice);
                u16* target[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    target[half] = slot + static_cast<i64>(pair[half] - first_pair) * p.slice + 8 * (lane % 4);
                }
#pragma unroll
                for (int four = 0; four < COLUMNS / 32; ++four) {
                    u32 packed[2][4];
#pragma unroll
                    for (int group = 0; group < 4; ++group) {
                        const int i = 16 * four % (gemm2_mma_columns / 2) + 4 * group;
                        const float(&part)[gemm2_mma_columns / 2] = d[32 * four / gemm2_mma_columns];
                        const Float2 scale = load_constant_2(scales + fragment_column(t, 16 * four + 4 * group));
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            packed[half][group] = pack_bf16(part[i + 2 * half] * scale.x * row_scale[half],
                                                            part[i + 2 * half + 1] * scale.y * row_scale[half]);
                        }
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const Vector4 columns = transpose_quad(packed[half], lane);
                        if (fragment_row(t, 2 * half) < size) store_16(target[half] + 32 * four, columns);
                    }
                }
            }
            warp_sync();  // every lane has stored
            if (lane == 0) barrier_arrive(item_stored + 8 * item_position.slot);
            item_position.advance();
        }
    } else if (in_ring) {
        registers_down<Turns::there ? 104 : 112>();
        const int warp = thread % 128 / 32, lane = thread % 32;
        Ring<items_ahead> sum_position;
        Ring<in_ring ? CHUNKS : 1> chunk;
        while (true) {
            barrier_wait(sum_full + 8 * sum_position.slot, sum_position.parity);
            const int number = load_shared_int(sum_number + 4 * sum_position.slot);
            if (number == no_more) break;
            const int slice = number / sum_blocks, first_token = number % sum_blocks * sum_tokens;
            const int groups = chunk_groups(first_token);
            // Which choices are there, of this warp's token of every group: a lane looks at one choice of four groups at a time,
            // while the item's first chunks are still on their way.
            u64 valid = 0;
#pragma unroll
            for (int group = 0; group < sum_tokens / chunk_tokens; group += 32 / ring_choices) {
                const int token = first_token + (group + lane / ring_choices) * chunk_tokens + warp;
                const bool here = token < p.tokens && p.local_ids[token * ring_choices + lane % ring_choices] < p.experts;
                valid |= static_cast<u64>(ballot(here)) << group * ring_choices;
            }
            for (int group = 0; group < groups; ++group) {
                const int token = first_token + group * chunk_tokens + warp;
                const u32 wanted = static_cast<u32>(valid >> group * ring_choices);
                u16* target = p.out + static_cast<i64>(token) * p.hidden_size + slice * p.slice + 8 * lane;
                for (int part = 0; part < chunk_parts; ++part) {
                    const u32 rows = chunks + chunk.slot * partials_bytes + warp * ring_choices * partial_row_bytes + 16 * lane;
                    barrier_wait(chunk_full + 8 * chunk.slot, chunk.parity);
                    Vector4 loaded[ring_choices];
#pragma unroll
                    for (int i = 0; i < ring_choices; ++i) loaded[i] = load_shared_16(rows + i * partial_row_bytes);
                    warp_sync();  // every lane has read
                    if (lane == 0) barrier_arrive(chunk_empty + 8 * chunk.slot);
                    chunk.advance();
                    const Vector4 sum = sum_loaded(loaded, wanted);
                    if (token < p.tokens) store_last_16(target + part * ring_columns, sum);
                }
            }
            if (lane == 0) barrier_arrive(sum_read + 8 * sum_position.slot);
            sum_position.advance();
        }
    } else {
        registers_down<112>();
        const int t = thread % 128, lane = thread % 32;
        const int vectors = p.slice / 8;  // of 8 columns
        constexpr int at_once = 2;        // tokens of one thread under way together
        Ring<sum_items_ahead> sum_position;
        while (true) {
            barrier_wait(sum_full + 8 * sum_position.slot, sum_position.parity);
            const int number = load_shared_int(sum_number + 4 * sum_position.slot);
            if (number == no_more) break;
            const int slice = number / sum_blocks, first_token = number % sum_blocks * sum_tokens;
            const int band = number % sum_blocks / band_sums, first_pair = band * band_pairs;
            const u16* slot = p.partial + ((slice * bands + band) % p.slots) * slot_elements;
            for (int work = t; with_sums && work < sum_tokens / at_once * vectors; work += sum_threads) {
                const int vector = work % vectors;
                const u16* first[at_once];
                const int* ids[at_once];
                bool real[at_once];
                int token[at_once];
#pragma unroll
                for (int i = 0; i < at_once; ++i) {
                    token[i] = first_token + work / vectors + i * (sum_tokens / at_once);
                    real[i] = token[i] < p.tokens;
                    const i64 pair = static_cast<i64>(real[i] ? token[i] : first_token) * p.top_k;
                    first[i] = slot + (pair - first_pair) * p.slice + 8 * vector;
                    ids[i] = p.local_ids + pair;
                }
                Vector4 sums[at_once];
                sum_choices<at_once>(first, p.slice, ids, real, p.experts, p.top_k, sums);
#pragma unroll
                for (int i = 0; i < at_once; ++i) {
                    if (real[i]) {
                        const i64 row = static_cast<i64>(token[i]) * p.hidden_size;
                        store_last_16(p.out + row + slice * p.slice + 8 * vector, sums[i]);
                    }
                }
            }
            warp_sync();  // every lane has read
            if (lane == 0) barrier_arrive(sum_read + 8 * sum_position.slot);
            sum_position.advance();
        }
    }
    // The last block leaves the counters as it found them, for the next launch.
    block_barrier();
    if (thread == 0 && atomic_next_ordered(blocks_done) == grid_size() - 1) {
        for (int i = 0; i < 3 + 2 * phases; ++i) p.counters[i] = 0;
    }
}

}  // namespace glm_hopper
