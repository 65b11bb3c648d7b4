"""Rows to FP8 with one scale a row: the tokens before GEMM1, the activations before GEMM2 where not fused."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, quantisation_scale, to_fp8


@triton.jit
def quantise_row(source, target, scales, row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Quantise one contiguous row. BLOCK: power of two ≥ WIDTH."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    base = row.to(tl.int64) * WIDTH
    x = tl.load(source + base + columns, mask=inside, other=0.0).to(tl.float32)
    scale = quantisation_scale(tl.max(tl.abs(x), axis=0))
    tl.store(target + base + columns, to_fp8(x, scale), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def quantise_rows_kernel(source, target, scales, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a row. Rows from `limit[0]` (int32 on the device) on are left alone: they hold nothing."""
    row = tl.program_id(0)
    end = tl.load(limit)  # routing's, two launches ago
    begin(PDL)
    if row < end:
        quantise_row(source, target, scales, row, WIDTH, BLOCK)
