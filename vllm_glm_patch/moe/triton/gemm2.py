"""GEMM2: activations × w2ᵀ × routing weight for a slice of the hidden columns, one bf16 partial a pair; and the sum.

Partials stand at [pair, column − slice start], so the sum over a token's top_k choices reads neighbouring rows, in
their fixed order. Pairs with no local expert have no partial; the sum skips them without reading.
"""

# A compile-time choice between two shapes is an if statement in Triton.
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, load_block, prefetch, quantisation_scale, read_tile, to_fp8


@triton.jit
def load_activations(
    act,
    act_scales,
    first_row,
    m,
    size,
    INTERMEDIATE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Whole rows of act as FP8 [·, LOW] and [·, max(HIGH, 16)] and their scales; bf16 rows are quantised here.

    Rows past the tile's end repeat its first row. INTERMEDIATE = LOW + (at most) HIGH columns.
    """
    row = (first_row + tl.where(m < size, m, 0)).to(tl.int64)
    base = act + row[:, None] * INTERMEDIATE
    low_column = tl.arange(0, LOW)[None, :]
    HIGH_BLOCK: tl.constexpr = HIGH if HIGH > 0 else 16
    high_column = LOW + tl.arange(0, HIGH_BLOCK)[None, :]
    low = tl.load(base + low_column)
    high = tl.load(base + high_column, mask=high_column < INTERMEDIATE, other=0.0)
    if QUANTISED:
        scale = tl.load(act_scales + row)
        return low, high, scale
    low_f = low.to(tl.float32)
    high_f = high.to(tl.float32)
    scale = quantisation_scale(tl.maximum(tl.max(tl.abs(low_f), axis=1), tl.max(tl.abs(high_f), axis=1)))
    return to_fp8(low_f, scale[:, None]), to_fp8(high_f, scale[:, None]), scale


@triton.jit
def store_partial(
    partial,
    acc,
    pair,
    column,
    slice_start,
    slice_width,
    scale,
    real,
    HIDDEN: tl.constexpr,
    EXACT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HINTS: tl.constexpr,
):
    """Scale and write one tile of partials. acc [rows, columns], or [columns, rows] if TRANSPOSED; scale per row.

    EXACT: no column of any tile lies past HIDDEN (slices are whole numbers of tiles). HINTS: ask L2 to keep them.
    """
    EVICT: tl.constexpr = "evict_last" if HINTS else ""
    where_row = pair.to(tl.int64) * slice_width
    where_column = column - slice_start
    if TRANSPOSED:
        where = partial + where_row[None, :] + where_column[:, None]
        value = (acc * scale[None, :]).to(tl.bfloat16)
        if EXACT:
            tl.store(where, value, mask=real[None, :], eviction_policy=EVICT)
        else:
            tl.store(where, value, mask=real[None, :] & (column < HIDDEN)[:, None], eviction_policy=EVICT)
    else:
        where = partial + where_row[:, None] + where_column[None, :]
        value = (acc * scale[:, None]).to(tl.bfloat16)
        if EXACT:
            tl.store(where, value, mask=real[:, None], eviction_policy=EVICT)
        else:
            tl.store(where, value, mask=real[:, None] & (column < HIDDEN)[None, :], eviction_policy=EVICT)


@triton.jit
def gemm2_tile(
    act,
    act_scales,
    w2,
    w2_scales,
    topk_weights,
    partial,
    rows,
    tiles,
    max_tiles,
    w2_expert_stride,
    tile,
    first_column,
    end_column,
    slice_start,
    slice_width,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUANTISED: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    HINTS: tl.constexpr,
):
    """Columns first_column … end_column of one tile of rows; the rows stay resident while weights stream past.

    EARLY: the launch before was not the one that made `act`, so its rows may be read before that one ends. PREFETCH:
    lines of 128 bytes of the weights to ask for before waiting, 0 for none.
    """
    expert, first_row, size = read_tile(tiles, max_tiles, tile)
    m = tl.arange(0, BLOCK_M)
    real = m < size
    pair = tl.load(rows + first_row + tl.where(real, m, 0))
    if PREFETCH > 0:
        columns = end_column - first_column
        prefetch(w2 + expert * w2_expert_stride + first_column * INTERMEDIATE, columns * INTERMEDIATE, PREFETCH)
    if not EARLY:
        begin(PDL)
    a_low, a_high, scale = load_activations(act, act_scales, first_row, m, size, INTERMEDIATE, LOW, HIGH, QUANTISED)
    scale = scale * tl.load(topk_weights + pair)
    if EARLY:
        begin(PDL)
    k_low = tl.arange(0, LOW)
    HIGH_BLOCK: tl.constexpr = HIGH if HIGH > 0 else 16
    k_high = LOW + tl.arange(0, HIGH_BLOCK)
    weights = w2 + expert * w2_expert_stride
    for n0 in tl.range(first_column, end_column, BLOCK_N, num_stages=STAGES):
        column = n0 + tl.arange(0, BLOCK_N)
        safe = column if HIDDEN % BLOCK_N == 0 else tl.minimum(column, HIDDEN - 1)
        base = weights + safe.to(tl.int64)[:, None] * INTERMEDIATE
        w_low = tl.load(base + k_low[None, :])
        if SWAP:
            acc = tl.dot(w_low, tl.trans(a_low))
        else:
            acc = tl.dot(a_low, tl.trans(w_low))
        if HIGH > 0:
            if LOW + HIGH == INTERMEDIATE:
                w_high = tl.load(base + k_high[None, :])
            else:
                w_high = tl.load(base + k_high[None, :], mask=(k_high < INTERMEDIATE)[None, :], other=0.0)
            if SWAP:
                acc = tl.dot(w_high, tl.trans(a_high), acc)
            else:
                acc = tl.dot(a_high, tl.trans(w_high), acc)
        channel_scale = tl.load(w2_scales + expert * HIDDEN + safe)
        if SWAP:
            acc = acc * channel_scale[:, None]
        else:
            acc = acc * channel_scale[None, :]
        store_partial(
            partial, acc, pair, column, slice_start, slice_width, scale, real, HIDDEN, HIDDEN % BLOCK_N == 0, SWAP, HINTS
        )


@triton.jit
def gemm2_kernel(
    act,
    act_scales,
    w2,
    w2_scales,
    topk_weights,
    partial,
    rows,
    tiles,
    counts,
    max_tiles,
    w2_expert_stride,
    slice_start,
    slice_width,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIP: tl.constexpr,
    QUANTISED: tl.constexpr,
    SWAP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    HINTS: tl.constexpr,
):
    """One program: one tile of rows × STRIP columns (a multiple of BLOCK_N). Grid: max tiles × strips of the slice."""
    num_tiles = tl.load(counts + 2)
    strips = tl.cdiv(slice_width, STRIP)
    pid = tl.program_id(0)
    if pid < num_tiles * strips:
        first = slice_start + (pid % strips) * STRIP
        gemm2_tile(
            act,
            act_scales,
            w2,
            w2_scales,
            topk_weights,
            partial,
            rows,
            tiles,
            max_tiles,
            w2_expert_stride,
            pid // strips,
            first,
            tl.minimum(first + STRIP, slice_start + slice_width),
            slice_start,
            slice_width,
            HIDDEN,
            INTERMEDIATE,
            LOW,
            HIGH,
            BLOCK_M,
            BLOCK_N,
            QUANTISED,
            SWAP,
            STAGES,
            PDL,
            EARLY,
            PREFETCH,
            HINTS,
        )
    else:
        begin(PDL)


@triton.jit
def gemm2_loop_kernel(
    act,
    act_scales,
    w2,
    w2_scales,
    topk_weights,
    partial,
    rows,
    tiles,
    counts,
    max_tiles,
    w2_expert_stride,
    slice_start,
    slice_width,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    PDL: tl.constexpr,
    HINTS: tl.constexpr,
):
    """Wide experts: act (FP8, act_scales) does not fit a tile, so the loop runs over its columns."""
    num_tiles = tl.load(counts + 2)
    begin(PDL)
    blocks = tl.cdiv(slice_width, BLOCK_N)
    pid = tl.program_id(0)
    if pid < num_tiles * blocks:
        first_tile = pid // (GROUP * blocks) * GROUP
        group = tl.minimum(num_tiles - first_tile, GROUP)
        inside_group = pid - first_tile * blocks
        tile = first_tile + inside_group % group
        expert, first_row, size = read_tile(tiles, max_tiles, tile)
        m = tl.arange(0, BLOCK_M)
        real = m < size
        row = first_row + tl.where(real, m, 0)
        pair = tl.load(rows + row)
        column = slice_start + (inside_group // group) * BLOCK_N + tl.arange(0, BLOCK_N)
        safe = column if HIDDEN % BLOCK_N == 0 else tl.minimum(column, HIDDEN - 1)
        a_rows = act + row.to(tl.int64) * INTERMEDIATE
        w_rows = w2 + expert * w2_expert_stride + safe.to(tl.int64) * INTERMEDIATE
        k = tl.arange(0, BLOCK_K)
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, INTERMEDIATE, BLOCK_K):
            a = load_block(a_rows, k0, k, INTERMEDIATE, BLOCK_K)
            w = load_block(w_rows, k0, k, INTERMEDIATE, BLOCK_K)
            if SWAP:
                acc = tl.dot(w, tl.trans(a), acc)
            else:
                acc = tl.dot(a, tl.trans(w), acc)
        scale = tl.load(act_scales + row) * tl.load(topk_weights + pair)
        channel_scale = tl.load(w2_scales + expert * HIDDEN + safe)
        if SWAP:
            acc = acc * channel_scale[:, None]
        else:
            acc = acc * channel_scale[None, :]
        store_partial(
            partial, acc, pair, column, slice_start, slice_width, scale, real, HIDDEN, HIDDEN % BLOCK_N == 0, SWAP, HINTS
        )


@triton.jit
def sum_tile(
    partial,
    local_ids,
    out,
    first_token,
    tokens,
    first_column,
    end_column,
    slice_start,
    slice_width,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
    HINTS: tl.constexpr,
):
    """Σ over a token's choices, choice 0 first, in fp32; bf16 to out [tokens, HIDDEN], columns up to end_column.

    EXACT: all BLOCK_C columns lie before end_column.
    """
    token = first_token + tl.arange(0, BLOCK_T)
    column = first_column + tl.arange(0, BLOCK_C)
    inside = (token < tokens)[:, None]
    if not EXACT:
        inside = inside & (column < end_column)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        here = tl.load(local_ids + pair, mask=token < tokens, other=EXPERTS) < EXPERTS
        where = partial + pair.to(tl.int64)[:, None] * slice_width + (column - slice_start)[None, :]
        valid = inside & here[:, None]
        # A hint and a cache modifier exclude each other. In one launch with GEMM2 only the modifier is right.
        if HINTS:
            total += tl.load(where, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        else:
            total += tl.load(where, mask=valid, other=0.0, cache_modifier=".cg").to(tl.float32)
    where = out + token.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(where, total.to(tl.bfloat16), mask=inside, eviction_policy="evict_first" if HINTS else "")


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(
    partial,
    local_ids,
    out,
    tokens,
    slice_start,
    slice_width,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
    HINTS: tl.constexpr,
):
    """Grid: blocks of tokens × blocks of the slice's columns (columns fastest)."""
    begin(PDL)
    blocks = tl.cdiv(slice_width, BLOCK_C)
    pid = tl.program_id(0)
    sum_tile(
        partial,
        local_ids,
        out,
        (pid // blocks) * BLOCK_T,
        tokens,
        slice_start + (pid % blocks) * BLOCK_C,
        slice_start + slice_width,
        slice_start,
        slice_width,
        HIDDEN,
        EXPERTS,
        TOP_K,
        BLOCK_T,
        BLOCK_C,
        EXACT,
        HINTS,
    )
