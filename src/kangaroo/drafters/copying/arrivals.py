"""What drafters that copy text share: which tokens have arrived in which row, and drafts made of found tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Stop, chain


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that have joined a row."""

    row: int
    tokens: list[int]
    fresh: bool
    """Whether they begin a prompt: the row belongs to a new request."""
    prompt: bool
    """Whether they are a prompt's, not a round's."""


def arrivals(committed: Committed) -> Iterator[Arrival]:
    """The committed tokens, row by row, on the host; rows that nothing has joined are left out."""
    where, prompt = committed.where, committed.path is None
    rows = range(len(committed.text)) if where.rows is None else where.rows.tolist()
    fresh = prompt and where.start == 0
    for row, tokens in zip(rows, committed.text, strict=True):
        if tokens or fresh:
            yield Arrival(row, list(tokens), fresh, prompt)


Kept = TypeVar("Kept")


def rearranged(kept: Mapping[int, Kept], rows: Sequence[int]) -> dict[int, Kept]:
    """What is kept of each row that has stayed, under its new number."""
    return {row: kept[old] for row, old in enumerate(rows) if old in kept}


def copy_chain(state: State, copies: Sequence[Sequence[int]]) -> Draft:
    """A draft of one chain per row, each cut to the room its row has; a row that has none drafts nothing."""
    room, active = state.draft_rooms, [row.active for row in state.rows]
    cut = [list(copy[: max(0, free)]) for copy, free in zip(copies, room, strict=True)]
    width = max(map(len, cut), default=0)
    device = state.tokens.device
    tokens = valid = torch.zeros(state.batch, 0, dtype=torch.int64, device=device)
    if width:
        tokens = torch.tensor([copy + [0] * (width - len(copy)) for copy in cut], device=device)
        valid = torch.arange(width, device=device) < torch.tensor([len(copy) for copy in cut], device=device)[:, None]
    return Draft(
        tokens=torch.cat([state.pending, tokens], 1),
        parents=chain(state.batch, width + 1, device),
        valid=torch.cat([torch.ones_like(state.pending, dtype=torch.bool), valid.bool()], 1),
        depth=width,
        stops=tuple(map(_reason, active, copies, room)),
    )


def _reason(active: bool, copy: Sequence[int], room: int) -> Stop:
    if not active:
        return Stop.INACTIVE
    if not copy:
        return Stop.NOTHING
    return Stop.LENGTH if len(copy) <= room else Stop.ROOM
