"""vLLM 0.26.0's fused MoE for this scheme, callable beside ours: CUTLASS, Triton, Triton with its H200 table.

Calls its public functions as its own layers call them; loaded only when a vLLM is at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_glm_patch.moe.generators import Inputs

Call = Callable[[], torch.Tensor]


def cutlass(inputs: Inputs, space: torch.Tensor) -> Call:
    """Quantise, then run_cutlass_moe_fp8. space: bf16, at least 2 · pairs · max(hidden, 2 · intermediate) elements."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import run_cutlass_moe_fp8
    from vllm.model_executor.layers.fused_moe.moe_permute_unpermute import MoEPermuteScratch

    p = inputs.problem
    device = inputs.hidden_states.device
    wide = p.pairs * max(p.hidden_size, 2 * p.intermediate_size)
    work13, work2 = space[:wide].view(p.pairs, -1), space[wide : 2 * wide].view(p.pairs, -1)
    output = torch.empty_like(inputs.hidden_states)

    def strides(value: int) -> torch.Tensor:
        return torch.full((p.experts,), value, device=device, dtype=torch.int64)

    k, n, n2 = strides(p.hidden_size), strides(p.intermediate_size), strides(2 * p.intermediate_size)
    scratch = MoEPermuteScratch(
        max_num_tokens=p.tokens,
        topk=p.top_k,
        num_experts=p.global_experts,
        num_local_experts=p.experts,
        device=device,
    )

    def call() -> torch.Tensor:
        a, a_scale = ops.scaled_fp8_quant(inputs.hidden_states, use_per_token_if_dynamic=True)
        run_cutlass_moe_fp8(
            output,
            a,
            inputs.w13,
            inputs.w2,
            inputs.topk_ids,
            MoEActivation.SILU,
            p.global_experts,
            inputs.expert_map,
            inputs.w13_scale.unsqueeze(-1),
            inputs.w2_scale.unsqueeze(-1),
            a_scale,
            None,
            k,
            n,
            n2,
            k,
            work13,
            work2,
            None,
            torch.bfloat16,
            True,
            True,
            False,
            inputs.topk_weights,
            scratch,
        )
        return output

    return call


def triton_configs(inputs: Inputs) -> dict[str, dict[str, int]]:
    """`triton`: what vLLM would choose with no table; `triton_tuned`: its H200 table's entry, where there is one."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    p = inputs.problem
    found = {
        "triton": fused_moe.get_default_config(
            p.tokens, p.experts, p.intermediate_size, p.hidden_size, p.top_k, "fp8_w8a8", None
        )
    }
    name = f"E={p.experts},N={p.intermediate_size},device_name=NVIDIA_H200,dtype=fp8_w8a8.json"
    table = Path(fused_moe.__file__).parent / "configs" / name
    if table.exists():
        entries = {int(key): value for key, value in json.loads(table.read_text()).items() if key.isdigit()}
        found["triton_tuned"] = entries[min(entries, key=lambda count: abs(count - p.tokens))]
    return found


def triton(inputs: Inputs, config: dict[str, int]) -> Call:
    """fused_experts under a fixed configuration."""
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    quant = fp8_w8a8_moe_quant_config(
        w1_scale=inputs.w13_scale.unsqueeze(-1),
        w2_scale=inputs.w2_scale.unsqueeze(-1),
        per_act_token_quant=True,
        per_out_ch_quant=True,
    )

    def call() -> torch.Tensor:
        with override_config(config):
            return fused_experts(
                inputs.hidden_states,
                inputs.w13,
                inputs.w2,
                inputs.topk_weights,
                inputs.topk_ids,
                global_num_experts=inputs.problem.global_experts,
                expert_map=inputs.expert_map,
                quant_config=quant,
            )

    return call


def backends(inputs: Inputs, space: torch.Tensor) -> dict[str, Call]:
    """Every upstream backend that serves these inputs, by name."""
    found = {"cutlass": cutlass(inputs, space)}
    for name, config in triton_configs(inputs).items():
        found[name] = triton(inputs, config)
    return found
