"""The Kangaroo adapter: attention layers between the target's exit layer and the target's own head.

    z = x + W_o . MHA(norm_in(x)),  out = norm_out(z)          (Liu et al. 2024, section 3.1)

No feed-forward network and no second norm; x is the un-normed state after E layers. The variants of the paper's
ablation (table 2) add a head of their own, add a feed-forward network, or replace the attention by one. The paper has
one such layer; several stand one behind the other, and share the last norm and the head.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.cache import KVCache, LayerShape
from kangaroo.drafters.draft_vocabulary import DraftVocabulary
from kangaroo.errors import ConfigError
from kangaroo.families import LIKE_LLAMA
from kangaroo.fingerprint import is_readable
from kangaroo.fused import compiled_layer
from kangaroo.kernels import CompiledLayer
from kangaroo.linears import can_pack, pack_together, plain_linears, products
from kangaroo.model import Target, check_exit_layer
from kangaroo.norms import fused_norms
from kangaroo.tree import Placement
from kangaroo.weights import LATER, TrainedWeights

Variant = Literal["kangaroo", "own-head", "full-layer", "mlp-only"]
MOST_LAYERS = 64
"""More would make no draft cheaper than a step of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Where the adapter reads, which of the paper's variants it is, and how to draft with it unless told otherwise."""

    exit_layer: int
    variant: Variant = "kangaroo"
    layers: int = field(default=1, metadata=LATER)
    """Trained layers, one behind the other."""
    draft_vocabulary: int = field(default=0, metadata=LATER)
    """Draft over so many tokens; 0 for all of the target's."""
    max_draft: int = 6
    """The chain's length it was evaluated with (the paper's gamma)."""
    threshold: float = 0.6
    """The confidence it was evaluated with (the paper's eta)."""

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ConfigError(f"adapter variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")
        if not 1 <= self.layers <= MOST_LAYERS:
            raise ConfigError(f"an adapter has 1 to {MOST_LAYERS} layers, got {self.layers}")
        if self.draft_vocabulary < 0:
            raise ConfigError(f"draft_vocabulary is a number of tokens, or 0 for all, got {self.draft_vocabulary}")
        if self.draft_vocabulary and self.variant == "own-head":
            raise ConfigError("an adapter with a head of its own drafts over all tokens; drop draft_vocabulary")


class Adapter(TrainedWeights):
    """Weights of the self-draft model that are not the target's.

    Raises ConfigError if the exit layer is not one of the target's, or its draft vocabulary does not fit.
    """

    file, config_kind = "adapter.safetensors", AdapterConfig
    config: AdapterConfig

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__(target, config)
        check_exit_layer(config.exit_layer, target)
        self.layers = nn.ModuleList(AdapterLayer(target, config.variant, place) for place in range(config.layers))
        self.norm_out = target.new_norm()
        self.head = nn.Linear(target.width, target.vocab_size, bias=False) if config.variant == "own-head" else None
        self.vocabulary = DraftVocabulary(target, config.draft_vocabulary) if config.draft_vocabulary else None
        self.float().to(target.device).requires_grad_(True)

    def initialise(self, seed: int, *, from_target: bool) -> None:
        """Random weights (norms at one, the target's head), or those of the target's layers from the exit on.

        Raises ConfigError if a full layer is to be copied from a target whose feed-forward network is not Llama-like,
        or if the target has too few layers.
        """
        torch.manual_seed(seed)
        target, first = self.target, self.config.exit_layer
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)
        self.norm_out.load_state_dict(target.new_norm().state_dict())
        if self.head is not None:
            self.head.weight.data.copy_(target.head.weight)  # type: ignore[arg-type]
        if from_target:
            if first + len(self.layers) > target.num_layers:
                raise ConfigError(
                    f"the target has no {len(self.layers)} layers from the exit {first} on to start from; "
                    'lower adapter.layers, or start from init = "random"'
                )
            for own, theirs in zip(self.layers, target.layers[first:], strict=False):
                own.copy_from(theirs)  # type: ignore[operator]

    def forward(self, x: Tensor, where: Placement, cache: KVCache | None = None) -> Tensor:
        """States after the exit layer [B, N, D] -> normed states [B, N, D] that `logits` reads."""
        return self.target.in_place(self, self._through, x, where, cache)[0]

    def _through(self, x: Tensor, where: Placement, cache: KVCache | None) -> list[Tensor]:
        for layer in self.layers:
            x = layer(x, where, cache)
        return [self.norm_out(x)]

    def logits(self, y: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, V], through the target's head or the adapter's own; [B, N, n] of a draft vocabulary."""
        target = self.target
        if self.vocabulary is not None:
            return self.vocabulary.logits(y)
        return target.logits(y) if self.head is None else target.scale_logits(self.head(y))

    def current_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Files from when an adapter had one layer name its parts without saying which layer's they are."""
        old = ("norm_in", "attention", "mlp", "norm_mid")
        return {f"layers.0.{name}" if name.split(".")[0] in old else name: value for name, value in tensors.items()}

    def check(self, name: object) -> None:
        """Raise AdapterError if what was loaded from `name` does not fit the target."""
        if self.vocabulary is not None:
            self.vocabulary.check(name)

    def prepare(self) -> None:
        """Be quick at drafting and of no use to training: norms fused, weights packed where the machine reads such."""
        for module in (self, *self.layers):
            for name, norm in fused_norms(module).items():
                setattr(module, name, norm)
        if self.target.kernels is None and not can_pack(self.target.dtype, self.target.device):
            return
        for product in products(plain_linears(self)):
            pack_together(product, kernels=self.target.kernels)
        if self.vocabulary is not None:
            self.vocabulary.pack()
        for layer in self.layers:
            layer.compile_for(self.target)  # type: ignore[operator]

    @property
    def cache_layers(self) -> tuple[LayerShape, ...]:
        """What this adapter adds to the target's KV cache: a layer for each of its own, or none without attention."""
        attentions = [layer.attention for layer in self.layers if layer.attention is not None]
        return tuple(self.target.storage_shape(attention) for attention in attentions)  # type: ignore[arg-type]


