"""The sizes of a synthetic model, and the presets a user picks from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.model.vocabulary import SMALLEST_VOCAB

WEIGHT_FORMATS = ("bf16", "fp8")

# GLM-4.6 as its config.json gives it. A preset says only what differs.
_GLM_46: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_layers": 92,
    "num_dense_layers": 3,
    "num_heads": 96,
    "num_kv_heads": 8,
    "head_dim": 128,
    "num_experts": 160,
    "top_k": 8,
    "vocab_size": 151552,
    "max_position_embeddings": 202752,
    "weight_format": "fp8",
}


def _rank(tensor_parallel: int) -> dict[str, Any]:
    """What one rank holds: heads and widths divided, hidden size, experts and vocabulary whole."""
    divided = ("intermediate_size", "moe_intermediate_size", "num_heads", "num_kv_heads")
    return {**_GLM_46, **{name: _GLM_46[name] // tensor_parallel for name in divided}}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_GLM_46,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_layers": 4,
        "num_dense_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "num_experts": 16,
        "top_k": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 32768,
        "weight_format": "bf16",
    },
    "tp8-rank": _rank(8),
    "tp4-rank": _rank(4),
    "full": _GLM_46,
}


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of one model. `spec_for` makes it from a preset.

    Sizes are counts of elements. `intermediate_size` is the width of a dense layer,
    `moe_intermediate_size` that of one expert and of the shared expert.

    Raises:
        UserError: a size that vLLM or the FP8 kernels cannot take.
    """

    preset: str
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    vocab_size: int
    max_position_embeddings: int
    weight_format: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight_format not in WEIGHT_FORMATS:
            raise UserError(f"Weight format {self.weight_format!r} is not known. Use one of: {', '.join(WEIGHT_FORMATS)}.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_size", "_heads", "_experts", "_layers", "_dim", "top_k")):
                smallest = 0 if field.name == "num_dense_layers" else 1
                if value < smallest:
                    raise UserError(f"{field.name} is {value}. Give a number of at least {smallest}.")
        for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim"):
            if getattr(self, name) % 16:  # FP8 kernels read rows in blocks of 16 bytes
                raise UserError(f"{name} is {getattr(self, name)}. Give a multiple of 16.")
        if self.num_dense_layers >= self.num_layers:
            raise UserError(f"{self.num_dense_layers} dense layers of {self.num_layers} leave no MoE layer. Give more layers.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads. Give a multiple.")
        if self.top_k > self.num_experts:
            raise UserError(f"top_k is {self.top_k} of {self.num_experts} experts. Give at most that many.")
        if self.vocab_size < SMALLEST_VOCAB:
            raise UserError(
                f"A vocabulary of {self.vocab_size} does not hold 256 bytes and the special tokens. "
                f"Give at least {SMALLEST_VOCAB} (--vocab)."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"Seed {self.seed} is out of range. Give a number from 0 to 2^63 - 1.")


def spec_for(
    preset: str,
    *,
    layers: int | None = None,
    weight_format: str | None = None,
    seed: int = 0,
    vocab: int | None = None,
) -> ModelSpec:
    """Make the sizes of a preset, with what the user changes.

    Args:
        preset: a name in `PRESETS`.
        layers: layers in all. The dense ones come first, as many as the preset has, but one layer is always MoE.
        weight_format: "bf16" or "fp8"; None takes the preset's own ("bf16" for tiny, else "fp8").
        seed: the same seed and sizes give the same bytes.
        vocab: vocabulary size; None takes the preset's own.

    Raises:
        UserError: an unknown preset, or a size that does not work.

    Example:
        >>> spec_for("tp8-rank", layers=4).num_dense_layers
        3
    """
    if preset not in PRESETS:
        raise UserError(f"Preset {preset!r} is not known. Use one of: {', '.join(PRESETS)}.")
    values = dict(PRESETS[preset], preset=preset, seed=seed)
    if layers is not None:
        if layers < 1:
            raise UserError(f"--layers is {layers}. Give a number of at least 1.")
        values.update(num_layers=layers, num_dense_layers=min(values["num_dense_layers"], layers - 1))
    if weight_format is not None:
        values["weight_format"] = weight_format
    if vocab is not None:
        values["vocab_size"] = vocab
    return ModelSpec(**values)
