"""Whether our kernel can serve a layer. Asked once a layer; every answer is a sentence for the log."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..moe.problem import Problem
from .modular_kernel import EXPERTS, MUST_BE_NONE, NEEDED, NEITHER, NEITHER_OF_LAYER, PREPARE, Call

if TYPE_CHECKING:
    import torch

    from ..moe.dispatch import Card

Option = Callable[[str], Any]
"""An argument of the call by name; None where the release's function does not take it."""


def why_not(call: Call, option: Option) -> str | None:
    """Why vLLM's own kernel must serve this layer; None where ours can."""
    for condition in (_device, _ranks, _kernel, _quantisation, _arithmetic, _tensors, _routing):
        reason = condition(call, option)
        if reason is not None:
            return reason
    return None


def problem_of(call: Call) -> Problem:
    """The sizes of a call that `why_not` has nothing against."""
    experts, hidden, width = call.w2.shape
    everywhere = experts if call.expert_map is None else call.expert_map.numel()
    return Problem(call.hidden_states.shape[0], hidden, width, experts, everywhere, call.topk_ids.shape[1])


def card_of(device: torch.device) -> Card | None:
    """The card of a device; None where our kernels cannot run. With TRITON_INTERPRET=1 a CPU stands in for one."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return None
    try:
        import triton  # noqa: F401

        from ..moe.dispatch import read_card
    except ImportError:
        return None
    return read_card(device.index if device.type == "cuda" else None)


def has_lora(call: Call) -> bool:
    """Whether LoRA is applied to the experts. vLLM may set that later than the first call, so it is asked at each."""
    return getattr(call.kernel.fused_experts, "_lora_context", None) is not None


def _device(call: Call, option: Option) -> str | None:
    card = card_of(call.hidden_states.device)
    if card is None:
        return f"the layer is on {call.hidden_states.device.type}, and the kernel needs a Hopper card and Triton"
    if card.capability != (9, 0):
        return f"{card.name} has compute capability {'.'.join(map(str, card.capability))}, and the kernel needs Hopper's 9.0"
    return None


def _ranks(call: Call, option: Option) -> str | None:
    prepare = type(call.kernel.prepare_finalize).__name__
    if prepare not in PREPARE:
        return f"tokens travel between ranks by {prepare}, an all-to-all that the kernel does not take part in"
    impl = getattr(call.kernel, "impl", call.kernel)
    if getattr(impl, "shared_experts", None) is not None:
        return "vLLM runs the shared experts inside its kernel here"
    return None


def _kernel(call: Call, option: Option) -> str | None:
    experts = call.kernel.fused_experts
    if type(experts).__name__ not in EXPERTS:
        return f"vLLM chose {type(experts).__name__}, which may lay out the weights in its own way"
    if has_lora(call):
        return "LoRA is applied to the experts"
    changed = [name for name in ("activation", "apply", "moe_sum") if callable(vars(experts).get(name))]
    if changed:
        return f"something else, likely LoRA on the experts, has replaced {', '.join(changed)} of this layer"
    return None


def _quantisation(call: Call, option: Option) -> str | None:
    import torch

    described = call.kernel.fused_experts.quant_config
    dtype, per_token, block = (getattr(described, name, None) for name in NEEDED)
    if dtype != torch.float8_e4m3fn or call.w13.dtype != dtype or call.w2.dtype != dtype:
        return f"the experts are quantised to {dtype}, with weights of {call.w13.dtype}, and the kernel is for float8_e4m3fn"
    if block is not None:
        return f"the scales are those of blocks of {block}, and the kernel is for one a channel"
    if not per_token:
        return "the activations are not quantised per token"
    extra = [
        name for name in (*MUST_BE_NONE, *NEITHER) if getattr(described, name, None) is not None or option(name) is not None
    ]
    layer = getattr(call.kernel.fused_experts, "moe_config", None)
    extra += [name for name in NEITHER_OF_LAYER if getattr(layer, name, None) is not None]
    if extra:
        return f"the layer has {', '.join(extra)}, which the kernel has no place for"
    return None


def _arithmetic(call: Call, option: Option) -> str | None:
    activation = option("activation")
    activation = getattr(activation, "value", activation)
    if activation != "silu":
        return f"the activation is {activation!r}, and the kernel is for 'silu' (SwiGLU)"
    if option("apply_router_weight_on_input"):
        return "the router's weight is applied to the tokens instead of the results"
    return None


def _tensors(call: Call, option: Option) -> str | None:
    import torch

    hidden, w13, w2 = call.hidden_states, call.w13, call.w2
    if hidden.dtype != torch.bfloat16 or hidden.dim() != 2:
        return f"the tokens are {hidden.dtype} {list(hidden.shape)}, and the kernel takes bfloat16 [tokens, hidden]"
    if w13.dim() != 3 or w2.dim() != 3:
        return f"the weights are {list(w13.shape)} and {list(w2.shape)}, and the kernel takes [experts, outputs, inputs]"
    experts, width = w2.shape[0], w2.shape[2]
    if list(w13.shape) != [experts, 2 * width, hidden.shape[1]] or w2.shape[1] != hidden.shape[1]:
        return f"the weights are {list(w13.shape)} and {list(w2.shape)} for tokens of {hidden.shape[1]}: no gated layer"
    if not all(w.stride(2) == 1 and w.stride(1) == w.shape[2] for w in (w13, w2)):
        return "the weights of an expert do not lie in one piece"
    for name, scale, rows in (("w13", call.w13_scale, 2 * width), ("w2", call.w2_scale, hidden.shape[1])):
        fits = isinstance(scale, torch.Tensor) and list(scale.shape) in ([experts, rows], [experts, rows, 1])
        if not fits or scale is None or scale.dtype != torch.float32:
            found = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, torch.Tensor) else repr(scale)
            return f"the scales of {name} are {found}, and the kernel takes one float32 a channel"
    return None


def _routing(call: Call, option: Option) -> str | None:
    import torch

    ids, weights, experts = call.topk_ids, call.topk_weights, call.w2.shape[0]
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64, torch.uint32) or ids.shape[1] < 1:
        return f"the expert ids are {ids.dtype} {list(ids.shape)}, and the kernel takes int32 [tokens, top_k]"
    if weights.shape != ids.shape or not weights.is_floating_point():
        return f"the routing weights are {weights.dtype} {list(weights.shape)}, unlike the ids"
    everywhere = option("global_num_experts")
    if call.expert_map is not None:
        if call.expert_map.dtype != torch.int32 or call.expert_map.dim() != 1:
            return f"the expert map is {call.expert_map.dtype} {list(call.expert_map.shape)}, and the kernel takes int32"
    elif everywhere not in (None, -1, experts):
        return f"ids count {everywhere} experts of which this rank has {experts}, and no map says which"
    return None
