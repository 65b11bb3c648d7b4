"""A MoE layer as the generations of vLLM call it, with functions of our own: what they compute is the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from vllm_glm_patch.moe.generators import Inputs, make_inputs
from vllm_glm_patch.moe.problem import Problem
from vllm_glm_patch.moe.reference import fused_moe

PROBLEM = Problem(9, 96, 40, 8, 8, 2)


class CutlassExpertsFp8:
    """The name is what counts."""


class MoEPrepareAndFinalizeNoEP:
    """Up to 0.16.0."""


class MoEPrepareAndFinalizeNoDPEPModular:
    """From 0.17.0 on."""


@dataclass
class Layer:
    """A layer, its inputs, and how often vLLM's kernel was called and with how many tokens."""

    inputs: Inputs
    kernel: Any
    seen: list[int] = field(default_factory=list)
    spoil: Any = None
    """Where set, takes the result of vLLM's kernel and gives another."""

    def theirs(self, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, expert_map: Any) -> torch.Tensor:
        self.seen.append(hidden_states.shape[0])
        made = fused_moe(hidden_states, w1, w2, self.inputs.w13_scale, self.inputs.w2_scale, topk_weights, topk_ids,
                         expert_map=expert_map).to(torch.bfloat16)  # fmt: skip
        return self.spoil(made) if self.spoil else made

    def want(self, **change: Any) -> torch.Tensor:
        """The float64 result of the layer's own inputs, or of others."""
        inputs = replace(self.inputs, **change)
        return fused_moe(*inputs.positional(), expert_map=inputs.expert_map)


def layer(problem: Problem = PROBLEM, seed: int = 1, prepare: Any = MoEPrepareAndFinalizeNoDPEPModular) -> Layer:
    """A layer that can be served; scales are [experts, channels, 1] as vLLM has them."""
    inputs = make_inputs(problem, seed)
    experts = CutlassExpertsFp8()
    experts.quant_config = SimpleNamespace(  # type: ignore[attr-defined]
        w1_scale=inputs.w13_scale[..., None], w2_scale=inputs.w2_scale[..., None], quant_dtype=torch.float8_e4m3fn,
        per_act_token_quant=True, per_out_ch_quant=True, block_shape=None, a1_scale=None, a2_scale=None, w1_bias=None,
        w2_bias=None, w1_zp=None, w2_zp=None, g1_alphas=None, g2_alphas=None,
    )  # fmt: skip
    return Layer(inputs, SimpleNamespace(prepare_finalize=prepare(), fused_experts=experts))


def old_forward(of: Layer) -> Any:
    """FusedMoEModularKernel.forward up to 0.10.2: the scales are arguments."""

    def forward(self, hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu", global_num_experts=-1,
                expert_map=None, w1_scale=None, w2_scale=None, w1_zp=None, w2_zp=None, a1_scale=None, a2_scale=None,
                apply_router_weight_on_input=False):  # type: ignore[no-untyped-def]  # fmt: skip
        return of.theirs(hidden_states, w1, w2, topk_weights, topk_ids, expert_map)

    return forward


def middle_forward(of: Layer) -> Any:
    """FusedMoEModularKernel.forward from 0.11.0 to 0.16.0; it may work in place."""

    def forward(self, hidden_states, w1, w2, topk_weights, topk_ids, inplace=False, activation="silu", global_num_experts=-1,
                expert_map=None, apply_router_weight_on_input=False):  # type: ignore[no-untyped-def]  # fmt: skip
        made = of.theirs(hidden_states, w1, w2, topk_weights, topk_ids, expert_map)
        return hidden_states.copy_(made) if inplace else made

    return forward


def new_apply(of: Layer) -> Any:
    """FusedMoEKernel.apply from 0.17.0 on."""

    def apply(self, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
              apply_router_weight_on_input, shared_experts=None, shared_experts_input=None):  # type: ignore[no-untyped-def]  # fmt: skip
        return of.theirs(hidden_states, w1, w2, topk_weights, topk_ids, expert_map)

    return apply


def call_old(wrapped: Any, of: Layer, **change: Any) -> Any:
    """As cutlass_moe_fp8 of 0.10.x calls it."""
    i = replace(of.inputs, **change)
    return wrapped(of.kernel, i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, False, "silu", 8, i.expert_map,
                   i.w13_scale[..., None], i.w2_scale[..., None], a1_scale=None, a2_scale=None)  # fmt: skip


def call_middle(wrapped: Any, of: Layer, **change: Any) -> Any:
    """As the quant method of 0.14.0 calls it, in place."""
    i = replace(of.inputs, **change)
    return wrapped(of.kernel, i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, inplace=True, activation="silu",
                   global_num_experts=8, expert_map=i.expert_map, apply_router_weight_on_input=False)  # fmt: skip


def call_new(wrapped: Any, of: Layer, options: dict[str, Any] | None = None, **change: Any) -> Any:
    """As the quant method of 0.17.0 and later calls it."""
    i = replace(of.inputs, **change)
    passed = {"activation": SimpleNamespace(value="silu"), "global_num_experts": 8, "expert_map": i.expert_map,
              "apply_router_weight_on_input": False, **(options or {})}  # fmt: skip
    return wrapped(of.kernel, i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, **passed)


GENERATIONS = {
    "0.10": (old_forward, call_old, MoEPrepareAndFinalizeNoEP),
    "0.14": (middle_forward, call_middle, MoEPrepareAndFinalizeNoEP),
    "0.26": (new_apply, call_new, MoEPrepareAndFinalizeNoDPEPModular),
}
