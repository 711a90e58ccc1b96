"""Tiny random models of every family, in float64, with the shape of the real ones.

Layers from EXIT on are damped, so that what the first layers say is often, but not always, what the model says.
"""

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kangaroo.drafters.kangaroo.adapter import Adapter, AdapterConfig
from kangaroo.model import Target

VOCAB, WIDTH, LAYERS, EXIT, WINDOW = 97, 32, 5, 2, 5

_MIXED_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_WINDOWED: dict[str, Any] = {"sliding_window": WINDOW}
_MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": _MIXED_TYPES}
_QWEN: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# What a family needs beyond the common sizes for its special features to be small, present and on.
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": _WINDOWED,
    "starcoder2": _WINDOWED,
    "phi3": _WINDOWED,
    "mixtral": {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 8},
    "qwen2_moe": {**_QWEN, **_EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_EXPERTS, "num_local_experts": 4, "head_dim": 8, "use_sliding_window": True, **_WINDOWED},
    "gemma2": {**_MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_MIXED, "query_pre_attn_scalar": 8},
    "olmo3": _MIXED,
    "cohere2": {**_MIXED, "logit_scale": 0.5},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "exaone4": _MIXED,
    "ministral": _MIXED,
    "gpt_oss": {**_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 1], "use_sliding_window": False},
    "phi": {"qk_layernorm": True},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True},
    "olmo": {"clip_qkv": 0.8},
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
    },
}


def build(family: str, seed: int = 0, damping: float = 0.3, **changes: Any) -> PreTrainedModel:
    """A model of the family with random weights, float64, on the CPU."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = CONFIG_MAPPING[family](**{**common, **SPECIAL.get(family, {}), **changes})
    config._experts_implementation = "eager"  # the default, grouped matrix products, knows no float64
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    _randomise_ones_and_zeros(model)
    _damp(model, damping)
    return model


def _randomise_ones_and_zeros(model: PreTrainedModel) -> None:
    """Norms, biases and sinks start at constants, where a mistake in using them could hide."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def _damp(model: PreTrainedModel, factor: float) -> None:
    """Shrink what the layers from EXIT on add to the residual stream."""
    outputs = ("o_proj", "down_proj", "dense", "fc2", "c_proj")
    for layer in model.base_model.layers[EXIT:]:
        for name, parameter in layer.named_parameters():
            if any(part in outputs for part in name.split(".")):
                parameter.mul_(factor)
            if "post_" in name and "norm" in name:  # a norm after the block undoes what was shrunk before it
                offset = 1.0 if "gemma" in model.config.model_type else 0.0
                parameter.add_(offset).mul_(factor).sub_(offset)


@cache
def target(family: str) -> Target:
    """One shared Target per family: nothing changes it."""
    return Target(build(family))


def make_adapter(target: Target, exit_layer: int = EXIT, scale: float = 0.1, **config: Any) -> Adapter:
    """A random adapter whose attention says little, so that it agrees with the target about as often as early exit."""
    torch.manual_seed(1)
    adapter = Adapter(target, AdapterConfig(exit_layer=exit_layer, **config)).to(target.dtype)
    adapter.eval().requires_grad_(False)
    if adapter.vocabulary is not None:
        adapter.vocabulary.choose(torch.rand(target.vocab_size))
    for name, parameter in adapter.named_parameters():
        if "attention" in name and ("o_proj" in name or "dense" in name):
            parameter.mul_(scale)
    return adapter


@cache
def make_draft_model(target: Target) -> Target:
    """A model of its own that agrees with the target about as often as early exit: its deep layers say nothing."""
    model = copy.deepcopy(target.model)
    _damp(model, 0.0)
    return Target(model)
