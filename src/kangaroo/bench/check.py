"""Is a drafter lossless on a model? Every answer against plain decoding, prompt by prompt, token by token."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch

from kangaroo.bench.bits import Noting, NotingTarget, differing
from kangaroo.decode import decode, start
from kangaroo.decoder import Decoder
from kangaroo.drafters import MakeDrafter
from kangaroo.drafters.none import NoDrafter
from kangaroo.machine import available_bytes
from kangaroo.sampling import Prefix, Sampler, Sampling
from kangaroo.state import Request
from kangaroo.trial import Exactness

MINIMUM_TOKENS = 2000


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token in which two texts differ, and how close the call was."""

    prompt: int
    temperature: float
    batch: int
    position: int
    """Place in the answer, from 0."""
    expected: int
    got: int
    gap: float
    """Between the two best scores there (logits after processors, plus noise), in the model's own precision."""
    bound: float
    """The widest gap that rounding explains (`tie_bound`)."""
    float64: int | None
    """The token a float64 copy of the model draws there; None if such a copy does not fit in memory."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it: the gap is within its bound, and float64 takes one of the two sides."""
        return self.gap <= self.bound and self.float64 in (self.expected, self.got)


def tie_bound(dtype: torch.dtype, layers: int, largest: float, temperature: float) -> float:
    """The widest gap between two scores whose order rounding can turn.

    A layer adds to the residual stream twice, and each sum is rounded: an error of at most u times its size, u being
    half the distance from 1 to the next number of the precision. Errors of 2 L + 1 roundings, the head's among them,
    add up as a random walk's do, and a logit is off by about u sqrt(2 L + 1) times the `largest`. Two passes may each
    be off by as much at either of two scores: four times that, over the temperature that scores are divided by.
    """
    unit = torch.finfo(dtype).eps / 2
    return 4 * unit * math.sqrt(2 * layers + 1) * largest / (temperature or 1.0)


@dataclass(slots=True)
class Rounds:
    """How many rounds accepted none, some or all of what was drafted; rounds without a draft are apart."""

    none: int = 0
    some: int = 0
    all: int = 0
    undrafted: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        """Count one row's round."""
        if drafted == 0:
            self.undrafted += 1
        elif accepted == 0:
            self.none += 1
        elif accepted < drafted:
            self.some += 1
        else:
            self.all += 1


@dataclass(slots=True)
class CheckReport:
    """What a check found."""

    exactness: Exactness
    """What the target promises."""
    tokens: int = 0
    answers: int = 0
    bits: int = 0
    """Tokens whose logits differ in some bit from plain decoding's, up to the first token that differs."""
    rounds: Rounds = field(default_factory=Rounds)
    differences: list[Divergence] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        """What was found that must not be, or None."""
        wrong = [found for found in self.differences if self.exactness.level == "bitwise" or not found.is_tie]
        if wrong:
            return f"{len(wrong)} of {self.answers} answers differ"
        if self.bits and self.exactness.level == "bitwise":
            return f"the logits of {self.bits} of {self.tokens} tokens differ in some bit"
        return None

    @property
    def problem(self) -> str | None:
        """Why the check did not pass, or None: a failure, or that too little was tried to tell."""
        if self.failure is not None:
            return self.failure
        if self.tokens < MINIMUM_TOKENS:
            return f"only {self.tokens} tokens were compared; {MINIMUM_TOKENS} are the least that means anything"
        if self.rounds.some + self.rounds.all == 0:
            return "no drafted token was ever accepted, so nothing was tested"
        return None


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.8, top_p=0.95, seed=1),
    Sampling(temperature=1.2, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, seed=1),
)
"""What is checked unless told otherwise: greedy, sampled, hot with penalties."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of an answer, and for each a number that stands for the bits of the logits it was chosen from."""

    tokens: list[int]
    bits: list[int]


@dataclass(frozen=True, slots=True)
class Expected:
    """Plain decoding of every prompt alone: what any drafter's answers are compared with."""

    prompts: Sequence[Sequence[int]]
    samplings: Sequence[Sampling]
    max_tokens: int
    answers: list[list["Answer"]]
    """Per sampling, per prompt."""


