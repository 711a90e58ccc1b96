"""Training Medusa heads: each predicts its own token of the text from the frozen target's state (Medusa-1)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.drafters.medusa.heads import MedusaHeads
from kangaroo.model import Target
from kangaroo.training.batches import Batch, learnt_positions, place_documents
from kangaroo.training.evaluation import HeldOut, Judgement, Sums, parallel_rounds
from kangaroo.training.for_target import ForTarget
from kangaroo.training.objective import LOGITS_AT_ONCE, Loss, sum_in_pieces
from kangaroo.training.recipe import MedusaRecipe

AHEAD = 2
"""Head 0 reads the state of token t and predicts token t + 2: token t + 1 is the target's own."""
NOTHING = -100
"""In place of a token that a head has nothing to learn from."""


class MedusaObjective(ForTarget):
    """Cross-entropy of every head against the token it is to predict, with less weight the further ahead.

    Head i learns at position t if the token at t + 2 + i is marked and belongs to the same document. The loss is summed
    over heads and tokens and counted per token, of which head 0 learns a few more than the others: close to their sum
    of means. The target runs under no_grad.
    """

    recipe: MedusaRecipe

    def __init__(self, target: Target, heads: MedusaHeads, held_out: HeldOut, recipe: MedusaRecipe):
        super().__init__(target, held_out, recipe)
        self.heads = heads
        decay = recipe.loss.decay ** torch.arange(heads.config.heads, dtype=torch.float32)
        self.weights = decay.to(target.device)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The heads' weights; the target's never change."""
        return dict(self.heads.named_parameters())

    def loss(self, batch: Batch) -> Loss:
        """The weighted loss; beside it head 0's accuracy, and how many tokens of a whole draft the text confirms."""
        wanted = self.wanted(batch)
        with self.precision():
            losses, right, confirmed = self._compare(batch, wanted)
        extra = {"accuracy": float(right[0]), "confirmed": float(confirmed)}
        return Loss((losses * self.weights).sum(), int((wanted[..., 0] != NOTHING).sum()), extra)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """heads.safetensors and config.json."""
        self.heads.save(folder, provenance)

    def activation_bytes(self, rows: int, length: int) -> int:
        """One layer's working set of the target, the blocks' saved states, and logits, in float32."""
        tokens, heads, (layer, attention) = rows * length, self.heads.config.heads, self.layer_floats(length)
        logits = 3 * min(tokens * heads * self.target.vocab_size, LOGITS_AT_ONCE)
        return 4 * (tokens * (layer + attention + (1 + 3 * heads) * self.target.width) + logits)

    def wanted(self, batch: Batch) -> Tensor:
        """[B, T, H] the token that each head is to predict at each position, or NOTHING."""
        distances = range(AHEAD, AHEAD + self.heads.config.heads)
        later = [batch.tokens.roll(-n, 1).masked_fill(~learnt_positions(batch, n), NOTHING) for n in distances]
        return torch.stack(later, -1)

    def states(self, batch: Batch, mask: Tensor) -> Tensor:
        """The target's states after the final norm at the marked positions, [M, D] in float32."""
        with torch.no_grad():
            return self.target.norm(self.run_target(batch, place_documents(batch), mask)[1].states).float()

    def _compare(self, batch: Batch, wanted: Tensor) -> tuple[Tensor, ...]:
        """Sums over the batch: losses [H] in nats, right predictions [H], tokens confirmed []."""
        learnt = (wanted != NOTHING).any(-1)
        logits = self.heads.config.heads * self.target.vocab_size
        return sum_in_pieces(self._compare_states, logits, self.states(batch, learnt), wanted[learnt])

    def _compare_states(self, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses, hits = [], []
        for head, tokens in enumerate(wanted.unbind(-1)):
            logits = self.heads.logits(head, x).float()
            losses.append(functional.cross_entropy(logits, tokens, ignore_index=NOTHING, reduction="sum"))
            hits.append(logits.argmax(-1) == tokens)
        right = torch.stack(hits, -1).long()
        return torch.stack(losses), right.sum(0), right.cumprod(-1).sum()

    @torch.no_grad()
    def measure(self, batch: Batch) -> Sums:
        """Of every head its loss in nats and its accuracy."""
        wanted = self.wanted(batch)
        losses, right, _ = self._compare(batch, wanted)
        counts = (wanted != NOTHING).flatten(0, 1).sum(0).tolist()
        sums: dict[str, tuple[float, int]] = {}
        for head, (loss, hits, count) in enumerate(zip(losses.tolist(), right.tolist(), counts, strict=True)):
            sums |= {f"loss_{head}": (loss, count), f"accuracy_{head}": (hits, count)}
        return sums

    @torch.no_grad()
    def judge(self, batch: Batch) -> list[Judgement]:
        """Per marked token: which heads would draft right in a round that begins with it, two tokens before it."""
        wanted = self.wanted(batch)
        starts = wanted[..., 0] != NOTHING
        x = self.states(batch, starts)
        best = [self.heads.logits(head, x).argmax(-1) for head in range(wanted.shape[-1])]
        hits = torch.zeros_like(wanted, dtype=torch.bool)
        hits[starts] = torch.stack(best, -1) == wanted[starts]
        # A token with no two tokens before it in its document has no state to be drafted from.
        begun = torch.zeros_like(hits)
        begun[:, AHEAD:] = hits[:, :-AHEAD]
        return [tuple(row) for row in begun[batch.trained].tolist()]

    def rounds(self, judged: Sequence[Judgement]) -> list[int]:
        """Tokens emitted by each round over the tokens of an answer."""
        return parallel_rounds(judged)
