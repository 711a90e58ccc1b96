"""Kangaroo's Top-K tree: draft several continuations, level by level.

The paper gives K = 10 and eta = 0.4 and no more. Here: the children of all open nodes of a level are scored by the
product of their probabilities from the root, the best K become the next level, and a branch closes when its score falls
below eta. A closed node stays in the draft, as the chain's unsure token does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.kangaroo.self_draft import ADAPTER_SETTINGS, SelfDraft, choose_exit_layer, load_adapter
from kangaroo.drafters.none import no_draft
from kangaroo.drafters.settings import Settings, configure
from kangaroo.errors import ConfigError
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeConfig:
    """Shape of the tree."""

    top_k: int = 10
    """Nodes per level."""
    max_draft: int = 6
    """Levels."""
    threshold: float = 0.4
    """A branch closes when its cumulative probability falls below this (the paper's eta)."""

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.max_draft < 1 or self.top_k * self.max_draft > 63:
            raise ConfigError(
                f"a tree needs top_k and max_draft of at least 1 and at most 63 drafted nodes, "
                f"got {self.top_k} x {self.max_draft}"
            )
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is a probability in [0, 1], got {self.threshold}")


@dataclass(slots=True)
class _Growing:
    """A tree under construction; lists hold one tensor per level."""

    tokens: list[Tensor]  # [B, K]
    parents: list[Tensor]  # [B, K]
    valid: list[Tensor]  # [B, K]
    scores: Tensor  # [B, K] of the newest level; 0 for padding
    hidden: list[Tensor]  # [B, K, D]

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self.tokens, 1), torch.cat(self.parents, 1), torch.cat(self.valid, 1)


class KangarooTree:
    """Shallow layers and adapter draft a tree."""

    def __init__(self, target: Target, adapter: Adapter | None, exit_layer: int, config: TreeConfig):
        self.model, self._config = SelfDraft(target, adapter, exit_layer), config
        self.taps, self.cache_layers = self.model.taps, self.model.cache_layers
        self.nodes = 1 + config.top_k * config.max_draft
        self._steps = 0

    def observe(self, state: State, committed: Committed) -> None:
        """Feed the adapter what it has not seen."""
        self.model.observe(state, committed, self._steps)

    def arrange(self, rows: Sequence[int]) -> None:
        """What waits for the adapter stays with its row."""
        self.model.arrange(rows)

    def draft(self, state: State) -> Draft:
        """Grow level by level while some branch is open and some row has room."""
        levels = min(self._config.max_draft, max(state.draft_rooms))
        self._steps = 0
        if levels == 0:
            return no_draft(state, self._reasons(state, 0))
        rooms = torch.tensor(state.draft_rooms, device=state.room.device)
        root = state.pending
        sure = torch.ones_like(root, dtype=torch.float32) * state.active[:, None]
        tree = _Growing([root], [torch.full_like(root, -1)], [torch.ones_like(root, dtype=torch.bool)], sure, [])
        for level in range(levels + 1):
            tokens, parents, valid = tree.joined()
            everything = state.place(tokens.shape[1], parents)
            where = everything[tokens.shape[1] - tree.tokens[-1].shape[1] :]
            x = self.model.states(tree.tokens[-1], where, state)
            tree.hidden.append(x)
            open_ = tree.valid[-1] & (tree.scores >= self._config.threshold) & (rooms > level)[:, None]
            if level == levels or not (open_ & state.active[:, None]).any():
                break
            self._grow(tree, self.model.logits(x, where, state), open_, state)
            self._steps = level + 1
        return Draft(
            tokens=tokens,
            parents=parents,
            valid=valid,
            depth=self._steps,
            stops=self._reasons(state, self._steps),
            hidden=torch.cat(tree.hidden, 1),
            layers_done=self.model.exit_layer,
            where=everything,
        )

    def _grow(self, tree: _Growing, logits: Tensor, open_: Tensor, state: State) -> None:
        """Add the next level: the best K children of the open nodes."""
        tokens, parents, _ = tree.joined()
        batch, width = tree.tokens[-1].shape
        first = tokens.shape[1] - width
        prefix = state.prefix(tokens, parents)
        vocabulary = self.model.vocabulary
        if vocabulary is not None:
            logits = vocabulary.spread(logits)
        scores = state.sampler.scores(logits, prefix)
        if state.rule == "match":
            depth = len(tree.tokens)
            positions = (state.lengths + depth)[:, None].expand(batch, width)
            scores = state.sampler.perturb(scores, positions, known=[*state.ahead(depth)] * width)
        chances, candidates = scores.softmax(-1).topk(min(self._config.top_k, scores.shape[-1]), -1)
        joint = (chances * (tree.scores * open_)[..., None]).flatten(1)
        best, index = joint.topk(min(self._config.top_k, joint.shape[1]), -1)
        tree.parents.append(first + index // candidates.shape[-1])
        tree.tokens.append(candidates.flatten(1).gather(1, index))
        tree.valid.append(best > 0)
        tree.scores = best

    def _reasons(self, state: State, steps: int) -> tuple[Stop, ...]:
        full = Stop.LENGTH if steps == self._config.max_draft else Stop.CONFIDENCE
        return tuple(
            Stop.INACTIVE if not row.active else Stop.ROOM if row.room - 1 <= steps else full for row in state.rows
        )


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], KangarooTree]:
    """Settings: adapter, and those of TreeConfig."""
    adapter = load_adapter(target, settings)
    config = configure(TreeConfig, settings, also=ADAPTER_SETTINGS)
    return lambda: KangarooTree(target, adapter, adapter.config.exit_layer, config)


def build_early_exit(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], KangarooTree]:
    """Settings: exit_layer, and those of TreeConfig."""
    exit_layer = choose_exit_layer(target, settings)
    config = configure(TreeConfig, settings, also=("exit_layer",))
    return lambda: KangarooTree(target, None, exit_layer, config)
