"""Lets an expert id that names no expert contribute zero (patch `routing-ids`).

An id outside 0 ... experts - 1 gets the weight 0 and points at an expert that the same token uses anyway, so no
kernel behind it sees it. Valid ids and weights pass as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import Context, Factory, full_step_probe
from .arguments import Arguments

if TYPE_CHECKING:
    import torch


def replacements(context: Context) -> Mapping[str, Factory]:
    """Factories for the roles `run` (weights applied inside) and `apply` (weights applied by the caller, later)."""
    return {"run": _run, "apply": _apply}


def sanitise(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids that are all in range, and weights that are zero where they were not. No host sync.

    Args:
        topk_ids: [tokens, top_k], int32, int64 or uint32.
        topk_weights: [tokens, top_k], floating point.
        experts: ids from 0 to experts - 1 are valid.

    Returns:
        ids (shape and dtype of `topk_ids`), weights (shape and dtype of `topk_weights`), and used [tokens, 1]: False
        for a token without any valid id. A valid entry keeps its id and weight; an invalid one gets the weight 0 and
        the largest valid id of its token, or, where the token has none, the nearest valid id to that of token 0.
    """
    if topk_ids.is_cuda:
        from . import routing_ids_triton

        return routing_ids_triton.sanitise(topk_ids, topk_weights, experts)
    return sanitise_plainly(topk_ids, topk_weights, experts)


def sanitise_plainly(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sanitise` in plain PyTorch: the reference for the kernel, and what runs without a card."""
    import torch

    if topk_ids.numel() == 0:
        return topk_ids, topk_weights, topk_ids.new_zeros((topk_ids.shape[0], 1), dtype=torch.bool)
    ids = topk_ids.to(torch.int64)
    valid = (ids >= 0) & (ids < experts)
    used = valid.any(dim=1, keepdim=True)
    own = torch.where(valid, ids, -1).amax(dim=1, keepdim=True)
    fallback = torch.where(used, own, ids[:1].clamp(0, experts - 1))
    new_ids = torch.where(valid, ids, fallback).to(topk_ids.dtype)
    return new_ids, torch.where(valid, topk_weights, torch.zeros_like(topk_weights)), used


def _run(original: Any) -> Any:
    arguments = Arguments(original)

    @functools.wraps(original)
    def run_cutlass_moe_fp8(*args: Any, **kwargs: Any) -> Any:
        def given(name: str) -> Any:
            return arguments.get(name, args, kwargs)

        ids, weights = given("topk_ids"), given("topk_weights")
        if given("use_batched_format") or weights is None or ids.numel() == 0:
            return original(*args, **kwargs)
        ids, weights, used = sanitise(ids, weights, _experts(given))
        new = {"topk_ids": ids, "topk_weights": weights} | _without_unused_rows(given, used)
        args, kwargs = arguments.replaced(args, kwargs, new)
        if full_step_probe.active is not None:
            full_step_probe.active.saw_ids(ids, _experts(given))
        return original(*args, **kwargs)

    return run_cutlass_moe_fp8


def _apply(original: Any) -> Any:
    arguments = Arguments(original)

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> Any:
        def given(name: str) -> Any:
            return arguments.get(name, args, kwargs)

        ids, weights = given("topk_ids"), given("topk_weights")
        if ids.dim() != 2 or given("hidden_states").dim() != 2 or ids.numel() == 0:
            return original(*args, **kwargs)
        new_ids, new_weights, used = sanitise(ids, weights, _experts(given))
        new = {"topk_ids": new_ids} | _without_unused_rows(given, used)
        new_args, new_kwargs = arguments.replaced(args, kwargs, new)
        if full_step_probe.active is not None:
            full_step_probe.active.saw_ids(new_ids, _experts(given))
        result = original(*new_args, **new_kwargs)
        if given("apply_router_weight_on_input"):
            output = given("output")
            output.view(ids.numel(), -1).masked_fill_((new_ids != ids).view(-1, 1), 0)
        else:
            weights.copy_(new_weights)  # the caller multiplies by its own tensor after this returns
        return result

    return apply


def _experts(given: Any) -> int:
    expert_map = given("expert_map")
    return int(given("global_num_experts") if expert_map is None else expert_map.shape[0])


def _without_unused_rows(given: Any, used: torch.Tensor) -> dict[str, torch.Tensor]:
    """A token without a valid id computes with the scale 0, so that garbage in it cannot become inf or NaN."""
    scales = given("a1q_scale")
    if scales is None or scales.dim() != 2 or scales.shape != used.shape:
        return {}
    return {"a1q_scale": scales.where(used, scales.new_zeros(()))}
