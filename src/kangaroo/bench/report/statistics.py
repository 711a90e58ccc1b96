"""What records say, per method and task: speed-up with its interval, compression, acceptance, where the time went.

**Speed-up** is the baseline's seconds per token over the method's, each of them total seconds over total tokens,
prefill included, summed over the questions of the task and all repeats. Where the answers are identical, it is simply
the ratio of total times. Its interval resamples questions (`bootstrap.py`): a drawn question brings its repeats, the
method's and the baseline's, along. So it speaks of other questions of the same kind, not of other machines.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kangaroo.bench.questions import QuestionId
from kangaroo.bench.records import BASELINE
from kangaroo.bench.report.grid import OVERALL, FirstDifference, Grid, first_difference

Array = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95


def resample_totals(values: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Totals [resamples, ...] of values [questions, ...] over as many questions, drawn with replacement.

    All columns of a question come and go together, so that what was measured in pairs stays paired.
    """
    count = len(values)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    totals: Array = times @ values.reshape(count, -1)
    return totals.reshape(resamples, *values.shape[1:])


def interval(draws: Array) -> tuple[float, float]:
    """The percentile interval, at LEVEL, of draws [resamples]."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


PHASES = ("prefill", "draft", "verify", "rest")
TOKENS, TOTAL, DECODING = range(3)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval, which a single question cannot give."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One method on one task, all questions and repeats together."""

    method: str
    task: str
    questions: int
    answers: int
    """Questions times repeats."""
    tokens: int
    seconds: dict[str, float]
    """By phase."""
    speedup: Estimate
    decode_speedup: Estimate | None
    """The same without prefill; None where a method does not tell its prefill."""
    emitted: Counter[int]
    """Rounds by the tokens they emitted; empty where a method does not tell its rounds."""
    drafted: Counter[int]
    """Rounds by the tokens drafted in them; empty likewise."""
    stops: Counter[str]
    """Rounds by why drafting stopped; empty likewise."""
    differences: tuple[FirstDifference, ...]
    """One for every answer that is not the baseline's."""
    dropped_tokens: int
    """Prompt tokens left out because the context would not hold them."""
    peak_bytes: int | None

    @property
    def rounds(self) -> int:
        """How many there were; 0 where a method does not tell."""
        return self.emitted.total()

    @property
    def emitted_tokens(self) -> int:
        """In all rounds."""
        return sum(tokens * rounds for tokens, rounds in self.emitted.items())

    @property
    def drafted_tokens(self) -> int:
        """In all rounds."""
        return sum(tokens * rounds for tokens, rounds in self.drafted.items())

    @property
    def tokens_per_second(self) -> float:
        """Prefill included."""
        return self.tokens / sum(self.seconds.values())

    @property
    def compression_rate(self) -> float | None:
        """CR: mean tokens per round, the target's own one included."""
        return self.emitted_tokens / self.rounds if self.rounds else None

    @property
    def drafted_per_round(self) -> float | None:
        """Mean drafted tokens per round."""
        return self.drafted_tokens / self.drafted.total() if self.drafted else None

    @property
    def accepted_share(self) -> float | None:
        """Share of the drafted tokens that were emitted; None where none were drafted."""
        return (self.emitted_tokens - self.rounds) / self.drafted_tokens if self.drafted_tokens else None

    @property
    def acceptance(self) -> list[float]:
        """CTAR(w) for w = 1, 2, ...: the share of rounds that emitted more than w tokens, while it is not zero."""
        return [
            sum(count for emitted, count in self.emitted.items() if emitted > w) / self.rounds
            for w in range(1, max(self.emitted, default=1))
        ]

    @property
    def identical(self) -> int:
        """Answers that are the baseline's, token by token."""
        return self.answers - len(self.differences)

    @property
    def ties(self) -> int:
        """Answers that depart from the baseline's where rounding explains it."""
        return sum(difference.tie for difference in self.differences)


def summarise(grid: Grid, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict[str, Summary]]:
    """Summaries by method and task, OVERALL the last of the tasks. The same seed gives the same intervals."""
    summaries: dict[str, dict[str, Summary]] = {method: {} for method in grid.methods}
    for task, questions, measured, draws in _resampled(grid, resamples, seed):
        for place, method in enumerate(grid.methods):
            estimates = [_estimate(measured, draws, (0, place), column) for column in (TOTAL, DECODING)]
            summaries[method][task] = _summary(grid, method, task, questions, estimates)
    return summaries


