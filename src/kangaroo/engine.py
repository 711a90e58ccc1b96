"""An engine: a scheduler in a thread of its own, for requests that come as they please."""

import math
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from kangaroo.arguments import Arguments, encode_all
from kangaroo.checks import need_whole
from kangaroo.completion import Completion, Piece, Transcript
from kangaroo.constraints import Processor
from kangaroo.decode import check_request
from kangaroo.drafters.base import Drafter
from kangaroo.errors import CapacityError, ConfigError, EngineClosed, QueueFull
from kangaroo.forced import forcing
from kangaroo.logprobs import Logprobs
from kangaroo.machine import available_bytes
from kangaroo.model import Target
from kangaroo.sampling import Sampling
from kangaroo.scheduler import Scheduler, Step, Task
from kangaroo.text import Prompt, Tokenizer
from kangaroo.tickets import Job, Ticket

RATE_SECONDS = 10.0
"""Over how long the rate of tokens is taken."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine is doing, and all it has done."""

    running: int
    """Requests that have a row."""
    waiting: int
    """Requests that wait for one."""
    rows: int
    """Requests that can run at once."""
    tokens_per_second: float
    """Of all requests, over the last ten seconds."""
    drafting: bool
    """Whether drafts pay at present."""
    requests: int = 0
    """Requests that have ended, one way or another."""
    prompt_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    accepted_per_position: tuple[int, ...] = ()
    """How often the first, second, ... token of a draft was accepted."""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    stops: Mapping[str, int] = field(default_factory=dict)
    """How often drafting stopped for each reason, rows counted one by one."""
    prefix_hits_tokens: int = 0
    """Prompt tokens that an earlier request had already run."""


