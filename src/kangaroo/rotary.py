"""A model's own rotary embedding as tables over positions.

Gathering rows is far cheaper than the rotary module at every step. Tables grow by pieces of fixed size, so that a row
depends neither on which others share the batch nor on how far any of them reaches.
"""

import inspect

import torch
from torch import Tensor, nn

PIECE = 512
"""Positions that a table grows by."""


class RotaryTables:
    """Cosines and sines of one target, per kind of layer and precision."""

    def __init__(self, rotary: nn.Module, width: int, context: int, device: torch.device):
        self._rotary, self._width, self._context, self._device = rotary, width, context, device
        self._typed = "layer_type" in inspect.signature(rotary.forward).parameters
        self._tables: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}

    def rows(self, kind: str, positions: Tensor, extent: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, N, D'] at positions [B, N], none of which but padding lies past `extent`."""
        cos, sin = self._table(kind, min(extent, self._context), dtype)
        at = positions.clamp_max(cos.shape[0] - 1)  # only padding can lie past the context
        return cos[at], sin[at]

    def _table(self, kind: str, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        table = self._tables.get((kind, dtype))
        known = 0 if table is None else len(table[0])
        if table is None or known < size:
            wanted = min(self._context, max(size, 2 * known))
            pieces = [self._piece(kind, begin, dtype) for begin in range(known, wanted, PIECE)]
            old = [] if table is None else [table]
            cos, sin = (torch.cat(parts) for parts in zip(*old, *pieces, strict=True))
            table = self._tables[kind, dtype] = (cos, sin)
        return table

    def _piece(self, kind: str, begin: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        positions = torch.arange(begin, min(begin + PIECE, self._context), device=self._device)[None]
        with torch.inference_mode(False), torch.no_grad():
            like = torch.zeros(1, 1, self._width, dtype=dtype, device=self._device)
            cos, sin = self._rotary(like, positions, kind) if self._typed else self._rotary(like, positions)
        return cos[0], sin[0]
