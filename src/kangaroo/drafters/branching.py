"""What drafters of trees share: which children a node may have, and which of all nodes made are worth verifying."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.drafters.draft_vocabulary import DraftTokens
from kangaroo.state import State


def best_children(
    state: State,
    nodes: tuple[Tensor, Tensor],
    depth: int,
    logits: Tensor,
    top_k: int,
    vocabulary: DraftTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """(probabilities, tokens) [B, W, K]: the best children of a tree's last W nodes, each `depth` below the root.

    `nodes` are tokens and parents [B, N] of all of them, for processors to look back at; `logits` [B, W, V] are those
    of the last W, [B, W, n] over a draft vocabulary. Under `match` the probabilities are those after the target's own
    noise.
    """
    if vocabulary is not None:
        logits = vocabulary.spread(logits)
    scores = state.sampler.scores(logits, state.prefix(*nodes))
    if state.rule == "match":
        batch, width = scores.shape[:2]
        positions = (state.lengths + depth)[:, None].expand(batch, width)
        scores = state.sampler.perturb(scores, positions, known=[*state.ahead(depth)] * width)
    best = scores.softmax(-1).topk(min(top_k, scores.shape[-1]), -1)
    return best.values, best.indices


@dataclass(frozen=True, slots=True)
class Grown:
    """The drafted nodes of a tree, best first, [B, N] each."""

    parents: Tensor
    """Node numbers of a draft: 0 is the pending token, these nodes are 1 to N."""
    places: Tensor
    """Which of the nodes made each is."""
    products: Tensor
    """Of probabilities from the root."""


def keep_best(products: Tensor, parents: Tensor, most: int) -> Grown:
    """The `most` best of the nodes made [B, M], by the product of their probabilities from the root.

    `parents` count the nodes in the order in which they were made, from 1; 0 is the root. Parents are made before their
    children. Ties go to the node made first; a product is never above that of its beginning, so parents are kept
    whenever their children are, and precede them.
    """
    ranked, order = products.sort(dim=-1, descending=True, stable=True)
    number = torch.zeros(len(products), products.shape[1] + 1, dtype=torch.int64, device=products.device)
    number[:, 1:] = order.argsort(-1) + 1  # the root keeps its 0
    order = order[:, :most]
    return Grown(number.gather(1, parents.gather(1, order)), order, ranked[:, :most])