class _Totals:
    """What is counted over the life of an engine, by its thread, for any other to read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.positions: list[int] = []
        self.stops: Counter[str] = Counter()
        self.draft_seconds = self.verify_seconds = 0.0
        self._latest: deque[tuple[float, int]] = deque()

    def add(self, step: Step) -> None:
        """Count a step."""
        if step.done is None:
            return
        with self._lock:
            emitted = 0
            for row, (_, pieces) in zip(step.rows, step.pieces, strict=True):
                accepted = sum(piece.drafted for piece in pieces)
                self.positions += [0] * (accepted - len(self.positions))
                for place in range(accepted):
                    self.positions[place] += 1
                emitted += len(pieces)
                self.stops[step.done.stops[row].value] += 1
                self.counts.update(drafted=step.done.drafted[row], accepted=accepted, emitted=len(pieces))
            self.counts["rounds"] += len(step.rows)
            self.draft_seconds += step.done.draft_seconds
            self.verify_seconds += step.done.verify_seconds
            self._latest.append((time.perf_counter(), emitted))
            while self._latest[0][0] < self._latest[-1][0] - RATE_SECONDS:
                self._latest.popleft()

    def ended(self, task: Task) -> None:
        """Count a task that is over."""
        with self._lock:
            prompt = len(task.request.prompt) if task.seated is not None else 0
            self.counts.update(requests=1, prompt_tokens=prompt, prefix_hits_tokens=task.cached)

    def rate(self) -> float:
        """Tokens per second of late."""
        since = time.perf_counter() - RATE_SECONDS
        with self._lock:
            return sum(emitted for at, emitted in self._latest if at >= since) / RATE_SECONDS

    def report(self) -> dict[str, Any]:
        """As fields of a status."""
        rate = self.rate()
        with self._lock:
            return {
                "tokens_per_second": rate,
                "accepted_per_position": tuple(self.positions),
                "draft_seconds": self.draft_seconds,
                "verify_seconds": self.verify_seconds,
                "stops": dict(self.stops),
                **self.counts,
            }


class _Worker:
    """The thread, and what it shares with callers. It holds no Engine, so that one that nobody holds can go."""

    def __init__(self, scheduler: Scheduler, queue: int):
        self.scheduler, self._queue, self._totals = scheduler, queue, _Totals()
        self._jobs: dict[int, Job] = {}
        """Those under way, by the id of their task."""
        self._new: deque[Job] = deque()
        self._gone: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = self._broken_off = False
        self._running = 0
        self.thread = threading.Thread(target=self._run, name="kangaroo-engine", daemon=True)
        self.thread.start()

    def submit(self, job: Job, *, patient: bool) -> None:
        """Have the thread answer it. Raises EngineClosed; and QueueFull, unless it is `patient`."""
        with self._changed:
            if patient:
                self._changed.wait_for(lambda: self._closing or not self._full)
            if self._closing:
                raise EngineClosed("this engine is closed and takes no more requests; make another")
            if self._full:
                seconds = self._retry_after()
                raise QueueFull(f"{self._waiting} requests are waiting already; try again in {seconds:.0f} s", seconds)
            self._new.append(job)
            self._changed.notify_all()

    @property
    def _waiting(self) -> int:
        return len(self._new) + self.scheduler.waiting

    @property
    def _full(self) -> bool:
        return self._waiting >= self._queue + max(0, self.scheduler.rows - self._running)

    def _retry_after(self) -> float:
        """Seconds until a row may have come free, at the present rate."""
        rate, jobs = self._totals.rate(), list(self._jobs.values())
        left = sum(job.task.request.max_tokens for job in jobs) / max(1, len(jobs))
        return float(min(60, max(1, math.ceil(left / rate)))) if rate else 1.0

    def cancel(self, job: Job) -> None:
        """Take a job out within a round."""
        # The garbage collector may call this, in any thread at any point: it must not wait.
        self._gone.append(job)

    def status(self) -> EngineStatus:
        """As of the latest round."""
        scheduler = self.scheduler
        return EngineStatus(
            running=self._running,
            waiting=self._waiting,
            rows=scheduler.rows,
            drafting=scheduler.drafting,
            **self._totals.report(),
        )

    def close(self, drain: float | None) -> None:
        """Wait for what is under way, `drain` seconds at most, break the rest off, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is self.thread:  # as the garbage collector may
            return
        self.thread.join(drain)
        self._broken_off = True
        self.thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                step = self.scheduler.step()
            except Exception as error:  # whatever it is belongs to those whose requests it ends
                for task in self.scheduler.fail():
                    self._end(task, error)
                continue
            self._totals.add(step)
            for task, pieces in step.pieces:
                self._jobs[id(task)].write(pieces)
                if task.ended:
                    self._end(task)
        for job in [*self._new, *self._jobs.values()]:
            job.close(EngineClosed("the engine was closed before the answer was finished"))

    def _wait(self) -> bool:
        """Wait for something to do, and take what has come; False to end."""
        with self._changed:
            self._running = self.scheduler.running
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.scheduler.busy or self._new or self._closing)
            while self._new:
                job = self._new.popleft()
                self._jobs[id(job.task)] = job
                self.scheduler.submit(job.task)
        while self._gone:
            job = self._gone.popleft()
            if id(job.task) in self._jobs:
                self.scheduler.cancel(job.task)
                self._end(job.task)
        return not self._broken_off and (self.scheduler.busy or not self._closing)

    def _end(self, task: Task, error: BaseException | None = None) -> None:
        job = self._jobs.pop(id(task))
        self._totals.ended(task)
        job.close(error)


class Answering(Protocol):
    """What an engine needs of a Decoder, under the same names."""

    target: Target
    make_drafter: Callable[[], Drafter]
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    drafter: str
    """What is drafted with, in words."""


