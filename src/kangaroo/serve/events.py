"""Answers under way: pieces of several tickets as they come, server-sent events, and clients that leave."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kangaroo.completion import Piece
from kangaroo.tickets import Ticket

KEEP_ALIVE = 10.0
"""Seconds without a piece after which a stream carries a comment, so that nobody between takes it for dead."""
STALLED = 60.0
"""Seconds in which a client must take what was sent, or it is taken for gone."""
COMMENT = ": waiting\n\n"
DONE = "data: [DONE]\n\n"

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection."""


async def merged(tickets: Sequence[Ticket], patience: float) -> AsyncGenerator[tuple[int, Piece] | None, None]:
    """(place of the ticket, its next piece) as they come; None whenever nothing has come for `patience` seconds.

    Raises what a ticket raises. However it ends, the tickets that are not finished are cancelled.
    """
    iterators = [aiter(ticket) for ticket in tickets]
    waiting = {asyncio.create_task(_advance(iterators[place])): place for place in range(len(tickets))}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield None
            for task in sorted(done, key=waiting.__getitem__):
                place, piece = waiting.pop(task), task.result()
                if piece is not None:
                    waiting[asyncio.create_task(_advance(iterators[place]))] = place
                    yield place, piece
    finally:
        cancel(tickets)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _advance(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


def cancel(tickets: Sequence[Ticket]) -> None:
    """Free the rows of the tickets that are not finished."""
    for ticket in tickets:
        if ticket.completion is None:
            ticket.cancel()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` comes to; cancels it and raises ClientGone if the client leaves first. The body has been read."""
    task, leaving = asyncio.create_task(work), asyncio.create_task(_leaves(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. A client that leaves, or does not read, ends them; one that reads slowly slows them down."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str] | None = None):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        with suppress(ClientGone, TimeoutError):
            await unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                async with asyncio.timeout(STALLED):
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
