"""Autoregressive decoding through the same loop: the denominator of every speed-up."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kangaroo.cache import LayerShape
from kangaroo.drafters.settings import Settings, refuse_unknown
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Stop, chain


class NoDrafter:
    """Proposes nothing."""

    taps: tuple[int, ...] = ()
    nodes = 1
    cache_layers: tuple[LayerShape, ...] = ()

    def observe(self, state: State, committed: Committed) -> None:
        """Nothing to learn."""

    def arrange(self, rows: Sequence[int]) -> None:
        """Nothing to keep."""

    def draft(self, state: State) -> Draft:
        """The pending token alone."""
        return no_draft(state, (Stop.NOTHING,) * state.batch)


def no_draft(state: State, stops: tuple[Stop, ...]) -> Draft:
    """The pending tokens alone, no layer run."""
    tokens = state.pending
    return Draft(
        tokens=tokens,
        parents=chain(state.batch, 1, tokens.device),
        valid=torch.ones_like(tokens, dtype=torch.bool),
        depth=0,
        stops=stops,
    )


def build(target: Target, tokenizer: Any, settings: Settings) -> Callable[[], NoDrafter]:
    """It has no settings."""
    refuse_unknown(settings, ())
    return NoDrafter
