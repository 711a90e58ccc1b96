"""Many requests through one loop: rows that come, go and move between rounds, prompts read in pieces meanwhile.

A round costs what its rows cost: those that have finished leave, and the last take their places. A prompt is read one
piece a round, so that rows already answering keep their pace. No threads here: `engine` has one.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from kangaroo.cache import round_up
from kangaroo.completion import Piece, Stats
from kangaroo.decode import PREFILL_CHUNK, Round, allocate, prefill_chunk, step
from kangaroo.drafters.base import Drafter
from kangaroo.errors import CapacityError
from kangaroo.load import Load
from kangaroo.machine import synchronise
from kangaroo.model import Target
from kangaroo.passes import PROMPT_ROWS as BLOCK
from kangaroo.prefixes import PrefixStore
from kangaroo.state import Request, State

ASKED_NOT_TO, UNPROFITABLE, NO_DRAFTER = "asked not to", "drafts do not pay at this load", "no drafter"
"""Why nothing is drafted."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a scheduler takes on."""

    rows: int
    """Tasks that run at once."""
    capacity: int | None = None
    """Tokens that a task may have, prompt included; None: as many as fit in memory."""
    prefix_tokens: int = 0
    """Tokens of prompts that have been run, kept for later ones that begin alike."""

    def check(self, request: Request) -> None:
        """Raise CapacityError for a request that is longer than a row."""
        if self.capacity is not None and len(request.prompt) + request.max_tokens > self.capacity:
            raise CapacityError(
                f"a request of {len(request.prompt)} + {request.max_tokens} tokens does not fit a row of "
                f"{self.capacity}; shorten the prompt, lower max_tokens, or make rows longer (capacity)"
            )


class Answer(Protocol):
    """What becomes of a task's tokens; a Transcript is one."""

    stats: Stats

    @property
    def ended(self) -> bool:
        """Whether it is whole."""
        ...

    def read(self, done: Round, row: int) -> list[Piece]:
        """A round has emitted something in the task's row."""
        ...


@dataclass(slots=True, eq=False)
class Task:
    """A request under way, and what has been written for it."""

    request: Request
    """A checked one."""
    answer: Answer
    drafter: str = ""
    """The name of what drafts for it, where there are several."""
    read: int = 0
    """Tokens of its prompt that have been run."""
    served: int = 0
    """When a piece of its prompt was last run."""
    seated: float | None = None
    """When it got a row, by the clock of `time.perf_counter`."""
    cached: int = 0
    """Tokens of its prompt that an earlier task had already run."""
    speculation: str = "on"
    """Or why nothing is drafted for it now."""
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        """Whether its row is free for others."""
        return self.cancelled or self.answer.ended

    @property
    def unread(self) -> bool:
        """Whether some of its prompt has to be run before it takes part in rounds."""
        return self.read < max(1, len(self.request.prompt) - 1)

    @property
    def size(self) -> int:
        """Tokens its row has to hold."""
        return len(self.request.prompt) + self.request.max_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """What came of one step."""

    pieces: list[tuple[Task, list[Piece]]] = field(default_factory=list)
    """Of every task whose row took part in the round."""
    done: Round | None = None
    """The round; None if no row was ready for one."""
    rows: list[int] = field(default_factory=list)
    """The rows that took part in it, those of the tasks in `pieces`."""


