"""config.json and generation_config.json, as transformers' Glm4MoeConfig and vLLM's compressed-tensors read them."""

from __future__ import annotations

from typing import Any

from vllm_glm_patch.tools.model.spec import ModelSpec
from vllm_glm_patch.tools.model.vocabulary import end_ids


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """The content of config.json."""
    ends = end_ids(spec.vocab_size)
    config: dict[str, Any] = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": ends,
        "first_k_dense_replace": spec.num_dense_layers,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "moe_intermediate_size": spec.moe_intermediate_size,
        "n_group": 1,
        "n_routed_experts": spec.num_experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": spec.num_heads,
        "num_experts_per_tok": spec.top_k,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "num_nextn_predict_layers": 0,
        "pad_token_id": ends[0],
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": spec.vocab_size,
    }
    if spec.weight_format == "fp8":
        config["quantization_config"] = _quantization(spec)
    return config


def generation_config_of(spec: ModelSpec) -> dict[str, Any]:
    """The content of generation_config.json: what ends an answer, and no sampling defaults."""
    ends = end_ids(spec.vocab_size)
    return {"eos_token_id": ends, "pad_token_id": ends[0]}


def _quantization(spec: ModelSpec) -> dict[str, Any]:
    """compressed-tensors: E4M3 weights with a scale a channel, activations scaled per token as they come."""
    moe_layers = range(spec.num_dense_layers, spec.num_layers)
    shared = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "float-quantized",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in moe_layers)],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**shared, "strategy": "channel", "dynamic": False, "observer": "minmax"},
                "input_activations": {**shared, "strategy": "token", "dynamic": True, "observer": None},
                "output_activations": None,
            }
        },
    }
