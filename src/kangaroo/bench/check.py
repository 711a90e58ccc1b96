"""Is a drafter lossless on a model? Every answer against plain decoding, prompt by prompt, token by token."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch

from kangaroo.decode import decode, start
from kangaroo.decoder import Decoder
from kangaroo.drafters import MakeDrafter
from kangaroo.drafters.none import NoDrafter
from kangaroo.machine import available_bytes
from kangaroo.sampling import Prefix, Sampler, Sampling
from kangaroo.state import Request

MINIMUM_TOKENS = 2000
TIE = 0.125
"""Scores this close are a tie in half precision: a few units in the last place of a logit between 8 and 16."""


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
    float64: int | None
    """The token a float64 copy of the model draws there; None if such a copy does not fit in memory."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it: a gap below TIE, and float64 takes one of the two sides."""
        return self.gap < TIE and self.float64 in (self.expected, self.got)


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

    tokens: int = 0
    answers: int = 0
    rounds: Rounds = field(default_factory=Rounds)
    differences: list[Divergence] = field(default_factory=list)

    @property
    def problem(self) -> str | None:
        """Why the check did not pass, or None."""
        if self.differences:
            return f"{len(self.differences)} of {self.answers} answers differ"
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
class Expected:
    """Plain decoding of every prompt alone: what any drafter's answers are compared with."""

    prompts: Sequence[Sequence[int]]
    samplings: Sequence[Sampling]
    max_tokens: int
    answers: list[list[list[int]]]
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
    result, prompts = CheckReport(), expected.prompts
    for sampling, wanted in zip(expected.samplings, expected.answers, strict=True):
        for batch in batches:
            for first in range(0, len(prompts), batch):
                part = prompts[first : first + batch]
                got = _answers(decoder, decoder.make_drafter, part, sampling, expected.max_tokens, result.rounds)
                for index, answer in enumerate(got, first):
                    result.answers += 1
                    result.tokens += max(len(wanted[index]), len(answer))
                    if answer != wanted[index]:
                        found = find_divergence(decoder, prompts[index], wanted[index], answer, sampling)
                        result.differences.append(replace(found, prompt=index, batch=batch))
    return result


def _answers(
    decoder: Decoder,
    make_drafter: MakeDrafter,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_tokens: int,
    rounds: Rounds | None,
) -> list[list[int]]:
    drafter = make_drafter()
    state = start(decoder.target, drafter, [Request(p, sampling, max_tokens) for p in prompts], eos=decoder.eos)
    texts: list[list[int]] = [[] for _ in prompts]
    for done in decode(decoder.target, drafter, state):
        for row, emitted in enumerate(done.emitted):
            texts[row].extend(emitted)
            if rounds is not None and emitted:
                rounds.add(done.drafted[row], len(emitted) - 1)
    return texts


@torch.inference_mode()
def find_divergence(
    decoder: Decoder, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int], sampling: Sampling
) -> Divergence:
    """The first token in which two different answers to a prompt differ, the gap there, and what float64 says."""
    # Where one answer is the beginning of the other, the missing token counts as -1.
    pairs = list(zip_longest(expected, got, fillvalue=-1))
    at = next(place for place, (wanted, found) in enumerate(pairs) if wanted != found)
    scores = _scores(decoder.target.model, prompt, expected[:at], sampling)
    best = scores.topk(2).values
    float64 = None
    size = 8 * sum(p.numel() for p in decoder.target.model.parameters())
    if size < available_bytes(decoder.target.device):
        precise = copy.deepcopy(decoder.target.model).double()
        float64 = int(_scores(precise, prompt, expected[:at], sampling).argmax())
    return Divergence(0, sampling.temperature, 1, at, *pairs[at], float(best[0] - best[1]), float64)


def _scores(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Perturbed scores [V] of the next token, by the model's own forward pass: no cache, no batch, no drafter."""
    text = torch.tensor([[*prompt, *answer]], device=next(model.parameters()).device)
    logits = model(text, use_cache=False).logits[:, -1:]
    sampler = Sampler([sampling], logits.shape[-1], text.device)
    last = torch.tensor([text.shape[1] - 1], device=text.device)
    prefix = Prefix(text, last, torch.full_like(last, len(prompt)), text[:, -1:], torch.full_like(text[:, -1:], -1))
    return sampler.perturb(sampler.scores(logits, prefix), last[:, None] + 1)[0, 0]
