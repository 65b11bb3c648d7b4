"""GEMM2 and its top-k sum in one launch, over narrow slices of columns whose partials stay in L2.

Work is a list of steps in a fixed order; a program draws the next number from a counter and does it:
    for slice s = 0 … S:  all GEMM tiles of slice s, then all sums of slice s − 1
A step waits only for steps with smaller numbers (the sums of a slice for its GEMM tiles; a slice's GEMM tiles for the
sums that last used the same slot of partials). Every smaller number has been drawn by a program that is running, and
the smallest unfinished one waits for nothing, so there is no deadlock, whatever else runs on the card and however few
programs are resident. Which program does a step changes no result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin
from .gemm2 import gemm2_tile, sum_tile


@triton.jit
def wait_until(counter, target):
    """Spin until the counter reaches target; what its increments released is visible afterwards."""
    while tl.atomic_add(counter, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def announce(counter):
    """Count one finished step, after every thread's stores."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit(do_not_specialize=["tokens"])
def gemm2_sum_kernel(
    act,
    act_scales,
    w2,
    w2_scales,
    topk_weights,
    partial,
    local_ids,
    out,
    rows,
    tiles,
    counts,
    done,
    tokens,
    max_tiles,
    w2_expert_stride,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIP: tl.constexpr,
    SLICE: tl.constexpr,
    SLOTS: tl.constexpr,
    QUANTISED: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts[3] is the ticket counter; done [2 · slices] int32 zeros: finished GEMM tiles and sums of each slice."""
    SLICES: tl.constexpr = (HIDDEN + SLICE - 1) // SLICE
    STRIPS: tl.constexpr = SLICE // STRIP
    # Elements of one slot of partials; spelled as a product so that the compiler sees it is a multiple of SLICE.
    slot = (tokens * TOP_K).to(tl.int64) * SLICE
    gemms = tl.load(counts + 2) * STRIPS
    begin(PDL)
    sums = tl.cdiv(tokens, BLOCK_T)
    unit = gemms + sums
    ticket = tl.atomic_add(counts + 3, 1, sem="relaxed")
    while ticket < unit * (SLICES + 1):
        s = ticket // unit
        step = ticket % unit
        if step < gemms:
            if s < SLICES:
                if s >= SLOTS:
                    wait_until(done + SLICES + s - SLOTS, sums)
                first = s * SLICE + (step % STRIPS) * STRIP
                gemm2_tile(
                    act,
                    act_scales,
                    w2,
                    w2_scales,
                    topk_weights,
                    partial + (s % SLOTS) * slot,
                    rows,
                    tiles,
                    max_tiles,
                    w2_expert_stride,
                    step // STRIPS,
                    first,
                    tl.minimum(first + STRIP, HIDDEN),
                    s * SLICE,
                    SLICE,
                    HIDDEN,
                    INTERMEDIATE,
                    LOW,
                    HIGH,
                    BLOCK_M,
                    BLOCK_N,
                    QUANTISED,
                    False,
                    STAGES,
                    False,
                    False,
                    0,
                    False,
                )
                announce(done + s)
        else:
            if s > 0:
                wait_until(done + s - 1, gemms)
                start = (s - 1) * SLICE
                sum_tile(
                    partial + ((s - 1) % SLOTS) * slot,
                    local_ids,
                    out,
                    (step - gemms) * BLOCK_T,
                    tokens,
                    start,
                    tl.minimum(start + SLICE, HIDDEN),
                    start,
                    SLICE,
                    HIDDEN,
                    EXPERTS,
                    TOP_K,
                    BLOCK_T,
                    SLICE,
                    HIDDEN % SLICE == 0,
                    False,
                )
                announce(done + SLICES + s - 1)
        ticket = tl.atomic_add(counts + 3, 1, sem="relaxed")
