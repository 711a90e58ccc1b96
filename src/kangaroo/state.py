"""All that outlives a round, and the only code that changes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kangaroo.cache import KVCache
from kangaroo.constraints import Constraint, Constraints, Processor
from kangaroo.errors import CapacityError
from kangaroo.logprobs import Logprobs
from kangaroo.sampling import Columns, Prefix, Sampler, Sampling
from kangaroo.tree import Draft, Placement, Stop, Verdict, pick, place, place_at, place_chain

NO_TOKEN = -2
"""Equal to no token of a text, and not to `constraints.NOTHING`."""


@dataclass(frozen=True, slots=True)
class Request:
    """One row's work: a prompt, how to sample, how many tokens to emit at most, and what else ends or bounds it."""

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    min_tokens: int = 0
    """Tokens to emit before any that would end the row."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the row, beside the model's own ends."""
    ignore_eos: bool = False
    """Whether the model's own ends are tokens like any other."""
    processor: Processor | None = None
    logprobs: Logprobs | None = None
    speculate: bool = True
    """Whether anything may be drafted for it."""
    max_draft: int | None = None
    """Tokens that may be drafted for it at once, if fewer than its drafter has them."""

    def ends(self, eos: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end the row, those of the model being `eos`."""
        return (*self.stop_token_ids, *(() if self.ignore_eos else eos))


@dataclass(slots=True)
class Row:
    """What the host knows of a row: read once a round, so that nothing else has to wait for the device."""

    prompt: list[int]
    length: int
    """Committed tokens."""
    room: int
    """Tokens it may still emit."""
    active: bool
    pending: int


def sent(values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device, without waiting until they are there."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def arranged(values: Tensor, rows: Sequence[int]) -> Tensor:
    """values [B, ...] -> [len(rows), ...]: row i is the one that was rows[i], or zeros where that is -1."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])[list(rows)]


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
    text: Sequence[Sequence[int]]
    """The valid tokens of each row, on the host."""
    drafted: Sequence[int]
    """Per row, how many tokens its draft proposed, padding not counted; 0 for prompts and finished rows."""
    stops: tuple[Stop, ...] = ()
    """Why drafting stopped, per row; empty for prompts."""
    confidences: Sequence[Sequence[float]] = ()
    """Per row, how sure the drafter was of its tokens, where a stopping rule looked; empty for prompts."""


class State:
    """Rows being decoded. `lengths` is the only truth about length; `rows` is what the host last heard of it.

    A row's first `lengths[b]` tokens are committed: their K/V are valid in every target layer. The token after them
    is pending: known, but not yet run. At first that is the prompt's last token, so every emitted token comes from a
    round. Between rounds a request may take a finished row over, and rows may come, go and move (`arrange`).
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
        device, rows = sampler.device, len(requests)
        self.cache, self.sampler, self.rule = cache, sampler, rule
        self.spare = spare
        self.requests, self._eos = list(requests), tuple(sorted(eos))
        self.tokens = torch.zeros(rows, cache.slots + 1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.ones_like(self.lengths)
        self.room = torch.zeros_like(self.lengths)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rounds = 0
        self.drafting = True
        """Whether anything is to be drafted in the coming round."""
        self.longest_draft: int | None = None
        """Tokens that a row's draft may have, if fewer than it has room for."""
        self.weighed = False
        """Whether somebody keeps an account of what drafts cost, and sets `price` once that is known."""
        self.price: float | None = None
        """What a drafted token costs with these rows, in plain rounds, if that has been measured."""
        self.rows = [self._seat(row, request) for row, request in enumerate(requests)]
        self._constrain()

    @property
    def capacity(self) -> int:
        """Tokens that a row holds at most, prompt and output."""
        return self.cache.slots - self.spare

    @torch.inference_mode()
    def arrange(self, rows: Sequence[int], joining: Sequence[Request], capacity: int = 0, reserve: int = 0) -> None:
        """From now on row i is the one that was rows[i]; -1: a new one, of the next of the requests that join.

        New rows are inactive until their prompts are prefilled (`begin`). Rows that move come from places that are
        given up. All hold `capacity` tokens or more; if storage has to grow, it does so for `reserve` rows.

        Raises CapacityError if that is more than fits in memory.
        """
        self.cache.arrange(rows, max(capacity + self.spare, self.cache.slots), self.longest, reserve)
        wider = self.cache.slots + 1 - self.tokens.shape[1]
        self.tokens = arranged(functional.pad(self.tokens, (0, wider)), rows)
        self.lengths, self.prompt_lengths = arranged(self.lengths, rows), arranged(self.prompt_lengths, rows)
        self.room, self.active = arranged(self.room, rows), arranged(self.active, rows)
        places = [row for row, old in enumerate(rows) if old < 0]
        requests = dict(zip(places, joining, strict=True))
        self.requests = [self.requests[old] if old >= 0 else requests[row] for row, old in enumerate(rows)]
        self.rows = [self.rows[old] if old >= 0 else self._seat(row, requests[row]) for row, old in enumerate(rows)]
        for row in places:
            self.finish(row)
        self.sampler.arrange(rows, [request.sampling for request in joining])
        self._constrain()

    @torch.inference_mode()
    def begin(self, row: int) -> None:
        """A row's prompt has been prefilled: from now on it takes part in rounds."""
        told = self.rows[row]
        self.active[row] = told.active = True
        told.pending = told.prompt[-1]

    @torch.inference_mode()
    def assign(self, row: int, request: Request) -> None:
        """Give a row to a request. Its prompt still has to be prefilled.

        Raises CapacityError if the row is too short for it.
        """
        self.rows[row] = self._seat(row, request)
        self.requests[row] = request
        self.sampler.replace(row, request.sampling)
        self._constrain()

    def _seat(self, row: int, request: Request) -> Row:
        prompt = [int(token) for token in request.prompt]
        assert len(prompt) >= 1, "an empty prompt has no pending token"
        if len(prompt) + request.max_tokens > self.capacity:
            raise CapacityError(
                f"a request of {len(prompt)} + {request.max_tokens} tokens does not fit a row of {self.capacity}; "
                "start with a larger capacity"
            )
        self.tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64, device=self.tokens.device)
        self.lengths[row] = 0
        self.prompt_lengths[row] = len(prompt)
        self.room[row] = request.max_tokens
        self.active[row] = True
        return Row(prompt, 0, request.max_tokens, True, prompt[-1])

    def _constrain(self) -> None:
        """Make tensors of what ends the rows and what their requests forbid."""
        ends, device = [request.ends(self._eos) for request in self.requests], self.sampler.device
        width = max(map(len, ends), default=0)
        padded = [[*row, *[NO_TOKEN] * (width - len(row))] for row in ends]
        self.ends = torch.tensor(padded, dtype=torch.int64, device=device)
        """[B, E] tokens that end each row, padded."""
        rows = [
            Constraint(request.min_tokens, own, request.processor)
            for request, own in zip(self.requests, ends, strict=True)
        ]
        self.constraints = Constraints(rows, self.sampler.vocab_size, device)
        self.sampler.constrain = self.constraints if self.constraints.needed else None

    def is_end(self, tokens: Tensor) -> Tensor:
        """[B, M] bool: which of the tokens [B, M] end their row."""
        return (tokens[..., None] == self.ends[:, None]).any(-1)

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """Stop a row, for reasons found downstream: a stop string, a client that went away."""
        self.active[row] = self.rows[row].active = False

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Committed tokens of the longest row."""
        return max((row.length for row in self.rows), default=0)

    @property
    def running(self) -> bool:
        """Whether some row is active."""
        return any(row.active for row in self.rows)

    @property
    def draft_rooms(self) -> list[int]:
        """Per row, how many tokens its draft may have."""
        # A draft may be allowed to be longer than a row has slots for.
        longest = self.spare - 1 if self.longest_draft is None else min(self.longest_draft, self.spare - 1)
        most = [longest if asked.max_draft is None else min(asked.max_draft, longest) for asked in self.requests]
        rows = zip(self.rows, self.off, most, strict=True)
        return [min(row.room - 1, least) if row.active and not off else 0 for row, off, least in rows]

    @property
    def off(self) -> list[bool]:
        """Per row, whether it is active and nothing may be drafted for it."""
        rows = zip(self.rows, self.requests, strict=True)
        return [row.active and not (self.drafting and asked.speculate) for row, asked in rows]

    @property
    def pending(self) -> Tensor:
        """[B, 1] the token of each row that is known but not yet run."""
        return self.tokens.gather(1, self.lengths[:, None])

    def place(self, nodes: int, parents: Tensor | None = None) -> Placement:
        """Where a draft of so many nodes goes: a tree [B, N], or a chain if no parents are given."""
        extent, first = self.longest + nodes, self.rows[0].length
        start = first if all(row.length == first for row in self.rows) else None
        if parents is None:
            return place_chain(self.lengths, nodes, extent, start)
        return place(self.lengths, parents, extent, start)

    def prefix(self, nodes: Tensor, parents: Tensor) -> Prefix:
        """What the processors of a draft's nodes [B, N] look back at."""
        tokens = self.tokens[:, : self.longest]
        return Prefix(tokens, self.lengths, self.prompt_lengths, nodes, parents, self.active)

    def ahead(self, first: int, count: int = 1) -> Columns:
        """The positions `first`, `first` + 1, ... after each row's pending token, as the host knows them."""
        return [tuple(row.length + first + i for row in self.rows) for i in range(count)]

    def round_counters(self, nodes: int) -> Tensor:
        """[B, N] numbers that no other round of a row uses (its length grows every round), for keying noise."""
        return self.lengths[:, None] * 1024 + torch.arange(nodes, device=self.lengths.device)

    def commit_prompt(self, start: int, width: int, where: Placement, features: Mapping[int, Tensor]) -> Committed:
        """Prompt tokens [start, start + width) of `where.rows` have run; each prompt's last token stays pending."""
        rows = torch.arange(self.batch, device=self.lengths.device) if where.rows is None else where.rows
        target = self.prompt_lengths[rows] - 1
        count = (target - start).clamp(0, width)
        self.lengths[rows] = torch.maximum(self.lengths[rows], torch.minimum(target, start + count))
        text = []
        for row in self.rows if where.rows is None else (self.rows[i] for i in where.rows.tolist()):
            ran = min(start + width, len(row.prompt) - 1)
            row.length = max(row.length, ran)
            text.append(row.prompt[start:ran])
        tokens = self.tokens[rows, start : start + width]
        return Committed(tokens, where, count, features, None, text, [0] * len(text))

    def commit(self, draft: Draft, verdict: Verdict, features: Mapping[int, Tensor]) -> Committed:
        """Make the accepted path contiguous, grow the rows, set the new pending tokens, close rows that are done."""
        columns = torch.arange(verdict.path.shape[1], device=self.lengths.device)
        last = (verdict.length - 1).clamp_min(0)
        columns = torch.minimum(columns, last[:, None])
        positions = self.lengths[:, None] + columns
        path = columns if draft.is_chain else verdict.path.gather(1, columns)
        if not draft.is_chain:
            self.cache.keep(self.lengths[:, None] + path, positions)
        tokens = draft.tokens.gather(1, path)
        self.tokens.scatter_(1, positions, tokens)
        self.lengths = self.lengths + verdict.length
        self.tokens.scatter_(1, self.lengths[:, None], verdict.next_token[:, None])
        self.room = self.room - verdict.length
        ended = self.is_end(verdict.next_token[:, None])[:, 0]
        self.active = self.active & (self.room > 0) & ~ended
        self.rounds += 1
        text, drafted, sureness = self._read(tokens, verdict, draft)
        stops = tuple(map(_reason, draft.stops, sureness))
        confidences = [[each for each in row[1:] if each > 0] for row in sureness]
        picked = {layers: pick(x, path) for layers, x in features.items()}
        where = place_at(positions, self.longest + 1)
        return Committed(tokens, where, verdict.length, picked, path, text, drafted, stops, confidences)

    def _read(
        self, tokens: Tensor, verdict: Verdict, draft: Draft
    ) -> tuple[list[list[int]], list[int], list[list[float]]]:
        """Bring `rows` up to date and return the committed tokens, the lengths of the drafts and what is said of their
        sureness: a round's one read."""
        drafted, whole = draft.valid[:, 1:].sum(1), 6 + tokens.shape[1]
        facts = torch.stack([verdict.length, drafted, self.lengths, self.room, self.active, verdict.next_token], 1)
        table = torch.cat([facts, tokens] if draft.sureness is None else [facts, tokens, draft.sureness], 1)
        text, lengths, sureness = list[list[int]](), list[int](), list[list[float]]()
        for row, told in zip(self.rows, table.tolist(), strict=True):
            count, proposed, row.length, row.room, active, row.pending, *path = map(int, told[:whole])
            row.active = bool(active)
            text.append(path[:count])
            lengths.append(proposed if count else 0)
            sureness.append(told[whole:])
        return text, lengths, sureness


def _reason(known: Stop, sureness: Sequence[float]) -> Stop:
    """Why a row's drafting stopped, by what the host knew of it and what the device has said since."""
    unsure = sureness and not sureness[0]
    return Stop.CONFIDENCE if unsure and known in (Stop.LENGTH, Stop.ROOM) else known
