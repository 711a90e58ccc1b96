"""EAGLE-3's drafters: a chain, and the tree whose shape is chosen anew in every round (Li et al. 2025; EAGLE-2, 2024).

When tokens join a row, the head runs over the target's true features of them. That gives their keys and values, which
take the place of those made from the head's own output while drafting, and the state that the next draft begins with.
Each later token of a draft is one more pass of the head over its own output. Differences from the release: any batch,
exact verification under sampling, and the room a row has left bounds its draft.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kangaroo.drafters.branching import best_children, keep_best
from kangaroo.drafters.chain import Threshold, draft_chain
from kangaroo.drafters.eagle3.head import Eagle3Head, place_next
from kangaroo.drafters.last_states import LastStates
from kangaroo.drafters.settings import Settings, allows_relatives, configure, need_path
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, pick


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3ChainConfig:
    """When to stop drafting."""

    max_draft: int = 5
    """Drafted tokens per round at most."""
    threshold: float = 0.0
    """Stop after a token whose top-1 probability was below it; 0 drafts a fixed length, as the paper's chains do."""

    def __post_init__(self) -> None:
        if self.max_draft < 1:
            raise ConfigError(f"max_draft must be at least 1, got {self.max_draft}")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a probability in [0, 1], got {self.threshold}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3TreeConfig:
    """Shape of the tree: EAGLE-2's, which EAGLE-3 keeps, and its numbers for a 7B model."""

    top_k: int = 10
    """Nodes per level that are drafted on from, and children considered of each."""
    max_draft: int = 6
    """Levels."""
    nodes: int = 61
    """Nodes that are verified at most, the best of all that were made, the pending token included."""

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.max_draft < 1 or self.top_k * (self.max_draft - 1) > 63:
            raise ConfigError(
                "a tree needs top_k and max_draft of at least 1, and drafts on from at most 63 nodes, got "
                f"{self.top_k} x {self.max_draft - 1}"
            )
        if not self.max_draft + 2 <= self.nodes <= 64:
            raise ConfigError(
                f"nodes must be in {self.max_draft + 2}..64 for {self.max_draft} levels, the pending token included, "
                f"got {self.nodes}; drafter 'eagle3' drafts chains"
            )


class HeadStates:
    """The head's keys and values of what has been committed, and its state of each row's pending token."""

    def __init__(self, head: Eagle3Head):
        self._head, self.taps, self.cache_layers, self.last = head, head.config.taps, head.cache_layers, LastStates()

    def observe(self, state: State, committed: Committed) -> None:
        """Run the head over the true features of committed tokens, each beside the token after it."""
        where, path = committed.where, committed.path
        extent = where.mask.shape[-1] + 1 if path is None else state.longest + 1
        after = place_next(where, extent)
        texts = state.tokens if where.rows is None else state.tokens[where.rows]
        features = self._head.fuse(committed.features)
        self.last.keep(self._head(features, texts.gather(1, after.positions), after, state.cache), state, committed)

    def arrange(self, rows: Sequence[int]) -> None:
        """A state stays with its row."""
        self.last.arrange(rows)


class Eagle3:
    """A chain: the head's token, again and again."""

    def __init__(self, head: Eagle3Head, config: Eagle3ChainConfig):
        self.head, self._states, self._threshold = head, HeadStates(head), Threshold(config.threshold)
        self.taps, self.cache_layers = self._states.taps, self._states.cache_layers
        self.observe, self.arrange = self._states.observe, self._states.arrange
        self.nodes = config.max_draft + 1

    def draft(self, state: State) -> Draft:
        """One token per step until every row stops, has no room, or has drafted `max_draft`."""
        last, head = self._states.last, self.head
        where, x = state.place(min(self.nodes, state.spare)), last.states

        def step(tokens: Tensor, k: int) -> Tensor:
            nonlocal x
            if k > 0:
                x = head(x, tokens, where[k : k + 1], state.cache)
            return head.logits(x)

        limits = ((self.nodes - 1) * last.known).tolist()
        drafted = draft_chain(state, limits, self._threshold, step, head.vocabulary)
        # Of rows without a state the loop knows only that they were to draft nothing.
        reasons = zip(drafted.stops, last.reasons(state, self.nodes - 1), last.known.tolist(), strict=True)
        return replace(drafted, stops=tuple(own if known else other for own, other, known in reasons)).draft()


@dataclass(slots=True)
class _Growing:
    """A tree under construction; lists hold one tensor [B, W] per level."""

    tokens: list[Tensor]
    """Of the nodes that are drafted on from, the root first."""
    parents: list[Tensor]
    """Of these, counted among them."""
    states: Tensor
    """[B, W, D] the head's, of the newest level."""
    products: Tensor
    """[B, W] of probabilities from the root, likewise."""
    numbers: Tensor
    """[B, W] which of all nodes made they are, counted from 1; 0 is the root."""


