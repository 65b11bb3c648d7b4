// GEMM1 of whole rows (width 192) where an expert has few of them: a tile shared out by columns to a cluster of four blocks, each
// of which multiplies its rows by 48 gate and the same 48 up columns. So 160 experts are 640 quarters for 132 multiprocessors,
// five rounds of 1/4, where whole tiles take two rounds.
//
// Tiles of up to 128 rows go round by number over the clusters. Three warpgroups a block. Of the first, one thread copies weights,
// 12 KB a K step of 128, and two warps gather the rows that exist, 64 to a slot: two rings, so that a tile of up to 64 rows, which
// most are here, takes one slot a step. Both run on into the next tile, and what belongs to it is looked up while this one comes.
// The other two warpgroups take tiles by turns: one multiplies while the other finishes the tile before. So neither the rings nor
// the blocks of a cluster wait for one another's ends of tiles.
//
// Before the routing is known, a block asks for the first K steps of its first tile's weights (`early`), as if every expert had one
// tile.
//
// A row's scale is its largest value's, of all 192 columns. Each block sends its rows' largest to the three others (st.async, which
// the receiver's mbarrier counts), a warp to the warp that has the same rows. A warp has two rooms for what it is sent, by turns:
// who sends for the exchange after the next has received what this warp sent for the next one, and that it has only done
// once it had read this one. All that is sent is waited for, so a block may end when it has no tile left.
#include "ablation.cuh"
#include "barrier.cuh"
#include "gather.cuh"
#include "gemm1_output.cuh"
#include "tma.cuh"

namespace glm_hopper {

constexpr int quarter_blocks = 4;    // of a cluster
constexpr int quarter_columns = 48;  // of a block: so many of gate, and the same of up
constexpr int quarter_row_columns = quarter_blocks * quarter_columns;
constexpr int quarter_halves = 2;    // of a tile, 64 rows each
constexpr int quarter_k_step = 128;
constexpr int quarter_slots = 11;    // of either ring
constexpr u32 quarter_rows_bytes = mma_rows * quarter_k_step;
constexpr u32 quarter_weights_bytes = 2 * quarter_columns * quarter_k_step;  // one box of Map::w13_quarters
constexpr int quarter_consumers = 2, quarter_consumer_warps = 4;             // the latter of each
constexpr int quarter_gather_threads = 64, first_quarter_gather_thread = 64;
constexpr int quarter_gather_rows = quarter_gather_threads / 8, quarter_rounds = mma_rows / quarter_gather_rows;  // of a slot
constexpr int quarter_exchanges = 2;                                          // of a warp that may be under way
constexpr int quarter_peers = quarter_blocks - 1;
constexpr u32 quarter_maxima_bytes = quarter_peers * mma_rows * 4;            // of one exchange of a warpgroup

struct QuarterRoom {
    u32 weights, rows;  // the rings
    u32 weights_full, weights_empty, rows_full, rows_empty;
    u32 multiplied;  // [consumers] the warpgroup has asked for all products of its tile
    u32 received;    // [consumers, exchanges, warps]
    u32 maxima;      // [consumers, exchanges, peers, 64 rows]; peer i is the block whose rank differs by the bits of i + 1

