"""What a run learns: the interface between the training loop and the things it can train."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Loss:
    """Loss summed over the marked tokens of a micro-batch, and what else is worth plotting, summed likewise."""

    total: Tensor
    tokens: int
    extra: Mapping[str, float]


class Objective(Protocol):
    """One kind of training."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the optimiser may change, by name."""
        ...

    def loss(self, tokens: Tensor, trained: Tensor) -> Loss:
        """The loss of a micro-batch. tokens [B, T + 1]; trained [B, T + 1] marks the tokens learnt from."""
        ...

    def evaluate(self) -> Mapping[str, float]:
        """Held-out figures; `score` is the one to maximise."""
        ...

    def save(self, folder: Path) -> None:
        """Write the trained weights in their final form."""
        ...
