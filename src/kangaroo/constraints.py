"""What a request may forbid beyond its Sampling: an end before its time, and whatever a processor of one's own says.

Both act on the scores of every drafted and every verified position, so the text stays the one that plain decoding under
the same rules writes, and drafts respect them as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kangaroo.errors import ConfigError
from kangaroo.sampling import Prefix
from kangaroo.tree import ancestors

NOTHING = -1
"""Stands for the token drawn where a processor has barred them all."""


class Processor(Protocol):
    """Changes or masks the scores of one token's candidates, given the tokens before it.

    It is asked at every node of a draft, in no particular order and often twice, among them nodes that will be refused
    and tokens that it would not have allowed. So it must keep no state, and take any tokens. To forbid a token, set its
    score to -inf.
    """

    def __call__(self, prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
        """Scores [V] of the token after prompt + output -> scores of the same shape, type and device.

        They are logits after bias and penalties, before temperature and filters; `scores` may be changed in place.
        """
        ...


@dataclass(frozen=True, slots=True)
class Constraint:
    """One row's rules."""

    min_tokens: int = 0
    """Tokens that the output must have before one of `ends` may follow."""
    ends: tuple[int, ...] = ()
    processor: Processor | None = None


class Constraints:
    """The rules of every row."""

    def __init__(self, rows: Sequence[Constraint], vocab_size: int, device: torch.device):
        self._processors = [row.processor for row in rows]
        self.blamed: int | None = None
        """The row whose processor has raised, or has left no token that could follow."""
        self._min_tokens = torch.tensor([[row.min_tokens if row.ends else 0] for row in rows], device=device)
        self._ends: Tensor | None = None
        if any(row.min_tokens and row.ends for row in rows):
            self._ends = torch.zeros(len(rows), 1, vocab_size, dtype=torch.bool, device=device)
            for i, row in enumerate(rows):
                self._ends[i, 0, list(row.ends)] = True

    @property
    def has_processors(self) -> bool:
        """Whether any row has one of its own."""
        return any(processor is not None for processor in self._processors)

    @property
    def needed(self) -> bool:
        """Whether there is anything to apply."""
        return self._ends is not None or self.has_processors

    def __call__(self, scores: Tensor, prefix: Prefix) -> Tensor:
        """Scores [B, K, V] of the last K nodes of a prefix, with what is forbidden at -inf."""
        if self._ends is not None:
            early = _output_lengths(prefix)[:, -scores.shape[1] :] < self._min_tokens
            scores = scores.masked_fill(early[..., None] & self._ends, -math.inf)
        return self._process(scores, prefix) if self.has_processors else scores

    def _process(self, scores: Tensor, prefix: Prefix) -> Tensor:
        scores = scores.clone()
        nodes, parents = prefix.nodes.tolist(), prefix.parents.tolist()
        facts = torch.stack([prefix.lengths, prefix.prompt_lengths], 1).tolist()
        active = [True] * len(facts) if prefix.active is None else prefix.active.tolist()
        for row, processor in enumerate(self._processors):
            if processor is None or not active[row]:
                continue
            self.blamed = row  # until it has returned
            length, begin = facts[row]
            text = prefix.tokens[row, :length].tolist()
            first = len(nodes[row]) - scores.shape[1]
            for node in range(first, len(nodes[row])):
                whole = [*text, *_path(node, nodes[row], parents[row])]
                given = scores[row, node - first]
                given.copy_(run_processor(processor, whole[:begin], whole[begin:], given))
        self.blamed = None
        return scores


def run_processor(processor: Processor, prompt: Sequence[int], output: Sequence[int], scores: Tensor) -> Tensor:
    """What a processor makes of scores [V]. Raises ConfigError if that cannot be scores of the same tokens."""
    found = processor(prompt, output, scores.clone())
    wanted = (scores.shape, scores.dtype, scores.device)
    if not isinstance(found, Tensor) or (found.shape, found.dtype, found.device) != wanted:
        got = f"{tuple(found.shape)}, {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"a processor must return scores of {tuple(scores.shape)}, {scores.dtype}, got {got}")
    if found.isnan().any() or (found == math.inf).any():
        raise ConfigError("a processor returned scores that are not numbers; use -inf to forbid a token")
    return found


def _output_lengths(prefix: Prefix) -> Tensor:
    """[B, N] tokens of the output up to each node, the node included."""
    depths = ancestors(prefix.parents).sum(-1)
    return (prefix.lengths - prefix.prompt_lengths)[:, None] + depths


def _path(node: int, tokens: list[int], parents: list[int]) -> list[int]:
    path = []
    while node >= 0:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]
