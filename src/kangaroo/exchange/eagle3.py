"""EAGLE-3 heads that others trained (Li et al. 2025): in the layout of the authors' release and in speculators'.

Both hold the same tensors. The release calls the layer `midlayer.` and keeps its settings at the top of config.json;
speculators calls it `layers.0.` and keeps the layer's settings in `transformer_layer_config`. `d2t` says of each token
of the draft vocabulary how far its id is below the target's, `t2d` which of the target's tokens it holds.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kangaroo.checks import shown
from kangaroo.drafters.eagle3.head import Eagle3Config, Eagle3Head, default_taps
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.exchange.checkpoint import Checkpoint, Rope, Table
from kangaroo.model import Target

MAPS = {"d2t": torch.int64, "t2d": torch.bool}
LAYERS = ("midlayer.", "layers.0.")
SAME_EMBEDDING = 2**-7
"""How far, relatively, a head's copy of the target's embedding may be off: two half precisions are as far apart."""


def is_eagle3(config: Table, names: Mapping[str, Tensor] | None = None) -> bool:
    """Whether a checkpoint says, or its tensors show, that it is such a head."""
    said = config.values.get("draft_vocab_size") is not None or config.values.get("speculators_model_type") is not None
    return said or (names is not None and "fc.weight" in names)


def make_head(found: Checkpoint, target: Target, taps: tuple[int, int, int] | None = None) -> Eagle3Head:
    """The head for this target, in the precision of the checkpoint.

    `taps` are the layer counts after which it reads the target's states, for heads that follow a rule of their own.
    Raises AdapterError for what belongs to another target, contradicts itself or is not known here.
    """
    older = found.tensors.get("fc.weight")
    if older is not None and tuple(older.shape) == (target.width, 2 * target.width):
        raise AdapterError(
            f"{found.path} is a head of EAGLE-1 or EAGLE-2, which read other features; only EAGLE-3 fits"
        )
    config = _read_config(found.config, target, taps or _taps(found.config, target))
    prefix = next((name for name in LAYERS if any(key.startswith(name) for key in found.tensors)), LAYERS[0])
    tensors = found.matched(_shapes(config, target, prefix, found.tensors.keys()), MAPS)
    named = {name.replace(prefix, "layer.", 1): value for name, value in tensors.items()}
    tokens = _draft_tokens(named.pop("d2t", None), named.pop("t2d", None), target, found.path)
    if tokens is not None:
        named["vocabulary.tokens"] = tokens
    embedding = named.pop("embed_tokens.weight", None)
    if embedding is not None and not _is_targets(embedding, target):
        named["embedding.weight"] = embedding
    chosen = replace(
        config, draft_vocabulary=0 if tokens is None else len(tokens), own_embedding="embedding.weight" in named
    )
    head = Eagle3Head(target, chosen)
    head.load_state_dict(named)
    kinds = {value.dtype for value in named.values() if value.is_floating_point()}
    return head.to(kinds.pop() if len(kinds) == 1 else torch.float32).eval()


def _read_config(top: Table, target: Target, taps: tuple[int, int, int]) -> Eagle3Config:
    """What the config says of the head, `draft_vocabulary` in any case. Raises AdapterError."""
    kind = top.get("speculators_model_type", str, "eagle3")
    if kind != "eagle3":
        raise AdapterError(f"{top.where}: a speculator of kind {shown(kind)}; only EAGLE-3 heads can be imported")
    layer = top.table("transformer_layer_config") if "transformer_layer_config" in top.values else top
    top.refuse({"norm_before_fc": False})
    layer.refuse({"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu", "mlp_bias": False})
    width, vocabulary = layer.get("hidden_size", int), layer.get("vocab_size", int)
    sizes = {"hidden_size": width, "target_hidden_size": top.get("target_hidden_size", int, width)}
    for name, size in sizes.items():
        if size != target.width:
            raise AdapterError(f"{top.where}: {name} is {size}, but the target has {target.width}")
    if vocabulary != target.vocab_size:
        raise AdapterError(f"{top.where}: vocab_size is {vocabulary}, but the target has {target.vocab_size}")
    heads = layer.get("num_attention_heads", int)
    rope = Rope.of(layer)
    try:
        return Eagle3Config(
            low=taps[0],
            middle=taps[1],
            high=taps[2],
            heads=heads,
            key_value_heads=layer.get("num_key_value_heads", int, heads),
            head_dim=layer.get("head_dim", int, max(1, width // heads)),
            intermediate_size=layer.get("intermediate_size", int),
            epsilon=layer.get("rms_norm_eps", float, 1e-6),
            draft_vocabulary=top.get("draft_vocab_size", int, vocabulary),
            norm_before_residual=top.get("norm_before_residual", bool, False),
            attention_bias=layer.get("attention_bias", bool, False),
            rope_base=rope.base,
            rope_type=rope.kind,  # type: ignore[arg-type]
            rope_factor=rope.factor,
            rope_low=rope.low,
            rope_high=rope.high,
            rope_context=rope.context,
        ).check_taps(target)
    except ConfigError as error:
        raise AdapterError(f"{top.where}: {error}") from None


def _taps(top: Table, target: Target) -> tuple[int, int, int]:
    """After how many layers the head reads: by the rule, unless the config says otherwise and what it means is plain.

    Some count layers, as speculators does, others name the last layer that has run, one less.
    """
    usual, name = default_taps(target.num_layers), "eagle_aux_hidden_state_layer_ids"
    said = top.values.get(name) or top.table("eagle_config").values.get(name)
    if not said or said in ([*usual], [count - 1 for count in usual]):
        return usual
    whole = isinstance(said, list) and len(said) == 3 and all(type(count) is int for count in said)
    if whole and top.values.get("speculators_model_type") is not None:
        return said[0], said[1], said[2]
    raise AdapterError(
        f"{top.where}: {name} is {shown(said)}, not the usual {[*usual]}; say after how many layers the head reads the "
        "target's states, as in --taps 2,16,29"
    )


def _shapes(config: Eagle3Config, target: Target, prefix: str, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The tensors that a head of this config has, and those that it may have if they are among `names`."""
    width, inner, drafted = target.width, config.intermediate_size, config.draft_vocabulary
    queries, keys = config.heads * config.head_dim, config.key_value_heads * config.head_dim
    projections = {"q_proj": (queries, 2 * width), "k_proj": (keys, 2 * width), "v_proj": (keys, 2 * width)}
    projections["o_proj"] = (width, queries)
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in projections.items()}
    if config.attention_bias:
        layer |= {f"self_attn.{name}.bias": shape[:1] for name, shape in projections.items()}
    layer |= {f"{name}.weight": (width,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    layer |= {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
    layer |= {"mlp.down_proj.weight": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {prefix + name: shape for name, shape in layer.items()}
    shapes |= {"fc.weight": (width, 3 * width), "norm.weight": (width,), "lm_head.weight": (drafted, width)}
    optional = {"d2t": (drafted,), "t2d": (target.vocab_size,), "embed_tokens.weight": (target.vocab_size, width)}
    needed = {"d2t"} if drafted < target.vocab_size else set[str]()
    return shapes | {name: shape for name, shape in optional.items() if name in names or name in needed}


def _draft_tokens(d2t: Tensor | None, t2d: Tensor | None, target: Target, path: Path) -> Tensor | None:
    """[n] the tokens that can be drafted; None for all of them. Raises AdapterError for maps that cannot be."""
    if d2t is None:
        return None
    tokens = d2t + torch.arange(len(d2t))
    if not (int(tokens[0]) >= 0 and int(tokens[-1]) < target.vocab_size and bool((tokens.diff() > 0).all())):
        raise AdapterError(f"{path} is damaged: 'd2t' does not lead to a rising list of the target's tokens")
    if t2d is not None and not torch.equal(t2d.nonzero()[:, 0], tokens):
        raise AdapterError(f"{path} is damaged: 'd2t' and 't2d' name different tokens")
    return None if len(tokens) == target.vocab_size else tokens


def _is_targets(embedding: Tensor, target: Target) -> bool:
    """Whether a head's embedding is a copy of the target's."""
    theirs = target.model.get_input_embeddings().weight
    if theirs.shape != embedding.shape or theirs.device.type == "meta":
        return False
    return torch.allclose(embedding.float(), theirs.detach().to("cpu").float(), rtol=SAME_EMBEDDING, atol=1e-6)
