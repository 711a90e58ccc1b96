"""Kangaroo's chain: draft one token at a time, stop when the self-draft model is unsure (Liu et al. 2024, section 3.2).

The unsure token stays in the draft: confidence only decides whether to go on. Each row stops by its own confidence, and
the loop ends when every row has stopped. Differences from the authors' release: any batch, sampling, and the room a row
has left bounds its draft.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kangaroo.adapter import Adapter
from kangaroo.drafters.chain import draft_chain
from kangaroo.drafters.self_draft import SelfDraft, choose_exit_layer, load_adapter
from kangaroo.drafters.settings import Settings, configure
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, chain, place_chain


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainConfig:
    """When to stop drafting."""

    max_draft: int = 6
    """The paper's gamma: drafted tokens per round at most."""
    threshold: float = 0.6
    """The paper's eta: stop after a token whose top-1 probability was below it; 0 drafts a fixed length."""

    def __post_init__(self) -> None:
        if self.max_draft < 1:
            raise ConfigError(f"max_draft must be at least 1, got {self.max_draft}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a probability in [0, 1], got {self.threshold}")


class Kangaroo:
    """Shallow layers and adapter draft a chain; without an adapter this is plain early exit."""

    def __init__(self, target: Target, adapter: Adapter | None, exit_layer: int, config: ChainConfig):
        self.model, self._config = SelfDraft(target, adapter, exit_layer), config
        self.taps, self.cache_layers = self.model.taps, self.model.cache_layers
        self.nodes = config.max_draft + 1
        self._steps = 0

    def observe(self, state: State, committed: Committed) -> None:
        """Feed the adapter what it has not seen."""
        nodes = torch.arange(self.nodes, device=committed.tokens.device)
        self.model.observe(state, committed, (nodes < self._steps).expand(len(committed.tokens), -1))

    def draft(self, state: State) -> Draft:
        """One token per step until every row is unsure, has no room, or has drafted `max_draft`."""
        nodes = self.nodes
        where = self.model.target.prepare(place_chain(state.lengths, nodes, state.longest + nodes))
        hidden = list[Tensor]()

        def step(tokens: Tensor, k: int) -> Tensor:
            here = where[k : k + 1]
            hidden.append(self.model.states(tokens, here, state))
            return self.model.logits(hidden[-1], here, state)

        limits = torch.full_like(state.room, self._config.max_draft)
        drafted = draft_chain(state, limits, self._config.threshold, step)
        self._steps = drafted.steps
        # The last token's shallow pass drafts nothing, but is the first part of verifying it.
        last = self.model.states(drafted.tokens[:, -1:], where[self._steps : self._steps + 1], state)
        return Draft(
            tokens=drafted.tokens,
            parents=chain(state.batch, self._steps + 1, state.tokens.device),
            valid=drafted.valid,
            depth=self._steps,
            stops=drafted.stops,
            hidden=torch.cat([*hidden, last], 1),
            layers_done=self.model.exit_layer,
            probs=drafted.probs,
        )


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Kangaroo]:
    """Settings: adapter, and those of ChainConfig, which default to what the adapter was evaluated with."""
    adapter = load_adapter(target, settings)
    evaluated = {"max_draft": adapter.config.max_draft, "threshold": adapter.config.threshold}
    config = configure(ChainConfig, evaluated | dict(settings), also=("adapter",))
    return lambda: Kangaroo(target, adapter, adapter.config.exit_layer, config)


def build_early_exit(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Kangaroo]:
    """Settings: exit_layer, and those of ChainConfig."""
    exit_layer = choose_exit_layer(target, settings)
    config = configure(ChainConfig, settings, also=("exit_layer",))
    return lambda: Kangaroo(target, None, exit_layer, config)
