"""An engine behind a server: it loads while the server listens already, takes requests, and drains."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from kangaroo.arguments import spread
from kangaroo.engine import Engine
from kangaroo.errors import EngineClosed, KangarooError, QueueFull
from kangaroo.serve.events import cancel
from kangaroo.serve.protocol import Call
from kangaroo.serve.refusals import Refusal, refused
from kangaroo.tickets import Ticket
from kangaroo.worker import EngineStatus

State = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class Answers:
    """The tickets of one request, prompt by prompt, and how many tokens every prompt has."""

    tickets: list[Ticket]
    prompt_tokens: list[int]


class Service:
    """What the routes ask. Made without an engine, which `start` has made in a thread of its own."""

    def __init__(self, load: Callable[[], Engine], name: str):
        """`load` makes the engine, `name` is what clients call the model."""
        self.name = name
        self._load, self._draining = load, False
        self._loader = ThreadPoolExecutor(1, "kangaroo-load")
        self._loaded: asyncio.Future[Engine] | None = None

    def start(self) -> "asyncio.Future[Engine]":
        """Begin to load; returns what will hold the engine, or what went wrong. For an event loop's thread."""
        if self._loaded is None:
            self._loaded = asyncio.get_running_loop().run_in_executor(self._loader, self._load)
            self._loader.shutdown(wait=False)
        return self._loaded

    @property
    def state(self) -> State:
        """What it is doing."""
        if self._draining:
            return "draining"
        if self._loaded is None or not self._loaded.done():
            return "loading"
        return "failed" if self._there() is None else "ready"

    @property
    def engine(self) -> Engine:
        """The engine. Raises Refusal while there is none to ask."""
        state, engine = self.state, self._there()
        if state != "ready" or engine is None:
            raise Refusal(503, _EXCUSES[state], code=state, retry=5 if state == "loading" else None)
        return engine

    def status(self) -> EngineStatus | None:
        """The engine's counts, while it has any."""
        return None if (engine := self._there()) is None else engine.status()

    async def submit(self, call: Call, fields: Mapping[str, str]) -> Answers:
        """The request's tickets; `fields` are those that settings are given in, for errors to name one.

        Raises Refusal for what cannot be answered, or not now.
        """
        # Tokenising takes long for long prompts: elsewhere, and to the end even if the client has left.
        work = asyncio.get_running_loop().run_in_executor(None, _submit, self.engine, call)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_forget)
            raise
        except QueueFull as error:
            raise Refusal(429, str(error), code="queue_full", retry=error.retry_after) from None
        except EngineClosed:
            raise Refusal(503, _EXCUSES["draining"], code="draining") from None
        except KangarooError as error:
            raise refused(error, fields) from None

    async def drain(self, seconds: float) -> None:
        """Take nothing new, finish what is under way within so many seconds, abort the rest."""
        self._draining = True
        if (engine := self._there()) is not None:
            await asyncio.to_thread(engine.close, seconds)

    def _there(self) -> Engine | None:
        loaded = self._loaded
        if loaded is None or not loaded.done() or loaded.cancelled() or loaded.exception() is not None:
            return None
        return loaded.result()


_EXCUSES: dict[State, str] = {
    "loading": "the model is being loaded: try again in a moment",
    "draining": "the server is shutting down",
    "failed": "the model could not be loaded",
}


def _forget(work: "asyncio.Future[Answers]") -> None:
    if not work.cancelled() and work.exception() is None:
        cancel(work.result().tickets)


def _submit(engine: Engine, call: Call) -> Answers:
    """In a thread: prompts to tokens, requests to the engine; all of them or none."""
    tickets, prompts = list[Ticket](), [engine.encode(prompt) for prompt in call.prompts]
    for prompt in prompts:
        if len(prompt) >= engine.capacity:
            raise Refusal(
                400,
                f"the prompt has {len(prompt)} tokens, but the context holds {engine.capacity}",
                code="context_length_exceeded",
            )
    own = call.arguments | {"processor": call.processor(engine.decoder.tokenizer, engine.decoder.eos)}
    groups = spread([tuple(prompt) for prompt in prompts], [call.sampling] * len(prompts), call.n)
    with contextlib.ExitStack() as undo:
        undo.callback(cancel, tickets)
        for prompt, group in zip(prompts, groups, strict=True):
            room = engine.capacity - len(prompt)
            limit = room if call.limit is None else min(call.limit, room)
            for sampling in group:
                tickets.append(engine.submit(prompt, sampling=sampling, max_tokens=limit, **own))
        undo.pop_all()
    return Answers(tickets, [len(prompt) for prompt in prompts])
