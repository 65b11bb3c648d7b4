"""Reads a model's configuration as the description that the synthetic checkpoint is made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_glm_patch.errors import UserError
from vllm_glm_patch.tools.model.spec import ModelSpec
from vllm_glm_patch.tools.model.tensors import Tensor, tensors_of

# Field of ModelSpec -> key of config.json.
_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_FIXED = {"model_type": "glm4_moe", "n_shared_experts": 1, "tie_word_embeddings": False}


def tensors_for(config: Any) -> Iterator[Tensor]:
    """Every tensor of the checkpoint that belongs to a Glm4MoeConfig, in the order of the layers.

    Raises:
        UserError: as `spec_from`.
    """
    leave_out = []
    if not getattr(config, "use_qk_norm", True):
        leave_out += [".q_norm.weight", ".k_norm.weight"]
    if not getattr(config, "attention_bias", True):
        leave_out += [".q_proj.bias", ".k_proj.bias", ".v_proj.bias"]
    return (tensor for tensor in tensors_of(spec_from(config)) if not tensor.name.endswith(tuple(leave_out)))


def spec_from(config: Any) -> ModelSpec:
    """The sizes and the weight format in a Glm4MoeConfig.

    Raises:
        UserError: the model is no GLM-4.5 or 4.6, lacks a size, or is quantised in a way that cannot be made.
    """
    for key, wanted in _FIXED.items():
        value = getattr(config, key, None)
        if value != wanted:
            raise UserError(
                f"Synthetic weights are made for {key} {wanted!r} only, and this model has {value!r}. "
                "Use the config.json of a GLM-4.6, or make one with `vllm-glm-patch model OUT --config-only`."
            )
    missing = [key for key in _KEYS.values() if not isinstance(getattr(config, key, None), int)]
    if missing:
        raise UserError(f"The model's configuration gives no number for {missing[0]}. Add it to config.json.")
    sizes = {field: getattr(config, key) for field, key in _KEYS.items()}
    return ModelSpec(preset="config.json", weight_format=_format_of(config), **sizes)


def _format_of(config: Any) -> str:
    given = getattr(config, "quantization_config", None)
    if given is None:
        return "bf16"
    method, groups = given.get("quant_method"), given.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    known = ("float", 8, "channel")
    if method == "compressed-tensors" and weights and all(_kind_of(entry) == known for entry in weights):
        return "fp8"
    found = ", ".join(str(_kind_of(entry)) for entry in weights) or "no groups"
    raise UserError(
        f"Synthetic weights are made in bf16 and in FP8 with a scale a channel (compressed-tensors), and this model has "
        f"{method} with {found}. Use the config.json of GLM-4.6 or GLM-4.6-FP8."
    )


def _kind_of(weights: dict[str, Any]) -> tuple[Any, Any, Any]:
    return weights.get("type"), weights.get("num_bits"), weights.get("strategy")
