"""A handful of tokens: two launches, no routing, no tensor cores. Time is weight bytes and launches, nothing else.

Every (token, choice) pair is a small matrix-vector product by itself. Both kernels quantise what they read (the same
values as the other paths), so nothing but the activations travels between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import clean_expert, quantisation_scale, swiglu, to_fp8


@triton.jit
def pair_gemm1_kernel(
    hidden,
    w13,
    w13_scales,
    act,
    ids,
    expert_map,
    w13_expert_stride,
    HIDDEN: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    GLOBAL_EXPERTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: pairs × blocks of COLUMNS columns. Writes act [pairs, INTERMEDIATE] bf16, rows of valid pairs only."""
    pair = tl.program_id(0)
    expert = clean_expert(ids, pair, True, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP).to(tl.int64)
    if expert < EXPERTS:
        x_row = hidden + (pair // TOP_K).to(tl.int64) * HIDDEN
        whole = tl.arange(0, HIDDEN_BLOCK)
        x_all = tl.load(x_row + whole, mask=whole < HIDDEN, other=0.0).to(tl.float32)
        scale = quantisation_scale(tl.max(tl.abs(x_all), axis=0))
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        safe = tl.minimum(column, INTERMEDIATE - 1)
        gate_rows = w13 + expert * w13_expert_stride + safe.to(tl.int64) * HIDDEN
        k = tl.arange(0, BLOCK_K)
        gate = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
        up = tl.zeros((COLUMNS, BLOCK_K), tl.float32)
        for k0 in tl.static_range(0, HIDDEN, BLOCK_K):
            inside = (k0 + k) < HIDDEN
            x = tl.load(x_row + k0 + k, mask=inside, other=0.0).to(tl.float32)
            x = to_fp8(x, scale).to(tl.float32)
            where = gate_rows[:, None] + (k0 + k)[None, :]
            gate += tl.load(where, mask=inside[None, :], other=0.0).to(tl.float32) * x[None, :]
            up += (
                tl.load(where + INTERMEDIATE * HIDDEN, mask=inside[None, :], other=0.0).to(tl.float32) * x[None, :]
            )
        scales = w13_scales + expert * (2 * INTERMEDIATE) + safe
        y = swiglu(
            tl.sum(gate, axis=1) * scale * tl.load(scales), tl.sum(up, axis=1) * scale * tl.load(scales + INTERMEDIATE)
        )
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
    COLUMNS: tl.constexpr,
):
    """Grid: tokens × blocks of COLUMNS hidden columns. Writes every element of out [tokens, HIDDEN] bf16."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    safe = tl.minimum(column, HIDDEN - 1)
    k = tl.arange(0, WIDTH_BLOCK)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = clean_expert(ids, pair, True, expert_map, EXPERTS, GLOBAL_EXPERTS, HAS_MAP).to(tl.int64)
        valid = expert < EXPERTS
        inside = (k < INTERMEDIATE) & valid
        y = tl.load(act + pair.to(tl.int64) * INTERMEDIATE + k, mask=inside, other=0.0).to(tl.float32)
        scale = quantisation_scale(tl.max(tl.abs(y), axis=0))
        q = to_fp8(y, scale).to(tl.float32)
        where = w2 + expert * w2_expert_stride + safe.to(tl.int64)[:, None] * INTERMEDIATE + k[None, :]
        w = tl.load(where, mask=inside[None, :], other=0.0).to(tl.float32)
        channel = tl.load(w2_scales + expert * HIDDEN + safe, mask=valid, other=0.0)
        value = tl.sum(w * q[None, :], axis=1) * channel * scale * tl.load(topk_weights + pair)
        # A weight of a choice that names no expert may be NaN; it must not reach the sum.
        total += tl.where(valid, value, 0.0)
    tl.store(out + token.to(tl.int64) * HIDDEN + column, total.to(tl.bfloat16), mask=column < HIDDEN)
