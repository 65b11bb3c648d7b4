"""GEMM1: gathered FP8 tokens × w13ᵀ, gate and up of the same columns in one tile, SwiGLU in registers.

Rows of the tile come through `rows` (routing.py); the row past a tile's end repeats its first row and its results are
dropped, and columns past the end repeat the last one, so every address is inside its buffer without masks on the
inner loop. Output row i belongs to the i-th pair of the grouped order, so `act` is compact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import ask, begin, load_block, quantisation_scale, read_tile, swiglu, to_fp8


@triton.jit
def locate(pid, num_tiles, BLOCKS_N: tl.constexpr, GROUP: tl.constexpr):
    """Program number → (tile of rows, block of columns), GROUP row tiles sharing a column block in a row, for L2."""
    group = pid // (GROUP * BLOCKS_N)
    first = group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    inside = pid - first * BLOCKS_N
    return first + inside % size, inside // size


@triton.jit
def product_interleaved(
    tokens,
    weights,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    first_column,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """tokens: pointers to row starts [BLOCK_M]; weights: the expert's w13. Returns gate, up [BLOCK_M, COLUMNS].

    The weight tile interleaves gate and up rows, so one dot of 2 · COLUMNS makes both and each thread holds the gate
    and the up of the same column in neighbouring registers.
    """
    j = tl.arange(0, 2 * COLUMNS)
    column = tl.minimum(first_column + j // 2, INTERMEDIATE - 1)
    weight_rows = weights + (column + (j % 2) * INTERMEDIATE).to(tl.int64) * HIDDEN
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, 2 * COLUMNS), tl.float32)
    for k0 in range(0, HIDDEN, BLOCK_K):
        a = load_block(tokens, k0, k, HIDDEN, BLOCK_K)
        b = load_block(weight_rows, k0, k, HIDDEN, BLOCK_K)
        acc = tl.dot(a, tl.trans(b), acc)
    return tl.split(tl.reshape(acc, (BLOCK_M, COLUMNS, 2)))


@triton.jit
def activate(gate, up, token_scale, channel_scales, first_column, INTERMEDIATE: tl.constexpr, COLUMNS: tl.constexpr):
    """Scale the raw sums and apply SwiGLU. channel_scales: the expert's 2 · INTERMEDIATE scales."""
    column = tl.minimum(first_column + tl.arange(0, COLUMNS), INTERMEDIATE - 1)
    gate_scale = tl.load(channel_scales + column)
    up_scale = tl.load(channel_scales + INTERMEDIATE + column)
    return swiglu(gate * token_scale[:, None] * gate_scale[None, :], up * token_scale[:, None] * up_scale[None, :])


