"""Which way of computing linears and attention gives a row the same bits in any company, on this machine?

Tried once for every shape, on numbers made to show it: large terms that cancel, so that what is left of a sum is what
the order of its terms has left. On ordinary numbers, rounding to a short precision hides most differences.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.attention import attend, ways
from kangaroo.cache import LayerShape, round_up
from kangaroo.kernels import Kernels
from kangaroo.linears import ANY, pack
from kangaroo.passes import PROMPT_ROWS, Attention, Pass, Product, Rows
from kangaroo.verdicts import Verdicts

LINEAR_WAYS = tuple(
    Rows(*way) for way in ((16, 1), (8, 1), (16, 4), (8, 4), (16, 2), (8, 2), (8, 8), (16, 16), (4, 4), (2, 2))
)
"""In pieces of how many rows a linear may be computed, cheapest first."""
QUERIES, SLOTS, PAIRED = 8, 1536, 16
"""Of the attention that is tried; how far apart slots stand that cancel each other."""


def find_rows(
    linears: Sequence[nn.Linear], packed: bool, verdicts: Verdicts, kernels: Kernels | None = None
) -> Rows | None:
    """In which pieces a product over linears of these shapes gives a row the same bits in any company.

    None if in none that was tried.
    """
    first, kind = linears[0], "plain" if not packed else "packed" if kernels is None else f"compiled {kernels.name}"
    shape = (sum(linear.out_features for linear in linears), first.in_features)
    name = f"{kind} {first.weight.dtype} {shape} bias {first.bias is not None}"
    known = verdicts.get(name)
    if known is None:
        tried = _tell_tale(first, shape[0], packed, kernels)
        ways = LINEAR_WAYS if kernels is None else (ANY, *LINEAR_WAYS)
        found = next((way for way in ways if _is_steady(tried, way)), None)
        verdicts.set(name, "none" if found is None else asdict(found))
        return found
    return None if known == "none" else Rows(**known)


@torch.no_grad()
def is_even(activation: nn.Module, width: int, dtype: torch.dtype, device: torch.device, verdicts: Verdicts) -> bool:
    """Whether an activation of so many features gives a row the same bits however many rows there are.

    What a vector register does and what is done to the few values left over can differ in the last bit; where those lie
    depends on the number of values, and of threads.
    """
    name = f"activation {type(activation).__name__} {activation} {dtype} {width}"
    known = verdicts.get(name)
    if known is None:
        random = torch.Generator().manual_seed(0)
        x = (torch.randn(512, width, generator=random) * 3).to(device, dtype)
        alone = torch.cat([activation(row[None]) for row in x])
        known = all(
            torch.equal(activation(x[:rows]), alone[:rows]) for rows in (2, 3, 5, 7, 8, 13, 23, 48, 64, 300, 512)
        )
        verdicts.set(name, known)
    return bool(known)


def _tell_tale(linear: nn.Linear, out: int, packed: bool, kernels: Kernels | None) -> tuple[Product, Tensor]:
    """A product like this linear's but with so many results, and rows [64, K] whose results are all rounding."""
    weight, inner = linear.weight, linear.in_features
    bias = None if linear.bias is None else linear.bias.new_zeros(out)
    random = torch.Generator().manual_seed(0)
    half, order = inner // 2, torch.randperm(inner, generator=random)
    first, second = order[:half], order[half : 2 * half]
    w, x = torch.zeros(min(out, 61), inner), torch.zeros(PROMPT_ROWS, inner)
    w[:, first] = torch.randn(len(w), half, generator=random)
    w[:, second] = -w[:, first]
    x[:, first] = torch.randn(PROMPT_ROWS, half, generator=random)
    x[:, first] *= torch.exp2(torch.randint(-6, 7, (PROMPT_ROWS, half), generator=random))
    x[:, second] = x[:, first]
    w = w.to(weight.device, weight.dtype)[torch.arange(out, device=weight.device) % len(w)]
    product = pack(w, bias, kernels) if packed else lambda rows: functional.linear(rows, w, bias)
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
    return _is_steady_in_prompts(product, x, way if way == ANY else Rows(PROMPT_ROWS, PROMPT_ROWS))