def relative_speeds(
    grid: Grid, reference: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """How many times as fast as `reference` each method is, by method and task, OVERALL the last of the tasks.

    Paired as speed-ups are: a drawn question brings both methods' answers along.
    """
    first = grid.methods.index(reference)
    speeds: dict[str, dict[str, Estimate]] = {method: {} for method in grid.methods}
    for task, _, measured, draws in _resampled(grid, resamples, seed):
        for place, method in enumerate(grid.methods):
            found = _estimate(measured, draws, (first, place), TOTAL)
            assert found is not None, "every answer takes time"
            speeds[method][task] = found
    return speeds


def ratio(values: Array) -> Estimate:
    """Total over total of values [questions, 2], with the interval that resampling questions gives."""
    above, below = values.sum(0)
    if len(values) == 1:
        return Estimate(float(above / below))
    draws = resample_totals(values)
    return Estimate(float(above / below), *interval(draws[:, 0] / draws[:, 1]))


def _resampled(grid: Grid, resamples: int, seed: int) -> Iterator[tuple[str, list[QuestionId], Array, Array]]:
    """Every task with its questions, what was measured of them, and totals of draws [resamples, methods, columns]."""
    for task, questions in {**grid.tasks, OVERALL: grid.questions}.items():
        measured = _measure(grid, questions)
        yield task, questions, measured, resample_totals(measured, resamples=resamples, seed=seed)


def _measure(grid: Grid, questions: list[QuestionId]) -> Array:
    """[questions, methods, (TOKENS, TOTAL seconds, DECODING seconds)], repeats added up.

    Decoding seconds are not a number where a method does not tell its prefill apart.
    """

    def row(method: str, question: QuestionId) -> list[float]:
        turns = [turn for answer in grid.answers(method, question) for turn in answer.turns]
        seconds, prefill = sum(turn.seconds for turn in turns), sum(turn.prefill for turn in turns)
        return [sum(len(turn.tokens) for turn in turns), seconds, seconds - prefill if prefill else math.nan]

    return np.array([[row(method, question) for method in grid.methods] for question in questions])


def _estimate(measured: Array, draws: Array, pair: tuple[int, int], column: int) -> Estimate | None:
    """Speed of the second of a pair of methods in units of the first's, from what was measured and draws of it."""
    value = float(_speedups(measured.sum(0)[list(pair)], column))
    if math.isnan(value):
        return None
    return Estimate(value, *interval(_speedups(draws[:, list(pair)], column))) if len(measured) > 1 else Estimate(value)


def _speedups(totals: Array, column: int) -> Array:
    """Seconds per token of the first method over the second's, from totals [..., methods, columns]."""
    pace = totals[..., column] / totals[..., TOKENS]
    return np.asarray(pace[..., 0] / pace[..., 1])


def _summary(
    grid: Grid, method: str, task: str, questions: list[QuestionId], estimates: list[Estimate | None]
) -> Summary:
    speedup, decode_speedup = estimates
    assert speedup is not None, "every answer has tokens and takes time"
    answers = [answer for question in questions for answer in grid.answers(method, question)]
    plain = [answer for question in questions for answer in grid.answers(BASELINE, question)]
    turns = [turn for answer in answers for turn in answer.turns]
    found = map(first_difference, answers, plain)
    return Summary(
        method=method,
        task=task,
        questions=len(questions),
        answers=len(answers),
        tokens=sum(len(turn.tokens) for turn in turns),
        seconds={phase: sum(getattr(turn, phase) for turn in turns) for phase in PHASES},
        speedup=speedup,
        decode_speedup=decode_speedup,
        emitted=Counter(chain.from_iterable(turn.emitted for turn in turns)),
        drafted=Counter(chain.from_iterable(turn.drafted for turn in turns)),
        stops=Counter(chain.from_iterable(turn.stops for turn in turns)),
        differences=tuple(difference for difference in found if difference is not None),
        dropped_tokens=sum(turn.dropped_tokens for turn in turns),
        peak_bytes=max((turn.peak_bytes for turn in turns if turn.peak_bytes is not None), default=None),
    )
