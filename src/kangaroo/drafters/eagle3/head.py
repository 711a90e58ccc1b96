"""The EAGLE-3 head: one decoder layer over the target's fused features and the next tokens (Li et al. 2025, 3.1).

    f_t = fc([h_low(t); h_middle(t); h_high(t)])                     features of a token that the target has run
    r = f_t,  n = norm_hidden(f_t)                                   some heads take r = n
    z = r + attention([norm_in(e(t + 1)); n]),  a_{t+1} = z + mlp(norm_mid(z))
    q(token t + 2) = softmax(lm_head(norm(a_{t+1})))

The token that is embedded stands one place after the one whose features are read. Where the target has not run that
one, a drafted token, the head's own output a takes the place of its features f. The rotary table, the norms, the head
to the vocabulary and the tokens it knows are the EAGLE-3 head's own; the embedding is the target's, unscaled, unless
the head brings one.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

from kangaroo.cache import KVCache, LayerShape
from kangaroo.drafters.draft_vocabulary import DraftTokens
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.rotary import RotaryTables
from kangaroo.tree import Placement, place_at
from kangaroo.weights import TrainedWeights
from kangaroo.window import CacheWindow, cache_argument

RopeType = Literal["default", "linear", "llama3"]
"""Rotary embeddings that depend on nothing but the position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config:
    """The head's shape, and what it reads of the target."""

    low: int
    """The features are the target's states after so many layers: low, middle and high."""
    middle: int
    high: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    epsilon: float
    """Of its norms."""
    draft_vocabulary: int = 0
    """Tokens that it can draft; 0 for all of the target's."""
    norm_before_residual: bool = False
    """Whether the residual stream of its layer begins with normed features."""
    attention_bias: bool = False
    own_embedding: bool = False
    rope_base: float = 10000.0
    rope_type: RopeType = "default"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_context: int = 8192
    """The last three are for "llama3": its frequency factors, and the context they begin from."""

    def __post_init__(self) -> None:
        sizes = (self.heads, self.key_value_heads, self.head_dim, self.intermediate_size, self.rope_context)
        if min(sizes) < 1 or self.heads % self.key_value_heads or self.head_dim % 2 or self.draft_vocabulary < 0:
            raise ConfigError(
                f"an EAGLE-3 head of {self.heads} heads over {self.key_value_heads} for keys and values, of "
                f"{self.head_dim} numbers each, and {self.intermediate_size} features cannot be"
            )
        if self.rope_type not in get_args(RopeType):
            raise ConfigError(f"rope_type must be one of {', '.join(get_args(RopeType))}, got {self.rope_type!r}")
        if not (
            self.epsilon > 0 and self.rope_base > 0 and self.rope_factor > 0 and 0 < self.rope_low < self.rope_high
        ):
            raise ConfigError(
                "epsilon and the numbers of the rotary embedding must be above 0, rope_low below rope_high"
            )

    @property
    def taps(self) -> tuple[int, int, int]:
        """Layer counts after which the target's states are read."""
        return self.low, self.middle, self.high

    def check_taps(self, target: Target) -> "Eagle3Config":
        """Itself; raises ConfigError if it reads states that the target has not got."""
        if not 0 <= min(self.taps) <= max(self.taps) <= target.num_layers:
            raise ConfigError(f"the head reads states after {self.taps} layers, but the target has {target.num_layers}")
        return self

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding as transformers names its parameters."""
        named: dict[str, Any] = {"rope_theta": self.rope_base, "rope_type": self.rope_type}
        if self.rope_type != "default":
            named["factor"] = self.rope_factor
        if self.rope_type == "llama3":
            named |= {"low_freq_factor": self.rope_low, "high_freq_factor": self.rope_high}
            named["original_max_position_embeddings"] = self.rope_context
        return named


def default_taps(layers: int) -> tuple[int, int, int]:
    """What EAGLE-3 heads read unless they say otherwise: states after 2 layers, half of them, and all but 3."""
    return 2, layers // 2, layers - 3


WIDEST = 64
"""Times the target's width: features of the head's one layer at most, before any memory is taken for them."""


class Eagle3Head(TrainedWeights):
    """Weights of the head. Raises ConfigError for features that the target has not got."""

    file, config_kind = "eagle3.safetensors", Eagle3Config
    config: Eagle3Config

    def __init__(self, target: Target, config: Eagle3Config):
        super().__init__(target, config)
        config.check_taps(target)
        if config.draft_vocabulary > target.vocab_size:
            raise ConfigError(
                f"the head drafts {config.draft_vocabulary} tokens, but the target has {target.vocab_size}"
            )
        width, tokens = target.width, config.draft_vocabulary or target.vocab_size
        if (widest := max(config.heads * config.head_dim, config.intermediate_size)) > WIDEST * width:
            raise ConfigError(f"the head has {widest} features, but the target has {width}")
        model = _one_layer(target, config)
        self.layer, self.norm = model.layers[0], model.norm
        self.layer.hidden_norm = copy.deepcopy(self.layer.input_layernorm)
        attention = self.layer.self_attn
        attention.layer_idx = target.num_layers  # the cache layer behind the target's own
        self._past = cache_argument(attention)
        for name in ("q_proj", "k_proj", "v_proj"):
            out = getattr(attention, name).out_features
            setattr(attention, name, nn.Linear(2 * width, out, bias=config.attention_bias))
        self.fc = nn.Linear(3 * width, width, bias=False)
        self.lm_head = nn.Linear(width, tokens, bias=False)
        self.embedding = nn.Embedding(target.vocab_size, width) if config.own_embedding else None
        self.vocabulary = DraftTokens(target, config.draft_vocabulary) if config.draft_vocabulary else None
        self._rotary = [RotaryTables(model.rotary_emb, width, target.context, target.device)]
        self.float().to(target.device).requires_grad_(False)

    def check(self, name: object) -> None:
        """Raise AdapterError if what was loaded from `name` does not fit the target."""
        if self.vocabulary is not None:
            self.vocabulary.check(name)

    @property
    def cache_layers(self) -> tuple[LayerShape, ...]:
        """What it adds to the target's KV cache."""
        own, like = self.config, self.fc.weight
        return (LayerShape(own.key_value_heads, own.head_dim, own.head_dim, like.dtype, like.device),)

    def fuse(self, features: Mapping[int, Tensor]) -> Tensor:
        """The target's states [B, M, D] by layer count -> features [B, M, D] of these tokens."""
        return self.fc(torch.cat([features[layers] for layers in self.config.taps], -1))  # type: ignore[no-any-return]

    def forward(self, features: Tensor, tokens: Tensor, where: Placement, cache: KVCache) -> Tensor:
        """Features [B, N, D], and the tokens [B, N] one place after theirs -> states [B, N, D] that `logits` reads.

        `where` is the tokens' own place. At a text's first slot there is none: it has no token before it.
        """
        layer = self.layer
        normed = layer.hidden_norm(features)
        residual = normed if self.config.norm_before_residual else features
        x = torch.cat([layer.input_layernorm(self._embed(tokens)), normed], -1)
        own, extent = int(layer.self_attn.layer_idx), where.mask.shape[-1]
        past = CacheWindow(cache, where, range(own, own + 1), extent)
        rotary = self._rotary[0].rows("", (where.positions - 1).clamp_min(0), extent, x.dtype)
        x, _ = layer.self_attn(
            x, position_embeddings=rotary, attention_mask=_mask(where, x.dtype), **{self._past: past}
        )
        x = residual + x
        return x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, V]; [B, N, n] over a draft vocabulary."""
        return self.lm_head(self.norm(states))  # type: ignore[no-any-return]

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.target.model.get_input_embeddings() if self.embedding is None else self.embedding
        return functional.embedding(tokens, table.weight)


def place_next(where: Placement, extent: int) -> Placement:
    """The places one after those of committed tokens, at most `extent` slots into their rows."""
    start = None if where.start is None else where.start + 1
    return place_at(where.positions + 1, extent, where.rows, start)


def _one_layer(target: Target, config: Eagle3Config) -> LlamaModel:
    """transformers' own parts for a layer of this shape; its weights are nobody's yet."""
    named = LlamaConfig(
        vocab_size=1,
        hidden_size=target.width,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.epsilon,
        attention_bias=config.attention_bias,
        max_position_embeddings=max(target.context, config.rope_context + 1),
        rope_parameters=config.rope,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaModel(named)


def _mask(where: Placement, dtype: torch.dtype) -> Tensor:
    """The additive attention mask [B, 1, N, S]."""
    seen = where.mask.clone()
    seen[..., 0] = False  # the first token has none before it whose features could be read
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return hidden.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
