"""What a run learns: the interface between the training loop and the things it can train; sums that fit in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kangaroo.training.batches import Batch


@dataclass(frozen=True, slots=True)
class Loss:
    """Loss summed over the tokens of a micro-batch that are learnt from, and what else is worth plotting, likewise."""

    total: Tensor
    tokens: int
    extra: Mapping[str, float]


class Objective(Protocol):
    """One kind of training."""

    device: torch.device
    """Where batches belong."""

    frozen_bytes: int
    """Memory of weights that are run but not trained."""

    evaluation_tokens: int
    """Tokens that one evaluation runs over."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the optimiser may change, by name."""
        ...

    def loss(self, batch: Batch) -> Loss:
        """The loss of a micro-batch, with gradients."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Held-out figures; `score` is the one to maximise."""
        ...

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Write the trained weights in their final form, and where they come from."""
        ...

    def activation_bytes(self, rows: int, length: int) -> int:
        """About how much a micro-batch needs beside the weights, in bytes."""
        ...


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
