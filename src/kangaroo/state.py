"""All that outlives a round, and the only code that changes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.cache import KVCache
from kangaroo.errors import CapacityError
from kangaroo.sampling import Prefix, Sampler, Sampling
from kangaroo.tree import Draft, Placement, Verdict, pick, place_at


@dataclass(frozen=True, slots=True)
class Request:
    """One row's work: a prompt, how to sample, and how many tokens to emit at most."""

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Committed:
    """Tokens that have just joined their rows, with the target features a drafter asked for."""

    tokens: Tensor
    """[B, M]."""
    where: Placement
    """Their place in the rows: committed tokens stand at the slots that equal their positions."""
    count: Tensor
    """[B] valid columns; columns past it repeat earlier ones."""
    features: Mapping[int, Tensor]
    """Layer count -> target states [B, M, D] after that many layers."""
    path: Tensor | None
    """[B, M] the nodes of the draft they were; None for tokens of a prompt."""


class State:
    """Rows being decoded. `lengths` is the only truth about length.

    A row's first `lengths[b]` tokens are committed: their K/V are valid in every target layer. The token after them
    is pending: known, but not yet run. At first that is the prompt's last token, so every emitted token comes from a
    round. Rows are fixed places: a request may take a finished row over between rounds.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        cache: KVCache,
        sampler: Sampler,
        eos: Sequence[int],
        rule: str = "match",
        spare: int = 1,
    ):
        """`spare` slots of the cache are for drafts: a row holds at most `capacity` tokens, prompt and output."""
        device = sampler.device
        rows = len(requests)
        self.cache, self.sampler, self.rule = cache, sampler, rule
        self.capacity, self.spare = cache.slots - spare, spare
        self.eos = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, cache.slots + 1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.ones_like(self.lengths)
        self.room = torch.zeros_like(self.lengths)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rounds = 0
        self.longest = 0
        for row, request in enumerate(requests):
            self._seat(row, request)

    @torch.inference_mode()
    def assign(self, row: int, request: Request) -> None:
        """Give a row to a request. Its prompt still has to be prefilled.

        Raises CapacityError if the row is too short for it.
        """
        self._seat(row, request)
        self.sampler.replace(row, request.sampling)

    def _seat(self, row: int, request: Request) -> None:
        prompt = torch.tensor(list(request.prompt), dtype=torch.int64, device=self.tokens.device)
        assert len(prompt) >= 1, "an empty prompt has no pending token"
        if len(prompt) + request.max_tokens > self.capacity:
            raise CapacityError(
                f"a request of {len(prompt)} + {request.max_tokens} tokens does not fit a row of {self.capacity}; "
                "start with a larger capacity"
            )
        self.tokens[row, : len(prompt)] = prompt
        self.lengths[row] = 0
        self.prompt_lengths[row] = len(prompt)
        self.room[row] = request.max_tokens
        self.active[row] = True

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """Stop a row, for reasons found downstream: a stop string, a client that went away."""
        self.active[row] = False

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def pending(self) -> Tensor:
        """[B, 1] the token of each row that is known but not yet run."""
        return self.tokens.gather(1, self.lengths[:, None])

    def prefix(self, nodes: Tensor, parents: Tensor) -> Prefix:
        """What the processors of a draft's nodes [B, N] look back at."""
        return Prefix(self.tokens, self.lengths, self.prompt_lengths, nodes, parents)

    def round_counters(self, nodes: int) -> Tensor:
        """[B, N] numbers that no other round of a row uses (its length grows every round), for keying noise."""
        return self.lengths[:, None] * 1024 + torch.arange(nodes, device=self.lengths.device)

    def commit_prompt(self, start: int, width: int, where: Placement, features: Mapping[int, Tensor]) -> Committed:
        """Prompt tokens [start, start + width) of `where.rows` have run; each prompt's last token stays pending."""
        rows = torch.arange(self.batch, device=self.lengths.device) if where.rows is None else where.rows
        target = self.prompt_lengths[rows] - 1
        count = (target - start).clamp(0, width)
        self.lengths[rows] = torch.maximum(self.lengths[rows], torch.minimum(target, start + count))
        self.longest = int(self.lengths.max())
        return Committed(self.tokens[rows, start : start + width], where, count, features, None)

    def commit(self, draft: Draft, verdict: Verdict, features: Mapping[int, Tensor]) -> Committed:
        """Make the accepted path contiguous, grow the rows, set the new pending tokens, close rows that are done."""
        columns = torch.arange(verdict.path.shape[1], device=self.lengths.device)
        last = (verdict.length - 1).clamp_min(0)
        columns = torch.minimum(columns, last[:, None])
        path = verdict.path.gather(1, columns)
        positions = self.lengths[:, None] + columns
        if not draft.is_chain:
            self.cache.keep(self.lengths[:, None] + path, positions)
        tokens = draft.tokens.gather(1, path)
        self.tokens.scatter_(1, positions, tokens)
        self.lengths = self.lengths + verdict.length
        self.tokens.scatter_(1, self.lengths[:, None], verdict.next_token[:, None])
        self.room = self.room - verdict.length
        ended = torch.isin(verdict.next_token, self.eos)
        self.active = self.active & (self.room > 0) & ~ended
        self.rounds += 1
        self.longest = int(self.lengths.max())
        picked = {layers: pick(x, path) for layers, x in features.items()}
        where = place_at(positions, self.longest + 1)
        return Committed(tokens, where, verdict.length, picked, path)
