"""Routing on the device: pairs grouped by expert by histogram, scan and scatter of indices. No sort, no host sync.

Output, all int32, written anew by every call:
    local_ids [pairs]   local expert of each pair, or `experts` where none (see triton/common.py: clean_expert)
    rows [pairs]        pairs ordered by (local expert, pair number); the `counts[0]` first are valid
    tiles [2, 3, max]   for GEMM1 and GEMM2: expert, first row and number of rows of each tile
    counts [4 + DONE]   valid pairs, GEMM1's tiles, GEMM2's tiles, then zeros: the counters of gemm2_fused.py and of the
                        native gemm2_sum
    band_tiles [bands]  where GEMM2 works by bands of tokens: the first tile of each. GEMM2's tiles are listed band by band
                        then, and none has rows of two bands; the order of rows is the same

Pair p is token p // top_k and choice p % top_k. The order depends on the ids alone, so results repeat bit for bit.
Token quantisation rides in the first launch: it has no dependency on routing, and a launch costs 2 – 3 µs.
"""

# Kernels have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

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
DONE = 2048
# Up to this many pairs all the routing is in the first launch: a program looks at every pair to place its few.
SMALL_PAIRS = 1024
SMALL_PLACE = 16


def max_tiles(pairs: int, experts: int, block_m: int, bands: int = 1) -> int:
    """Most tiles any routing of `pairs` pairs can need: full ones, and one part-filled for each expert met in each band."""
    return pairs // block_m + min(experts * bands, pairs)


def check_band(band: int, top_k: int) -> None:
    """Whether tokens can be routed by bands of `band`; 0 is one band of all.

    Raises:
        ValueError: a band is not a whole number of chunks.
    """
    if band < 0 or band * top_k % CHUNK:
        step = CHUNK // math.gcd(CHUNK, top_k)
        raise ValueError(
            f"a band of {band} tokens with top_k {top_k} is not a whole number of chunks of {CHUNK} pairs, by which routing"
            f" counts; choose a multiple of {step} tokens, or 0 for one band"
        )


def bands_of(tokens: int, top_k: int, band: int) -> int:
    """Number of bands of `band` tokens, the last of which may be shorter; 1 where band is 0, and up to SMALL_PAIRS pairs.

    Raises:
        ValueError: there would be several, and a band is not a whole number of chunks.
    """
    if band == 0 or band >= tokens or tokens * top_k <= SMALL_PAIRS:
        return 1
    check_band(band, top_k)
    return -(-tokens // band)


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
    """From pairs per expert [BINS]: tile lists of both GEMMs and the counts. Returns each expert's first row.

    BLOCK_M2 = 0: GEMM2's list and its count are left to `list_band`.
    """
    expert = tl.arange(0, BINS)
    starts = tl.cumsum(totals, axis=0) - totals
    tl.store(counts, tl.sum(tl.where(expert < EXPERTS, totals, 0), axis=0))
    tl.store(counts + 1, write_tiles(tiles, max_tiles, totals, starts, BLOCK_M1, EXPERTS, BINS))
    if BLOCK_M2 > 0:
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


@triton.jit
def pairs_before(histogram, totals, chunk, chunks, expert, BINS: tl.constexpr):
    """Pairs of each expert before a chunk, from the scanned histogram; before one past the end, all of them."""
    here = tl.load(histogram + tl.minimum(chunk, chunks - 1) * BINS + expert)
    return tl.where(chunk < chunks, here, totals)


@triton.jit
def list_band(
    histogram,
    tiles,
    counts,
    band_tiles,
    band,
    bands,
    band_chunks,
    chunks,
    max_tiles,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """List GEMM2's tiles of one band, from the scanned histogram. TOGETHER: earlier bands whose tiles are counted at once."""
    expert = tl.arange(0, BINS)
    starts = tl.load(histogram + chunks * BINS + expert)
    # Where the next expert starts; BINS > EXPERTS, so there is one.
    until = tl.load(histogram + chunks * BINS + expert + 1, mask=expert < EXPERTS, other=0)
    totals = tl.where(expert < EXPERTS, until - starts, 0)
    first_tile = 0
    for earlier in range(0, band, TOGETHER):
        each = (earlier + tl.arange(0, TOGETHER))[:, None]
        before = pairs_before(histogram, totals[None, :], each * band_chunks, chunks, expert[None, :], BINS)
        after = pairs_before(histogram, totals[None, :], (each + 1) * band_chunks, chunks, expert[None, :], BINS)
        real = (each < band) & (expert < EXPERTS)[None, :]
        wanted = tl.where(real, (after - before + BLOCK_M - 1) // BLOCK_M, 0)
        first_tile += tl.sum(tl.sum(wanted, axis=1), axis=0)
    before = pairs_before(histogram, totals, band * band_chunks, chunks, expert, BINS)
    after = pairs_before(histogram, totals, (band + 1) * band_chunks, chunks, expert, BINS)
    made = write_tiles(tiles + first_tile, max_tiles, after - before, starts + before, BLOCK_M, EXPERTS, BINS)
    tl.store(band_tiles + band, first_tile)
    tl.store(counts + 2, first_tile + made, mask=band == bands - 1)


@triton.jit(do_not_specialize=["pairs", "chunks", "bands", "band_chunks"])
def place_kernel(
    local_ids,
    histogram,
    rows,
    tiles,
    counts,
    band_tiles,
    pairs,
    chunks,
    max_tiles,
    bands,
    band_chunks,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACE: tl.constexpr,
    STRIP: tl.constexpr,
    BAND_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each program places PLACE pairs: expert's first row + pairs before its chunk + earlier ones in its chunk.

    BAND_M > 0: as many programs more as there are bands (of `band_chunks` chunks) list GEMM2's tiles, of BAND_M rows.
    """
    if BAND_M > 0:
        band = tl.program_id(0) - tl.cdiv(pairs, PLACE)
        if band >= 0:
            begin(PDL)
            second = tiles + 3 * max_tiles
            list_band(
                histogram, second, counts, band_tiles, band, bands, band_chunks, chunks, max_tiles, BAND_M, EXPERTS, BINS, 8
            )
            return
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
