"""Drafting token by token, until every row is unsure, has no room, or has drafted enough: the loop chains share.

Who drafts on is decided on the device. Where the host can look at that for nothing, it ends the loop as soon as no row
does; elsewhere it would wait for the device at every token, so the loop runs to its bound, and what was drafted past a
row's stop is padding. The draft is the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kangaroo.drafters.draft_vocabulary import DraftTokens
from kangaroo.sampling import Stream, best
from kangaroo.state import Committed, Row, State, sent
from kangaroo.tree import Draft, Placement, Stop, chain

CHEAP_READS = ("cpu",)
"""Kinds of devices that a number is read from without waiting."""
BLIND = 16
"""Tokens drafted between two looks, on other devices."""


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
    sureness: Tensor | None = None
    """[B, K + 1] as in a Draft."""

    @property
    def steps(self) -> int:
        """How many times the draft model ran: K."""
        return self.tokens.shape[1] - 1

    def draft(self, *, hidden: Tensor | None = None, layers_done: int = 0, where: Placement | None = None) -> Draft:
        """As what the target is to verify, with the work already done on it."""
        batch, nodes = self.tokens.shape
        return Draft(
            tokens=self.tokens,
            parents=chain(batch, nodes, self.tokens.device),
            valid=self.valid,
            depth=nodes - 1,
            stops=self.stops,
            sureness=self.sureness,
            hidden=hidden,
            layers_done=layers_done,
            probs=self.probs,
            where=where,
        )


class Stopping(Protocol):
    """Decides how far to draft: whether at all on the host, how far on the device, without reading from it."""

    @property
    def looks(self) -> bool:
        """Whether confidences matter to it."""
        ...

    def begin(self, state: State) -> Sequence[bool]:
        """Per row: draft at all?"""
        ...

    def go_on(self, confidence: Tensor) -> Tensor:
        """[B] bool: draft one more after the token just drafted with this confidence [B]? Asked of each in turn."""
        ...

    def observe(self, state: State, committed: Committed) -> None:
        """Tokens have joined their rows."""
        ...

    def arrange(self, rows: Sequence[int]) -> None:
        """Rows have moved, as a drafter hears of it."""
        ...


class Threshold:
    """Stop after a token whose top-1 probability was below the threshold (Liu et al. 2024, section 3.2)."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self.looks = threshold > 0

    def begin(self, state: State) -> Sequence[bool]:
        """Always."""
        return [True] * state.batch

    def go_on(self, confidence: Tensor) -> Tensor:
        """While sure."""
        return confidence.double() >= self._threshold

    def observe(self, state: State, committed: Committed) -> None:
        """Nothing to learn."""

    def arrange(self, rows: Sequence[int]) -> None:
        """Nothing to keep."""


def top_probability(logits: Tensor) -> Tensor:
    """[B, N, V] -> [B, N]: the top-1 probability at temperature 1, before any processor (the paper's confidence).

    In float32 at least: in bfloat16 the numbers between 0.25 and 1 are few, and calibrations tell finer ones apart.
    """
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).amax(-1)


