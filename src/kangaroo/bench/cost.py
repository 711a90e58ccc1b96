"""What the pieces of a round cost, timed alone, and how fast an acceptance trace could be at these costs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kangaroo.decode import PREFILL_CHUNK
from kangaroo.decoder import Decoder, synchronise
from kangaroo.drafters.draft_model import DraftModel
from kangaroo.drafters.kangaroo import Kangaroo
from kangaroo.drafters.kangaroo_lookup import KangarooLookup
from kangaroo.drafters.kangaroo_tree import KangarooTree
from kangaroo.drafters.medusa import Medusa, MedusaTree
from kangaroo.sampling import Sampler, Sampling
from kangaroo.state import Request, State
from kangaroo.tree import place_chain

SELF_DRAFTING = (Kangaroo, KangarooTree, KangarooLookup)
"""What drafts with the target's first layers."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Median seconds of each piece at batch 1."""

    full_step: float
    """All layers, norm and head on one token."""
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

    def bound(self, drafts: Sequence[int], emitted: int) -> float:
        """The speed-up that rounds with these draft lengths, emitting this many tokens, would have at these costs."""
        seconds = sum(
            (k + 1) * self.shallow + k * (self.adapter + self.head) + self.verify[min(k + 1, max(self.verify))]
            for k in drafts
        )
        return emitted * self.full_step / seconds if seconds else 0.0


@torch.inference_mode()
def measure_costs(decoder: Decoder, *, context: int = 128, nodes: int = 8, repeats: int = 30) -> Costs:
    """Time the pieces of the decoder's rounds after `context` tokens, interleaved, on its own weights and kernels."""
    target, drafter = decoder.target, decoder.make_drafter()
    context = min(context, target.context - nodes - 1, PREFILL_CHUNK)
    cache = target.new_cache(1, context + nodes + 1, drafter.cache_layers)
    sampler = Sampler([Sampling()], target.vocab_size, target.device)
    state = State([Request([1] * context, Sampling(), 1)], cache, sampler, ())
    state.lengths += context - 1
    state.longest = context - 1
    model = drafter.model if isinstance(drafter, SELF_DRAFTING) else None
    exit_layer = model.exit_layer if model else 0
    tokens = torch.ones(1, nodes, dtype=torch.int64, device=target.device)

    def deep(count: int, first: int) -> Callable[[], object]:
        where = place_chain(state.lengths, count, state.longest + count)
        x = target.embed(tokens[:, :count])
        return lambda: target.logits(target.norm(target.run(x, where, cache, start=first)[0]))

    one = place_chain(state.lengths, 1, state.longest + 1)
    x = target.embed(tokens[:, :1])
    pieces: dict[str, Callable[[], object]] = {"full": deep(1, 0)}
    if model is not None:
        pieces["shallow"] = lambda: model.states(tokens[:, :1], one, state)
        if model.adapter is not None:
            adapter = model.adapter
            pieces["adapter"] = lambda: adapter(x, one, cache)
        pieces["head"] = lambda: target.logits(x if model.adapter else target.norm(x))
    for count in range(1, nodes + 1):
        pieces[f"verify {count}"] = deep(count, exit_layer)
    seconds = _medians(pieces, target.device, repeats)
    return Costs(
        full_step=seconds["full"],
        shallow=seconds.get("shallow", 0.0),
        adapter=seconds.get("adapter", 0.0),
        head=seconds.get("head", 0.0),
        verify={count: seconds[f"verify {count}"] for count in range(1, nodes + 1)},
    )


def _medians(pieces: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for repeat in range(repeats + 3):
        for name, piece in pieces.items():
            synchronise(device)
            began = time.perf_counter()
            piece()
            synchronise(device)
            if repeat >= 3:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def describe(decoder: Decoder) -> dict[str, object]:
    """What `kangaroo info` shows: sizes, exit layer, precision and the cost of drafting."""
    target, drafter = decoder.target, decoder.make_drafter()
    parameters = sum(p.numel() for p in target.model.parameters())
    facts: dict[str, object] = {
        "family": target.config.model_type,
        "parameters": parameters,
        "layers": target.num_layers,
        "width": target.width,
        "vocabulary": target.vocab_size,
        "context": target.context,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "fingerprint": target.fingerprint,
    }
    if isinstance(drafter, SELF_DRAFTING):
        adapter = drafter.model.adapter
        facts["exit_layer"] = drafter.model.exit_layer
        facts["adapter_parameters"] = sum(p.numel() for p in adapter.parameters()) if adapter else 0
    if isinstance(drafter, Medusa | MedusaTree):
        facts["head_parameters"] = sum(p.numel() for p in drafter.heads.parameters())
    if isinstance(drafter, DraftModel):
        facts["draft_model_parameters"] = sum(p.numel() for p in drafter.model.model.parameters())
    return facts
