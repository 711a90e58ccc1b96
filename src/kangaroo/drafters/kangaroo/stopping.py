"""Stopping where one more token would not pay: the rule that has no threshold to set.

With A the chance that all tokens drafted so far are accepted, a next one is
drafted while

    A * chance of the next  >  (cost of drafting and verifying it) * tokens per cost so far,

costs in plain steps: what the token is expected to bring must exceed what its time would bring otherwise. The chances
are calibrated confidences, scaled by how such chances have come true in the row, and before the first token what became
of the row's first tokens. From one token to two a pass costs more than from two to three: nothing is drafted where the
best draft is not expected to make up for that. Confidences are counted row by row, time is not: a pass over several
rows costs the same for a token of one as for a token of each, so that those who draft on pay for the others' time, too;
and with more rows a token costs more of a plain step. At some number of rows nothing is drafted any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.state import Committed, State, sent

PRIOR = 4.0
"""Rounds' worth of weight that the prior has: plain decoding's rate, and the calibrated chance of a first token."""
FORGET = 0.9
"""Share of what is known of first tokens that a round without any leaves: after a while one is tried again."""
SHARINGS = 3
"""How often those who draft on are counted again, as each that stops leaves more to pay to the others."""


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What drafting adds to a plain step, in plain steps."""

    token: float
    """For every token drafted and verified."""
    start: float = 0.0
    """For a draft at all."""

    def round(self, drafted: int) -> float:
        """Cost of a round in which so many tokens were drafted."""
        return 1 + (self.start + drafted * self.token if drafted else 0)


class CostAware:
    """Stop where the next token would not pay."""

    looks = True

    def __init__(self, calibration: Calibration, costs: Callable[[int], DraftCosts], longest: int):
        """`costs` says what drafting costs with so many rows; `longest` is the most tokens that a draft may have."""
        self._calibration, self._costs, self._longest = calibration, costs, longest
        self._now = DraftCosts(token=0.0)
        self._rows: list[_Row] = []

    def begin(self, state: State) -> Sequence[bool]:
        """If the row's first tokens have been right often enough."""
        rows = self._known(state)
        # What rounds under way have been found to cost, where somebody keeps an account of it.
        self._now = self._costs(state.batch) if state.price is None else DraftCosts(token=state.price)
        known = [[row.scale, self._calibration.after_right * row.scale, self._now.token * row.rate] for row in rows]
        self._scale, self._next, self._price = sent(known, torch.float64, state.tokens.device).unbind(1)
        self._chance = torch.ones_like(self._scale)
        self._running = sum(row.active for row in state.rows)
        begun = self._beginning([row if own.active else None for row, own in zip(rows, state.rows, strict=True)])
        self._going = sent(begun, torch.bool, state.tokens.device)
        return begun

    def _beginning(self, rows: "Sequence[_Row | None]") -> list[bool]:
        """Who drafts, of those that are running: the most whose drafts pay for the others' time, too."""
        begun = [row is not None for row in rows]
        while any(begun):
            share = self._running / sum(begun)
            kept = [
                row is not None and begins and self._gain(row, share) > 0
                for row, begins in zip(rows, begun, strict=True)
            ]
            if kept == begun:
                break
            begun = kept
        return begun

    def _gain(self, row: "_Row", share: float) -> float:
        """What the best draft is expected to bring more than its time would bring otherwise, in tokens."""
        prior, price = self._calibration.after_right, self._now.token * row.rate * share
        gain, chance = -self._now.start * row.rate * share, row.first(prior)
        for _ in range(self._longest):
            if chance <= price:
                break
            gain, chance = gain + chance - price, chance * prior * row.scale
        return gain

    def go_on(self, confidence: Tensor) -> Tensor:
        """If the whole draft and one more are still likely enough."""
        self._chance = self._chance * (self._calibration.chances(confidence) * self._scale)
        worth, going = self._chance * self._next, self._going
        for _ in range(SHARINGS):
            going = going & (worth > self._price * (self._running / going.sum().clamp(min=1)))
        self._going = going
        return going

    def observe(self, state: State, committed: Committed) -> None:
        """Count what the rows' rounds brought and cost; a prompt begins anew."""
        rows = self._known(state)
        if committed.path is None:
            chosen = committed.where.rows
            for number in range(state.batch) if chosen is None else chosen.tolist():
                rows[number] = _Row()
            return
        cost = self._now.round(max(committed.drafted))
        told = zip(rows, committed.text, committed.drafted, committed.confidences, strict=True)
        for row, emitted, drafted, confidences in told:
            if emitted:
                chances = [self._calibration.chance(confidence) for confidence in confidences[:drafted]]
                row.learn(len(emitted), drafted, cost, chances)

    def arrange(self, rows: Sequence[int]) -> None:
        """What is known of a row stays with it."""
        self._rows = [self._rows[old] if old >= 0 else _Row() for old in rows]

    def _known(self, state: State) -> "list[_Row]":
        if not self._rows:
            self._rows = [_Row() for _ in range(state.batch)]
        return self._rows


@dataclass(slots=True)
class _Row:
    """What a row's rounds have brought so far."""

    emitted: float = 0.0
    cost: float = 0.0
    accepted: float = 0.0
    foretold: float = 0.0
    """How many of the tokens whose fate was decided their calibrated chances promised."""
    hits: float = 0.0
    tries: float = 0.0
    """Of first tokens."""

    @property
    def rate(self) -> float:
        """Tokens per plain step."""
        return (self.emitted + PRIOR) / (self.cost + PRIOR)

    @property
    def scale(self) -> float:
        """How calibrated chances come true in this row: below 1 on text harder than what they were fitted on."""
        return min(1.0, (self.accepted + PRIOR) / (self.foretold + PRIOR))

    def first(self, prior: float) -> float:
        """The chance of a first token."""
        return (self.hits + PRIOR * prior) / (self.tries + PRIOR)

    def learn(self, emitted: int, drafted: int, cost: float, chances: Sequence[float]) -> None:
        """A round is over; `chances` are the drafted tokens', as calibrated."""
        self.emitted += emitted
        self.cost += cost
        self.accepted += emitted - 1
        # The first token refused has been decided as well; what came after it was never asked.
        self.foretold += sum(chances[:emitted])
        if drafted:
            self.hits += emitted > 1
            self.tries += 1
        else:
            self.hits, self.tries = self.hits * FORGET, self.tries * FORGET
