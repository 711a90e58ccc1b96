"""Attention that gives a query the same bits in any company, through transformers' public interface for it.

What a query gets from an attention kernel depends on how many queries are computed with it, and on how many masked
slots follow those it can see. So within a `Pass` queries go in calls of one fixed width, each with a mask of its own,
and look at whole blocks of slots. Prompts go in blocks of 64 queries that begin at multiples of 64, whatever piece of a
prompt a pass holds. Outside of passes, and in other threads meanwhile, a model's attention is its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from kangaroo.cache import round_up
from kangaroo.errors import ModelError
from kangaroo.passes import PROMPT_ROWS, Attention, Pass, current

NAME = "kangaroo"
_HONOURED = {"scaling", "softcap", "s_aux", "position_ids", "sliding_window", "is_causal", "use_cache"}
"""What a family may hand to its attention beyond the common arguments. Windows are in the mask already."""


class SteadyConfig:
    """A model's configuration as its attention modules see it: within a pass, the implementation is ours.

    What a thread computes is known to that thread alone, so nothing is switched for others that use the same model.
    """

    def __init__(self, plain: Any):
        self.plain = plain

    def __getattr__(self, name: str) -> Any:
        if name == "plain":  # while it is being copied, there is none yet
            raise AttributeError(name)
        return getattr(self.plain, name)

    @property
    def _attn_implementation(self) -> str:
        return NAME if current() is not None else str(self.plain._attn_implementation)


def make_steady(attention: Any) -> None:
    """Have an attention module take its attention from here, within passes."""
    if not isinstance(attention.config, SteadyConfig):
        attention.config = SteadyConfig(attention.config)


def config_of(attention: Any) -> Any:
    """The configuration that an attention module was made with; None if it keeps none."""
    config = getattr(attention, "config", None)
    return config.plain if isinstance(config, SteadyConfig) else config


def ways(implementation: str) -> list[Attention]:
    """How attention can be computed in place of an implementation of transformers, cheapest first."""
    by_hand = [Attention("math", 1, block) for block in (64, 512)]
    if implementation == "eager":
        return by_hand
    # Eight at a time are as quick as one, and a CPU's kernel aligns the buffers of all threads alike.
    return [Attention("sdpa", queries, block) for block in (64, 512) for queries in (8, 1)] + by_hand


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    one = current()
    assert one is not None, "this attention is chosen within passes, which say how"
    return attend(one, query, key, value, attention_mask, **more), None


def attend(one: Pass, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    """query [B, H, N, D], keys and values [B, H', S, D], additive mask [B, 1, N, S] -> [B, N, H, D]."""
    assert mask is not None, "a pass brings its own mask"
    _check(more)
    if one.prompt is not None:
        return _in_blocks(one, query, key, value, mask, more)
    batch, heads, nodes, dim = query.shape
    group = heads // key.shape[1]
    sinks = None if (s := more.get("s_aux")) is None else s.view(1, key.shape[1], group, 1)
    kernel = _Kernel(one.attention, _scale(query, more), more.get("softcap"), sinks)
    # [B, H', N * Q, D]: the heads that share keys and values stand beside one another, as several queries would.
    folded = query.view(batch, -1, group, nodes, dim).transpose(2, 3).reshape(batch, -1, nodes * group, dim)
    if one.paths is not None:
        out = torch.cat([_on_paths(kernel, *row) for row in zip(folded, key, value, mask, one.paths, strict=True)])
    elif nodes == 1:
        out = kernel(folded, key, value, mask)
    else:
        out = _in_pieces(kernel, folded, key, value, _folded(one, mask, group, kernel.width(group)))
    out = out[:, :, : nodes * group].view(batch, key.shape[1], nodes, group, -1)
    return out.transpose(1, 2).reshape(batch, nodes, heads, value.shape[-1])


def _on_paths(kernel: "_Kernel", query: Tensor, key: Tensor, value: Tensor, mask: Tensor, paths: Tensor) -> Tensor:
    """One row's tree: every node by itself, on keys and values in the order of its own path. -> [1, H', N * Q, D]."""
    nodes = len(paths)
    each = query.reshape(len(query), nodes, -1, query.shape[-1]).transpose(0, 1)
    out = kernel(each, _along(key, paths), _along(value, paths), mask.transpose(0, 1)[:, None])
    return out.transpose(0, 1).flatten(1, 2)[None]


def _in_pieces(kernel: "_Kernel", query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """query [B, H', N * Q, D] in pieces of the mask's [B, P, W, S] width -> [B, H', P * W, D]."""
    batch, pieces, width = mask.shape[:3]
    query = functional.pad(query, (0, 0, 0, pieces * width - query.shape[2]))
    if batch == 1 and kernel.takes_views:
        rows = query[0].reshape(-1, pieces, width, query.shape[-1]).transpose(0, 1)
        out = kernel(rows, key.expand(pieces, -1, -1, -1), value.expand(pieces, -1, -1, -1), mask[0][:, None])
        return out.transpose(0, 1).flatten(1, 2)[None]
    parts = zip(torch.split(query, width, 2), torch.split(mask, 1, 1), strict=True)
    return torch.cat([kernel(part, key, value, seen) for part, seen in parts], 2)


def _folded(one: Pass, mask: Tensor, group: int, width: int) -> Tensor:
    """The mask [B, 1, N, S] of folded queries, in pieces [B, P, W, S]; the layers of a pass share it."""
    key = id(mask), group
    if key not in one.made:
        rows = mask[:, 0].repeat_interleave(group, 1)
        filled = functional.pad(rows, (0, 0, 0, -rows.shape[1] % width))
        one.made[key] = filled.reshape(len(mask), -1, width, mask.shape[-1])
    folded: Tensor = one.made[key]
    return folded


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

    @property
    def takes_views(self) -> bool:
        """Whether keys and values that are read several times need not be copied."""
        return not self._by_hand

    def width(self, group: int) -> int:
        """Queries of a call, if a node has so many: whole nodes where there are more than the way asks for."""
        return round_up(group, self._queries)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if not self._by_hand:
            queries = query.shape[2]
            if missing := self.width(queries) - queries:
                query = functional.pad(query, (0, 0, 0, missing))
            out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self._scale)
            return out[:, :, :queries] if missing else out
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
        extent = min(round_up(begin + PROMPT_ROWS, step), key.shape[2])
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
