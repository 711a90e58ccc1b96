"""Several drafters on one target: a scheduler each, which take turns, and rows that they share.

Requests get rows in the order in which they came, whatever drafts for them. A drafter that nobody asks for has no
scheduler, and one that has no request holds no rows. Rounds are not shared between drafters: two at once go half as
fast as one.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from kangaroo.drafters.base import Drafter
from kangaroo.model import Target
from kangaroo.scheduler import Limits, Scheduler, Step, Task


class Schedulers:
    """What a thread needs of a scheduler, for tasks that say what drafts for them."""

    def __init__(
        self, target: Target, drafters: Mapping[str, Callable[[], Drafter]], eos: Sequence[int], limits: Limits
    ):
        """`limits` are those of all together, but for prompts: each keeps so many tokens of them by itself."""
        self.limits = limits
        self._target, self._drafters, self._eos = target, dict(drafters), tuple(eos)
        self._made: dict[str, Scheduler] = {}
        """By drafter, the one that has waited longest for its turn first."""
        self._waiting: deque[Task] = deque()
        self._turn: Scheduler | None = None
        """Whose step was last."""

    @property
    def _schedulers(self) -> list[Scheduler]:
        return list(self._made.values())  # a copy, as other threads look too

    @property
    def waiting(self) -> int:
        """Tasks that have no row yet."""
        return len(self._waiting) + sum(one.waiting for one in self._schedulers)

    @property
    def running(self) -> int:
        """Tasks that have a row."""
        return sum(one.running for one in self._schedulers)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting) or any(one.busy for one in self._schedulers)

    @property
    def drafting(self) -> bool:
        """Whether drafts pay under the present load, whichever are made."""
        schedulers = self._schedulers
        return all(one.drafting for one in schedulers if one.busy) if self.busy else all(s.drafting for s in schedulers)

    def submit(self, task: Task) -> None:
        """Have a task wait for a row. Raises CapacityError for one that is longer than a row."""
        self.limits.check(task.request)
        self._waiting.append(task)

    def cancel(self, task: Task) -> None:
        """Give a task up; its row is free before the next round."""
        if task in self._waiting:
            task.cancelled = True
            self._waiting.remove(task)
        else:
            self._made[task.drafter].cancel(task)

    def fail(self) -> list[Task]:
        """After an error: give up the tasks that it concerns, and return them."""
        return [] if self._turn is None else self._turn.fail()

    def step(self) -> Step:
        """One step of the scheduler that has waited longest of those that have something to do."""
        self._admit()
        for one in self._schedulers:
            one.rest()
        name = next((name for name, one in self._made.items() if one.busy), None)
        if name is None:
            return Step()
        self._turn = self._made[name] = self._made.pop(name)
        return self._turn.step()

    def _admit(self) -> None:
        free = self.limits.rows - self.running - sum(one.waiting for one in self._schedulers)
        for _ in range(min(free, len(self._waiting))):
            task = self._waiting.popleft()
            if task.drafter not in self._made:
                make = self._drafters[task.drafter]
                self._made[task.drafter] = Scheduler(self._target, make, self._eos, self.limits, weigh=True)
            self._made[task.drafter].submit(task)
