"""Questions to answer: what they are, whatever file they came from, and which of them are asked.

The project's own evaluation prompts are of six kinds, split into development and held-out by a hash of their id.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

from kangaroo import demo
from kangaroo.chat import are_messages
from kangaroo.checks import shown
from kangaroo.errors import DataError
from kangaroo.inputs import parse_json, read_text

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


Split = Literal["development", "held-out"]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A conversation that waits for an answer."""

    id: str
    kind: str
    messages: list[dict[str, str]]

    @property
    def split(self) -> Split:
        """Settings are chosen on the development half and measured on the other."""
        return "development" if int(sha256(self.id.encode()).hexdigest(), 16) % 2 == 0 else "held-out"


def read_prompts(path: Path = demo.PROMPTS, split: Split | None = None) -> list[EvaluationPrompt]:
    """Prompts of a JSONL file with `id`, `kind` and `messages`, in file order; only those of `split` if given.

    Raises DataError naming the line of a malformed row.
    """
    prompts = []
    for number, line in enumerate(read_text(path, "file of prompts", DataError).rstrip("\n").split("\n"), 1):
        where = f"{path}, line {number}"
        row = parse_json(line, where, DataError)
        texts = isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("kind"), str)
        if not texts or not are_messages(row.get("messages")):
            raise DataError(f"{where}: expected id, kind and messages, got {shown(row)}")
        prompts.append(EvaluationPrompt(row["id"], row["kind"], row["messages"]))
    return [prompt for prompt in prompts if split in (None, prompt.split)]


def interleave_kinds(prompts: Sequence[EvaluationPrompt]) -> list[EvaluationPrompt]:
    """The same prompts ordered so that any first few of them cover all kinds evenly."""
    return interleave(prompts, lambda prompt: prompt.kind)


def interleave(items: Sequence[Item], group: Callable[[Item], Hashable]) -> list[Item]:
    """First the first of every group, in the order in which groups appear, then the second of every group, ..."""
    seen: dict[Hashable, int] = {}
    ranks = []
    for item in items:
        ranks.append(seen.get(group(item), 0))
        seen[group(item)] = ranks[-1] + 1
    return [item for _, item in sorted(zip(ranks, items, strict=True), key=lambda pair: pair[0])]
