"""Kangaroo and copying from the context, whichever promises more tokens per cost.

Where the end of a row's text has occurred before, what followed can be copied at the cost of verifying it; elsewhere
the self-draft model drafts. A row copies if

    (1 + expected accepted copies) / cost of the round  >=  the same of a round drafted by the adapter,

in which a copy after a match of n tokens is accepted with a probability that is learnt, for every n, from what became
of the row's earlier copies, and the adapter's rounds count as they have come out so far. Costs are in plain steps: a
draft step costs its share of the weights, a further node to verify `node_cost`. Copied tokens run the shallow layers
like any draft.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kangaroo.drafters.chain import Chain, Threshold
from kangaroo.drafters.copying.arrivals import arrivals, copy_chain, rearranged
from kangaroo.drafters.copying.ngrams import NgramIndex, check_lengths
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.chain import ChainConfig
from kangaroo.drafters.kangaroo.self_draft import ADAPTER_SETTINGS, SelfChain, SelfDraft, load_adapter
from kangaroo.drafters.settings import Settings, configure
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft

EXPECTED, WEIGHT = {1: 0.2, 2: 0.4, 3: 0.6}, 4.0
"""What is assumed of copies after matches of n tokens (0.8 beyond), as if seen so many times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KangarooLookupConfig:
    """The chain's settings, and what to copy."""

    max_draft: int = 6
    threshold: float = 0.6
    longest: int = 5
    """Longest match looked for."""
    max_copy: int = 10
    """Tokens copied at most."""
    node_cost: float = 0.02
    """Cost of verifying one more token, in plain steps."""

    def __post_init__(self) -> None:
        ChainConfig(max_draft=self.max_draft, threshold=self.threshold)
        check_lengths(1, self.longest, self.max_copy)
        if self.node_cost < 0:
            raise ConfigError(f"node_cost must not be negative, got {self.node_cost}")


@dataclass(slots=True)
class Odds:
    """What copies and the adapter have brought a row so far."""

    config: KangarooLookupConfig
    draft_cost: float
    copied: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Match length -> (accepted copies, copies whose fate was decided)."""
    adapter: tuple[float, float] = (0.0, 0.0)
    """(emitted tokens, cost) of the adapter's rounds."""

    def prefers_copy(self, match: int, tokens: int) -> bool:
        """Whether copying this many tokens after a match of this length promises more per cost."""
        hits, tries = self.copied.get(match, (0.0, 0.0))
        chance = (hits + WEIGHT * EXPECTED.get(match, 0.8)) / (tries + WEIGHT)
        expected = sum(chance**i for i in range(tokens + 1))
        emitted, cost = self.adapter
        # Until rounds have been seen, the adapter counts as having half of its drafts accepted.
        drafts = self.config.max_draft / 2
        emitted, cost = emitted + WEIGHT * (1 + drafts / 2), cost + WEIGHT * self.cost(drafts)
        return expected / (1 + self.config.node_cost * tokens) >= emitted / cost

    def cost(self, drafts: float) -> float:
        """Plain steps that a round of so many adapter drafts costs."""
        return 1 + drafts * (self.draft_cost + self.config.node_cost)

    def learn(self, match: int, drafted: int, emitted: int) -> None:
        """A round is over: `match` is 0 if the adapter drafted it."""
        if match:
            hits, tries = self.copied.get(match, (0.0, 0.0))
            accepted = emitted - 1
            self.copied[match] = hits + accepted, tries + min(accepted + 1, drafted)
        else:
            self.adapter = self.adapter[0] + emitted, self.adapter[1] + self.cost(drafted)


