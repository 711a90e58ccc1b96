"""Held-out figures of an adapter: on documents, and on text that the target wrote."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kangaroo.training.batches import Batch, Packed
from kangaroo.training.corpus import Corpus
from kangaroo.training.recipe import EvaluationSection
from kangaroo.training.simulate import chain_rounds


class Compared(Protocol):
    """Sums over positions, as numbers."""

    def figures(self) -> dict[str, float]:
        """By name."""
        ...


class DraftModel(Protocol):
    """What is evaluated."""

    device: torch.device

    def measure(self, batch: Batch) -> tuple[Compared, int]:
        """p against q over a batch's positions, and their number."""
        ...

    def draft_states(self, batch: Batch, mask: Tensor) -> Tensor:
        """States [M, D] at the marked positions."""
        ...

    def draft_logits(self, y: Tensor) -> Tensor:
        """[M, D] -> [M, V]."""
        ...


class HeldOut:
    """Documents never trained on, and the target's greedy answers to prompts from them."""

    def __init__(
        self,
        documents: Corpus,
        length: int,
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        settings: EvaluationSection,
    ):
        self.documents, self.length, self.settings = Packed(documents), length, settings
        written = [(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompts, answers, strict=True)]
        self.written, self.answers = Packed(Corpus.join(written)), answers
        self.written_length = max(len(tokens) for tokens, _ in written)
        self.tokens = len(self.documents.rows(length)) * length
        self.tokens += len(self.written.rows(self.written_length)) * self.written_length

    def evaluate(self, model: DraftModel) -> dict[str, float]:
        """Mean soft cross-entropy, agreement and sum-min over the documents; agreement and CR on the target's text."""
        sums, count = dict[str, float](), 0
        for batch in self._batches(self.documents, self.length, model.device):
            compared, tokens = model.measure(batch)
            sums = {name: sums.get(name, 0.0) + value for name, value in compared.figures().items()}
            count += tokens
        means = {name: value / count for name, value in sums.items()}
        rounds, correct = self.simulate(model)
        emitted = sum(map(sum, rounds))
        rate = emitted / sum(map(len, rounds))
        return {**means, "written_agreement": correct / emitted, "simulated_cr": rate, "score": rate}

    def simulate(self, model: DraftModel) -> tuple[list[list[int]], int]:
        """(tokens emitted by each round of each answer, how many of all answers' tokens would be drafted right)."""
        correct, confident = list[bool](), list[bool]()
        for batch in self._batches(self.written, self.written_length, model.device):
            assert batch.documents is not None
            # Only answers are marked, so the marked positions are theirs, document by document.
            mask = torch.zeros_like(batch.trained)
            mask[:, :-1] = batch.trained[:, 1:]
            logits = model.draft_logits(model.draft_states(batch, mask))
            correct += (logits.argmax(-1) == batch.tokens[:, 1:][mask[:, :-1]]).tolist()
            top = (logits.amax(-1) - logits.logsumexp(-1)).exp()
            confident += (top >= self.settings.threshold).tolist()
        rounds: list[list[int]] = [[] for _ in self.answers]
        at = 0
        for index in (i for row in self.written.rows(self.written_length) for i in row):
            end = at + len(self.answers[index])
            rounds[index] = chain_rounds(
                correct[at:end], confident[at:end], max_draft=self.settings.max_draft, room=self.settings.max_tokens
            )
            at = end
        assert at == len(correct)
        return rounds, sum(correct)

    def _batches(self, packed: Packed, length: int, device: torch.device) -> Iterator[Batch]:
        rows = packed.rows(length)
        for begin in range(0, len(rows), self.settings.batch):
            yield packed.lay_out(rows[begin : begin + self.settings.batch], length).to(device)
