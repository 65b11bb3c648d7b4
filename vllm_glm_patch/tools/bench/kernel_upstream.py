"""The fused MoE of the installed vLLM for this scheme, callable beside ours: CUTLASS, Triton, Triton with its H200 table.

vLLM's own functions are called as its own layers call them. Their arguments differ between releases, so each is given by
its name: what a release does not ask for is left out, and one that asks for something unknown is not measured.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vllm_glm_patch.moe.generators import Inputs

NAMES = ("cutlass", "triton", "triton_tuned")
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_CUTLASS = (f"{_FUSED_MOE}.experts.cutlass_moe", f"{_FUSED_MOE}.cutlass_moe")  # from 0.20 on; before
_DTYPE = "fp8_w8a8"
_CARD_OF_THE_TABLE = "NVIDIA_H200"

Call = Callable[[], Any]
Builder = Callable[["Inputs", "torch.Tensor"], Call]


class NotInThisVllm(Exception):
    """This release lacks the function, or asks for something that is not known here; the text says what."""


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


def cutlass(inputs: Inputs, space: torch.Tensor) -> Call:
    """The grouped GEMMs of CUTLASS: by the function that takes bf16 tokens where there is one (0.10 to 0.13), else by the
    one that takes quantised tokens, with the quantisation before it.

    Args:
        space: bf16, at least 2 · pairs · max(hidden, 2 · intermediate) elements.
    """
    import torch

    module = _first_module(_CUTLASS)
    p = inputs.problem
    known = _known(inputs)
    if hasattr(module, "cutlass_moe_fp8"):
        known |= {"a": inputs.hidden_states, "w1_q": inputs.w13, "w2_q": inputs.w2, "activation": "silu"}
        known |= {"per_act_token": True} | _quant_config(inputs)
        return lambda: call_by_name(module.cutlass_moe_fp8, known, "cutlass_moe_fp8")
    run = _attribute(module, "run_cutlass_moe_fp8")
    ops = import_module("vllm._custom_ops")
    wide = p.pairs * max(p.hidden_size, 2 * p.intermediate_size)
    output = torch.empty_like(inputs.hidden_states)
    known |= {
        "output": output,
        "workspace13": space[:wide].view(p.pairs, -1),
        "workspace2": space[wide : 2 * wide].view(p.pairs, -1),
        "expert_num_tokens": None,
        "out_dtype": torch.bfloat16,
        "per_act_token": True,
        "per_out_ch": True,
        "use_batched_format": False,
        "activation": _silu(),
        "activation_callable": lambda out, both: torch.ops._C.silu_and_mul(out, both),
        "permute_scratch": _scratch(inputs),
    }
    call_with_nothing_missing(run, {*known, "hidden_states", "a1q_scale"}, "run_cutlass_moe_fp8")

    def call() -> torch.Tensor:
        a, scale = ops.scaled_fp8_quant(inputs.hidden_states, use_per_token_if_dynamic=True)
        call_by_name(run, {**known, "hidden_states": a, "a1q_scale": scale}, "run_cutlass_moe_fp8")
        return output

    return call


def triton(inputs: Inputs, space: torch.Tensor) -> Call:
    """fused_experts, with the tiles that this vLLM chooses on this card."""
    return _fused_experts(inputs)


def triton_tuned(inputs: Inputs, space: torch.Tensor) -> Call:
    """fused_experts with the tiles of vLLM's table for the H200, whatever the card."""
    module = _module(_FUSED_MOE)
    p = inputs.problem
    file = table_of(Path(str(module.__file__)).parent, p.experts, p.intermediate_size)
    config = nearest(json.loads(file.read_text()), p.tokens)
    call = _fused_experts(inputs)
    override = _attribute(module, "override_config")

    def overridden() -> Any:
        with override(config):
            return call()

    return overridden


BUILDERS: dict[str, Builder] = {"cutlass": cutlass, "triton": triton, "triton_tuned": triton_tuned}