    GLM_DEVICE explicit QuarterRoom(u32 base)
        : weights(align_up(base, atom_bytes)), rows(weights + quarter_slots * quarter_weights_bytes),
          weights_full(rows + quarter_slots * quarter_rows_bytes), weights_empty(weights_full + 8 * quarter_slots),
          rows_full(weights_empty + 8 * quarter_slots), rows_empty(rows_full + 8 * quarter_slots),
          multiplied(rows_empty + 8 * quarter_slots), received(multiplied + 8 * quarter_consumers),
          maxima(received + 8 * quarter_consumers * quarter_exchanges * quarter_consumer_warps) {}
};
static_assert(8 * (4 * quarter_slots + quarter_consumers + quarter_consumers * quarter_exchanges * quarter_consumer_warps) +
                      quarter_consumers * quarter_exchanges * quarter_maxima_bytes <= shared_extra,
              "all that lies behind the rings");

using QuarterRing = Ring<quarter_slots>;

// A tile of the list; one past its end has no rows.
struct QuarterTile {
    int first_row, size;
};
GLM_DEVICE QuarterTile quarter_tile(const Gemm1Arguments& p, int tile, int tiles) {
    if (tile >= tiles) return {0, 0};
    return {p.tiles[p.max_tiles + tile], p.tiles[2 * p.max_tiles + tile]};
}

GLM_DEVICE void quarter_copy_weights(const TensorMap& w13, const Gemm1Arguments& p, const QuarterRoom& room, int first, int stride,
                                     int tiles, int column) {
    const int steps = p.hidden_size / quarter_k_step;
    QuarterRing position;
    int next_expert = first < tiles ? p.tiles[first] : 0;
    for (int tile = first; tile < tiles; tile += stride) {
        const int expert = next_expert;
        if (tile + stride < tiles) next_expert = p.tiles[tile + stride];
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const u32 ready = room.weights_full + 8 * position.slot;
            barrier_wait(room.weights_empty + 8 * position.slot, position.parity ^ 1);
            if (with_weights) {
                barrier_expect(ready, quarter_weights_bytes);
                copy_box(room.weights + position.slot * quarter_weights_bytes, w13, ready, step * quarter_k_step, column, 0, expert);
            } else {
                barrier_arrive(ready);
            }
            position.advance();
        }
    }
}

GLM_DEVICE void quarter_gather(const Gemm1Arguments& p, const QuarterRoom& room, int first, int stride, int tiles, int thread) {
    const int steps = p.hidden_size / quarter_k_step;
    const int row_in_round = thread / 8, chunk = gather_chunk(thread), chunks = p.hidden_size / chunk_bytes;
    const u32 target = swizzled_address(0, row_in_round, chunk * chunk_bytes);
    constexpr int rows_of_thread = quarter_halves * quarter_rounds;
    int pair[rows_of_thread];
    auto look_up = [&](const QuarterTile& of) {
#pragma unroll
        for (int i = 0; i < rows_of_thread; ++i) {
            const int row = row_in_round + i * quarter_gather_rows;
            pair[i] = row < of.size ? p.rows[of.first_row + row] : 0;
        }
    };
    QuarterTile next = quarter_tile(p, first, tiles), after = quarter_tile(p, first + stride, tiles);
    look_up(next);
    QuarterRing position;
    for (int tile = first; tile < tiles; tile += stride) {
        const int size = next.size, copied = with_gather ? size : 0;
        u32 source[rows_of_thread];  // in chunks
#pragma unroll
        for (int i = 0; i < rows_of_thread; ++i) source[i] = static_cast<u32>(pair[i] / p.top_k) * chunks + chunk;
        // They are on their way while this tile is copied.
        next = after;
        after = quarter_tile(p, tile + 2 * stride, tiles);
        look_up(next);
        const u8* from = p.tokens;
#pragma unroll 1
        for (int step = 0; step < steps; ++step, from += quarter_k_step) {
#pragma unroll
            for (int half = 0; half < quarter_halves; ++half) {
                if (size <= half * mma_rows) break;
                const u32 slot = room.rows + position.slot * quarter_rows_bytes + target;
                barrier_wait(room.rows_empty + 8 * position.slot, position.parity ^ 1);
#pragma unroll
                for (int round = 0; round < quarter_rounds; ++round) {
                    // Rows past the end are not fetched: they only reach accumulators that nobody stores.
                    const int i = half * quarter_rounds + round;
                    if (row_in_round + i * quarter_gather_rows < copied) {
                        copy_chunk(slot + round * quarter_gather_rows * quarter_k_step, from + static_cast<u64>(source[i]) * chunk_bytes);
                    }
                }
                copies_arrive(room.rows_full + 8 * position.slot);
                position.advance();
            }
        }
    }
}

