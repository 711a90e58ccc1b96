"""Do drawn texts follow the model's law? Joint frequencies of three tokens against their exact probabilities."""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kangaroo.drafters.base import Drafter
from kangaroo.drafters.none import NoDrafter
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Request
from oracle import reference_scores
from runs import generate
from tiny import build

SMALL, TOKENS, SAMPLES, PROMPT = 5, 3, 6000, (1, 2, 1, 3)
LAW = Sampling(temperature=1.1, presence_penalty=0.5, repetition_penalty=1.2, top_p=0.97, seed=23)


@cache
def small_target() -> Target:
    return Target(build("llama", seed=3, vocab_size=SMALL, num_hidden_layers=3))


@cache
def exact_law() -> Tensor:
    """The probability of each of the SMALL ** TOKENS continuations, from the model's own forward pass."""
    law = torch.ones((SMALL,) * TOKENS, dtype=torch.float64)
    for n in range(TOKENS):
        for output in itertools.product(range(SMALL), repeat=n):
            with torch.inference_mode():
                logits = small_target().model(torch.tensor([[*PROMPT, *output]])).logits[0, -1]
            probs = reference_scores(logits, PROMPT, output, LAW).softmax(-1)
            law[output] *= probs.reshape(-1, *(1,) * (TOKENS - n - 1))
    return law.flatten()


def misfit(texts: Sequence[Sequence[int]], law: Tensor) -> float:
    """How many standard deviations the chi-square statistic of the texts lies above its mean under the law."""
    cells = torch.tensor([sum(token * SMALL**i for i, token in enumerate(reversed(text))) for text in texts])
    observed = torch.bincount(cells, minlength=len(law)).double()
    expected = law * len(texts)
    assert observed[law == 0].sum() == 0, "a token that the filters had removed"
    common = expected >= 5
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]]).clamp_min(1e-9)
    freedom = len(observed) - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is nearly normal.
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


CHANCE, BROKEN = 3.7, 7.0  # one fair sample in 10,000 misfits by more than CHANCE


def sample(drafter: Drafter, rule: str) -> float:
    """The misfit of SAMPLES continuations drawn in one batch."""
    work = [Request(PROMPT, Sampling(**{**settings_of(LAW), "index": i}), TOKENS) for i in range(SAMPLES)]
    run = generate(small_target(), drafter, work, rule=rule)
    if not isinstance(drafter, NoDrafter):
        assert 0.1 < sum(run.accepted) / sum(map(sum, run.drafted)) < 0.9, "drafts should be accepted and refused"
    return misfit(run.texts, exact_law())


def settings_of(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}
