"""What of a model decides how long its passes take: the weights of its parts, and the kernels they launch."""

from dataclasses import dataclass
from typing import Any

import torch

from kangaroo.bench.report.projection.parameters import TargetShape
from kangaroo.errors import ConfigError
from kangaroo.families import FAMILIES

UNGATED = frozenset({"apertus", "arcee", "nemotron", "phi", "starcoder2"})
"""Families whose feed-forward network is two matrices; it is three in the others."""
UNCOUNTED = frozenset({"deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"})
"""Families of experts: what a pass reads depends on which of them its tokens choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Launches of the parts of a layer.

    The default was counted, views aside, in this project's Llama layers run one operation at a time.
    """

    norm: int = 8
    """Casts to single precision and back among them, without which there are 6."""
    attention: int = 18
    """Four matrices, ten to rotate, two to store, one to attend, one to add."""
    mlp: int = 6

    @property
    def layer(self) -> int:
        """All of them."""
        return 2 * self.norm + self.attention + self.mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A dense model. Raises ConfigError without layers or bytes."""

    name: str
    layers: int
    sizes: TargetShape
    bytes_per_weight: float = 2.0
    """Of keys and values too."""
    gated: bool = True
    """Whether the feed-forward network is three matrices, or two."""
    kernels: Kernels = Kernels()

    def __post_init__(self) -> None:
        if self.layers < 1 or not self.bytes_per_weight > 0:
            got = f"{self.layers} layers of {self.bytes_per_weight} bytes per weight"
            raise ConfigError(f"{self.name}: a model has at least one layer, and weights of some size; got {got}")

    @property
    def layer_weights(self) -> int:
        """Of one layer, two norms included."""
        matrices = 3 if self.gated else 2
        return self.sizes.attention + matrices * self.sizes.width * self.sizes.mlp_width + 2 * self.sizes.width

    @property
    def bytes(self) -> float:
        """All weights, the embedding included."""
        return (self.layers * self.layer_weights + 2 * self.sizes.vocabulary_map) * self.bytes_per_weight


def shape_of(config: Any, dtype: torch.dtype, name: str | None = None) -> Shape:
    """From a transformers configuration. Raises ConfigError for families whose passes are not counted."""
    family = config.model_type
    if family not in FAMILIES - UNCOUNTED:
        raise ConfigError(f"passes are counted of dense models of the supported families, got {family!r}")
    return Shape(
        name=name or str(family),
        layers=int(config.num_hidden_layers),
        sizes=TargetShape.of(config),
        bytes_per_weight=dtype.itemsize,
        gated=family not in UNGATED,
        kernels=Kernels(norm=6) if dtype == torch.float32 else Kernels(),
    )
