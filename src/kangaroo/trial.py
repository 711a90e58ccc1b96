"""The trial at load time: does the whole model give every token the same bits in any pass?

It is tried as it will run: every row at every place in passes of one to eight tokens, in ragged batches, in a tree, and
with shallow layers ahead of deep ones. How its parts are to be computed is found first (`parts`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kangaroo.cache import KVCache, LayerShape
from kangaroo.errors import ModelError
from kangaroo.tree import Placement, place, place_at, place_chain
from kangaroo.verdicts import Verdicts

NODES = 8
"""Tokens of the longest pass that is tried; longer ones go in the same pieces."""
START = 59
"""Tokens before the first pass: so many that passes reach across a block's end."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """What a target promises of its texts, and why."""

    level: Literal["bitwise", "ties"]
    """"bitwise": the same bits with drafts and without. "ties": the same tokens, except where rounding decides."""
    reason: str

    def __str__(self) -> str:
        return f"{self.level} ({self.reason})"


class Tried(Protocol):
    """What the trial needs of a target, under the same names."""

    context: int
    vocab_size: int
    num_layers: int
    device: torch.device

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens to states."""
        ...

    def run(
        self,
        x: Tensor,
        where: Placement,
        cache: KVCache | None,
        *,
        start: int = 0,
        stop: int | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """A span of layers."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """The final norm."""
        ...

    def logits(self, x: Tensor) -> Tensor:
        """The head."""
        ...

    def new_cache(self, batch: int, slots: int, extra: Sequence[LayerShape] = ()) -> KVCache:
        """Storage."""
        ...


@torch.inference_mode()
def prove(target: Tried, name: str, verdicts: Verdicts, how: str) -> Exactness:
    """What the target promises, computed as it now is: `how`, in words."""
    known = verdicts.get(name)
    if known is not None:
        return Exactness(**known)
    rows = failed = 0
    for same in _compared(target):
        rows, failed = rows + 1, failed + (not same)
    if failed:
        found = Exactness("ties", f"{failed} of {rows} rows differed from the same token in a pass of its own; {how}")
    else:
        found = Exactness("bitwise", f"{rows} rows compared bit by bit; {how}")
    verdicts.set(name, asdict(found))
    return found


def _compared(target: Tried) -> Iterator[bool]:
    """Whether each row of many passes has the logits that its token has in a pass of its own."""
    start = max(1, min(START, target.context - 3 * NODES))
    nodes = min(NODES, target.context - start)
    random = torch.Generator().manual_seed(0)
    text = torch.randint(target.vocab_size, (1, start + nodes), generator=random).to(target.device)
    cache = _read(target, text, start, 1)
    alone = torch.cat([_chain(target, cache, text, [start + i], 1) for i in range(nodes)], 1)[0]
    cache = _read(target, text, start, 1)
    for width in range(2, nodes + 1):
        for begin in range(0, nodes, width):
            count = min(width, nodes - begin)
            yield from _same(_chain(target, cache, text, [start + begin], count)[0], alone[begin : begin + count])
    yield from _ragged(target, text, start, alone)
    yield from _ahead(target, text, start, alone)
    yield from _branched(target, text, start, alone)


def _same(got: Tensor, wanted: Tensor) -> Iterator[bool]:
    return (torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def _read(target: Tried, text: Tensor, length: int, batch: int) -> KVCache:
    """A cache that holds the first tokens of a text in every row."""
    cache = target.new_cache(batch, text.shape[1] + 2 * NODES)
    positions = torch.arange(length, device=target.device).expand(batch, length)
    where = place_at(positions, length, start=0, prompt=True)
    target.run(target.embed(text[:, :length].expand(batch, -1)), where, cache)
    return cache


def _chain(target: Tried, cache: KVCache, text: Tensor, lengths: list[int], count: int) -> Tensor:
    """Logits [B, count, V] of the tokens that follow so many in each row."""
    at = torch.tensor(lengths, device=target.device)
    start = lengths[0] if len(set(lengths)) == 1 else None
    where = place_chain(at, count, max(lengths) + count, start)
    x, _ = target.run(target.embed(text[0][where.positions]), where, cache)
    return target.logits(target.norm(x))


def _ragged(target: Tried, text: Tensor, start: int, alone: Tensor) -> Iterator[bool]:
    """Three rows of one text, each further than the one before it, in a pass of several tokens."""
    nodes, batch = len(alone), 3
    count = max(1, nodes - batch)
    cache = _read(target, text, start, batch)
    for i in range(batch - 1):  # rows ahead of others: those behind write what is overwritten later
        _chain(target, cache, text, [start + min(i, row) for row in range(batch)], 1)
    lengths = [start + row for row in range(batch)]
    got = _chain(target, cache, text, lengths, count)
    for row in range(batch):
        yield from _same(got[row], alone[row : row + count])


def _ahead(target: Tried, text: Tensor, start: int, alone: Tensor) -> Iterator[bool]:
    """The shallow layers token by token, the deep ones over all of them."""
    nodes, exit_layer = len(alone), max(1, target.num_layers // 8)
    cache = _read(target, text, start, 1)
    where = place_chain(torch.tensor([start], device=target.device), nodes, start + nodes, start)
    x = target.embed(text[:, start:])
    steps = [target.run(x[:, i : i + 1], where[i : i + 1], cache, stop=exit_layer)[0] for i in range(nodes)]
    deep, _ = target.run(torch.cat(steps, 1), where, cache, start=exit_layer)
    yield from _same(target.logits(target.norm(deep))[0], alone)


def _branched(target: Tried, text: Tensor, start: int, alone: Tensor) -> Iterator[bool]:
    """A tree in which every second node is a wrong turn."""
    nodes = (len(alone) + 1) // 2
    right, wrong = text[0, start : start + nodes], (text[0, start : start + nodes] + 1) % target.vocab_size
    tokens = torch.stack([right, wrong], 1).flatten()[None]
    parents = [-1, 0, *(parent for node in range(1, nodes) for parent in (2 * node - 2, 2 * node - 2))]
    cache = _read(target, text, start, 1)
    at = torch.tensor([start], device=target.device)
    where = place(at, torch.tensor([parents], device=target.device), start + 2 * nodes)
    x, _ = target.run(target.embed(tokens), where, cache)
    yield from _same(target.logits(target.norm(x))[0, ::2], alone[:nodes])


def attempt(trial: Callable[[], Exactness]) -> Exactness:
    """The trial's outcome. Raises ModelError if it cannot be brought to an end."""
    try:
        return trial()
    except RuntimeError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the trial of exactness failed ({first}); load with exact=False for the same text up to ties in rounding"
        ) from error
