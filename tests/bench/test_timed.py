"""Timing from outside: phases add up exactly, on a clock that only moves when somebody works."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kangaroo.bench.drafted import Drafted
from kangaroo.bench.timed import Stopwatch, Timed, TimedTarget
from kangaroo.decoder import Decoder
from kangaroo.drafters.base import Drafter
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.state import Committed, State
from kangaroo.tree import Draft
from runs import DRAFTERS, PROMPTS, generate_ids
from tiny import target as make_target

OBSERVE, DRAFT, RUN, NORM, LOGITS = 1, 10, 100, 1000, 10000


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow:
    """A drafter whose calls take time."""

    def __init__(self, drafter: Drafter, clock: Clock):
        self._drafter, self._clock = drafter, clock
        self.taps, self.nodes, self.cache_layers = drafter.taps, drafter.nodes, drafter.cache_layers

    def observe(self, state: State, committed: Committed) -> None:
        self._clock.now += OBSERVE
        self._drafter.observe(state, committed)

    def arrange(self, rows: Sequence[int]) -> None:
        self._drafter.arrange(rows)

    def draft(self, state: State) -> Draft:
        self._clock.now += DRAFT
        return self._drafter.draft(state)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def slow_down(target: Target, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loop's own requests take time, and not those of drafters, which ask the target itself."""
    for name, cost in (("run", RUN), ("norm", NORM), ("logits", LOGITS)):
        real = getattr(Target, name)

        def slow(self: Target, *a: Any, real: Any = real, cost: int = cost, **k: Any) -> Any:
            clock.now += cost if isinstance(self, TimedTarget) else 0
            return real(self, *a, **k)

        monkeypatch.setattr(Target, name, slow)


def answer(target: Target, name: str, clock: Clock, prompts: Sequence[Sequence[int]], tokens: int) -> Any:
    decoder = Decoder(target, lambda: Slow(DRAFTERS[name](target), clock), None, (0,))  # type: ignore[arg-type]
    return Drafted(decoder).answer(prompts, Sampling(), tokens)


@pytest.mark.parametrize("name", ["none", "kangaroo", "early-exit-tree"])
def test_phases_add_up_exactly(name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("llama")
    slow_down(target, clock, monkeypatch)
    (found,) = answer(target, name, clock, PROMPTS[:1], 24)
    rounds = len(found.emitted)
    assert found.draft == rounds * (DRAFT + OBSERVE)
    assert found.verify == rounds * (RUN + NORM + LOGITS)
    assert (found.prefill, found.rest) == (RUN + OBSERVE, 0)
    assert found.prefill + found.draft + found.verify + found.rest == clock.now


def test_rows_of_a_batch_share_its_seconds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("llama")
    slow_down(target, clock, monkeypatch)
    found = answer(target, "kangaroo", clock, PROMPTS, 12)
    assert len(found) == len(PROMPTS)
    assert sum(f.prefill + f.draft + f.verify + f.rest for f in found) == pytest.approx(clock.now)
    assert len({f.verify for f in found}) == 1


@pytest.mark.parametrize("name", ["none", "kangaroo", "kangaroo-tree"])
def test_what_is_timed_does_the_same_as_what_is_not(name: str) -> None:
    target = make_target("llama")
    wanted = generate_ids(target, DRAFTERS[name](target), PROMPTS, Sampling(), max_tokens=20, eos=(3,))
    decoder = Decoder(target, lambda: DRAFTERS[name](target), None, (3,))  # type: ignore[arg-type]
    found = Drafted(decoder).answer(PROMPTS, Sampling(), 20)
    assert [f.tokens for f in found] == wanted
    for row in found:
        assert sum(row.emitted) == len(row.tokens)
        assert len(row.emitted) == len(row.drafted) == len(row.stops)
        assert row.finish_reason == ("stop" if row.tokens[-1] == 3 else "length")
        assert all(emitted <= drafted + 1 for emitted, drafted in zip(row.emitted, row.drafted, strict=True))
    assert (name == "none") == (sum(map(sum, (row.drafted for row in found))) == 0)


def test_a_stopwatch_adds_up_and_forgets(clock: Clock) -> None:
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (2, 3):
        with watch:
            clock.now += seconds
        clock.now += 7
    assert watch.seconds == 5
    watch.reset()
    assert watch.seconds == 0


@pytest.mark.gpu
def test_a_stopwatch_measures_the_device_not_the_host() -> None:
    device = torch.device("cuda")
    watch, x = Stopwatch(device), torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        with watch:
            x = (x @ x).clamp(-1, 1)
    launched = time.perf_counter() - began
    seconds = watch.seconds
    waited = time.perf_counter() - began
    assert launched < seconds <= waited * 1.01


def test_a_timed_drafter_is_a_drafter() -> None:
    drafter: Drafter = Timed(DRAFTERS["kangaroo"](make_target("llama")), torch.device("cpu"))
    assert drafter.nodes > 1
    assert drafter.taps
