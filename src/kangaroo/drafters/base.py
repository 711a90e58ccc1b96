"""What every drafter is."""

from collections.abc import Sequence
from typing import Protocol

from kangaroo.cache import LayerShape
from kangaroo.state import Committed, State
from kangaroo.tree import Draft


class Drafter(Protocol):
    """Proposes tokens for the target to verify. One object serves one State; weights it uses are shared.

    A drafter may run the target's first layers and write past `State.lengths` in the shared cache: whatever is not
    accepted stays invisible.
    """

    @property
    def taps(self) -> tuple[int, ...]:
        """Layer counts after which it wants to see the target's states."""
        ...

    @property
    def nodes(self) -> int:
        """The most nodes a draft of its can have, the pending token included."""
        ...

    @property
    def cache_layers(self) -> tuple[LayerShape, ...]:
        """Layers it adds to the KV cache, behind the target's own."""
        ...

    def observe(self, state: State, committed: Committed) -> None:
        """These tokens have joined their rows: of prompts and of rounds alike, in order."""
        ...

    def arrange(self, rows: Sequence[int]) -> None:
        """From now on row i is the one that was rows[i]; -1: a new one, whose prompt will be observed."""
        ...

    def draft(self, state: State) -> Draft:
        """Propose a continuation of every active row."""
        ...
