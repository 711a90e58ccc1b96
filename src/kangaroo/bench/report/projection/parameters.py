"""How many weights each method trains for a target, from the target's configuration alone.

For Llama-like targets: matrices without biases, norms of one weight per channel. These are the counts of the paper's
tables: 67M for an adapter of Vicuna-7B, 591M for four Medusa heads.
"""

from dataclasses import dataclass
from typing import Any, Self

from kangaroo.drafters.kangaroo.adapter import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShape:
    """The sizes that counts depend on."""

    width: int
    vocab_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    mlp_width: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a transformers configuration."""
        heads = int(config.num_attention_heads)
        return cls(
            width=int(config.hidden_size),
            vocab_size=int(config.vocab_size),
            heads=heads,
            key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            mlp_width=int(config.intermediate_size),
        )

    @property
    def attention(self) -> int:
        """Weights of one attention module: queries and output, keys and values."""
        return 2 * self.width * self.head_dim * (self.heads + self.key_value_heads)

    @property
    def mlp(self) -> int:
        """Weights of one feed-forward network: gate, up and down."""
        return 3 * self.width * self.mlp_width

    @property
    def vocabulary_map(self) -> int:
        """Weights of one map to the vocabulary."""
        return self.width * self.vocab_size


def adapter_parameters(shape: TargetShape, variant: Variant = "kangaroo", layers: int = 1) -> int:
    """Weights of an adapter: what its variant has in every layer, each behind a norm, one norm more, and its head."""
    matrices = {
        "kangaroo": shape.attention,
        "own-head": shape.attention,
        "full-layer": shape.attention + shape.mlp + shape.width,
        "mlp-only": shape.mlp,
    }
    head = shape.vocabulary_map if variant == "own-head" else 0
    return layers * (matrices[variant] + shape.width) + shape.width + head


def medusa_parameters(shape: TargetShape, heads: int = 4) -> int:
    """Weights of Medusa heads: a block with a bias and a map to the vocabulary each."""
    return heads * (shape.width**2 + shape.width + shape.vocabulary_map)
