"""The thread of an engine: what it shares with those who ask, and what it counts."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kangaroo.errors import EngineClosed, QueueFull
from kangaroo.machine import trim_heap
from kangaroo.scheduler import Step, Task
from kangaroo.schedulers import Schedulers
from kangaroo.tickets import Job

RATE_SECONDS = 10.0
"""Over how long the rate of tokens is taken."""
TRIM_SECONDS = 30.0
"""How often the heap is trimmed: rounds of ever new shapes leave holes in it, hundreds of megabytes in an hour."""


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


class Worker:
    """The thread, and what it shares with callers. It holds no Engine, so that one that nobody holds can go."""

    def __init__(self, scheduler: Schedulers, queue: int):
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
        return self._waiting >= self._queue + max(0, self.scheduler.limits.rows - self._running)

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
            rows=scheduler.limits.rows,
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
        trimmed = time.perf_counter()
        try:
            while self._wait():
                self._step()
                if time.perf_counter() > trimmed + TRIM_SECONDS:
                    trim_heap()
                    trimmed = time.perf_counter()
        finally:
            self._break_off()

    def _step(self) -> None:
        try:
            step = self.scheduler.step()
        except Exception as error:  # whatever it is belongs to those whose requests it ends
            for task in self.scheduler.fail():
                self._end(task, error)
            return
        self._totals.add(step)
        for task, pieces in step.pieces:
            self._jobs[id(task)].write(pieces)
            if task.ended:
                self._end(task)

    def _break_off(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
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
