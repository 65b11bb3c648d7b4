"""A handful of tokens: two launches, no routing, no tensor cores. Time is weight bytes and launches, nothing else.

Every (token, choice) pair is a small matrix-vector product by itself. Both kernels quantise what they read (the same
values as the other paths), so nothing but the activations travels between them. All loads are written before the
first reduction: a reduction is a barrier, and no load moves up across it.

GEMM1 reads a row as two blocks, LOW + HIGH columns (5120 = 4096 + 1024), so that nothing is read or computed beyond it
where the width allows. Where not, the mask compares with a run-time width on purpose: with a compile-time one some
threads' weights are constant zeros, and ptxas (12.8.93 and 12.9.86, sm_90a) folded the FP8 conversion of such a zero
into the conversion of 0x7F, a NaN. tests/moe/test_compile.py looks for that in the machine code.

GEMM2's weights do not depend on GEMM1, so they are read before waiting for it.
"""

# A compile-time choice between two loads is an if statement in Triton.
# ruff: noqa: SIM108

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, clean_expert, quantisation_scale, swiglu, to_fp8


@triton.jit
def load_row(row, hidden_size, HIDDEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Both blocks of rows [·, HIDDEN] that start at the pointers `row` [·, 1]: [·, LOW] and [·, HIGH].

    hidden_size: HIDDEN again, as a number the compiler does not know (see above). HIGH is 16 lanes of zeros for 0.
    """
    low = tl.load(row + tl.arange(0, LOW)[None, :])
    WIDE: tl.constexpr = HIGH if HIGH > 0 else 16
    column = LOW + tl.arange(0, WIDE)[None, :]
    if LOW + WIDE == HIDDEN:
        high = tl.load(row + column)
    else:
        high = tl.load(row + column, mask=column < hidden_size, other=0.0)
    return low, high


@triton.jit
def pair_gemm1_kernel(
    hidden,
    w13,
    w13_scales,
    act,
    ids,
    expert_map,
    w13_expert_stride,
    hidden_size,
    HIDDEN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: pairs × blocks of COLUMNS columns. Writes act [pairs, INTERMEDIATE] bf16, rows of valid pairs only."""
    begin(PDL)
    pair = tl.program_id(0)
    token = (pair // TOP_K).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    x_low, x_high = load_row(hidden + token * HIDDEN, hidden_size, HIDDEN, LOW, HIGH)
    expert = clean_expert(ids, pair, True, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP).to(tl.int64)
    if expert < EXPERTS:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        safe = tl.minimum(column, INTERMEDIATE - 1)
        where = w13 + expert * w13_expert_stride + safe.to(tl.int64)[:, None] * HIDDEN
        gate_low, gate_high = load_row(where, hidden_size, HIDDEN, LOW, HIGH)
        up_low, up_high = load_row(where + INTERMEDIATE * HIDDEN, hidden_size, HIDDEN, LOW, HIGH)
        scales = w13_scales + expert * (2 * INTERMEDIATE) + safe
        gate_scale = tl.load(scales)
        up_scale = tl.load(scales + INTERMEDIATE)
        low = x_low.to(tl.float32)
        high = x_high.to(tl.float32)
        scale = quantisation_scale(tl.maximum(tl.max(tl.abs(low)), tl.max(tl.abs(high))))
        q_low = to_fp8(low, scale).to(tl.float32)
        q_high = to_fp8(high, scale).to(tl.float32)
        gate = tl.sum(gate_low.to(tl.float32) * q_low, axis=1) + tl.sum(gate_high.to(tl.float32) * q_high, axis=1)
        up = tl.sum(up_low.to(tl.float32) * q_low, axis=1) + tl.sum(up_high.to(tl.float32) * q_high, axis=1)
        y = swiglu(gate * scale * gate_scale, up * scale * up_scale)
        tl.store(act + pair.to(tl.int64) * INTERMEDIATE + column, y.to(tl.bfloat16), mask=column < INTERMEDIATE)


@triton.jit
def pair_gemm2_kernel(
    act,
    w2,
    w2_scales,
    topk_weights,
    out,
    ids,
    expert_map,
    w2_expert_stride,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: tokens × blocks of COLUMNS hidden columns. Writes every element of out [tokens, HIDDEN] bf16.

    CHOICES: power of two ≥ TOP_K. Tiles are [CHOICES · COLUMNS, WIDTH_BLOCK], choices outermost.
    """
    token = tl.program_id(0)
    first_column = tl.program_id(1) * COLUMNS
    line = tl.arange(0, CHOICES * COLUMNS)
    choice = line // COLUMNS
    pair = token * TOP_K + choice
    real = choice < TOP_K
    expert = clean_expert(ids, pair, real, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP).to(tl.int64)
    valid = expert < EXPERTS
    column = tl.minimum(first_column + line % COLUMNS, HIDDEN - 1).to(tl.int64)
    k = tl.arange(0, WIDTH_BLOCK)
    inside = valid[:, None] & (k < INTERMEDIATE)[None, :]
    w = tl.load(w2 + (expert * w2_expert_stride + column * INTERMEDIATE)[:, None] + k[None, :], mask=inside, other=0.0)
    channel = tl.load(w2_scales + expert * HIDDEN + column, mask=valid, other=0.0)
    weight = tl.load(topk_weights + pair, mask=valid, other=0.0)
    begin(PDL)
    y = tl.load(act + pair.to(tl.int64)[:, None] * INTERMEDIATE + k[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = quantisation_scale(tl.max(tl.abs(y), axis=1))
    value = tl.sum(w.to(tl.float32) * to_fp8(y, scale[:, None]).to(tl.float32), axis=1)
    total = tl.sum(tl.reshape(value * channel * scale * weight, (CHOICES, COLUMNS)), axis=0)
    column_out = first_column + tl.arange(0, COLUMNS)
    tl.store(out + token.to(tl.int64) * HIDDEN + column_out, total.to(tl.bfloat16), mask=column_out < HIDDEN)
