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
from kangaroo.memory import available_bytes
from kangaroo.sampling import Prefix, Sampler, Sampling
from kangaroo.state import Request

MINIMUM_TOKENS = 2000
TIE = 0.125
"""Scores this close are a tie in half precision: a few units in the last place of a logit between 8 and 16."""


@dataclass(frozen=True, slots=True)
class Difference:
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
    emitted: int = 0
    answers: int = 0
    rounds: Rounds = field(default_factory=Rounds)
    differences: list[Difference] = field(default_factory=list)

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


def check(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float],
    batches: Sequence[int],
    max_tokens: int,
    report: Callable[[str], None] = lambda line: None,
) -> CheckReport:
    """Compare the decoder's answers, in batches of every size, with plain decoding of each prompt alone."""
    result = CheckReport()
    for temperature in temperatures:
        sampling = Sampling(temperature=temperature, seed=1)
        expected = []
        for index, prompt in enumerate(prompts):
            report(f"plain decoding, temperature {temperature:g}: prompt {index + 1} of {len(prompts)}")
            expected += _answers(decoder, NoDrafter, [prompt], sampling, max_tokens, None)
        for batch in batches:
            for first in range(0, len(prompts), batch):
                report(f"temperature {temperature:g}, batch {batch}: prompt {first + 1} of {len(prompts)}")
                part = prompts[first : first + batch]
                got = _answers(decoder, decoder.make_drafter, part, sampling, max_tokens, result.rounds)
                for index, answer in enumerate(got, first):
                    result.answers += 1
                    result.tokens += max(len(expected[index]), len(answer))
                    if answer != expected[index]:
                        found = find_difference(decoder, prompts[index], expected[index], answer, sampling)
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
def find_difference(
    decoder: Decoder, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int], sampling: Sampling
) -> Difference:
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
    return Difference(0, sampling.temperature, 1, at, *pairs[at], float(best[0] - best[1]), float64)


def _scores(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Perturbed scores [V] of the next token, by the model's own forward pass: no cache, no batch, no drafter."""
    text = torch.tensor([[*prompt, *answer]], device=next(model.parameters()).device)
    logits = model(text, use_cache=False).logits[:, -1:]
    sampler = Sampler([sampling], logits.shape[-1], text.device)
    last = torch.tensor([text.shape[1] - 1], device=text.device)
    prefix = Prefix(text, last, torch.full_like(last, len(prompt)), text[:, -1:], torch.full_like(text[:, -1:], -1))
    return sampler.perturb(sampler.scores(logits, prefix), last[:, None] + 1)[0, 0]
