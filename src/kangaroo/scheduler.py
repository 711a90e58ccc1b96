"""Many requests through one loop: rows that come, go and move between rounds, prompts read in pieces meanwhile.

A round costs what its rows cost: those that have finished leave, and the last take their places. A prompt is read one
piece a round, so that rows already answering keep their pace. No threads here: `engine` has one.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kangaroo.completion import Piece, Transcript
from kangaroo.decode import PREFILL_CHUNK, Round, allocate, prefill_chunk, step
from kangaroo.drafters.base import Drafter
from kangaroo.errors import CapacityError
from kangaroo.machine import synchronise
from kangaroo.model import Target
from kangaroo.passes import PROMPT_ROWS as BLOCK
from kangaroo.prefixes import PrefixStore
from kangaroo.state import Request, State


@dataclass(slots=True, eq=False)
class Task:
    """A request under way, and what has been written for it."""

    request: Request
    """A checked one."""
    transcript: Transcript
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
        return self.cancelled or self.transcript.completion is not None

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
        *,
        rows: int,
        capacity: int | None = None,
        prefix_tokens: int = 0,
    ):
        """`rows` is how many tasks run at once, `capacity` how many tokens each may have, prompt included.

        Of prompts that have been run, `prefix_tokens` tokens are kept for later ones that begin alike.
        """
        self.target, self.eos, self.rows, self.capacity = target, tuple(eos), rows, capacity
        self._make_drafter = make_drafter
        self._waiting: deque[Task] = deque()
        self._seated: list[Task] = []
        """The tasks of the state's rows, in order."""
        self._live: tuple[Drafter, State] | None = None
        """None while there are no rows."""
        self._pieces, self._prefixes = 0, PrefixStore(prefix_tokens)
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

    def check(self, task: Task) -> None:
        """Raise CapacityError for a task that is longer than a row."""
        if self.capacity is not None and task.size > self.capacity:
            raise CapacityError(
                f"a request of {len(task.request.prompt)} + {task.request.max_tokens} tokens does not fit a row of "
                f"{self.capacity}; shorten the prompt, lower max_tokens, or make rows longer (capacity)"
            )

    def submit(self, task: Task) -> None:
        """Have a task wait for a row."""
        self.check(task)
        if not task.request.speculate:
            task.speculation = "asked not to"
        self._waiting.append(task)

    def cancel(self, task: Task) -> None:
        """Give a task up; its row is free before the next round."""
        task.cancelled = True
        if task in self._waiting:
            self._waiting.remove(task)

    def fail(self) -> list[Task]:
        """After an error: give up the tasks that it concerns, and return them."""
        blamed = None if self._live is None else self._live[1].constraints.blamed
        concerned = [task for task in self._seated if not task.ended]
        if blamed is not None:
            concerned = [self._seated[blamed]]
        else:  # what the error has left of the rows is not known
            self._seated, self._live = [], None
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
            task.transcript.stats.prefill_seconds = share

    def step(self) -> Step:
        """Give rows away, run a piece of a prompt, then a round over the rows whose prompts have been run."""
        self._give_rows()
        self._read_piece()
        if self._live is None or not self._live[1].running:
            return Step()
        began = time.perf_counter()
        done = step(self.target, *self._live)
        working = [row for row, emitted in enumerate(done.emitted) if emitted]
        share, pieces = (time.perf_counter() - began) / len(working), list[tuple[Task, list[Piece]]]()
        for row in working:
            task = self._seated[row]
            pieces.append((task, task.transcript.read(done, row)))
            task.transcript.stats.decode_seconds += share
        return Step(pieces, done, working)

    def _give_rows(self) -> None:
        """Free the rows of tasks that have ended, and give rows to those that wait."""
        kept = {row for row, task in enumerate(self._seated) if not task.ended}
        count = min(len(self._waiting), self.rows - len(kept))
        if count == 0 and len(kept) == len(self._seated):
            return
        if kept:
            self._rearrange(kept, count)
        else:
            self._live = None  # its memory is free for the rows to come
            self._seated = [self._waiting.popleft() for _ in range(count)]
            if count:
                self._begin([task.request for task in self._seated])
        for task in self._seated:
            if task.seated is None:
                task.seated = time.perf_counter()

    @torch.inference_mode()
    def _rearrange(self, kept: set[int], count: int) -> None:
        assert self._live is not None, "rows are kept"
        drafter, state = self._live
        joining = [self._waiting[number] for number in range(count)]
        longest = max((task.size for task in self._waiting), default=0)  # so that storage grows seldom
        try:
            order = arrangement(kept, count)
            state.arrange(order, [task.request for task in joining], longest)
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
        state = allocate(self.target, drafter, requests, eos=self.eos, rule="match", capacity=longest)
        for row in range(len(requests)):
            state.finish(row)
        self._live = drafter, state

    def _read_piece(self) -> None:
        """Run a piece of the prompt that has waited longest, and of those that are as far as it is."""
        began = time.perf_counter()
        rows = self._read_some(1)
        seconds = time.perf_counter() - began
        for row in rows:
            self._seated[row].transcript.stats.prefill_seconds += seconds / len(rows)

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
        committed = prefill_chunk(self.target, drafter, state, chosen, begin, width)
        self._pieces += 1
        for place, row in enumerate(rows):
            self._prefixes.remember(state, row, begin, committed, place)
            self._seated[row].served = self._pieces
            self._advance(row, begin + width)
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
            width = -(-width // BLOCK) * BLOCK
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
