"""Medusa-1 heads: several tokens ahead, each predicted from the target's last state alone (Cai et al. 2024).

    y_i = x + SiLU(W_i x + b_i),  logits_i = U_i y_i,  i = 0, 1, ...

x is the target's state of a token after the final norm; the target's own head predicts the next token from it, head i
the token 2 + i after it. Their release verifies its trees by a lossy rule as well, which this library does not offer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.weights import TrainedWeights

MOST_HEADS = 63
"""Each predicts one token of a draft, and no draft has more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaConfig:
    """How far the heads look ahead."""

    heads: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= MOST_HEADS:
            raise ConfigError(f"Medusa has 1 to {MOST_HEADS} heads, got {self.heads}")


class MedusaHeads(TrainedWeights):
    """One residual block and one map to the vocabulary per head."""

    file, config_kind = "heads.safetensors", MedusaConfig
    config: MedusaConfig

    def __init__(self, target: Target, config: MedusaConfig):
        super().__init__(target, config)
        # Some families' own heads have a bias; a copy that is to start out equal needs one too.
        bias = getattr(target.head, "bias", None) is not None
        self.blocks = nn.ModuleList(nn.Linear(target.width, target.width) for _ in range(config.heads))
        self.maps = nn.ModuleList(nn.Linear(target.width, target.vocab_size, bias=bias) for _ in range(config.heads))
        self.float().to(target.device).requires_grad_(True)

    def initialise(self, seed: int, *, from_target: bool) -> None:
        """Blocks that do nothing yet; maps that are the target's head, or random."""
        torch.manual_seed(seed)
        for parameter in self.blocks.parameters():
            nn.init.zeros_(parameter)
        for name, parameter in self.maps.named_parameters():
            if from_target:
                parameter.data.copy_(getattr(self.target.head, name.split(".")[-1]))
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def logits(self, head: int, x: Tensor) -> Tensor:
        """Of one head: normed states [..., D] -> [..., V], scaled as the target's are."""
        y = x + functional.silu(self.blocks[head](x))
        return self.target.scale_logits(self.maps[head](y))

    def forward(self, x: Tensor) -> Tensor:
        """Of all heads: normed states [..., D] -> [..., H, V]."""
        return torch.stack([self.logits(head, x) for head in range(self.config.heads)], -2)
