"""How probable the model found what it wrote."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Which log-probabilities an answer is to carry. Raises ConfigError for a count that cannot be."""

    top: int = 0
    """The best candidates of every position, beside the token that was chosen."""
    raw: bool = False
    """Of the model's own logits; else after bias, penalties, processors, temperature and filters, as it is drawn."""

    def __post_init__(self) -> None:
        if isinstance(self.top, bool) or not isinstance(self.top, int) or self.top < 0:
            raise ConfigError(f"logprobs must be a number of candidates, at least 0, got {self.top!r}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one position of an answer."""

    token: int
    logprob: float
    """Of the token that was chosen."""
    top: tuple[tuple[int, float], ...]
    """(token, logprob) of the best candidates, best first; without those that filters left no chance."""


def token_logprobs(scores: Tensor, tokens: Tensor, top: int) -> list[TokenLogprobs]:
    """Of chosen tokens [M], by the scores [M, V] they were chosen from; in float32, or float64 for float64 scores."""
    logs = (scores if scores.dtype == torch.float64 else scores.float()).log_softmax(-1)
    chosen = logs.gather(-1, tokens[:, None])[:, 0].tolist()
    best = logs.topk(min(top, logs.shape[-1]), -1)
    rows = zip(tokens.tolist(), chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprobs(token, log, tuple(pair for pair in zip(ids, values, strict=True) if pair[1] > -torch.inf))
        for token, log, ids, values in rows
    ]
