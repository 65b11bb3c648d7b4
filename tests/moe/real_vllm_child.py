"""In a process of its own: the real classes of the installed vLLM, patched, with the reference in the place of its kernel.

Prints one line of JSON for test_real_vllm.py. Only what a CPU cannot run is replaced.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import fake_moe
import torch

import vllm_glm_patch
from vllm_glm_patch.fixes import fused_moe as fix
from vllm_glm_patch.moe.reference import relative_error


def main() -> None:
    seen: list[int] = []
    of = fake_moe.layer()
    inputs = of.inputs
    states = {"here": {p.id: (p.state, p.reason) for p in vllm_glm_patch.install().patches}["fused-moe"]}
    fix.has_card = lambda: True  # type: ignore[assignment]
    states["with a card"] = {p.id: (p.state, p.reason) for p in vllm_glm_patch.install().patches}["fused-moe"]
    kernels, kernel = real_kernel(inputs)

    def theirs(self: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, **others: Any) -> Any:
        seen.append(len(hidden_states))
        return of.theirs(hidden_states, w1, w2, topk_weights, topk_ids, others.get("expert_map"))

    kernels.FusedMoEKernelModularImpl.apply = theirs
    out = called(kernel, inputs)
    told = {
        "states": states,
        "wrapped": hasattr(kernels.FusedMoEKernel.apply, "__wrapped__"),
        "error": relative_error(out, of.want()),
        "seen": list(seen),
    }
    called(kernel, inputs)
    told["seen after the second call"] = list(seen)
    vllm_glm_patch.uninstall()
    told["wrapped after uninstall"] = hasattr(kernels.FusedMoEKernel.apply, "__wrapped__")
    print(json.dumps(told))


def real_kernel(inputs: Any) -> tuple[Any, Any]:
    """vLLM's module of modular kernels, and a kernel object of its real classes."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as kernels
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

    described = fp8_w8a8_moe_quant_config(
        w1_scale=inputs.w13_scale[..., None], w2_scale=inputs.w2_scale[..., None], per_act_token_quant=True,
        per_out_ch_quant=True,
    )  # fmt: skip
    experts = TritonExperts.__new__(TritonExperts)
    nothing = ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta")
    parallel = SimpleNamespace(dp_size=1, use_ep=False)
    config = SimpleNamespace(moe_parallel_config=parallel, **dict.fromkeys(nothing))
    kernels.FusedMoEExpertsModular.__init__(experts, config, described)
    return kernels, kernels.FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts)


def called(kernel: Any, inputs: Any) -> torch.Tensor:
    """The real FusedMoEKernel.apply, as the real quant method calls it."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    made: torch.Tensor = kernel.apply(
        inputs.hidden_states, inputs.w13, inputs.w2, inputs.topk_weights, inputs.topk_ids, activation=MoEActivation.SILU,
        global_num_experts=8, expert_map=None, apply_router_weight_on_input=False,
    )  # fmt: skip
    return made


if __name__ == "__main__":
    main()
