"""Prompts that begin alike are run once: what blocks of prompts have left in the KV cache, kept for later requests.

Only what prompts' own passes have written is kept, in the blocks of 64 tokens that those are computed in. What such a
pass writes does not depend on where prompts are cut or on what else is in it (`passes`). So where the target's promise
is bitwise, a row has the same bits whether its prompt was run or recalled. Tokens that were decoded are not kept: their
passes are of another shape.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from kangaroo.cache import Stored
from kangaroo.drafters.base import Drafter
from kangaroo.passes import PROMPT_ROWS as BLOCK
from kangaroo.state import Committed, State
from kangaroo.tree import place_at

Key = tuple[int, tuple[int, ...]]
"""The number of the block before it, and its tokens."""
ROOT = -1
PIECE = 8
"""Blocks that a drafter is shown at once, at most."""


@dataclass(frozen=True, slots=True)
class Block:
    """64 tokens of a prompt, after those of the block before it."""

    number: int
    stored: Stored
    features: Mapping[int, Tensor]
    """Layer count -> states [64, D] after that many layers, those that the drafter asks for."""


class PrefixStore:
    """Blocks of prompts as a tree, the least recently used forgotten first."""

    def __init__(self, tokens: int):
        """At most `tokens` tokens are kept; each takes what it takes in the KV cache."""
        self._most, self._numbers = tokens // BLOCK, count()
        self._blocks: OrderedDict[Key, Block] = OrderedDict()

    @property
    def keeps(self) -> bool:
        """Whether there is room for anything."""
        return self._most > 0

    @property
    def tokens(self) -> int:
        """Tokens that are kept."""
        return len(self._blocks) * BLOCK

    @torch.inference_mode()
    def recall(self, drafter: Drafter, state: State, row: int, begin: int) -> int:
        """Write what is known of a row's prompt from `begin` on into the cache; returns up to where that is.

        The drafter observes it as if it had been run.
        """
        prompt = state.rows[row].prompt
        found = list(self._along(prompt))
        for key, _ in reversed(found):  # so that no block is forgotten before those that follow it
            self._blocks.move_to_end(key)
        blocks = [block for _, block in found[begin // BLOCK :]] if begin % BLOCK == 0 else []
        for first in range(0, len(blocks), PIECE):
            self._show(drafter, state, row, begin + first * BLOCK, blocks[first : first + PIECE])
        return begin + len(blocks) * BLOCK

    def _show(self, drafter: Drafter, state: State, row: int, begin: int, blocks: Sequence[Block]) -> None:
        width, rows = len(blocks) * BLOCK, torch.tensor([row], device=state.tokens.device)
        for number, block in enumerate(blocks):
            state.cache.restore(row, begin + number * BLOCK, block.stored)
        positions = torch.arange(begin, begin + width, device=rows.device)[None]
        where = place_at(positions, begin + width, rows, begin, prompt=True)
        features = {layer: torch.cat([block.features[layer] for block in blocks])[None] for layer in drafter.taps}
        drafter.observe(state, state.commit_prompt(begin, width, where, features))

    @torch.inference_mode()
    def remember(self, state: State, row: int, begin: int, committed: Committed, place: int) -> None:
        """Keep the blocks of a piece of a row's prompt that has just been run, `place` being the row's in the piece."""
        prompt, added = state.rows[row].prompt, False
        known = list(self._along(prompt))
        number, end = known[-1][1].number if known else ROOT, begin + len(committed.text[place])
        if begin % BLOCK or len(known) * BLOCK < begin or not self._most:
            return  # what came before has been forgotten already
        for first in range(len(known) * BLOCK, end - BLOCK + 1, BLOCK):
            part = slice(first - begin, first - begin + BLOCK)
            features = {layer: x[place, part].clone() for layer, x in committed.features.items()}
            block = Block(next(self._numbers), state.cache.save(row, first, first + BLOCK), features)
            self._blocks[number, tuple(prompt[first : first + BLOCK])] = block
            number, added = block.number, True
        if added:
            for key, _ in reversed(list(self._along(prompt))):
                self._blocks.move_to_end(key)
            while len(self._blocks) > self._most:
                self._blocks.popitem(last=False)

    def _along(self, prompt: Sequence[int]) -> Iterator[tuple[Key, Block]]:
        """The blocks that are known of a prompt, from its beginning. Its last token is never run as prompts are."""
        number = ROOT
        for first in range(0, len(prompt) - BLOCK, BLOCK):
            key = number, tuple(prompt[first : first + BLOCK])
            block = self._blocks.get(key)
            if block is None:
                return
            yield key, block
            number = block.number
