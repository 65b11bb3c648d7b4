"""The tensors of a checkpoint: names, dtypes and shapes as in zai-org/GLM-4.6 and -FP8, and how each is filled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_glm_patch.tools.model.spec import ModelSpec

DTYPE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}

# Attention scores of random q and k have a deviation of 1, so a long prompt would be averaged away. Three times as
# sharp, an answer depends on its whole prompt and is still no chaos.
_QUERY_GAIN = 3.0
# Biases are common to all tokens; small ones keep tokens, and so their experts, apart.
_ATTENTION_BIAS_STD = 0.02
# Sigmoid scores differ by about 0.2; this moves few choices, and a router that forgets the bias shows.
_EXPERT_BIAS_STD = 0.005
# Logits with a deviation of 3: sampling at temperature 1 is varied, and the best token is clear of rounding.
_LOGIT_STD = 3.0


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint.

    Attributes:
        name: as in the checkpoint.
        dtype: as safetensors spells it: F8_E4M3, BF16 or F32.
        shape: rows are outputs.
        fill: "linear" (normal, each row with its own scale), "scale" (those scales), "normal" or "constant".
        value: the standard deviation; for "constant" the value.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: str
    value: float

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


def tensors_of(spec: ModelSpec) -> Iterator[Tensor]:
    """Every tensor of the model, in the order of the layers."""
    yield _plain("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size, 1.0)
    for layer in range(spec.num_layers):
        yield from _layer(spec, f"model.layers.{layer}", is_dense=layer < spec.num_dense_layers)
    yield _norm("model.norm.weight", spec.hidden_size)
    yield _plain("lm_head.weight", spec.vocab_size, spec.hidden_size, _LOGIT_STD / math.sqrt(spec.hidden_size))


def _layer(spec: ModelSpec, prefix: str, is_dense: bool) -> Iterator[Tensor]:
    hidden = spec.hidden_size
    # The 2 x layers sublayers add up to about the size of an embedding, so nothing grows with depth.
    to_residual = 2.0 / math.sqrt(2 * spec.num_layers)
    yield _norm(f"{prefix}.input_layernorm.weight", hidden)
    yield _norm(f"{prefix}.post_attention_layernorm.weight", hidden)
    for name, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
        rows = heads * spec.head_dim
        yield from _linear(spec, f"{prefix}.self_attn.{name}_proj", rows, hidden)
        yield Tensor(f"{prefix}.self_attn.{name}_proj.bias", "BF16", (rows,), "normal", _ATTENTION_BIAS_STD)
    yield Tensor(f"{prefix}.self_attn.q_norm.weight", "BF16", (spec.head_dim,), "constant", _QUERY_GAIN)
    yield _norm(f"{prefix}.self_attn.k_norm.weight", spec.head_dim)
    yield from _linear(spec, f"{prefix}.self_attn.o_proj", hidden, spec.num_heads * spec.head_dim, to_residual)
    if is_dense:
        yield from _mlp(spec, f"{prefix}.mlp", spec.intermediate_size, to_residual)
        return
    experts = spec.num_experts
    yield _plain(f"{prefix}.mlp.gate.weight", experts, hidden, 1 / math.sqrt(hidden))
    yield Tensor(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (experts,), "normal", _EXPERT_BIAS_STD)
    yield from _mlp(spec, f"{prefix}.mlp.shared_experts", spec.moe_intermediate_size, to_residual)
    for expert in range(experts):
        yield from _mlp(spec, f"{prefix}.mlp.experts.{expert}", spec.moe_intermediate_size, to_residual)


def _mlp(spec: ModelSpec, prefix: str, width: int, to_residual: float) -> Iterator[Tensor]:
    yield from _linear(spec, f"{prefix}.gate_proj", width, spec.hidden_size)
    yield from _linear(spec, f"{prefix}.up_proj", width, spec.hidden_size)
    yield from _linear(spec, f"{prefix}.down_proj", spec.hidden_size, width, to_residual)


def _linear(spec: ModelSpec, prefix: str, rows: int, columns: int, gain: float = 1.0) -> Iterator[Tensor]:
    """A linear layer that the FP8 checkpoint quantises: E4M3 with one bf16 scale a row."""
    std = gain / math.sqrt(columns)
    if spec.weight_format == "bf16":
        yield Tensor(f"{prefix}.weight", "BF16", (rows, columns), "linear", std)
        return
    yield Tensor(f"{prefix}.weight", "F8_E4M3", (rows, columns), "linear", std)
    yield Tensor(f"{prefix}.weight_scale", "BF16", (rows, 1), "scale", std)


def _plain(name: str, rows: int, columns: int, std: float) -> Tensor:
    """A matrix that stays bf16. Its rows are of one size: a gate with larger rows would favour their experts."""
    return Tensor(name, "BF16", (rows, columns), "normal", std)


def _norm(name: str, size: int) -> Tensor:
    return Tensor(name, "BF16", (size,), "constant", 1.0)
