"""REST: draft what followed the same words elsewhere (He et al. 2023).

The longest run at the end of a row's text, of 16 down to 2 tokens, is looked up in a datastore; what followed its
occurrences there is merged into a tree that keeps the most frequent beginnings. Differences from the original:
accepted by the rules of every other drafter, where its sampling is biased; vocabularies of any size; a file that is
mapped, not loaded; the same draft for the same context, as more occurrences than are looked at are thinned out evenly
and ties go to the shallower node, then to the smaller ids.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kangaroo.cache import LayerShape
from kangaroo.drafters.copying.datastore import Datastore
from kangaroo.drafters.copying.ngrams import LONGEST_RUN
from kangaroo.drafters.copying.suffixes import Ids
from kangaroo.drafters.settings import Settings, configure, need_path
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class RestConfig:
    """What to look for, and how much of what is found to draft."""

    nodes: int = 64
    """Nodes of the tree at most, the pending token included."""
    continuation: int = 10
    """Tokens read after an occurrence."""
    longest: int = 16
    """Tokens of the context looked for, at most and ..."""
    shortest: int = 2
    """... at least."""
    occurrences: int = 5000
    """Occurrences looked at, at most."""

    def __post_init__(self) -> None:
        if not 2 <= self.nodes <= 64:
            raise ConfigError(f"nodes must be in 2..64, the pending token included, got {self.nodes}")
        if not 1 <= self.shortest <= self.longest <= LONGEST_RUN:
            raise ConfigError(
                f"need 1 <= shortest <= longest <= {LONGEST_RUN}, got shortest {self.shortest} and longest "
                f"{self.longest}"
            )
        if self.continuation < 1 or self.occurrences < 1:
            raise ConfigError(
                f"continuation and occurrences must be at least 1, got {self.continuation} and {self.occurrences}"
            )


@dataclass(frozen=True, slots=True)
class Trie:
    """Continuations with their common beginnings merged: K nodes, level by level, in the order of their ids."""

    tokens: Ids
    """[K]."""
    parents: Ids
    """[K] node numbers of a draft, in which the root is 0 and these are 1 to K."""
    depth: int

    @property
    def is_chain(self) -> bool:
        """Whether nodes follow one another without branching."""
        return self.depth == len(self.tokens)


NOTHING = Trie(np.zeros(0, np.int64), np.zeros(0, np.int64), 0)


def merge(continuations: Ids, vocab_size: int, most: int) -> Trie:
    """The `most` most frequent beginnings of continuations [n, width], which are in order.

    Ties go to the shallower beginning, then to the smaller ids. A continuation ends before the first id that is not
    below `vocab_size`.
    """
    count = len(continuations)
    readable = np.logical_and.accumulate(continuations < vocab_size, 1)
    # In order, continuations that begin alike are neighbours: a node stands where a beginning differs from the last.
    differs = np.ones_like(readable)
    differs[1:] = np.logical_or.accumulate(continuations[1:] != continuations[:-1], 1)
    levels, rows = np.nonzero(differs.T)
    frequency = np.diff(levels * count + rows, append=differs.shape[1] * count)
    kept = readable[rows, levels]
    levels, rows, frequency = levels[kept], rows[kept], frequency[kept]
    best = _most_frequent(frequency, most)
    levels, rows = levels[best], rows[best]
    # A parent is as frequent as its child or more, and shallower, so it was kept: the last of its level not below it.
    parents = np.searchsorted(levels * count + rows, (levels - 1) * count + rows, side="right")
    return Trie(continuations[rows, levels], parents, int(levels[-1]) + 1 if len(levels) else 0)


def _most_frequent(frequency: Ids, most: int) -> Ids:
    """The places of the `most` largest numbers, the first of equal ones preferred, in ascending order."""
    if len(frequency) <= most:
        return np.arange(len(frequency))
    least = np.partition(frequency, -most)[-most]
    chosen = frequency > least
    chosen[np.flatnonzero(frequency == least)[: most - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


class Rest:
    """Drafts from a datastore; of a row it reads the latest tokens only."""

    taps: tuple[int, ...] = ()
    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, datastore: Datastore, config: RestConfig):
        self._datastore, self._config = datastore, config
        # Beside trees, a chain of all the nodes needs a column more (see _join).
        self.nodes = config.nodes + (config.continuation >= config.nodes - 1)

    def observe(self, state: State, committed: Committed) -> None:
        """Nothing to learn: the state has the tokens."""

    def draft(self, state: State) -> Draft:
        """The most frequent continuations of every row's latest tokens."""
        rooms = state.draft_rooms
        tries = [self._find(context, room) for context, room in zip(self._contexts(state), rooms, strict=True)]
        facts = zip(tries, rooms, state.rows, strict=True)
        stops = tuple(_reason(trie, room, row.active) for trie, room, row in facts)
        return _join(state, tries, stops)

    def arrange(self, rows: Sequence[int]) -> None:
        """Nothing to keep."""

    def _contexts(self, state: State) -> Iterator[list[int]]:
        """Each row's latest tokens, the pending one included."""
        longest = self._config.longest
        columns = state.lengths[:, None] + torch.arange(1 - longest, 1, device=state.lengths.device)
        latest = state.tokens.gather(1, columns.clamp_min(0))
        for tokens, row in zip(latest.tolist(), state.rows, strict=True):
            yield tokens[max(0, longest - 1 - row.length) :]

    def _find(self, context: list[int], room: int) -> Trie:
        config, suffixes = self._config, self._datastore.suffixes
        if room < 1:
            return NOTHING
        length, places = suffixes.find(context, config.shortest, config.longest)
        if not length:
            return NOTHING
        width = min(config.continuation, room)
        continuations = suffixes.continuations(length, places, width, config.occurrences)
        return merge(continuations, self._datastore.vocab_size, config.nodes - 1)


def _join(state: State, tries: list[Trie], stops: tuple[Stop, ...]) -> Draft:
    """Trees of several rows as one draft, the smaller ones padded."""
    depth = max(trie.depth for trie in tries)
    width = max(len(trie.tokens) for trie in tries)
    if depth == width and not all(trie.is_chain for trie in tries):
        width += 1  # or the deepest row alone would make a chain of them all
    shape = (state.batch, 1 + width)
    tokens, valid = np.zeros(shape, np.int64), np.zeros(shape, bool)
    parents = np.tile(np.arange(-1, width), (state.batch, 1))
    valid[:, 0] = True
    for row, trie in enumerate(tries):
        own = slice(1, 1 + len(trie.tokens))
        tokens[row, own], parents[row, own], valid[row, own] = trie.tokens, trie.parents, True
    device = state.tokens.device
    joined = torch.from_numpy(tokens).to(device)
    joined[:, :1] = state.pending
    return Draft(
        tokens=joined,
        parents=torch.from_numpy(parents).to(device),
        valid=torch.from_numpy(valid).to(device),
        depth=depth,
        stops=stops,
    )


def _reason(trie: Trie, room: int, active: bool) -> Stop:
    if not active:
        return Stop.INACTIVE
    if trie.depth == room:
        return Stop.ROOM
    return Stop.LENGTH if trie.depth else Stop.NOTHING


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Rest]:
    """Settings: datastore, and those of RestConfig."""
    path = need_path(settings, "datastore", "build one with `kangaroo datastore build`")
    config = configure(RestConfig, settings, also=("datastore",))
    if tokenizer is None:
        raise ConfigError("drafter 'rest' needs the model's tokenizer, to know a datastore of another one: pass it")
    datastore = Datastore.open(path, tokenizer, target.vocab_size)
    return lambda: Rest(datastore, config)
