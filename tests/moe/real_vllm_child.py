"""In a process of its own: the real classes of the installed vLLM, patched, with the reference in the place of its kernel.

Prints one line of JSON for test_real_vllm.py. Only what a CPU cannot run is replaced.
"""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import fake_moe

import vllm_glm_patch
from vllm_glm_patch.fixes import fused_moe as fix
from vllm_glm_patch.moe.reference import relative_error


def main() -> None:
    seen: list[int] = []
    of = fake_moe.layer()
    states = {"here": {p.id: (p.state, p.reason) for p in vllm_glm_patch.install().patches}["fused-moe"]}
    fix.has_card = lambda: True  # type: ignore[assignment]
    states["with a card"] = {p.id: (p.state, p.reason) for p in vllm_glm_patch.install().patches}["fused-moe"]
    kernels = importlib.import_module("vllm.model_executor.layers.fused_moe.modular_kernel")
    old = hasattr(kernels, "FusedMoEModularKernel")
    owner, name, called = (
        (kernels.FusedMoEModularKernel, "forward", old_call(kernels, of, seen))
        if old
        else (kernels.FusedMoEKernel, "apply", new_call(kernels, of, seen))
    )
    told = {"vllm": vllm_glm_patch.status().vllm, "states": states, "wrapped": hasattr(vars(owner)[name], "__wrapped__")}
    told["error"] = relative_error(called(), of.want())
    told["seen"] = list(seen)
    called()
    told["seen after the second call"] = list(seen)
    vllm_glm_patch.uninstall()
    told["wrapped after uninstall"] = hasattr(vars(owner)[name], "__wrapped__")
    print(json.dumps(told))


def new_call(kernels: Any, of: Any, seen: list[int]) -> Any:
    """From 0.17.0 on: the real FusedMoEKernel with real experts, as the real quant method calls it."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

    def theirs(self: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, **others: Any) -> Any:
        seen.append(len(hidden_states))
        return of.theirs(hidden_states, w1, w2, topk_weights, topk_ids, others.get("expert_map"))

    i = of.inputs
    scales = {"w1_scale": i.w13_scale[..., None], "w2_scale": i.w2_scale[..., None]}
    described = fp8_w8a8_moe_quant_config(**scales, per_act_token_quant=True, per_out_ch_quant=True)
    nothing = ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta")
    config = SimpleNamespace(moe_parallel_config=SimpleNamespace(dp_size=1, use_ep=False), **dict.fromkeys(nothing))
    experts = TritonExperts.__new__(TritonExperts)
    kernels.FusedMoEExpertsModular.__init__(experts, config, described)
    kernel = kernels.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts)
    kernels.FusedMoEKernelModularImpl.apply = theirs
    return lambda: kernel.apply(
        i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, activation=MoEActivation.SILU, global_num_experts=8,
        expert_map=None, apply_router_weight_on_input=False,
    )  # fmt: skip


def old_call(kernels: Any, of: Any, seen: list[int]) -> Any:
    """0.10: the real cutlass_moe_fp8, which makes its modular kernel anew for each call."""
    from vllm.model_executor.layers.fused_moe.cutlass_moe import cutlass_moe_fp8
    from vllm.model_executor.layers.fused_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

    given: dict[str, Any] = {}

    def prepare(self: Any, tokens: Any, a1: Any, a2: Any, weights: Any, ids: Any, *others: Any) -> Any:
        seen.append(len(tokens))
        given.update(weights=weights, ids=ids)
        return tokens, None, None, None, None

    def compute(self: Any, **passed: Any) -> Any:
        return of.theirs(passed["a1"], passed["w1"], passed["w2"], given["weights"], given["ids"], passed["expert_map"])

    MoEPrepareAndFinalizeNoEP.prepare = prepare
    MoEPrepareAndFinalizeNoEP.finalize = lambda self, output, made, *others: output.copy_(made)
    kernels.FusedMoEModularKernel._maybe_chunk_fused_experts = compute
    i = of.inputs
    return lambda: cutlass_moe_fp8(
        i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, i.w13_scale[..., None], i.w2_scale[..., None],
        per_act_token=True, global_num_experts=8,
    )  # fmt: skip


if __name__ == "__main__":
    main()
