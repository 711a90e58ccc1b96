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
from kangaroo.training.for_target import ForTarget
from kangaroo.training.objective import Loss
from kangaroo.training.recipe import AdapterRecipe, LossSection
from kangaroo.training.state_cache import Final

AT_ONCE = 1 << 20
"""Logits made at once, so that a processor's caches hold them while they are read again and again."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """p against q, summed over positions. Only `loss` carries gradients."""

    loss: Tensor
    cross_entropy: Tensor
    overlap: Tensor
    """sum of min(p, q): the chance that a token drawn from q is accepted."""
    agreement: Tensor
    """Positions where both have the same best token."""
    lost: Tensor
    """What p gives to tokens outside the draft vocabulary: no draft is accepted there."""

    def figures(self) -> dict[str, float]:
        """The sums as numbers, by the names they have in the metrics."""
        return {
            "lost_mass": float(self.lost),
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

    Over a draft vocabulary K the cross-entropy is -sum of p log q over K, p as the target has it: its gradient is that
    of p renormalised over K times p's mass there, so that a position counts by how much a draft can win. The overlap
    is that of p with q, which is 0 outside K.
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
        logits = 6 * AT_ONCE
        return 4 * (tokens * (2 * layer + attention + 12 * self.target.width) + logits)

    def draft_logits(self, y: Tensor) -> Tensor:
        """Adapter states [..., D] -> float32 logits [..., V], or [..., n] over a draft vocabulary."""
        # The shared head is frozen in the target's precision, the adapter's own is trained in float32.
        return self.adapter.logits(y if self.adapter.head is not None else y.to(self.target.dtype)).float()

    def draft_states(self, batch: Batch, mask: Tensor) -> Tensor:
        """Adapter states [M, D] at the marked positions; the target's deep layers are not run."""
        where = place_documents(batch)
        with torch.no_grad():
            x, _ = self.target.run(self.target.embed(batch.tokens), where, None, stop=self.adapter.config.exit_layer)
        return self.adapter(x.float(), where)[mask]  # type: ignore[no-any-return]

    def _states(self, batch: Batch, mask: Tensor) -> tuple[Tensor, Final]:
        """(adapter states [M, D], what the target makes of them) at the marked positions."""
        where = place_documents(batch)
        exits, final = self.run_target(batch, where, mask, self.adapter.config.exit_layer)
        return self.adapter(exits.float(), where)[mask], final

    def compare(self, draft: Tensor, final: Final) -> Comparison:
        """Compare q and p at positions given by adapter states [M, D] and the target's."""
        head = self.adapter.head
        sums = _InPieces.apply(draft, self, final, *(() if head is None else head.parameters()))  # type: ignore[no-untyped-call]
        return Comparison(*sums)

    def chances(self, final: Final) -> tuple[Tensor, Tensor]:
        """(p [M, V], or [M, n] over a draft vocabulary, the most probable token [M]) of the target."""
        vocabulary = self.adapter.vocabulary
        if vocabulary is None:
            p = self.target.logits(self.target.norm(final.states)).float().softmax(-1)
            return p, p.argmax(-1)
        if final.normaliser is None or final.best is None:
            final = final.counted(self.target)
        assert final.normaliser is not None
        assert final.best is not None
        p = (vocabulary.logits(self.target.norm(final.states)).float() - final.normaliser[:, None]).exp()
        return p, final.best

    def best(self, logits: Tensor) -> Tensor:
        """Draft logits [..., n] -> the token that would be drafted [...]."""
        best = logits.argmax(-1)
        return best if self.adapter.vocabulary is None else self.adapter.vocabulary.tokens[best]

    def measure(self, batch: Batch) -> Sums:
        """The comparison's figures over a batch's positions."""
        mask = learnt_positions(batch)
        figures, count = self.compare(*self._states(batch, mask)).figures(), int(mask.sum())
        return {name: (value, count) for name, value in figures.items()}

    def judge(self, batch: Batch) -> list[Judgement]:
        """Per marked token: would it be drafted right, and how sure would the adapter be of what it drafts there?"""
        mask = learnt_positions(batch)
        logits = self.draft_logits(self.draft_states(batch, mask))
        correct = self.best(logits) == batch.tokens.roll(-1, 1)[mask]
        return list(zip(correct.tolist(), top_probability(logits).tolist(), strict=True))

    def rounds(self, judged: Sequence[Judgement]) -> list[int]:
        """Tokens emitted by each round over the tokens of an answer."""
        correct, confidence = zip(*judged, strict=True)
        settings = self.recipe.evaluation
        confident = [value >= settings.threshold for value in confidence]
        return chain_rounds(correct, confident, max_draft=settings.max_draft, room=settings.max_tokens)


class _InPieces(torch.autograd.Function):
    """Comparison's sums over positions, piece by piece; a piece's gradient is taken while its logits are there.

    Inputs: adapter states [M, D] and the trained weights of the adapter's head, if it has one.
    """

    @staticmethod
    def forward(
        ctx: Any, draft: Tensor, objective: AdapterObjective, final: Final, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        vocabulary = objective.adapter.vocabulary
        size = objective.target.vocab_size if vocabulary is None else len(vocabulary.tokens)
        if vocabulary is not None and final.normaliser is None:
            final = final.counted(objective.target)
        sums = torch.zeros(5, device=draft.device)
        gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (draft, *weights)]
        learning, step = any(ctx.needs_input_grad), max(1, AT_ONCE // size)
        for begin in range(0, len(draft), step):
            piece = slice(begin, begin + step)
            p, best = objective.chances(final[piece])
            with torch.set_grad_enabled(learning):
                y = draft[piece].detach().requires_grad_(learning)
                logits = objective.draft_logits(y)
            found, slope = _compare(logits.detach(), p, objective.recipe.loss)
            sums += torch.stack([*found, (objective.best(logits) == best).sum(), len(p) - p.sum()])
            if learning:
                own, *shared = torch.autograd.grad(logits, [y, *weights], slope)
                gradients[0][piece] = own
                for total, part in zip(gradients[1:], shared, strict=True):
                    total += part
        ctx.save_for_backward(*gradients)
        loss, *figures = (value.clone() for value in sums)
        ctx.mark_non_differentiable(*figures)
        return loss, *figures

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        draft, *weights = (gradient * outer[0] for gradient in ctx.saved_tensors)
        return draft, None, None, *weights


def _compare(logits: Tensor, p: Tensor, weights: LossSection) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((loss, cross-entropy, overlap) summed over positions, the loss's gradient by logits [M, n]).

    By the logits, -sum of p log q has the gradient (sum of p) q - p, and sum of min(p, q), with r = q where q < p and 0
    elsewhere, r - q * sum of r.
    """
    log_q = logits.log_softmax(-1)
    cross_entropy = -(p * log_q).sum()
    q = log_q.exp_()
    overlap = torch.minimum(p, q).sum()
    loss = weights.soft_cross_entropy * cross_entropy + weights.acceptance * (len(p) - overlap)
    r = torch.where(q < p, q, 0)
    scale = weights.soft_cross_entropy * p.sum(-1, keepdim=True) + weights.acceptance * r.sum(-1, keepdim=True)
    slope = q.mul_(scale).sub_(p, alpha=weights.soft_cross_entropy).sub_(r, alpha=weights.acceptance)
    return (loss, cross_entropy, overlap), slope
