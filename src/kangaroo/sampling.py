"""From the target's logits to the target's own token, at every node of a draft.

The noise of a draw is a pure function of (seed, sample index, position, token), never of the batch row, the drafter
or the shape of the draft. A drawn text is therefore a function of (weights, prompt, Sampling) alone, greedy decoding is
the same code with the noise left out, and comparing texts is a complete test of losslessness.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional

from kangaroo.checks import need_number, need_type, need_whole, shown
from kangaroo.errors import ConfigError
from kangaroo.tree import ancestors

EXTREME = 1e12
"""The largest bias or penalty: what they add up to, and a temperature multiplies, stays finite in float32."""


class FrozenBias(Mapping[int, float]):
    """A mapping that cannot change, so that what holds it can be hashed."""

    def __init__(self, bias: Mapping[int, float]):
        self._bias = dict(bias)

    def __getitem__(self, token: int) -> float:
        return self._bias[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._bias)

    def __len__(self) -> int:
        return len(self._bias)

    def __hash__(self) -> int:
        return hash(frozenset(self._bias.items()))

    def __repr__(self) -> str:
        return repr(self._bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens. Processors apply in the order of the fields; filters see what the ones before left.

    Raises ConfigError for values outside their range.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    repetition_penalty: float = 1.0
    """> 0: divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens that occur in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of output tokens once per occurrence."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k best tokens, and any that tie with the k-th."""
    top_p: float = 1.0
    """Keep the fewest best tokens whose probabilities sum to at least p."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as probable as the best."""
    seed: int = 0
    index: int = 0
    """Which of several samples of the same prompt and seed this is."""

    def __post_init__(self) -> None:
        for name, annotation in _numbers().items():
            need_type(name, getattr(self, name), annotation, largest=2**63 - 1)
        checks = (
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature < math.inf, "0, or finite and >= 1e-06"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 1 / EXTREME <= self.repetition_penalty <= EXTREME, "finite, > 0, up to 1e+12"),
            ("presence_penalty", abs(self.presence_penalty) <= EXTREME, "finite, up to 1e+12"),
            ("frequency_penalty", abs(self.frequency_penalty) <= EXTREME, "finite, up to 1e+12"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("index", 0 <= self.index < 2**31, "in [0, 2**31)"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)}")
        _check_bias(self.logit_bias)
        object.__setattr__(self, "logit_bias", FrozenBias(self.logit_bias))


@cache
def _numbers() -> dict[str, Any]:
    """The annotations of a Sampling's fields but for the bias."""
    hints = get_type_hints(Sampling)
    return {own.name: hints[own.name] for own in fields(Sampling) if own.name != "logit_bias"}


def _check_bias(bias: object) -> None:
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias must map token ids to numbers, got {shown(bias)}")
    for token, value in bias.items():
        number = need_number("a logit_bias", value)
        if need_whole("a token id of logit_bias", token) < 0 or not (abs(number) <= EXTREME or number == -math.inf):
            raise ConfigError(
                "logit_bias must map token ids >= 0 to numbers of at most 1e+12, or to -inf to forbid a token, got "
                f"{shown({token: value})}"
            )


def check_bias(sampling: Sampling, vocab_size: int) -> None:
    """Raise ConfigError for a bias on tokens that there are not, or on all of them."""
    outside = [token for token in sampling.logit_bias if token >= vocab_size]
    if outside:
        raise ConfigError(f"logit_bias names token {outside[0]}, but the vocabulary has {vocab_size} tokens")
    if sum(bias == -math.inf for bias in sampling.logit_bias.values()) == vocab_size:
        raise ConfigError("logit_bias forbids every token of the vocabulary: leave at least one")


Columns = Sequence[tuple[int, ...]]
"""Columns of a tensor [B, N], on the host."""
NOISE_KEPT = 1 << 20
"""Numbers of noise a sampler remembers, at most."""


