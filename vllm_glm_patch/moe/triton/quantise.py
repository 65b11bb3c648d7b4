"""Rows to FP8 with one scale a row: the tokens before GEMM1, the activations before GEMM2 where not fused."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import begin, quantisation_scale, to_fp8


@triton.jit
def quantise_row(source, target, scales, row, WIDTH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Quantise one contiguous row as two blocks of LOW + HIGH ≥ WIDTH columns, powers of two; HIGH 0 for one block.

    5120 columns are 4096 + 1024: no lane works on nothing.
    """
    base = row.to(tl.int64) * WIDTH
    low_column = tl.arange(0, LOW)
    low_inside = low_column < WIDTH
    low = tl.load(source + base + low_column, mask=low_inside, other=0.0).to(tl.float32)
    if HIGH > 0:  # before the reduction, which is a barrier: no load moves up across it
        high_column = LOW + tl.arange(0, HIGH)
        high_inside = high_column < WIDTH
        high = tl.load(source + base + high_column, mask=high_inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(low), axis=0)
    if HIGH > 0:
        amax = tl.maximum(amax, tl.max(tl.abs(high), axis=0))
    scale = quantisation_scale(amax)
    tl.store(target + base + low_column, to_fp8(low, scale), mask=low_inside)
    if HIGH > 0:
        tl.store(target + base + high_column, to_fp8(high, scale), mask=high_inside)
    tl.store(scales + row, scale)


@triton.jit
def quantise_rows_kernel(
    source, target, scales, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):
    """ROWS rows a program, BLOCK ≥ WIDTH columns. Rows from `limit[0]` (int32 on the device) on are left alone.

    A program a row would take as long to start as to work: 80 µs for 65536 rows of 384 columns, whose bytes take 18 (H200).
    """
    first = tl.program_id(0) * ROWS
    end = tl.load(limit)  # routing's, two launches ago
    begin(PDL)
    if first < end:
        row = first + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row < end)[:, None] & (column < WIDTH)[None, :]
        place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        values = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        scale = quantisation_scale(tl.max(tl.abs(values), axis=1))
        tl.store(target + place, to_fp8(values, scale[:, None]), mask=inside)
        tl.store(scales + row, scale, mask=row < end)