def table_of(folder: Path, experts: int, width: int) -> Path:
    """vLLM's table for the H200.

    Raises:
        NotInThisVllm: it has none for these sizes.
    """
    name = f"E={experts},N={width},device_name={_CARD_OF_THE_TABLE},dtype={_DTYPE}.json"
    if not (folder / "configs" / name).is_file():
        raise NotInThisVllm(f"this vLLM has no table {name}")
    return folder / "configs" / name


def nearest(table: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The entry of the token count nearest to this one, as vLLM chooses it."""
    entries = {int(key): value for key, value in table.items() if key.isdigit()}
    chosen: dict[str, Any] = entries[min(entries, key=lambda count: abs(count - tokens))]
    return chosen


def _fused_experts(inputs: Inputs) -> Call:
    module = _module(f"{_FUSED_MOE}.fused_moe")
    run = _attribute(module, "fused_experts")
    known = _known(inputs) | {"hidden_states": inputs.hidden_states, "use_fp8_w8a8": True, "per_channel_quant": True}
    known |= _quant_config(inputs)
    call_with_nothing_missing(run, set(known), "fused_experts")
    return lambda: call_by_name(run, known, "fused_experts")


def call_with_nothing_missing(function: Callable[..., Any], known: set[str], what: str) -> None:
    """Raise NotInThisVllm where `call_by_name` would, without a call."""
    call_by_name(_with_signature_of(function), dict.fromkeys(known), what)


def _with_signature_of(function: Callable[..., Any]) -> Callable[..., None]:
    def nothing(**_: Any) -> None:
        return None

    nothing.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return nothing


def _known(inputs: Inputs) -> dict[str, Any]:
    """What any of the functions may ask for, by its name; strides count elements of one row, an expert each."""
    import torch

    p = inputs.problem

    def strides(value: int) -> torch.Tensor:
        return torch.full((p.experts,), value, device=inputs.hidden_states.device, dtype=torch.int64)

    return {
        "w1": inputs.w13,
        "w2": inputs.w2,
        "w1_scale": inputs.w13_scale.unsqueeze(-1),
        "w2_scale": inputs.w2_scale.unsqueeze(-1),
        "a1_scale": None,
        "a2_scale": None,
        "topk_weights": inputs.topk_weights,
        "topk_ids": inputs.topk_ids,
        "global_num_experts": p.global_experts,
        "expert_map": inputs.expert_map,
        "ab_strides1": strides(p.hidden_size),
        "ab_strides2": strides(p.intermediate_size),
        "c_strides1": strides(2 * p.intermediate_size),
        "c_strides2": strides(p.hidden_size),
    }


def _quant_config(inputs: Inputs) -> dict[str, Any]:
    """The quantisation as one argument, from 0.11 on."""
    try:
        make = import_module(f"{_FUSED_MOE}.config").fp8_w8a8_moe_quant_config
    except (ImportError, AttributeError):
        return {}
    known: dict[str, Any] = {"w1_scale": inputs.w13_scale.unsqueeze(-1), "w2_scale": inputs.w2_scale.unsqueeze(-1)}
    known |= {"per_act_token_quant": True, "per_out_ch_quant": True}
    return {"quant_config": call_by_name(make, known, "fp8_w8a8_moe_quant_config")}


def _silu() -> Any:
    try:
        return import_module(f"{_FUSED_MOE}.activation").MoEActivation.SILU
    except ImportError:
        return "silu"


def _scratch(inputs: Inputs) -> Any:
    """What vLLM keeps between calls from 0.23 on; None before."""
    try:
        make = import_module(f"{_FUSED_MOE}.moe_permute_unpermute").MoEPermuteScratch
    except (ImportError, AttributeError):
        return None
    p = inputs.problem
    known = {"max_num_tokens": p.tokens, "topk": p.top_k, "num_experts": p.global_experts, "num_local_experts": p.experts}
    return call_by_name(make, {**known, "device": inputs.hidden_states.device}, "MoEPermuteScratch")


def _first_module(names: tuple[str, ...]) -> Any:
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return _module(names[-1])


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NotInThisVllm(f"{name} cannot be imported: {error}") from error


def _attribute(module: Any, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        raise NotInThisVllm(f"{module.__name__} has no {name}") from None
