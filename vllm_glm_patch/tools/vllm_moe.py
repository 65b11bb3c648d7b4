"""The fused MoE of the installed vLLM for this scheme, called from outside: what `verify` and `bench kernel` share.

vLLM's own functions are called as its own layers call them, in each release from 0.10.0 to 0.33.0. Their arguments differ, so
each is given by its name: what a release does not ask for is left out, and one that asks for something unknown is not called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import torch

    from ..moe.problem import Problem

FUSED_MOE = "vllm.model_executor.layers.fused_moe"
CUTLASS = (f"{FUSED_MOE}.experts.cutlass_moe", f"{FUSED_MOE}.cutlass_moe")  # from 0.20 on; before


class NotInThisVllm(Exception):
    """This release lacks the function, or asks for something that is not known here; the text says what."""


@dataclass(frozen=True)
class Layer:
    """What one call of the layer is given.

    Attributes:
        problem: its sizes.
        hidden_states: [tokens, hidden] bf16.
        w1: [experts, 2 · intermediate, hidden] FP8, gate before up.
        w2: [experts, hidden, intermediate] FP8.
        w1_scale: [experts, 2 · intermediate, 1] fp32.
        w2_scale: [experts, hidden, 1] fp32.
        topk_weights: [tokens, top_k] fp32.
        topk_ids: [tokens, top_k] int32.
        expert_map: [global experts] int32, or None.
    """

    problem: Problem
    hidden_states: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor
    w2_scale: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: Optional[torch.Tensor] = None


def cutlass_moe_fp8(function: Callable[..., Any], layer: Layer) -> Callable[[], torch.Tensor]:
    """A call of CUTLASS's grouped GEMMs by the function that takes bf16 tokens, which 0.10 to 0.13 have.

    Raises:
        NotInThisVllm: the function asks for something that is not known here.
    """
    known = _known(layer) | _strides(layer) | _quant_config(function, layer)
    known |= {"a": layer.hidden_states, "w1_q": layer.w1, "w2_q": layer.w2, "activation": "silu", "per_act_token": True}
    return _call(function, known, "cutlass_moe_fp8")


def run_cutlass_moe_fp8(
    function: Callable[..., Any], layer: Layer, workspace13: torch.Tensor, workspace2: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A call of CUTLASS's grouped GEMMs by the function that takes quantised tokens, with the quantisation before it.

    Up to 0.10.1.1 its result is not yet reduced over the experts of a token, so there `cutlass_moe_fp8` is the layer.

    Args:
        function: vLLM's.
        layer: what it is given.
        workspace13: [pairs, workspace_width] bf16; contents do not matter.
        workspace2: another.

    Raises:
        NotInThisVllm: the function asks for something that is not known here, or vLLM cannot quantise.
    """
    import torch

    ops = module("vllm._custom_ops")
    output = torch.empty_like(layer.hidden_states)
    known = {
        **_known(layer),
        **_strides(layer),
        "output": output,
        "workspace13": workspace13,
        "workspace2": workspace2,
        "expert_num_tokens": None,
        "out_dtype": torch.bfloat16,
        "per_act_token": True,
        "per_out_ch": True,
        "use_batched_format": False,
        "activation": _silu(),
        "activation_callable": swiglu,
        "permute_scratch": _scratch(layer),
    }
    what = "run_cutlass_moe_fp8"
    check_by_name(function, {*known, "a1q_scale"}, what)

    def call() -> torch.Tensor:
        quantised, scales = ops.scaled_fp8_quant(layer.hidden_states, use_per_token_if_dynamic=True)
        call_by_name(function, {**known, "hidden_states": quantised, "a1q_scale": scales}, what)
        return output

    return call


def workspace_width(problem: Problem) -> int:
    """Elements that one (token, expert) pair needs in each workspace of CUTLASS."""
    return max(problem.hidden_size, 2 * problem.intermediate_size)


def fused_experts(function: Callable[..., Any], layer: Layer) -> Callable[[], torch.Tensor]:
    """A call of vLLM's Triton kernels.

    Raises:
        NotInThisVllm: the function asks for something that is not known here.
    """
    known = _known(layer) | _quant_config(function, layer) | {"use_fp8_w8a8": True, "per_channel_quant": True}
    return _call(function, known, "fused_experts")


