"""Many methods on one prompt, in turn: one line each."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kangaroo.bench.methods import Measured, Method
from kangaroo.sampling import Sampling


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
    return statistics.median(answer.prefill + answer.draft + answer.verify + answer.rest for answer in answers)
