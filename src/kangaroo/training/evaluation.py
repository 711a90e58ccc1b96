"""Held-out figures of what drafts for a target: on documents, and on text that the target wrote.

Drafting is simulated, not run. Draft inputs are exact: whatever was accepted, the draft model's next token depends on
the text alone. One pass over a known text therefore tells every token that could be drafted, and the chain's rounds
follow by walking. What would be drafted after a wrong token does not matter: it is not accepted.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from kangaroo.training.batches import Batch, Packed
from kangaroo.training.corpus import Corpus
from kangaroo.training.recipe import EvaluationSection

Sums = Mapping[str, tuple[float, int]]
"""Name -> (sum over positions, their number)."""
Judgement = tuple[float, ...]
"""What simulated drafting must know of a token; the first says whether it would be drafted right."""


class Predictor(Protocol):
    """What is evaluated."""

    device: torch.device

    def measure(self, batch: Batch) -> Sums:
        """Figures of a batch."""
        ...

    def judge(self, batch: Batch) -> list[Judgement]:
        """Of the batch's marked tokens, in order."""
        ...

    def rounds(self, judged: Sequence[Judgement]) -> list[int]:
        """Tokens emitted by each round of decoding an answer."""
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
        self.judged: list[Judgement] = []
        """Of every token of the target's answers, when drafting was simulated last."""

    def evaluate(self, model: Predictor) -> dict[str, float]:
        """Means of the model's figures over the documents; agreement and CR on the target's text; CR is the score."""
        sums, counts = dict[str, float](), dict[str, int]()
        for batch in self._batches(self.documents, self.length, model.device):
            for name, (value, count) in model.measure(batch).items():
                sums[name], counts[name] = sums.get(name, 0.0) + value, counts.get(name, 0) + count
        means = {name: value / max(1, counts[name]) for name, value in sums.items()}
        rounds, correct = self.simulate(model)
        emitted = sum(map(sum, rounds))
        rate = emitted / sum(map(len, rounds))
        return {**means, "written_agreement": correct / emitted, "simulated_cr": rate, "score": rate}

    def simulate(self, model: Predictor) -> tuple[list[list[int]], int]:
        """(tokens emitted by each round of each answer, how many of all answers' tokens would be drafted right)."""
        # Only answers are marked, so the marked tokens are theirs, document by document.
        batches = self._batches(self.written, self.written_length, model.device)
        judged = self.judged = [judgement for batch in batches for judgement in model.judge(batch)]
        rounds: list[list[int]] = [[] for _ in self.answers]
        at = 0
        for index in (i for row in self.written.rows(self.written_length) for i in row):
            end = at + len(self.answers[index])
            rounds[index] = model.rounds(judged[at:end])
            at = end
        assert at == len(judged)
        return rounds, int(sum(judgement[0] for judgement in judged))

    def _batches(self, packed: Packed, length: int, device: torch.device) -> Iterator[Batch]:
        rows = packed.rows(length)
        for begin in range(0, len(rows), self.settings.batch):
            yield packed.lay_out(rows[begin : begin + self.settings.batch], length).to(device)


def chain_rounds(correct: Sequence[bool], confident: Sequence[bool], *, max_draft: int, room: int) -> list[int]:
    """Tokens emitted by each round of the confidence-stopped chain.

    correct[i] says whether token i of the answer is the draft model's own choice there, confident[i] whether that
    choice's probability reaches the threshold. The unsure token is still drafted. `room` is how many tokens decoding
    was allowed to emit, at least as many as the answer has (an end token may have ended it sooner).
    """
    assert len(correct) == len(confident) <= room
    lengths, at = [], 0
    while at < len(correct):
        limit = min(max_draft, room - at - 1, len(correct) - at)
        accepted = 0
        while accepted < limit and correct[at + accepted]:
            accepted += 1
            if not confident[at + accepted - 1]:
                break
        # An accepted end token is the last: nothing of the target's own follows it.
        lengths.append(min(accepted + 1, len(correct) - at))
        at += lengths[-1]
    return lengths


def parallel_rounds(correct: Sequence[Sequence[float]]) -> list[int]:
    """Tokens emitted by each round of a chain that is drafted whole from one state, however unsure.

    correct[i][k] says whether a round that begins at token i of the answer would draft token i + k right.
    """
    lengths, at = [], 0
    while at < len(correct):
        accepted = list(correct[at]).index(False) if False in correct[at] else len(correct[at])
        # Whether room or an end token ended the answer, its last token is the round's last.
        lengths.append(min(accepted + 1, len(correct) - at))
        at += lengths[-1]
    return lengths
