"""How evenly random tokens spread over the experts, measured on the written checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_glm_patch.tools.model.spec import ModelSpec
from vllm_glm_patch.tools.model.vocabulary import first_special

if TYPE_CHECKING:
    import torch

TOKENS = 8192  # the step this project is about
RMS_EPS = 1e-5
# A load without any pattern has sqrt((experts / top_k - 1) / tokens): 0.05 for 160 experts, top 8 and 8192 tokens.
# All tokens alike give sqrt(experts / top_k - 1): 1.7 for tiny, 4.4 for GLM-4.6.
_SPREAD_BELOW = 0.35


@dataclass(frozen=True)
class ExpertLoad:
    """How many tokens each expert of one layer gets.

    Attributes:
        tokens: tokens routed, each to `top_k` experts.
        experts: experts in all.
        top_k: experts a token.
        variation: coefficient of variation of the load: standard deviation over mean, 0 where all get the same.
        busiest: the load of the busiest expert over the mean.
        unused: experts that got no token.
    """

    tokens: int
    experts: int
    top_k: int
    variation: float
    busiest: float
    unused: int

    @property
    def is_spread(self) -> bool:
        """True where every expert works and none stands out."""
        return self.unused == 0 and self.variation < _SPREAD_BELOW


def route(hidden: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, top_k: int) -> torch.Tensor:
    """Choose experts as GLM-4.6 does with one expert group: the best of sigmoid(gate x) + e_score_correction_bias.

    Args:
        hidden: [tokens, hidden_size], after the layer's norm.
        gate: [experts, hidden_size].
        bias: [experts].
        top_k: experts a token.

    Returns:
        [tokens, top_k] int64 expert ids.
    """
    scores = (hidden.float() @ gate.float().T).sigmoid()
    return (scores + bias.float()).topk(top_k, dim=-1).indices


def load_of(ids: torch.Tensor, experts: int) -> ExpertLoad:
    """Count the tokens of each expert in [tokens, top_k] ids."""
    counts = ids.flatten().bincount(minlength=experts).double()
    mean = counts.mean()
    return ExpertLoad(
        tokens=ids.shape[0],
        experts=experts,
        top_k=ids.shape[1],
        variation=(counts.std(correction=0) / mean).item(),
        busiest=(counts.max() / mean).item(),
        unused=int((counts == 0).sum()),
    )


def measure(folder: Path, spec: ModelSpec, tokens: int = TOKENS) -> ExpertLoad:
    """Route random tokens with the gate of the first MoE layer of the checkpoint in `folder`.

    The gate gets what a token brings by itself: its embedding under the layer's norm. Attention and dense layers
    before it are left out, so this takes seconds for any size; the tests hold the whole model to the same bound.
    """
    import torch
    from safetensors import safe_open

    where = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]

    def read(name: str) -> torch.Tensor:
        with safe_open(str(folder / where[name]), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    generator = torch.Generator().manual_seed(spec.seed)
    ids = torch.randint(first_special(spec.vocab_size), (tokens,), generator=generator)
    embedding = "model.embed_tokens.weight"
    with safe_open(str(folder / where[embedding]), framework="pt") as file:
        rows = file.get_slice(embedding)
        hidden = torch.cat([rows[row : row + 1] for row in ids.tolist()]).float()
    layer = f"model.layers.{spec.num_dense_layers}"
    hidden *= (hidden.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
    hidden *= read(f"{layer}.post_attention_layernorm.weight").float()
    gate, bias = read(f"{layer}.mlp.gate.weight"), read(f"{layer}.mlp.gate.e_score_correction_bias")
    return load_of(route(hidden, gate, bias, spec.top_k), spec.num_experts)
