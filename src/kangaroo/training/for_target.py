"""What objectives for a frozen target have in common."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kangaroo.model import Target
from kangaroo.training.batches import Batch
from kangaroo.training.evaluation import HeldOut, Predictor
from kangaroo.training.recipe import FrozenTargetRecipe
from kangaroo.training.state_cache import Final, StateCache
from kangaroo.tree import Placement


class ForTarget(Predictor):
    """The target never changes; what is learnt is evaluated by drafting for it."""

    recipe: FrozenTargetRecipe

    def __init__(self, target: Target, held_out: HeldOut, recipe: FrozenTargetRecipe):
        self.target, self.held_out, self.recipe, self.device = target, held_out, recipe, target.device
        self.kept = None
        if recipe.states is not None:
            limit = recipe.states_gigabytes * 1e9
            self.kept = StateCache(recipe.states, target, recipe.run.mixed_precision, limit)
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

    @torch.no_grad()
    def run_target(self, batch: Batch, where: Placement, mask: Tensor, exit_layer: int = 0) -> tuple[Tensor, Final]:
        """(states after `exit_layer` layers [B, T, D], what the target makes of the M marked positions).

        With kept states, layers from the exit on are run only for rows that have none.
        """
        x = self.target.embed(batch.tokens)
        if self.kept is None:
            final, taps = self.target.run(x, where, None, taps=(exit_layer,))
            return taps[exit_layer], Final(final[mask])
        return self.target.run(x, where, None, stop=exit_layer)[0], self.kept.at(batch, mask)

    def layer_floats(self, length: int) -> tuple[int, int]:
        """Numbers per token of one layer's working set in sequences of `length`: (states, attention scores)."""
        config, width = self.target.config, self.target.width
        states = 8 * width + 3 * getattr(config, "intermediate_size", 4 * width)
        return states, 2 * length * getattr(config, "num_attention_heads", 1)
