"""Attention that gives a query the same bits in any company, through transformers' public interface for it.

What a query gets from an attention kernel depends on how many queries are computed with it, and on how many masked
slots follow those it can see. So within `steady` every query is a call's only one, or a row of its own, and
looks at whole blocks of slots. Prompts go in blocks of 64 queries that begin at multiples of 64, whatever piece of a
prompt a pass holds. Outside of `steady` a model's attention is its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from kangaroo.errors import ModelError
from kangaroo.passes import PROMPT_ROWS, Attention, Pass, computing, current

NAME = "kangaroo"
OWN = ("sdpa", "eager")
"""Implementations of transformers that take masks of any kind, and that ours can stand in for."""
_HONOURED = {"scaling", "softcap", "s_aux", "position_ids", "sliding_window", "is_causal", "use_cache"}
"""What a family may hand to its attention beyond the common arguments. Windows are in the mask already."""

_ONE_AT_A_TIME = threading.RLock()
"""Threads may share a model, and a model's configuration says what its attention is."""


@contextmanager
def steady(config: Any, one: Pass) -> Iterator[None]:
    """Compute what is inside as one pass; layers that share this configuration take their attention from here."""
    with _ONE_AT_A_TIME:
        plain = config._attn_implementation
        config._attn_implementation = NAME
        try:
            with computing(one):
                yield
        finally:
            config._attn_implementation = plain


def ways(implementation: str) -> list[Attention]:
    """How attention can be computed in place of an implementation of transformers, cheapest first."""
    by_hand = [Attention("math", 1, block) for block in (64, 512)]
    if implementation == "eager":
        return by_hand
    # Buffers of a CPU's kernel are aligned alike for all threads if each call has a multiple of 8 queries.
    return [Attention("sdpa", queries, block) for queries in (1, 8) for block in (64, 512)] + by_hand


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    one = current()
    assert one is not None, "this attention is chosen by `steady`, which says how"
    return attend(one, query, key, value, attention_mask, **more), None


def attend(one: Pass, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    """query [B, H, N, D], keys and values [B, H', S, D], additive mask [B, 1, N, S] -> [B, N, H, D]."""
    assert mask is not None, "a pass brings its own mask"
    _check(more)
    if one.prompt is not None:
        return _in_blocks(one, query, key, value, mask, more)
    batch, heads, nodes, dim = query.shape
    # The heads that share keys and values stand where several queries would.
    grouped = (-1, key.shape[1], heads // key.shape[1], dim)
    sinks = None if (s := more.get("s_aux")) is None else s.view(1, *grouped[1:3], 1)
    kernel = _Kernel(one.attention, _scale(query, more), more.get("softcap"), sinks)
    if one.paths is not None:
        rows = query.transpose(1, 2)
        each = zip(rows, key, value, mask, one.paths, strict=True)
        parts = [
            kernel(row.reshape(grouped), _along(k, path), _along(v, path), seen.transpose(0, 1)[:, None])
            for row, k, v, seen, path in each
        ]
        out = torch.stack(parts)
    elif nodes == 1:
        out = kernel(query.reshape(grouped), key, value, mask)
    elif batch == 1 and one.attention.kernel == "sdpa":
        keys, values = key.expand(nodes, -1, -1, -1), value.expand(nodes, -1, -1, -1)
        out = kernel(query[0].transpose(0, 1).reshape(grouped), keys, values, mask[0].transpose(0, 1)[:, None])
    else:
        ones = [(query[:, :, n].reshape(grouped), mask[:, :, n : n + 1]) for n in range(nodes)]
        out = torch.stack([kernel(row, key, value, seen) for row, seen in ones], 1)
    return out.reshape(batch, nodes, heads, value.shape[-1])


def _along(states: Tensor, paths: Tensor) -> Tensor:
    """Keys or values [H', S, D] of a row, in the order of each node's path [N, S] -> [N, H', S, D]."""
    # In order of their slots, a sum over a path would have its terms in other places than plain decoding has them.
    return states[:, paths].transpose(0, 1)


class _Kernel:
    """One way of computing attention, with what a family adds to it."""

    def __init__(self, way: Attention, scale: float, softcap: float | None, sinks: Tensor | None):
        """`sinks` [1, H, Q, 1] are one more thing for a query to attend to, of which nothing is taken."""
        self._by_hand, self._queries = way.kernel == "math", way.queries
        self._scale, self._softcap, self._sinks = scale, softcap, sinks
        assert self._by_hand or (softcap is None and sinks is None), "only attention by hand knows soft-caps and sinks"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if not self._by_hand:
            heads = query.shape[2]
            if missing := -heads % self._queries:
                query = functional.pad(query, (0, 0, 0, missing))
            out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self._scale)
            return out[:, :, :heads] if missing else out
        scores = torch.matmul(query, key.transpose(-1, -2)) * self._scale
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        scores = scores + mask
        if self._sinks is None:
            return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(query.dtype), value)
        sinks = self._sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights[..., :-1], value)


def _in_blocks(one: Pass, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, more: dict[str, Any]) -> Tensor:
    """A piece of prompts: queries in blocks that begin at multiples of 64, each looking no further than it must."""
    assert one.prompt is not None
    first, nodes, step = one.prompt, query.shape[2], one.attention.block
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    sinks = None if (s := more.get("s_aux")) is None else s.view(1, -1, 1, 1)
    kernel = _Kernel(one.attention, _scale(query, more), more.get("softcap"), sinks)
    parts = []
    for begin in range(first - first % PROMPT_ROWS, first + nodes, PROMPT_ROWS):
        left, right = max(begin, first), min(begin + PROMPT_ROWS, first + nodes)
        fill = (left - begin, begin + PROMPT_ROWS - right)
        extent = min(-(-(begin + PROMPT_ROWS) // step) * step, key.shape[2])
        part = slice(left - first, right - first)
        here = functional.pad(query[:, :, part], (0, 0, *fill))
        blocked = functional.pad(mask[:, :, part, :extent], (0, 0, *fill))
        out = kernel(here, key[:, :, :extent], value[:, :, :extent], blocked)
        parts.append(out[:, :, fill[0] : PROMPT_ROWS - fill[1]])
    return torch.cat(parts, 2).transpose(1, 2)


def _scale(query: Tensor, more: dict[str, Any]) -> float:
    scaling = more.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def _check(more: dict[str, Any]) -> None:
    """Refuse what would change the result and is not done here."""
    for name, value in more.items():
        if value is not None and name not in _HONOURED and not (name == "dropout" and value == 0.0):
            raise ModelError(
                f"exact attention does not know {name!r}, which this family uses; load with exact=False for the same "
                "text up to ties in rounding"
            )


AttentionInterface.register(NAME, _attend)
