"""Calls vLLM's MoE from outside, as `verify`, `bench kernel` and tests/gpu do, over stand-ins with one release's signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tools.matrix_source import Record, signature
from vllm_glm_patch.moe.generators import make_inputs
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.tools import vllm_moe

PROBLEM = Problem(4, 32, 16, 8, 8, 2)
Received = list[tuple[str, dict[str, Any]]]


@contextmanager
def stand_in(record: Record) -> Iterator[Received]:
    """vLLM as this release has it, of `matrix_source.ENTRIES` only; what each was called with comes in the list."""
    received: Received = []
    modules: dict[str, Any] = {"vllm": _module("vllm")}
    for name, parameters in record.entries.items():
        declared, body = signature(parameters), _BODIES[name]

        def function(*args: Any, _name: str = name, _as: Any = declared, _do: Any = body, **kwargs: Any) -> Any:
            bound = _as.bind(*args, **kwargs)
            bound.apply_defaults()
            received.append((_name, dict(bound.arguments)))
            return _do(dict(bound.arguments))

        function.__signature__ = declared  # type: ignore[attr-defined]
        parts = record.entry_modules[name].split(".")
        for count in range(1, len(parts) + 1):
            whole = ".".join(parts[:count])
            if whole not in modules:
                modules[whole] = _module(whole)
                setattr(modules[".".join(parts[: count - 1])], parts[count - 1], modules[whole])
        value = SimpleNamespace(SILU="SILU") if name == "MoEActivation" else function
        setattr(modules[record.entry_modules[name]], name, value)
    hidden = {name for name in sys.modules if name.split(".")[0] == "vllm"} - set(modules)
    with mock.patch.dict(sys.modules, {**dict.fromkeys(hidden), **modules}):
        yield received


def _module(name: str) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = []
    return made


def _reduced(given: dict[str, Any]) -> torch.Tensor:
    return torch.ones_like(given["a"] if "a" in given else given["hidden_states"])


_BODIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cutlass_moe_fp8": _reduced,
    "run_cutlass_moe_fp8": lambda given: given["output"].fill_(1),
    "fused_experts": _reduced,
    "fp8_w8a8_moe_quant_config": lambda given: SimpleNamespace(**given),
    "MoEActivation": lambda given: None,
    "MoEPermuteScratch": lambda given: SimpleNamespace(**given),
    "scaled_fp8_quant": lambda given: (
        given["input"].to(torch.float8_e4m3fn),
        torch.ones(len(given["input"]), 1) if given["use_per_token_if_dynamic"] else torch.ones(1),
    ),
}


def check(record: Record) -> tuple[str, ...]:
    """What is wrong with the ways in which this package calls this release from outside."""
    made = make_inputs(PROBLEM, 3)
    layer = vllm_moe.Layer(
        PROBLEM, made.hidden_states, made.w13, made.w2, made.w13_scale[..., None], made.w2_scale[..., None],
        made.topk_weights, made.topk_ids,
    )  # fmt: skip
    spaces = [torch.empty(PROBLEM.pairs, vllm_moe.workspace_width(PROBLEM), dtype=torch.bfloat16) for _ in range(2)]
    makers: dict[str, Callable[[Any], Callable[[], torch.Tensor]]] = {
        "cutlass_moe_fp8": lambda function: vllm_moe.cutlass_moe_fp8(function, layer),
        "run_cutlass_moe_fp8": lambda function: vllm_moe.run_cutlass_moe_fp8(function, layer, *spaces),
        "fused_experts": lambda function: vllm_moe.fused_experts(function, layer),
    }
    problems = [f"{name} is not defined where vllm_moe.py looks for it" for name in ("run_cutlass_moe_fp8", "fused_experts")
                if name not in record.entries]  # fmt: skip
    for name, make in makers.items():
        if name not in record.entries:
            continue
        with stand_in(record) as received:
            try:
                out = make(getattr(sys.modules[record.entry_modules[name]], name))()
                wrong = wrong_in(layer, name, received)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if not wrong and not (out.shape == layer.hidden_states.shape and bool((out == 1).all())):
                wrong = "its result does not come back"
        if wrong:
            problems.append(f"{name}, called from outside: {wrong}")
    return tuple(problems)


def wrong_in(layer: vllm_moe.Layer, name: str, received: Received) -> str:
    """What of a call of the layer did not arrive as it must; "" if all did."""
    calls = [given for called, given in received if called == name]
    if len(calls) != 1:
        return f"it is called {len(calls)} times"
    given = dict(calls[0])
    if (config := given.pop("quant_config", None)) is not None:  # the scheme as one argument
        given |= {key: value for key, value in vars(config).items() if key not in given}
    p, device = layer.problem, layer.hidden_states.device

    def full(value: int) -> torch.Tensor:
        return vllm_moe.strides(p.experts, value, device)

    expected: dict[str, Any] = {
        "a": layer.hidden_states, "w1_q": layer.w1, "w2_q": layer.w2, "w1": layer.w1, "w2": layer.w2,
        "w1_scale": layer.w1_scale, "w2_scale": layer.w2_scale, "topk_weights": layer.topk_weights, "topk_ids": layer.topk_ids,
        "ab_strides1": full(p.hidden_size), "ab_strides2": full(p.intermediate_size),
        "c_strides1": full(2 * p.intermediate_size), "c_strides2": full(p.hidden_size), "a1_scale": None, "a2_scale": None,
        "expert_map": layer.expert_map, "global_num_experts": p.global_experts, "per_act_token": True, "per_out_ch": True,
        "per_act_token_quant": True, "per_out_ch_quant": True, "use_batched_format": False, "use_fp8_w8a8": True,
        "per_channel_quant": True, "apply_router_weight_on_input": False, "out_dtype": torch.bfloat16,
        "expert_num_tokens": None,
    }  # fmt: skip
    for key in set(given) & set(expected):
        if not _same(given[key], expected[key]):
            return f"{key} arrives as {_short(given[key])}, not as {_short(expected[key])}"
    scheme = {"per_act_token", "per_act_token_quant", "per_channel_quant"} & set(given)
    scales = {"w1_scale", "w2_scale"} & set(given)
    if not scheme or len(scales) != 2:
        return f"it is not told the scheme and the scales: it gets {', '.join(given)}"
    if "activation" in given and str(given["activation"]) not in ("silu", "SILU", "computed"):
        return f"activation arrives as {given['activation']!r}"
    if "a1q_scale" in given and given["a1q_scale"].shape != (p.tokens, 1):
        return f"a1q_scale has the shape {list(given['a1q_scale'].shape)}, not one scale a token"
    return ""


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor) and isinstance(given, torch.Tensor):
        return given.shape == expected.shape and given.dtype == expected.dtype and torch.equal(_bits(given), _bits(expected))
    return given is expected or (not isinstance(expected, torch.Tensor) and given == expected)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _short(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