def _is_steady_in_prompts(product: Product, x: Tensor, way: Rows) -> bool:
    whole = way.apply(product, x)
    turned = all(torch.equal(way.apply(product, x.roll(turn, 0)).roll(-turn, 0), whole) for turn in (1, 9, 33))
    return turned and torch.equal(way.apply(product, x[:7]), whole[:7])


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
    tried = _TriedAttention(way, shape, heads, more)
    return all(tried.decodes_steadily(seen) for seen in (5, 40, 64, 100, 300, 460, 700)) and tried.reads_steadily()


class _TriedAttention:
    """One way of computing attention, on three rows in which scores and sums are all rounding."""

    def __init__(self, way: Attention, shape: LayerShape, heads: int, more: dict[str, Any]):
        self._way, self._more, rows = way, more, 3
        random = torch.Generator().manual_seed(0)
        half = shape.key_dim // 2
        q = torch.randn(rows, heads, 2 * PROMPT_ROWS, half, generator=random)
        k = torch.randn(rows, shape.heads, SLOTS, half, generator=random) * 16
        v = torch.randn(rows, shape.heads, SLOTS, shape.value_dim, generator=random)
        v *= torch.exp2(torch.randint(-8, 9, v.shape, generator=random))  # so that sums of few are rounded too
        # Slots in pairs of equal weight and opposite values, too far apart for a product to add them up at once.
        first = torch.arange(SLOTS) & ~PAIRED
        k, v = k[:, :, first], v[:, :, first] * torch.where(torch.arange(SLOTS) == first, 1, -1)[:, None]
        made = (torch.cat([q, q], -1), torch.cat([k, -k], -1), v)
        self._query, self._key, self._value = (tensor.to(shape.device, shape.dtype) for tensor in made)

    def decodes_steadily(self, seen: int) -> bool:
        """Whether a query that sees so many slots gets the same alone, among others, and over more blocks."""
        least = round_up(seen, self._way.block)
        alone = self._one_by_one(seen, least)
        for extent in {least, least + self._way.block, 1024}:
            for rows, count in ((len(alone), QUERIES), (1, QUERIES), (1, 2), (1, 3), (2, 5)):
                wanted = alone[:rows, :count]
                if extent >= least and not torch.equal(self._decode(rows, count, seen, extent), wanted):
                    return False
        return True

    def _one_by_one(self, seen: int, extent: int) -> Tensor:
        query, key, value = self._query, self._key[:, :, :extent], self._value[:, :, :extent]
        mask = _hide(seen, 1, 1, extent, query)
        rows = []
        for b in range(len(query)):
            ones = [query[b : b + 1, :, n : n + 1] for n in range(QUERIES)]
            rows.append(torch.cat([self._attend(q, key[b : b + 1], value[b : b + 1], mask) for q in ones], 1))
        return torch.cat(rows)

    def _decode(self, rows: int, queries: int, seen: int, extent: int) -> Tensor:
        query, key, value = self._query[:rows, :, :queries], self._key[:rows], self._value[:rows]
        return self._attend(query, key[:, :, :extent], value[:, :, :extent], _hide(seen, rows, queries, extent, query))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prompt: int | None = None) -> Tensor:
        return attend(Pass(self._way, prompt), query, key, value, mask, **self._more)

    def reads_steadily(self) -> bool:
        """Whether prompts get the same alone, in a batch, and in pieces."""
        length, extent = 100, round_up(2 * PROMPT_ROWS, self._way.block)
        key, value, query = self._key[:, :, :extent], self._value[:, :, :extent], self._query[:, :, :length]
        hidden = torch.arange(extent, device=key.device) > torch.arange(length, device=key.device)[:, None]
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=key.device)
        mask = mask.masked_fill_(hidden, torch.finfo(query.dtype).min).expand(len(query), 1, -1, -1)
        whole = self._attend(query, key, value, mask, 0)
        alone = self._attend(query[:1], key[:1], value[:1], mask[:1], 0)
        rest = self._attend(query[:, :, 40:], key, value, mask[:, :, 40:], 40)
        return torch.equal(alone, whole[:1]) and torch.equal(rest, whole[:, 40:])


def _hide(seen: int, batch: int, nodes: int, extent: int, like: Tensor) -> Tensor:
    mask = torch.zeros(batch, 1, nodes, extent, dtype=like.dtype, device=like.device)
    mask[..., seen:] = torch.finfo(like.dtype).min
    return mask
