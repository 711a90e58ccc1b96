"""Medusa: every token of a draft is predicted from one state, that of the row's last committed token (Cai et al. 2024).

The target's own head has made the pending token from that state; head i proposes the token 1 + i after the pending one,
without knowing what the heads before it proposed. Differences from the release: any batch, exact verification under
sampling, and a tree that is chosen anew in every round, by the heads' probabilities there, instead of once from their
average accuracies. A prompt of a single token has no committed token: its first round drafts nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kangaroo.cache import LayerShape
from kangaroo.drafters.chain import Threshold, draft_chain
from kangaroo.drafters.medusa.heads import MedusaHeads
from kangaroo.drafters.settings import Settings, configure, need_path
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State, arranged
from kangaroo.tree import Draft, Stop, chain, pick


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaChainConfig:
    """How far to draft."""

    max_draft: int | None = None
    """Tokens per round at most; None: as many as there are heads."""

    def __post_init__(self) -> None:
        if self.max_draft is not None and self.max_draft < 1:
            raise ConfigError(f"max_draft must be at least 1, got {self.max_draft}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MedusaTreeConfig:
    """Shape of the tree."""

    top_k: int = 10
    """Candidates per head."""
    nodes: int = 64
    """Nodes of the tree at most, the pending token included."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
        if not 2 <= self.nodes <= 64:
            raise ConfigError(f"nodes must be in 2..64, the pending token included, got {self.nodes}")


class LastStates:
    """The target's state of each row's last committed token, and which rows have one."""

    def __init__(self, target: Target):
        self._target, self.taps = target, (target.num_layers,)
        self._states: Tensor | None = None  # [B, D], before the final norm
        self.known = torch.zeros(0, dtype=torch.bool)  # [B]

    def observe(self, state: State, committed: Committed) -> None:
        """Keep the newest state of each row; a prompt that begins anew takes the row over."""
        x, count = committed.features[self._target.num_layers], committed.count
        if self._states is None:
            self._states = torch.zeros(state.batch, x.shape[-1], dtype=x.dtype, device=x.device)
            self.known = torch.zeros_like(state.active)
        rows = torch.arange(state.batch, device=x.device) if committed.where.rows is None else committed.where.rows
        if committed.path is None:
            self.known[rows] &= committed.where.positions[:, 0] > 0
        newest = pick(x, (count - 1).clamp_min(0)[:, None])[:, 0]
        self._states[rows] = torch.where(count[:, None] > 0, newest, self._states[rows])
        self.known[rows] |= count > 0

    def arrange(self, rows: Sequence[int]) -> None:
        """A state stays with its row."""
        if self._states is not None:
            self._states, self.known = arranged(self._states, rows), arranged(self.known, rows)

    def normed(self) -> Tensor:
        """[B, 1, D] after the final norm."""
        assert self._states is not None, "drafting comes after the prompts"
        return self._target.norm(self._states[:, None])


class Medusa:
    """A chain: the best token of every head."""

    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, target: Target, heads: MedusaHeads, config: MedusaChainConfig):
        """Raises ConfigError for longer drafts than there are heads."""
        self.heads, self._last = heads, LastStates(target)
        self.taps, self.observe, self.arrange = self._last.taps, self._last.observe, self._last.arrange
        self._limit = heads.config.heads if config.max_draft is None else config.max_draft
        self.nodes = self._limit + 1
        if self._limit > heads.config.heads:
            raise ConfigError(f"{heads.config.heads} heads cannot draft max_draft = {self._limit} tokens")

    def draft(self, state: State) -> Draft:
        """One token per head, as far as there is room."""
        x = self._last.normed()
        limits = (self._limit * self._last.known).tolist()
        drafted = draft_chain(state, limits, Threshold(0.0), lambda _, k: self.heads.logits(k, x))
        return replace(drafted, stops=_reasons(state, self._last.known, self._limit)).draft()


