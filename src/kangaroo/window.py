"""What a model's layers see of the KV cache: a placement's slots, through transformers' public cache interface."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kangaroo.cache import KVCache, LayerShape, Views, round_up
from kangaroo.passes import Attention
from kangaroo.tree import Placement


class CacheWindow(Cache):  # type: ignore[misc]
    """A placement's slots of some layers of a KVCache, presented through transformers' public cache interface."""

    def __init__(self, cache: KVCache, where: Placement, layers: range, extent: int):
        """`extent` is how many slots the layers look at."""
        super().__init__(layers=[])
        self._cache, self.where, self._extent = cache, where, extent
        self._seen: Views | None = None
        self._new: Views | None = None
        if where.rows is None:
            self._seen = cache.visible(self._extent)
            if where.start is not None:  # then slots are written by a copy: no index, no scatter
                self._new = cache.views(layers, where.start, where.start + where.slots.shape[1])

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Store a layer's new keys and values, and return all that it may look at."""
        if self._new is None:
            self._cache.write(layer_idx, self.where.slots, key_states, value_states, self.where.rows)
        else:
            keys, values = self._new[layer_idx]
            keys.copy_(key_states)
            values.copy_(value_states)
        if self._seen is not None:
            return self._seen[layer_idx]
        return self._cache.read(layer_idx, self._extent, self.where.rows)

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows and slots of a layer, for code that reads and writes them in place."""
        return self._cache.layer(layer)


class Recorder(Cache):  # type: ignore[misc]
    """Notes what a layer would store, and stores nothing."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Note the shapes of a layer's keys and values, and return them."""
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[-1], value_states.shape[-1]
        self.shapes[layer_idx] = LayerShape(heads, key_dim, value_dim, key_states.dtype, key_states.device)
        return key_states, value_states


def cache_argument(module: nn.Module) -> str:
    """What a layer or an attention module calls the cache that it is given: transformers renamed it in 5.24."""
    return "cache" if "cache" in signature(type(module).forward).parameters else "past_key_values"


def extent(where: Placement, way: Attention | None) -> int:
    """How many slots a pass looks at."""
    return round_up(where.mask.shape[-1], 1 if way is None else way.block)


def attention_mask(where: Placement, dtype: torch.dtype, way: Attention | None, window: int | None) -> Tensor:
    """The additive attention mask [B, 1, N, S] of layers that see all, or the last `window` positions."""
    visible, positions, slots = where.mask, where.positions[..., None], where.slot_positions[:, None]
    if way is not None and where.branches:  # every node finds its own path in order
        slots = torch.arange(visible.shape[-1], device=visible.device)
        visible = slots <= positions
    if window is not None:
        visible = visible & (slots > positions - window)
    shape, hidden = (*visible.shape[:2], extent(where, way)), torch.finfo(dtype).min
    blocked = torch.full(shape, hidden, dtype=dtype, device=visible.device)
    blocked[..., : visible.shape[-1]].masked_fill_(visible, 0.0)
    return blocked[:, None]
