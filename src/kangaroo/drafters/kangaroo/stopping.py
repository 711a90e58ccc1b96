"""Stopping where one more token would not pay: the rule that has no threshold to set.

With A the chance that all tokens drafted so far are accepted, a next one is
drafted while

    A * chance of the next  >  (cost of drafting and verifying it) * tokens per cost so far,

costs in plain steps: what the token is expected to bring must exceed what its time would bring otherwise. The chances
are calibrated confidences, scaled by how such chances have come true in the row, and before the first token what became
of the row's first tokens. From one token to two a pass costs more than from two to three: nothing is drafted where the
best draft is not expected to make up for that. Everything is counted row by row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kangaroo.drafters.chain import top_probability
from kangaroo.drafters.kangaroo.calibration import Calibration
from kangaroo.state import Committed, State

PRIOR = 4.0
"""Rounds' worth of weight that the prior has: plain decoding's rate, and the calibrated chance of a first token."""
FORGET = 0.9
"""Share of what is known of first tokens that a round without any leaves: after a while one is tried again."""


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

    def __init__(self, calibration: Calibration, costs: DraftCosts, longest: int):
        """`longest` is the most tokens that a draft may have."""
        self._calibration, self._costs, self._longest = calibration, costs, longest
        self._now = costs
        self._rows: list[_Row] = []

    def begin(self, state: State) -> Sequence[bool]:
        """If the row's first tokens have been right often enough."""
        rows = self._known(state)
        # What this number of rows has been found to cost, where that has been measured.
        self._now = self._costs if state.price is None else DraftCosts(token=state.price)
        for row in rows:
            row.chances = []
        return [self._gain(row) > 0 for row in rows]

    def _gain(self, row: "_Row") -> float:
        """What the best draft is expected to bring more than its time would bring otherwise, in tokens."""
        prior, price = self._calibration.after_right, self._now.token * row.rate
        gain, chance = -self._now.start * row.rate, row.first(prior)
        for _ in range(self._longest):
            if chance <= price:
                break
            gain, chance = gain + chance - price, chance * prior * row.scale
        return gain

    def go_on(self, logits: Tensor) -> Sequence[bool]:
        """If the whole draft and one more are still likely enough."""
        confidences = top_probability(logits)[:, 0].tolist()
        pays = []
        for row, confidence in zip(self._rows, confidences, strict=True):
            row.chances.append(self._calibration.chance(confidence))
            scaled = [chance * row.scale for chance in (*row.chances, self._calibration.after_right)]
            pays.append(math.prod(scaled) > self._now.token * row.rate)
        return pays

    def observe(self, state: State, committed: Committed) -> None:
        """Count what the rows' rounds brought and cost; a prompt begins anew."""
        rows = self._known(state)
        if committed.path is None:
            chosen = committed.where.rows
            for number in range(state.batch) if chosen is None else chosen.tolist():
                rows[number] = _Row()
            return
        for row, emitted, drafted in zip(rows, committed.text, committed.drafted, strict=True):
            if emitted:
                row.learn(len(emitted), drafted, self._now.round(drafted))

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
    chances: list[float] = field(default_factory=list)
    """Of the tokens of the draft under way, as calibrated."""

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

    def learn(self, emitted: int, drafted: int, cost: float) -> None:
        """A round is over."""
        self.emitted += emitted
        self.cost += cost
        self.accepted += emitted - 1
        # The first token refused has been decided as well; what came after it was never asked.
        self.foretold += sum(self.chances[: min(emitted, drafted)])
        if drafted:
            self.hits += emitted > 1
            self.tries += 1
        else:
            self.hits, self.tries = self.hits * FORGET, self.tries * FORGET
