"""Prompt lookup: what followed the last few tokens when they last occurred (Saxena 2023).

The longest run of 3 down to 1 tokens at the end of prompt and output that occurs earlier is continued as it was then.
Differences from the original: the latest occurrence is taken instead of the first; it is found in an index that
grows with the text instead of by a scan in every round; any batch, and sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kangaroo.cache import LayerShape
from kangaroo.drafters.copying.arrivals import arrivals, copy_chain, rearranged
from kangaroo.drafters.copying.ngrams import NgramIndex, check_lengths
from kangaroo.drafters.settings import Settings, configure
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupConfig:
    """What to look for and how much to copy."""

    longest: int = 3
    shortest: int = 1
    max_draft: int = 10
    """Tokens copied at most."""

    def __post_init__(self) -> None:
        check_lengths(self.shortest, self.longest, self.max_draft)


class PromptLookup:
    """Copies from the row's own text."""

    taps: tuple[int, ...] = ()
    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, config: LookupConfig):
        self._config = config
        self.nodes = config.max_draft + 1
        self._texts: dict[int, NgramIndex] = {}

    def observe(self, state: State, committed: Committed) -> None:
        """Index what has joined the rows."""
        for arrived in arrivals(committed):
            if arrived.fresh:
                self._texts[arrived.row] = NgramIndex(self._config.shortest, self._config.longest, "latest")
            self._texts[arrived.row].extend(arrived.tokens)

    def arrange(self, rows: Sequence[int]) -> None:
        """Each index stays with its row."""
        self._texts = rearranged(self._texts, rows)

    def draft(self, state: State) -> Draft:
        """The continuation found for each row that takes part; of others the prompt may not have come."""
        found = [self._find(number, row.pending) if row.active else [] for number, row in enumerate(state.rows)]
        return copy_chain(state, found)

    def _find(self, row: int, pending: int) -> list[int]:
        return self._texts[row].continuation(pending, self._config.max_draft)[1]


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], PromptLookup]:
    """Settings: those of LookupConfig."""
    config = configure(LookupConfig, settings)
    return lambda: PromptLookup(config)
