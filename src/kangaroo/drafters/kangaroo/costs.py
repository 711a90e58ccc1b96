"""What the pieces of a round cost, timed alone, and how fast an acceptance trace could be at these costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kangaroo.drafters.kangaroo.self_draft import SelfDraft
from kangaroo.machine import medians
from kangaroo.model import Target
from kangaroo.tree import place_chain

CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Costs:
    """Median seconds of each piece, on so many rows at once as were asked for."""

    full_step: float
    """All layers, norm and head on one token a row."""
    shallow: float
    """Embedding and the first E layers on one token."""
    adapter: float
    """The adapter on one token; 0 without one."""
    head: float
    """Norm (early exit) and head on one token."""
    verify: dict[int, float]
    """Nodes -> the remaining layers, norm and head over them."""

    @property
    def draft_share(self) -> float:
        """Cost of drafting one token as a share of a full step."""
        return (self.shallow + self.adapter + self.head) / self.full_step

    @property
    def node_share(self) -> float:
        """Cost of verifying one more node, beyond the second, as a share of a full step."""
        most = max(self.verify)
        return max(0.0, (self.verify[most] - self.verify[2]) / (most - 2) / self.full_step)

    @property
    def start_share(self) -> float:
        """What a second node costs beyond that: a product with one vector becomes one with a matrix."""
        return max(0.0, (self.verify[2] - self.verify[1]) / self.full_step - self.node_share)

    def bound(self, drafts: Sequence[int], emitted: int) -> float:
        """The speed-up that rounds with these draft lengths, emitting this many tokens, would have at these costs."""
        seconds = sum(
            (k + 1) * self.shallow + k * (self.adapter + self.head) + self.verify[min(k + 1, max(self.verify))]
            for k in drafts
        )
        return emitted * self.full_step / seconds if seconds else 0.0


@torch.inference_mode()
def measure_costs(
    target: Target, model: SelfDraft | None, *, nodes: int = 8, repeats: int = 30, rows: int = 1
) -> Costs:
    """Time the pieces of rounds at the start of a context, interleaved, on the target's own weights and kernels."""
    context = min(CONTEXT, target.context - nodes - 1)
    cache = target.new_cache(rows, context + nodes + 1, model.cache_layers if model else ())
    lengths = torch.full((rows,), context - 1, dtype=torch.int64, device=target.device)
    tokens = torch.ones(rows, nodes, dtype=torch.int64, device=target.device)
    exit_layer = model.exit_layer if model else 0

    def deep(count: int, first: int) -> Callable[[], object]:
        where = place_chain(lengths, count, context - 1 + count, context - 1)
        x = target.embed(tokens[:, :count])
        return lambda: target.logits(target.norm(target.run(x, where, cache, start=first)[0]))

    one = place_chain(lengths, 1, context, context - 1)
    x = target.embed(tokens[:, :1])
    pieces: dict[str, Callable[[], object]] = {"full": deep(1, 0)}
    if model is not None:
        pieces["shallow"] = lambda: target.run(target.embed(tokens[:, :1]), one, cache, stop=exit_layer)
        if model.adapter is not None:
            adapter = model.adapter
            pieces["adapter"] = lambda: adapter(x, one, cache)
        head = target.logits if model.adapter is None else model.adapter.logits
        pieces["head"] = lambda: head(x if model.adapter else target.norm(x))
    for count in range(1, nodes + 1):
        pieces[f"verify {count}"] = deep(count, exit_layer)
    seconds = medians(pieces, target.device, repeats)
    return Costs(
        full_step=seconds["full"],
        shallow=seconds.get("shallow", 0.0),
        adapter=seconds.get("adapter", 0.0),
        head=seconds.get("head", 0.0),
        verify={count: seconds[f"verify {count}"] for count in range(1, nodes + 1)},
    )