class Scheduler:
    """Gives rows to tasks as they come free, and runs rounds over the rows there are."""

    def __init__(
        self,
        target: Target,
        make_drafter: Callable[[], Drafter],
        eos: Sequence[int],
        limits: Limits,
        *,
        rule: str = "match",
        weigh: bool = False,
    ):
        """`rule` says which drafted tokens survive (`accept.py`). With `weigh`, nothing is drafted while that does not
        pay; what is drafted then depends on the time that rounds take.
        """
        self.target, self.eos, self.limits = target, tuple(eos), limits
        self._make_drafter, self._rule = make_drafter, rule
        self._waiting: deque[Task] = deque()
        self._seated: list[Task] = []
        """The tasks of the state's rows, in order."""
        self._live: tuple[Drafter, State] | None = None
        """None while there are no rows."""
        self._reading: list[Task] = []
        """Those whose prompts are being run."""
        self._load = Load() if weigh else None
        # A CPU that others keep busy says nothing of what rounds cost.
        self._clock = time.thread_time if target.device.type == "cpu" else time.perf_counter
        self._pieces, self._prefixes = 0, PrefixStore(limits.prefix_tokens)
        self.drafting = True
        """Whether drafts pay under the present load."""

    @property
    def waiting(self) -> int:
        """Tasks that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Tasks that have a row."""
        return sum(not task.ended for task in self._seated)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting) or self.running > 0

    def submit(self, task: Task) -> None:
        """Have a task wait for a row. Raises CapacityError for one that is longer than a row."""
        self.limits.check(task.request)
        if not task.request.speculate:
            task.speculation = ASKED_NOT_TO
        self._waiting.append(task)

    def cancel(self, task: Task) -> None:
        """Give a task up; its row is free before the next round."""
        task.cancelled = True
        if task in self._waiting:
            self._waiting.remove(task)

    def rest(self) -> None:
        """Free the memory of its rows, if none of them is used."""
        if not self.running:
            self._seated, self._live = [], None

    def fail(self) -> list[Task]:
        """After an error: give up the tasks that it concerns, and return them."""
        blamed = None if self._live is None else self._live[1].constraints.blamed
        concerned = [task for task in self._seated if not task.ended]
        if self._reading or blamed is not None:
            concerned = self._reading if blamed is None else [self._seated[blamed]]
        else:  # what the error has left of the rows is not known
            self._seated, self._live = [], None
        self._reading = []
        for task in concerned:
            self.cancel(task)
        return concerned

    def read_prompts(self) -> None:
        """Give rows to the tasks that wait, as far as there are any, and run all their prompts at once."""
        began = time.perf_counter()
        self._give_rows()
        while any(task.unread for task in self._seated):
            self._read_some(len(self._seated))
        synchronise(self.target.device)
        share = (time.perf_counter() - began) / len(self._seated)
        for task in self._seated:
            task.answer.stats.prefill_seconds = share

    def step(self) -> Step:
        """Give rows away, run a piece of a prompt, then a round over the rows whose prompts have been run."""
        self._give_rows()
        self._read_piece()
        if self._live is None or not self._live[1].running:
            return Step()
        self._weigh()
        began, worked = time.perf_counter(), self._clock()
        done = step(self.target, *self._live)
        seconds, worked = time.perf_counter() - began, self._clock() - worked
        working = [row for row, emitted in enumerate(done.emitted) if emitted]
        self._learn(done, working, worked)
        pieces = list[tuple[Task, list[Piece]]]()
        for row in working:
            task = self._seated[row]
            pieces.append((task, task.answer.read(done, row)))
            task.answer.stats.decode_seconds += seconds / len(working)
        return Step(pieces, done, working)

    def _weigh(self) -> None:
        """Draft in the coming round if that pays."""
        if self._load is None or self._live is None or self._live[0].nodes == 1:
            return
        state = self._live[1]
        rows = sum(row.active for row in state.rows)
        state.drafting, state.price, state.weighed = self._load.drafts(rows), self._load.price(rows), True
        state.longest_draft = self._load.most(rows)
        self.drafting = self._load.pays(rows)
        for task in self._seated:
            if task.request.speculate:
                task.speculation = "on" if self.drafting else UNPROFITABLE

    def _learn(self, done: Round, working: Sequence[int], seconds: float) -> None:
        """What the round has cost and brought."""
        if self._load is None or self._live is None or self._live[0].nodes == 1:
            return
        if any(self._seated[row].request.speculate for row in working):
            tokens, steps = sum(map(len, done.emitted)), max(done.drafted)
            self._load.learn(len(working), self._live[1].drafting, tokens, steps, seconds)

    def _give_rows(self) -> None:
        """Free the rows of tasks that have ended, and give rows to those that wait."""
        kept = {row for row, task in enumerate(self._seated) if not task.ended}
        count = min(len(self._waiting), self.limits.rows - len(kept))
        if count == 0 and len(kept) == len(self._seated):
            return
        if kept:
            self._rearrange(kept, count)
        else:
            self.rest()  # what they had is free for the rows to come
            self._seated = [self._waiting.popleft() for _ in range(count)]
            if count:
                self._begin([task.request for task in self._seated])
        for task in self._seated:
            if task.seated is None:
                task.seated = time.perf_counter()
                if self._live is not None and self._live[0].nodes == 1:
                    task.speculation = NO_DRAFTER

    @torch.inference_mode()
    def _rearrange(self, kept: set[int], count: int) -> None:
        assert self._live is not None, "rows are kept"
        drafter, state = self._live
        joining = [self._waiting[number] for number in range(count)]
        order, most = arrangement(kept, count), self.limits.capacity or 0
        longest = max((task.size for task in self._waiting), default=0)
        if longest > state.capacity:  # by so much that storage grows seldom
            longest = max(longest, min(most, 2 * state.capacity))
        reserve = min(self.limits.rows, 2 * len(order))
        try:
            state.arrange(order, [task.request for task in joining], longest, reserve)
        except CapacityError:  # they wait until the rows are fewer, or none
            joining, order = [], arrangement(kept, 0)
            state.arrange(order, [])
        drafter.arrange(order)
        for _ in joining:
            self._waiting.popleft()
        fresh = iter(joining)
        self._seated = [self._seated[row] if row >= 0 else next(fresh) for row in order]

    def _begin(self, requests: Sequence[Request]) -> None:
        """A state of these requests alone."""
        longest = max((task.size for task in self._waiting), default=0)
        drafter = self._make_drafter()
        state = allocate(self.target, drafter, requests, eos=self.eos, rule=self._rule, capacity=longest)
        for row in range(len(requests)):
            state.finish(row)
        self._live = drafter, state

    def _read_piece(self) -> None:
        """Run a piece of the prompt that has waited longest, and of those that are as far as it is."""
        began = time.perf_counter()
        rows = self._read_some(1)
        seconds = time.perf_counter() - began
        for row in rows:
            self._seated[row].answer.stats.prefill_seconds += seconds / len(rows)

    def _read_some(self, most: int) -> list[int]:
        """Run a piece of some prompts: as many as fit in one piece, or in `most`. Returns their rows."""
        if self._live is None:
            return []
        drafter, state = self._live
        unread = [row for row, task in enumerate(self._seated) if task.unread]
        for row in unread:
            self._recall(row)
        if not (unread := [row for row in unread if self._seated[row].unread]):
            return []
        rows, begin, width = self._choose(unread, most)
        whole = len(rows) == state.batch
        chosen = None if whole else torch.tensor(rows, device=self.target.device)
        self._pieces, self._reading = self._pieces + 1, [self._seated[row] for row in rows]
        committed = prefill_chunk(self.target, drafter, state, chosen, begin, width)
        for place, row in enumerate(rows):
            self._prefixes.remember(state, row, begin, committed, place)
            self._seated[row].served = self._pieces
            self._advance(row, begin + width)
        self._reading = []
        return rows

    def _choose(self, unread: Sequence[int], most: int) -> tuple[list[int], int, int]:
        """(rows, begin, width) of the next piece: in turn, so that short prompts need not wait for long ones.

        Rows that are as far may share it, but for those whose next tokens will have been run with it.
        """
        first = min(unread, key=lambda row: self._seated[row].served)
        begin = self._seated[first].read
        alike = {self._beginning(row, begin): row for row in reversed(unread) if self._seated[row].read == begin}
        alike[self._beginning(first, begin)] = first
        left = {row: max(1, len(self._seated[row].request.prompt) - 1 - begin) for row in alike.values()}
        width = left[first] if most == 1 else max(left.values())
        if width < max(left.values()):  # those that go on do so where a block begins
            width = round_up(width, BLOCK)
        assert self._live is not None, "rows are seated"
        width = min(width, PREFILL_CHUNK, self._live[1].cache.slots - begin)
        others = [row for row in sorted(left) if row != first]
        return sorted([first, *others][: max(most, PREFILL_CHUNK // width)]), begin, width

    def _beginning(self, row: int, begin: int) -> object:
        """Equal for rows of which only one has to be run, as the others can recall it."""
        prompt = self._seated[row].request.prompt
        return tuple(prompt[: begin + BLOCK]) if self._prefixes.keeps and len(prompt) > begin + BLOCK else row

    def _recall(self, row: int) -> None:
        """Take what is known of a row's prompt from an earlier one."""
        assert self._live is not None, "rows are seated"
        task = self._seated[row]
        known = self._prefixes.recall(*self._live, row, task.read)
        task.cached += known - task.read
        if known > task.read:
            self._advance(row, known)

    def _advance(self, row: int, read: int) -> None:
        """So much of a row's prompt has been run."""
        assert self._live is not None, "rows are seated"
        self._seated[row].read = read
        if not self._seated[row].unread:
            self._live[1].begin(row)


def arrangement(kept: set[int], joining: int) -> list[int]:
    """Which row moves where when some are kept and others join: -1 stands for one that joins. As few as can move."""
    total = len(kept) + joining
    free = iter([*sorted(row for row in kept if row >= total), *[-1] * joining])
    return [row if row in kept else next(free) for row in range(total)]
