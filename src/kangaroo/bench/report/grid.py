"""Records in their places: every method's answer to every question in every repeat, and nothing missing.

Beside it, where an answer first departs from the baseline's: the tokens decide, the record tells how close it was.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from kangaroo.bench.published import in_order
from kangaroo.bench.questions import QuestionId
from kangaroo.bench.records import BASELINE, Record
from kangaroo.errors import DataError

OVERALL = "overall"
"""All tasks together, where figures are given by task."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A complete set of records."""

    methods: tuple[str, ...]
    """The baseline first, then in the order of their first records."""
    tasks: dict[str, list[QuestionId]]
    """The questions of each task; Spec-Bench's tasks in the paper's order."""
    repeats: tuple[int, ...]
    records: dict[tuple[QuestionId, str, int], Record]
    """By question, method and repeat."""

    @property
    def questions(self) -> list[QuestionId]:
        """Of all tasks."""
        return [question for members in self.tasks.values() for question in members]

    def answers(self, method: str, question: QuestionId) -> list[Record]:
        """One method's answers to one question, a record per repeat."""
        return [self.records[question, method, repeat] for repeat in self.repeats]


def arrange(records: Sequence[Record]) -> Grid:
    """Put records in their places.

    Raises DataError if there are none, if an answer is missing, or if a record contradicts itself or another.
    """
    if not records:
        raise DataError("there are no records; run `kangaroo bench` first")
    others = list(dict.fromkeys(record.method for record in records if record.method != BASELINE))
    tasks: dict[QuestionId, str] = {}
    for record in records:
        _check(record)
        if tasks.setdefault(record.question, record.task) != record.task:
            both = f"{tasks[record.question]} and {record.task}"
            raise DataError(f"question {record.question} belongs to two tasks: {both}")
    if OVERALL in tasks.values():
        raise DataError(f"no task may be called {OVERALL!r}, which stands for all of them together")
    members: dict[str, list[QuestionId]] = {task: [] for task in in_order(tasks.values())}
    for question, task in tasks.items():
        members[task].append(question)
    repeats = tuple(sorted({record.repeat for record in records}))
    grid = Grid((BASELINE, *others), members, repeats, {record.key: record for record in records})
    _check_complete(grid)
    _check_turns(grid)
    return grid


def _check(record: Record) -> None:
    name = f"question {record.question}, {record.method}, repeat {record.repeat}"
    if not all(turn.tokens and turn.seconds > 0 for turn in record.turns) or not record.turns:
        raise DataError(f"{name}: a turn without tokens or without time measures nothing")
    for turn in record.turns:
        if turn.emitted and (sum(turn.emitted) != len(turn.tokens) or min(turn.emitted) < 1):
            raise DataError(
                f"{name}: rounds of {sum(turn.emitted)} tokens in all cannot have emitted {len(turn.tokens)}, "
                "at least one each"
            )
        if any(len(entries) not in (0, len(turn.emitted)) for entries in (turn.drafted, turn.stops)):
            raise DataError(
                f"{name}: {len(turn.emitted)} rounds, but {len(turn.drafted)} drafts and {len(turn.stops)} stops"
            )


def _check_complete(grid: Grid) -> None:
    missing = list(_missing(grid))
    if missing:
        question, method, repeat = missing[0]
        raise DataError(
            f"{len(missing)} answers are missing, the first by {method} to question {question} in repeat {repeat}; "
            "finish the run with the `kangaroo bench` command that began it"
        )


def _missing(grid: Grid) -> Iterable[tuple[QuestionId, str, int]]:
    for question in grid.questions:
        for method in grid.methods:
            for repeat in grid.repeats:
                if (question, method, repeat) not in grid.records:
                    yield question, method, repeat


def _check_turns(grid: Grid) -> None:
    for (question, method, repeat), record in grid.records.items():
        expected = len(grid.records[question, BASELINE, repeat].turns)
        if len(record.turns) != expected:
            raise DataError(
                f"question {question}, repeat {repeat}: {method} has {len(record.turns)} turns, "
                f"the baseline has {expected}"
            )


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first token that is not the baseline's."""

    method: str
    task: str
    question: QuestionId
    repeat: int
    turn: int
    """From 0; what comes after it had another prompt already."""
    position: int
    """Place in the turn's tokens, from 0."""
    gap: float | None
    """Between the two best scores there; None if it was not recorded."""
    tie: bool
    """Whether rounding explains it."""


def first_difference(answer: Record, plain: Record) -> FirstDifference | None:
    """None if every token of every turn is the same."""
    for place, (turn, expected) in enumerate(zip(answer.turns, plain.turns, strict=True)):
        if turn.tokens != expected.tokens:
            pairs = enumerate(zip_longest(turn.tokens, expected.tokens))
            position = next(i for i, (mine, theirs) in pairs if mine != theirs)
            gap, tie = (turn.difference.gap, turn.difference.tie) if turn.difference else (None, False)
            where = (answer.method, answer.task, answer.question, answer.repeat)
            return FirstDifference(*where, place, position, gap, tie)
    return None
