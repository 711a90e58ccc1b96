"""Chains by the self-draft model: its steps, what it has run, and the states that verification goes on from."""

from collections.abc import Callable

import torch
from torch import Tensor

from kangaroo.drafters.chain import Chain, draft_chain
from kangaroo.drafters.self_draft import SelfDraft
from kangaroo.drafters.stopping import Stopping
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Placement, place_chain


class SelfChain:
    """What a self-drafted chain needs from round to round: `grow`, then `finish`, then `observe`."""

    def __init__(self, model: SelfDraft, nodes: int):
        """`nodes` a draft may have, the pending token included."""
        self.model, self.nodes = model, nodes
        self._steps, self._hidden = 0, list[Tensor]()
        self._where: Placement | None = None

    def observe(self, state: State, committed: Committed) -> None:
        """Feed the adapter what it has not seen."""
        nodes = torch.arange(self.nodes, device=committed.tokens.device)
        self.model.observe(state, committed, (nodes < self._steps).expand(len(committed.tokens), -1))

    def grow(
        self,
        state: State,
        limits: Tensor,
        stopping: Stopping,
        replaced: Callable[[Tensor, int], Tensor] = lambda tokens, k: tokens,
    ) -> Chain:
        """Draft. `replaced` says which tokens [B, 1] stand at the k-th node in place of those drafted there."""
        where = self.model.target.prepare(place_chain(state.lengths, self.nodes, state.longest + self.nodes))
        self._where, self._hidden = where, []

        def step(tokens: Tensor, k: int) -> Tensor:
            here = where[k : k + 1]
            self._hidden.append(self.model.states(replaced(tokens, k), here, state))
            return self.model.logits(self._hidden[-1], here, state)

        drafted = draft_chain(state, limits, stopping, step, self.model.vocabulary)
        self._steps = drafted.steps
        return drafted

    def finish(self, state: State, drafted: Chain) -> Draft:
        """The draft, every node of it through the shallow layers: the first part of verifying those not yet run."""
        assert self._where is not None, "a chain is grown first"
        rest = self._where[self._steps : drafted.steps + 1]
        last = self.model.states(drafted.tokens[:, self._steps :], rest, state)
        return drafted.draft(hidden=torch.cat([*self._hidden, last], 1), layers_done=self.model.exit_layer)