class Stream(IntEnum):
    """Independent sources of noise. `match` lets draft and target share one; `reject` must not."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3


@dataclass(frozen=True, slots=True)
class Prefix:
    """What penalties look at: each row's committed tokens, and the path from the root to each node."""

    tokens: Tensor
    """[B, S]."""
    lengths: Tensor
    """[B] committed tokens."""
    prompt_lengths: Tensor
    """[B]."""
    nodes: Tensor
    """[B, N] drafted tokens, the pending one first."""
    parents: Tensor
    """[B, N]."""
    active: Tensor | None = None
    """[B] bool: rows whose scores anybody reads; None for all."""


class Sampler:
    """The Sampling of every row, as tensors."""

    def __init__(self, rows: Sequence[Sampling], vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        self._rows = list(rows)
        self.constrain: Callable[[Tensor, Prefix], Tensor] | None = None
        """What else changes scores, between penalties and temperature (`constraints.py`)."""
        for sampling in rows:
            check_bias(sampling, vocab_size)
        self._pack()

    def replace(self, row: int, sampling: Sampling) -> None:
        """Give a row another Sampling, for a request that takes the row over."""
        check_bias(sampling, self.vocab_size)
        self._rows[row] = sampling
        self._pack()

    def arrange(self, rows: Sequence[int], joining: Sequence[Sampling]) -> None:
        """From now on row i is the one that was rows[i]; -1: the next of `joining`."""
        for sampling in joining:
            check_bias(sampling, self.vocab_size)
        fresh = iter(joining)
        self._rows = [self._rows[old] if old >= 0 else next(fresh) for old in rows]
        self._pack()

    def _pack(self) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self.device)[:, None, None]

        rows = self._rows
        self.greedy = all(r.temperature == 0 for r in rows)
        self.penalised = any(
            r.repetition_penalty != 1 or r.presence_penalty != 0 or r.frequency_penalty != 0 for r in rows
        )
        self._most = max((min(r.top_k, self.vocab_size) for r in rows if r.top_k), default=0)
        self._nucleus, self._floor = any(r.top_p < 1 for r in rows), any(r.min_p > 0 for r in rows)
        self._hot = column([float(r.temperature > 0) for r in rows])
        self._temperature = column([r.temperature or 1.0 for r in rows])
        self._top_k = column([min(r.top_k or 1, self.vocab_size) for r in rows]).long()
        self._every_k = column([float(not r.top_k) for r in rows]).bool()
        self._top_p = column([r.top_p for r in rows])
        self._log_min_p = column([math.log(r.min_p) if r.min_p > 0 else -math.inf for r in rows])
        self._repetition = column([r.repetition_penalty for r in rows])
        self._presence = column([r.presence_penalty for r in rows])
        self._frequency = column([r.frequency_penalty for r in rows])
        self._recent: dict[tuple[int, ...], Tensor] = {}
        self._keys = mix(torch.tensor([[r.seed, r.index] for r in rows], dtype=torch.int64, device=self.device))
        self._bias: Tensor | None = None
        if any(r.logit_bias for r in rows):
            self._bias = torch.zeros(len(rows), 1, self.vocab_size, dtype=torch.float64, device=self.device)
            for i, row in enumerate(rows):
                for token, bias in row.logit_bias.items():
                    self._bias[i, 0, token] = bias
        self._untouched = self.greedy and not self.penalised and self._bias is None

    @property
    def plain(self) -> bool:
        """Whether every row takes the best token, whatever came before."""
        return self._untouched and self.constrain is None

    def scores(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """Logits [B, N, V] after bias, penalties, temperature and filters; what is filtered out is -inf.

        The nodes are the last N of `prefix`. In float32, or float64 for a float64 model. Rows at temperature 0 are
        neither scaled nor filtered.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        kind = scores.dtype
        if self._bias is not None:
            scores = scores + self._bias.to(kind)
        if self.penalised:
            scores = self._penalise(scores, prefix)
        if self.constrain is not None:
            scores = self.constrain(scores, prefix)
        if self.greedy:
            return scores
        scores = scores / self._temperature.to(kind)
        if self._most or self._nucleus or self._floor:
            scores = torch.where(self._hot.bool(), self._filter(scores), scores)
        return scores

    def _penalise(self, scores: Tensor, prefix: Prefix) -> Tensor:
        # Only tokens that occur change; one that stands in several places gets the same score from each of them.
        seen = count_tokens(prefix, scores.shape[1], self.vocab_size)
        old, repetition = scores.gather(2, seen.tokens), self._repetition.to(scores.dtype)
        punished = torch.where(old > 0, old / repetition, old * repetition)
        new = torch.where(seen.everywhere > 0, punished, old)
        penalty = self._frequency * seen.output + self._presence * (seen.output > 0)
        return scores.scatter(2, seen.tokens, new - penalty.to(scores.dtype))

    def _filter(self, scores: Tensor) -> Tensor:
        # Each filter is a lower bound on the score, so tokens that tie share their fate whatever the sort did. Only
        # top-p has to see the whole vocabulary in order.
        if self._nucleus:
            ordered = scores.sort(-1, descending=True).values
        else:
            ordered = scores.topk(self._most, -1).values if self._most else scores.amax(-1, keepdim=True)
        bound = ordered[..., :1] + self._log_min_p.to(scores.dtype)
        if self._most:
            kth = ordered.gather(-1, (self._top_k - 1).expand(*ordered.shape[:2], 1))
            kth = kth.masked_fill(self._every_k, -math.inf)
            bound, ordered = torch.maximum(bound, kth), ordered.masked_fill(ordered < kth, -math.inf)
        if self._nucleus:
            probs = ordered.softmax(-1)
            kept = ((probs.cumsum(-1) - probs) < self._top_p.to(probs.dtype)) | (self._top_p == 1)
            kept[..., 0] = True  # also where top_p is so small that it rounds to 0
            bound = torch.maximum(bound, ordered.masked_fill(~kept, math.inf).amin(-1, keepdim=True))
        return scores.masked_fill(scores < bound, -math.inf)

    def perturb(
        self, scores: Tensor, positions: Tensor, stream: Stream = Stream.TARGET, known: Columns | None = None
    ) -> Tensor:
        """Add Gumbel noise keyed by the positions [B, N] of the tokens being drawn; none at temperature 0.

        `known` are the same positions as the host knows them, column by column: without it they may have to be read.
        """
        if self.greedy:
            return scores
        return scores + self._noise(positions, stream, known).to(scores.dtype)

    def _noise(self, positions: Tensor, stream: Stream, known: Columns | None) -> Tensor:
        # Draft and target draw at the same positions, and so do the siblings of a tree. On a CPU, where noise costs as
        # much as a layer of a small model, the columns made last are kept: they are a pure function of the positions.
        kept = NOISE_KEPT // (len(self._rows) * self.vocab_size)
        if stream != Stream.TARGET or self.device.type != "cpu" or kept == 0:
            return gumbel(self.keys(positions, stream), self.vocab_size) * self._hot
        columns = [tuple(column) for column in positions.T.tolist()] if known is None else known
        missing = list(dict.fromkeys(column for column in columns if column not in self._recent))
        if missing:
            fresh = gumbel(self.keys(torch.tensor(missing).T, stream), self.vocab_size) * self._hot
            self._recent |= dict(zip(missing, torch.split(fresh, 1, 1), strict=True))
        noise = torch.cat([self._recent[column] for column in columns], 1)
        for column in list(self._recent)[:-kept]:
            del self._recent[column]
        return noise

    def draw(
        self,
        logits: Tensor,
        prefix: Prefix,
        positions: Tensor,
        stream: Stream = Stream.TARGET,
        known: Columns | None = None,
    ) -> Tensor:
        """The token [B, N] drawn at each node (the Gumbel-max trick); positions as in `perturb`."""
        if self.plain:  # a wider type would hold the same numbers in the same order
            return best(logits)
        return best(self.perturb(self.scores(logits, prefix), positions, stream, known))

    def probs(self, logits: Tensor, prefix: Prefix) -> Tensor:
        """The distribution [B, N, V] that `draw` draws from; one-hot at temperature 0."""
        scores = self.scores(logits, prefix)
        certain = functional.one_hot(best(scores), self.vocab_size).to(scores.dtype)
        return certain if self.greedy else torch.where(self._hot.bool(), scores.softmax(-1), certain)

    def uniform(self, counters: Tensor, stream: Stream) -> Tensor:
        """Uniform float64 numbers in (0, 1), keyed by `counters` [B, N]."""
        return _to_unit(self.keys(counters, stream))

    def keys(self, counters: Tensor, stream: Stream) -> Tensor:
        """Seeds of noise [B, N]: a hash of each row's (seed, sample index), of `counters` [B, N] and the stream."""
        return _finalise((self._keys[:, None] + _GOLDEN) ^ (counters * 4 + int(stream)))


def best(scores: Tensor) -> Tensor:
    """The token [...] with the highest score [..., V], the lowest of equals."""
    return scores.max(-1).indices  # argmax takes three times as long in bfloat16 on a CPU


@dataclass(frozen=True, slots=True)
class Seen:
    """Tokens that occur before the token that follows each node, and how often: [B, N, K] each, with repetitions."""

    tokens: Tensor
    everywhere: Tensor
    """Occurrences in prompt and output, of the tokens of the same place."""
    output: Tensor


def count_tokens(prefix: Prefix, nodes: int, vocab_size: int) -> Seen:
    """What the last `nodes` nodes of a prefix look back at: committed tokens, and drafted ones on their paths."""
    batch, slots = prefix.tokens.shape
    reach = ancestors(prefix.parents)[:, -nodes:].double()
    # The pending token is output unless it is the last token of the prompt, as in the first round.
    fresh = reach.clone()
    fresh[:, :, 0] *= (prefix.lengths >= prefix.prompt_lengths)[:, None]
    slot = torch.arange(slots, device=prefix.tokens.device)
    committed = (slot < prefix.lengths[:, None]).double()
    emitted = committed * (slot >= prefix.prompt_lengths[:, None])
    tokens = torch.cat([prefix.tokens, prefix.nodes], 1)
    drafted = (prefix.nodes[..., None] == tokens[:, None]).double()
    counts = []
    for old, new in ((committed, reach), (emitted, fresh)):
        base = torch.zeros(batch, vocab_size, dtype=torch.float64, device=slot.device)
        counts.append(base.scatter_add_(1, prefix.tokens, old).gather(1, tokens)[:, None] + new @ drafted)
    return Seen(tokens[:, None].expand(-1, nodes, -1), *counts)


# Constants of the splitmix64 generator (Steele, Lea and Flood 2014) as signed 64-bit numbers.
_GOLDEN, _MIX_A, _MIX_B = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def mix(parts: Tensor) -> Tensor:
    """Hash the last dimension of an int64 tensor into one well-mixed int64."""
    state = torch.zeros_like(parts[..., 0])
    for part in parts.unbind(-1):
        state = _finalise((state + _GOLDEN) ^ part)
    return state


def _finalise(x: Tensor) -> Tensor:
    # Arithmetic shifts made logical by masking the sign extension away; in place, as these rows are vocabulary-long.
    x = (x >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(x).mul_(_MIX_A)
    x = (x >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(x).mul_(_MIX_B)
    return (x >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(x)


def _to_unit(bits: Tensor) -> Tensor:
    return (bits >> 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)


def gumbel(keys: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [B, N, V] in float64: token v of a node gets output v of a splitmix64 run seeded there."""
    tokens = torch.arange(1, vocab_size + 1, device=keys.device).mul_(_GOLDEN)
    return _to_unit(_finalise(keys[..., None] + tokens)).log_().neg_().log_().neg_()
