"""When a chain stops: below a set confidence (Liu et al. 2024, section 3.2), or where one more token would not pay.

The second rule has no threshold to set. With A the chance that all tokens drafted so far are accepted, a next one is
drafted while

    A * chance of the next  >  (cost of drafting and verifying it) * tokens per cost so far,

costs in plain steps: what the token is expected to bring must exceed what its time would bring otherwise. The chances
are calibrated confidences, scaled by how such chances have come true in the row, and before the first token what became
of the row's first tokens; nothing at all may be drafted. Everything is counted row by row.
"""

from typing import Protocol

import torch
from torch import Tensor

from kangaroo.calibration import Calibration
from kangaroo.state import Committed, State

PRIOR = 4.0
"""Rounds' worth of weight that the prior has: plain decoding's rate, and the calibrated chance of a first token."""
FORGET = 0.9
"""Share of what is known of first tokens that a round without any leaves: after a while one is tried again."""


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
    """Stop after a token whose top-1 probability was below the threshold."""

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


class CostAware:
    """Stop where the next token would not pay."""

    def __init__(self, calibration: Calibration, draft_cost: float, node_cost: float):
        """Costs of drafting a token and of verifying one more, in plain steps."""
        self._calibration, self._token_cost = calibration, draft_cost + node_cost
        self._rows: _Rows | None = None
        self._chances: list[Tensor] = []
        """[B] of every token of the draft under way, as calibrated."""

    def begin(self, state: State) -> Tensor:
        """If the row's first tokens have been right often enough."""
        rows = self._known(state)
        self._chances = []
        return rows.first(self._calibration.after_right) > self._token_cost * rows.rate

    def go_on(self, logits: Tensor) -> Tensor:
        """If the whole draft and one more are still likely enough."""
        assert self._rows is not None, "a round has begun"
        self._chances.append(self._calibration.chance(top_probability(logits)[:, 0]))
        scaled = torch.stack([*self._chances, torch.full_like(self._chances[0], self._calibration.after_right)])
        return (scaled * self._rows.scale).prod(0) > self._token_cost * self._rows.rate

    def observe(self, state: State, committed: Committed, drafted: Tensor) -> None:
        """Count what the rows' rounds brought and cost; a prompt begins anew."""
        rows = self._known(state)
        if committed.path is None:
            rows.forget(committed.where.rows)
            return
        accepted = committed.count - 1
        # The first token refused has been decided as well; what came after it was never asked.
        decided = torch.minimum(committed.count, drafted)
        foretold = torch.zeros_like(rows.foretold)
        for place, chance in enumerate(self._chances):
            foretold += chance * (place < decided)
        rows.learn(committed.count, accepted, drafted, foretold, self._token_cost)

    def _known(self, state: State) -> "_Rows":
        if self._rows is None:
            self._rows = _Rows(state.batch, state.lengths.device)
        return self._rows


class _Rows:
    """What a row's rounds have brought so far; [B] each."""

    def __init__(self, batch: int, device: torch.device):
        def zeros() -> Tensor:
            return torch.zeros(batch, dtype=torch.float64, device=device)

        self.emitted, self.cost = zeros(), zeros()
        self.accepted, self.foretold = zeros(), zeros()
        """Accepted tokens, and how many of the decided ones their calibrated chances promised."""
        self.hits, self.tries = zeros(), zeros()
        """Of first tokens."""

    @property
    def rate(self) -> Tensor:
        """Tokens per plain step."""
        return (self.emitted + PRIOR) / (self.cost + PRIOR)

    @property
    def scale(self) -> Tensor:
        """How calibrated chances come true in this row: below 1 on text harder than what they were fitted on."""
        return ((self.accepted + PRIOR) / (self.foretold + PRIOR)).clamp_max(1)

    def first(self, prior: float) -> Tensor:
        """The chance of a first token."""
        return (self.hits + PRIOR * prior) / (self.tries + PRIOR)

    def forget(self, rows: Tensor | None) -> None:
        """These rows (None: all) belong to new requests."""
        for count in (self.emitted, self.cost, self.accepted, self.foretold, self.hits, self.tries):
            count[slice(None) if rows is None else rows] = 0

    def learn(self, emitted: Tensor, accepted: Tensor, drafted: Tensor, foretold: Tensor, token_cost: float) -> None:
        """A round is over."""
        active, tried = (emitted > 0).double(), (drafted > 0).double()
        self.emitted += emitted
        self.cost += active * (1 + drafted * token_cost)
        self.accepted += accepted.clamp_min(0)
        self.foretold += foretold
        keep = torch.where((tried == 0) & (emitted > 0), FORGET, 1.0)
        self.hits = self.hits * keep + tried * (accepted > 0)
        self.tries = self.tries * keep + tried * active


def top_probability(logits: Tensor) -> Tensor:
    """[B, N, V] -> [B, N]: the top-1 probability at temperature 1, before any processor (the paper's confidence)."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