// All products of a tile: sums[half] of its 64 rows, 48 gate columns before 48 up columns. A step's products are waited for before
// the next one's data: they take a third of the time that a step's data does, and so its slots are free a step earlier.
template <int HALVES>
GLM_DEVICE void quarter_multiply(float (&sums)[HALVES][quarter_columns], const QuarterRoom& room, QuarterRing& weights,
                                 QuarterRing& rows, u32 multiplied, int steps, int t) {
    const bool first_lane = t % 32 == 0;
    if (!with_products) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
#pragma unroll
            for (int i = 0; i < quarter_columns; ++i) sums[half][i] = 0.0f;
        }
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const u64 b = descriptor(room.weights + weights.slot * quarter_weights_bytes);
        u64 a[HALVES];
        u32 rows_empty[HALVES];
        barrier_wait(room.weights_full + 8 * weights.slot, weights.parity);
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            a[half] = descriptor(room.rows + rows.slot * quarter_rows_bytes);
            rows_empty[half] = room.rows_empty + 8 * rows.slot;
            barrier_wait(room.rows_full + 8 * rows.slot, rows.parity);
            rows.advance();
        }
        fence_proxy_async();
        if (with_products) {
            mma_fence();
#pragma unroll
            for (int k = 0; k < quarter_k_step / mma_k; ++k) {
#pragma unroll
                for (int half = 0; half < HALVES; ++half) {
                    mma<2 * quarter_columns>(sums[half], a[half] + k * descriptor_step, b + k * descriptor_step, step > 0 || k > 0);
                }
            }
            mma_commit();
            mma_wait<0>();
#pragma unroll
            for (int half = 0; half < HALVES; ++half) mma_settle(sums[half]);
        }
        warp_sync();  // all lanes have met this step, also where there are no products
        if (first_lane) {
            barrier_arrive(room.weights_empty + 8 * weights.slot);
#pragma unroll
            for (int half = 0; half < HALVES; ++half) barrier_arrive(rows_empty[half]);
        }
        weights.advance();
    }
    if (first_lane) barrier_arrive(multiplied);
}

// Where a warp meets the same warp of the other blocks: of exchange number `count`, for its warpgroup's row 0.
struct QuarterExchange {
    u32 received, maxima;  // of exchange 0
    int rank, count;
};

// Scales, SwiGLU, the row's largest value with the other blocks, FP8: 64 rows of which `size` exist, from grouped row `first_row` on.
// sums are used up. gate_scales, up_scales: of this block's columns.
GLM_DEVICE void quarter_output(const Gemm1Arguments& p, float (&sums)[quarter_columns], const float (&token_scale)[2],
                               const float* gate_scales, const float* up_scales, int first_row, int size, QuarterExchange& exchange,
                               int t) {
    constexpr int groups = quarter_columns / 8, up = quarter_columns / 2;
    const int lane = t % 32;
    float largest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int group = 0; group < groups; ++group) {
        const int column = fragment_column(t, 4 * group);
        if (group % 2 == 0) warp_sync();  // else the compiler loads more of them at once than it has registers for
        const Float2 gate_scale = load_constant_2(gate_scales + column), up_scale = load_constant_2(up_scales + column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int i = 4 * group + 2 * half + pair;
                const float y = swiglu(sums[i] * token_scale[half] * (pair ? gate_scale.y : gate_scale.x),
                                       sums[up + i] * token_scale[half] * (pair ? up_scale.y : up_scale.x));
                sums[i] = y;
                largest[half] = larger(largest[half], magnitude(y));
            }
        }
    }
    // Of a quad's lanes 1 to 3 each has a peer.
    const int turn = exchange.count % quarter_exchanges, peer = lane % 4;
    const u32 received = exchange.received + 8 * turn * quarter_consumer_warps;
    const u32 maxima = exchange.maxima + turn * quarter_maxima_bytes + (peer - 1) * mma_rows * 4;
    if (lane == 0) barrier_expect(received, quarter_peers * 16 * 4);  // of a warp's 16 rows
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        largest[half] = quad_max(largest[half]);
        if (peer > 0) send_shared_float(maxima + 4 * fragment_row(t, 2 * half), largest[half], received, exchange.rank ^ peer);
    }
    barrier_wait(received, exchange.count / quarter_exchanges % 2);
    ++exchange.count;
    float scale[2];
    u16 packed[2][groups];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (peer > 0) largest[half] = load_shared_float(maxima + 4 * fragment_row(t, 2 * half));
        scale[half] = quantisation_scale(quad_max(largest[half]));
        const float inverse = divide_exactly(1.0f, scale[half]);
