"""Drafts as index arithmetic: no model, no cache, no randomness.

Legend, here and everywhere: B rows, N nodes of a draft, M accepted nodes, S cache slots, D width, V vocabulary,
L layers, E exit layer.

A draft is a tree of N nodes per row, parents before children. Node 0 is the pending token: known, but not yet run
through the target. A chain is the tree whose parents are -1, 0, 1, 2, ...
"""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class Stop(Enum):
    """Why drafting stopped in a row."""

    LENGTH = "length"  # as many tokens as the drafter may draft
    CONFIDENCE = "confidence"  # the last token was unsure
    ROOM = "room"  # the row may emit no more
    NOTHING = "nothing"  # the drafter had nothing to propose
    OFF = "off"  # not wanted for this request, or it would not pay under the load
    INACTIVE = "inactive"  # the row is finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a drafter proposes, and how much of the target's work on it is already done."""

    tokens: Tensor
    """[B, N] int64; node 0 is the pending token."""
    parents: Tensor
    """[B, N] int64; -1 for node 0, else an earlier node."""
    valid: Tensor
    """[B, N] bool; false marks the padding of ragged rows: never accepted, never counted. Node 0 is always valid."""
    depth: int
    """Levels below the root; a path from the root accepts at most this many drafted tokens."""
    stops: tuple[Stop, ...]
    """Why drafting stopped, per row, as far as the host knows."""
    sureness: Tensor | None = None
    """[B, 1 + K] float64, known to the device alone until the round is read: 0 where drafting stopped because the last
    token was unsure, else 1; then how sure the drafter was of each token, 0 past a row's last. None: nothing looked."""
    hidden: Tensor | None = None
    """[B, N, D] target states of the nodes after `layers_done` layers; None if no layer has run."""
    layers_done: int = 0
    """Target layers that have run every node, their K/V written at the nodes' slots."""
    probs: Tensor | None = None
    """[B, N, V] the distribution each node was drawn from; None means the drafts were not drawn at random."""
    where: "Placement | None" = None
    """Where the nodes sit, from a drafter that has placed them to run the shallow layers."""

    @property
    def is_chain(self) -> bool:
        """Whether nodes follow one another without branching."""
        return self.depth == self.tokens.shape[1] - 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where nodes sit: rotary position, cache slot, and which slots each may attend to."""

    positions: Tensor
    """[B, N] int64."""
    slots: Tensor
    """[B, N] int64."""
    mask: Tensor
    """[B, N, S] bool over the live extent of the cache: committed slots and the node's own ancestors."""
    slot_positions: Tensor
    """[B, S] int64: the position of the token in each slot, for masks that reach by distance (sliding windows)."""
    rows: Tensor | None = None
    """[B] the cache rows these nodes belong to; None for all rows in order."""
    start: int | None = None
    """The slot of node 0 where the host knows that it is the same in every row, and the others follow in order."""
    prompt: bool = False
    """Whether these are pieces of prompts, which are run in a way of their own."""
    derived: dict[object, tuple[Tensor, ...]] = field(default_factory=dict, compare=False)
    """What a model has made of this placement; nodes are the last dimension but one. Slices inherit it."""

    def __getitem__(self, nodes: slice) -> "Placement":
        positions = self.positions[:, nodes]
        return Placement(
            positions,
            positions if self.slots is self.positions else self.slots[:, nodes],
            self.mask[:, nodes],
            self.slot_positions,
            self.rows,
            None if self.start is None else self.start + nodes.indices(self.slots.shape[1])[0],
            self.prompt,
            {key: tuple(tensor[..., nodes, :] for tensor in made) for key, made in self.derived.items()},
        )

    @property
    def branches(self) -> bool:
        """Whether nodes may stand at other slots than their positions."""
        return self.slots is not self.positions

    def paths(self, extent: int) -> Tensor:
        """[B, N, extent] the slot of every token that a node sees, by its position; of the rest, some slot."""
        batch, nodes, slots = self.mask.shape
        found = torch.zeros(batch, nodes, extent + 1, dtype=torch.int64, device=self.mask.device)
        at = torch.where(self.mask, self.slot_positions[:, None], extent)
        every = torch.arange(slots, device=self.mask.device).expand(batch, nodes, slots)
        return found.scatter_(2, at, every)[..., :extent]


def chain(batch: int, nodes: int, device: torch.device | None = None) -> Tensor:
    """[B, N] parents of a chain."""
    return torch.arange(-1, nodes - 1, device=device).expand(batch, nodes)


def ancestors(parents: Tensor) -> Tensor:
    """[B, N] parents -> [B, N, N] bool: does node j lie on the path from the root to node i, i included?"""
    nodes = parents.shape[1]
    every = torch.arange(nodes, device=parents.device)
    # Each product doubles how far up a node sees: itself and its parent, then four of its line, eight, ...
    reach = ((parents[..., None] == every) | (every[:, None] == every)).float()
    for _ in range(max(0, nodes - 2).bit_length()):
        reach = (reach @ reach).clamp_max_(1)
    return reach.bool()


def place(lengths: Tensor, parents: Tensor, extent: int, start: int | None = None) -> Placement:
    """Lay a tree out in the slots right after each row's committed tokens.

    lengths [B], parents [B, N]; `extent` is the number of slots attention looks at, at least max(lengths) + N;
    `start` is the length that all rows have, if the host knows of one.
    """
    reach = ancestors(parents)
    batch, nodes = parents.shape
    slots = lengths[:, None] + torch.arange(nodes, device=parents.device)
    positions = lengths[:, None] + reach.sum(-1) - 1
    every = torch.arange(extent, device=parents.device)
    mask = (every < lengths[:, None])[:, None].repeat(1, nodes, 1)
    mask.scatter_(2, slots[:, None].expand(batch, nodes, nodes), reach)
    slot_positions = every.repeat(batch, 1).scatter_(1, slots, positions)
    return Placement(positions, slots, mask, slot_positions, start=start)


def place_chain(lengths: Tensor, nodes: int, extent: int, start: int | None = None) -> Placement:
    """`place` for a chain: slot, position and order coincide."""
    return place_at(lengths[:, None] + torch.arange(nodes, device=lengths.device), extent, start=start)


def place_at(
    positions: Tensor, extent: int, rows: Tensor | None = None, start: int | None = None, prompt: bool = False
) -> Placement:
    """Nodes of one unbranched sequence per row, at the slots that equal their positions [B, N]."""
    every = torch.arange(extent, device=positions.device)
    mask = every <= positions[..., None]
    return Placement(positions, positions, mask, every.expand(len(positions), -1), rows, start, prompt)


def sequence(batch: int, length: int, device: torch.device | None = None) -> Placement:
    """Whole sequences from position 0, as training sees them."""
    return place_at(torch.arange(length, device=device).expand(batch, length), length)


def pick(values: Tensor, nodes: Tensor) -> Tensor:
    """values [B, N, ...] at nodes [B, M] -> [B, M, ...]."""
    return values[torch.arange(len(values), device=values.device)[:, None], nodes]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a draft."""

    path: Tensor
    """[B, M] accepted nodes from the root; columns past `length` repeat earlier nodes."""
    length: Tensor
    """[B] accepted nodes, root included: at least 1 in an active row, 0 in a finished one."""
    next_token: Tensor
    """[B] the target's own token after the path: the new pending token."""
