"""Drafting over the most frequent tokens only: a slice of the target's head in place of the whole.

With a vocabulary of fifty thousand tokens the head is half of what a draft step reads, and nine tokens in ten that a
target writes are among a few thousand. A draft never holds another; the target still chooses among all, so nothing but
acceptance depends on the choice (FR-Spec, Zhao et al. 2025, arXiv 2502.14856: ranked by frequency; VocabTrim, Goel et
al. 2025, arXiv 2506.22694: counted on what the target writes).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kangaroo.errors import AdapterError, ConfigError
from kangaroo.linears import pack
from kangaroo.loading import end_tokens
from kangaroo.model import Target


class DraftTokens(nn.Module):
    """Which of the target's tokens may be drafted."""

    tokens: Tensor
    """[n] int64, rising."""

    def __init__(self, target: Target, size: int):
        super().__init__()
        self._target = [target]  # in a list: the target's weights are not this module's
        self.register_buffer("tokens", torch.arange(size, device=target.device))

    def check(self, name: object) -> None:
        """Raise AdapterError, naming where they come from, unless these are tokens that could have been chosen."""
        tokens, most = self.tokens, self._target[0].vocab_size
        if not (int(tokens[0]) >= 0 and int(tokens[-1]) < most and bool((tokens.diff() > 0).all())):
            raise AdapterError(f"{name} is damaged: its draft vocabulary is not a rising list of the target's tokens")

    def spread(self, logits: Tensor) -> Tensor:
        """Logits [..., n] over the target's vocabulary [..., V]: -inf where nothing is drafted."""
        full = logits.new_full((*logits.shape[:-1], self._target[0].vocab_size), -math.inf)
        return full.index_copy_(-1, self.tokens, logits)


class DraftVocabulary(DraftTokens):
    """Such tokens and their rows of the target's head, which are its own and not stored.

    Raises ConfigError if it is larger than the target's vocabulary, or too small for the tokens that end a text.
    """

    def __init__(self, target: Target, size: int):
        ends = end_tokens(target.model)
        if not max(1, len(ends)) <= size <= target.vocab_size:
            raise ConfigError(
                f"a draft vocabulary holds at least the {len(ends)} tokens that end a text and at most the target's "
                f"{target.vocab_size}, got {size}"
            )
        super().__init__(target, size)
        self._rows: Callable[[Tensor], Tensor] | None = None
        self._packs = False

    def choose(self, counts: Tensor) -> None:
        """Take the tokens that occur most, those that end a text in any case; counts [V]. Of equals, the lower id."""
        target = self._target[0]
        counts = counts.to(target.device, torch.float64)
        counts[list(end_tokens(target.model))] = math.inf
        chosen = counts.sort(descending=True, stable=True).indices[: len(self.tokens)]
        self.tokens, self._rows = chosen.sort().values, None

    def check(self, name: object) -> None:
        """Likewise; and the tokens that end a text must be among them."""
        super().check(name)
        missing = set(end_tokens(self._target[0].model)) - set(self.tokens.tolist())
        if missing:
            raise AdapterError(
                f"{name}: the draft vocabulary lacks token {min(missing)}, which ends the target's texts; train again"
            )

    def logits(self, y: Tensor) -> Tensor:
        """Normed states [..., D] -> [..., n], as the target's head has them."""
        target = self._target[0]
        if self._rows is None:
            self._rows = self._slice(target.head)
        return target.scale_logits(self._rows(y)).to(target.device)

    def pack(self) -> None:
        """Keep the rows as packed linears keep theirs: no gradient passes."""
        self._packs, self._rows = True, None

    def _slice(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        weight, bias = head.weight, getattr(head, "bias", None)
        if not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta"):
            raise ConfigError("a draft vocabulary needs a target whose head is neither quantised nor offloaded")
        tokens = self.tokens.to(weight.device)
        rows, bias = weight.detach()[tokens].contiguous(), None if bias is None else bias.detach()[tokens]
        if self._packs:
            return pack(rows, bias, self._target[0].kernels)
        return lambda y: functional.linear(y.to(rows.device), rows, bias)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._rows = None


def count_tokens(tokens: Any, vocab_size: int) -> Tensor:
    """[V] how often each token occurs in a list or an array."""
    return torch.bincount(torch.as_tensor(tokens, dtype=torch.int64), minlength=vocab_size)
