"""Training an adapter: the draft distribution q is to imitate the frozen target's p, at the same positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kangaroo.drafters.chain import top_probability
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.calibration import calibrate
from kangaroo.model import Target
from kangaroo.training.batches import Batch, learnt_positions, place_documents
from kangaroo.training.evaluation import HeldOut, Judgement, Sums, chain_rounds
from kangaroo.training.for_target import LOGITS_AT_ONCE, ForTarget, sum_in_pieces
from kangaroo.training.objective import Loss
from kangaroo.training.recipe import AdapterRecipe


@dataclass(frozen=True, slots=True)
class Comparison:
    """p against q, summed over positions. Only `loss` carries gradients."""

    loss: Tensor
    cross_entropy: Tensor
    overlap: Tensor
    """sum of min(p, q): the chance that a token drawn from q is accepted."""
    agreement: Tensor
    """Positions where both have the same best token."""

    def figures(self) -> dict[str, float]:
        """The sums as numbers, by the names they have in the metrics."""
        return {
            "soft_cross_entropy": float(self.cross_entropy),
            "sum_min": float(self.overlap),
            "agreement": float(self.agreement),
        }


class AdapterObjective(ForTarget):
    """Soft cross-entropy and acceptance loss of an adapter against its target, which runs under no_grad.

    Position t is learnt from if the token at t + 1 is marked and belongs to the same document: there the adapter reads
    h_E(t), and both p and q are about token t + 1. The prompt's last token is such a position, the answer's last is
    not. Positions that are not learnt from, a document's first token above all, are still run: every later position
    attends to them, in the target and in the adapter, from rotary position 0 as in decoding.
    """

    recipe: AdapterRecipe

    def __init__(self, target: Target, adapter: Adapter, held_out: HeldOut, recipe: AdapterRecipe):
        super().__init__(target, held_out, recipe)
        self.adapter = adapter

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The adapter's weights; the target's never change."""
        return dict(self.adapter.named_parameters())

    def loss(self, batch: Batch) -> Loss:
        """The recipe's loss, summed over the positions learnt from; agreement and sum-min beside it."""
        mask = learnt_positions(batch)
        with self.precision():
            draft, final = self._states(batch, mask)
            compared = self.compare(draft, final)
        return Loss(compared.loss, int(mask.sum()), compared.figures())

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """The adapter, and what its confidences were worth on text that the target wrote, as last evaluated."""
        self.adapter.save(folder, provenance)
        judged = self.held_out.judged
        calibrate([value for _, value in judged], [bool(right) for right, _ in judged]).save(folder)

    def activation_bytes(self, rows: int, length: int) -> int:
        """One layer's working set of the target, the adapter's saved states, and logits, in float32."""
        tokens, (layer, attention) = rows * length, self.layer_floats(length)
        logits = 6 * min(tokens * self.target.vocab_size, LOGITS_AT_ONCE)
        return 4 * (tokens * (2 * layer + attention + 12 * self.target.width) + logits)

    def draft_logits(self, y: Tensor) -> Tensor:
        """Adapter states [..., D] -> float32 logits [..., V]."""
        # The shared head is frozen in the target's precision, the adapter's own is trained in float32.
        return self.adapter.logits(y if self.adapter.head is not None else y.to(self.target.dtype)).float()

    def draft_states(self, batch: Batch, mask: Tensor) -> Tensor:
        """Adapter states [M, D] at the marked positions; the target's deep layers are not run."""
        where = place_documents(batch)
        with torch.no_grad():
            x, _ = self.target.run(self.target.embed(batch.tokens), where, None, stop=self.adapter.config.exit_layer)
        return self.adapter(x.float(), where)[mask]  # type: ignore[no-any-return]

    def _states(self, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(adapter states, target states before the final norm) at the marked positions, [M, D] each."""
        where = place_documents(batch)
        exits, final = self.run_target(batch, where, mask, self.adapter.config.exit_layer)
        return self.adapter(exits.float(), where)[mask], final

    def compare(self, draft: Tensor, final: Tensor) -> Comparison:
        """Compare q and p at positions given by adapter states and target states [M, D]."""
        return Comparison(*sum_in_pieces(self._compare, self.target.vocab_size, draft, final))

    def _compare(self, draft: Tensor, final: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights = self.recipe.loss
        with torch.no_grad():
            p = self.target.logits(self.target.norm(final)).float().softmax(-1)
        log_q = self.draft_logits(draft).log_softmax(-1)
        cross_entropy = -(p * log_q).sum()
        overlap = torch.minimum(p, (log_q if weights.acceptance else log_q.detach()).exp()).sum()
        agreement = (p.argmax(-1) == log_q.argmax(-1)).sum().float()
        loss = weights.soft_cross_entropy * cross_entropy + weights.acceptance * (len(p) - overlap)
        return loss, cross_entropy.detach(), overlap.detach(), agreement

    def measure(self, batch: Batch) -> Sums:
        """The comparison's figures over a batch's positions."""
        mask = learnt_positions(batch)
        figures, count = self.compare(*self._states(batch, mask)).figures(), int(mask.sum())
        return {name: (value, count) for name, value in figures.items()}

    def judge(self, batch: Batch) -> list[Judgement]:
        """Per marked token: would it be drafted right, and how sure would the adapter be of what it drafts there?"""
        mask = learnt_positions(batch)
        logits = self.draft_logits(self.draft_states(batch, mask))
        correct = logits.argmax(-1) == batch.tokens.roll(-1, 1)[mask]
        return list(zip(correct.tolist(), top_probability(logits).tolist(), strict=True))

    def rounds(self, judged: Sequence[Judgement]) -> list[int]:
        """Tokens emitted by each round over the tokens of an answer."""
        correct, confidence = zip(*judged, strict=True)
        settings = self.recipe.evaluation
        confident = [value >= settings.threshold for value in confidence]
        return chain_rounds(correct, confident, max_draft=settings.max_draft, room=settings.max_tokens)
