"""Routing on the device: pairs grouped by expert by histogram, scan and scatter of indices. No sort, no host sync.

Output, all int32, written anew by every call:
    local_ids [pairs]   local expert of each pair, or `experts` where none (see triton/common.py: clean_expert)
    rows [pairs]        pairs ordered by (local expert, pair number); the `counts[0]` first are valid
    tiles [2, 3, max]   for GEMM1 and GEMM2: expert, first row and number of rows of each tile
    counts [4 + DONE]   valid pairs, GEMM1's tiles, GEMM2's tiles, then zeros: gemm2_fused.py's ticket and step counters

Pair p is token p // top_k and choice p % top_k. The order depends on the ids alone, so results repeat bit for bit.
Token quantisation rides in the first launch: it has no dependency on routing, and a launch costs 2 – 3 µs.
"""

# Kernels have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from .triton.common import begin, clean_expert
from .triton.quantise import quantise_row

# Pairs counted by one program, and pairs placed by one program. 1024 keeps the scan at 64 rows for 8192 tokens × 8.
CHUNK = 1024
PLACE = 16
# Pairs looked at together for those, in rounds to memory that do not wait for one another. A loop of 64 rounds, each of 16
# pairs for 128 to place, is what made 43 µs of the prologue at 1024 tokens (H100).
STRIP = 256
# Zeros kept behind the counts.
DONE = 256
# Up to this many pairs all the routing is in the first launch: a program looks at every pair to place its few.
SMALL_PAIRS = 1024
SMALL_PLACE = 16


def max_tiles(pairs: int, experts: int, block_m: int) -> int:
    """Most tiles any routing of `pairs` pairs can need: full ones, and one part-filled for each expert met."""
    return pairs // block_m + min(experts, pairs)


