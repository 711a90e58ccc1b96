"""A drafter that knows what will be accepted, because it knows the text and errs on purpose."""

from collections.abc import Sequence

import torch

from kangaroo.cache import LayerShape
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Stop

FILLER = 1


class ScriptedDrafter:
    """Round r drafts `counts[r % len(counts)]` tokens of each row's text right and the next one wrong.

    `texts` are whole rows, prompt included. With `branches` = 1 the draft is a chain of `depth` tokens; with more,
    every level holds that many siblings and the right one stands at a different place in every level. A row that has
    fewer than `depth` tokens left still gets a full draft: cutting is the loop's business.
    """

    taps: tuple[int, ...] = ()
    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(
        self, texts: Sequence[Sequence[int]], counts: Sequence[int], depth: int, vocab: int, branches: int = 1
    ):
        self.texts, self.counts, self.depth, self.vocab, self.branches = list(texts), counts, depth, vocab, branches
        self.nodes = 1 + depth * branches
        self.rounds = 0

    def observe(self, state: State, committed: Committed) -> None:
        """It has nothing to learn."""

    def arrange(self, rows: Sequence[int]) -> None:
        """Each text stays with its row; a new row's is to be set."""
        self.texts = [self.texts[row] for row in rows]

    def draft(self, state: State) -> Draft:
        """The text ahead of each row, wrong from level `planned()` on."""
        rows = [self._row(text, int(length)) for text, length in zip(self.texts, state.lengths, strict=True)]
        self.rounds += 1
        tokens, parents = zip(*rows, strict=True)
        return Draft(
            tokens=torch.tensor(tokens),
            parents=torch.tensor(parents),
            valid=torch.ones(len(rows), self.nodes, dtype=torch.bool),
            depth=self.depth,
            stops=(Stop.LENGTH,) * len(rows),
        )

    def planned(self) -> int:
        """How many tokens the target should accept in the coming round."""
        return self.counts[self.rounds % len(self.counts)]

    def _row(self, text: Sequence[int], length: int) -> tuple[list[int], list[int]]:
        tokens, parents, parent = [text[length]], [-1], 0
        for level in range(self.depth):
            at = length + 1 + level
            truth = text[at] if at < len(text) else FILLER
            right = level % self.branches if level < self.planned() else None
            wrong = ((truth + 1 + i) % self.vocab for i in range(self.branches))
            first = len(tokens)
            tokens += [truth if i == right else next(wrong) for i in range(self.branches)]
            parents += [parent] * self.branches
            parent = first + (level % self.branches)
        return tokens, parents
