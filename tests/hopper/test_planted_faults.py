"""What the emulator is worth: each fault planted into a kernel must be found, by a wrong result, a deadlock or a message."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from emulated import run_check

_GEMM1, _DECODE1, _DECODE2 = "gemm1_prefill.cu", "gemm1_decode.cu", "gemm2_decode.cu"
_GEMM2 = "gemm2_phases.cuh"  # which the next two include
_STAGES, _TURNS = "gemm2_prefill.cu", "gemm2_turns.cu"
_SPLIT = "gemm1_split.cu"
_QUARTER = "gemm1_quarter.cu"
_PROLOGUE = "prologue.cu"

# How a lane reads its part of a chunk, and frees it.
_READ_CHUNK = """                    Vector4 loaded[ring_choices];
#pragma unroll
                    for (int i = 0; i < ring_choices; ++i) loaded[i] = load_shared_16(rows + i * partial_row_bytes);
                    warp_sync();  // every lane has read
                    if (lane == 0) barrier_arrive(chunk_empty + 8 * chunk.slot);"""
_ACQUIRED = "                    fence_proxy_async_global();\n"

# name, file, kernel, text, what it becomes
_FAULTS = [
    (
        "slot freed while wgmma reads it",
        _GEMM1,
        "glm_gemm1_row_c1",
        "if (step > 0) release(position.previous());",
        "release(position.slot);",
    ),
    ("accumulators read before they are done", _GEMM1, "glm_gemm1_row_c1", "mma_wait<0>();", ""),
    ("no proxy fence after cp.async", _GEMM1, "glm_gemm1_row_c1", "fence_proxy_async();", ""),
    ("producer does not wait for a free slot", _GEMM1, "glm_gemm1_row_c1", "barrier_wait(empty", "if (0) barrier_wait(empty"),
    (
        "consumer waits for the wrong phase",
        _GEMM1,
        "glm_gemm1_row_c1",
        "barrier_wait(full + 8 * position.slot, position.parity)",
        "barrier_wait(full + 8 * position.slot, position.parity ^ 1)",
    ),
    (
        "unswizzled gather",
        "gather.cuh",
        "glm_gemm1_row_c1",
        "swizzled_address(0, gather_row(thread, 0), ",
        "gather_row(thread, 0) * 128 + (",
    ),
    (
        "a row too many is stored",
        "gemm1_output.cuh",
        "glm_gemm1_row_c1",
        "if (row < size) store_8",
        "if (row < size + 1) store_8",
    ),
    (
        "more registers than the launch has",
        _GEMM1,
        "glm_gemm1_row_c1",
        "registers_up<consumer_registers>()",
        "registers_up<232>()",
    ),
    (
        "gate rows freed while wgmma reads them",
        _SPLIT,
        "glm_gemm1_row_split",
        "                mma_wait<1>();\n            }\n            release(room.gates_empty",
        "            }\n            release(room.gates_empty",
    ),
    (
        "token rows freed with the gate rows, before the up rows are multiplied",
        _SPLIT,
        "glm_gemm1_row_split",
        "            release(room.gates_empty, weights.slot);\n            at.advance();",
        "            release(room.gates_empty, weights.slot);\n            release(room.tokens_empty, at.slot);\n"
        "            at.advance();",
    ),
    (
        "up rows not waited for",
        _SPLIT,
        "glm_gemm1_row_split",
        "            barrier_wait(room.ups_full + 8 * weights.slot, weights.parity);\n            if",
        "            if",
    ),
    ("no proxy fence in the split form", _SPLIT, "glm_gemm1_row_split", "fence_proxy_async();", ""),
    (
        "a record overwritten while the output needs it",
        _SPLIT,
        "glm_gemm1_row_split",
        "barrier_wait(room.record_empty + 8 * position.slot, position.parity ^ 1);",
        "",
    ),
    (
        "a record read before it is written",
        _SPLIT,
        "glm_gemm1_row_split",
        "        warp_sync();\n        if (lane == 0) barrier_arrive(room.record_full",
        "        if (lane == 0) barrier_arrive(room.record_full",
    ),
    (
        "a tile drawn twice",
        _SPLIT,
        "glm_gemm1_row_split",
        "grid_size() + atomic_next(counters)",
        "block_index() + atomic_next(counters) + 1",
    ),
    ("the counters not zeroed", _SPLIT, "glm_gemm1_row_split", "counters[0] = counters[1] = 0;", "counters[0] = 0;"),
    (
        "the second half of a tile at the first one's rows",
        _SPLIT,
        "glm_gemm1_row_split",
        "p.tiles[p.max_tiles + tile] + half * mma_rows",
        "p.tiles[p.max_tiles + tile]",
    ),
    (
        "the second half of a tile as long as the first",
        _SPLIT,
        "glm_gemm1_row_split",
        "p.tiles[2 * p.max_tiles + tile] - half * mma_rows",
        "p.tiles[2 * p.max_tiles + tile]",
    ),
    ("a half left out", _SPLIT, "glm_gemm1_row_split", "whole + 2 * (items - whole)", "whole + (items - whole)"),
    ("the reordering loses a tile", _SPLIT, "glm_gemm1_row_split", "with_both + which - both_before", "which"),
    *(
        (name, _QUARTER, "glm_gemm1_row_quarter", text, other)
        for name, text, other in (
            ("largest values sent before the barriers are there", "cluster_barrier();  // the others'", "block_barrier();  //"),
            ("largest values read before they have come", "barrier_wait(received, ", "if (0) barrier_wait(received, "),
            ("two blocks' largest values waited for of three", "quarter_peers * 16 * 4)", "(quarter_peers - 1) * 16 * 4)"),
            ("one room and one barrier for all exchanges", "quarter_exchanges = 2;", "quarter_exchanges = 1;"),
            ("one room for the values of all exchanges", "turn * quarter_maxima_bytes", "0 * quarter_maxima_bytes"),
            ("three blocks' largest values in one place", "(peer - 1) * mma_rows * 4", "0 * mma_rows"),
            ("a block's own largest value for the row's", "if (peer > 0) largest[half] =", "if (0) largest[half] ="),
            ("no proxy fence by quarters", "fence_proxy_async();", ""),
            ("slots of a quarter freed while they are multiplied", "mma_wait<0>();", ""),
            (
                "weights of a quarter copied over those that are read",
                "barrier_wait(room.weights_empty",
                "if (0) barrier_wait(room.weights_empty",
            ),
            (
                "rows of a quarter gathered over those that are read",
                "barrier_wait(room.rows_empty",
                "if (0) barrier_wait(room.rows_empty",
            ),
            (
                "rows of a quarter multiplied before they come",
                "barrier_wait(room.rows_full",
                "if (0) barrier_wait(room.rows_full",
            ),
            (
                "a tile met before the other warpgroup has met the one before",
                "if (number > 0) barrier_wait",
                "if (0) barrier_wait",
            ),
            ("a tile of two halves passed over as of one", "? quarter_halves * steps : steps", "? steps : steps"),
            ("the first half's rows gathered for the second", "half * quarter_rounds + round;", "round;"),
            ("the second half at the first one's rows", "place.first_row + half * mma_rows", "place.first_row"),
            ("the second half as long as the first", "place.size - half * mma_rows", "place.size"),
            ("the scales of the first half's tokens for the second's", "i / 2 * mma_rows + fragment_row", "fragment_row"),
            ("the first block's columns of the weights", "rank * quarter_columns);\n        } else", "0);\n        } else"),
            (
                "the first block's scales of the weights",
                "+ rank * quarter_columns;\n        const float*",
                ";\n        const float*",
            ),
            ("the expert of the tile before", "next_expert = p.tiles[tile + stride];", "next_expert = p.tiles[tile];"),
            (
                "the rows of the tile before",
                "after = quarter_tile(p, tile + 2 * stride",
                "after = quarter_tile(p, tile + stride",
            ),
            ("a row too many of the last columns", "if (rest_row < size)", "if (rest_row < size + 1)"),
        )
    ),
    (
        "sum before its products",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "acquire_at_least(gemms_done + phase, tiles_of(band) * (p.slice / COLUMNS));",
        "",
    ),
    (
        "partials overwritten before they are summed",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "if (before > asked) {",
        "if (0) {",
    ),
    (
        "product told before it is stored",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "barrier_wait(item_stored",
        "if (0) barrier_wait(item_stored",
    ),
    ("sum told before it is read", _GEMM2, "glm_gemm2_sum_n128", "barrier_wait(sum_read", "if (0) barrier_wait(sum_read"),
    ("the last sums never told", _GEMM2, "glm_gemm2_sum_n128", "tell();  // of the one before", "//"),
    (
        "a band's partials in the slot of another phase",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "p.partial + (phase % p.slots)",
        "p.partial + (item.slice % p.slots)",
    ),
    (
        "a band's partials at the rows of the first",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "pair[half] - first_pair",
        "pair[half]",
    ),
    (
        "the sums of the slice waited for instead of the phase's",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "before = phase - p.slots;",
        "before = slice - p.slots;",
    ),
    (
        "the sums of a short last band waited for as of a whole one",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "last ? sum_blocks - (bands - 1) * band_sums : band_sums",
        "band_sums",
    ),
    (
        "a band's products counted as all of the slice's",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "tiles_until(band) - (band > 0 ? tiles_until(band - 1) : 0)",
        "tiles",
    ),
    (
        "the sums of a phase without products waited for, which wait for nothing",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "while (before >= 0 && tiles_of(before % bands) == 0) before -= p.slots;",
        "",
    ),
    ("the counters of one band zeroed", _GEMM2, "glm_gemm2_sum_n128", "i < 3 + 2 * phases;", "i < 3 + 2 * slices;"),
    (
        "an item read before it is written",
        _GEMM2,
        "glm_gemm2_sum_n128",
        "barrier_wait(item_full",
        "if (0) barrier_wait(item_full",
    ),
    *(
        (name, _GEMM2, "glm_gemm2_ring_n256", text, other)
        for name, text, other in (
            ("products acquired without a proxy fence", _ACQUIRED, ""),
            (
                "copies of products that are not finished",
                "                    acquire_at_least(gemms_done + phase, tiles_of(band) * (p.slice / COLUMNS));\n"
                "                    fence_proxy_async_global();",
                "                    fence_proxy_async_global();",
            ),
            (
                "a chunk waited for in the wrong phase",
                "barrier_wait(chunk_full + 8 * chunk.slot, chunk.parity)",
                "barrier_wait(chunk_full + 8 * chunk.slot, chunk.parity ^ 1)",
            ),
            ("a chunk copied over one that is read", "barrier_wait(chunk_empty", "if (0) barrier_wait(chunk_empty"),
            (
                "a chunk freed before every lane has read",
                "                    warp_sync();  // every lane has read\n                    if (lane == 0)",
                "                    if (lane == 0)",
            ),
            (
                "a chunk freed before it is read",
                _READ_CHUNK,
                _READ_CHUNK.splitlines()[-1] + "\n" + "\n".join(_READ_CHUNK.splitlines()[:-1]),
            ),
            (
                "half of a chunk's bytes expected",
                "chunk_full + 8 * chunk.slot, partials_bytes",
                "chunk_full + 8 * chunk.slot, partials_bytes / 2",
            ),
            (
                "the ids of the next token",
                "* chunk_tokens + warp;\n                const bool here",
                "* chunk_tokens + (warp + 1) % 4;\n                const bool here",
            ),
            ("the choices of a group's neighbour", "valid >> group * ring_choices", "valid >> (group ^ 1) * ring_choices"),
            ("a token past the last stored", "if (token < p.tokens) store_last_16(target", "store_last_16(target"),
            ("a chunk out of the first slot", "phase % p.slots * band_pairs", "0 * band_pairs"),
            ("a band's chunks at the rows of the first", "- band * band_pairs;", ";"),
            ("partials told before they are read", "barrier_wait(sum_read", "if (0) barrier_wait(sum_read"),
            ("partials never told", "release_add(sums_done + number", "if (0) release_add(sums_done + number"),
            ("an item's place filled before it is told", "barrier_wait(sum_empty", "if (0) barrier_wait(sum_empty"),
            (
                "an item never said to be read",
                "            if (lane == 0) barrier_arrive(sum_read + 8 * sum_position.slot);\n"
                "            sum_position.advance();\n        }\n    } else {",
                "            sum_position.advance();\n        }\n    } else {",
            ),
        )
    ),
    (
        "choices that are not there added",
        "sum.cuh",
        "glm_gemm2_ring_n256",
        "low_bf16(loaded[choice].word[word] & keep)",
        "low_bf16(loaded[choice].word[word])",
    ),
    ("partials of turns acquired without a proxy fence", _GEMM2, "glm_gemm2_turns_lanes_n256", _ACQUIRED, ""),
    *(
        (name, _TURNS, "glm_gemm2_turns_lanes_n256", text, other)
        for name, text, other in (
            ("partials told before every lane has stored", "warp_sync();  // every lane has stored", ""),
            ("the pair of another warp's row", "p.rows[first_row + sent_row]", "p.rows[first_row + lane]"),
            (
                "a row past the tile's end stored",
                "static_cast<int>(warp_row) + row < size",
                "static_cast<int>(warp_row) + row < size + 1",
            ),
            (
                "weights of two turns freed by the first",
                "if (!shared) barrier_arrive(at.w2_empty",
                "barrier_arrive(at.w2_empty",
            ),
            ("weights of one turn never freed", "if (!shared) barrier_arrive(at.w2_empty", "if (0) barrier_arrive(at.w2_empty"),
            ("weights copied over those that are read", "barrier_wait(at.w2_empty", "if (0) barrier_wait(at.w2_empty"),
            ("weights multiplied before they come", "barrier_wait(at.w2_full", "if (0) barrier_wait(at.w2_full"),
            ("rows copied over those that are read", "barrier_wait(at.rows_empty", "if (0) barrier_wait(at.rows_empty"),
            (
                "the stage freed that is multiplied",
                "if (stage > 0) release(turn_slot(row_stage - 1), turn_slot(w2_stage - 1));",
                "release(turn_slot(row_stage), turn_slot(w2_stage));",
            ),
            (
                "a turn that does not wait for the one before",
                "if (stages > 1) barrier_wait(at.multiplied",
                "if (0) barrier_wait(at.multiplied",
            ),
            ("the rows of the first turn for both", "0, first_row + row, stage", "0, first_row, stage"),
            ("two turns' weights counted as one's", "weights += shared ? 1 : turns * stages", "weights += turns * stages"),
            ("both turns of an item by both", "mine = own ^ first;", "mine = 0;"),
            (
                "an item never told by who had no turn",
                "            if (lane == 0) barrier_arrive(items.stored",
                "            if (lane == 0 && mine < turns) barrier_arrive(items.stored",
            ),
            (
                "the scales of the item before",
                "item_position.slot * scales_bytes",
                "(item_position.slot + 3) % gemm2_items * scales_bytes",
            ),
            (
                "an item full before its scales",
                "scales_offset + slot * scales_bytes, p.w2_scales",
                "scales_offset + (slot ^ 1) * scales_bytes, p.w2_scales",
            ),
            ("sums of turns read before they are done", "mma_wait<0>();", ""),
            ("another row's pair", "shuffle(sent_pair, row)", "shuffle(sent_pair, row ^ 1)"),
            ("matrices a row off", "staging + lane % 8 * staging_pitch", "staging + (lane + 1) % 8 * staging_pitch"),
        )
    ),
    (
        "scales read before they are written",
        _DECODE1,
        "glm_gemm1_decode_t16",
        "named_barrier(1, 128);  // the scales are written",
        "",
    ),
    (
        "a box of the wrong channels",
        _DECODE1,
        "glm_gemm1_decode_t32",
        "group + multiple * (channels_per_tile / 8)",
        "group + multiple * channels_per_tile",
    ),
    (
        "garbage after the width",
        _DECODE2,
        "glm_gemm2_decode_t16",
        "column < padded",
        "column < width",
    ),
    (
        "staging reused too early",
        _DECODE2,
        "glm_gemm2_decode_t16",
        "            named_barrier(barrier, 128);\n        }\n    }\n}",
        "        }\n    }\n}",
    ),
    (
        "both warpgroups at the same rows",
        _DECODE2,
        "glm_gemm2_decode_t16",
        "(consumer > 0 ? room : 0)",
        "0 * room",
    ),
    (
        "both warpgroups in one ring",
        _DECODE2,
        "glm_gemm2_decode_t16",
        "OwnRing position(consumer * own_stages, own_stages);",
        "OwnRing position(0, own_stages);",
    ),
    (
        "a lane's rank counts itself",
        _PROLOGUE,
        "glm_prologue_c1",
        "alike & ((1u << lane) - 1)",
        "alike & ((2u << lane) - 1)",
    ),
    ("an expert known by eight bits", _PROLOGUE, "glm_prologue_c1", "bit < bin_bits", "bit < bin_bits - 1"),
    (
        "a counter read after a lane has raised it",
        _PROLOGUE,
        "glm_prologue_c8",
        "    warp_sync();\n    if (earlier == 0)",
        "    if (earlier == 0)",
    ),
    (
        "totals read before the other blocks have written theirs",
        _PROLOGUE,
        "glm_prologue_c8",
        "if (CLUSTER > 1) cluster_barrier();  // all",
        "if (0) cluster_barrier();  // all",
    ),
    (
        "a block ends while another reads its totals",
        _PROLOGUE,
        "glm_prologue_c8",
        "if (CLUSTER > 1) cluster_wait();",
        "if (CLUSTER > 1 && has_bands()) cluster_wait();",
    ),
    (
        "pairs placed before rows are known",
        _PROLOGUE,
        "glm_prologue_c1",
        "block_barrier();                    // the counters",
        "// the counters",
    ),
    ("bands listed before the histogram is written", _PROLOGUE, "glm_prologue_c8", "            cluster_barrier();", ""),
    (
        "room for sums used again too early",
        _PROLOGUE,
        "glm_prologue_c1",
        "        value[k] = before + sum[k] - value[k];\n    }\n    block_barrier();",
        "        value[k] = before + sum[k] - value[k];\n    }",
    ),
    (
        "an id looked up in the map unchecked",
        _PROLOGUE,
        "glm_prologue_c1",
        "if (wanted[i] >= p.global_experts) wanted[i] = -1;",
        "",
    ),
    (
        "half of a 64-bit id",
        _PROLOGUE,
        "glm_prologue_c1",
        "static_cast<const i64*>(p.topk_ids)[pair]",
        "static_cast<int>(static_cast<const i64*>(p.topk_ids)[pair])",
    ),
    (
        "the map's word taken for it",
        _PROLOGUE,
        "glm_prologue_c8",
        "local >= 0 && local < p.experts ? local",
        "local >= 0 ? local",
    ),
    (
        "a token's largest value before all its warps have told theirs",
        _PROLOGUE,
        "glm_prologue_c1",
        "named_barrier(2, row_threads);",
        "",
    ),
    ("a reciprocal for the quotient", "fp8.cuh", "glm_prologue_c1", "return larger(exact,", "return larger(q,"),
    (
        "the rest of a wide row left out",
        _PROLOGUE,
        "glm_prologue_c1",
        "int i = row_vectors;",
        "int i = vectors;",
    ),
    ("ids lost between the passes", _PROLOGUE, "glm_prologue_c1", "if (share > 32 * batch)", "if (share > 64 * batch)"),
    ("a counter of GEMM2 left as it was", _PROLOGUE, "glm_prologue_c8", "zeros = 2049", "zeros = 2048"),
]


def _options(kernel: str, seed: int) -> dict[str, int]:
    """Of a run. GEMM2 by bands in every other: with a short one at the end, or also with some that have no valid pair. Split
    GEMM1 in every other with so many blocks that tiles are halved. By quarters tiles of two halves and of one in turn, or
    of one, in rings that go round within a tile or not."""
    if "prologue" in kernel:
        banded = {0: {"tokens": 16, "top_k": 512, "band": 2}, 1: {"tokens": 6, "top_k": 512, "experts": 300, "band": 2}}
        single = {2: {"tokens": 5, "top_k": 8, "hidden": 5632}, 3: {"tokens": 40, "top_k": 50, "elsewhere": 60}}
        return {"wide": seed // 2 % 2, "experts": 20, "resident": 2, **(banded | single)[seed % 4]}
    shared = {"tokens": 150, "hidden": 512, "slice": 128, "slots": 2, "experts": 2}
    banded = {2: {"band": 64, "grid": 2}, 3: {"band": 32, "grid": 4, "silent": 0b110}}
    if "_ring_" in kernel or "_turns_" in kernel:
        # Four slices, so that slots are used again, and a last item of one token. In every fourth, items of one chunk that wait
        # for no products, and more of them than a block may have under way.
        shared |= {"tokens": 97, "hidden": 1024, "slice": 256, "top_k": 8}
        banded[0] = {"tokens": 4, "hidden": 2560, "slots": 10, "grid": 1, "invalid": 100}
    if "_turns_" in kernel and seed % 3 == 0:  # turns of several stages
        shared |= {"width": 576}
    elif "_turns_" in kernel and seed % 4 == 1:  # many items of one turn
        shared |= {"experts": 40}
    if "_quarter" in kernel:
        of_one = {"experts": 9} if seed % 3 == 0 else {}
        return {**shared, "hidden": 1536 if seed % 4 == 1 else 512, "grid": 4 if seed % 2 else 8, **of_one}
    if "_split" in kernel:
        return {**shared, "grid": 9 if seed % 2 else 2}
    return {**shared, **banded.get(seed % 4, {"grid": 2})}


def _source_of(kernel: str, file: str) -> str:
    """The file that defines a kernel whose fault is in `file`, which may be one that several share."""
    if "_prologue_" in kernel:
        return _PROLOGUE
    if "_turns_" in kernel:
        return _TURNS
    if "_gemm2_sum_" in kernel or "_ring_" in kernel:
        return _STAGES
    return _GEMM1 if kernel.endswith("_c1") else file


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, changed_kernel: Callable[..., Path]) -> Iterator[dict[str, Future[bool]]]:
    """By the name of a fault that a test of this run asks for: whether one of 12 runs finds it. All cores work at them."""

    def find(file: str, kernel: str, text: str, other: str) -> bool:
        program = changed_kernel(file, text, other, _source_of(kernel, file))
        runs = (run_check(program, kernel, seed=seed, timing=2 - seed % 2, **_options(kernel, seed)) for seed in range(1, 13))
        return any(done.returncode for done in runs)

    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(find, *fault) for name, *fault in _FAULTS if name in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", [fault[0] for fault in _FAULTS])
def test_planted_fault_is_found(found: dict[str, Future[bool]], name: str) -> None:
    assert found[name].result(), f"{name}: not found by 12 runs"


@pytest.mark.parametrize("file", [_GEMM1, _SPLIT, _QUARTER, _STAGES, _TURNS, _DECODE1, _DECODE2, _PROLOGUE])
def test_unchanged_kernels_pass_the_same_runs(changed_kernel: Callable[..., Path], file: str) -> None:
    kernels = {kernel for _, of_fault, kernel, _, _ in _FAULTS if _source_of(kernel, of_fault) == file}
    assert kernels
    program = changed_kernel(file, "namespace glm_hopper", "namespace glm_hopper", file)
    for kernel in kernels:
        for seed, timing in ((1, 2), (2, 1)):
            done = run_check(program, kernel, seed=seed, timing=timing, **_options(kernel, seed))
            assert done.returncode == 0, done.stdout + done.stderr
