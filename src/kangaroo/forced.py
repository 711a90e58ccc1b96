"""Tokens that a grammar leaves no choice about, drafted for nothing behind whatever a drafter proposes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kangaroo.cache import LayerShape
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.none import NoDrafter
from kangaroo.grammar import Grammar
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, chain

MOST_FORCED = 16
"""Tokens added to a draft, at most."""


class Forced:
    """A drafter whose chains end where a row's grammar forbids them, and go on with what it forces from there.

    What a grammar forbids would be refused, and what it forces is accepted if what stands before it is. Trees are left
    alone: their branches already keep to the grammar.
    """

    def __init__(self, drafter: Drafter, target: Target):
        self._drafter, self._target = drafter, target
        self.taps: tuple[int, ...] = drafter.taps
        self.nodes = drafter.nodes + MOST_FORCED
        self.cache_layers: tuple[LayerShape, ...] = drafter.cache_layers

    def observe(self, state: State, committed: Committed) -> None:
        """The drafter's own business: tokens it has not drafted are to it as the target's own."""
        self._drafter.observe(state, committed)

    def arrange(self, rows: Sequence[int]) -> None:
        """Likewise."""
        self._drafter.arrange(rows)

    def draft(self, state: State) -> Draft:
        """The drafter's draft, amended in rows that follow a grammar."""
        draft = self._drafter.draft(state)
        if not draft.is_chain or draft.probs is not None:
            return draft
        amended = dict[int, list[int]]()
        for row, room in enumerate(state.draft_rooms):
            if room and _grammar(row, state):
                state.constraints.blamed = row  # should its grammar turn out too complex
                amended[row] = self._amend(row, draft, state)[:room]
                state.constraints.blamed = None
        return _amended(draft, amended, state, self._target) if amended else draft

    def _amend(self, row: int, draft: Draft, state: State) -> list[int]:
        """A row's draft as it should be, the pending token left out."""
        known, grammar = state.rows[row], _grammar(row, state)
        assert grammar is not None, "rows without one are left alone"
        output = state.tokens[row, : known.length + 1].tolist()[len(known.prompt) :]
        drafted = draft.tokens[row, 1:][draft.valid[row, 1:]].tolist()
        return grammar.go_on(output, drafted)[: len(drafted) + MOST_FORCED]


def _grammar(row: int, state: State) -> Grammar | None:
    processor = state.requests[row].processor
    return processor if isinstance(processor, Grammar) else None


def _amended(draft: Draft, rows: Mapping[int, Sequence[int]], state: State, target: Target) -> Draft:
    """A draft with some rows changed, the work done on its nodes done on the new ones too."""
    counts = [len(rows[row]) if row in rows else int(draft.valid[row].sum()) - 1 for row in range(state.batch)]
    old, nodes = draft.tokens.shape[1], max(counts) + 1
    tokens = torch.nn.functional.pad(draft.tokens, (0, max(0, nodes - old)))[:, :nodes].clone()
    for row, new in rows.items():
        tokens[row, 1 : len(new) + 1] = torch.tensor(new, dtype=tokens.dtype, device=tokens.device)
    where, hidden = None, draft.hidden
    if hidden is not None:
        where = target.prepare(state.place(nodes))
        kept = _unchanged(draft.tokens, tokens)
        x = hidden[:, :kept]
        if kept < nodes:
            fresh = target.embed(tokens[:, kept:])
            fresh, _ = target.run(fresh, where[kept:nodes], state.cache, stop=draft.layers_done)
            x = torch.cat([x, fresh], 1)
        hidden = x
    device = tokens.device
    return replace(
        draft,
        tokens=tokens,
        parents=chain(state.batch, nodes, device),
        valid=torch.arange(nodes, device=device) <= torch.tensor(counts, device=device)[:, None],
        depth=nodes - 1,
        hidden=hidden,
        where=where,
    )


def _unchanged(old: Tensor, new: Tensor) -> int:
    """How many columns two texts begin with alike in every row."""
    shared = min(old.shape[1], new.shape[1])
    return int((old[:, :shared] == new[:, :shared]).all(0).long().cumprod(0).sum())


def forcing(make_drafter: Callable[[], Drafter], target: Target) -> Callable[[], Drafter]:
    """Makes the same drafters, with forced tokens added to their chains where rows follow a grammar.

    Plain decoding stays plain: speed is measured against it.
    """

    def make() -> Drafter:
        drafter = make_drafter()
        return drafter if isinstance(drafter, NoDrafter) else Forced(drafter, target)

    return make