def expect(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling] = SAMPLINGS,
    *,
    max_tokens: int,
    report: Callable[[str], None] = lambda line: None,
) -> Expected:
    """Decode every prompt with every sampling, alone and without drafts."""
    answers = []
    for sampling in samplings:
        report(f"plain decoding, temperature {sampling.temperature:g}")
        answers.append([_answers(decoder, NoDrafter, [p], sampling, max_tokens, None)[0] for p in prompts])
    return Expected(prompts, samplings, max_tokens, answers)


def check(decoder: Decoder, expected: Expected, *, batches: Sequence[int]) -> CheckReport:
    """Compare the decoder's answers, in batches of every size, with those expected."""
    result, prompts = CheckReport(decoder.target.exactness), expected.prompts
    for sampling, wanted in zip(expected.samplings, expected.answers, strict=True):
        for batch in batches:
            for first in range(0, len(prompts), batch):
                part = prompts[first : first + batch]
                got = _answers(decoder, decoder.make_drafter, part, sampling, expected.max_tokens, result.rounds)
                for index, answer in enumerate(got, first):
                    found = _compare(result, wanted[index], answer, decoder, prompts[index], sampling)
                    if found is not None:
                        result.differences.append(replace(found, prompt=index, batch=batch))
    return result


def _compare(
    result: CheckReport, wanted: Answer, got: Answer, decoder: Decoder, prompt: Sequence[int], sampling: Sampling
) -> Divergence | None:
    """Count one answer, and describe where it departs from the one wanted, if it does."""
    result.answers += 1
    result.tokens += max(len(wanted.tokens), len(got.tokens))
    pairs = zip(wanted.tokens, got.tokens, strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(wanted.tokens), len(got.tokens)) - 1)
    # The first token that differs was still chosen after the same text.
    result.bits += differing(wanted.bits, got.bits, same + 1)
    if got.tokens == wanted.tokens:
        return None
    return find_divergence(decoder, prompt, wanted.tokens, got.tokens, sampling)


def _answers(
    decoder: Decoder,
    make_drafter: MakeDrafter,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_tokens: int,
    rounds: Rounds | None,
) -> list[Answer]:
    target = NotingTarget(decoder.target)
    drafter = Noting(make_drafter(), target, len(prompts))
    state = start(target, drafter, [Request(p, sampling, max_tokens) for p in prompts], eos=decoder.eos)
    texts: list[list[int]] = [[] for _ in prompts]
    for done in decode(target, drafter, state):
        for row, emitted in enumerate(done.emitted):
            texts[row].extend(emitted)
            if rounds is not None and emitted:
                rounds.add(done.drafted[row], len(emitted) - 1)
    return [Answer(text, bits) for text, bits in zip(texts, drafter.bits, strict=True)]


@torch.inference_mode()
def find_divergence(
    decoder: Decoder, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int], sampling: Sampling
) -> Divergence:
    """The first token in which two different answers to a prompt differ, the gap there, and what float64 says."""
    # Where one answer is the beginning of the other, the missing token counts as -1.
    pairs = list(zip_longest(expected, got, fillvalue=-1))
    at = next(place for place, (wanted, found) in enumerate(pairs) if wanted != found)
    scores, largest = _scores(decoder.target.model, prompt, expected[:at], sampling)
    best = scores.topk(2).values
    float64 = None
    size = 8 * decoder.target.parameters
    if size < available_bytes(decoder.target.device):
        precise = copy.deepcopy(decoder.target.model).double()
        float64 = int(_scores(precise, prompt, expected[:at], sampling)[0].argmax())
    target = decoder.target
    bound = tie_bound(target.dtype, target.num_layers, largest, sampling.temperature)
    return Divergence(0, sampling.temperature, 1, at, *pairs[at], float(best[0] - best[1]), bound, float64)


def _scores(
    model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling
) -> tuple[torch.Tensor, float]:
    """Perturbed scores [V] of the next token and its largest logit, by the model's own pass: no cache, no drafter."""
    text = torch.tensor([[*prompt, *answer]], device=next(model.parameters()).device)
    logits = model(text, use_cache=False).logits[:, -1:]
    sampler = Sampler([sampling], logits.shape[-1], text.device)
    last = torch.tensor([text.shape[1] - 1], device=text.device)
    prefix = Prefix(text, last, torch.full_like(last, len(prompt)), text[:, -1:], torch.full_like(text[:, -1:], -1))
    return sampler.perturb(sampler.scores(logits, prefix), last[:, None] + 1)[0, 0], float(logits.abs().max())
