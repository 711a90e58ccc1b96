"""Prompts of one's own: one to a line, with or without an id and a task."""

from kangaroo.bench.formats.row import Row
from kangaroo.bench.questions import Question

KEYS = frozenset({"prompt"})


def question(row: Row) -> Question:
    """`prompt`; `id` (else the line's number), `task` and `category` (else "prompts" and the task) are optional."""
    name = row.id("id") if "id" in row.values else row.number
    task = row.text("task") if "task" in row.values else "prompts"
    category = row.text("category") if "category" in row.values else task
    return Question(name, task, category, (row.text("prompt"),), where=row.where)