def swiglu(out: torch.Tensor, both: torch.Tensor) -> None:
    """SwiGLU by vLLM's kernel.

    Args:
        out: [rows, width] bf16, gets the result.
        both: [rows, 2 · width] bf16, gate before up.
    """
    import torch

    torch.ops._C.silu_and_mul(out, both)


def strides(experts: int, value: int, device: torch.device | str) -> torch.Tensor:
    """[experts] int64: how many elements lie between two rows, as CUTLASS's grouped GEMM asks for it."""
    import torch

    return torch.full((experts,), value, device=device, dtype=torch.int64)


def call_by_name(function: Callable[..., Any], known: Mapping[str, Any], what: str) -> Any:
    """Call a function with those of the known arguments that it takes.

    Raises:
        NotInThisVllm: it needs one that is not known.
    """
    taken = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in known:
            taken[name] = known[name]
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            raise NotInThisVllm(f"{what} of this vLLM asks for {name!r}, which is not known here")
    return function(**taken)


def check_by_name(function: Callable[..., Any], known: set[str], what: str) -> None:
    """Raise NotInThisVllm where `call_by_name` would, without a call."""
    call_by_name(_with_signature_of(function), dict.fromkeys(known), what)


def module(name: str) -> Any:
    """One of vLLM's modules.

    Raises:
        NotInThisVllm: it cannot be imported.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise NotInThisVllm(f"{name} cannot be imported: {error}") from error


def attribute(module: Any, name: str) -> Any:
    """What a module has under a name.

    Raises:
        NotInThisVllm: it has nothing there.
    """
    try:
        return getattr(module, name)
    except AttributeError:
        raise NotInThisVllm(f"{module.__name__} has no {name}") from None


def _call(function: Callable[..., Any], known: dict[str, Any], what: str) -> Callable[[], Any]:
    check_by_name(function, set(known), what)
    return lambda: call_by_name(function, known, what)


def _with_signature_of(function: Callable[..., Any]) -> Callable[..., None]:
    def nothing(**_: Any) -> None:
        return None

    nothing.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return nothing


def _known(layer: Layer) -> dict[str, Any]:
    """What any of the functions may ask for, by its name."""
    return {
        "hidden_states": layer.hidden_states,
        "w1": layer.w1,
        "w2": layer.w2,
        "w1_scale": layer.w1_scale,
        "w2_scale": layer.w2_scale,
        "a1_scale": None,
        "a2_scale": None,
        "topk_weights": layer.topk_weights,
        "topk_ids": layer.topk_ids,
        "global_num_experts": layer.problem.global_experts,
        "expert_map": layer.expert_map,
    }


def _strides(layer: Layer) -> dict[str, Any]:
    p, device = layer.problem, layer.hidden_states.device
    return {
        "ab_strides1": strides(p.experts, p.hidden_size, device),
        "ab_strides2": strides(p.experts, p.intermediate_size, device),
        "c_strides1": strides(p.experts, 2 * p.intermediate_size, device),
        "c_strides2": strides(p.experts, p.hidden_size, device),
    }


def _quant_config(function: Callable[..., Any], layer: Layer) -> dict[str, Any]:
    """The quantisation as one argument, where a function takes it, which is from 0.11 on."""
    if "quant_config" not in inspect.signature(function).parameters:
        return {}
    make = attribute(module(f"{FUSED_MOE}.config"), "fp8_w8a8_moe_quant_config")
    known: dict[str, Any] = {"w1_scale": layer.w1_scale, "w2_scale": layer.w2_scale}
    known |= {"per_act_token_quant": True, "per_out_ch_quant": True}
    return {"quant_config": call_by_name(make, known, "fp8_w8a8_moe_quant_config")}


def _silu() -> Any:
    try:
        return import_module(f"{FUSED_MOE}.activation").MoEActivation.SILU
    except (ImportError, AttributeError):
        return "silu"


def _scratch(layer: Layer) -> Any:
    """What vLLM keeps between calls from 0.23 on, made anew; None before."""
    try:
        make = import_module(f"{FUSED_MOE}.moe_permute_unpermute").MoEPermuteScratch
    except (ImportError, AttributeError):
        return None
    p = layer.problem
    known = {"max_num_tokens": p.tokens, "topk": p.top_k, "num_experts": p.global_experts, "num_local_experts": p.experts}
    return call_by_name(make, {**known, "device": layer.hidden_states.device}, "MoEPermuteScratch")
