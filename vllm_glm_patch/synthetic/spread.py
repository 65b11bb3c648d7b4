"""How evenly the first MoE gate of a filled model spreads random tokens, measured where the model is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm_glm_patch.synthetic.fills import made
from vllm_glm_patch.tools.model.routing import RMS_EPS, TOKENS, ExpertLoad, load_of, route
from vllm_glm_patch.tools.model.tensors import Tensor

_GATE, _BIAS = ".mlp.gate.weight", ".mlp.gate.e_score_correction_bias"
_NORM = ".post_attention_layernorm.weight"


@torch.no_grad()
def measure(parameters: Mapping[str, torch.Tensor], top_k: int, seed: int) -> ExpertLoad | None:
    """Route random tokens with the first gate among `parameters`; None where there is none on this rank.

    The gate gets tokens as random embeddings make them, under its layer's norm, as `tools.model.routing.measure` does.
    """
    gates = [name for name in parameters if name.endswith(_GATE)]  # vLLM builds layers in their order
    if not gates:
        return None
    layer = gates[0][: -len(_GATE)]
    gate, bias, norm = (parameters[layer + name] for name in (_GATE, _BIAS, _NORM))
    experts, hidden_size = gate.shape
    hidden = made(Tensor("random tokens", "F32", (TOKENS, hidden_size), "normal", 1.0), seed, gate.device)
    hidden *= (hidden.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
    hidden *= norm.float()
    return load_of(route(hidden, gate, bias, top_k), experts)