#pragma unroll
        for (int group = 0; group < groups; ++group) {
            const int i = 4 * group + 2 * half;
            packed[half][group] = pack_fp8(quotient(sums[i], scale[half], inverse), quotient(sums[i + 1], scale[half], inverse));
        }
    }
    // Four groups of each row, and the two groups left of both.
    const int row[2] = {fragment_row(t, 0), fragment_row(t, 2)};
    u8* const out = static_cast<u8*>(p.act) + static_cast<i64>(first_row) * quarter_row_columns + exchange.rank * quarter_columns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u16 four[4] = {packed[half][0], packed[half][1], packed[half][2], packed[half][3]};
        const Vector2 columns = transpose_quad(four, lane);
        if (row[half] < size) store_8(out + row[half] * quarter_row_columns + 8 * peer, columns);
    }
    const u16 rest[4] = {packed[0][4], packed[0][5], packed[1][4], packed[1][5]};
    const Vector2 columns = transpose_quad(rest, lane);
    const int rest_row = row[0] + (peer / 2) * (row[1] - row[0]);
    if (rest_row < size) store_8(out + rest_row * quarter_row_columns + 32 + 8 * (peer % 2), columns);
    if (exchange.rank == 0 && peer == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row[half] < size) p.act_scales[first_row + row[half]] = scale[half];
        }
    }
}

GLM_DEVICE void quarter_skip(QuarterRing& ring, int count) {
    ring.slot += count % quarter_slots;
    ring.parity ^= count / quarter_slots & 1;
    if (ring.slot >= quarter_slots) {
        ring.slot -= quarter_slots;
        ring.parity ^= 1;
    }
}

// A warpgroup's tiles: every second one of its cluster's.
GLM_DEVICE void quarter_consume(const Gemm1Arguments& p, const QuarterRoom& room, int first, int stride, int tiles, int rank, int own,
                                int t) {
    const int steps = p.hidden_size / quarter_k_step, warp = t / 32;
    QuarterRing weights, rows;
    QuarterExchange exchange{
        room.received + 8 * (own * quarter_exchanges * quarter_consumer_warps + warp),
        room.maxima + own * quarter_exchanges * quarter_maxima_bytes, rank, 0};
    int number = 0;  // of a tile among the cluster's
    for (int tile = first; tile < tiles; tile += stride, ++number) {
        const QuarterTile place = quarter_tile(p, tile, tiles);
        if (number % quarter_consumers != own) {
            quarter_skip(weights, steps);
            quarter_skip(rows, place.size > mma_rows ? quarter_halves * steps : steps);
            continue;
        }
        // All of it while the other multiplies.
        not_before(t);
        const int lane = t % 32;
        const i64 channel = static_cast<i64>(p.tiles[tile]) * 2 * quarter_row_columns + rank * quarter_columns;
        const float* const gate_scales = p.w13_scales + channel;
        const float* const up_scales = gate_scales + quarter_row_columns;
        if (lane < 3) touch((lane < 2 ? gate_scales + 32 * lane : gate_scales + quarter_columns - 1));
        if (lane >= 16 && lane < 19) touch((lane < 18 ? up_scales + 32 * (lane - 16) : up_scales + quarter_columns - 1));
        float token_scale[quarter_halves][2];
#pragma unroll
        for (int i = 0; i < 2 * quarter_halves; ++i) {
            const int row = i / 2 * mma_rows + fragment_row(t, 2 * (i % 2));
            token_scale[i / 2][i % 2] = row < place.size ? p.token_scales[p.rows[place.first_row + row] / p.top_k] : 0.0f;
        }
        // The rings are met in order: their parities say nothing to who is a round ahead.
        if (number > 0) barrier_wait(room.multiplied + 8 * (own ^ 1), (number - 1) / 2 % 2);
        const u32 multiplied = room.multiplied + 8 * own;
        auto finish = [&](auto& sums) {
            not_before(t);
#pragma unroll
            for (int half = 0; half < static_cast<int>(sizeof(sums) / sizeof(sums[0])); ++half) {
                if (with_output) {
                    quarter_output(p, sums[half], token_scale[half], gate_scales, up_scales, place.first_row + half * mma_rows,
                                   place.size - half * mma_rows, exchange, t);
                }
            }
        };
        if (place.size > mma_rows) {
            float sums[quarter_halves][quarter_columns];
            quarter_multiply(sums, room, weights, rows, multiplied, steps, t);
            finish(sums);
        } else {
            float sums[1][quarter_columns];
            quarter_multiply(sums, room, weights, rows, multiplied, steps, t);
            finish(sums);
        }
    }
}