@triton.jit
def write_tiles(tiles, max_tiles, totals, starts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr):
    """List the tiles of every expert in order; returns how many there are."""
    expert = tl.arange(0, BINS)
    rows = tl.where(expert < EXPERTS, totals, 0)
    wanted = (rows + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(wanted, axis=0) - wanted
    most = tl.max(wanted, axis=0)
    for j in range(most):
        has = j < wanted
        tl.store(tiles + first + j, expert, mask=has)
        tl.store(tiles + max_tiles + first + j, starts + j * BLOCK_M, mask=has)
        tl.store(tiles + 2 * max_tiles + first + j, tl.minimum(rows - j * BLOCK_M, BLOCK_M), mask=has)
    return tl.sum(wanted, axis=0)


@triton.jit
def finish(
    totals,
    tiles,
    counts,
    max_tiles,
    BLOCK_M1: tl.constexpr,
    BLOCK_M2: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    DONE: tl.constexpr,
):
    """From pairs per expert [BINS]: tile lists of both GEMMs and the counts. Returns each expert's first row."""
    expert = tl.arange(0, BINS)
    starts = tl.cumsum(totals, axis=0) - totals
    tl.store(counts, tl.sum(tl.where(expert < EXPERTS, totals, 0), axis=0))
    tl.store(counts + 1, write_tiles(tiles, max_tiles, totals, starts, BLOCK_M1, EXPERTS, BINS))
    tl.store(counts + 2, write_tiles(tiles + 3 * max_tiles, max_tiles, totals, starts, BLOCK_M2, EXPERTS, BINS))
    tl.store(counts + 3, 0)
    tl.store(counts + 4 + tl.arange(0, DONE), tl.zeros((DONE,), tl.int32))
    return starts


@triton.jit(do_not_specialize=["pairs"])
def prologue_small_kernel(
    hidden,
    quantised,
    scales,
    ids,
    expert_map,
    local_ids,
    rows,
    tiles,
    counts,
    pairs,
    max_tiles,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BINS: tl.constexpr,
    MOST_PAIRS: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    PLACE: tl.constexpr,
    BLOCK_M1: tl.constexpr,
    BLOCK_M2: tl.constexpr,
    DONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program 0 makes the tiles, the next ones place PLACE pairs each, the others quantise one token each.

    PAIRS_BLOCK: power of two ≥ pairs. MOST_PAIRS: SMALL_PAIRS; the histogram is taken over that many whatever `pairs`
    is, so that every thread has an element of its own.
    """
    begin(PDL)
    pid = tl.program_id(0)
    placers = tl.cdiv(pairs, PLACE)
    if pid > placers:
        quantise_row(hidden, quantised, scales, pid - 1 - placers, WIDTH, LOW, HIGH)
    elif pid == 0:
        every = tl.arange(0, MOST_PAIRS)
        all_experts = clean_expert(ids, every, every < pairs, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP)
        finish(tl.histogram(all_experts, BINS), tiles, counts, max_tiles, BLOCK_M1, BLOCK_M2, EXPERTS, BINS, DONE)
    else:
        pair = (pid - 1) * PLACE + tl.arange(0, PLACE)
        inside = pair < pairs
        expert = clean_expert(ids, pair, inside, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP)
        tl.store(local_ids + pair, expert, mask=inside)
        other = tl.arange(0, PAIRS_BLOCK)
        other_expert = clean_expert(ids, other, other < pairs, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP)
        # Place of a pair = pairs of a smaller expert + earlier pairs of its own. Lanes past the end count as «none
        # here» with the largest numbers, so they come before nobody.
        before = (other_expert[None, :] < expert[:, None]) | (
            (other_expert[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])
        )
        tl.store(rows + tl.sum(before.to(tl.int32), axis=1), pair, mask=inside)


@triton.jit(do_not_specialize=["pairs", "chunks"])
def prologue_kernel(
    hidden,
    quantised,
    scales,
    ids,
    expert_map,
    local_ids,
    histogram,
    pairs,
    chunks,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs below `chunks` count experts in their chunk of pairs; the others quantise one token each."""
    begin(PDL)
    pid = tl.program_id(0)
    if pid >= chunks:
        quantise_row(hidden, quantised, scales, pid - chunks, WIDTH, LOW, HIGH)
    else:
        pair = pid * CHUNK + tl.arange(0, CHUNK)
        inside = pair < pairs
        expert = clean_expert(ids, pair, inside, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP)
        tl.store(local_ids + pair, expert, mask=inside)
        # Pairs past the end count into the bin of «none here» (BINS > EXPERTS), whose total nobody needs.
        tl.store(histogram + pid * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    histogram,
    tiles,
    counts,
    chunks,
    max_tiles,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M1: tl.constexpr,
    BLOCK_M2: tl.constexpr,
    DONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. histogram [chunks + 1, BINS] becomes: row c, pairs of that expert before chunk c; last row, the
    expert's first row in the grouped order."""
    begin(PDL)
    expert = tl.arange(0, BINS)
    totals = tl.zeros((BINS,), tl.int32)
    for first in range(0, chunks, ROWS):
        chunk = first + tl.arange(0, ROWS)
        where = histogram + chunk[:, None] * BINS + expert[None, :]
        real = (chunk < chunks)[:, None] & (expert < BINS)[None, :]
        here = tl.load(where, mask=real, other=0)
        before = tl.cumsum(here, axis=0) - here
        tl.store(where, before + totals[None, :], mask=real)
        totals += tl.sum(here, axis=0)
    starts = finish(totals, tiles, counts, max_tiles, BLOCK_M1, BLOCK_M2, EXPERTS, BINS, DONE)
    tl.store(histogram + chunks * BINS + expert, starts)


@triton.jit(do_not_specialize=["pairs", "chunks"])
def place_kernel(
    local_ids,
    histogram,
    rows,
    pairs,
    chunks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACE: tl.constexpr,
    STRIP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program places PLACE pairs: expert's first row + pairs before its chunk + earlier ones in its chunk."""
    first = tl.program_id(0) * PLACE
    pair = first + tl.arange(0, PLACE)
    inside = pair < pairs
    expert = tl.load(local_ids + pair, mask=inside, other=EXPERTS)
    chunk = first // CHUNK
    earlier = tl.zeros((PLACE, STRIP), tl.int32)
    for strip in tl.static_range(CHUNK // STRIP):
        other = chunk * CHUNK + strip * STRIP + tl.arange(0, STRIP)
        other_expert = tl.load(local_ids + other, mask=other < tl.minimum(first + PLACE, pairs), other=EXPERTS)
        before = (other_expert[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])
        earlier += before.to(tl.int32)
    rank = tl.sum(earlier, axis=1)
    valid = inside & (expert < EXPERTS)
    # All above needs local_ids alone, which the launch before the scan made.
    begin(PDL)
    base = tl.load(histogram + chunk * BINS + expert, mask=valid, other=0)
    start = tl.load(histogram + chunks * BINS + expert, mask=valid, other=0)
    tl.store(rows + start + base + rank, pair, mask=valid)
