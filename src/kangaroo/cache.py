"""Key/value storage addressed by slot. It never knows how long a row is: `State.lengths` does.

Slots at or past a row's length hold leftovers that no mask can see, so rejecting a draft costs nothing: the length
simply does not grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from kangaroo.errors import CapacityError
from kangaroo.machine import available_bytes, human_bytes


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores per slot."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of keys and values of one token in one row."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


Views = dict[int, tuple[Tensor, Tensor]]
"""Layer -> its keys and values."""
Stored = list[tuple[Tensor, Tensor]]
"""Keys and values [L, heads, N, dim] of some slots of a row, for each kind of layer."""


class KVCache:
    """Keys and values of every layer, [B, heads, S, dim] each. Rows may come, go and move; storage only grows."""

    def __init__(self, shapes: Sequence[LayerShape], batch: int, slots: int, block: int = 1):
        """`slots` are for tokens; storage is rounded up to whole blocks, for attention that reads nothing less."""
        self.slots, self._held, self.block = slots, batch, block
        # Layers of one shape share a tensor [L, B, heads, S, dim], so that one call makes views of them all.
        self._storage: list[tuple[range, Tensor, Tensor]] = []
        for shape, alike in groupby(range(len(shapes)), key=shapes.__getitem__):
            layers = list(alike)
            size, dims = (len(layers), batch, shape.heads, self.stored), (shape.key_dim, shape.value_dim)
            keys, values = (torch.zeros(*size, dim, dtype=shape.dtype, device=shape.device) for dim in dims)
            self._storage.append((range(layers[0], layers[-1] + 1), keys, values))
        self._open(batch)

    def _open(self, batch: int) -> None:
        """Make views of the rows that are in use, the first ones."""
        self._stacks = [(layers, keys[:, :batch], values[:, :batch]) for layers, keys, values in self._storage]
        self._keys = [layer for _, keys, _ in self._stacks for layer in keys]
        self._values = [layer for _, _, values in self._stacks for layer in values]
        self._visible: tuple[int, Views] = 0, {}
        self._rows = {keys.device: _every_row(batch, keys.device) for _, keys, _ in self._stacks}
        # By address and shape: other numbers where storage is not what it was.
        self.layout = tuple((tensor.data_ptr(), *tensor.shape) for _, *pair in self._storage for tensor in pair)

    @property
    def stored(self) -> int:
        """Slots of a row that there is storage for: whole blocks."""
        return round_up(self.slots, self.block)

    def arrange(self, rows: Sequence[int], slots: int, length: int, reserve: int = 0) -> None:
        """From now on row i is the one that was rows[i] (-1: a new one), and each has `slots` slots or more.

        Rows that move come from places that are given up. The first `length` slots are kept. If storage has to grow, it
        does so for `reserve` rows.

        Raises CapacityError if more storage is needed than there is.
        """
        assert all(old in (-1, row) or old >= len(rows) for row, old in enumerate(rows)), "a row would be overwritten"
        grows = slots > self.slots or len(rows) > self._held
        if grows:
            held, slots = max(self._held, len(rows), reserve), max(self.slots, slots)
            self._check_growth(held, slots)
            self._held, self.slots = held, slots
        moves = [(row, old) for row, old in enumerate(rows) if old >= 0 and (grows or old != row)]
        self._stacks, self._keys, self._values, self._visible = [], [], [], (0, {})  # or old storage would stay
        for number, (layers, *pair) in enumerate(self._storage):
            for side, store in enumerate(pair):
                new = self._larger(store) if grows else store
                for row, old in moves:
                    new[:, row, :, :length] = store[:, old, :, :length]
                pair[side] = new
            self._storage[number] = layers, pair[0], pair[1]
        self._open(len(rows))

    def _larger(self, store: Tensor) -> Tensor:
        layers, _, heads, _, dim = store.shape
        return store.new_zeros(layers, self._held, heads, self.stored, dim)

    def _check_growth(self, held: int, slots: int) -> None:
        for device in {keys.device for _, keys, _ in self._storage}:
            sizes = [s.numel() * s.itemsize for _, *pair in self._storage for s in pair if s.device == device]
            factor = held * round_up(slots, self.block) / (self._held * self.stored)
            # Old storage goes piece by piece as new is made.
            needed, free = int(sum(sizes) * (factor - 1) + max(sizes)), available_bytes(device)
            if needed > free:
                raise CapacityError(
                    f"a KV cache of {held} rows of {slots} tokens needs {human_bytes(needed)} more on {device}, where "
                    f"{human_bytes(free)} are free; use fewer rows, shorter prompts or fewer max_tokens"
                )

    def views(self, layers: range, begin: int, end: int) -> Views:
        """Slots [begin, end) of some layers, as views [B, H, end - begin, dim] to read from or to copy into."""
        found: Views = {}
        for held, keys, values in self._stacks:
            wanted = range(max(held.start, layers.start), min(held.stop, layers.stop))
            if wanted:
                part = slice(wanted.start - held.start, wanted.stop - held.start)
                pairs = zip(keys[part, :, :, begin:end].unbind(), values[part, :, :, begin:end].unbind(), strict=True)
                found.update(zip(wanted, pairs, strict=True))
        return found

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, dim] of a layer, all slots, in place."""
        return self._keys[layer], self._values[layer]

    def visible(self, extent: int) -> Views:
        """The first `extent` slots of all layers; the latest are kept, as drafting and verification see the same."""
        if self._visible[0] != extent:
            self._visible = extent, self.views(range(len(self._keys)), 0, extent)
        return self._visible[1]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None) -> None:
        """Store keys and values [B, H, N, dim] of a layer at slots [B, N] of `rows` (None: all rows)."""
        store_k, store_v = self._keys[layer], self._values[layer]
        batch = self._rows[store_k.device] if rows is None else rows.to(store_k.device)
        slots = slots.to(store_k.device)
        # [B, H, S, dim] seen as [B, S, H, dim]: one index pair per token.
        store_k.transpose(1, 2)[batch[:, None], slots] = keys.transpose(1, 2)
        store_v.transpose(1, 2)[batch[:, None], slots] = values.transpose(1, 2)

    def read(self, layer: int, extent: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `extent` slots of a layer; a view unless `rows` selects some."""
        keys, values = self._keys[layer][:, :, :extent], self._values[layer][:, :, :extent]
        if rows is None:
            return keys, values
        rows = rows.to(keys.device)
        return keys[rows], values[rows]

    def save(self, row: int, begin: int, end: int) -> Stored:
        """A copy of slots [begin, end) of a row, in every layer."""
        return [
            (keys[:, row, :, begin:end].clone(), values[:, row, :, begin:end].clone())
            for _, keys, values in self._stacks
        ]

    def restore(self, row: int, begin: int, stored: Stored) -> None:
        """Write what was saved into a row, from slot `begin` on."""
        for (_, *pair), saved in zip(self._stacks, stored, strict=True):
            for store, part in zip(pair, saved, strict=True):
                store[:, row, :, begin : begin + part.shape[2]] = part

    def keep(self, source: Tensor, destination: Tensor) -> None:
        """Copy slots `source` [B, M] onto `destination` [B, M] in every layer. Needed for trees only."""
        for store in (tensor for _, *pair in self._stacks for tensor in pair):
            slots = store.transpose(2, 3)
            batch = self._rows[slots.device][:, None]
            slots[:, batch, destination.to(slots.device)] = slots[:, batch, source.to(slots.device)]


def check_room(shapes: Sequence[LayerShape], batch: int, slots: int, block: int) -> None:
    """Raise CapacityError if a KVCache of these layers would not fit in memory."""
    for device in {shape.device for shape in shapes}:
        needed = sum(s.bytes_per_slot for s in shapes if s.device == device) * batch * round_up(slots, block)
        free = available_bytes(device)
        if needed > free:
            raise CapacityError(
                f"the KV cache of {batch} rows of {slots} tokens needs {human_bytes(needed)} on {device}, where "
                f"{human_bytes(free)} are free; use a smaller batch, shorter prompts or fewer max_tokens"
            )


@cache
def _every_row(batch: int, device: torch.device) -> Tensor:
    """[B] their numbers. Never freed, as captured graphs read it where it lies."""
    with torch.inference_mode(False):
        return torch.arange(batch, device=device)


def round_up(count: int, step: int) -> int:
    """The least multiple of `step` that is not below `count`."""
    return -(-count // step) * step
