"""One state per row, for drafters that begin a draft with what they know of the row's last committed token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kangaroo.state import Committed, State, arranged
from kangaroo.tree import Stop, pick


class LastStates:
    """The newest state of each row, and which rows have one: a prompt of a single token leaves its row without."""

    def __init__(self) -> None:
        self._states: Tensor | None = None  # [B, D]
        self.known = torch.zeros(0, dtype=torch.bool)  # [B]

    def keep(self, x: Tensor, state: State, committed: Committed) -> None:
        """Of states x [B, M, D] of the tokens committed, the newest of each row; a new prompt takes a row over."""
        count = committed.count
        if self._states is None:
            self._states = torch.zeros(state.batch, x.shape[-1], dtype=x.dtype, device=x.device)
            self.known = torch.zeros_like(state.active)
        rows = torch.arange(state.batch, device=x.device) if committed.where.rows is None else committed.where.rows
        if committed.path is None:
            self.known[rows] &= committed.where.positions[:, 0] > 0
        newest = pick(x, (count - 1).clamp_min(0)[:, None])[:, 0]
        self._states[rows] = torch.where(count[:, None] > 0, newest, self._states[rows])
        self.known[rows] |= count > 0

    def arrange(self, rows: Sequence[int]) -> None:
        """A state stays with its row."""
        if self._states is not None:
            self._states, self.known = arranged(self._states, rows), arranged(self.known, rows)

    @property
    def states(self) -> Tensor:
        """[B, 1, D]."""
        assert self._states is not None, "drafting comes after the prompts"
        return self._states[:, None]

    def limits(self, state: State, most: int) -> Tensor:
        """[B] how many tokens, one behind the other, each row may draft: at most so many, none without a state."""
        return (most * self.known).minimum(torch.tensor(state.draft_rooms, device=self.known.device))

    def reasons(self, state: State, most: int) -> tuple[Stop, ...]:
        """Why rows that are never unsure draft no further."""
        rows = zip(state.active.tolist(), (state.room - 1).tolist(), self.known.tolist(), strict=True)
        return tuple(_reason(*row, most) for row in rows)


def _reason(active: bool, room: int, known: bool, most: int) -> Stop:
    if not active:
        return Stop.INACTIVE
    if room < 1:
        return Stop.ROOM
    return Stop.NOTHING if not known else Stop.ROOM if room <= most else Stop.LENGTH
