"""An acceptance trace: how many tokens each round of a chain drafted and emitted, question by question.

**Another compression rate.** A trace is of one model on some text. For a model of which only the compression rate is
known, its rounds are counted with weights, exp(θ · emitted), where one θ makes the mean what it should be. Of all
distributions with that mean it is the one nearest to the trace's (in relative entropy). Where a token is accepted with
the same chance at every place of a long draft, it is the same law with another chance.

Assumed by this: rounds that emit as many tokens have drafts as long as in the trace. So the confidence of the other
adapter is taken to tell as much as that of the trace's adapter, at a threshold that lets it draft as far. What another
threshold would do, a trace cannot tell.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from kangaroo.bench.records import Record
from kangaroo.bench.report.statistics import Array
from kangaroo.errors import DataError

STEEPEST = 64.0
"""Of θ; beyond it all rounds but the longest, or the shortest, are gone."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Rounds counted."""

    counts: Array
    """[questions, drafted, emitted]."""

    @classmethod
    def of(cls, questions: Sequence[Iterable[tuple[int, int]]]) -> Self:
        """From (drafted, emitted) of each question's rounds. Raises DataError if there are none."""
        rounds = [(place, *pair) for place, pairs in enumerate(questions) for pair in pairs]
        if not rounds:
            raise DataError("a trace needs rounds, got none; only methods that tell their rounds can be projected")
        _, drafted, emitted = np.array(rounds).T
        counts = np.zeros((len(questions), drafted.max() + 1, emitted.max() + 1))
        np.add.at(counts, tuple(np.array(rounds).T), 1)
        return cls(counts)

    @classmethod
    def of_method(cls, records: Iterable[Record], method: str) -> Self:
        """Of all its rounds, repeats together. Raises DataError if it has none, or does not tell its drafts."""
        questions: dict[int | str, list[tuple[int, int]]] = {}
        for record in records:
            if record.method == method:
                pairs = questions.setdefault(record.question, [])
                for turn in record.turns:
                    # Some methods tell what a round emitted, but not what it drafted.
                    pairs += zip(turn.drafted, turn.emitted, strict=bool(turn.drafted))
        return cls.of(list(questions.values()))

    @property
    def longest(self) -> int:
        """Tokens drafted in a round at most."""
        return len(self.counts[0]) - 1

    @property
    def compression_rate(self) -> float:
        """CR: mean tokens per round."""
        rounds = self.counts.sum((0, 1))
        return float(rounds @ np.arange(len(rounds)) / rounds.sum())

    def at(self, compression_rate: float) -> Self:
        """The same rounds in other proportions, so that they have this compression rate.

        Raises DataError for one that no proportions of these rounds have.
        """
        rounds = self.counts.sum((0, 1))
        emitted = np.arange(len(rounds), dtype=np.float64)
        present = emitted[rounds > 0]
        if not present[0] < compression_rate < present[-1]:
            raise DataError(
                f"rounds that emit {present[0]:.0f} to {present[-1]:.0f} tokens cannot have a compression rate of "
                f"{compression_rate}; it must lie between"
            )
        low, high = -STEEPEST, STEEPEST
        for _ in range(80):
            middle = (low + high) / 2
            weighted = rounds * _weights(middle, emitted)
            if weighted @ emitted / weighted.sum() < compression_rate:
                low = middle
            else:
                high = middle
        return type(self)(self.counts * _weights((low + high) / 2, emitted))


def _weights(slope: float, emitted: Array) -> Array:
    """exp(slope · emitted), the largest of them 1."""
    exponents = slope * emitted
    return np.asarray(np.exp(exponents - exponents.max()))
