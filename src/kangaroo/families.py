"""Families of models: which are run exactly, and what their configurations say of layers and context."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kangaroo.errors import ModelError

# Families whose layers are driven exactly by one loop (embedding, layers, final norm, head). Others must prove it.
FAMILIES = frozenset(
    """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 smollm3 granite
    starcoder2 cohere cohere2 stablelm helium glm glm4 nemotron exaone4 ministral seed_oss apertus arcee
    ernie4_5 mixtral qwen2_moe qwen3_moe gpt_oss deepseek_v3
    """.split()  # noqa: SIM905 (a list of 33 would take 33 lines)
)
LEAST_CONTEXT = 8
"""Tokens that a model must be able to see to be tried at all."""
OWN = ("sdpa", "eager")
"""Implementations of transformers that take masks of any kind, and that ours can stand in for."""
FULL, SLIDING = "full_attention", "sliding_attention"
# Families without layer types that look through `sliding_window` in every layer.
WINDOWED_THROUGHOUT = frozenset({"mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"})
LIKE_LLAMA = {"llama", "mistral", "qwen2"}
"""Families whose layers are Llama's, but for biases and windows."""
# Families that rotate keys and queries in their sliding layers only: an adapter needs a layer that knows positions.
ROTARY_IN_SLIDING_LAYERS_ONLY = frozenset({"cohere2", "exaone4"})


def refuse_what_cannot_work(model: PreTrainedModel, config: Any) -> None:
    """Raise ModelError unless a model is a stack of layers that can be driven one by one and takes any mask."""
    implementation = config._attn_implementation
    if implementation not in OWN:
        raise ModelError(
            f"attention implementation {implementation!r} cannot take tree masks; load the model with "
            'attn_implementation="sdpa" (or "eager")'
        )
    base = model.base_model
    parts = hasattr(base, "layers") and hasattr(base, "rotary_emb") and hasattr(model, "lm_head")
    if not parts or not (hasattr(base, "norm") or hasattr(base, "final_layernorm")):
        raise ModelError(
            f"{config.model_type} models are not supported: their decoder is not a plain stack of layers with "
            f"a rotary embedding. Supported families: {', '.join(sorted(FAMILIES))}"
        )


def keep_soft_cap(model: PreTrainedModel, config: Any) -> None:
    """Older transformers give models with a soft-cap an attention that leaves it out: take the other."""
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def layer_kinds(config: Any, layers: int) -> list[str]:
    """The attention type of every layer, as masks and rotary embeddings are chosen by it."""
    if kinds := getattr(config, "layer_types", None):
        unknown = set(kinds) - {FULL, SLIDING}
        if unknown:
            raise ModelError(f"layers of type {sorted(unknown)[0]!r} are not supported")
        return list(kinds[:layers])
    # Some checkpoints carry a window that their family ignores.
    windowed = config.model_type in WINDOWED_THROUGHOUT or config.model_type not in FAMILIES
    return [SLIDING if windowed and getattr(config, "sliding_window", None) else FULL] * layers


def context_limit(config: Any) -> int:
    """The longest text a model may see.

    Rotary embeddings that change with the length of the text (dynamic NTK, longrope) would make a row depend on its
    neighbours and on the past; such models are held to the length up to which they do not change.
    """
    limit = int(config.max_position_embeddings)
    parameters = getattr(config, "rope_parameters", None) or {}
    for settings in [parameters, *(v for v in parameters.values() if isinstance(v, dict))]:
        if settings.get("rope_type") == "longrope":
            limit = min(limit, int(settings.get("original_max_position_embeddings") or limit))
    if limit < LEAST_CONTEXT:
        raise ModelError(f"a model's context is at least {LEAST_CONTEXT} tokens, got {limit}; config.json is damaged")
    return limit


def scale_logits(config: Any, logits: Tensor) -> Tensor:
    """What a family does to the output of its head's matrix."""
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def embedding_scale(config: Any, plain: Tensor, scaled: Tensor) -> float:
    """By how much a family multiplies its embeddings [B, N, D], seen what its first layer gets.

    Raises ModelError if it does anything else.
    """
    # Granite scales by a setting; Gemma by sqrt(D), in the embedding module or after it depending on the release.
    root = torch.tensor(plain.shape[-1] ** 0.5, dtype=plain.dtype)
    for scale in (1.0, getattr(config, "embedding_multiplier", None), float(root)):
        if scale is not None and torch.allclose(plain * scale, scaled, rtol=1e-2, atol=1e-6):
            return float(scale)
    raise ModelError(f"{config.model_type} models are not supported: their embedding is not scaled uniformly")


def lengthened(config: Any, layers: int, added: int, kind: str) -> Any:
    """The configuration of a model of so many layers with some more, whose attention is of this kind."""
    longer = copy.deepcopy(config)
    longer.num_hidden_layers = layers + added
    if getattr(longer, "layer_types", None):
        longer.layer_types = [*longer.layer_types[:layers], *[kind] * added]
    for rope_switch in ("no_rope_layers", "no_rope_layer_interval"):
        if isinstance(getattr(longer, rope_switch, None), list):
            setattr(longer, rope_switch, [*getattr(longer, rope_switch)[:layers], *[1] * added])
    return longer
