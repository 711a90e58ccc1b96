"""What costs no training: the floors that an adapter has to rise above on the same held-out text.

Early exit drafts by the target's own norm and head behind the adapter's exit layer; a trigram drafts the token that
most often followed the last two in the training text.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from kangaroo.drafters.chain import top_probability
from kangaroo.training.adapter import AdapterObjective
from kangaroo.training.batches import Batch, learnt_positions, place_documents
from kangaroo.training.corpus import Corpus
from kangaroo.training.estimate import Floor, Floors
from kangaroo.training.evaluation import HeldOut, Judgement, Sums

Context = tuple[int, ...]


@torch.no_grad()
def measure_floors(objective: AdapterObjective, corpus: Corpus) -> Floors:
    """Simulate both on the objective's held-out answers; the trigram learns from the corpus."""
    held_out, judged = objective.held_out, objective.held_out.judged
    early_exit, trigram = (_simulate(held_out, model) for model in (EarlyExit(objective), Trigram(objective, corpus)))
    held_out.judged = judged
    return Floors(early_exit, trigram)


def _simulate(held_out: HeldOut, model: "EarlyExit | Trigram") -> Floor:
    rounds, correct = held_out.simulate(model)
    emitted = sum(map(sum, rounds))
    return Floor(emitted / sum(map(len, rounds)), correct / emitted)


class EarlyExit:
    """The target's own norm and head behind the exit layer, as a draft model to simulate."""

    def __init__(self, objective: AdapterObjective):
        self._objective, self.device = objective, objective.device

    def measure(self, batch: Batch) -> Sums:
        """Nothing beyond the simulation."""
        return {}

    def judge(self, batch: Batch) -> list[Judgement]:
        """Per marked token: would it be drafted right, and how sure would early exit be?"""
        target, mask = self._objective.target, learnt_positions(batch)
        with self._objective.precision():
            x, _ = target.run(
                target.embed(batch.tokens), place_documents(batch), None, stop=self._objective.adapter.config.exit_layer
            )
            logits = target.logits(target.norm(x[mask])).float()
        correct = logits.argmax(-1) == batch.tokens.roll(-1, 1)[mask]
        return list(zip(correct.tolist(), top_probability(logits).tolist(), strict=True))

    def rounds(self, judged: Sequence[Judgement]) -> list[int]:
        """Those of the chain."""
        return self._objective.rounds(judged)


class Trigram:
    """Counts of what followed the last two tokens, or else the last, in text learnt from; as sure as it was right."""

    def __init__(self, objective: AdapterObjective, corpus: Corpus):
        self._objective, self.device = objective, objective.device
        followers: dict[Context, Counter[int]] = {}
        for index in range(len(corpus)):
            tokens, marks = corpus.document(index)
            ids = tokens.tolist()
            for at in marks.nonzero()[0].tolist():
                for length in (1, 2):
                    if at >= length:
                        followers.setdefault(tuple(ids[at - length : at]), Counter())[ids[at]] += 1
        self._best: Mapping[Context, tuple[int, float]] = {
            context: (counts.most_common(1)[0][0], counts.most_common(1)[0][1] / counts.total())
            for context, counts in followers.items()
        }

    def measure(self, batch: Batch) -> Sums:
        """Nothing beyond the simulation."""
        return {}

    def judge(self, batch: Batch) -> list[Judgement]:
        """Per marked token: would it be drafted right, and how often was that so?"""
        judged: list[Judgement] = []
        for row, column in learnt_positions(batch).nonzero().tolist():
            last = tuple(batch.tokens[row, max(0, column - 1) : column + 1].tolist())
            token, chance = self._best.get(last) or self._best.get(last[-1:]) or (-1, 0.0)
            judged.append((float(token == int(batch.tokens[row, column + 1])), chance))
        return judged

    def rounds(self, judged: Sequence[Judgement]) -> list[int]:
        """Those of the chain."""
        return self._objective.rounds(judged)
