"""Two-model speculative decoding: a smaller model with the same tokens drafts a chain.

Leviathan et al. 2023, Chen et al. 2023. The draft length adapts per row as in transformers' assisted generation: two
more after a draft that was accepted whole, one less otherwise. The draft model has a KV cache of its own. After a round
some accepted tokens may be missing in it (the last draft of a fully accepted chain); they ride along with the first
token of the next round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kangaroo.cache import KVCache, LayerShape
from kangaroo.drafters.chain import Threshold, draft_chain
from kangaroo.drafters.settings import Settings, configure, need_path
from kangaroo.errors import ConfigError, ModelError
from kangaroo.loading import load_model, load_tokenizer
from kangaroo.model import Target
from kangaroo.state import Committed, State, arranged
from kangaroo.tree import Draft, place_at


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModelConfig:
    """How far to draft."""

    first_draft: int = 5
    """Tokens drafted in a row's first round; then two more after full acceptance, one less otherwise."""
    max_draft: int = 16
    adaptive: bool = True
    """False keeps to `first_draft`."""
    threshold: float = 0.0
    """Stop after a token whose top-1 probability was below it."""

    def __post_init__(self) -> None:
        if not 1 <= self.first_draft <= self.max_draft:
            raise ConfigError(
                f"a draft model needs 1 <= first_draft <= max_draft, got {self.first_draft} and {self.max_draft}"
            )
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a probability in [0, 1], got {self.threshold}")


class DraftModel:
    """Drafts with a second model, run as any target is."""

    taps: tuple[int, ...] = ()
    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, model: Target, vocab_size: int, config: DraftModelConfig):
        """`vocab_size` is the target's: the draft model's logits may be padded to another size."""
        self.model, self._vocab_size, self._config = model, vocab_size, config
        self.nodes = config.max_draft + 1
        self._cache: KVCache | None = None
        self._seen = self._lengths = self._drafted = torch.zeros(0, dtype=torch.int64)
        """Per row: tokens in its cache, tokens to draft next, tokens drafted last."""
        self._steps = 0

    def observe(self, state: State, committed: Committed) -> None:
        """Run prompts; of a round, note how much of what was committed the draft model has run already."""
        if self._cache is None:
            self._begin(state)
        if committed.path is None:
            self._prefill(state, committed)
            return
        if self._steps:
            self._seen = state.lengths - (committed.count - self._steps).clamp_min(0)
        if self._config.adaptive:
            change = torch.where(committed.count > self._drafted, 2, -1) * (self._drafted > 0)
            self._lengths = (self._lengths + change).clamp(1, self._config.max_draft)

    def arrange(self, rows: Sequence[int]) -> None:
        """Keys, values and counts stay with their rows."""
        if self._cache is None:
            return
        self._cache.arrange(rows, self._cache.slots, int(self._seen.max()) if len(self._seen) else 0)
        self._seen, self._lengths = arranged(self._seen, rows), arranged(self._lengths, rows)
        self._drafted = arranged(self._drafted, rows)

    def _begin(self, state: State) -> None:
        self._cache = self.model.new_cache(state.batch, state.cache.slots)
        self._seen = torch.zeros_like(state.lengths)
        self._lengths = torch.full_like(state.lengths, self._config.first_draft)
        self._drafted = torch.zeros_like(state.lengths)

    def _prefill(self, state: State, committed: Committed) -> None:
        assert self._cache is not None, "made for the first prompt"
        if state.cache.slots > self._cache.slots:
            self._cache.arrange(range(state.batch), state.cache.slots, self._cache.slots)
        rows = slice(None) if committed.where.rows is None else committed.where.rows
        self._run(state, committed.tokens, committed.where.positions, committed.where.rows)
        self._seen[rows] = state.lengths[rows]
        self._lengths[rows], self._drafted[rows] = self._config.first_draft, 0

    def draft(self, state: State) -> Draft:
        """A chain of the row's current length; what the draft model has missed is run with the pending token."""

        def step(tokens: Tensor, k: int) -> Tensor:
            missed = int(((state.lengths - self._seen) * state.active).max()) if k == 0 else 0
            # Columns some rows have seen already are run again in them, to the same effect.
            positions = (state.lengths[:, None] + torch.arange(k - missed, k + 1, device=tokens.device)).clamp_min(0)
            known = state.tokens.gather(1, positions) if k == 0 else tokens
            return self._fit(self._run(state, known, positions, None)[:, -1:])

        left = self.model.context - 1 - state.lengths  # where its context ends, drafting does
        limits = torch.minimum(self._lengths, left).tolist()
        drafted = draft_chain(state, limits, Threshold(self._config.threshold), step)
        self._steps, self._drafted = drafted.steps, drafted.valid.sum(1) - 1
        return drafted.draft()

    def _run(self, state: State, tokens: Tensor, positions: Tensor, rows: Tensor | None) -> Tensor:
        """Logits [B, N, V'] of tokens [B, N] at their positions, which are their slots."""
        model, positions = self.model, positions.clamp_max(self.model.context - 1)
        where = place_at(positions, int(positions.max()) + 1, rows)
        # Ids past the draft model's vocabulary are padding of the target's, or as good as.
        x, _ = model.run(model.embed(tokens.clamp_max(model.vocab_size - 1)), where, self._cache)
        return model.logits(model.norm(x[:, -1:]))

    def _fit(self, logits: Tensor) -> Tensor:
        """Logits over the target's vocabulary: padding that only one of the two models has is cut or barred."""
        missing = self._vocab_size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], DraftModel]:
    """Settings: draft_model, a folder or hub name; and those of DraftModelConfig.

    Raises ConfigError for a draft model of another vocabulary, ModelError for one that cannot be run.
    """
    name = str(need_path(settings, "draft_model", "a folder or hub name of a smaller model with the same tokenizer"))
    config = configure(DraftModelConfig, settings, also=("draft_model",))
    model = load_model(name, target.dtype).to(target.device)
    check_vocabulary(name, model.config.get_text_config().vocab_size, target, tokenizer)
    draft_model = Target(model, exact=False, pack=True)
    return lambda: DraftModel(draft_model, target.vocab_size, config)


def check_vocabulary(name: str, vocab_size: int, target: Target, tokenizer: Any) -> None:
    """Raise ConfigError unless the draft model in `name` gives every token the same id as the target does.

    Without a tokenizer on either side only the sizes can be compared.
    """
    advice = "choose one that shares the target's tokenizer"
    try:
        own = load_tokenizer(name).get_vocab() if tokenizer is not None else None
    except ModelError:
        own = None
    if own is None:
        if vocab_size != target.vocab_size:
            raise ConfigError(
                f"the draft model {name} has a vocabulary of {vocab_size} tokens, the target one of "
                f"{target.vocab_size}; {advice}"
            )
        return
    theirs = tokenizer.get_vocab()
    for token in own.keys() | theirs.keys():
        if own.get(token) != theirs.get(token):
            raise ConfigError(
                f"the draft model {name} has another vocabulary: token {token!r} is {own.get(token)} there and "
                f"{theirs.get(token)} in the target; {advice}"
            )
