"""`routing_ids.sanitise` as one kernel: a layer of 8192 tokens launches one grid instead of eight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 64


@triton.jit
def _sanitise_kernel(
    ids_ptr, weights_ptr, scales_ptr, new_ids_ptr, new_weights_ptr, new_scales_ptr, tokens, experts,
    ids_stride, weights_stride, scales_stride,
    SCALES: tl.constexpr, TOP_K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS tokens; COLUMNS is TOP_K rounded up to a power of two."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = (rows[:, None] < tokens) & (columns[None, :] < TOP_K)
    ids = tl.load(ids_ptr + rows[:, None] * ids_stride + columns[None, :], mask=inside, other=-1).to(tl.int64)
    weights = tl.load(weights_ptr + rows[:, None] * weights_stride + columns[None, :], mask=inside, other=0.0)
    first = tl.load(ids_ptr + columns, mask=columns < TOP_K, other=0).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), experts - 1)
    valid = (ids >= 0) & (ids < experts)
    own = tl.max(tl.where(valid, ids, -1), axis=1)
    used = own >= 0
    fallback = tl.where(used[:, None], own[:, None], first[None, :])
    packed = rows[:, None] * TOP_K + columns[None, :]
    new_ids = tl.where(valid, ids, fallback).to(new_ids_ptr.dtype.element_ty)
    new_weights = tl.where(valid, weights, tl.zeros_like(weights))
    tl.store(new_ids_ptr + packed, new_ids, mask=inside)
    tl.store(new_weights_ptr + packed, new_weights, mask=inside)
    if SCALES:
        scales = tl.load(scales_ptr + rows * scales_stride, mask=rows < tokens, other=0.0)
        tl.store(new_scales_ptr + rows, tl.where(used, scales, 0.0), mask=rows < tokens)


def sanitise(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `routing_ids.sanitise`, on the current CUDA stream."""
    tokens, top_k = topk_ids.shape
    # Rows may be a view with padding between them, columns are next to each other.
    ids = topk_ids if topk_ids.stride(-1) == 1 else topk_ids.contiguous()
    weights = topk_weights if topk_weights.stride(-1) == 1 else topk_weights.contiguous()
    as_signed = ids.view(torch.int32) if ids.dtype == torch.uint32 else ids
    new_ids = torch.empty((tokens, top_k), dtype=as_signed.dtype, device=ids.device)
    new_weights = torch.empty((tokens, top_k), dtype=weights.dtype, device=ids.device)
    new_scales = None if scales is None else torch.empty((tokens, 1), dtype=scales.dtype, device=ids.device)
    if tokens:
        _sanitise_kernel[(triton.cdiv(tokens, _ROWS),)](
            as_signed, weights, scales, new_ids, new_weights, new_scales, tokens, experts, as_signed.stride(0),
            weights.stride(0), 0 if scales is None else scales.stride(0),
            SCALES=scales is not None, TOP_K=top_k, COLUMNS=triton.next_power_of_2(top_k), ROWS=_ROWS,
        )  # fmt: skip
    return new_ids.view(topk_ids.dtype), new_weights, new_scales
