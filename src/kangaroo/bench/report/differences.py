"""Where an answer first departs from the baseline's. The tokens decide; the record tells how close the call was."""

from dataclasses import dataclass
from itertools import zip_longest

from kangaroo.bench.questions import QuestionId
from kangaroo.bench.records import Record


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