class AdapterLayer(nn.Module):
    """One trained layer: attention, a feed-forward network, or both, each behind a norm."""

    def __init__(self, target: Target, variant: Variant, place: int):
        """`place` is the layer's own in the adapter, from 0."""
        super().__init__()
        self._target = [target]  # in a list: the target's weights are not this module's
        self.norm_in = target.new_norm()
        self.attention = None if variant == "mlp-only" else target.new_attention(place)
        self.mlp: FeedForward | None = None
        if variant in ("full-layer", "mlp-only"):
            self.mlp = FeedForward(target.width, int(target.config.intermediate_size))
        self.norm_mid = target.new_norm() if variant == "full-layer" else None
        self._compiled: CompiledLayer | None = None

    def compile_for(self, target: Target) -> None:
        """Be one call of the target's compiled kernels, if it has such and this is a layer that they know."""
        attention: Any = self.attention
        if target.kernels is None or target.config.model_type not in LIKE_LLAMA or attention is None:
            return
        mlp = [] if self.mlp is None else [self.mlp.gate, self.mlp.up, self.mlp.down]
        norms = [self.norm_in] if self.norm_mid is None else [self.norm_in, self.norm_mid]
        self._compiled = compiled_layer(target.kernels, attention, norms, mlp)

    def copy_from(self, layer: nn.Module) -> None:
        """Take what fits of a target's layer. Raises ConfigError for a feed-forward network of another kind, and for
        weights that are quantised."""
        if self.attention is None:
            return
        if not all(map(is_readable, layer.parameters())):
            raise ConfigError('the target\'s layers are quantised and cannot be copied; start from init = "random"')
        self.attention.load_state_dict(layer.self_attn.state_dict())  # type: ignore[union-attr]
        if hasattr(layer, "input_layernorm"):
            self.norm_in.load_state_dict(layer.input_layernorm.state_dict())  # type: ignore[union-attr]
        if self.mlp is not None and self.norm_mid is not None:
            self.mlp.copy_from(layer.mlp)  # type: ignore[arg-type]
            self.norm_mid.load_state_dict(layer.post_attention_layernorm.state_dict())  # type: ignore[union-attr]

    def forward(self, x: Tensor, where: Placement, cache: KVCache | None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        if self._compiled is not None and cache is not None:
            return self._target[0].run_compiled(self._compiled, int(self.attention.layer_idx), x, where, cache)  # type: ignore[union-attr,arg-type]
        if self.attention is not None:
            x = x + self._target[0].attend(self.attention, self.norm_in(x), where, cache)
        if self.mlp is not None:
            x = x + self.mlp(self.norm_in(x) if self.norm_mid is None else self.norm_mid(x))
        return x


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), for the ablation variants."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def copy_from(self, mlp: nn.Module) -> None:
        """Take a Llama-like layer's weights. Raises ConfigError for feed-forward networks of another kind."""
        for own, name in ((self.gate, "gate_proj"), (self.up, "up_proj"), (self.down, "down_proj")):
            theirs = getattr(getattr(mlp, name, None), "weight", None)
            if theirs is None or theirs.shape != own.weight.shape:
                raise ConfigError('the target\'s feed-forward network is of another kind; start from init = "random"')
            own.weight.data.copy_(theirs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
