"""The trial at load time: which way of computing gives every token the same bits in any pass, and does the whole model?

Linears and attention are tried by themselves, once for every shape, on numbers made to show it: large terms that cancel,
so that what is left of a sum is what the order of its terms has left. Then the model is tried as it will run: every
row at every place in passes of one to eight tokens, in ragged batches, with shallow layers ahead of deep ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.attention import attend, ways
from kangaroo.cache import KVCache, LayerShape
from kangaroo.errors import ModelError
from kangaroo.passes import PROMPT_ROWS, Attention, Pass, Product, Rows, pack, packed_product
from kangaroo.tree import Placement, place, place_at, place_chain
from kangaroo.verdicts import Verdicts

NODES = 8
"""Tokens of the longest pass that is tried; longer ones go in the same pieces."""
START = 59
"""Tokens before the first pass: so many that passes reach across a block's end."""
LINEAR_WAYS = (Rows(16, False), Rows(8, False), Rows(8, True), Rows(16, True), Rows(4, True), Rows(2, True))
"""In pieces of how many rows a linear may be computed, cheapest first."""


@dataclass(frozen=True, slots=True)
class Exactness:
    """What a target promises of its texts, and why."""

    level: Literal["bitwise", "ties"]
    """"bitwise": the same bits with drafts and without. "ties": the same tokens, except where rounding decides."""
    reason: str

    def __str__(self) -> str:
        return f"{self.level} ({self.reason})"


class Tried(Protocol):
    """What the trial needs of a target."""

    context: int
    vocab_size: int
    num_layers: int
    device: torch.device

    def embed(self, tokens: Tensor) -> Tensor: ...  # noqa: D102

    def run(  # noqa: D102
        self,
        x: Tensor,
        where: Placement,
        cache: KVCache | None,
        *,
        start: int = 0,
        stop: int | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]: ...

    def norm(self, x: Tensor) -> Tensor: ...  # noqa: D102

    def logits(self, x: Tensor) -> Tensor: ...  # noqa: D102

    def new_cache(self, batch: int, slots: int, extra: Sequence[LayerShape] = ()) -> KVCache: ...  # noqa: D102


# --- linears


def find_rows(linear: nn.Linear, packed: bool, verdicts: Verdicts) -> Rows | None:
    """In which pieces linears of this shape give a row the same bits in any company; None if in none that was tried."""
    weight = linear.weight
    kind = "packed" if packed else "plain"
    name = f"{kind} {weight.dtype} {tuple(weight.shape)} bias {linear.bias is not None}"
    known = verdicts.get(name)
    if known is None:
        found = next((way for way in LINEAR_WAYS if _is_steady(_tell_tale(linear, packed), way)), None)
        verdicts.set(name, "none" if found is None else asdict(found))
        return found
    return None if known == "none" else Rows(**known)


def _tell_tale(linear: nn.Linear, packed: bool) -> tuple[Product, Tensor]:
    """A product of this linear's shape, and rows [64, K] whose results are all rounding."""
    weight, bias = linear.weight, None if linear.bias is None else torch.zeros_like(linear.bias)
    out, inner = weight.shape
    random = torch.Generator().manual_seed(0)
    half, order = inner // 2, torch.randperm(inner, generator=random)
    first, second = order[:half], order[half : 2 * half]
    w, x = torch.zeros(min(out, 61), inner), torch.zeros(PROMPT_ROWS, inner)
    w[:, first] = torch.randn(len(w), half, generator=random)
    w[:, second] = -w[:, first]
    x[:, first] = torch.randn(PROMPT_ROWS, half, generator=random)
    x[:, first] *= torch.exp2(torch.randint(-3, 4, (PROMPT_ROWS, half), generator=random))
    x[:, second] = x[:, first]
    w = w.to(weight.device, weight.dtype)[torch.arange(out, device=weight.device) % len(w)]
    made = pack(w) if packed else w
    product: Product = (
        (lambda rows: packed_product(rows, made, bias)) if packed else (lambda rows: functional.linear(rows, made, bias))
    )
    return product, x.to(weight.device, weight.dtype)


def _is_steady(tried: tuple[Product, Tensor], way: Rows) -> bool:
    product, x = tried
    few = x[:17]
    alone = torch.cat([way.apply(product, row[None]) for row in few])
    for count in (16, *range(2, 16), 17):
        if not torch.equal(way.apply(product, few[:count]), alone[:count]):
            return False
    for turn in (1, 5, 11):
        if not torch.equal(way.apply(product, few.roll(turn, 0)).roll(-turn, 0), alone):
            return False
    return _is_steady_in_prompts(product, x)


