"""The bits of the logits that every emitted token was chosen from, as one number per token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kangaroo.drafters.base import Drafter
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, pick

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(logits: Tensor) -> Tensor:
    """[..., V] -> [...] int64: equal for equal bits, and for other bits only by a chance of about 2 ** -63."""
    words = logits.contiguous().view(_WORDS[logits.element_size()]).long()
    random = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (logits.shape[-1],), generator=random) * 2 + 1
    return (words * keys.to(words.device)).sum(-1)


class NotingTarget(Target):
    """A second view of a target, on the same weights and tables, that keeps the latest logits asked of it."""

    def __init__(self, target: Target):
        self.__dict__.update(target.__dict__)
        self.latest: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """As the target does."""
        self.latest = super().logits(x)
        return self.latest


class Noting:
    """A drafter that looks up, after every round, which bits the round's tokens were chosen from.

    The loop asks its target for logits once a round; what the drafter asks goes to the target it was made with.
    """

    def __init__(self, drafter: Drafter, target: NotingTarget, rows: int):
        self._drafter, self._target = drafter, target
        self.taps, self.nodes, self.cache_layers = drafter.taps, drafter.nodes, drafter.cache_layers
        self.bits: list[list[int]] = [[] for _ in range(rows)]
        """Per row, one number for each emitted token."""

    def observe(self, state: State, committed: Committed) -> None:
        """As the drafter does."""
        if committed.path is not None:
            assert self._target.latest is not None, "a round asks for logits"
            chosen = digest(pick(self._target.latest, committed.path)).tolist()
            for own, new, text in zip(self.bits, chosen, committed.text, strict=True):
                own += new[: len(text)]
        self._drafter.observe(state, committed)

    def arrange(self, rows: Sequence[int]) -> None:
        """As the drafter does."""
        self._drafter.arrange(rows)

    def draft(self, state: State) -> Draft:
        """As the drafter does."""
        return self._drafter.draft(state)


def differing(wanted: Sequence[Any], got: Sequence[Any], upto: int) -> int:
    """At how many of the first `upto` places two lists differ."""
    return sum(a != b for a, b in zip(wanted[:upto], got[:upto], strict=True))