class MedusaTree:
    """A tree: the best combinations of the heads' candidates."""

    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, target: Target, heads: MedusaHeads, config: MedusaTreeConfig):
        """Raises ConfigError for trees that could only be chains."""
        self.heads, self._last, self._config = heads, LastStates(target), config
        self.taps, self.observe, self.arrange = self._last.taps, self._last.observe, self._last.arrange
        self.nodes = config.nodes
        if config.nodes < heads.config.heads + 2:
            raise ConfigError(
                f"a tree over {heads.config.heads} heads needs at least {heads.config.heads + 2} nodes, got "
                f"{config.nodes}; drafter 'medusa' drafts chains"
            )

    def draft(self, state: State) -> Draft:
        """The nodes with the highest products of probabilities, as deep as there is room."""
        rooms = torch.tensor(state.draft_rooms, device=state.room.device)
        limits = (self.heads.config.heads * self._last.known).minimum(rooms)
        depth = int(limits.max())
        tokens, parents = state.pending, torch.full_like(state.pending, -1)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        if depth:
            chances, candidates = self._candidates(state, depth)
            allowed = torch.arange(depth, device=limits.device) < limits[:, None]
            grown = grow(chances * allowed[..., None], self._config.nodes - 1)
            tokens = torch.cat([tokens, candidates.flatten(1).gather(1, grown.places)], 1)
            parents = torch.cat([parents, grown.parents], 1)
            valid = torch.cat([valid, grown.products > 0], 1)
        return Draft(
            tokens=tokens,
            parents=parents,
            valid=valid,
            depth=depth,
            stops=_reasons(state, self._last.known, self.heads.config.heads),
        )

    def _candidates(self, state: State, depth: int) -> tuple[Tensor, Tensor]:
        """(probabilities, tokens), [B, L, K] each: the best candidates of the first L heads.

        Processors see the row up to the pending token; what stands between it and a candidate differs from path to
        path. Under `match` the candidates' probabilities are those after the target's own noise.
        """
        x, prefix = self._last.normed(), state.prefix(state.pending, chain(state.batch, 1, state.tokens.device))
        levels = []
        for head in range(depth):
            scores = state.sampler.scores(self.heads.logits(head, x), prefix)
            if state.rule == "match":
                positions, known = (state.lengths + 1 + head)[:, None], state.ahead(1 + head)
                scores = state.sampler.perturb(scores, positions, known=known)
            levels.append(scores.softmax(-1).topk(min(self._config.top_k, scores.shape[-1]), -1))
        return torch.cat([level.values for level in levels], 1), torch.cat([level.indices for level in levels], 1)


@dataclass(frozen=True, slots=True)
class Grown:
    """The drafted nodes of a tree, best first, [B, N] each."""

    parents: Tensor
    """Node numbers of a draft: 0 is the pending token, these nodes are 1 to N."""
    places: Tensor
    """Which candidate each node is: level x K + rank."""
    products: Tensor
    """Of probabilities from the root."""


def grow(chances: Tensor, most: int) -> Grown:
    """The `most` best paths through levels of candidates with probabilities `chances` [B, L, K].

    Ties go to the shallower node, then to the better parent, then to the candidate that comes first. A product is
    never above that of its beginning, so parents are chosen whenever their children are, and precede them.
    """
    batch, levels, width = chances.shape
    products, parents, places = [torch.ones_like(chances[:, 0, :1])], list[Tensor](), list[Tensor]()
    first = 0  # the newest level's first node, counted in the order in which nodes are made
    for level in range(levels):
        joint = (products[-1][..., None] * chances[:, level, None]).flatten(1)
        best, index = joint.sort(dim=-1, descending=True, stable=True)
        parents.append(first + index[:, :most] // width)
        places.append(level * width + index[:, :most] % width)
        first += products[-1].shape[1]
        products.append(best[:, :most])
    made = torch.cat(products[1:], 1)
    ranked, order = made.sort(dim=-1, descending=True, stable=True)
    number = torch.zeros(batch, made.shape[1] + 1, dtype=torch.int64, device=made.device)
    number[:, 1:] = order.argsort(-1) + 1  # the root keeps its 0
    order = order[:, :most]
    parent = number.gather(1, torch.cat(parents, 1).gather(1, order))
    return Grown(parent, torch.cat(places, 1).gather(1, order), ranked[:, :most])


def _reasons(state: State, known: Tensor, limit: int) -> tuple[Stop, ...]:
    rows = zip(state.active.tolist(), (state.room - 1).tolist(), known.tolist(), strict=True)
    return tuple(_reason(*row, limit) for row in rows)


def _reason(active: bool, room: int, known: bool, limit: int) -> Stop:
    if not active:
        return Stop.INACTIVE
    if room < 1:
        return Stop.ROOM
    return Stop.NOTHING if not known else Stop.ROOM if room <= limit else Stop.LENGTH


HEADS_SETTINGS = ("heads", "allow_other_target")
"""The settings that `load_heads` reads."""


def load_heads(target: Target, settings: Settings) -> MedusaHeads:
    """The heads that the settings name. Raises ConfigError or AdapterError."""
    advice = 'give the folder of trained ones; `kangaroo train` makes them from a recipe of kind "medusa"'
    relative = bool(settings.get("allow_other_target", False))
    return MedusaHeads.load(need_path(settings, "heads", advice), target, allow_other_target=relative)


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Medusa]:
    """Settings: heads, and those of MedusaChainConfig."""
    heads, config = load_heads(target, settings), configure(MedusaChainConfig, settings, also=HEADS_SETTINGS)
    Medusa(target, heads, config)  # a mistake should not wait for the first prompt
    return lambda: Medusa(target, heads, config)


def build_tree(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], MedusaTree]:
    """Settings: heads, and those of MedusaTreeConfig."""
    heads, config = load_heads(target, settings), configure(MedusaTreeConfig, settings, also=HEADS_SETTINGS)
    MedusaTree(target, heads, config)
    return lambda: MedusaTree(target, heads, config)
