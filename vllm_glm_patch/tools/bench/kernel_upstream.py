"""The fused MoE of the installed vLLM for this scheme, callable beside ours: CUTLASS, Triton, Triton with its H200 table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import vllm_moe
from ..vllm_moe import FUSED_MOE, NotInThisVllm

if TYPE_CHECKING:
    import torch

    from vllm_glm_patch.moe.generators import Inputs

NAMES = ("cutlass", "triton", "triton_tuned")
_DTYPE = "fp8_w8a8"
_CARD_OF_THE_TABLE = "NVIDIA_H200"

Call = Callable[[], Any]
Builder = Callable[["Inputs", "torch.Tensor"], Call]


def cutlass(inputs: Inputs, space: torch.Tensor) -> Call:
    """The grouped GEMMs of CUTLASS: by the function that takes bf16 tokens where there is one (0.10 to 0.13), else by the
    one that takes quantised tokens, with the quantisation before it.

    Args:
        space: bf16, at least 2 · pairs · max(hidden, 2 · intermediate) elements.
    """
    module = _first_module(vllm_moe.CUTLASS)
    layer = _layer(inputs)
    if hasattr(module, "cutlass_moe_fp8"):
        return vllm_moe.cutlass_moe_fp8(module.cutlass_moe_fp8, layer)
    run = vllm_moe.attribute(module, "run_cutlass_moe_fp8")
    width = vllm_moe.workspace_width(inputs.problem)
    spaces = space[: 2 * inputs.problem.pairs * width].view(2, inputs.problem.pairs, width)
    return vllm_moe.run_cutlass_moe_fp8(run, layer, spaces[0], spaces[1])


def triton(inputs: Inputs, space: torch.Tensor) -> Call:
    """fused_experts, with the tiles that this vLLM chooses on this card."""
    return _fused_experts(inputs)


def triton_tuned(inputs: Inputs, space: torch.Tensor) -> Call:
    """fused_experts with the tiles of vLLM's table for the H200, whatever the card."""
    module = vllm_moe.module(FUSED_MOE)
    p = inputs.problem
    file = table_of(Path(str(module.__file__)).parent, p.experts, p.intermediate_size)
    config = nearest(json.loads(file.read_text()), p.tokens)
    call = _fused_experts(inputs)
    override = vllm_moe.attribute(module, "override_config")

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
    function = vllm_moe.attribute(vllm_moe.module(f"{FUSED_MOE}.fused_moe"), "fused_experts")
    return vllm_moe.fused_experts(function, _layer(inputs))


def _layer(inputs: Inputs) -> vllm_moe.Layer:
    return vllm_moe.Layer(
        inputs.problem, inputs.hidden_states, inputs.w13, inputs.w2, inputs.w13_scale.unsqueeze(-1),
        inputs.w2_scale.unsqueeze(-1), inputs.topk_weights, inputs.topk_ids, inputs.expert_map,
    )  # fmt: skip


def _first_module(names: tuple[str, ...]) -> Any:
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    return vllm_moe.module(names[-1])