@triton.jit
def gemm1_tile_kernel(
    tokens,
    token_scales,
    w13,
    w13_scales,
    act,
    rows,
    tiles,
    counts,
    max_tiles,
    w13_expert_stride,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Many tokens: one program makes BLOCK_M rows × BLOCK_N columns of act (bf16)."""
    BLOCKS_N: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    begin(PDL)
    num_tiles = tl.load(counts + 1)
    pid = tl.program_id(0)
    if pid < num_tiles * BLOCKS_N:
        tile, block_n = locate(pid, num_tiles, BLOCKS_N, GROUP)
        expert, first_row, size = read_tile(tiles, max_tiles, tile)
        m = tl.arange(0, BLOCK_M)
        token = tl.load(rows + first_row + tl.where(m < size, m, 0)) // TOP_K
        token_scale = tl.load(token_scales + token)
        first_column = block_n * BLOCK_N
        gate, up = product_interleaved(
            tokens + token.to(tl.int64) * HIDDEN,
            w13 + expert * w13_expert_stride,
            HIDDEN,
            INTERMEDIATE,
            first_column,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        y = activate(gate, up, token_scale, w13_scales + expert * (2 * INTERMEDIATE), first_column, INTERMEDIATE, BLOCK_N)
        column = first_column + tl.arange(0, BLOCK_N)
        where = act + (first_row + m).to(tl.int64)[:, None] * INTERMEDIATE + column[None, :]
        tl.store(where, y.to(tl.bfloat16), mask=(m < size)[:, None] & (column < INTERMEDIATE)[None, :])


@triton.jit
def gemm1_row_kernel(
    tokens,
    token_scales,
    w13,
    w13_scales,
    act,
    act_scales,
    rows,
    tiles,
    counts,
    max_tiles,
    w13_expert_stride,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Many tokens, narrow experts: one program makes whole rows, so it also quantises them (act FP8, act_scales).

    A row is split in LOW + HIGH columns, both powers of two (192 = 128 + 64); HIGH may be 0.
    """
    begin(PDL)
    tile = tl.program_id(0)
    if tile < tl.load(counts + 1):
        expert, first_row, size = read_tile(tiles, max_tiles, tile)
        m = tl.arange(0, BLOCK_M)
        token = tl.load(rows + first_row + tl.where(m < size, m, 0)) // TOP_K
        token_rows = tokens + token.to(tl.int64) * HIDDEN
        weights = w13 + expert * w13_expert_stride
        k = tl.arange(0, BLOCK_K)
        j = tl.arange(0, 2 * LOW)
        low_rows = weights + (tl.minimum(j // 2, INTERMEDIATE - 1) + (j % 2) * INTERMEDIATE).to(tl.int64) * HIDDEN
        low = tl.zeros((BLOCK_M, 2 * LOW), tl.float32)
        if HIGH > 0:
            i = tl.arange(0, 2 * HIGH)
            high_rows = weights + (tl.minimum(LOW + i // 2, INTERMEDIATE - 1) + (i % 2) * INTERMEDIATE).to(tl.int64) * HIDDEN
            high = tl.zeros((BLOCK_M, 2 * HIGH), tl.float32)
        for k0 in range(0, HIDDEN, BLOCK_K):
            a = load_block(token_rows, k0, k, HIDDEN, BLOCK_K)
            low = tl.dot(a, tl.trans(load_block(low_rows, k0, k, HIDDEN, BLOCK_K)), low)
            if HIGH > 0:
                high = tl.dot(a, tl.trans(load_block(high_rows, k0, k, HIDDEN, BLOCK_K)), high)
        token_scale = tl.load(token_scales + token)
        channel_scales = w13_scales + expert * (2 * INTERMEDIATE)
        low_gate, low_up = tl.split(tl.reshape(low, (BLOCK_M, LOW, 2)))
        low_y = activate(low_gate, low_up, token_scale, channel_scales, 0, INTERMEDIATE, LOW)
        low_column = tl.arange(0, LOW)
        # Repeated columns take part in no maximum: a repeat of the last column cannot raise it.
        amax = tl.max(tl.abs(low_y), axis=1)
        if HIGH > 0:
            high_gate, high_up = tl.split(tl.reshape(high, (BLOCK_M, HIGH, 2)))
            high_y = activate(high_gate, high_up, token_scale, channel_scales, LOW, INTERMEDIATE, HIGH)
            amax = tl.maximum(amax, tl.max(tl.abs(high_y), axis=1))
        scale = quantisation_scale(amax)
        real = m < size
        where = act + (first_row + m).to(tl.int64)[:, None] * INTERMEDIATE
        tl.store(
            where + low_column[None, :],
            to_fp8(low_y, scale[:, None]),
            mask=real[:, None] & (low_column < INTERMEDIATE)[None, :],
        )
        if HIGH > 0:
            high_column = LOW + tl.arange(0, HIGH)
            tl.store(
                where + high_column[None, :],
                to_fp8(high_y, scale[:, None]),
                mask=real[:, None] & (high_column < INTERMEDIATE)[None, :],
            )
        tl.store(act_scales + first_row + m, scale, mask=real)


@triton.jit
def guessed_lines(
    pid,
    w13_expert_stride,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Where in w13 the first EARLY lines of each of a program's gate rows begin, if every expert has one tile: bytes
    [BLOCK_N, EARLY]; its up rows lie INTERMEDIATE · HIDDEN behind them."""
    BLOCKS_N: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    expert, block_n = locate(pid, EXPERTS, BLOCKS_N, GROUP)
    column = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), INTERMEDIATE - 1)
    first = tl.minimum(128 * tl.arange(0, EARLY), HIDDEN - 1)
    row = expert.to(tl.int64) * w13_expert_stride + column.to(tl.int64) * HIDDEN
    return row[:, None] + first[None, :]


@triton.jit
def gemm1_stream_kernel(
    tokens,
    token_scales,
    w13,
    w13_scales,
    act,
    rows,
    tiles,
    counts,
    max_tiles,
    w13_expert_stride,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EXPERTS: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Few tokens: time is reading weights. Weights take the dot's 64-row side, the few tokens its narrow side.

    EARLY: lines of each weight row to ask for before waiting, of what the program will read if every expert has one tile; which
    program asks does not matter, as all share L2. 0: none, and EXPERTS is not read.
    """
    BLOCKS_N: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    if EARLY > 0:  # noqa: SIM102 (by itself: only then is what stands in it left out where there is nothing to ask for)
        if pid < EXPERTS * BLOCKS_N:
            gates = guessed_lines(pid, w13_expert_stride, HIDDEN, INTERMEDIATE, EXPERTS, BLOCK_N, GROUP, EARLY)
            where = w13.to(tl.uint64) + gates.to(tl.uint64)
            ask(where)
            ask(where + INTERMEDIATE * HIDDEN)
    begin(PDL)
    num_tiles = tl.load(counts + 1)
    if pid < num_tiles * BLOCKS_N:
        tile, block_n = locate(pid, num_tiles, BLOCKS_N, GROUP)
        expert, first_row, size = read_tile(tiles, max_tiles, tile)
        m = tl.arange(0, BLOCK_M)
        token = tl.load(rows + first_row + tl.where(m < size, m, 0)) // TOP_K
        token_rows = tokens + token.to(tl.int64) * HIDDEN
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        safe = tl.minimum(column, INTERMEDIATE - 1)
        gate_rows = w13 + expert * w13_expert_stride + safe.to(tl.int64) * HIDDEN
        k = tl.arange(0, BLOCK_K)
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k0 in range(0, HIDDEN, BLOCK_K):
            x = tl.trans(load_block(token_rows, k0, k, HIDDEN, BLOCK_K))
            gate_w = load_block(gate_rows, k0, k, HIDDEN, BLOCK_K)
            up_w = load_block(gate_rows + INTERMEDIATE * HIDDEN, k0, k, HIDDEN, BLOCK_K)
            gate = tl.dot(gate_w, x, gate)
            up = tl.dot(up_w, x, up)
        token_scale = tl.load(token_scales + token)[None, :]
        scales = w13_scales + expert * (2 * INTERMEDIATE) + safe
        gate = gate * token_scale * tl.load(scales)[:, None]
        up = up * token_scale * tl.load(scales + INTERMEDIATE)[:, None]
        where = act + (first_row + m).to(tl.int64)[None, :] * INTERMEDIATE + column[:, None]
        tl.store(
            where,
            swiglu(gate, up).to(tl.bfloat16),
            mask=(m < size)[None, :] & (column < INTERMEDIATE)[:, None],
        )
