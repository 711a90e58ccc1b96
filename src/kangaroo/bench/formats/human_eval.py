"""HumanEval's functions to complete (Chen et al. 2021): the signature and docstring are the user's message."""

from kangaroo.bench.formats.row import Row
from kangaroo.bench.questions import Question

KEYS = frozenset({"task_id", "prompt"})


def question(row: Row) -> Question:
    """`task_id`, `prompt`; solutions and tests are not read."""
    return Question(row.id("task_id"), "humaneval", "humaneval", (row.text("prompt"),), where=row.where)
