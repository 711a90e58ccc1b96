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
from kangaroo.drafters.branching import Grown, best_children, keep_best
from kangaroo.drafters.chain import Threshold, draft_chain
from kangaroo.drafters.last_states import LastStates
from kangaroo.drafters.medusa.heads import MedusaHeads
from kangaroo.drafters.settings import Settings, allows_relatives, configure, need_path
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, chain


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


class FinalStates:
    """The target's state of each row's last committed token, behind its last layer."""

    def __init__(self, target: Target):
        self._target, self.taps, self.last = target, (target.num_layers,), LastStates()

    def observe(self, state: State, committed: Committed) -> None:
        """Keep the newest."""
        self.last.keep(committed.features[self._target.num_layers], state, committed)

    def arrange(self, rows: Sequence[int]) -> None:
        """A state stays with its row."""
        self.last.arrange(rows)

    def normed(self) -> Tensor:
        """[B, 1, D] after the final norm."""
        return self._target.norm(self.last.states)


class Medusa:
    """A chain: the best token of every head."""

    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, target: Target, heads: MedusaHeads, config: MedusaChainConfig):
        """Raises ConfigError for longer drafts than there are heads."""
        self.heads, self._final = heads, FinalStates(target)
        self.taps, self.observe, self.arrange = self._final.taps, self._final.observe, self._final.arrange
        self._limit = heads.config.heads if config.max_draft is None else config.max_draft
        self.nodes = self._limit + 1
        if self._limit > heads.config.heads:
            raise ConfigError(f"{heads.config.heads} heads cannot draft max_draft = {self._limit} tokens")

    def draft(self, state: State) -> Draft:
        """One token per head, as far as there is room."""
        x, last = self._final.normed(), self._final.last
        limits = (self._limit * last.known).tolist()
        drafted = draft_chain(state, limits, Threshold(0.0), lambda _, k: self.heads.logits(k, x))
        return replace(drafted, stops=last.reasons(state, self._limit)).draft()


class MedusaTree:
    """A tree: the best combinations of the heads' candidates."""

    cache_layers: tuple[LayerShape, ...] = ()

    def __init__(self, target: Target, heads: MedusaHeads, config: MedusaTreeConfig):
        """Raises ConfigError for trees that could only be chains."""
        self.heads, self._final, self._config = heads, FinalStates(target), config
        self.taps, self.observe, self.arrange = self._final.taps, self._final.observe, self._final.arrange
        self.nodes = config.nodes
        if config.nodes < heads.config.heads + 2:
            raise ConfigError(
                f"a tree over {heads.config.heads} heads needs at least {heads.config.heads + 2} nodes, got "
                f"{config.nodes}; drafter 'medusa' drafts chains"
            )

    def draft(self, state: State) -> Draft:
        """The nodes with the highest products of probabilities, as deep as there is room."""
        last = self._final.last
        limits = last.limits(state, self.heads.config.heads)
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
            stops=last.reasons(state, self.heads.config.heads),
        )

    def _candidates(self, state: State, depth: int) -> tuple[Tensor, Tensor]:
        """(probabilities, tokens), [B, L, K] each: the best candidates of the first L heads.

        Processors see the row up to the pending token; what stands between it and a candidate differs from path to
        path. Under `match` the candidates' probabilities are those after the target's own noise.
        """
        x, root = self._final.normed(), (state.pending, chain(state.batch, 1, state.tokens.device))
        levels = [
            best_children(state, root, 1 + head, self.heads.logits(head, x), self._config.top_k)
            for head in range(depth)
        ]
        return torch.cat([chances for chances, _ in levels], 1), torch.cat([tokens for _, tokens in levels], 1)


def grow(chances: Tensor, most: int) -> Grown:
    """The `most` best paths through levels of candidates with probabilities `chances` [B, L, K].

    Ties go to the shallower node, then to the better parent, then to the candidate that comes first. A product is
    never above that of its beginning, so parents are chosen whenever their children are, and precede them.
    """
    _, levels, width = chances.shape
    products, parents, places = [torch.ones_like(chances[:, 0, :1])], list[Tensor](), list[Tensor]()
    first = 0  # the newest level's first node, counted in the order in which nodes are made
    for level in range(levels):
        joint = (products[-1][..., None] * chances[:, level, None]).flatten(1)
        best, index = joint.sort(dim=-1, descending=True, stable=True)
        parents.append(first + index[:, :most] // width)
        places.append(level * width + index[:, :most] % width)
        first += products[-1].shape[1]
        products.append(best[:, :most])
    grown = keep_best(torch.cat(products[1:], 1), torch.cat(parents, 1), most)
    return replace(grown, places=torch.cat(places, 1).gather(1, grown.places))


HEADS_SETTINGS = ("heads", "allow_other_target")
"""The settings that `load_heads` reads."""


def load_heads(target: Target, settings: Settings) -> MedusaHeads:
    """The heads that the settings name. Raises ConfigError or AdapterError."""
    advice = 'give the folder of trained ones; `kangaroo train` makes them from a recipe of kind "medusa"'
    relative = allows_relatives(settings)
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