class Eagle3Tree:
    """A tree: of each level the best nodes are drafted on from, of all nodes made the best are verified."""

    def __init__(self, head: Eagle3Head, config: Eagle3TreeConfig):
        self.head, self._states, self._config = head, HeadStates(head), config
        self.taps, self.cache_layers = self._states.taps, self._states.cache_layers
        self.observe, self.arrange = self._states.observe, self._states.arrange
        # Nodes that are drafted on from need slots too, be they verified or not.
        self.nodes = max(config.nodes, 1 + config.top_k * (config.max_draft - 1))

    def draft(self, state: State) -> Draft:
        """Grow level by level, as deep as some row has room."""
        last, root = self._states.last, state.pending
        limits = last.limits(state, self._config.max_draft)
        depth, ones = int(limits.max()), torch.ones_like(root)
        tokens, parents, valid = root, -ones, ones.bool()
        if depth:
            tree = _Growing([root], [-ones], last.states, ones.to(last.states.dtype), 0 * ones)
            made = self._grow(tree, state, limits, depth)
            grown = keep_best(made[0], made[1], self._config.nodes - 1)
            tokens = torch.cat([tokens, made[2].gather(1, grown.places)], 1)
            parents = torch.cat([parents, grown.parents], 1)
            valid = torch.cat([valid, grown.products > 0], 1)
        stops = last.reasons(state, self._config.max_draft)
        return Draft(tokens=tokens, parents=parents, valid=valid, depth=depth, stops=stops)

    def _grow(self, tree: _Growing, state: State, limits: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """(products, parents, tokens) [B, M] of all nodes made, level by level."""
        levels: list[tuple[Tensor, Tensor, Tensor]] = []
        count = 0
        for level in range(depth):
            if level:
                self._run(tree, state)
            nodes = torch.cat(tree.tokens, 1), torch.cat(tree.parents, 1)
            logits = self.head.logits(tree.states)
            chances, candidates = best_children(
                state, nodes, level + 1, logits, self._config.top_k, self.head.vocabulary
            )
            joint = chances * (tree.products * (level < limits)[:, None])[..., None]
            width = joint.shape[-1]
            levels.append((joint.flatten(1), tree.numbers.repeat_interleave(width, 1), candidates.flatten(1)))
            self._choose(tree, levels[-1], width, count)
            count += levels[-1][0].shape[1]
        products, parents, tokens = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        return products, parents, tokens

    def _choose(self, tree: _Growing, level: tuple[Tensor, Tensor, Tensor], width: int, count: int) -> None:
        """The best of a level's nodes are the next to draft on from; `count` nodes were made before them."""
        products, _, tokens = level
        best, index = products.sort(dim=-1, descending=True, stable=True)
        best, index = best[:, : self._config.top_k], index[:, : self._config.top_k]
        first = sum(part.shape[1] for part in tree.tokens[:-1])
        tree.parents.append(first + index // width)
        tree.tokens.append(tokens.gather(1, index))
        tree.states = pick(tree.states, index // width)  # of their parents, until the head has run them
        tree.products, tree.numbers = best, count + index + 1

    def _run(self, tree: _Growing, state: State) -> None:
        """The head over the newest level."""
        nodes, newest = torch.cat(tree.tokens, 1), tree.tokens[-1]
        where = state.place(nodes.shape[1], torch.cat(tree.parents, 1))[nodes.shape[1] - newest.shape[1] :]
        tree.states = self.head(tree.states, newest, where, state.cache)


EAGLE3_SETTINGS = ("eagle3", "allow_other_target")
"""The settings that `load_head` reads."""


def load_head(target: Target, settings: Settings) -> Eagle3Head:
    """The head that the settings name. Raises ConfigError or AdapterError."""
    advice = "give the folder of a head, which `kangaroo import` makes from a published one"
    relative = allows_relatives(settings)
    return Eagle3Head.load(need_path(settings, "eagle3", advice), target, allow_other_target=relative)


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Eagle3]:
    """Settings: eagle3, the folder of a head; and those of Eagle3ChainConfig."""
    head, config = load_head(target, settings), configure(Eagle3ChainConfig, settings, also=EAGLE3_SETTINGS)
    return lambda: Eagle3(head, config)


def build_tree(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], Eagle3Tree]:
    """Settings: eagle3, the folder of a head; and those of Eagle3TreeConfig."""
    head, config = load_head(target, settings), configure(Eagle3TreeConfig, settings, also=EAGLE3_SETTINGS)
    return lambda: Eagle3Tree(head, config)
