"""Drafting token by token, until every row is unsure, has no room, or has drafted enough: the loop chains share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kangaroo.sampling import Stream
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Stop, chain


@dataclass(frozen=True, slots=True)
class Chain:
    """What the loop drafted in K steps."""

    tokens: Tensor
    """[B, K + 1], the pending token first."""
    valid: Tensor
    """[B, K + 1] bool."""
    probs: Tensor | None
    """[B, K + 1, V] what the tokens were drawn from, under `reject`; the pending token's zeros are read by nobody."""
    stops: tuple[Stop, ...]

    @property
    def steps(self) -> int:
        """How many times the draft model ran: K."""
        return self.tokens.shape[1] - 1

    def draft(self, *, hidden: Tensor | None = None, layers_done: int = 0) -> Draft:
        """As what the target is to verify, with the work already done on it."""
        batch, nodes = self.tokens.shape
        return Draft(
            tokens=self.tokens,
            parents=chain(batch, nodes, self.tokens.device),
            valid=self.valid,
            depth=nodes - 1,
            stops=self.stops,
            hidden=hidden,
            layers_done=layers_done,
            probs=self.probs,
        )


class Stopping(Protocol):
    """Decides how far to draft."""

    def begin(self, state: State) -> Tensor:
        """[B] bool: draft at all?"""
        ...

    def go_on(self, logits: Tensor) -> Tensor:
        """[B] bool: draft one more after the token just drafted from logits [B, 1, V]?"""
        ...

    def observe(self, state: State, committed: Committed, drafted: Tensor) -> None:
        """Tokens have joined their rows; `drafted` [B] were proposed in the round."""
        ...


class Threshold:
    """Stop after a token whose top-1 probability was below the threshold (Liu et al. 2024, section 3.2)."""

    def __init__(self, threshold: float):
        self._threshold = threshold

    def begin(self, state: State) -> Tensor:
        """Always."""
        return torch.ones_like(state.active)

    def go_on(self, logits: Tensor) -> Tensor:
        """While sure."""
        return top_probability(logits)[:, 0] >= self._threshold

    def observe(self, state: State, committed: Committed, drafted: Tensor) -> None:
        """Nothing to learn."""


def top_probability(logits: Tensor) -> Tensor:
    """[B, N, V] -> [B, N]: the top-1 probability at temperature 1, before any processor (the paper's confidence)."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def draft_chain(state: State, limits: Tensor, stopping: Stopping, step: Callable[[Tensor, int], Tensor]) -> Chain:
    """Draft at most `limits` [B] tokens per row, and no more than it has room for.

    `step` runs the draft model on the newest token of each row [B, 1], the k-th node of the draft, and returns its
    logits [B, 1, V]. The token after which a row stops stays in the draft.
    """
    limits = torch.minimum(limits, state.room - 1).clamp(0, state.spare - 1) * state.active
    confident = stopping.begin(state) if bool(limits.any()) else torch.ones_like(state.active)
    going = (limits > 0) & confident
    tokens, probs = [state.pending], list[Tensor]()
    valid = [torch.ones_like(state.pending, dtype=torch.bool)]
    for k in range(int((limits * going).max())):
        logits = step(tokens[-1], k)
        token, q = choose(logits, torch.cat(tokens, 1), state)
        tokens.append(token)
        probs += [] if q is None else [q]
        valid.append(going[:, None])
        confident = torch.where(going, stopping.go_on(logits), confident)
        going = going & confident & (limits > k + 1)
        if not going.any():
            break
    return Chain(
        torch.cat(tokens, 1),
        torch.cat(valid, 1),
        torch.cat([torch.zeros_like(probs[0]), *probs], 1) if probs else None,
        _reasons(state, limits, confident),
    )


def _reasons(state: State, limits: Tensor, confident: Tensor) -> tuple[Stop, ...]:
    rows = zip(state.active.tolist(), confident.tolist(), (limits >= state.room - 1).tolist(), strict=True)
    return tuple(
        Stop.INACTIVE if not active else Stop.CONFIDENCE if not sure else Stop.ROOM if full else Stop.LENGTH
        for active, sure, full in rows
    )


def choose(logits: Tensor, tokens: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
    """(drafted token [B, 1], the distribution [B, 1, V] it was drawn from if by `reject`) from logits [B, 1, V].

    `tokens` [B, N] are the nodes so far, the pending one first.
    """
    nodes = tokens.shape[1]
    prefix = state.prefix(tokens, chain(state.batch, nodes, tokens.device))
    if state.rule == "match":
        # With the target's own noise: where q is close to p, the two draws are the same token.
        return state.sampler.draw(logits, prefix, (state.lengths + nodes)[:, None]), None
    counters = state.round_counters(nodes)[:, -1:]
    return state.sampler.draw(logits, prefix, counters, Stream.DRAFT), state.sampler.probs(logits, prefix)
