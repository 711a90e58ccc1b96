"""The project's own evaluation prompts: conversations of several kinds, half of them held out."""

from kangaroo.bench.formats.row import Row
from kangaroo.bench.prompts import EvaluationPrompt
from kangaroo.bench.questions import Question

KEYS = frozenset({"messages"})


def question(row: Row) -> Question:
    """`id`, `kind`, `messages`: the last message is the turn, the others go before it. The id decides the split."""
    name, kind = row.text("id"), row.text("kind")
    *history, last = row.messages("messages")
    split = EvaluationPrompt(name, kind, [*history, last]).split
    return Question(name, kind, kind, (last["content"],), tuple(history), split, row.where)
