"""Tickets: what a caller holds of a request that a thread is answering, to read from and to give up.

Pieces are written by one thread and read by any other, or by a task of an asyncio event loop.
"""

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from kangaroo.completion import Completion, Piece, Stats, Transcript
from kangaroo.scheduler import Task
from kangaroo.state import Request

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Job:
    """A request as the thread sees it: its task, and the pieces that nobody has read yet."""

    def __init__(self, request: Request, transcript: Transcript, drafter: str, cancel: Callable[["Job"], None]):
        """`cancel` tells the thread that nobody wants the rest."""
        self.task, self.transcript, self._cancel = Task(request, transcript, drafter), transcript, cancel
        self.submitted = time.perf_counter()
        self.first: float | None = None
        """When its first piece came."""
        self._pieces: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._waiters: list[Waiter] = []
        self._closed = False
        self._error: BaseException | None = None

    def write(self, pieces: list[Piece]) -> None:
        """Let readers have some more."""
        with self._changed:
            if self.first is None and pieces:
                self.first = time.perf_counter()
            self._pieces.extend(pieces)
            self._wake()

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more will come: readers end, or raise the error, once they have read what there is."""
        with self._changed:
            if not self._closed:
                self._closed, self._error = True, error
                self._wake()

    def cancel(self) -> None:
        """Give it up, unless it has ended."""
        with self._changed:
            if self._closed:
                return
            self._pieces.clear()
        self.close()
        self._cancel(self)

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, future in self._waiters:
            with suppress(RuntimeError):  # the loop has been closed, and nobody waits there any more
                loop.call_soon_threadsafe(_settle, future)
        self._waiters.clear()

    def read(self) -> Piece | None:
        """The next piece, waited for; None at the end. Raises what has ended it."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._closed)
            return self._take()

    async def read_async(self) -> Piece | None:
        """The same without blocking the event loop."""
        while True:
            with self._changed:
                if self._pieces or self._closed:
                    return self._take()
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._waiters.append((loop, future))
            await future

    def _take(self) -> Piece | None:
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class Ticket:
    """One request under way: an iterator of its pieces, for `for` and `async for`, that can be cancelled.

    What ended the request early is raised by the iterator. A ticket that nobody holds any more is cancelled.
    """

    def __init__(self, job: Job):
        self._job = job
        weakref.finalize(self, job.cancel).atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        piece = self._job.read()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        piece = await self._job.read_async()
        if piece is None:
            raise StopAsyncIteration
        return piece

    def cancel(self) -> None:
        """Give the request up: its row is free within a round, and iteration ends."""
        self._job.cancel()

    @property
    def completion(self) -> Completion | None:
        """The whole answer, once it is written."""
        return self._job.transcript.completion

    @property
    def stats(self) -> Stats:
        """Counts and seconds so far."""
        return self._job.transcript.stats

    @property
    def queued_seconds(self) -> float:
        """How long it has waited for a row."""
        seated = self._job.task.seated
        return (time.perf_counter() if seated is None else seated) - self._job.submitted

    @property
    def first_token_seconds(self) -> float | None:
        """From its submission to its first token; None before that."""
        return None if self._job.first is None else self._job.first - self._job.submitted

    @property
    def speculation(self) -> str:
        """ "on", or why nothing is drafted for it now."""
        return self._job.task.speculation

    @property
    def drafter(self) -> str:
        """The name of what drafts for it."""
        return self._job.task.drafter

    @property
    def cached_prompt_tokens(self) -> int:
        """Tokens of its prompt that an earlier request had already run."""
        return self._job.task.cached
