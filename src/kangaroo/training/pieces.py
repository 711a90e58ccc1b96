"""Sums over positions whose logits do not fit in memory all at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 26
"""Logits held for the backward pass; beyond that they are computed again in pieces."""

Sums = tuple[Tensor, ...]


def sum_in_pieces(compute: Callable[..., Sums], logits: int, *columns: Tensor) -> Sums:
    """`compute(*columns)`, whose results are sums over the positions [M, ...] of the columns.

    `logits` says how many it makes of a position. Gradients are those of one piece.
    """
    size = max(1, LOGITS_AT_ONCE // logits)
    if len(columns[0]) <= size:
        return compute(*columns)
    pieces = zip(*(torch.split(column, size) for column in columns), strict=True)
    sums = [checkpoint(compute, *piece, use_reentrant=False) for piece in pieces]
    return tuple(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
