"""What a benchmark compares: ways to answer a batch of prompts, each telling where its time went."""

from collections.abc import Sequence
from typing import Protocol

import torch

from kangaroo.bench.records import Measured
from kangaroo.sampling import Sampling


class Method(Protocol):
    """A way to answer."""

    def answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_tokens: int) -> list[Measured]:
        """Answer prompts as one batch, timed from the first pass over them to their last tokens."""
        ...


def finish_reason(tokens: Sequence[int], eos: Sequence[int]) -> str:
    """Why an answer ended."""
    return "stop" if tokens[-1] in eos else "length"


def forget_peak(device: torch.device) -> None:
    """Begin to look for the most memory a GPU has allocated."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory a GPU has allocated since; None on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