GLM_DEVICE void gemm1_quarter(const TensorMap& w13, const Gemm1Arguments& p) {
    constexpr int producer_registers = 88, consumer_registers = 208;
    static_assert(producer_registers + quarter_consumers * consumer_registers <= 504, "setmaxnreg would wait for ever");
    const QuarterRoom room(shared_base());
    const int thread = thread_index();
    const int warpgroup = warp_uniform(thread / 128);
    const int rank = cluster_rank();
    if (thread == 0) {
        prefetch_map(w13);
        for (int slot = 0; slot < quarter_slots; ++slot) {
            barrier_init(room.weights_full + 8 * slot, 1);
            barrier_init(room.weights_empty + 8 * slot, quarter_consumer_warps);
            barrier_init(room.rows_full + 8 * slot, quarter_gather_threads);
            barrier_init(room.rows_empty + 8 * slot, quarter_consumer_warps);
        }
        for (int own = 0; own < quarter_consumers; ++own) barrier_init(room.multiplied + 8 * own, quarter_consumer_warps);
        for (int i = 0; i < quarter_consumers * quarter_exchanges * quarter_consumer_warps; ++i) {
            barrier_init(room.received + 8 * i, 1);
        }
        barrier_init_done();
    } else if (thread == 32 && block_index() / quarter_blocks < p.experts) {
        // Nothing is lost but these lines where a tile before this one is of the same expert, or one has none.
#pragma unroll 1
        for (int step = 0; step < p.early && step < p.hidden_size / quarter_k_step; ++step) {
            ask_for_box(w13, step * quarter_k_step, rank * quarter_columns, 0, block_index() / quarter_blocks);
        }
    }
    cluster_barrier();  // the others' barriers are there, too
    wait_for_previous_launch();
    allow_next_launch();

    const int first = block_index() / quarter_blocks, stride = grid_size() / quarter_blocks;
    if (warpgroup == 0) {
        registers_down<producer_registers>();
        if (thread == 0) {
            quarter_copy_weights(w13, p, room, first, stride, p.counts[1], rank * quarter_columns);
        } else if (thread >= first_quarter_gather_thread) {
            quarter_gather(p, room, first, stride, p.counts[1], thread - first_quarter_gather_thread);
        }
    } else {
        registers_up<consumer_registers>();
        quarter_consume(p, room, first, stride, p.counts[1], rank, warpgroup - 1, thread % 128);
    }
}

}  // namespace glm_hopper

using namespace glm_hopper;

GLM_CLUSTER_KERNEL(384, 4)
glm_gemm1_row_quarter(GLM_MAP w13, const u8* tokens, const float* token_scales, const float* w13_scales, void* act,
                      float* act_scales, const int* rows, const int* tiles, const int* counts, int max_tiles, int hidden_size,
                      int intermediate_size, int top_k, int experts, int early) {
    gemm1_quarter(w13, {tokens, token_scales, w13_scales, act, act_scales, rows, tiles, counts, max_tiles, hidden_size,
                        intermediate_size, top_k, experts, early});
}
