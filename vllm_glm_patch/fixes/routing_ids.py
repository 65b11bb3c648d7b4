"""Lets an expert id that names no expert contribute zero (patch `routing-ids`).

An id outside 0 ... experts - 1 gets the weight 0 and points at an expert that the same token uses anyway, so no
kernel behind it sees it. Valid ids and weights pass as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..arguments import Arguments
from . import Context, Factory, full_step_probe

if TYPE_CHECKING:
    import torch


def replacements(context: Context) -> Mapping[str, Factory]:
    """Factories for the roles `run` (weights applied inside) and `apply` (weights applied by the caller, later)."""
    return {"run": _run, "apply": _apply}


class Routing(NamedTuple):
    """A routing that no kernel behind can stumble over."""

    ids: torch.Tensor
    """[tokens, top_k], all in range."""
    weights: torch.Tensor
    """[tokens, top_k], zero where the id was not in range."""
    scales: torch.Tensor | None
    """[tokens, 1], the scales of the tokens, zero for a token that had no valid id; None where none were given."""


def sanitise(topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int, scales: torch.Tensor | None = None) -> Routing:
    """Ids that are all in range, and weights that are zero where they were not. No host sync.

    Args:
        topk_ids: [tokens, top_k], int32, int64 or uint32.
        topk_weights: [tokens, top_k], floating point.
        experts: ids from 0 to experts - 1 are valid.
        scales: [tokens, 1] float32, the activation scales.

    Returns:
        A routing of the same shapes and dtypes. A valid entry keeps its id and weight; an invalid one gets the weight 0
        and the largest valid id of its token, or, where the token has none, the nearest valid id to that of token 0. A
        token without any valid id gets the scale 0, so that garbage in it cannot become inf or NaN.
    """
    if topk_ids.is_cuda:
        from . import routing_ids_triton

        return Routing(*routing_ids_triton.sanitise(topk_ids, topk_weights, experts, scales))
    return sanitise_plainly(topk_ids, topk_weights, experts, scales)


def sanitise_plainly(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int, scales: torch.Tensor | None = None
) -> Routing:
    """`sanitise` in plain PyTorch: the reference for the kernel, and what runs without a card."""
    import torch

    if topk_ids.numel() == 0:
        return Routing(topk_ids, topk_weights, scales)
    ids = topk_ids.to(torch.int64)
    valid = (ids >= 0) & (ids < experts)
    used = valid.any(dim=1, keepdim=True)
    own = torch.where(valid, ids, -1).amax(dim=1, keepdim=True)
    fallback = torch.where(used, own, ids[:1].clamp(0, experts - 1))
    new_ids = torch.where(valid, ids, fallback).to(topk_ids.dtype)
    new_weights = torch.where(valid, topk_weights, torch.zeros_like(topk_weights))
    return Routing(new_ids, new_weights, None if scales is None else scales.where(used, torch.zeros_like(scales)))


def _run(original: Any) -> Any:
    arguments = Arguments(original)

    @functools.wraps(original)
    def run_cutlass_moe_fp8(*args: Any, **kwargs: Any) -> Any:
        def given(name: str) -> Any:
            return arguments.get(name, args, kwargs)

        ids, weights = given("topk_ids"), given("topk_weights")
        if given("use_batched_format") or weights is None or ids.numel() == 0:
            return original(*args, **kwargs)
        routing, new = _sanitised(given)
        args, kwargs = arguments.replaced(args, kwargs, {**new, "topk_weights": routing.weights})
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
        routing, new = _sanitised(given)
        new_args, new_kwargs = arguments.replaced(args, kwargs, new)
        result = original(*new_args, **new_kwargs)
        if given("apply_router_weight_on_input"):
            output = given("output")
            output.view(ids.numel(), -1).masked_fill_((routing.ids != ids).view(-1, 1), 0)
        else:
            weights.copy_(routing.weights)  # the caller multiplies by its own tensor after this returns
        return result

    return apply


def _sanitised(given: Any) -> tuple[Routing, dict[str, torch.Tensor]]:
    """The routing of one call, and the arguments that take its ids and scales; a running warm-up sees the ids."""
    experts = _experts(given)
    routing = sanitise(given("topk_ids"), given("topk_weights"), experts, _scales(given))
    if full_step_probe.active is not None:
        full_step_probe.active.saw_ids(routing.ids, experts)
    scales = {} if routing.scales is None else {"a1q_scale": routing.scales}
    return routing, {"topk_ids": routing.ids, **scales}


def _experts(given: Any) -> int:
    expert_map = given("expert_map")
    return int(given("global_num_experts") if expert_map is None else expert_map.shape[0])


def _scales(given: Any) -> torch.Tensor | None:
    """The activation scales where there is one a token."""
    scales: torch.Tensor | None = given("a1q_scale")
    per_token = scales is not None and scales.shape == (given("topk_ids").shape[0], 1)
    return scales if per_token else None
