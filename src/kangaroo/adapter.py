"""The Kangaroo adapter: one attention layer between the target's exit layer and the target's own head.

    z = x + W_o . MHA(norm_in(x)),  out = norm_out(z)          (Liu et al. 2024, section 3.1)

No feed-forward network and no second norm; x is the un-normed state after E layers. The variants of the paper's
ablation (table 2) add a head of their own, add a feed-forward network, or replace the attention by one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.cache import KVCache, LayerShape
from kangaroo.errors import AdapterError, ConfigError
from kangaroo.files import write_atomically
from kangaroo.fingerprint import same_model
from kangaroo.model import Target, check_exit_layer
from kangaroo.tree import Placement

Variant = Literal["kangaroo", "own-head", "full-layer", "mlp-only"]
WEIGHTS, CONFIG = "adapter.safetensors", "config.json"
_FIELDS = {
    "exit_layer": int,
    "variant": str,
    "max_draft": int,
    "threshold": float,
    "width": int,
    "vocab_size": int,
    "target_fingerprint": str,
    "weights_sha256": str,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Where the adapter reads, which of the paper's variants it is, and how to draft with it unless told otherwise."""

    exit_layer: int
    variant: Variant = "kangaroo"
    max_draft: int = 6
    """The chain's length it was evaluated with (the paper's gamma)."""
    threshold: float = 0.6
    """The confidence it was evaluated with (the paper's eta)."""

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ConfigError(f"adapter variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")


class Adapter(nn.Module):
    """Weights of the self-draft model that are not the target's.

    Raises ConfigError if the exit layer is not one of the target's.
    """

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        check_exit_layer(config.exit_layer, target)
        self.config, self._target = config, [target]  # in a list: the target's weights are not the adapter's
        self.norm_in, self.norm_out = target.new_norm(), target.new_norm()
        self.attention = None if config.variant == "mlp-only" else target.new_attention()
        self.mlp: FeedForward | None = None
        if config.variant in ("full-layer", "mlp-only"):
            self.mlp = FeedForward(target.width, int(target.config.intermediate_size))
        self.norm_mid = target.new_norm() if config.variant == "full-layer" else None
        self.head = nn.Linear(target.width, target.vocab_size, bias=False) if config.variant == "own-head" else None
        self.float().to(target.device).requires_grad_(True)

    def initialise(self, seed: int, *, from_target: bool) -> None:
        """Random weights (norms at one, the target's head), or those of the target's layer at the exit where they fit.

        Raises ConfigError if a full layer is to be copied from a target whose feed-forward network is not Llama-like.
        """
        torch.manual_seed(seed)
        target = self._target[0]
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
        if from_target and self.attention is not None:
            layer = target.layers[self.config.exit_layer]
            self.attention.load_state_dict(layer.self_attn.state_dict())  # type: ignore[union-attr]
            if hasattr(layer, "input_layernorm"):
                self.norm_in.load_state_dict(layer.input_layernorm.state_dict())  # type: ignore[union-attr]
            if self.mlp is not None and self.norm_mid is not None:
                self.mlp.copy_from(layer.mlp)  # type: ignore[arg-type]
                self.norm_mid.load_state_dict(layer.post_attention_layernorm.state_dict())  # type: ignore[union-attr]

    def forward(self, x: Tensor, where: Placement, cache: KVCache | None = None) -> Tensor:
        """States after the exit layer [B, N, D] -> normed states [B, N, D] that `logits` reads."""
        if self.attention is not None:
            x = x + self._target[0].attend(self.attention, self.norm_in(x), where, cache)
        if self.mlp is not None:
            x = x + self.mlp(self.norm_in(x) if self.norm_mid is None else self.norm_mid(x))
        return self.norm_out(x)  # type: ignore[no-any-return]

    def logits(self, y: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, V], through the target's head or the adapter's own."""
        target = self._target[0]
        return target.logits(y) if self.head is None else target.scale_logits(self.head(y))

    @property
    def cache_layers(self) -> tuple[LayerShape, ...]:
        """The layers this adapter adds to the target's KV cache: one, or none without attention."""
        return () if self.attention is None else (self._target[0].storage_shape(self.attention),)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write weights and config; each file appears whole or not at all, the config last."""
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        write_atomically(folder / WEIGHTS, lambda part: save_file(tensors, part))
        table = {
            **asdict(self.config),
            "width": self._target[0].width,
            "vocab_size": self._target[0].vocab_size,
            "target_fingerprint": self._target[0].fingerprint,
            "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
            "provenance": provenance,
        }
        write_atomically(folder / CONFIG, lambda part: part.write_text(json.dumps(table, indent=2) + "\n"))

    @classmethod
    def load(cls, folder: Path, target: Target) -> "Adapter":
        """Read an adapter that was trained for this target, in the target's precision.

        Raises AdapterError if files are missing, damaged or hold NaN, or if it belongs to another target.
        """
        table = _read_config(folder)
        for name, wanted in (("width", target.width), ("vocab_size", target.vocab_size)):
            if table[name] != wanted:
                raise AdapterError(f"the adapter in {folder} has {name} {table[name]}, but the target has {wanted}")
        if not same_model(table["target_fingerprint"], target.fingerprint, weights_hidden=target.hides_weights):
            raise AdapterError(
                f"the adapter in {folder} was trained for another target (fingerprint {table['target_fingerprint']}, "
                f"this target has {target.fingerprint}); train one for this target with `kangaroo train`"
            )
        adapter = cls(target, AdapterConfig(**{field.name: table[field.name] for field in fields(AdapterConfig)}))
        tensors = _read_weights(folder / WEIGHTS, table["weights_sha256"])
        missing = adapter.load_state_dict(tensors, strict=False)
        if missing.missing_keys or missing.unexpected_keys:
            names = [*missing.missing_keys, *missing.unexpected_keys]
            raise AdapterError(f"{folder / WEIGHTS} does not fit its config: {names[0]!r} is missing or unexpected")
        return adapter.to(target.dtype).eval().requires_grad_(False)


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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        hint = f"{pickles[0].name} is a pickle, which is never loaded" if pickles else "expected config.json"
        raise AdapterError(f"no adapter in {folder}: {hint}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None
    if not isinstance(table, dict):
        raise AdapterError(f"{path} is damaged: it should hold one table")
    for name, kind in _FIELDS.items():
        if type(table.get(name)) is not kind:
            raise AdapterError(f"{path} is damaged: {name!r} should be of type {kind.__name__}")
    return table


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"no weights at {path}")
    content = path.read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged: {error}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise AdapterError(f"{path} is damaged: its bytes are not those that config.json was written for")
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise AdapterError(f"{path} is damaged: {name!r} holds values that are not finite")
    return tensors
