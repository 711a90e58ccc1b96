"""Where the time of a round goes: a drafter and a target that are timed from outside, the loop untouched.

`Timed` adds up what a drafter takes to draft and to observe. `TimedTarget` adds up what the loop asks of the target, a
pass over the draft, its norm and its head: verification. What a drafter asks of the target goes to the target itself,
so it is counted as drafting alone. What a decoding time has beyond the two is the rest.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kangaroo.cache import KVCache
from kangaroo.drafters.base import Drafter
from kangaroo.machine import synchronise
from kangaroo.model import Target
from kangaroo.state import Committed, State
from kangaroo.tree import Draft, Placement


class Stopwatch:
    """Adds up the seconds between entering and leaving it, as the device spends them.

    On a GPU the two moments are events in its own stream, so that nobody waits for it before `seconds` is read; else a
    pair of host clock readings.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._seconds, self._began = 0.0, 0.0
        self._events: list[torch.cuda.Event] = []

    @property
    def seconds(self) -> float:
        """So far; waits for the device."""
        if not self._events:
            return self._seconds
        synchronise(self._device)
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        return float(sum(first.elapsed_time(last) for first, last in pairs)) / 1000

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            self._mark()
        else:
            self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._mark()
        else:
            self._seconds += time.perf_counter() - self._began

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)


class Timed:
    """A drafter whose time is taken."""

    def __init__(self, drafter: Drafter, device: torch.device):
        self._drafter, self.clock = drafter, Stopwatch(device)
        self.taps, self.nodes, self.cache_layers = drafter.taps, drafter.nodes, drafter.cache_layers

    def observe(self, state: State, committed: Committed) -> None:
        """As the drafter does."""
        with self.clock:
            self._drafter.observe(state, committed)

    def arrange(self, rows: Sequence[int]) -> None:
        """As the drafter does."""
        self._drafter.arrange(rows)

    def draft(self, state: State) -> Draft:
        """As the drafter does."""
        with self.clock:
            return self._drafter.draft(state)


class TimedTarget(Target):
    """A second view of a target, on the same weights and tables, whose time is taken."""

    def __init__(self, target: Target):
        # Everything a target is made of is shared; it is neither loaded nor checked again.
        self.__dict__.update(target.__dict__)
        self.clock = Stopwatch(target.device)

    def run(
        self,
        x: Tensor,
        where: Placement,
        cache: KVCache | None,
        *,
        start: int = 0,
        stop: int | None = None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As the target does."""
        with self.clock:
            return super().run(x, where, cache, start=start, stop=stop, taps=taps)

    def norm(self, x: Tensor) -> Tensor:
        """As the target does."""
        with self.clock:
            return super().norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """As the target does."""
        with self.clock:
            return super().logits(x)
