"""Answers beside one another: many methods on one prompt, and two decoders on many prompts, in turn.

Taking turns lets a drifting machine cancel out of the ratio.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kangaroo.bench.methods import Method
from kangaroo.bench.records import Measured
from kangaroo.completion import Completion, Stats
from kangaroo.decoder import Decoder
from kangaroo.sampling import Sampling
from kangaroo.text import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one method did. Seconds are medians over the repeats."""

    method: str
    tokens: list[int]
    identical: bool
    """To the first method's tokens, in every repeat."""
    seconds: float
    speedup: float
    """Over the first method's median."""
    rounds: int
    drafted: int
    accepted: int
    prefill: float
    draft: float
    verify: float
    rest: float

    @property
    def tokens_per_second(self) -> float:
        """Prefill included."""
        return len(self.tokens) / self.seconds

    @property
    def compression_rate(self) -> float:
        """Tokens per round."""
        return len(self.tokens) / self.rounds


def side_by_side(
    methods: Mapping[str, Method],
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int,
    repeats: int,
    report: Callable[[str], None] = lambda name: None,
) -> list[Line]:
    """Answer a prompt with every method, once to warm up and then `repeats` times, taking turns at going first."""
    names = list(methods)
    answers: dict[str, list[Measured]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in (*names[first:], *names[:first]):
            report(f"{name}, {repeat} of {repeats}")
            answer = methods[name].answer([prompt], sampling, max_tokens)[0]
            if repeat:
                answers[name].append(answer)
    baseline = answers[names[0]]
    return [_line(name, answers[name], baseline) for name in names]


def _line(name: str, answers: list[Measured], baseline: list[Measured]) -> Line:
    first = answers[0]
    seconds, plain = _seconds(answers), _seconds(baseline)
    return Line(
        method=name,
        tokens=first.tokens,
        identical=all(answer.tokens == baseline[0].tokens for answer in answers),
        seconds=seconds,
        speedup=plain / seconds * len(first.tokens) / len(baseline[0].tokens),
        rounds=len(first.emitted),
        drafted=sum(first.drafted),
        accepted=len(first.tokens) - len(first.emitted),
        prefill=statistics.median(answer.prefill for answer in answers),
        draft=statistics.median(answer.draft for answer in answers),
        verify=statistics.median(answer.verify for answer in answers),
        rest=statistics.median(answer.rest for answer in answers),
    )


def _seconds(answers: list[Measured]) -> float:
    return statistics.median(answer.seconds for answer in answers)


@dataclass(frozen=True, slots=True)
class Pair:
    """Baseline and method on one prompt."""

    prompt: Prompt
    baseline: Completion
    method: Completion

    @property
    def identical(self) -> bool:
        """Whether both emitted the same tokens."""
        return self.baseline.tokens == self.method.tokens

    @property
    def repetitive(self) -> bool:
        """Whether the baseline's answer repeats some 4-gram three times; drafting such text is easy."""
        tokens = self.baseline.tokens
        grams = Counter(tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3))
        return max(grams.values(), default=0) >= 3


@dataclass(frozen=True, slots=True)
class PairedRun:
    """All pairs of a run. Speeds are total tokens over total seconds, prefill included."""

    pairs: list[Pair]

    @property
    def identical(self) -> bool:
        """Whether every answer is the same."""
        return all(pair.identical for pair in self.pairs)

    @property
    def speedup(self) -> float:
        """The method's tokens per second over the baseline's."""
        return self._speed("method") / self._speed("baseline")

    @property
    def decode_speedup(self) -> float:
        """The same over decoding time alone."""
        return self._speed("method", prefill=False) / self._speed("baseline", prefill=False)

    @property
    def baseline_speed(self) -> float:
        """The baseline's tokens per second."""
        return self._speed("baseline")

    @property
    def method_speed(self) -> float:
        """The method's tokens per second."""
        return self._speed("method")

    @property
    def compression_rate(self) -> float:
        """The method's emitted tokens per round."""
        answers = [pair.method.stats for pair in self.pairs]
        return sum(s.emitted for s in answers) / max(1, sum(s.rounds for s in answers))

    @property
    def drafts(self) -> list[int]:
        """Drafted tokens of each of the method's rounds."""
        return [count for pair in self.pairs for count in pair.method.stats.drafts]

    @property
    def differing(self) -> list[Pair]:
        """Pairs whose answers differ."""
        return [pair for pair in self.pairs if not pair.identical]

    def without_repetitions(self) -> "PairedRun":
        """Only the answers that do not go in circles."""
        return replace(self, pairs=[pair for pair in self.pairs if not pair.repetitive])

    def _speed(self, side: str, *, prefill: bool = True) -> float:
        stats: list[Stats] = [getattr(pair, side).stats for pair in self.pairs]
        seconds = sum(s.decode_seconds + prefill * s.prefill_seconds for s in stats)
        return sum(s.emitted for s in stats) / max(seconds, 1e-9)


def compare(
    baseline: Decoder,
    method: Decoder,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    sampling: Sampling,
    report: Callable[[Pair], None] = lambda pair: None,
) -> PairedRun:
    """Answer every prompt with both decoders, alone, taking turns at going first; the first prompt warms both up."""
    for decoder in (baseline, method):
        decoder.generate(prompts[:1], max_tokens=max_tokens, sampling=sampling)
    pairs = []
    for place, prompt in enumerate(prompts):
        answers: dict[str, Completion] = {}
        turns = [("baseline", baseline), ("method", method)]
        for side, decoder in turns if place % 2 == 0 else reversed(turns):
            answers[side] = decoder.generate([prompt], max_tokens=max_tokens, sampling=sampling)[0]
        pairs.append(Pair(prompt, **answers))
        report(pairs[-1])
    return PairedRun(pairs)


def without_end(sampling: Sampling, eos: Sequence[int]) -> Sampling:
    """The same sampling with every end-of-sequence token barred, so that each answer has exactly max_tokens."""
    return replace(sampling, logit_bias={**sampling.logit_bias, **{token: float("-inf") for token in eos}})
