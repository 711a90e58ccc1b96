"""What objectives for a frozen target have in common."""

from collections.abc import Mapping

import torch

from kangaroo.model import Target
from kangaroo.training.evaluation import DraftModel, HeldOut
from kangaroo.training.recipe import FrozenTargetRecipe


class ForTarget(DraftModel):
    """The target runs online and never changes; what is learnt is evaluated by drafting for it."""

    recipe: FrozenTargetRecipe

    def __init__(self, target: Target, held_out: HeldOut):
        self.target, self.held_out, self.device = target, held_out, target.device
        self.frozen_bytes = sum(p.numel() * p.element_size() for p in target.model.parameters())
        self.evaluation_tokens = held_out.tokens

    @torch.no_grad()
    def evaluate(self) -> Mapping[str, float]:
        """Means over held-out documents, and the simulated CR on text the target wrote, which is the score."""
        with self.precision():
            return self.held_out.evaluate(self)

    def precision(self) -> torch.autocast:
        """Of matrix products, as the recipe says."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.run.mixed_precision == "bf16")

    def layer_floats(self, length: int) -> tuple[int, int]:
        """Numbers per token of one layer's working set in sequences of `length`: (states, attention scores)."""
        config, width = self.target.config, self.target.width
        states = 8 * width + 3 * getattr(config, "intermediate_size", 4 * width)
        return states, 2 * length * getattr(config, "num_attention_heads", 1)
