"""Stopping where one more token would not pay: the rule that has no threshold to set.

With A the chance that all tokens drafted so far are accepted, a next one is
drafted while

    A * chance of the next  >  (cost of drafting and verifying it) * tokens per cost so far,

costs in plain steps: what the token is expected to bring must exceed what its time would bring otherwise. The chances
are calibrated confidences, scaled by how such chances have come true in the row, and before the first token what became
of the row's first tokens. From one token to two a pass costs more than from two to three: nothing is drafted where the
best draft is not expected to make up for that. Everything is counted row by row.

With several rows a token costs more of a plain step, and a pass costs the same for a token of one row as for a token of
each: a row that drafts on pays for those that are expected to have stopped. Of the others it knows how many they are.
Worst is a batch of which some draft, as all rows pay for that. So whether several rows draft at all depends on their
number alone: a row of which nothing is known must have much to expect.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.state import Committed, State, sent

PRIOR = 4.0
"""Rounds' worth of weight that the prior has: plain decoding's rate, and the calibrated chance of a first token."""
WORTH = 0.3
"""Tokens a round that drafting must promise where several rows share a pass: costs along a line and a first token's
chance are too rosy by as much. Promises of 0.39 (2 rows) and 0.25 (4) became 1.17 and 0.95 of plain decoding."""
FORGET = 0.9
"""Share of what is known of first tokens that a round without any leaves: after a while one is tried again."""


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What drafting adds to a plain step, in plain steps."""

    token: float
    """For every token drafted and verified."""
    start: float = 0.0
    """For a draft at all."""
    rows: int = 1
    """That share a pass."""

    def next(self, drafted: int, lasting: float) -> float:
        """Of one more token after so many, each of which another row survives with the chance `lasting`."""
        return self.token * self.rows / (1 + (self.rows - 1) * lasting**drafted)

    def round(self, drafted: int, lasting: float) -> float:
        """Of a round in which so many tokens were drafted."""
        return 1 + (self.start + sum(self.next(k, lasting) for k in range(drafted)) if drafted else 0)


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
        if state.price is None:
            self._now = self._costs(1 if state.weighed else state.batch)
        else:  # what such rounds have been found to cost
            self._now = DraftCosts(token=state.price)
        known = [[row.scale, self._calibration.after_right * row.scale, row.rate] for row in rows]
        self._scale, self._next, self._rate = sent(known, torch.float64, state.tokens.device).unbind(1)
        self._chance, self._drafted = torch.ones_like(self._scale), 0
        if self._now.rows > 1 and self._gain(_Row()) < WORTH:
            return [False] * len(rows)
        return [self._gain(row) > 0 for row in rows]

    def _gain(self, row: "_Row") -> float:
        """What the best draft is expected to bring more than its time would bring otherwise, in tokens."""
        prior = self._calibration.after_right
        gain, chance = -self._now.start * row.rate, row.first(prior)
        for drafted in range(self._longest):
            price = self._now.next(drafted, prior) * row.rate
            if chance <= price:
                break
            gain, chance = gain + chance - price, chance * prior * row.scale
        return gain

    def go_on(self, confidence: Tensor) -> Tensor:
        """If the whole draft and one more are still likely enough."""
        self._chance = self._chance * (self._calibration.chances(confidence) * self._scale)
        self._drafted += 1
        return self._chance * self._next > self._rate * self._now.next(self._drafted, self._calibration.after_right)

    def observe(self, state: State, committed: Committed) -> None:
        """Count what the rows' rounds brought and cost; a prompt begins anew."""
        rows = self._known(state)
        if committed.path is None:
            chosen = committed.where.rows
            for number in range(state.batch) if chosen is None else chosen.tolist():
                rows[number] = _Row()
            return
        prior = self._calibration.after_right
        told = zip(rows, committed.text, committed.drafted, committed.confidences, strict=True)
        for row, emitted, drafted, confidences in told:
            if emitted:
                chances = [self._calibration.chance(confidence) for confidence in confidences[:drafted]]
                row.learn(len(emitted), drafted, self._now.round(drafted, prior), chances)

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
