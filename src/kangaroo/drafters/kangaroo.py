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
from kangaroo.drafters.self_draft import SelfDraft, choose_exit_layer, load_adapter
from kangaroo.drafters.settings import Settings, configure
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.sampling import Stream
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Stop, chain, place_chain


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
        limit = max(0, min(self._config.max_draft, int((state.room * state.active).max()) - 1))
        where = self.model.target.prepare(place_chain(state.lengths, limit + 1, state.longest + limit + 1))
        going = state.active & (state.room > 1)
        tokens, hidden, probs = [state.pending], list[Tensor](), list[Tensor]()
        valid, confident = [torch.ones_like(state.pending, dtype=torch.bool)], torch.ones_like(going)
        for k in range(limit + 1):
            here = where[k : k + 1]
            x = self.model.states(tokens[-1], here, state)
            hidden.append(x)
            if k == limit or not going.any():
                break
            logits = self.model.logits(x, here, state)
            token, q = _choose(logits, torch.cat(tokens, 1), state)
            tokens.append(token)
            probs += [] if q is None else [q]
            valid.append(going[:, None])
            confident = torch.where(going, top_probability(logits)[:, 0] >= self._config.threshold, confident)
            going = going & confident & (state.room > k + 2)
        self._steps = len(tokens) - 1
        return Draft(
            tokens=torch.cat(tokens, 1),
            parents=chain(state.batch, len(tokens), state.tokens.device),
            valid=torch.cat(valid, 1),
            depth=self._steps,
            stops=self._reasons(state, confident, torch.cat(valid, 1)),
            hidden=torch.cat(hidden, 1),
            layers_done=self.model.exit_layer,
            # The pending token was not drawn here; its place holds zeros that nobody reads.
            probs=torch.cat([torch.zeros_like(probs[0]), *probs], 1) if probs else None,
        )

    def _reasons(self, state: State, confident: Tensor, valid: Tensor) -> tuple[Stop, ...]:
        drafted = (valid.sum(1) - 1).tolist()
        rows = zip(state.active.tolist(), confident.tolist(), (state.room - 1).tolist(), drafted, strict=True)
        return tuple(_reason(*row, self._config.max_draft) for row in rows)


def _reason(active: bool, confident: bool, room: int, drafted: int, limit: int) -> Stop:
    if not active:
        return Stop.INACTIVE
    if not confident:
        return Stop.CONFIDENCE
    return Stop.LENGTH if drafted == limit < room else Stop.ROOM


def _choose(logits: Tensor, tokens: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
    """(drafted token [B, 1], the distribution [B, 1, V] it was drawn from if by `reject`) from logits [B, 1, V]."""
    nodes = tokens.shape[1]
    prefix = state.prefix(tokens, chain(state.batch, nodes, tokens.device))
    if state.rule == "match":
        # With the target's own noise: where q is close to p, the two draws are the same token.
        return state.sampler.draw(logits, prefix, (state.lengths + nodes)[:, None]), None
    counters = state.round_counters(nodes)[:, -1:]
    return state.sampler.draw(logits, prefix, counters, Stream.DRAFT), state.sampler.probs(logits, prefix)


def top_probability(logits: Tensor) -> Tensor:
    """[B, N, V] -> [B, N]: the top-1 probability at temperature 1, before any processor (the paper's confidence)."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


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