def draft_chain(
    state: State,
    limits: Sequence[int],
    stopping: Stopping,
    step: Callable[[Tensor, int], Tensor],
    vocabulary: DraftTokens | None = None,
) -> Chain:
    """Draft at most `limits` tokens per row, and no more than it has room for.

    `step` runs the draft model on the newest token of each row [B, 1], the k-th node of the draft, and returns its
    logits [B, 1, V], or [B, 1, n] over a draft vocabulary. The token after which a row stops stays in the draft.
    """
    device = state.tokens.device
    limits = [max(0, min(most, room)) for most, room in zip(limits, state.draft_rooms, strict=True)]
    begun = list(stopping.begin(state)) if any(limits) else [True] * state.batch
    bounds = [limit if begins else 0 for limit, begins in zip(limits, begun, strict=True)]
    course = _Course(stopping, bounds, device) if stopping.looks and any(bounds) else None
    tokens, probs = [state.pending], list[Tensor]()
    for k in range(max(bounds)):
        if course is not None and k > 0 and _looks_at(k, device) and not course.any_goes():
            break
        logits = step(tokens[-1], k)
        token, q = choose(logits, torch.cat(tokens, 1), state, vocabulary)
        tokens.append(token)
        probs += [] if q is None else [q]
        if course is not None:
            course.go(top_probability(logits)[:, 0])
    counts = sent(bounds, torch.int64, device) if course is None else course.counts
    return Chain(
        torch.cat(tokens, 1),
        torch.arange(len(tokens), device=device) <= counts[:, None],
        torch.cat([torch.zeros_like(probs[0]), *probs], 1) if probs else None,
        tuple(map(_reason, state.rows, begun, limits)),
        None if course is None else course.sureness,
    )


def _looks_at(k: int, device: torch.device) -> bool:
    """Whether the host may look, before the k-th token, if any row goes on."""
    return device.type in CHEAP_READS or k % BLIND == 0


class _Course:
    """Who drafts on, told token by token; nothing is read unless asked for."""

    def __init__(self, stopping: Stopping, bounds: Sequence[int], device: torch.device):
        """`bounds` are how many tokens the rows may draft."""
        self._stopping, self._bounds = stopping, sent(bounds, torch.int64, device)
        self._going, self.counts = self._bounds > 0, torch.zeros_like(self._bounds)
        self._sure = torch.ones_like(self._going)
        self._confidences = list[Tensor]()

    def any_goes(self) -> bool:
        """Whether any row drafts on: a read from the device."""
        return bool(self._going.any())

    def go(self, confidence: Tensor) -> None:
        """A token was drafted, with this confidence [B]."""
        self._confidences.append(confidence * self._going)
        self._sure = torch.where(self._going, self._stopping.go_on(confidence), self._sure)
        self.counts = self.counts + self._going
        self._going = self._sure & (self.counts < self._bounds)

    @property
    def sureness(self) -> Tensor:
        """[B, K + 1] as in a Draft."""
        return torch.stack([self._sure, *self._confidences], 1).double()


def _reason(row: Row, sure: bool, limit: int) -> Stop:
    if not row.active:
        return Stop.INACTIVE
    return Stop.CONFIDENCE if not sure else Stop.ROOM if limit >= row.room - 1 else Stop.LENGTH


def choose(
    logits: Tensor, tokens: Tensor, state: State, vocabulary: DraftTokens | None = None
) -> tuple[Tensor, Tensor | None]:
    """(drafted token [B, 1], the distribution [B, 1, V] it was drawn from if by `reject`) from logits [B, 1, V].

    `tokens` [B, N] are the nodes so far, the pending one first. Logits over a draft vocabulary are [B, 1, n].
    """
    if vocabulary is not None:
        # What the rest comes to, without the vocabulary's length.
        if state.rule == "match" and state.sampler.plain:
            return vocabulary.tokens[best(logits)], None
        logits = vocabulary.spread(logits)
    nodes = tokens.shape[1]
    prefix = state.prefix(tokens, chain(state.batch, nodes, tokens.device))
    if state.rule == "match":
        # With the target's own noise: where q is close to p, the two draws are the same token.
        positions, known = (state.lengths + nodes)[:, None], state.ahead(nodes)
        return state.sampler.draw(logits, prefix, positions, known=known), None
    counters = state.round_counters(nodes)[:, -1:]
    token, q = state.sampler.draw(logits, prefix, counters, Stream.DRAFT), state.sampler.probs(logits, prefix)
    if vocabulary is not None:
        # Where a bias forbids all of it, the token is no draw but certain, and is to be verified as such.
        q = torch.where(q.isnan(), functional.one_hot(token, q.shape[-1]).to(q.dtype), q)
    return token, q
