"""The self-draft model: the target's first layers, the adapter, the target's head (Liu et al. 2024, section 3.1).

The shallow layers write the target's own KV cache, so what they compute is the first part of verification. The
adapter's keys and values are one more layer of the same cache. After a round some accepted tokens may not have passed
through the adapter yet (the last draft of a fully accepted chain, the leaves of a tree); they ride along with the first
token of the next round.
"""

import torch
from torch import Tensor, nn

from kangaroo.adapter import Adapter
from kangaroo.cache import LayerShape
from kangaroo.drafters.settings import Settings, need_path
from kangaroo.model import Target, check_exit_layer
from kangaroo.state import Committed, State
from kangaroo.tree import Placement, pick, place_at


class SelfDraft:
    """q(x | prefix) = softmax(head(adapter(h_E))); without an adapter, the target's own norm stands in (early exit)."""

    def __init__(self, target: Target, adapter: Adapter | None, exit_layer: int):
        check_exit_layer(exit_layer, target)
        self.target, self.adapter, self.exit_layer = target, adapter, exit_layer
        self.taps = () if adapter is None else (exit_layer,)
        self.cache_layers: tuple[LayerShape, ...] = () if adapter is None else adapter.cache_layers
        self.vocabulary = None if adapter is None else adapter.vocabulary
        self._unseen: tuple[Tensor, Tensor] | None = None

    @property
    def weight_share(self) -> float:
        """Weights that one draft step reads, as a share of those a plain step reads."""
        layers = [_weights(layer) for layer in self.target.layers]
        head, drafting = _weights(self.target.head), sum(layers[: self.exit_layer])
        if self.adapter is not None:
            drafting += _weights(self.adapter)
        if self.vocabulary is not None:
            drafting += head * len(self.vocabulary.tokens) // self.target.vocab_size
        elif self.adapter is None or self.adapter.head is None:
            drafting += head
        return drafting / (sum(layers) + head)

    def states(self, tokens: Tensor, where: Placement, state: State) -> Tensor:
        """Run the shallow layers on tokens [B, N] -> [B, N, D]."""
        x, _ = self.target.run(self.target.embed(tokens), where, state.cache, stop=self.exit_layer)
        return x

    def logits(self, x: Tensor, where: Placement, state: State) -> Tensor:
        """Draft logits [B, N, V], [B, N, n] over a draft vocabulary, from the exit layer's states."""
        if self.adapter is None:
            return self.target.logits(self.target.norm(x))
        nodes = x.shape[1]
        if self._unseen is not None:
            states, positions = self._unseen
            x = torch.cat([states, x], 1)
            where = place_at(torch.cat([positions, where.positions], 1), where.mask.shape[-1])
            self._unseen = None
        y = self.adapter(x, where, state.cache)
        return self.adapter.logits(y[:, -nodes:])

    def observe(self, state: State, committed: Committed, ran: Tensor) -> None:
        """Prompt tokens pass through the adapter now; of a round's, those that are not marked in `ran` [B, N] wait."""
        if self.adapter is None:
            return
        x = committed.features[self.exit_layer]
        if committed.path is None:
            self._forget(committed.where.rows, state)
            self.adapter(x, committed.where, state.cache)
            return
        columns = torch.arange(committed.path.shape[1], device=x.device)
        done = pick(ran, committed.path) | (columns >= committed.count[:, None])
        first, last = int(done.long().cumprod(1).sum(1).min()), int(committed.count.max())
        # Columns some rows have seen already are run again in them, to the same effect.
        if first < last:
            self._unseen = x[:, first:last], committed.where.positions[:, first:last]

    def _forget(self, rows: Tensor | None, state: State) -> None:
        """What waits for the adapter belongs to requests that have left these rows (None: all)."""
        if self._unseen is None or rows is None:
            self._unseen = None
            return
        states, positions = self._unseen
        positions = positions.clone()
        positions[rows] = state.cache.slots - 1  # no row and no draft reaches the last slot
        self._unseen = states, positions


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_adapter(target: Target, settings: Settings) -> Adapter:
    """The adapter that the settings name. Raises ConfigError or AdapterError."""
    advice = "give the folder of one, train it with `kangaroo train`, or use drafter 'early-exit', which needs none"
    return Adapter.load(need_path(settings, "adapter", advice), target)


def choose_exit_layer(target: Target, settings: Settings) -> int:
    """The setting exit_layer, or an eighth of the layers. Raises ConfigError."""
    exit_layer = int(settings.get("exit_layer", max(1, target.num_layers // 8)))
    check_exit_layer(exit_layer, target)
    return exit_layer
