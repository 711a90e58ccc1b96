"""GSM8K's word problems (Cobbe et al. 2021). They have no ids: a problem is known by its line."""

from kangaroo.bench.formats.row import Row
from kangaroo.bench.questions import Question

KEYS = frozenset({"question", "answer"})


def question(row: Row) -> Question:
    """`question`; the `answer` is not read."""
    return Question(row.number, "gsm8k", "gsm8k", (row.text("question"),), where=row.where)