class KangarooLookup:
    """Each row copies or drafts, round by round."""

    def __init__(self, target: Target, adapter: Adapter | None, exit_layer: int, config: KangarooLookupConfig):
        self.model, self._config = SelfDraft(target, adapter, exit_layer), config
        self.taps, self.cache_layers = self.model.taps, self.model.cache_layers
        self.nodes = 1 + max(config.max_draft, config.max_copy)
        self._chain = SelfChain(self.model, self.nodes)
        self._draft_cost, self._stopping = self.model.weight_share, Threshold(config.threshold)
        self._odds: dict[int, Odds] = {}
        self._texts: dict[int, NgramIndex] = {}
        self._matches: list[int] = []

    def observe(self, state: State, committed: Committed) -> None:
        """Feed the adapter and the index; after a round, learn from its outcome."""
        self._chain.observe(state, committed)
        for arrived in arrivals(committed):
            if arrived.fresh:
                self._texts[arrived.row] = NgramIndex(1, self._config.longest, "latest")
                # Of its own row alone, so that no row's drafts depend on its neighbours.
                self._odds[arrived.row] = Odds(self._config, self._draft_cost)
            self._texts[arrived.row].extend(arrived.tokens)
            if not arrived.prompt:
                drafted = committed.drafted[arrived.row]
                self._odds[arrived.row].learn(self._matches[arrived.row], drafted, len(arrived.tokens))

    def arrange(self, rows: Sequence[int]) -> None:
        """What is known of a row stays with it."""
        self._chain.model.arrange(rows)
        self._odds, self._texts = rearranged(self._odds, rows), rearranged(self._texts, rows)

    def draft(self, state: State) -> Draft:
        """Copies where they promise more, drafts of the adapter elsewhere."""
        nothing = 0, list[int]()  # of rows that take no part the prompt may not have come
        found = [self._look_up(number, row.pending) if row.active else nothing for number, row in enumerate(state.rows)]
        copies = copy_chain(state, [copy for _, copy in found])
        self._matches = [match for match, _ in found]
        copying = torch.tensor(self._matches, device=state.tokens.device) > 0

        def replaced(tokens: Tensor, k: int) -> Tensor:
            copied = copies.tokens[:, k : k + 1]  # of no width past the longest copy
            return torch.where(copying[:, None], copied, tokens) if copied.shape[1] else tokens

        limits = [0 if match else self._config.max_draft for match in self._matches]
        grown = self._chain.grow(state, limits, self._stopping, replaced)
        return self._chain.finish(state, _merge(grown, copies, copying, self._matches))

    def _look_up(self, row: int, pending: int) -> tuple[int, list[int]]:
        """(length of the match, the copy) if copying promises more, else (0, [])."""
        match, copy = self._texts[row].continuation(pending, self._config.max_copy, loop=True)
        return (match, copy) if match and self._odds[row].prefers_copy(match, len(copy)) else (0, [])


def _merge(drafted: Chain, copies: Draft, copying: Tensor, matches: Sequence[int]) -> Chain:
    """One chain per row: its copy where it is copying, else what was drafted."""
    nodes = max(drafted.tokens.shape[1], copies.tokens.shape[1])

    def widen(x: Tensor) -> Tensor:
        return functional.pad(x, (0, nodes - x.shape[1]))

    tokens = torch.where(copying[:, None], widen(copies.tokens), widen(drafted.tokens))
    valid = torch.where(copying[:, None], widen(copies.valid), widen(drafted.valid))
    stops = tuple(
        copied if match else own for copied, own, match in zip(copies.stops, drafted.stops, matches, strict=True)
    )
    probs = drafted.probs
    if probs is not None:
        # Copies are certain: under `reject` they count as drawn from a distribution that holds nothing else.
        certain = functional.one_hot(tokens, probs.shape[-1]).to(probs.dtype)
        probs = torch.where(copying[:, None, None], certain, functional.pad(probs, (0, 0, 0, nodes - probs.shape[1])))
    return Chain(tokens, valid, probs, stops, drafted.sureness)


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], KangarooLookup]:
    """Settings: adapter, and those of KangarooLookupConfig; the chain's default to the adapter's own."""
    adapter = load_adapter(target, settings)
    evaluated = {"max_draft": adapter.config.max_draft, "threshold": adapter.config.threshold}
    config = configure(KangarooLookupConfig, evaluated | dict(settings), also=ADAPTER_SETTINGS)
    return lambda: KangarooLookup(target, adapter, adapter.config.exit_layer, config)
