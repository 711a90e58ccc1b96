"""An engine that does as it is told: waits, fails, or is full at the moment a test says."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from kangaroo.completion import Completion, Piece, Stats
from kangaroo.engine import choose
from kangaroo.errors import EngineClosed

Script = Sequence[str | float | Exception]
"""Texts of pieces, seconds to wait before the next, or what is raised in its place."""


class ScriptedTicket:
    """A ticket that follows a script."""

    def __init__(self, script: Script, drafter: str):
        self._script: Iterator[str | float | Exception] = iter(script)
        self._texts = [each for each in script if isinstance(each, str)]
        self._index, self._cancelled = 0, asyncio.Event()
        self.completion: Completion | None = None
        self.stats, self.speculation, self.cached_prompt_tokens = Stats(), "on", 0
        self.drafter = drafter
        self.cancelled_at: float | None = None

    def cancel(self) -> None:
        self.cancelled_at = time.monotonic()
        self._cancelled.set()

    def __aiter__(self) -> "ScriptedTicket":
        return self

    async def __anext__(self) -> Piece:
        for each in self._script:
            if self._cancelled.is_set():
                raise StopAsyncIteration
            if isinstance(each, Exception):
                raise each
            if isinstance(each, str):
                return self._piece(each)
            await asyncio.wait({asyncio.ensure_future(self._cancelled.wait())}, timeout=each)
        raise StopAsyncIteration

    def _piece(self, text: str) -> Piece:
        self._index += 1
        last = self._index == len(self._texts)
        piece = Piece(text, self._index, self._index - 1, False, finish_reason="length" if last else None)
        self.stats.add([piece], 0)
        if last:
            count = len(self._texts)
            tokens = list(range(1, count + 1))
            self.completion = Completion("".join(self._texts), tokens, [False] * count, "length", None, 1, self.stats)
        return piece


class ScriptedEngine:
    """An engine whose tickets follow `script`."""

    def __init__(self, script: Script | Callable[[], Script]):
        self.script = script
        self.tickets: list[ScriptedTicket] = []
        self.capacity = 100
        self.decoder = SimpleNamespace(
            tokenizer=SimpleNamespace(backend=None),
            target=SimpleNamespace(fingerprint="a-b-c"),
            eos=(0,),
        )
        self.drafters = {"scripted": "scripted", "other": "other, max_draft=3"}
        self.closed = False

    def submit(self, prompt: Any, **arguments: Any) -> ScriptedTicket:
        if self.closed:
            raise EngineClosed("closed")
        script = self.script() if callable(self.script) else self.script
        self.tickets.append(ScriptedTicket(script, choose([*self.drafters], arguments["drafter"])))
        return self.tickets[-1]

    def encode(self, prompt: Any) -> list[int]:
        return [1]

    def status(self) -> None:
        return None

    def close(self, drain: float | None = None) -> None:
        self.closed = True