class Engine:
    """Answers requests as they come, many at once, each with the text it would get alone.

    It has a thread of its own, and is used from any number of others. Leaving its `with` block closes it.
    """

    def __init__(
        self,
        decoder: Answering,
        *,
        rows: int = 16,
        queue: int = 256,
        capacity: int | None = None,
        prefix_tokens: int = 4096,
    ):
        """`rows` requests run at once, and `queue` more may wait. `capacity` is how many tokens each may have, prompt
        included: by default the context, or what half of the memory that is left holds. Of prompts that have been run,
        `prefix_tokens` tokens are kept for later ones that begin alike.

        Raises ConfigError, or CapacityError if the rows would not fit in memory.
        """
        for name, value, least in (("rows", rows, 1), ("queue", queue, 0), ("prefix_tokens", prefix_tokens, 0)):
            if need_whole(name, value) < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        self.decoder, self._encoding = decoder, threading.Lock()
        target = decoder.target
        make_drafter = forcing(decoder.make_drafter, target)
        capacity = _capacity(target, make_drafter(), rows, capacity)
        scheduler = Scheduler(
            target, make_drafter, decoder.eos, rows=rows, capacity=capacity, prefix_tokens=prefix_tokens
        )
        self.capacity = capacity
        self._worker = _Worker(scheduler, queue)
        weakref.finalize(self, self._worker.close, 0.0)

    def submit(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int = 256,
        min_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        logprobs: Logprobs | int | None = None,
        processor: Processor | None = None,
        speculate: bool = True,
    ) -> Ticket:
        """Have a prompt answered; without `speculate` nothing is drafted for it, which changes nothing in the text.

        Raises ConfigError or DataError for the arguments, CapacityError for a request longer than a row, QueueFull if
        too many wait already, EngineClosed.
        """
        arguments = Arguments(
            sampling=sampling,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            processor=processor,
            speculate=speculate,
        )
        (ticket,) = self._submit([prompt], arguments, patient=False)
        return ticket

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, in any thread. Raises DataError for what is none."""
        with self._encoding:  # tokenizers are not made for several threads
            return self.decoder.tokenizer.encode(prompt)

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[Piece]:
        """The pieces of one answer, as `submit` takes it. Leaving the iteration early cancels the request."""
        ticket = self.submit(prompt, **options)
        try:
            async for piece in ticket:
                yield piece
        finally:
            ticket.cancel()

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
        """Answer a list of prompts as Decoder.generate does, beside whatever else is running. Waits for the queue."""
        tickets = self._submit(prompts, Arguments(**options), patient=True)
        for ticket in tickets:
            for _ in ticket:
                pass
        return [ticket.completion for ticket in tickets if ticket.completion is not None]

    def _submit(self, prompts: Sequence[Prompt], arguments: Arguments, *, patient: bool) -> list[Ticket]:
        decoder = self.decoder
        with self._encoding:
            tokens = encode_all(prompts, decoder.tokenizer)
        requests = [check_request(request, decoder.target, decoder.eos) for request in arguments.requests(tokens)]
        texts, tickets = arguments.texts(decoder.tokenizer, len(requests)), list[Ticket]()
        for request, text in zip(requests, texts, strict=True):
            task = Task(request, Transcript(request, request.ends(decoder.eos), text, 0))
            self._worker.scheduler.check(task)
            job = Job(task, self._worker.cancel)
            self._worker.submit(job, patient=patient)
            tickets.append(Ticket(job))
        return tickets

    def status(self) -> EngineStatus:
        """What it is doing, and has done so far."""
        return self._worker.status()

    def close(self, drain: float | None = None) -> None:
        """Take no more requests, finish those there are within `drain` seconds, break off the rest.

        None waits for all of them. A request broken off raises EngineClosed where it is read. Closing twice is fine.
        """
        self._worker.close(drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else 0.0)


def _capacity(target: Target, drafter: Drafter, rows: int, asked: int | None) -> int:
    """Tokens a row may have: as asked for, or as many as the context and half of the memory hold."""
    if asked is not None and not 2 <= need_whole("capacity", asked) <= target.context:
        raise ConfigError(f"capacity must be in 2..{target.context}, which is the context, got {asked}")
    shapes = [*target.shapes, *drafter.cache_layers]
    fits = min(
        available_bytes(device) // (rows * sum(s.bytes_per_slot for s in shapes if s.device == device))
        for device in {shape.device for shape in shapes}
    )
    if (asked or 2) > fits:
        raise CapacityError(
            f"{rows} rows of {asked or 2} tokens do not fit in memory, of {fits} they would; use fewer rows or a "
            "smaller capacity"
        )
    return asked or min(target.context, max(2, fits // 2))
