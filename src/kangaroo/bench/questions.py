"""Questions to answer: what they are, whatever file they came from, and which of them are asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kangaroo.bench.prompts import interleave
from kangaroo.errors import DataError

QuestionId = int | str
Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Question:
    """What a user asks, in one or more turns; each turn but the first follows the model's own answers."""

    id: QuestionId
    task: str
    """What results are grouped by."""
    category: str
    """A finer grouping; often the task itself."""
    turns: tuple[str, ...]
    history: tuple[dict[str, str], ...] = ()
    """Messages before the first turn."""
    split: str | None = None
    """The part of its file that it belongs to, where the file has parts."""
    where: str = field(default="", compare=False)
    """File and line it came from, for error messages."""

    def conversation(self, answers: Sequence[str]) -> Messages:
        """The messages up to the turn after these answers."""
        messages = [*self.history]
        for place, answer in enumerate(answers):
            messages += [_message("user", self.turns[place]), _message("assistant", answer)]
        return [*messages, _message("user", self.turns[len(answers)])]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def refuse_duplicates(questions: Sequence[Question]) -> None:
    """Raise DataError, naming both lines, if two questions have the same id."""
    first: dict[str, Question] = {}
    for question in questions:
        other = first.setdefault(str(question.id), question)
        if other is not question:
            raise DataError(f"{question.where}: question {question.id} occurs twice, first at {other.where}")


def in_running_order(questions: Sequence[Question]) -> list[Question]:
    """Questions so arranged that any first few of them cover tasks evenly, and within a task its categories.

    So a run that is limited, or cut short, speaks of all tasks; and a smaller limit asks the first of a larger one's.
    """
    return interleave(interleave(questions, lambda q: (q.task, q.category)), lambda q: q.task)