def _is_steady_in_prompts(product: Product, x: Tensor) -> bool:
    way = Rows(PROMPT_ROWS, padded=True)
    whole = way.apply(product, x)
    turned = all(torch.equal(way.apply(product, x.roll(turn, 0)).roll(-turn, 0), whole) for turn in (1, 9, 33))
    return turned and torch.equal(way.apply(product, x[:7]), whole[:7])


# --- attention


def find_attention(
    shapes: Sequence[LayerShape], heads: int, implementation: str, more: dict[str, Any], verdicts: Verdicts
) -> Attention | None:
    """A way of computing attention over layers of these shapes that gives a query the same bits in any company."""
    kinds = sorted({(s.heads, s.key_dim, s.value_dim, str(s.dtype)) for s in shapes})
    name = f"attention {implementation} {heads} {kinds} {sorted(more)}"
    known = verdicts.get(name)
    if known is None:
        unique = list(dict.fromkeys(shapes))
        found = next(
            (way for way in ways(implementation) if all(_attends_steadily(way, s, heads, more) for s in unique)), None
        )
        verdicts.set(name, "none" if found is None else asdict(found))
        return found
    return None if known == "none" else Attention(**known)


def _attends_steadily(way: Attention, shape: LayerShape, heads: int, more: dict[str, Any]) -> bool:
    batch, slots, nodes = 3, 1536, NODES
    random = torch.Generator().manual_seed(0)
    half = shape.key_dim // 2
    q = torch.randn(batch, heads, 2 * PROMPT_ROWS, half, generator=random)
    k = torch.randn(batch, shape.heads, slots, half, generator=random) * 16
    v = torch.randn(batch, shape.heads, slots, shape.value_dim, generator=random)
    query, key = torch.cat([q, q], -1).to(shape.device, shape.dtype), torch.cat([k, -k], -1).to(v.device, shape.dtype)
    key, value = key.to(shape.device), v.to(shape.device, shape.dtype)
    few = query[:, :, :nodes]
    for seen in (5, 40, 64, 100, 300, 460, 700):
        least = -(-seen // way.block) * way.block
        alone = _one_by_one(way, few, key, value, seen, least, more)
        for extent in {least, least + way.block, 1024}:
            if extent <= slots and extent >= least:
                mask = _hide(seen, batch, nodes, extent, few)
                got = attend(Pass(way), few, key[:, :, :extent], value[:, :, :extent], mask, **more)
                if not torch.equal(got, alone):
                    return False
                got = attend(Pass(way), few[:1], key[:1, :, :extent], value[:1, :, :extent], mask[:1], **more)
                if not torch.equal(got, alone[:1]):
                    return False
    return _reads_steadily(way, query, key, value, more)


def _one_by_one(
    way: Attention, query: Tensor, key: Tensor, value: Tensor, seen: int, extent: int, more: dict[str, Any]
) -> Tensor:
    mask, key, value = _hide(seen, 1, 1, extent, query), key[:, :, :extent], value[:, :, :extent]
    rows = [
        [
            attend(Pass(way), query[b : b + 1, :, n : n + 1], key[b : b + 1], value[b : b + 1], mask, **more)
            for n in range(query.shape[2])
        ]
        for b in range(len(query))
    ]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _reads_steadily(way: Attention, query: Tensor, key: Tensor, value: Tensor, more: dict[str, Any]) -> bool:
    """Whether prompts do: alone, in a batch, in pieces."""
    length = 100
    extent = -(-2 * PROMPT_ROWS // way.block) * way.block
    key, value, query = key[:, :, :extent], value[:, :, :extent], query[:, :, :length]
    visible = torch.arange(extent, device=key.device) <= torch.arange(length, device=key.device)[:, None]
    mask = torch.zeros(visible.shape, dtype=query.dtype, device=key.device)
    mask = mask.masked_fill_(~visible, torch.finfo(query.dtype).min).expand(len(query), 1, -1, -1)
    whole = attend(Pass(way, 0), query, key, value, mask, **more)
    alone = attend(Pass(way, 0), query[:1], key[:1], value[:1], mask[:1], **more)
    rest = attend(Pass(way, 40), query[:, :, 40:], key, value, mask[:, :, 40:], **more)
    return torch.equal(alone, whole[:1]) and torch.equal(rest, whole[:, 40:])


def _hide(seen: int, batch: int, nodes: int, extent: int, like: Tensor) -> Tensor:
    mask = torch.zeros(batch, 1, nodes, extent, dtype=like.dtype, device=like.device)
    mask[..., seen:] = torch.finfo(like.dtype).min
    return mask


# --- the whole model


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
