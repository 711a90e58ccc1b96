"""The self-draft model (the target's first layers, the adapter, the target's head), and chains drafted by it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kangaroo import demo
from kangaroo.cache import LayerShape
from kangaroo.checks import need_whole
from kangaroo.drafters.chain import Chain, Stopping, draft_chain
from kangaroo.drafters.kangaroo.adapter import Adapter
from kangaroo.drafters.settings import Settings, allows_relatives, need_path
from kangaroo.linears import count_weights
from kangaroo.model import Target, check_exit_layer
from kangaroo.state import Committed, State, arranged
from kangaroo.tree import Draft, Placement, place_at

MOST_UNSEEN = 256
"""Tokens that wait for the adapter at most, while nothing is drafted: most rows end before it has to run for them."""


class SelfDraft:
    """q(x | prefix) = softmax(head(adapter(h_E))); without an adapter, the target's own norm stands in (early exit)."""

    def __init__(self, target: Target, adapter: Adapter | None, exit_layer: int):
        check_exit_layer(exit_layer, target)
        self.target, self.adapter, self.exit_layer = target, adapter, exit_layer
        self.taps = () if adapter is None else (exit_layer,)
        self.cache_layers: tuple[LayerShape, ...] = () if adapter is None else adapter.cache_layers
        self.vocabulary = None if adapter is None else adapter.vocabulary
        self._unseen: list[tuple[Tensor, Tensor]] = []
        """States [B, N, D] that wait for the adapter, and their positions [B, N]."""
        self._contiguous = True
        """Whether those are the last tokens of one row, each once: rows that grow unequally hold repeated columns."""

    @property
    def weight_share(self) -> float:
        """Weights that one draft step reads, as a share of those a plain step reads."""
        layers = [count_weights(layer) for layer in self.target.layers]
        head, drafting = count_weights(self.target.head), sum(layers[: self.exit_layer])
        if self.adapter is not None:
            drafting += count_weights(self.adapter)
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
        if self._unseen:
            states, positions = self._take_unseen()
            x = torch.cat([states, x], 1)
            start = where.start - states.shape[1] if where.start is not None and self._contiguous else None
            where = place_at(torch.cat([positions, where.positions], 1), where.mask.shape[-1], start=start)
        y = self.adapter(x, where, state.cache)
        return self.adapter.logits(y[:, -nodes:])

    def observe(self, state: State, committed: Committed, ran: int) -> None:
        """Prompt tokens pass through the adapter now; of a round's, those past the draft's first `ran` levels wait."""
        if self.adapter is None:
            return
        x = committed.features[self.exit_layer]
        if committed.path is None:
            self._forget(committed.where.rows, state)
            self.adapter(x, committed.where, state.cache)
            return
        last = max(map(len, committed.text))
        # Columns past a shorter row's last repeat it: run again there, to the same effect.
        if ran < last:
            # A round that drafted nothing has left what waited before it waiting still.
            self._contiguous = state.batch == 1 and (not self._unseen or self._contiguous)
            self._unseen.append((x[:, ran:last], committed.where.positions[:, ran:last]))
            if sum(states.shape[1] for states, _ in self._unseen) >= MOST_UNSEEN:
                states, positions = self._take_unseen()
                self.adapter(states, place_at(positions, state.longest + 1), state.cache)

    def _take_unseen(self) -> tuple[Tensor, Tensor]:
        """What waits for the adapter, which will wait no longer."""
        states, positions = zip(*self._unseen, strict=True)
        self._unseen = []
        return torch.cat(states, 1), torch.cat(positions, 1)

    def _forget(self, rows: Tensor | None, state: State) -> None:
        """What waits for the adapter belongs to requests that have left these rows (None: all)."""
        if not self._unseen or rows is None or len(rows) == state.batch:
            self._unseen = []
            return
        states, positions = self._take_unseen()
        positions[rows] = state.cache.slots - 1  # no row and no draft reaches the last slot
        self._unseen = [(states, positions)]

    def arrange(self, rows: Sequence[int]) -> None:
        """What waits for the adapter stays with its row; for a new row that is its first token, which will come."""
        if self._unseen:
            states, positions = self._take_unseen()
            self._unseen = [(arranged(states, rows), arranged(positions, rows))]
            self._contiguous = False  # a row that is alone now may not have been so


ADAPTER_SETTINGS = ("adapter", "allow_other_target")
"""The settings that `load_adapter` reads."""


def load_adapter(target: Target, settings: Settings) -> Adapter:
    """The adapter that the settings name. Raises ConfigError or AdapterError."""
    advice = "give the folder of one, train it with `kangaroo train`, or use drafter 'early-exit', which needs none"
    relative = allows_relatives(settings)
    folder = demo.find_adapter(need_path(settings, "adapter", advice))
    adapter = Adapter.load(folder, target, allow_other_target=relative)
    adapter.prepare()
    return adapter


def choose_exit_layer(target: Target, settings: Settings) -> int:
    """The setting exit_layer, or an eighth of the layers. Raises ConfigError."""
    exit_layer = need_whole("exit_layer", settings.get("exit_layer", max(1, target.num_layers // 8)))
    check_exit_layer(exit_layer, target)
    return exit_layer


class SelfChain:
    """What a self-drafted chain needs from round to round: `grow`, then `finish`, then `observe`."""

    def __init__(self, model: SelfDraft, nodes: int):
        """`nodes` a draft may have, the pending token included."""
        self.model, self.nodes = model, nodes
        self._steps, self._hidden = 0, list[Tensor]()
        self._where: Placement | None = None

    def observe(self, state: State, committed: Committed) -> None:
        """Feed the adapter what it has not seen."""
        self.model.observe(state, committed, self._steps)

    def grow(
        self,
        state: State,
        limits: Sequence[int],
        stopping: Stopping,
        replaced: Callable[[Tensor, int], Tensor] = lambda tokens, k: tokens,
    ) -> Chain:
        """Draft. `replaced` says which tokens [B, 1] stand at the k-th node in place of those drafted there."""
        nodes = min(self.nodes, max(state.draft_rooms) + 1)
        where = self.model.target.prepare(state.place(nodes))
        self._where, self._hidden = where, []

        def step(tokens: Tensor, k: int) -> Tensor:
            here = where[k : k + 1]
            self._hidden.append(self.model.states(replaced(tokens, k), here, state))
            return self.model.logits(self._hidden[-1], here, state)

        drafted = draft_chain(state, limits, stopping, step, self.model.vocabulary)
        self._steps = drafted.steps
        return drafted

    def finish(self, state: State, drafted: Chain) -> Draft:
        """The draft, every node of it through the shallow layers: the first part of verifying those not yet run.

        Where there is no draft nothing is run: plain decoding costs no more than it does by itself.
        """
        assert self._where is not None, "a chain is grown first"
        where = self._where[: drafted.steps + 1]
        if drafted.steps == self._steps == 0:
            return drafted.draft(where=where)
        last = self.model.states(drafted.tokens[:, self._steps :], where[self._steps :], state)
        hidden = torch.cat([*self._hidden, last], 1)
        return drafted.draft(hidden=hidden, layers_done=self.model.exit_layer, where=where)
